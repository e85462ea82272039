"""A killed or interrupted conversion resumes, with the same bytes as its result, or says why it cannot."""

import errno
import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path

import mlx.core as mx
import pytest

from magistral_mlx.convert import conversion as converter
from magistral_mlx.convert import plan, quantize
from magistral_mlx.convert.conversion import Job, convert
from magistral_mlx.convert.recipe import named
from magistral_mlx.disk import journal
from magistral_mlx.disk.checkpoint import open_checkpoint
from magistral_mlx.disk.journal import Journal, work_directory
from magistral_mlx.errors import CheckpointError, ConversionError
from tests import models

SMALL = replace(models.TINY, dim=64, n_layers=1, n_heads=4, n_kv_heads=2, hidden_dim=128, vocab_size=256)
SIDECARS = {"README.md": b"# A card\n", "mistral/tekken.json": b"{}"}
SHARD_BYTES, BLOCK_BYTES = 24_000, 12_000
"""Small enough for several files, and for several blocks in the larger tensors."""

CHILD = f"""
import os, resource, signal, sys, time
from pathlib import Path
from magistral_mlx.convert import conversion, plan, quantize
from magistral_mlx.disk import journal
from magistral_mlx.disk.checkpoint import open_checkpoint

source, out, sidecars, code = Path(sys.argv[1]), Path(sys.argv[2]), eval(sys.argv[3]), sys.argv[4]
plan.SHARD_BYTES, quantize.BLOCK_BYTES = {SHARD_BYTES}, {BLOCK_BYTES}

def kill(): os.kill(os.getpid(), signal.SIGKILL)

exec(code)
conversion.convert(conversion.Job(checkpoint=open_checkpoint(source), out=out, sidecars=sidecars))
"""
KILL_AT = """
left = {n}
def fault(point):
    global left
    left -= point == {point!r}
    left or kill()
conversion.fault = journal.fault = fault
"""
SLOW_DOWN = """
conversion.fault = journal.fault = lambda point: time.sleep(0.004)
print("begun", flush=True)
"""


@pytest.fixture(autouse=True)
def _sizes(monkeypatch):
    monkeypatch.setattr(plan, "SHARD_BYTES", SHARD_BYTES)
    monkeypatch.setattr(quantize, "BLOCK_BYTES", BLOCK_BYTES)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The source of every test here; must be unchanged at the end, bytes and modification time."""
    path = models.write_native(tmp_path_factory.mktemp("source"), SMALL, dtype=mx.bfloat16)
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.iterdir()}
    yield path
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.iterdir()} == before


@pytest.fixture(scope="module")
def expected_hashes(source, tmp_path_factory):
    """The result of an uninterrupted conversion."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SHARD_BYTES", SHARD_BYTES)
        patch.setattr(quantize, "BLOCK_BYTES", BLOCK_BYTES)
        return hashes(run(source, tmp_path_factory.mktemp("whole") / "out"))


def run(source, out, *, progress=lambda _: None, **options):
    options = {"sidecars": SIDECARS} | options
    convert(Job(checkpoint=open_checkpoint(source), out=out, **options), progress)
    return out


def hashes(directory):
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in directory.rglob("*")
        if file.is_file()
    }


def conversion_process(source, out, code, *, sidecars=SIDECARS):
    arguments = [sys.executable, "-c", CHILD, str(source), str(out), repr(sidecars), code]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_until_killed_at(source, out, point, n=1):
    with conversion_process(source, out, KILL_AT.format(point=point, n=n)) as process:
        _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors


def assert_resumes(source, out, expected_hashes):
    """The same call again: the same bytes, and no work directory left."""
    run(source, out)
    assert hashes(out) == expected_hashes
    assert list(out.parent.iterdir()) == [out]


# Killed -------------------------------------------------------------------------------------------------


def fault_points(source, out):
    """Every fault point of a run, in order."""
    passed = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (converter, journal):
            patch.setattr(module, "fault", passed.append)
        run(source, out)
    return passed


KILLS = [
    *[("header", n) for n in (1, 2)],
    *[("block", n) for n in (1, 2, 12, 21)],
    *[("journal", n) for n in (1, 2, 7, 13, 14)],
    *[("file", n) for n in (1, 4, 5)],
    ("rename", 1),
    ("renamed", 1),
]


def test_every_fault_point_is_passed_and_tested(source, tmp_path):
    passed = fault_points(source, tmp_path / "out")
    assert Counter(passed) == {
        "header": 2,
        "block": 21,
        "file": 5,
        "rename": 1,
        "renamed": 1,
        "journal": 1 + 12 + 1,  # the fingerprint, each tensor, the end
    }
    assert passed[0] == "journal"
    assert passed[-3:] == ["journal", "rename", "renamed"]
    assert {point for point, _ in KILLS} == set(passed)


@pytest.mark.parametrize(("point", "n"), KILLS)
def test_a_killed_conversion_resumes(source, expected_hashes, tmp_path, point, n):
    out = tmp_path / "out"
    run_until_killed_at(source, out, point, n)
    assert out.exists() == (point == "renamed")
    assert work_directory(out).exists()
    assert_resumes(source, out, expected_hashes)


def test_a_conversion_killed_again_and_again_resumes(source, expected_hashes, tmp_path):
    out = tmp_path / "out"
    for point, n in (
        ("journal", 4),
        ("header", 2),
        ("block", 5),
        ("journal", 3),
        ("file", 2),
        ("renamed", 1),
    ):
        run_until_killed_at(source, out, point, n)
    assert hashes(out) == expected_hashes
    assert_resumes(source, out, expected_hashes)


def test_finished_tensors_are_not_converted_again(source, expected_hashes, tmp_path):
    out, seen = tmp_path / "out", []
    run_until_killed_at(source, out, "journal", 8)  # the fingerprint and seven of twelve tensors
    run(source, out, progress=seen.append)
    assert len({step.tensor for step in seen}) == 5
    assert seen[-1].done == seen[-1].total
    assert hashes(out) == expected_hashes


@pytest.mark.parametrize("moments", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_a_conversion_killed_at_random_moments_resumes(source, expected_hashes, tmp_path, moments):
    rng, latest = random.Random(moments), 0.3
    unfinished = 0
    for attempt in count():
        out = tmp_path / str(attempt) / "out"
        with conversion_process(source, out, SLOW_DOWN) as process:
            assert process.stdout.readline() == "begun\n"
            time.sleep(rng.uniform(0, latest))
            process.kill()
        if out.exists() and not work_directory(out).exists():
            latest /= 2  # killed too late: on a busy machine the test is slower than the conversion
            assert hashes(out) == expected_hashes
            continue
        assert_resumes(source, out, expected_hashes)
        unfinished += 1
        if unfinished == moments:
            break


# The journal --------------------------------------------------------------------------------------------

FINGERPRINT = {"recipe": "4bit", "source model.safetensors": "12 bytes"}


def test_a_journal_cut_off_at_any_byte_keeps_its_complete_lines(tmp_path):
    target = tmp_path / "out"
    with Journal(target, FINGERPRINT) as written:
        for n in range(3):
            written.record(f"tensor {n}", n / 3)
    file = work_directory(target) / "journal.jsonl"
    content = file.read_bytes()
    for length in range(len(content) + 1):
        file.write_bytes(content[:length])
        complete = max(content[:length].count(b"\n") - 1, 0)
        with Journal(target, FINGERPRINT) as resumed:
            assert resumed.done == {f"tensor {n}": n / 3 for n in range(complete)}
            resumed.record("more", None)
        lines = [json.loads(line) for line in file.read_bytes().splitlines()]
        assert lines[0] == FINGERPRINT
        assert lines[-1] == {"tensor": "more", "value": None}


@pytest.mark.parametrize("kept", [0.0, 0.4, 0.97])
def test_a_conversion_with_a_truncated_journal_resumes(source, expected_hashes, tmp_path, kept):
    out = tmp_path / "out"
    run_until_killed_at(source, out, "rename")
    file = work_directory(out) / "journal.jsonl"
    os.truncate(file, int(file.stat().st_size * kept))
    assert_resumes(source, out, expected_hashes)


@pytest.mark.parametrize(
    "line",
    [
        b"[1, 2]",
        b"\xff\xfe",
        b"\0\0\0",
        b"[" * 100_000,
        b'{"tensor": 1, "value": null}',
        b'{"tensor": "a"}',
        b'{"tensor": "a", "value": "b"}',
        b"{}",
        b"null",
    ],
    ids=lambda line: repr(line[:20]),
)
def test_a_damaged_journal_is_refused(tmp_path, line):
    target = tmp_path / "out"
    work = work_directory(target)
    with Journal(target, FINGERPRINT) as journal:
        journal.record("a", 0.5)
    file = work / "journal.jsonl"
    intact = file.read_bytes()
    for damaged in (intact + line + b"\n", line + b"\n" + intact):
        file.write_bytes(damaged)
        with (
            pytest.raises(ConversionError, match=f"remove {work} to start over"),
            Journal(target, FINGERPRINT),
        ):
            pass
        assert file.read_bytes() == damaged
    file.write_bytes(intact)
    with Journal(target, FINGERPRINT) as journal:
        assert journal.done == {"a": 0.5}


def test_a_journal_of_another_version_is_refused(source, expected_hashes, tmp_path):
    out = tmp_path / "out"
    run_until_killed_at(source, out, "journal", 3)
    file = work_directory(out) / "journal.jsonl"
    first, rest = file.read_bytes().split(b"\n", 1)
    file.write_bytes(first.replace(b'"version of mlx": "', b'"version of mlx": "0.') + b"\n" + rest)
    with pytest.raises(
        ConversionError, match=rf"the version of mlx was 0\.\d\S*, is {mx.__version__}; resume it"
    ):
        run(source, out)
    file.write_bytes(json.dumps({"format": 0}).encode() + b"\n")
    with pytest.raises(
        ConversionError, match=r"the format was 0, is not there, the recipe was not there, is 4"
    ):
        run(source, out)
    shutil.rmtree(work_directory(out))
    assert_resumes(source, out, expected_hashes)


def test_other_arguments_after_publication_are_refused(source, expected_hashes, tmp_path):
    """Killed after the rename: with other arguments the result is neither accepted nor touched."""
    out = tmp_path / "out"
    run_until_killed_at(source, out, "renamed")
    with pytest.raises(ConversionError, match="the recipe was 4bit, is 8bit"):
        run(source, out, recipe=named("8bit"))
    assert hashes(out) == expected_hashes
    assert_resumes(source, out, expected_hashes)
    with pytest.raises(ConversionError, match="exists and nothing is overwritten"):
        run(source, out)


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda file: os.truncate(file, 3000)], ids=["gone", "cut off"]
)
def test_a_lost_output_file_is_noticed(source, expected_hashes, tmp_path, damage):
    """The journal lists tensors that the file no longer has; zeros would be taken for weights."""
    out = tmp_path / "out"
    run_until_killed_at(source, out, "journal", 9)
    damage(work_directory(out) / "out" / "model-00001-of-00002.safetensors")
    with pytest.raises(
        ConversionError, match=r"model-00001-of-.* is missing or was cut off since; remove .*partial"
    ):
        run(source, out)
    shutil.rmtree(work_directory(out))
    assert_resumes(source, out, expected_hashes)


def test_a_target_that_appeared_since_is_refused_at_once(source, tmp_path):
    """Between a kill and the next run: noticed at once, not at the rename."""
    out, seen = tmp_path / "out", []
    run_until_killed_at(source, out, "journal", 5)
    out.mkdir()
    (out / "precious").touch()
    with pytest.raises(ConversionError, match="exists and nothing is overwritten"):
        run(source, out, progress=seen.append)
    assert not seen


def test_a_removed_result_is_noticed(source, expected_hashes, tmp_path):
    """What the journal lists as finished is gone: that must not count as success."""
    out = tmp_path / "out"
    run_until_killed_at(source, out, "renamed")
    shutil.rmtree(out)
    with pytest.raises(
        ConversionError, match=f"is missing or was cut off since; remove {work_directory(out)}"
    ):
        run(source, out)
    shutil.rmtree(work_directory(out))
    assert_resumes(source, out, expected_hashes)


def test_the_root_directory_is_refused(source):
    with pytest.raises(ConversionError, match="/ exists and nothing is overwritten"):
        run(source, Path("/"))


def test_a_second_conversion_to_the_same_target_is_refused(source, expected_hashes, tmp_path):
    out, refused = tmp_path / "out", []

    def start_second(_):
        with pytest.raises(
            ConversionError, match=r"another conversion to .*out is running; wait for it"
        ) as caught:
            run(source, out)
        refused.append(caught)

    run(source, out, progress=start_second)
    assert len(refused) == 21
    assert hashes(out) == expected_hashes


# Other arguments, another source ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"recipe": named("8bit")}, "the recipe was 4bit, is 8bit"),
        ({"recipe": named("4bit").but([("lm_head", "8bit")])}, "the recipe was 4bit, is 4bit, lm_head: "),
        ({"dtype": mx.float16}, "the dtype was BF16, is F16"),
        ({"verify": False}, "the verification was True, is False"),
        ({"sidecars": SIDECARS | {"README.md": b"#"}}, r"the file README.md was \w{64}, is \w{64}"),
        (
            {"sidecars": {"README.md": b"# A card\n"}},
            r"the file mistral/tekken.json was \w{64}, is not there",
        ),
        ({"sidecars": SIDECARS | {"more": b""}}, r"the file more was not there, is \w{64}"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_other_arguments_are_refused(source, expected_hashes, tmp_path, options, change):
    out = tmp_path / "out"
    run_until_killed_at(source, out, "journal", 9)
    before = hashes(tmp_path)
    with pytest.raises(ConversionError, match=change) as caught:
        run(source, out, **options)
    assert "resume it with the same source and arguments, or remove" in str(caught.value)
    assert str(work_directory(out)) in str(caught.value)
    assert hashes(tmp_path) == before
    assert_resumes(source, out, expected_hashes)


def change_a_weight(file):
    """A weight changes; the size does not."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def change_the_heads(file):
    """The same shapes with another number of heads: rows of q and k would be permuted differently."""
    params = json.loads((file.parent / "params.json").read_text())
    params |= {"n_heads": 2 * params["n_heads"], "n_kv_heads": 2 * params["n_kv_heads"]}
    params["head_dim"] //= 2
    (file.parent / "params.json").write_text(json.dumps(params))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            change_a_weight,
            r"the source consolidated.safetensors was (\d+) bytes of time \d+, is \1 bytes of time \d+",
        ),
        (
            os.utime,
            r"the source consolidated.safetensors was (\d+) bytes of time \d+, is \1 bytes of time \d+",
        ),
        (
            lambda file: models.write_native(file.parent, SMALL),
            r"was (\d+) bytes of time \d+, is (?!\1)\d+ bytes",
        ),
        (change_the_heads, "the source's configuration was"),
        (
            lambda file: file.rename(file.with_name("consolidated.0.safetensors")),
            r"is not there, .* was not there",
        ),
    ],
    ids=["content", "time", "size", "configuration", "name"],
)
def test_a_source_that_changed_between_runs_is_refused(source, tmp_path, change, message):
    copy = shutil.copytree(source, tmp_path / "source")
    out = tmp_path / "made" / "out"
    run_until_killed_at(copy, out, "journal", 6)
    before = hashes(work_directory(out))
    change(copy / "consolidated.safetensors")
    with pytest.raises(ConversionError, match=message):
        run(copy, out)
    assert hashes(work_directory(out)) == before


def test_a_source_that_changes_during_a_run_is_refused(source, tmp_path):
    copy = shutil.copytree(source, tmp_path / "source")
    out = tmp_path / "made" / "out"
    with pytest.raises(ConversionError, match="changed while it was converted"):
        run(
            copy,
            out,
            progress=lambda step: (
                step.done == step.total and change_a_weight(copy / "consolidated.safetensors")
            ),
        )
    assert not out.exists()


def test_nonfinite_weights_can_be_allowed_in_a_later_run(tmp_path):
    """What was converted before the non-finite tensor is kept; the result is as if allowed at once."""
    weights = models.random_weights(SMALL, dtype=mx.bfloat16)
    weights["lm_head.weight"][7, 7] = float("nan")
    source = models.write_hf(tmp_path / "source", SMALL)
    models.save_shards(source, weights, 1)
    seen = []
    with pytest.raises(ConversionError, match=r"lm_head\.weight holds weights that are not finite"):
        run(source, tmp_path / "a" / "out", sidecars={})
    run(source, tmp_path / "a" / "out", sidecars={}, allow_nonfinite=True, progress=seen.append)
    assert "model.embed_tokens.weight" not in {step.tensor for step in seen}
    assert hashes(tmp_path / "a") == hashes(
        run(source, tmp_path / "b" / "out", sidecars={}, allow_nonfinite=True).parent
    )


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
@pytest.mark.parametrize("options", [{}, {"verify": False}, {"recipe": named("bf16")}], ids=str)
@pytest.mark.parametrize("killed", ["before its end", "published"])
def test_nonfinite_weights_must_be_allowed_in_every_run(tmp_path, monkeypatch, name, options, killed):
    """A later run needs the same permission as the earlier one, wherever the weights are."""
    weights = models.random_weights(SMALL, dtype=mx.bfloat16)
    weights[name][-1] = float("nan")
    source = models.write_hf(tmp_path / "source", SMALL)
    models.save_shards(source, weights, 1)
    out = tmp_path / "made" / "out"
    point = "renamed" if killed == "published" else "rename"

    def fault(reached):
        if reached == point:
            raise KeyboardInterrupt

    monkeypatch.setattr(journal, "fault", fault)
    with pytest.raises(KeyboardInterrupt):
        run(source, out, allow_nonfinite=True, **options)
    monkeypatch.setattr(journal, "fault", lambda _: None)
    with pytest.raises(
        ConversionError,
        match=rf"{re.escape(name)} holds .* \(NaN or Inf\), .* --allow-nonfinite; give it again",
    ):
        run(source, out, **options)
    run(source, out, allow_nonfinite=True, **options)
    assert not work_directory(out).exists()


# Flushed before it is recorded --------------------------------------------------------------------------


def test_everything_is_flushed_before_it_is_relied_on(source, tmp_path, monkeypatch):
    """Files are told apart by inode: all that a rename or a journal line relies on is flushed before it."""
    out, work, events = tmp_path / "out", work_directory(tmp_path / "out"), []
    fsync, pwrite, rename = os.fsync, os.pwrite, os.rename

    def logged(kind, call):
        def logged_call(fd, *rest):
            events.append((kind, os.fstat(fd).st_ino))
            return call(fd, *rest)

        return logged_call

    def renamed(old, new):
        events.append(("rename", Path(old).stat().st_ino))
        rename(old, new)

    monkeypatch.delattr(fcntl, "F_FULLFSYNC", raising=False)
    monkeypatch.setattr(os, "fsync", logged("fsync", fsync))
    monkeypatch.setattr(os, "pwrite", logged("write", pwrite))
    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(journal, "fault", lambda point: events.append((point, None)))
    monkeypatch.setattr(converter, "fault", lambda point: events.append((point, None)))
    work.mkdir()
    work_inode = work.stat().st_ino
    run(source, out)
    inode = {str(path.relative_to(out)): path.stat().st_ino for path in [out, *out.rglob("*")]}

    published = events.index(("rename", inode["."]))
    for name, number in inode.items():
        flushed = last(events[:published], ("fsync", number))
        assert flushed > last(events[:published], ("write", number)), name
    assert ("fsync", tmp_path.stat().st_ino) in events[published : events.index(("renamed", None))]

    lines = [place for place, event in enumerate(events) if event == ("journal", None)]
    assert {("fsync", inode["."]), ("fsync", work_inode)} <= set(events[: lines[1]])
    for begin, end in pairwise(lines[:-1]):
        writes = {number for kind, number in events[begin:end] if kind == "write"}
        assert writes
        assert all(
            ("fsync", number) in events[last(events[:end], ("write", number)) : end] for number in writes
        )


def last(events, event):
    """The index of an event's last occurrence; -1: none."""
    return max((place for place, found in enumerate(events) if found == event), default=-1)


def test_full_fsync_is_used_where_it_is_supported(tmp_path, monkeypatch):
    """On macOS fsync only reaches the drive's cache; some file systems there refuse the full one."""
    calls, refuse = [], []

    def control(fd, command, *rest):
        calls.append(command)
        if refuse:
            raise OSError(errno.ENOTSUP, "not supported")
        return 0

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", lambda _: calls.append("fsync"))
    with (tmp_path / "file").open("wb") as file:
        journal.flush(file.fileno())
        journal.flush_directory(tmp_path)
        assert calls == [51, 51]
        refuse.append(True)
        journal.flush(file.fileno())
        assert calls == [51, 51, 51, "fsync"]


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_system_calls_flush_before_the_rename_and_only_read_the_source(source, expected_hashes, tmp_path):
    """Traced from outside: each file's last write, its fsync, the rename, the directory's fsync; the source
    is only read.
    """
    out, log = tmp_path / "out", tmp_path / "log"
    strace = [
        "strace",
        "-f",
        "-y",
        "-qq",
        "-o",
        str(log),
        "-e",
        "trace=openat,pwrite64,write,ftruncate,fsync,rename",
    ]
    command = [*strace, sys.executable, "-c", CHILD, str(source), str(out), repr(SIDECARS), ""]
    if (done := subprocess.run(command, capture_output=True, text=True, check=False)).returncode:
        pytest.skip(f"strace may not trace here: {done.stderr[-200:]}")
    calls = log.read_text().splitlines()
    assert hashes(out) == expected_hashes
    opened = [call for call in calls if f'openat(AT_FDCWD<{Path.cwd()}>, "{source}' in call]
    assert opened
    assert all("O_RDONLY" in call for call in opened)
    assert not [call for call in calls if re.search(rf"(write|pwrite64|ftruncate)\(\d+<{source}", call)]
    published = next(n for n, call in enumerate(calls) if re.search(rf'rename\(".*/out", "{out}"\)', call))
    for name in expected_hashes:
        written = [n for n, call in enumerate(calls) if re.search(rf"write(64)?\(\d+<[^>]*out/{name}>", call)]
        flushed = [n for n, call in enumerate(calls) if re.search(rf"fsync\(\d+<[^>]*out/{name}>", call)]
        assert max(written) < max(flushed) < published, name
    assert any(re.search(rf"fsync\(\d+<{tmp_path}>\)", call) for call in calls[published:])


# Full disks and missing permissions ---------------------------------------------------------------------


def test_a_conversion_resumes_after_the_file_size_limit_was_reached(source, expected_hashes, tmp_path):
    """EFBIG, as from a quota: each file gets its full size first."""
    out = tmp_path / "out"
    with conversion_process(
        source, out, "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))"
    ) as process:
        _, errors = process.communicate()
    assert re.search(
        r"ConversionError: writing .*out failed: File too large; fix that and run it again", errors
    )
    assert not out.exists()
    assert_resumes(source, out, expected_hashes)


def test_a_half_written_journal_line_is_ignored(source, tmp_path):
    """A half-written line, as on a full disk, does not count; nothing is written after it."""
    many = SIDECARS | {f"{n:0200}": b"" for n in range(120)}  # the journal is larger than any weight file
    out = tmp_path / "out"
    with conversion_process(source, out, KILL_AT.format(point="journal", n=5), sidecars=many) as process:
        process.communicate()
    size = (work_directory(out) / "journal.jsonl").stat().st_size
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size + 90}, {size + 90}))"
    with conversion_process(source, out, limit, sidecars=many) as process:
        _, errors = process.communicate()
    assert re.search(r"ConversionError: writing .*out failed: File too large", errors)
    assert (work_directory(out) / "journal.jsonl").stat().st_size == size + 90
    run(source, out, sidecars=many)
    assert hashes(out) == hashes(run(source, tmp_path / "fresh", sidecars=many))


@contextmanager
def mounted(place, options):
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_conversion_resumes_after_the_disk_was_full(source, expected_hashes, tmp_path):
    with mounted(tmp_path / "disk", "size=1m") as disk:
        out, filler = disk / "out", disk / "filler"

        def fill(step):
            if not filler.exists() and step.done > step.total / 3:
                with filler.open("wb", buffering=0) as file, suppress(OSError):
                    while True:
                        file.write(bytes(2**12))

        with pytest.raises(
            ConversionError, match=r"writing .*out failed: No space left on device; fix that and run"
        ):
            run(source, out, progress=fill)
        assert not out.exists()
        with pytest.raises(
            ConversionError, match=r"needs .* MB more on disk and .* has 0\.0 MB free; make room"
        ):
            run(source, out)
        filler.unlink()
        assert_resumes(source, out, expected_hashes)


@pytest.mark.parametrize("n", [1, 8, 30])
def test_a_conversion_resumes_after_a_partial_write_failed(source, expected_hashes, tmp_path, monkeypatch, n):
    pwrite, calls = os.pwrite, []

    def failing(fd, data, offset):
        calls.append(offset)
        if len(calls) > n:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data[: len(data) // 2 + 1], offset)  # never all of it

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(
        ConversionError, match="No space left on device; fix that and run it again: it resumes"
    ):
        run(source, tmp_path / "out")
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[: len(data) // 2 + 1], offset))
    assert_resumes(source, tmp_path / "out", expected_hashes)


def test_a_conversion_resumes_after_a_flush_failed(source, expected_hashes, tmp_path, monkeypatch):
    """Where only the flush reports a full disk: the tensor must not be recorded as finished."""
    calls, fsync = [], os.fsync

    def failing(fd):
        calls.append(fd)
        if len(calls) == 12:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(fd)

    monkeypatch.delattr(fcntl, "F_FULLFSYNC", raising=False)
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(ConversionError, match=r"Input/output error; fix that"):
        run(source, tmp_path / "out")
    assert_resumes(source, tmp_path / "out", expected_hashes)


def test_a_read_only_target_is_an_error(source, tmp_path):
    with (
        mounted(tmp_path / "disk", "ro") as disk,
        pytest.raises(ConversionError, match=rf"writing {disk}/out failed: Read-only file system; fix that"),
    ):
        run(source, disk / "out")


def test_a_target_without_write_permission_is_an_error(source, tmp_path, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(
        ConversionError, match=r"writing .*out failed: Permission denied; fix that and run it again"
    ):
        run(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_resumes_once_a_truncated_source_is_restored(source, expected_hashes, tmp_path):
    """The file is back with its old time, as when a disk is reconnected: what was converted is kept."""
    copy = shutil.copytree(source, tmp_path / "source")
    file, out = copy / "consolidated.safetensors", tmp_path / "made" / "out"
    content, stat = file.read_bytes(), file.stat()
    checkpoint = open_checkpoint(copy)
    job = Job(checkpoint=checkpoint, out=out, sidecars=SIDECARS, source_name=source.name)

    def cut(step):
        if step.done > step.total / 2:
            os.truncate(file, 5000)

    with pytest.raises(CheckpointError, match=r"ends inside .*: it was cut off; get it again"):
        convert(job, cut)
    with pytest.raises(CheckpointError, match="was cut off"):
        open_checkpoint(copy)
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    seen = []
    convert(job, seen.append)
    assert len({step.tensor for step in seen}) < 12
    assert hashes(out) == expected_hashes
