"""How often is the demo model right? In bf16 and 4 bit, greedy and with the recommended sampling.

    python benchmarks/demo_accuracy.py [--problems 500] [--seed 1] [--only greedy]

Problems are drawn from those that training never saw (`scripts/demo_problems.py`). Right means: the model
thought, and the number in bold in its answer is the result. Prints a table and writes
`benchmarks/results/demo_accuracy.json`.
"""

import argparse
import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from magistral_mlx import Magistral, Sampling
from magistral_mlx.convert.conversion import Job, convert
from magistral_mlx.disk.checkpoint import open_checkpoint
from magistral_mlx.fetch.hub import DEMO
from magistral_mlx.text.sidecars import files

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "scripts"))

from demo_problems import Problem, held_out_problems  # noqa: E402 -- a script, not a part of the package

GREEDY, RECOMMENDED = Sampling(temperature=0), Sampling()


def is_right(
    model: Magistral, problem: Problem, *, sampling: Sampling, seed: int, think: bool = True
) -> bool:
    reply = model.ask(problem.question, sampling=sampling, seed=seed, max_tokens=400, think=think)
    bold = re.findall(r"\*\*(-?\d+)\*\*", reply.answer)
    return bool(reply.thinking) == think and bold == [problem.answer]


def measure(
    path: Path, label: str, sampling: Sampling, problems: list[Problem], *, think: bool = True
) -> dict:
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    with Magistral.load(path) as model:
        for seed, problem in enumerate(track(problems, label, console=Console(stderr=True))):
            correct = is_right(model, problem, sampling=sampling, seed=seed, think=think)
            for key in (problem.kind, problem.language, "all"):
                asked[key] += 1
                right[key] += correct
    return {"what": label, "right": {key: round(right[key] / asked[key], 4) for key in sorted(asked)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="those settings whose name contains this")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "demo_accuracy.json")
    args = parser.parse_args()
    problems = held_out_problems(args.problems, args.seed)
    with tempfile.TemporaryDirectory() as directory:
        small = Path(directory) / "demo-4bit"
        words = files(DEMO, name="demo", recipe="affine 4-bit", context=4096)
        convert(Job(checkpoint=open_checkpoint(DEMO), out=small, sidecars=words))
        settings = {
            "bf16, greedy": (DEMO, GREEDY, True),
            "4-bit, greedy": (small, GREEDY, True),
            "bf16, 0.7 / 0.95": (DEMO, RECOMMENDED, True),
            "4-bit, 0.7 / 0.95": (small, RECOMMENDED, True),
            "bf16, no thinking": (DEMO, GREEDY, False),
        }
        rows = [
            measure(path, label, sampling, problems, think=think)
            for label, (path, sampling, think) in settings.items()
            if args.only in label
        ]
    table = Table("right", *(row["what"] for row in rows))
    for key in rows[0]["right"]:
        table.add_row(key, *(f"{row['right'][key]:.1%}" for row in rows))
    Console().print(table)
    args.json.parent.mkdir(exist_ok=True)
    args.json.write_text(
        json.dumps({"problems": args.problems, "seed": args.seed, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
