"""Texts without loops that look most like one: what the loop guard must not take for a loop.

`GENERATORS` makes them from a seed; this Python's own library sources and any text files come beside them.
"""

# ruff: noqa: E501, RUF001, S311, S608, ISC004 -- sample texts in many languages, drawn by a seed

import gzip
import itertools
import json
import math
import random
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).parents[1]))

from magistral_mlx.text.tokenizer import Tokenizer
from tests.tokenizers import LANGUAGES

LEAST, MOST = 4096, 12_000
"""Tokens of an honest text."""

GENERATORS: dict[str, Callable[[random.Random], Iterator[str]]] = {}
"""Kind → an endless honest text, in pieces."""


def honest(generator: Callable[[random.Random], Iterator[str]]) -> Callable[[random.Random], Iterator[str]]:
    GENERATORS[generator.__name__.replace("_", " ").strip()] = generator
    return generator


NAMES = [
    "Ada",
    "Ben",
    "Chloé",
    "Dmitri",
    "Eve",
    "Farid",
    "Grace",
    "Hana",
    "Iván",
    "Jun",
    "Kofi",
    "Lena",
    "Mei",
    "Nils",
    "Olga",
    "Priya",
    "Quinn",
    "Rosa",
    "Sam",
    "Tuya",
]
NOUNS = [
    "river",
    "stone",
    "lamp",
    "garden",
    "winter",
    "letter",
    "mountain",
    "bird",
    "clock",
    "sea",
    "window",
    "bread",
    "road",
    "silence",
    "harbour",
]
VERBS = [
    "keeps",
    "finds",
    "forgets",
    "carries",
    "remembers",
    "breaks",
    "follows",
    "answers",
    "opens",
    "leaves",
]
ADJECTIVES = [
    "old",
    "bright",
    "quiet",
    "broken",
    "distant",
    "golden",
    "patient",
    "narrow",
    "hollow",
    "gentle",
]
RHYMES = ["night", "light", "sight", "bright", "flight", "height", "might", "delight", "white", "kite"]


def sentence(rng: random.Random) -> str:
    a, b = rng.sample(NOUNS, 2)
    shape = rng.choice(
        (
            "The {x} {a} {v} the {b}.",
            "{n} says that no {a} {v} a {x} {b}.",
            "When the {a} {v} the {b}, {n} waits.",
            "A {x} {a}, a {y} {b}: {n} {v} both.",
        )
    )
    x, y = rng.sample(ADJECTIVES, 2)
    return shape.format(a=a, b=b, x=x, y=y, v=rng.choice(VERBS), n=rng.choice(NAMES))


# Numbers and tables.


@honest
def multiplication_tables(rng: random.Random) -> Iterator[str]:
    sign = rng.choice("×*x·")
    for a in itertools.count(rng.randint(2, 30)):
        yield f"\n{a} times table\n"
        yield from (f"{a} {sign} {b} = {a * b}\n" for b in range(1, 21))


@honest
def number_lists(rng: random.Random) -> Iterator[str]:
    step, power, comma = rng.randint(1, 12), rng.choice((1, 1, 2, 3)), rng.choice((", ", ",", "\n", " "))
    yield from (f"{(n * step) ** power}{comma}" for n in itertools.count(rng.randint(0, 5000)))


@honest
def round_numbers(rng: random.Random) -> Iterator[str]:
    step = rng.choice((10, 100, 1000, 5, 0.5, 0.25))
    yield from (f"{n * step}{'.' if n % 40 == 0 else ', '}" for n in itertools.count(1))


@honest
def primes(_rng: random.Random) -> Iterator[str]:
    yield from (f"{n}, " for n in itertools.count(2) if all(n % d for d in range(2, math.isqrt(n) + 1)))


@honest
def markdown_table(rng: random.Random) -> Iterator[str]:
    columns = rng.randint(2, 8)
    yield "|" + " n |" * columns + "\n|" + "---|" * columns + "\n"
    values = rng.choice((("yes", "no"), ("0", "1"), ("pass", "pass", "pass", "fail"), tuple(NAMES)))
    for n in itertools.count(1):
        yield f"| {n} |" + "".join(f" {rng.choice(values)} |" for _ in range(columns)) + "\n"


@honest
def float_table(rng: random.Random) -> Iterator[str]:
    columns = rng.randint(2, 8)
    for _ in itertools.count():
        yield "  ".join(f"{rng.gauss(0, 1):+.4f}" for _ in range(columns)) + "\n"


@honest
def table_of_few_values(rng: random.Random) -> Iterator[str]:
    values, columns = (
        rng.choice((("T", "F"), ("heads", "tails"), ("0", "1"), "ACGT", "123456")),
        rng.randint(1, 12),
    )
    while True:
        yield " ".join(rng.choice(values) for _ in range(columns)) + "\n"


@honest
def coin_flips(rng: random.Random) -> Iterator[str]:
    what, values = rng.choice(
        (
            ("Flip", ("heads", "tails")),
            ("Roll", "123456"),
            ("Answer", ("yes", "no")),
            ("Draw", ("red", "blue")),
        )
    )
    while True:
        yield f"{what}: {rng.choice(values)}.\n"


@honest
def truth_table(_rng: random.Random) -> Iterator[str]:
    for row in itertools.count():
        bits = f"{row % 4096:012b}"
        yield " | ".join("TF"[int(bit)] for bit in bits) + f" | {'TF'[bits.count('1') % 2]}\n"


@honest
def calendar(rng: random.Random) -> Iterator[str]:
    for year in itertools.count(rng.randint(1900, 2000)):
        for month in range(1, 13):
            yield f"\n{month}/{year}\nMo Tu We Th Fr Sa Su\n"
            start = rng.randrange(7)
            days = ["  "] * start + [f"{day:2}" for day in range(1, 31)]
            yield "\n".join(" ".join(days[i : i + 7]) for i in range(0, len(days), 7)) + "\n"


def _prose(rng: random.Random, sentences: int) -> str:
    return " ".join(sentence(rng) for _ in range(sentences)) + "\n\n"


@honest
def zero_matrices(rng: random.Random) -> Iterator[str]:
    while True:
        rows, columns, comma = rng.randint(2, 20), rng.randint(2, 20), rng.choice((" ", "  ", " & "))
        yield _prose(rng, 3) + "\n".join(comma.join("0" * columns) for _ in range(rows)) + "\n\n"


@honest
def identity_matrices(rng: random.Random) -> Iterator[str]:
    while True:
        n, comma = rng.randint(2, 18), rng.choice((" ", "  ", " & "))
        yield _prose(rng, 3)
        yield "\n".join(comma.join("1" if i == j else "0" for j in range(n)) for i in range(n)) + "\n\n"


@honest
def sparse_matrices(rng: random.Random) -> Iterator[str]:
    while True:
        n, density = rng.randint(4, 24), rng.uniform(0.1, 0.4)
        yield _prose(rng, 2)
        yield (
            "\n".join(" ".join(str(int(rng.random() < density)) for _ in range(n)) for _ in range(n)) + "\n\n"
        )


@honest
def game_of_life(rng: random.Random) -> Iterator[str]:
    size = 10
    cells = {(x, y) for x in range(size) for y in range(size) if rng.random() < 0.4}
    for generation in itertools.count(1):
        yield f"Generation {generation}:\n"
        yield "\n".join("".join(".#"[(x, y) in cells] for x in range(size)) for y in range(size)) + "\n"
        near = Counter(
            ((x + dx) % size, (y + dy) % size)
            for x, y in cells
            for dx in (-1, 0, 1)
            for dy in (-1, 0, 1)
            if dx or dy
        )
        cells = {at for at, n in near.items() if n == 3 or (n == 2 and at in cells)}
        if generation % 12 == 0:
            cells = {(x, y) for x in range(size) for y in range(size) if rng.random() < 0.4}


@honest
def hex_dump(rng: random.Random) -> Iterator[str]:
    zeros = rng.uniform(0, 0.7)
    for row in itertools.count(rng.randrange(4096)):
        data = [0 if rng.random() < zeros else rng.randrange(256) for _ in range(16)]
        if row % 50 < 12:
            data = [0] * 16
        shown = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in data)
        yield f"{row * 16:08x}  " + " ".join(f"{byte:02x}" for byte in data) + f"  |{shown}|\n"


@honest
def c_arrays(rng: random.Random) -> Iterator[str]:
    while True:
        size, zeros = rng.randint(20, 200), rng.choice((0, 0.5, 0.9))
        data = [0 if rng.random() < zeros else rng.randrange(256) for _ in range(size)]
        rows = [", ".join(f"0x{byte:02x}" for byte in data[i : i + 8]) for i in range(0, size, 8)]
        yield (
            f"static const uint8_t {rng.choice(NOUNS)}_{size}[] = {{\n    "
            + ",\n    ".join(rows)
            + "\n};\n\n"
        )


@honest
def binary_counting(rng: random.Random) -> Iterator[str]:
    width = rng.randint(8, 16)
    yield from (f"{n:0{width}b}\n" for n in itertools.count(rng.randrange(100)))


@honest
def decimal_expansions(rng: random.Random) -> Iterator[str]:
    while True:
        a, b = rng.randint(1, 99), rng.randint(101, 999)
        yield f"{a}/{b} = {a // b}." + str(10**120 * (a % b) // b).zfill(120) + "…\n"


# Arithmetic written out: the scratchpads of a reasoning model.


@honest
def digitwise_addition(rng: random.Random) -> Iterator[str]:
    while True:
        a, b, carry = rng.randrange(10**8), rng.randrange(10**8), 0
        yield f"Now {a} + {b}. Start from the right.\n"
        for place, (x, y) in enumerate(zip(f"{a:08}"[::-1], f"{b:08}"[::-1], strict=True)):
            total = int(x) + int(y) + carry
            yield f"Digit {place}: {x} + {y} + {carry} = {total}, write {total % 10}, carry {total // 10}.\n"
            carry = total // 10
        yield f"So {a} + {b} = {a + b}.\n\n"


@honest
def digitwise_product(rng: random.Random) -> Iterator[str]:
    while True:
        a, digit, carry = rng.randrange(10**30), rng.randint(2, 9), 0
        for x in f"{a}"[::-1]:
            total = int(x) * digit + carry
            yield f"{x} * {digit} + {carry} = {total} -> {total % 10} carry {total // 10}\n"
            carry = total // 10


@honest
def long_division(rng: random.Random) -> Iterator[str]:
    while True:
        b = rng.randint(400, 999)
        rest, seen = rng.randint(1, b - 1), set[int]()
        while rest not in seen and len(seen) < 40:
            seen.add(rest)
            q = 10 * rest // b
            yield f"{rest}0 / {b} = {q}, since {q} * {b} = {q * b}. Remainder: {10 * rest - q * b}.\n"
            rest = 10 * rest - q * b


@honest
def collatz(rng: random.Random) -> Iterator[str]:
    while True:
        n = rng.randint(100, 10**6)
        while n > 1:
            yield f"{n} is {'even, so halve it' if n % 2 == 0 else 'odd, so triple it and add one'}: "
            n = n // 2 if n % 2 == 0 else 3 * n + 1
            yield f"{n}.\n"


@honest
def greatest_common_divisors(rng: random.Random) -> Iterator[str]:
    while True:
        a, b = rng.randint(10**5, 10**8), rng.randint(10**4, 10**5)
        yield f"gcd({a}, {b})\n"
        while b:
            yield f"  = gcd({b}, {a} mod {b}) = gcd({b}, {a % b})\n"
            a, b = b, a % b


@honest
def modular_powers(rng: random.Random) -> Iterator[str]:
    base, modulus = rng.randint(2, 99), rng.choice((7, 11, 13, 97, 101, 1009))
    for n in itertools.count(1):
        yield f"{base}^{n} ≡ {pow(base, n, modulus)} (mod {modulus})\n"


@honest
def divisor_search(rng: random.Random) -> Iterator[str]:
    n = rng.randrange(10**6, 10**9) | 1
    for d in itertools.count(3, 2):
        yield f"Is {n} divisible by {d}? {n} = {d} * {n // d} + {n % d}, so {'no' if n % d else 'yes'}.\n"


@honest
def gradient_descent(rng: random.Random) -> Iterator[str]:
    x = rng.uniform(5, 50)
    for step in itertools.count(1):
        x -= 0.01 * (x - 3)
        yield f"Step {step}: x = {x:.6f}, f(x) = {(x - 3) ** 2:.6f}\n"


@honest
def bubble_sort_trace(rng: random.Random) -> Iterator[str]:
    while True:
        values = rng.sample(range(100), rng.randint(6, 20))
        for i in range(len(values)):
            for j in range(len(values) - 1 - i):
                if values[j] > values[j + 1]:
                    values[j], values[j + 1] = values[j + 1], values[j]
                    yield f"swap {j} and {j + 1}: {values}\n"


@honest
def sum_so_far(rng: random.Random) -> Iterator[str]:
    total = 0
    for n in itertools.count(1):
        term = rng.randint(1, 99)
        yield f"Add {term}: the sum after {n} terms was {total}, and is now {(total := total + term)}.\n"


# Proofs, enumerations, forms: the same sentence, something else in its slots.


@honest
def proof_by_cases(rng: random.Random) -> Iterator[str]:
    modulus = rng.randint(64, 5000)
    shape = rng.choice(
        (
            "Case {n}: Suppose x ≡ {n} (mod {m}). Then x² ≡ {q} (mod {m}), so x² - {q} is divisible by {m}. "
            "Hence the claim holds in this case.\n\n",
            "**Case {n}.** If the remainder is {n}, then the square leaves the remainder {q}, which is what "
            "we wanted to show.\n",
            "Case {n}. This is clear.\n",
            "Case {n}: the claim holds.\nCheck: {q}.\n",
        )
    )
    for n in itertools.count(rng.randrange(100)):
        yield shape.format(n=n, m=modulus, q=n * n % modulus)


@honest
def proof_by_long_cases(rng: random.Random) -> Iterator[str]:
    body = "".join(_prose(rng, rng.randint(3, 16)) for _ in range(rng.randint(1, 2)))
    places = rng.sample(range(body.count(".")), min(rng.randint(1, 3), body.count(".")))
    parts = body.split(".")
    for n in itertools.count(rng.randrange(3)):
        yield f"Case {n}: " + ".".join(p + f" (n = {n})" * (i in places) for i, p in enumerate(parts))


@honest
def lines_to_write_out(rng: random.Random) -> Iterator[str]:
    line = sentence(rng)
    yield from (f"{n}. {line}\n" for n in itertools.count(1))


@honest
def induction_steps(rng: random.Random) -> Iterator[str]:
    for n in itertools.count(rng.randint(1, 20)):
        yield (
            f"P({n}) ⟹ P({n + 1}): the sum of the first {n} numbers is {n * (n + 1) // 2}; adding {n + 1} "
            f"gives {(n + 1) * (n + 2) // 2}.\n"
        )


@honest
def form_letters(rng: random.Random) -> Iterator[str]:
    body = _prose(rng, 12)
    while True:
        yield f"Dear {rng.choice(NAMES)} {rng.choice(NOUNS).title()},\n\n{body}Your number is {rng.randrange(10**6)}.\n\n"


@honest
def questions_and_answers(rng: random.Random) -> Iterator[str]:
    for n in itertools.count(1):
        yield f"Q{n}: What does {rng.choice(NAMES)} say?\nA{n}: {sentence(rng)}\n\n"


@honest
def table_of_contents(rng: random.Random) -> Iterator[str]:
    for n in itertools.count(1):
        yield f"{n // 9 + 1}.{n % 9 + 1} {sentence(rng)[:-1]} {'.' * rng.randint(20, 60)} {n * 3}\n"


@honest
def permutations(rng: random.Random) -> Iterator[str]:
    items = rng.choice(("abcdefgh", "12345678", "αβγδεζηθ"))
    yield from (f"({', '.join(order)})\n" for order in itertools.cycle(itertools.permutations(items)))


@honest
def subsets(rng: random.Random) -> Iterator[str]:
    size = rng.randint(2, 5)
    yield from ("{" + ", ".join(map(str, s)) + "}, " for s in itertools.combinations(range(1, 60), size))


@honest
def second_thoughts(rng: random.Random) -> Iterator[str]:
    for n in itertools.count(2):
        opening = rng.choice(
            ("Wait, ", "Hmm, let me check that again. ", "But wait. ", "Let me reconsider: ")
        )
        yield opening + f"if x = {n}, then x² + x = {n * n + n}. {sentence(rng)}\n\n"


# Data and logs.


@honest
def json_records(rng: random.Random) -> Iterator[str]:
    indent = rng.choice((None, 1, 2))
    for n in itertools.count(rng.randrange(1000)):
        record = {
            "id": n,
            "name": rng.choice(NAMES),
            "active": rng.random() < 0.8,
            "tags": [],
            "parent": None,
        }
        yield json.dumps(record | {"score": round(rng.random(), rng.randint(1, 3))}, indent=indent) + ",\n"


@honest
def csv_rows(rng: random.Random) -> Iterator[str]:
    for n in itertools.count(1):
        yield f"{n},{rng.choice(NAMES)},{rng.choice(NOUNS)},,,0,0,{rng.randint(0, 9)},2024-01-{n % 28 + 1:02},USD\n"


@honest
def sql_inserts(rng: random.Random) -> Iterator[str]:
    for n in itertools.count(1):
        name = rng.choice(NAMES)
        yield f"INSERT INTO people (id, name, mail) VALUES ({n}, '{name}', '{name.lower()}{n}@example.org');\n"


@honest
def server_log(rng: random.Random) -> Iterator[str]:
    clock = rng.randrange(10**5)
    while True:
        clock += rng.choice((0, 0, 1, 2))
        yield f"2025-06-10 {clock // 3600 % 24:02}:{clock // 60 % 60:02}:{clock % 60:02} INFO [worker-{rng.randint(1, 4)}] "
        yield f"request {rng.randrange(10**6)} done in {rng.randint(1, 40)} ms\n"


@honest
def retry_log(rng: random.Random) -> Iterator[str]:
    for n in itertools.count(1):
        wait = rng.choice((1, 2, 5))
        yield f"[{n * 7 / 10:.3f}] eth0: link is down, retrying in {wait} s\n"


@honest
def training_log(rng: random.Random) -> Iterator[str]:
    for step in itertools.count(10, 10):
        yield f"step {step}: loss {3 / math.log(step + 9) + rng.gauss(0, 0.02):.4f}, lr 3.0e-04, tokens/s 51200\n"


@honest
def xml(rng: random.Random) -> Iterator[str]:
    for n in itertools.count(1):
        yield f'  <item id="{n}" type="default" visible="true">\n    <name>{rng.choice(NAMES)}</name>\n  </item>\n'


@honest
def html_table(rng: random.Random) -> Iterator[str]:
    while True:
        cells = "".join(f'<td class="num">{rng.randint(0, 9)}</td>' for _ in range(6))
        yield f'<tr class="row">{cells}</tr>\n'


@honest
def yaml(rng: random.Random) -> Iterator[str]:
    for n in itertools.count(1):
        yield f"- name: {rng.choice(NOUNS)}-{n}\n  image: alpine:3\n  replicas: 1\n  restart: always\n  port: {8000 + n}\n"


@honest
def latex(rng: random.Random) -> Iterator[str]:
    while True:
        rows = (" & ".join(str(rng.randint(0, 9)) for _ in range(4)) for _ in range(4))
        yield "\\begin{pmatrix}\n" + " \\\\\n".join(rows) + "\n\\end{pmatrix}\n"
        a, b = rng.randint(2, 99), rng.randint(2, 99)
        yield f"\\begin{{align}}\n x^2 - {a + b}x + {a * b} &= (x - {a})(x - {b}) \\\\\n &= 0\n\\end{{align}}\n"


@honest
def unified_diff(rng: random.Random) -> Iterator[str]:
    old, new = rng.sample(NOUNS, 2)
    for n in itertools.count(10, 14):
        lines = [f"     {rng.choice(NAMES).lower()} = {old}.get()" for _ in range(3)]
        yield f"@@ -{n},7 +{n},7 @@ def {rng.choice(VERBS)}_{n}(self):\n" + "\n".join(lines)
        yield f"\n-    return {old}.close()\n+    return {new}.close()\n \n \n     @property\n"


@honest
def chess(rng: random.Random) -> Iterator[str]:
    while True:
        yield f"\n[White {rng.choice(NAMES)}] [Black {rng.choice(NAMES)}]\n"
        for move in range(1, rng.randint(20, 60)):
            yield f"{move}. " + "".join(
                f"{rng.choice(('', '', 'N', 'B', 'R', 'Q', 'K'))}{rng.choice('abcdefgh')}{rng.randint(1, 8)} "
                for _ in range(2)
            )


@honest
def base64_text(rng: random.Random) -> Iterator[str]:
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    while True:
        run = rng.random() < 0.1
        yield ("A" * 76 if run else "".join(rng.choices(alphabet, k=76))) + "\n"


@honest
def rules_and_trees(rng: random.Random) -> Iterator[str]:
    while True:
        yield (
            rng.choice(("-", "=", "*", "- ", "~", "─", "· ")) * rng.randint(20, 90)
            + "\n"
            + sentence(rng)
            + "\n"
        )
        yield "".join(f"{'│   ' * rng.randint(0, 5)}├── {rng.choice(NOUNS)}.txt\n" for _ in range(8))


@honest
def pyramids(rng: random.Random) -> Iterator[str]:
    sign = rng.choice("*#o1")
    while True:
        height = rng.randint(5, 24)
        rows = (" " * (height - n) + f"{sign} " * n for n in range(1, height + 1))
        yield _prose(rng, 2) + "\n".join(row.rstrip() for row in rows) + "\n\n"


# Code.


@honest
def generated_tests(rng: random.Random) -> Iterator[str]:
    for n in itertools.count(1):
        yield f"    def test_{rng.choice(NOUNS)}_{n}(self):\n        result = compute({n})\n"
        yield f"        self.assertEqual(result, {n * n})\n        self.assertIsNone(self.error)\n\n"


@honest
def accessors(rng: random.Random) -> Iterator[str]:
    while True:
        name = f"{rng.choice(ADJECTIVES)}_{rng.choice(NOUNS)}"
        yield f"    @property\n    def {name}(self):\n        return self._{name}\n\n"
        yield f"    @{name}.setter\n    def {name}(self, value):\n        self._{name} = value\n\n"


@honest
def assembly(rng: random.Random) -> Iterator[str]:
    for n in itertools.count(0x4000, 4):
        operation = rng.choice(("mov", "add", "xor", "nop", "nop", "nop"))
        registers = "" if operation == "nop" else f" r{rng.randrange(16)}, r{rng.randrange(16)}"
        yield f"    {n:x}:  {operation}{registers}\n"


@honest
def nested_code(rng: random.Random) -> Iterator[str]:
    while True:
        depth = rng.randint(2, 9)
        for level in range(depth):
            yield "    " * level + f"for {rng.choice('ijklmn')} in range({rng.randint(2, 99)}):\n"
        yield "    " * depth + "total += 1\n" + "".join("    " * d + "}\n" for d in range(depth, -1, -1))


@honest
def unrolled_loop(_rng: random.Random) -> Iterator[str]:
    for n in itertools.count():
        yield f"    out[{n}] = a[{n}] * b[{n}] + c[{n % 4}];\n"


# Songs and poems.


@honest
def bottles(_rng: random.Random) -> Iterator[str]:
    for n in itertools.count(999, -1):
        yield f"{n} bottles of beer on the wall, {n} bottles of beer.\nTake one down and pass it around, "
        yield f"{n - 1} bottles of beer on the wall.\n\n"


@honest
def song_with_refrain(rng: random.Random) -> Iterator[str]:
    refrain = "".join(sentence(rng) + "\n" for _ in range(rng.randint(2, 6)))
    twice = rng.choice((1, 1, 2))
    while True:
        yield "".join(sentence(rng) + "\n" for _ in range(rng.randint(2, 6))) + "\n" + refrain * twice + "\n"


@honest
def song_with_la_la(rng: random.Random) -> Iterator[str]:
    while True:
        yield (
            sentence(rng)
            + "\n"
            + rng.choice(("La la la la, ", "Na na na hey, ", "Oh oh oh, ")) * rng.randint(4, 12)
        )
        yield "\n" + f"{rng.choice(NOUNS).title()}, oh my {rng.choice(NOUNS)}!\n" * rng.randint(2, 4)


@honest
def nursery_rhyme(rng: random.Random) -> Iterator[str]:
    while True:
        who, says = rng.choice(NOUNS), rng.choice(("moo", "baa", "woof", "quack", "beep", "swish", "round"))
        yield f"The {who} on the farm goes {says}, {says}, {says},\n{says}, {says}, {says}, {says}, {says}, {says}.\n"
        yield f"The {who} on the farm goes {says}, {says}, {says},\nall day long.\n\n"


@honest
def cumulative_song(rng: random.Random) -> Iterator[str]:
    gifts: list[str] = []
    for n in itertools.count(1):
        gifts.insert(0, f"{n} {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}s")
        yield f"On day {n} my true love gave to me: " + ", ".join(gifts[:14]) + ".\n"


@honest
def litany(rng: random.Random) -> Iterator[str]:
    while True:
        yield f"For the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}, we give thanks.\nLord, hear our prayer.\n"


@honest
def rhyming_verse(rng: random.Random) -> Iterator[str]:
    while True:
        end, other = rng.sample(RHYMES, 2)
        for word in (end, other, end, other):
            yield f"The {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} {rng.choice(VERBS)} the {word},\n"


@honest
def anaphora(rng: random.Random) -> Iterator[str]:
    opening = rng.choice(("I have seen the", "And the", "Blessed be the", "Here comes the"))
    while True:
        yield f"{opening} {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}\n"


@honest
def prose(rng: random.Random) -> Iterator[str]:
    while True:
        yield _prose(rng, 6)


# Other languages: enumerations, and sentences in the letters of 25 of them.

SHAPES = {
    "Korean": "{n}번째 경우: x를 {m}로 나눈 나머지가 {r}이면 x의 제곱을 나눈 나머지는 {q}이므로 주장이 성립합니다.\n",
    "Japanese": "場合{n}：xを{m}で割った余りが{r}のとき、xの二乗を割った余りは{q}なので、主張は成り立ちます。\n",
    "Arabic": "الحالة {n}: إذا كان باقي قسمة x على {m} هو {r} فإن باقي قسمة مربعه هو {q}، وبذلك يتم المطلوب.\n",
    "Chinese": "情形{n}：若x除以{m}余{r}，则x的平方除以{m}余{q}，故结论成立。\n",
    "Russian": "Случай {n}: если остаток от деления x на {m} равен {r}, то остаток квадрата равен {q}.\n",
    "French": "Cas n° {n} : si le reste de x modulo {m} vaut {r}, celui de son carré vaut {q}, donc c’est démontré.\n",
    "German": "Fall {n}: Lässt x bei Division durch {m} den Rest {r}, so lässt x² den Rest {q}; das war zu zeigen.\n",
    "Hindi": "स्थिति {n}: यदि x को {m} से भाग देने पर शेष {r} है, तो वर्ग का शेष {q} है, अतः कथन सत्य है।\n",
    "Greek": "Περίπτωση {n}: αν το υπόλοιπο του x διά {m} είναι {r}, του τετραγώνου είναι {q}.\n",
    "Turkish": "{n}. durum: x sayısının {m} ile bölümünden kalan {r} ise karesinden kalan {q} olur.\n",
}


@honest
def cases_in_ten_languages(rng: random.Random) -> Iterator[str]:
    shape, modulus = SHAPES[rng.choice(sorted(SHAPES))], rng.randint(7, 999)
    for n in itertools.count(rng.randrange(50)):
        r = n % modulus
        yield shape.format(n=n, m=modulus, r=r, q=r * r % modulus)


@honest
def sentences_in_25_languages(rng: random.Random) -> Iterator[str]:
    language = LANGUAGES[rng.choice(sorted(LANGUAGES))]
    words = language.split(" ") if language.count(" ") > 3 else list(language)
    while True:
        yield " ".join(rng.sample(words, rng.randint(2, len(words)))) + f" ({rng.randint(1, 999)})\n"


class Text(NamedTuple):
    kind: str
    name: str
    ids: list[int]


def generated(tokenizer: Tokenizer, kinds: Iterable[str], each: int, seed: int) -> Iterator[Text]:
    for kind, number in itertools.product(kinds, range(each)):
        rng = random.Random(f"{kind} {number} {seed}")
        pieces, least = GENERATORS[kind](rng), rng.randint(LEAST + 100, MOST)
        ids: list[int] = []
        text = ""
        while len(ids) < least:
            text += "".join(itertools.islice(pieces, 100))
            ids = tokenizer.encode(text)
        yield Text(kind, f"{kind} {number}", ids[:least])


def from_files(tokenizer: Tokenizer, kind: str, files: Iterable[Path]) -> Iterator[Text]:
    """Files with enough tokens, cut into texts of at most `MOST`."""
    for file in files:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        ids = tokenizer.encode(data.decode(errors="replace"))
        for start in range(0, len(ids) - LEAST, MOST):
            if len(part := ids[start : start + MOST]) >= LEAST:
                yield Text(kind, f"{file.name} {start}", part)


def library() -> list[Path]:
    """This Python's own sources: code, tables of characters, and the manual (`pydoc_data`)."""
    root = Path(sysconfig.get_path("stdlib"))
    packages = (
        "",
        "asyncio",
        "email",
        "encodings",
        "json",
        "multiprocessing",
        "pydoc_data",
        "unittest",
        "xml/dom",
    )
    return [file for package in packages for file in sorted((root / package).glob("*.py"))]


# Planted loops.
