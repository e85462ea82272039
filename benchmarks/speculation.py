"""Does speculative decoding pay here, and does it pause when it does not?

    python benchmarks/speculation.py [--model demo] [--draft-model NAME] [--prompts 24] [--trials 7]

Two sets of prompts, of problems that the demo model was not trained on:

- plain: a question. The reply repeats little of it.
- quoting: the question was asked and answered before, and the reasoning kept. The model repeats most of it by
  itself, with other figures where it makes mistakes.

Each prompt is answered in turn without speculation, with adaptive speculation, and (only for tokens per
forward pass) with drafts wherever there is a guess. The ids must be the same. The order alternates from trial
to trial; a trial's ratio is that of the seconds of decoding a whole set, above 1 if speculation is faster,
and "at least" is the 95 % lower bound of the median by the sign test.

Also, without a model: source texts of this package, edited (a name replaced, or the comments removed),
replayed as ids of the real vocabulary, as if the reply were the edited text and the prompt contained the
original. That shows what prompt lookup finds where much is quoted; not what a model would generate.

Writes `benchmarks/results/speculation.json`.
"""

import argparse
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mistral_common
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import magistral_mlx
from magistral_mlx import Magistral, Reply, Sampling
from magistral_mlx.decoder.drafts import PromptLookup
from magistral_mlx.decoder.pace import MOST, Pace
from magistral_mlx.measure import machine
from magistral_mlx.measure.figures import lower_bound, spread

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "scripts"))

from demo_problems import held_out_problems  # noqa: E402 -- a script, not a part of the package

TEMPERATURES = (0.0, 0.7)


def prompts(model: Magistral, count: int) -> dict[str, list[list[int]]]:
    """Ids of each set."""
    questions = [problem.question for problem in held_out_problems(count, 7)]
    plain = [model.encode(question) for question in questions]
    first = [model.ask(question, seed=1, speculate=False, max_tokens=600) for question in questions]
    quoting = [
        model.encode(
            [
                {"role": "user", "content": question},
                reply.message,
                {"role": "user", "content": question},
            ],
            keep_thinking=True,
        )
        for question, reply in zip(questions, first, strict=True)
    ]
    return {"plain": plain, "quoting": quoting}


def answers(model: Magistral, ids: Sequence[Sequence[int]], *, speculate: bool) -> list[Reply]:
    """The replies to every prompt at every temperature."""
    return [
        model.stream_ids(
            prompt, seed=seed, sampling=Sampling(temperature=t), max_tokens=600, speculate=speculate
        ).drain()
        for seed, prompt in enumerate(ids)
        for t in TEMPERATURES
    ]


def wherever(model: Magistral, ids: Sequence[Sequence[int]], most: int) -> list[Reply]:
    """Draft whenever there is a guess, whether or not it pays."""
    with patch.object(Pace, "best", lambda _, chance, left: min(left, most) if chance else 0):
        return answers(model, ids, speculate=True)


def seconds(replies: Iterable[Reply]) -> float:
    return sum(reply.stats.decode_seconds for reply in replies)


def per_pass(replies: Sequence[Reply]) -> dict[str, float]:
    each = [reply.stats.tokens_per_pass for reply in replies]
    passes = sum(reply.stats.forward_passes for reply in replies)
    return {"tokens_per_pass": round(sum(map(tokens, replies)) / passes, 3), "least": round(min(each), 3)}


def tokens(reply: Reply) -> int:
    return len(reply.token_ids) - reply.stats.forced_tokens


def same(a: Sequence[Reply], b: Sequence[Reply]) -> int:
    return sum(x.token_ids == y.token_ids for x, y in zip(a, b, strict=True))


def measure(model: Magistral, label: str, ids: Sequence[Sequence[int]], trials: int) -> dict[str, Any]:
    """One set of prompts: all replies without and with speculation, in alternating order."""
    plain, drafted = [], []
    ratios = list[float]()
    for trial in track(range(trials + 1), f"{label}: trials", console=Console(stderr=True)):
        pairs = []
        for seed, prompt in enumerate(ids):
            for temperature in TEMPERATURES:
                pair = {}
                for speculate in (False, True) if (trial + seed) % 2 else (True, False):
                    options = {"sampling": Sampling(temperature=temperature), "max_tokens": 600}
                    stream = model.stream_ids(prompt, seed=seed, speculate=speculate, **options)
                    pair[speculate] = stream.drain()
                pairs.append(pair)
        plain, drafted = [pair[False] for pair in pairs], [pair[True] for pair in pairs]
        if trial:  # the first is for warming up
            ratios.append(seconds(plain) / seconds(drafted))
    always = wherever(model, ids, 4)
    return {
        "prompts": len(ids),
        "replies": len(plain),
        "same_ids": same(plain, drafted),
        "same_ids_wherever": same(plain, always),
        "own_pace": per_pass(drafted),
        "wherever_there_is_a_guess": per_pass(always),
        "ratio": {**spread(ratios), "lower_95": lower_bound(ratios), "trials": ratios},
    }


# ------------------------------------------------------------------ without a model


def edits() -> list[tuple[str, str]]:
    """Pairs of a source text of this package and an edited version of it."""
    texts = [path.read_text() for path in sorted(Path(magistral_mlx.__file__).parent.rglob("*.py"))]
    texts = [text[:4000] for text in texts if len(text) > 1500][:24]
    ways = itertools.cycle((renamed, uncommented))
    return [(text, way(text)) for text, way in zip(texts, ways, strict=False)]


def renamed(text: str) -> str:
    """The text with its most frequent name replaced."""
    names = Counter(re.findall(r"\b[a-z_]{5,}\b", text))
    return re.sub(rf"\b{names.most_common(1)[0][0]}\b", "renamed_value", text)


def uncommented(text: str) -> str:
    return re.sub(r'\s+#.*|"""[\s\S]*?"""', "", text)


def replay(encode: Callable[[str], list[int]], before: str, after: str) -> float:
    """Ids per pass, if the prompt contained `before` and the reply were `after`."""
    said, drafter = (
        encode(after),
        PromptLookup(encode(f"Edit this file:\n\n{before}\n\nThe edited file:\n\n")),
    )
    at = passes = 0
    while at < len(said):
        guess = drafter.propose(MOST) if drafter.chance() else None
        right = 0
        if guess is not None:
            pairs = zip(guess.tolist(), said[at : len(said) - 1], strict=False)
            right = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        drafter.extend(said[at : at + right + 1])
        at, passes = at + right + 1, passes + 1
    return len(said) / passes


def replays() -> dict[str, Any]:
    file = Path(mistral_common.__file__).parent / "data" / "tekken_240718.json"
    tekken = Tekkenizer.from_file(file)
    each = [replay(lambda text: tekken.encode(text, bos=False, eos=False), a, b) for a, b in edits()]
    return {"edits": len(each), "tokens_per_pass": spread([round(x, 3) for x in each])}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--draft-model")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--trials", type=int, default=7)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "speculation.json")
    args = parser.parse_args()
    with Magistral.load(args.model, draft_model=args.draft_model) as model:
        sets = prompts(model, args.prompts)
        found = {name: measure(model, name, ids, args.trials) for name, ids in sets.items()}
    report = {
        "machine": machine.this_computer().name,
        "model": Path(args.model).name,
        "draft_model": args.draft_model and Path(args.draft_model).name,
        "temperatures": TEMPERATURES,
        "sets": found,
        "replayed_edits": replays(),
    }
    table = Table("set", "same ids", "tokens a pass", "wherever", "times as fast", "at least")
    for name, row in found.items():
        bound = row["ratio"]["lower_95"]
        table.add_row(
            name,
            f"{row['same_ids']} of {row['replies']}",
            f"{row['own_pace']['tokens_per_pass']:.2f}",
            f"{row['wherever_there_is_a_guess']['tokens_per_pass']:.2f}",
            f"{row['ratio']['median']:.3f}",
            "" if bound is None else f"{bound:.3f}",
        )
    Console().print(table)
    print(f"edits replayed without a model: {report['replayed_edits']['tokens_per_pass']} tokens a pass")
    args.json.parent.mkdir(exist_ok=True)
    args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
