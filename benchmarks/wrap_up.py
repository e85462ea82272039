"""Does a concluding phrase before the forced close help the answer? The demo model in 4 bit, greedy.

    python benchmarks/wrap_up.py [--problems 100] [--seed 2]

Each problem is reasoned about until its budget is spent, as in the library. Then, from the same ids:

    close           the forced closing tag, as in the library
    said            a forced phrase in the reasoning's language, and the closing tag
    completed       the phrase, the model's own continuation to the end of the line, and the closing tag

The phrase is one that any model would understand ("So the answer is"), or the word with which the demo was
trained to end its reasoning ("so"), which is the best case. Writes `benchmarks/results/wrap_up.json`.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from think_budget import GREEDY, LONGEST, Problem, is_right, problems, write_4bit

from magistral_mlx import Magistral, Reply

OUT = Path(__file__).parent / "results" / "wrap_up.json"
BUDGETS = (20, 40, 60)
GENERAL = {"en": "So the answer is", "fr": "Donc la réponse est", "ko": "따라서 답은", "ja": "よって答えは"}
TAUGHT = {"en": "so", "fr": "donc", "ko": "따라서", "ja": "よって"}
VARIANTS = {
    "close": (None, False),
    "said, general": (GENERAL, False),
    "completed, general": (GENERAL, True),
    "said, as taught": (TAUGHT, False),
    "completed, as taught": (TAUGHT, True),
}


class FromIds(Magistral):
    """Takes prompts as ids instead of messages."""

    def encode(self, messages: Any, **_: Any) -> list[int]:
        return list(messages)


def go_on(model: FromIds, prompts: Sequence[Sequence[int]], **options: Any) -> list[Reply]:
    """Continue prompts; the replies are plain text, since the reasoning began in the prompt."""
    return model.ask_many(prompts, at_once=25, sampling=GREEDY, seed=0, **options)  # type: ignore[arg-type]


def conclude(model: FromIds, drawn: Sequence[Problem], cut: Sequence[list[int]], variant: str) -> list[str]:
    """The answers to problems. cut: for each, the ids of its prompt and its cut reasoning."""
    words, completed = VARIANTS[variant]
    encode, decode = model.tokenizer.encode, model.tokenizer.decode
    prompts = [list(ids) for ids in cut]
    if words:
        for ids, problem in zip(prompts, drawn, strict=True):
            ids.extend(encode(("" if decode(ids).endswith("\n") else "\n") + words[problem.language]))
    if completed:
        for ids, reply in zip(prompts, go_on(model, prompts, max_tokens=32, stop="\n"), strict=True):
            ids.extend(encode(f" {reply.answer.strip()}"))
    for ids in prompts:
        ids.extend(encode(("" if decode(ids).endswith("\n") else "\n") + "</think>\n"))
    return [reply.answer for reply in go_on(model, prompts, max_tokens=80)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    args = parser.parse_args()
    drawn = problems(args.problems, args.seed)
    rows = []
    with (
        tempfile.TemporaryDirectory() as directory,
        FromIds.load(write_4bit(Path(directory) / "demo-4bit")) as model,
    ):
        prompts = [model.tokenizer.encode_chat(p.question, system=None) for p in drawn]
        for budget in args.budgets:
            replies = go_on(model, prompts, max_tokens=LONGEST, think_budget=budget)
            closed = [n for n, reply in enumerate(replies) if reply.stats.forced_tokens]
            cut = [
                [*prompts[n], *replies[n].token_ids[: stats.thinking_tokens - stats.forced_tokens]]
                for n in closed
                if (stats := replies[n].stats)
            ]
            asked = [drawn[n] for n in closed]
            for variant in VARIANTS:
                answers = conclude(model, asked, cut, variant)
                right = sum(map(is_right, answers, asked))
                rows.append({"budget": budget, "closed": len(closed), "variant": variant, "right": right})
                print(rows[-1], file=sys.stderr)
    table = Table("budget", "closed", *VARIANTS, box=MARKDOWN)
    for budget in args.budgets:
        of = [row for row in rows if row["budget"] == budget]
        table.add_row(str(budget), str(of[0]["closed"]), *(f"{r['right'] / r['closed']:.1%}" for r in of))
    Console(width=200).print(table)
    OUT.write_text(json.dumps({"problems": args.problems, "seed": args.seed, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
