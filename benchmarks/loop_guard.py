"""Does the loop guard raise false alarms, and does it catch loops? Both rates, and what it costs.

    python benchmarks/loop_guard.py [--texts 8] [--loops 4000] [--seed 1] [--files FILE …]

Honest texts have no loops: seeded generators of what looks most like one, this Python's own library sources
(`loop_texts.py`), and any text files given; tokenized with the real vocabulary, at least 4096 tokens each.
Planted loops: a piece of an honest text repeated after honest text, every copy with its own edits.
Prints tables and writes `benchmarks/results/loop_guard.json`.
"""

# ruff: noqa: S311 -- seeded, so that runs repeat

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

from benchmarks.loop_texts import GENERATORS, Text, from_files, generated, library  # noqa: E402
from magistral_mlx.text.loops import LoopGuard  # noqa: E402
from magistral_mlx.text.tokenizer import Tokenizer  # noqa: E402
from tests.tokenizers import full_tekken  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Planted:
    period: int
    edits: float
    start: int
    ids: list[int]


def plant(rng: random.Random, texts: Sequence[Text], period: int, copies: int = 12) -> Planted:
    """Honest text, then copies of a piece of honest text, every copy edited separately.

    Edits are substitutions, insertions and deletions of ids, equally often; half of the loops have none.
    At least `copies` copies and 3000 ids, which is enough for any rule that fires at all.
    """
    before, source = rng.choice(texts).ids, rng.choice(texts).ids
    start = rng.randint(0, min(len(before), 3000))
    at = rng.randrange(len(source) - period)
    body = source[at : at + period]
    edits = rng.choice((0, rng.uniform(0, 0.05)))
    ids = before[:start]
    for _ in range(max(copies, 3000 // period + 1)):
        ids += edited(rng, body, edits, source)
    return Planted(period=period, edits=edits, start=start, ids=ids)


def edited(rng: random.Random, body: list[int], rate: float, source: list[int]) -> list[int]:
    copy = list(body)
    for at in range(len(body) - 1, -1, -1):
        if rng.random() < rate:
            other = rng.choice(source)
            copy[at : at + 1] = rng.choice(([other], [other, copy[at]], []))
    return copy


# Measuring.


def first_alarm(ids: Iterable[int]) -> int | None:
    """The number of ids that were fed when the guard first fired."""
    guard = LoopGuard()
    return next((fed for fed, token_id in enumerate(ids, 1) if guard.feed(token_id)), None)


def measure_honest(texts: Sequence[Text]) -> dict:
    alarms, number = Counter[str](), Counter(text.kind for text in texts)
    which: list[str] = []
    start = time.process_time()
    for text in texts:
        if (at := first_alarm(text.ids)) is not None:
            alarms[text.kind] += 1
            which.append(f"{text.name}, token {at}")
    tokens = sum(len(text.ids) for text in texts)
    microseconds = (time.process_time() - start) * 1e6 / tokens
    return {
        "texts": len(texts),
        "tokens": tokens,
        "false_alarms": sum(alarms.values()),
        "microseconds_per_token": round(microseconds, 2),
        "by_kind": {kind: [alarms[kind], number[kind]] for kind in sorted(number)},
        "alarms": which,
    }


PERIODS = (12, 40, 80, 160, 400)


def measure_loops(texts: Sequence[Text], loops: int, seed: int) -> list[dict]:
    """Every other period is drawn uniformly from 1 to 400, the rest log-uniformly to cover small ones."""
    rng = random.Random(seed)
    rows: dict[str, list[tuple[int, int | None]]] = defaultdict(list)
    for number in range(loops):
        even = number % 2 == 0
        planted = plant(rng, texts, rng.randint(1, 400) if even else round(400 ** rng.random()))
        at = first_alarm(planted.ids)
        after = None if at is None else at - planted.start
        if after is not None and after <= 0:
            continue  # a false alarm before the loop: counted with the honest texts
        edits = "edits" if planted.edits else "exact"
        bound = next(bound for bound in PERIODS if planted.period <= bound)
        for key in (
            f"period <= {bound}, {edits}",
            *((f"1 to 400 evenly, {edits}", "1 to 400 evenly") * even),
        ):
            rows[key].append((planted.period, after))
    return [
        {
            "loops": key,
            "planted": len(found),
            "in_4_periods": sum(after is not None and after <= 4 * period for period, after in found),
            "in_4_periods_or_360": sum(
                after is not None and after <= max(4 * period, 360) for period, after in found
            ),
            "in_8_periods_or_1600": sum(
                after is not None and after <= max(8 * period, 1600) for period, after in found
            ),
            "ever": sum(after is not None for _, after in found),
        }
        for key, found in sorted(rows.items())
    ]


def open_tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as directory:
        return Tokenizer.from_file(full_tekken(Path(directory), "v11"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=8, help="of each generated kind")
    parser.add_argument("--loops", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--files", type=Path, nargs="*", default=[], help="more honest texts")
    args = parser.parse_args()
    tokenizer = open_tokenizer()
    texts = list(generated(tokenizer, GENERATORS, args.texts, args.seed))
    texts += from_files(tokenizer, "python library", library())
    texts += from_files(tokenizer, "files", args.files)
    report = {"honest": measure_honest(texts), "planted": measure_loops(texts, args.loops, args.seed)}
    show(report)
    out = HERE / "results" / "loop_guard.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def show(report: dict) -> None:
    honest = report["honest"]
    table = Table("honest texts", "tokens", "false alarms", "µs per token")
    table.add_row(
        *(str(honest[key]) for key in ("texts", "tokens", "false_alarms", "microseconds_per_token"))
    )
    console = Console()
    console.print(table, *honest["alarms"], sep="\n")
    columns = ("in_4_periods", "in_4_periods_or_360", "in_8_periods_or_1600", "ever")
    table = Table("loops", "planted", *(column.replace("_", " ") for column in columns))
    for row in report["planted"]:
        shares = (f"{row[column] / row['planted']:.1%}" for column in columns)
        table.add_row(row["loops"], str(row["planted"]), *shares)
    console.print(table)


if __name__ == "__main__":
    main()
