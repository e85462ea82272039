"""`convert` of a Hub name: a dry run reads only the config, and nothing starts without enough disk space."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from sparse_checkpoint import params

from magistral_mlx.cli.app import cli
from magistral_mlx.config import MAGISTRAL, Quantization, Scheme
from magistral_mlx.disk import manifest
from magistral_mlx.fetch.hub import DEMO
from tests import fake_hub, models
from tests.fake_hub import point_at

NAME = "someone/Magistral-Small-2506"
DEMO_FILES = {file.name: file.read_bytes() for file in DEMO.iterdir() if file.is_file()}
HF_24B = json.dumps(MAGISTRAL.to_json())


@pytest.fixture
def fake(no_hub, monkeypatch, tmp_path):
    """A Hub with the real config and fake weights, and with the demo model under a name."""
    repos = {
        NAME: {
            "params.json": json.dumps(params(MAGISTRAL)).encode(),
            "consolidated.safetensors": bytes(5000),
        },
        "someone/demo": DEMO_FILES,
    }
    with fake_hub.running(repos) as running:
        point_at(running.url, monkeypatch)
        monkeypatch.chdir(tmp_path)
        yield running


def run(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def set_free_space(monkeypatch, nbytes):
    usage = shutil._ntuple_diskusage(10**12, 10**12 - nbytes, nbytes)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def hf(config=MAGISTRAL, **fields):
    content = json.dumps(config.to_json() | fields).encode()
    return {"config.json": content, "model.safetensors": bytes(3000)}


def test_a_dry_run_reads_the_config_alone(fake, tmp_path):
    done = run("convert", NAME, "--out", "out", "--dry-run")
    assert done.exit_code == 0, done.stderr
    for text in ("to download       5.0 kB", "13.3 GB in 3 files", "4.50", "12.9 GB", "64 GB"):
        assert text in done.stdout
    assert set(fake.served) == {f"{NAME}/params.json"}
    assert not Path("out").exists()
    assert not Path(".out.partial").exists()


@pytest.mark.parametrize(
    ("fields", "options", "size"),
    [
        ({}, (), "13.3 GB"),
        ({"torch_dtype": "float32"}, (), "14.7 GB"),
        ({"dtype": "float32"}, ("--dtype", "float16"), "13.3 GB"),
        ({"dtype": "float16"}, ("--recipe", "8bit"), "25.0 GB"),
    ],
)
def test_a_dry_run_reads_config_json_too(fake, fields, options, size):
    fake.repos["someone/hf"] = hf(**fields)
    done = run("convert", "someone/hf", "--out", "out", "--dry-run", *options)
    assert f"on disk           {size}" in done.stdout, done.stderr
    assert set(fake.served) == {"someone/hf/config.json"}


def test_a_plan_reads_the_config_alone(fake):
    done = run("plan", NAME, "--memory", "64GB", "--context", "8192")
    assert done.exit_code == 0, done.stderr
    assert "weights         47.1 GB" in done.stdout
    assert set(fake.served) == {f"{NAME}/params.json"}


def test_plan_is_the_same_for_a_local_and_a_remote_model(fake):
    """For a quantized directory with exceptions, one of them for a matrix of the vision tower."""
    made = run("convert", "demo", "--out", "out", "--recipe", "mixed-4-6", "--override", "lm_head=bf16")
    assert made.exit_code == 0, made.stderr
    config = json.loads(Path("out/config.json").read_text())
    config["quantization"]["vision_tower.layers.0.proj"] = False
    fake.repos["someone/small"] = hf(**config)
    local, remote = (run("plan", name, "--memory", "16").stdout for name in ("out", "someone/small"))
    assert local == remote != ""
    assert set(fake.served) == {"someone/small/config.json"}


def test_a_dry_run_is_the_same_for_a_local_and_a_remote_model(fake, tmp_path):
    """The plan from the config alone is the plan from the checkpoint."""
    source = models.write_hf(tmp_path / "source", replace(models.TINY, tie_embeddings=None))
    fake.repos["someone/tiny"] = {file.name: file.read_bytes() for file in source.iterdir()}
    local = run("convert", source, "--out", "out", "--dry-run", "--dtype", "float16").stdout
    remote = run("convert", "someone/tiny", "--out", "out", "--dry-run", "--dtype", "float16").stdout
    assert [line for line in remote.splitlines() if "to download" not in line] == local.splitlines()


def test_a_quantized_model_is_refused_before_the_download(fake):
    fake.repos["someone/4bit"] = hf(
        replace(MAGISTRAL, quantization=Quantization(default=Scheme(), overrides={}))
    )
    for arguments in (("--dry-run",), ("--download",)):
        done = run("convert", "someone/4bit", "--out", "out", *arguments)
        assert (done.exit_code, done.stdout) == (1, "")
        assert "someone/4bit is already quantized" in done.stderr
        assert "convert from the bf16 checkpoint, use this one as it is, or give --dequantize" in done.stderr
    assert set(fake.served) == {"someone/4bit/config.json"}
    assert run("convert", "someone/4bit", "--out", "out", "--dry-run", "--dequantize").exit_code == 0


def test_the_disk_needs_room_for_the_download_and_the_output(fake, monkeypatch, tmp_path):
    """Both are on one disk here: 5 kB to download and 13.3 GB to write, with 13 GB free."""
    set_free_space(monkeypatch, 13 * 10**9)
    done = run("convert", NAME, "--out", "out", "--download")
    assert done.exit_code == 1
    assert f"{tmp_path}/cache needs 0.0 MB more and out needs 13.3 GB more on disk and" in done.stderr
    assert "has 13.0 GB free; make room or use another disk" in done.stderr
    assert set(fake.served) == {f"{NAME}/params.json"}
    assert not Path("out").exists()


def test_a_model_is_converted_by_its_hub_name(fake):
    done = run("convert", "someone/demo", "--out", "out", "--download")
    assert done.exit_code == 0, done.stderr
    assert manifest.verify(Path("out")) == []
    assert manifest.read(Path("out"))["source_name"] == "someone/demo"
    assert "Source: [someone/demo](https://huggingface.co/someone/demo)" in Path("out/README.md").read_text()


def test_nothing_is_downloaded_without_the_option(fake):
    done = run("convert", "someone/demo", "--out", "out")
    assert (done.exit_code, "--download" in done.stderr) == (1, True)
    assert not fake.served


def test_an_existing_target_is_refused_before_the_download(fake):
    Path("out").mkdir()
    Path("out/precious").touch()
    done = run("convert", "someone/demo", "--out", "out", "--download")
    assert (done.exit_code, "nothing is overwritten" in done.stderr) == (1, True)
    assert not fake.sent
