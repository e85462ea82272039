"""What does a thinking budget cost in accuracy? The demo model in bf16 and 4 bit, greedy.

    python benchmarks/think_budget.py [--problems 200] [--seed 2]

Problems that training never saw, half of them sums of lists, whose reasoning is long. Each is asked with
every budget, without one, and with `think=False`. Right means that the number in bold is the result; `beyond`
is the number of reasoning ids after the budget was spent, to finish a line. Prints tables and writes
`benchmarks/results/think_budget.json`.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from magistral_mlx import Magistral, Reply, Sampling
from magistral_mlx.convert.conversion import Job, convert
from magistral_mlx.disk.checkpoint import open_checkpoint
from magistral_mlx.fetch.hub import DEMO
from magistral_mlx.text.closing import GRACE, TEAR
from magistral_mlx.text.sidecars import files
from magistral_mlx.text.thinking import CLOSE, OPEN

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "scripts"))

from demo_problems import Problem, held_out_problems  # noqa: E402 -- a script, not a part of the package

GREEDY = Sampling(temperature=0)
BUDGETS = (0, 1, 5, 20, 100, None)
LONGEST = 600
"""Limit of ids of a whole reply: more than any reasoning of the demo model that ends by itself."""


def problems(how_many: int, seed: int) -> list[Problem]:
    """Half of them lists, whose reasoning is long; drawn in turn, so kinds and languages are mixed."""
    drawn = held_out_problems(3 * how_many, seed)
    lists = [problem for problem in drawn if problem.kind == "list_sum"]
    others = [problem for problem in drawn if problem.kind != "list_sum"]
    return [*lists[: how_many // 2], *others[: how_many - how_many // 2]]


def is_right(answer: str, problem: Problem) -> bool:
    return re.findall(r"\*\*(-?\d+)\*\*", answer) == [problem.answer]


def write_4bit(out: Path) -> Path:
    words = files(DEMO, name="demo", recipe="affine 4-bit", context=4096)
    convert(Job(checkpoint=open_checkpoint(DEMO), out=out, sidecars=words))
    return out


def row(drawn: Sequence[Problem], replies: Sequence[Reply], budget: int | None) -> dict:
    """The results of one setting."""
    stats = [reply.stats for reply in replies]
    own = [one.thinking_tokens - one.forced_tokens for one in stats]
    right = [is_right(reply.answer, problem) for reply, problem in zip(replies, drawn, strict=True)]
    closed = [ok for ok, one in zip(right, stats, strict=True) if one.forced_tokens]
    leaks = sum(tag in reply.thinking + reply.answer for reply in replies for tag in (OPEN, CLOSE))
    return {
        "right": round(sum(right) / len(right), 4),
        "closed": len(closed),
        "right_when_closed": round(sum(closed) / len(closed), 4) if closed else None,
        "mean_thinking": round(sum(own) / len(own), 1),
        "longest_thinking": max(own),
        "beyond": None if budget is None else max(0, *(n - max(budget, 1) for n in own)),
        "cut_off": sum(reply.finish_reason == "length" for reply in replies),
        "leaked_tags": leaks,
    }


def measure(path: Path, label: str, drawn: list[Problem]) -> list[dict]:
    rows = []
    with Magistral.load(path) as model:
        for budget, think in [*((budget, True) for budget in BUDGETS), (None, False)]:
            replies = model.ask_many(
                [problem.question for problem in drawn],
                at_once=25,
                sampling=GREEDY,
                seed=0,
                max_tokens=LONGEST,
                think=think,
                think_budget=budget,
            )
            what = ("none" if budget is None else budget) if think else "think=False"
            rows.append({"model": label, "budget": what} | row(drawn, replies, budget))
            if budget is None and think:
                natural = [reply.stats.thinking_tokens for reply in replies]
            print(rows[-1], file=sys.stderr)
    for one in rows[: len(BUDGETS) - 1]:
        one["would_think_longer"] = sum(n > one["budget"] for n in natural)
        assert one["beyond"] <= GRACE + TEAR
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "think_budget.json")
    args = parser.parse_args()
    drawn = problems(args.problems, args.seed)
    with tempfile.TemporaryDirectory() as directory:
        small = write_4bit(Path(directory) / "demo-4bit")
        rows = measure(DEMO, "bf16", drawn) + measure(small, "4-bit", drawn)
    columns = list(rows[0])
    table = Table(*columns, box=MARKDOWN)
    for one in rows:
        table.add_row(*(str(one.get(column, "")) for column in columns))
    Console(width=200).print(table)
    args.json.parent.mkdir(exist_ok=True)
    told = {"problems": args.problems, "seed": args.seed, "grace": GRACE, "tear": TEAR, "rows": rows}
    args.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
