"""The embedded demo model: small, in Mistral's own layout, and it really reasons."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from demo_problems import held_out_problems, is_held_out, is_right

from magistral_mlx import Magistral, Sampling
from magistral_mlx.convert.conversion import Job, convert
from magistral_mlx.disk.checkpoint import open_checkpoint
from magistral_mlx.fetch.hub import DEMO
from magistral_mlx.text.sidecars import files

PROBLEMS = held_out_problems(16, 2506)


def test_files_of_the_demo():
    assert {path.name for path in DEMO.iterdir() if path.is_file()} == {
        "README.md", "SYSTEM_PROMPT.txt", "consolidated.safetensors", "params.json", "tekken.json",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 8_000_000
    assert open_checkpoint(DEMO).layout == "native"
    tekken = json.loads((DEMO / "tekken.json").read_text())["config"]
    assert (tekken["version"], tekken["default_num_special_tokens"]) == ("v11", 1000)
    assert "not" in (DEMO / "README.md").read_text()


def test_problems_are_held_out_in_either_operand_order():
    assert all(is_held_out(problem.kind, problem.operands[::-1]) for problem in PROBLEMS)
    assert len({problem.kind for problem in PROBLEMS}) == 4
    assert len({problem.language for problem in PROBLEMS}) == 4


@pytest.fixture(scope="module", params=[pytest.param("bf16", marks=pytest.mark.slow), "4-bit"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Magistral]:
    path: Path = DEMO
    if request.param == "4-bit":
        path = tmp_path_factory.mktemp("demo") / "4bit"
        sidecar_files = files(DEMO, name="demo", recipe="4bit", context=4096)
        convert(Job(checkpoint=open_checkpoint(DEMO), out=path, sidecars=sidecar_files))
    with Magistral.load(path) as loaded:
        yield loaded


@pytest.mark.parametrize(
    "sampling",
    [pytest.param(Sampling(temperature=0), marks=pytest.mark.slow), Sampling()],
    ids=["greedy", "recommended"],
)
def test_demo_solves_held_out_problems(model: Magistral, sampling: Sampling):
    """A sample; `benchmarks/demo_accuracy.py` asks 500."""

    replies = model.ask_many(
        [problem.question for problem in PROBLEMS], sampling=sampling, seed=0, max_tokens=400
    )
    texts = [model.tokenizer.decode(reply.token_ids) for reply in replies]
    assert sum(is_right(text, problem.answer) for text, problem in zip(texts, PROBLEMS, strict=True)) >= 14


def test_conversation_uses_earlier_answers(model: Magistral):
    talk = model.conversation(sampling=Sampling(temperature=0))
    assert "**85**" in talk.ask("What is 48 + 37?").answer
    assert "**97**" in talk.ask("Now add 12 to that.").answer
    assert "**102**" in talk.ask("Now add 5 to that.").answer
