"""The doctor: each check passes on a working machine, and fails if what it checks is faulty."""

import getpass
import json
import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner

from magistral_mlx.chat import Magistral
from magistral_mlx.cli.app import cli
from magistral_mlx.decoder import model
from magistral_mlx.decoder.matrix import Matrix
from magistral_mlx.decoder.sampling import Sampler
from magistral_mlx.measure import bench, doctor, real_layer
from magistral_mlx.text.transcript import Transcript

DOCS = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def demo() -> Iterator[Path]:
    with bench.resolved_model("demo") as (place, _):
        yield Path(place)


@pytest.fixture(autouse=True)
def small_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(real_layer.CONFIG, dim=256, hidden_dim=512, n_heads=4, n_kv_heads=2, head_dim=64)
    monkeypatch.setattr(real_layer, "CONFIG", small)
    monkeypatch.setattr(doctor, "CONFIG", small)


def test_all_checks_pass_on_a_working_machine(tmp_path: Path):
    out = tmp_path / "new" / "doctor.json"
    done = CliRunner().invoke(cli, ["doctor", "--json", str(out)], catch_exceptions=False)
    assert (done.exit_code, done.output.count("✓"), done.output.count("✗")) == (0, 5, 0), done.output
    report = json.loads(out.read_text())
    assert report["right"]
    assert report["format"] == doctor.FORMAT
    documented = DOCS.split("## The doctor")[1]
    assert all(f"`{key}`" in documented for key in [*report, *report["checks"][0]])
    assert all(f"`{key}`" in documented for check in report["checks"] for key in check["figures"])
    for private in (platform.node(), str(Path.home()), f'"{getpass.getuser()}"', str(tmp_path)):
        assert private not in out.read_text()


def test_failed_check_is_reported_with_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Sampler, "keeps", lambda *_: mx.array(1 / 0))
    out = tmp_path / "doctor.json"
    done = CliRunner().invoke(cli, ["doctor", "--json", str(out)])
    assert (done.exit_code, done.output.count("✓"), done.output.count("✗")) == (1, 4, 1), done.output
    assert "✗ the nucleus\n  ZeroDivisionError" in done.output
    assert not json.loads(out.read_text())["right"]


def test_wrong_matrix_products_are_detected(demo: Path, monkeypatch: pytest.MonkeyPatch):
    original = Matrix.__call__
    monkeypatch.setattr(Matrix, "__call__", lambda self, x: original(self, x) * (1.01 if self.scheme else 1))
    assert not doctor._logits(demo).right
    assert not doctor._layer(demo).right


def test_wrong_activation_is_detected(demo: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model, "_gated", lambda gate, up: mx.tanh(gate) * up)
    assert not doctor._layer(demo).right
    assert not doctor._reply(demo).right


def test_nan_is_detected(demo: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Matrix, "__call__", lambda self, x: x @ self.dequantized().T * mx.nan)
    assert not doctor._layer(demo).right


@pytest.mark.parametrize("name", ["draw", "keeps"])
def test_wrong_nucleus_is_detected(name: str, demo: Path, monkeypatch: pytest.MonkeyPatch):
    wrong = {
        "draw": lambda _, logits, *__: mx.argmin(logits),
        "keeps": lambda _, logits, ids: logits[ids] > mx.max(logits) - 1,
    }
    monkeypatch.setattr(Sampler, name, wrong[name])
    assert not doctor._nucleus(demo).right


def test_tag_in_the_answer_is_detected(demo: Path, monkeypatch: pytest.MonkeyPatch):
    answer = Transcript.answer.fget
    monkeypatch.setattr(Transcript, "answer", property(lambda self: answer(self) + "</think>"))
    assert not doctor._reply(demo).right


def test_memory_leak_is_detected(demo: Path, monkeypatch: pytest.MonkeyPatch):
    kept, close = [], Magistral.close

    def leak(self: Magistral) -> None:
        kept.append(mx.ones(2**20))
        mx.eval(kept)
        close(self)

    monkeypatch.setattr(Magistral, "close", leak)
    assert not doctor._memory(demo).right
