"""Names → directories: on this machine, on a fake Hub on the loopback, and without any Hub."""

import errno
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from magistral_mlx.disk.room import shortage
from magistral_mlx.errors import CheckpointError, HubError
from magistral_mlx.fetch import download, hub
from tests import fake_hub
from tests.fake_hub import SHA, point_at

ORIGINAL = "mistralai/Magistral-Small-2506"
REPOS = {
    ORIGINAL: {
        "consolidated.safetensors": b"native",
        "params.json": b"{}",
        "tekken.json": b"tekken",
        "SYSTEM_PROMPT.txt": b"Think.",
        "model-00001-of-00001.safetensors": b"hf",
        "model.safetensors.index.json": b"{}",
        "config.json": b"{}",
        "README.md": b"#",
    },
    hub.RECOMMENDED: {
        "model.safetensors": b"4 bit",
        "config.json": b"{}",
        "tokenizer.json": b"[]",
        "README.md": b"#",
    },
    "someone/config-only": {"config.json": b"{}"},
}


DOWNLOADED = {"consolidated.safetensors", "params.json", "tekken.json", "SYSTEM_PROMPT.txt"}
"""The original's files in one of its two layouts."""
INVALID_NAMES = ("~nobody-of-this-name/a", "\0", "a" * 9999)


@pytest.fixture
def fake(no_hub, monkeypatch):
    """The fake Hub on the loopback."""
    with fake_hub.running(REPOS) as running:
        point_at(running.url, monkeypatch)
        yield running


@pytest.fixture
def served_files(fake):
    """Counts the files fetched from it."""
    return fake.served


def test_demo_is_in_the_package():
    assert hub.resolve("demo").weights == hub.resolve("demo").tokenizer == hub.DEMO


def test_a_directory_is_itself(tmp_path, monkeypatch):
    assert hub.resolve(str(tmp_path)) == hub.Local(weights=tmp_path, tokenizer=tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/repo").mkdir(parents=True)
    assert hub.resolve("owner/repo").weights == Path("owner/repo")


@pytest.mark.parametrize(
    "name", ["nowhere", "./a", "../a/b", "~/a", "/a/b", "a/b/c", "", "a b/c", "a/b@", *INVALID_NAMES]
)
def test_invalid_names_are_refused(name, no_hub):
    with pytest.raises(CheckpointError, match=r'Expected a directory, a Hub name .* or "demo"; found no dir'):
        hub.resolve(name)


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match=r"found the file '.*model\.gguf'"):
        hub.resolve(str(tmp_path / "model.gguf"))


def test_only_mistrals_own_layout_is_downloaded(served_files):
    found = hub.resolve(ORIGINAL, download=True)
    assert found.weights == found.tokenizer
    assert {path.name for path in found.weights.iterdir()} == DOWNLOADED
    assert served_files == Counter(f"{ORIGINAL}/{name}" for name in DOWNLOADED)


def test_a_conversion_uses_the_originals_tokenizer(served_files):
    found = hub.resolve(hub.RECOMMENDED, download=True)
    assert {path.name for path in found.weights.iterdir()} == REPOS[hub.RECOMMENDED].keys() - {"README.md"}
    assert (found.tokenizer / "tekken.json").read_bytes() == b"tekken"
    assert (found.tokenizer / "SYSTEM_PROMPT.txt").read_bytes() == b"Think."
    assert not any(fnmatch(name, "*2506/*.safetensors") for name in served_files)


@pytest.mark.parametrize("name", [ORIGINAL, hub.RECOMMENDED, f"{hub.RECOMMENDED}@{SHA}"])
def test_a_downloaded_model_is_found_without_a_network(name, served_files, monkeypatch):
    found = hub.resolve(name, download=True)
    fetched = served_files.copy()
    assert hub.resolve(name, download=True) == found
    assert hub.resolve(name) == found
    assert served_files == fetched, "a second look fetches nothing"
    point_at("http://127.0.0.1:9", monkeypatch)
    assert hub.resolve(name) == hub.resolve(name, download=True) == found
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.resolve(name) == hub.resolve(name, download=True) == found


def test_nothing_is_downloaded_without_the_option(served_files):
    with pytest.raises(HubError, match=f"neither a directory .* hf download {hub.RECOMMENDED}$"):
        hub.resolve(hub.RECOMMENDED)
    with pytest.raises(HubError, match=r"--include 'consolidated\*\.safetensors' .* --include 'tekken"):
        hub.resolve(ORIGINAL)
    assert not served_files


def test_an_interrupted_download_is_not_a_model(served_files):
    weights = hub.resolve(hub.RECOMMENDED, download=True).weights
    (weights / "model.safetensors").unlink()
    with pytest.raises(HubError, match="hf download"):
        hub.resolve(hub.RECOMMENDED)
    assert (hub.resolve(hub.RECOMMENDED, download=True).weights / "model.safetensors").is_file()


def test_a_missing_tokenizer_is_named(served_files, monkeypatch):
    hub._fetch(hub.RECOMMENDED, None)
    with pytest.raises(HubError, match=rf"hf download {ORIGINAL} --include 'tekken\.json'"):
        hub.resolve(hub.RECOMMENDED)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("someone/unknown", "the Hub has no such model, or it is private"),
        (f"{ORIGINAL}@gone", "no such revision"),
        ("someone/config-only", "has no safetensors weights"),
        ("some--one/..x", "it cannot be a Hub name"),
    ],
)
def test_models_that_the_hub_does_not_have_are_errors(name, message, served_files):
    with pytest.raises(HubError, match=message):
        hub.resolve(name, download=True)


def test_a_private_model_needs_a_token(fake, monkeypatch):
    fake.private, fake.token = {ORIGINAL}, "hf_secret"
    with pytest.raises(HubError, match="the Hub has no such model, or it is private"):
        hub.resolve(ORIGINAL, download=True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(download, "LARGE_BYTES", 1)
    assert (hub.resolve(ORIGINAL, download=True).weights / "consolidated.safetensors").is_file()


# Disk space, and interrupted downloads ------------------------------------------------------------------


BIG = random.Random(3).randbytes(300_000)


@pytest.fixture
def big(fake, monkeypatch):
    """A repository with a large file, downloaded by the code for files as large as the real 47 GB."""
    fake.repos["someone/big"] = {**REPOS[ORIGINAL], "consolidated.safetensors": BIG}
    monkeypatch.setattr(download, "LARGE_BYTES", 1000)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # the most that a broken connection loses
    monkeypatch.setattr("time.sleep", lambda _: None)  # between its five tries
    return fake


def set_free_space(monkeypatch, nbytes):
    usage = shutil._ntuple_diskusage(10**12, 10**12 - nbytes, nbytes)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def blobs(tmp_path):
    return tmp_path / "cache" / "models--someone--big" / "blobs"


def test_too_little_disk_space_is_refused_before_the_download(big, monkeypatch, tmp_path):
    """The error names what is needed and what is free."""
    everything = sum(len(big.repos["someone/big"][name]) for name in DOWNLOADED)
    set_free_space(monkeypatch, everything - 1)
    big.repos["someone/big"]["consolidated.safetensors"] = BIG
    with pytest.raises(
        HubError, match=r"'someone/big' is not downloaded: .*cache needs 0\.3 MB more on disk and"
    ):
        hub.resolve("someone/big", download=True)
    assert not big.served
    set_free_space(monkeypatch, everything)
    assert hub.resolve("someone/big", download=True).weights.is_dir()
    set_free_space(monkeypatch, 0)
    assert hub.resolve("someone/big", download=True).weights.is_dir(), "all of it is here"


def test_a_shortage_names_what_is_needed_and_what_is_free(tmp_path, monkeypatch):
    set_free_space(monkeypatch, 50 * 10**9)
    needed = {tmp_path / "cache": 47 * 10**9, tmp_path / "not" / "yet": 13.3 * 10**9}
    assert shortage({tmp_path / "cache": 47 * 10**9}) is None
    assert shortage(needed) == (
        f"{tmp_path}/cache needs 47.0 GB more and {tmp_path}/not/yet needs 13.3 GB more on disk and "
        f"{tmp_path} has 50.0 GB free; make room or use another disk"
    )


def test_two_disks_are_not_summed(tmp_path, monkeypatch):
    shared_memory = Path("/dev/shm")
    if not shared_memory.is_dir() or shared_memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    set_free_space(monkeypatch, 50 * 10**9)
    assert shortage({tmp_path: 47 * 10**9, shared_memory / "out": 13 * 10**9}) is None


def test_the_disk_needs_room_for_the_download_and_its_output(big, monkeypatch, tmp_path):
    """The output's size is known from the config, which is all that was downloaded."""
    everything, seen = sum(len(big.repos["someone/big"][name]) for name in DOWNLOADED), []

    def then(directory):
        seen.extend(path.name for path in directory.iterdir())
        return {tmp_path / "out": 1000}

    set_free_space(monkeypatch, everything + 900)
    with pytest.raises(HubError, match=r"cache needs .* MB more and .*out needs 0\.0 MB more on disk and"):
        hub.resolve("someone/big", download=True, then=then)
    assert seen == ["params.json"]
    assert big.served == Counter(["someone/big/params.json"])
    set_free_space(monkeypatch, everything + 1000)
    assert hub.resolve("someone/big", download=True, then=then).weights.is_dir()


def test_downloaded_bytes_need_no_more_room(big, monkeypatch, tmp_path):
    """Neither complete files nor partial ones are counted again."""
    big.cuts["consolidated.safetensors"] = [200_000, *[0] * 6]
    with pytest.raises(HubError, match="broke off"):
        hub.resolve("someone/big", download=True)
    set_free_space(monkeypatch, 100_100)
    assert hub.resolve("someone/big", download=True).weights.is_dir()


@pytest.mark.parametrize("kept", [1, 70_000, 299_000, 299_999])
def test_an_interrupted_download_resumes_where_it_broke_off(big, monkeypatch, capfd, kept, tmp_path):
    """In a later run, after the first lost its connection: every byte is downloaded once."""
    big.cuts["consolidated.safetensors"] = [kept, *[0] * 6]
    with pytest.raises(HubError, match="the Hub was not reached, or the connection broke"):
        hub.resolve("someone/big", download=True)
    [partial] = blobs(tmp_path).glob("*.partial")
    partial_size = partial.stat().st_size
    monkeypatch.setenv("TQDM_POSITION", "-1")  # show its progress bar without a terminal
    assert kept - 1000 < partial_size <= kept
    big.cuts.clear()
    big.sent.clear()
    found = hub.resolve("someone/big", download=True)
    assert (found.weights / "consolidated.safetensors").read_bytes() == BIG
    assert big.sent["consolidated.safetensors"] == len(BIG) - partial_size
    assert not list(blobs(tmp_path).glob("*.partial"))
    assert "consolidated.safetensors: 100%" in capfd.readouterr().err


def test_a_broken_connection_is_resumed_at_once(big):
    big.cuts["consolidated.safetensors"] = [1000, 2000, 3000]
    found = hub.resolve("someone/big", download=True)
    assert (found.weights / "consolidated.safetensors").read_bytes() == BIG
    assert big.sent["consolidated.safetensors"] == len(BIG)


def test_a_killed_download_resumes(big, tmp_path):
    """kill -9 in the middle of the large file; the part that was written is not downloaded again."""
    big.cuts["consolidated.safetensors"] = [150_000]
    code = """
import os, signal, sys
from huggingface_hub import constants
from magistral_mlx.fetch import download, hub
download.LARGE_BYTES = constants.DOWNLOAD_CHUNK_SIZE = 1000
def lost(_): os.kill(os.getpid(), signal.SIGKILL)  # when it waits before it tries again
import time; time.sleep = lost
hub.resolve("someone/big", download=True)
"""
    env = os.environ | {"HF_ENDPOINT": big.url, "HF_HUB_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    [partial] = blobs(tmp_path).glob("*.partial")
    partial_size = partial.stat().st_size
    assert 0 < partial_size <= 150_000
    big.sent.clear()
    found = hub.resolve("someone/big", download=True)
    assert (found.weights / "consolidated.safetensors").read_bytes() == BIG
    assert big.sent["consolidated.safetensors"] == len(BIG) - partial_size


def test_complete_files_are_not_downloaded_again(big):
    big.cuts["consolidated.safetensors"] = [100, *[0] * 6]
    with pytest.raises(HubError, match="broke off"):
        hub.resolve("someone/big", download=True)
    big.repos["someone/big"]["consolidated.00.safetensors"] = b"another"
    hub.resolve("someone/big", download=True)
    fetched = big.served.copy()
    hub.resolve("someone/big", download=True)
    assert big.served == fetched


def test_a_hub_without_range_requests_works(big):
    big.cuts["consolidated.safetensors"] = [1000]
    big.ranges_ignored = True
    found = hub.resolve("someone/big", download=True)
    assert (found.weights / "consolidated.safetensors").read_bytes() == BIG


def test_a_second_download_of_the_same_file_is_refused(big, tmp_path):
    name = fake_hub.etag("consolidated.safetensors", BIG)
    blobs(tmp_path).mkdir(parents=True)
    with (blobs(tmp_path) / f"{name}.partial").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(HubError, match="is being downloaded by another process; wait for it"):
            hub.resolve("someone/big", download=True)


def test_a_download_that_another_process_has_just_finished_is_used(big, monkeypatch, tmp_path):
    blob = blobs(tmp_path) / fake_hub.etag("consolidated.safetensors", BIG)

    def finish_elsewhere(*_):
        blob.write_bytes(BIG)

    monkeypatch.setattr("magistral_mlx.fetch.download.fcntl.flock", finish_elsewhere)
    hub.resolve("someone/big", download=True)
    assert not big.sent["consolidated.safetensors"]


def test_a_partial_file_is_checked_against_its_hash(big, tmp_path):
    """The file had its full length before the crash, but not yet all of its bytes."""
    blobs(tmp_path).mkdir(parents=True)
    name = fake_hub.etag("consolidated.safetensors", BIG)
    (blobs(tmp_path) / f"{name}.partial").write_bytes(BIG[:1000] + bytes(1000))
    with pytest.raises(HubError, match="was damaged; run it again"):
        hub.resolve("someone/big", download=True)
    found = hub.resolve("someone/big", download=True)
    assert (found.weights / "consolidated.safetensors").read_bytes() == BIG


@pytest.mark.parametrize("revision", ["pr", ".."])
def test_a_revision_that_is_a_directory_of_the_cache_is_not_found(no_hub, tmp_path, revision):
    (tmp_path / "cache" / "models--a--b" / "refs" / "pr").mkdir(parents=True)
    with pytest.raises(HubError, match="is neither a directory here nor a model on this machine"):
        hub.resolve(f"a/b@{revision}")


def test_a_card_that_is_not_utf8_is_read(tmp_path):
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\nbase_model: a/b\n---\n")
    assert hub.known_as(str(tmp_path)) == ["a/b", tmp_path.name]


# Inspected, not downloaded ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "size"),
    [(ORIGINAL, "params.json", 6 + 6 + 6), (hub.RECOMMENDED, "config.json", 5 + 2)],
    ids=["native", "hf"],
)
def test_look_downloads_only_the_config(fake, name, config, size):
    directory, missing = hub.look(name)
    assert [path.name for path in directory.iterdir()] == [config]
    assert fake.served == Counter([f"{name}/{config}"])
    assert missing == size
    with pytest.raises(HubError, match="hf download"):
        hub.resolve(name)


def test_look_at_a_local_model_downloads_nothing(fake, tmp_path):
    assert hub.look("demo") == (hub.DEMO, None)
    assert hub.look(str(tmp_path)) == (tmp_path, None)
    weights = hub.resolve(ORIGINAL, download=True).weights
    assert hub.look(ORIGINAL) == (weights, None)
    with pytest.raises(HubError, match="cannot be looked at: the Hub has no such model"):
        hub.look("someone/unknown")


def test_a_gated_model_is_an_error(served_files, monkeypatch):
    gated = {"X-Error-Code": "GatedRepo"}
    monkeypatch.setattr(fake_hub.Handler, "file", lambda self, *_: self._send(403, b"", gated))
    with pytest.raises(HubError, match="it is gated"):
        hub.resolve(ORIGINAL, download=True)


def test_a_full_disk_is_an_error(served_files, monkeypatch):
    def full(*args, local_files_only, **kwargs):
        raise LocalEntryNotFoundError("none") if local_files_only else OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(HubError, match=r"it cannot be stored .*No space left"):
        hub._fetch(ORIGINAL, None)


def test_a_failing_hub_is_an_error(served_files, monkeypatch):
    monkeypatch.setattr(fake_hub.Handler, "file", lambda self, *_: self._send(500, b""))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between its five tries
    with pytest.raises(HubError, match="not reached, or the connection broke"):
        hub.resolve(ORIGINAL, download=True)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the Hub was not reached"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_no_network_is_an_error(environment, message, tmp_path):
    code = "from magistral_mlx.fetch import hub; hub.resolve('mistralai/Magistral-Small-2506', download=True)"
    env = os.environ | {"HF_HOME": str(tmp_path)} | environment
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith("magistral_mlx.errors.HubError: 'mistralai/Magistral")
    assert message in done.stderr.splitlines()[-1]
