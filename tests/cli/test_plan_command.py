"""`magistral-mlx plan`: whether a model fits into memory, without reading a weight."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner, Result

from magistral_mlx import memory
from magistral_mlx.cli.plan import plan, table
from magistral_mlx.config import MAGISTRAL
from magistral_mlx.convert.plan import plan as plan_directory
from magistral_mlx.convert.recipe import named
from magistral_mlx.disk.tensorfile import Entry
from magistral_mlx.errors import MagistralError
from tests import models

DOCS = Path(__file__).parents[2] / "docs" / "memory.md"
Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def refuse_read(*_: object, **__: object) -> None:
        raise AssertionError("a weight is read")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(mx, "load", refuse_read)
    monkeypatch.setattr(Entry, "read", refuse_read)
    return lambda *arguments: CliRunner().invoke(plan, [str(argument) for argument in arguments])


@pytest.fixture
def large_model(tmp_path: Path) -> Path:
    """614 MB of KV cache for 100,000 tokens: runs out of memory without large files."""
    config = replace(models.TINY, n_layers=3, n_kv_heads=8, n_heads=8, head_dim=64, max_context=10**6)
    return models.write_hf(tmp_path / "big", config)


def test_the_demo_fits_on_this_machine(run: Run):
    done = run("demo")
    assert done.exit_code == 0
    assert done.output.splitlines()[-1] == "It fits."
    for name in ("weights", "KV cache", "computing", "together", "can be given"):
        assert f"\n{name}" in f"\n{done.output}"
    assert "4,096 tokens" in done.output  # its whole context: less than the usual


def test_context_cache_bits_and_memory_are_as_given(run: Run, large_model: Path):
    done = run(large_model, "--context", 100_000, "--memory", "16 GB", "--kv-bits", 8)
    assert done.exit_code == 0
    assert "100,000 tokens in 8 bit" in done.output
    assert "by a Mac with 16 GB, an estimate" in done.output


@pytest.mark.parametrize(("after", "bits"), [(4095, 8), (4096, 16)])
def test_the_cache_is_shown_with_its_final_precision(run: Run, after: int, bits: int):
    done = run("demo", "--memory", "16GB", "--kv-bits", 8, "--quantize-after", after)
    assert f"4,096 tokens in {bits} bit\n" in done.output


def test_a_plan_that_does_not_fit_lists_what_would(
    run: Run, large_model: Path, monkeypatch: pytest.MonkeyPatch
):
    small = memory.Machine(memory=7 * 2**30, budget=1_300_000_000, estimated=True)
    monkeypatch.setattr(memory, "mac", lambda _: small)
    done = run(large_model, "--context", 200_000, "--memory", "7GB")
    assert done.exit_code == 0
    assert "It does not fit as it is; what would fit: " in done.output
    assert "tokens with 16-bit KV cache" in done.output
    assert "tokens with 8-bit KV cache" in done.output
    assert "sudo sysctl iogpu.wired_limit_mb=" in done.output
    assert f"magistral-mlx convert {large_model} --out DIR --bits 4" in done.output


def test_a_model_that_cannot_fit_exits_with_code_1(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "mac", lambda _: memory.Machine(memory=2**20, budget=2**20))
    done = run("demo", "--memory", "1GB")
    assert done.exit_code == 1
    assert "It does not fit; nothing shorter fits either" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--context", "0"), "x>=1"),
        (("--context", "4097"), "the model's context is 4,096 tokens"),
        (("--memory", "much"), "a size such as 32GB"),
        (("--memory", "0GB"), "a size such as 32GB"),
        (("--kv-bits", "4"), "'16', '8'"),
        (("--quantize-after", "9"), "give --kv-bits 8 too"),
    ],
)
def test_impossible_requests_are_refused(run: Run, arguments: tuple[str, ...], message: str):
    done = run("demo", *arguments)
    assert done.exit_code == 2
    assert message in done.output


@pytest.mark.parametrize("name", ["nowhere/at-all", "./nothing"])
def test_an_unknown_model_is_an_error(run: Run, name: str):
    assert isinstance(run(name).exception, MagistralError)


def test_all_macs_in_one_table(run: Run):
    lines = run("demo", "--all-macs").output.splitlines()
    assert len(lines) == 2 + 8
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert lines[-1].startswith("| 128 GB | 103.1 GB |")


def test_the_table_in_the_docs_is_current():
    weights = plan_directory(MAGISTRAL, named("4bit"), mx.bfloat16).weight_bytes
    assert table(MAGISTRAL, weights) in DOCS.read_text(encoding="utf-8")
