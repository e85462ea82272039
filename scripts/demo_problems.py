"""What the embedded demo model is taught: small sums in four languages, worked on a scratchpad.

Knows questions, reasoning traces and answers as plain text. Knows neither tokens nor torch, so tests
and benchmarks can draw problems from it wherever the standard library runs.

A problem is *held out* by a hash of its kind and its unordered operands (`is_held_out`): about one in
ten never appears in training, in any language, phrasing, order, follow-up or step of a longer sum.
`held_out_problems` draws only from those.
"""
# ruff: noqa: RUF001 - the multiplication sign and full-width punctuation are meant

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass
from typing import Final

LANGUAGES: Final = ("en", "fr", "ko", "ja")
KINDS: Final = ("addition", "subtraction", "multiplication", "list_sum")
KIND_WEIGHTS: Final = (30, 28, 18, 24)
SIGNS: Final = {"addition": "+", "subtraction": "-", "multiplication": "×", "list_sum": "+"}

SYSTEM_PROMPT: Final = (
    "First draft your thinking process, then write a short answer in the language of the task.\n\n"
    "Your thinking process must follow the template below:\n"
    "<think>\nYour thoughts, line by line.\n</think>\n\n"
    "Here, give the final answer.\n\nProblem:\n\n"
)
"""The exact text that is shipped and trained with: the real prompt's structure in few words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One task and its solution. For small talk, `kind` is "talk" and `answer` is empty."""

    kind: str
    operands: tuple[int, ...]
    language: str
    question: str
    trace: str
    """The reasoning between `<think>` and `</think>`, without either and without outer newlines."""
    reply: str
    """The text after the reasoning; the result is in bold."""
    answer: str


# ---------------------------------------------------------------------------- hold-out


def is_held_out(kind: str, operands: tuple[int, ...]) -> bool:
    """Say whether a problem is kept out of training (about 10 %), whatever the operands' order.

    >>> is_held_out("addition", (48, 37)) == is_held_out("addition", (37, 48))
    True
    """
    key = f"{kind}:{','.join(map(str, sorted(operands)))}"
    return hashlib.blake2b(key.encode(), digest_size=1).digest()[0] < 26


def touches_held_out(kind: str, operands: tuple[int, ...]) -> bool:
    """Say whether a problem, or any addition done on the way through a list, is held out."""
    if is_held_out(kind, operands):
        return True
    if kind != "list_sum":
        return False
    totals = [sum(operands[:i]) for i in range(1, len(operands))]
    pairs = zip(totals, operands[1:], strict=True)
    return any(is_held_out("addition", pair) for pair in pairs)


# ---------------------------------------------------------------------------- reasoning


@dataclass(frozen=True, slots=True)
class Words:
    """The few words of a scratchpad in one language."""

    columns: tuple[str, str, str]
    carry: str
    borrow: str
    keep: str
    swap: str
    step: str
    so: str
    openings: tuple[str, ...]


WORDS: Final = {
    "en": Words(
        ("ones", "tens", "hundreds"),
        "carry",
        "borrow",
        "keep",
        "swap",
        "step",
        "so",
        ("Let me work digit by digit", "I go column by column", "OK, one digit at a time"),
    ),
    "fr": Words(
        ("unités", "dizaines", "centaines"),
        "retiens",
        "emprunte",
        "garde",
        "inverse",
        "étape",
        "donc",
        ("Je calcule chiffre par chiffre", "Allons colonne par colonne", "Voyons, un chiffre à la fois"),
    ),
    "ko": Words(
        ("일의 자리", "십의 자리", "백의 자리"),
        "올림",
        "빌림",
        "그대로",
        "바꿈",
        "단계",
        "따라서",
        ("한 자리씩 계산해 보자", "자리별로 풀어 보자", "차근차근 한 자리씩 보자"),
    ),
    "ja": Words(
        ("一の位", "十の位", "百の位"),
        "繰り上がり",
        "繰り下がり",
        "そのまま",
        "入れ替え",
        "手順",
        "よって",
        ("一桁ずつ計算しよう", "位ごとに考えよう", "順番に一桁ずつ見よう"),
    ),
}


def _digits(number: int, width: int) -> list[int]:
    """Digits of a number, ones first, padded with zeros."""
    return [number // 10**i % 10 for i in range(width)]


def _add_lines(a: int, b: int, w: Words) -> list[str]:
    width, carry, lines = max(len(str(a)), len(str(b))), 0, []
    for i, (x, y) in enumerate(zip(_digits(a, width), _digits(b, width), strict=True)):
        total = x + y + carry
        terms = f"{x}+{y}" if i == 0 else f"{x}+{y}+{carry}"
        carry = total // 10
        lines.append(f"{w.columns[i]}: {terms}={total}, {w.carry} {carry}")
    return [*lines, f"{w.so} {a + b}"]


def _add_briefly(a: int, b: int) -> str:
    """Write the columns of one addition on one line: `8+7=15, 4+3+1=8`."""
    width, carry, sums = max(len(str(a)), len(str(b))), 0, []
    for i, (x, y) in enumerate(zip(_digits(a, width), _digits(b, width), strict=True)):
        total = x + y + carry
        sums.append(f"{x}+{y}={total}" if i == 0 else f"{x}+{y}+{carry}={total}")
        carry = total // 10
    return ", ".join(sums)


def _subtract_lines(a: int, b: int, w: Words) -> list[str]:
    high, low = max(a, b), min(a, b)
    verdict = f">= {b}: {w.keep}" if a >= b else f"< {b}: {w.swap}"
    lines, borrow = [f"{a} {verdict} {high}-{low}"], 0
    width = len(str(high))
    for i, (x, y) in enumerate(zip(_digits(high, width), _digits(low, width), strict=True)):
        taken = f"{y}" if i == 0 else f"{y}-{borrow}"
        rest = x - y - borrow
        borrow = int(rest < 0)
        top, rest = x + 10 * borrow, rest + 10 * borrow
        lines.append(f"{w.columns[i]}: {top}-{taken}={rest}, {w.borrow} {borrow}")
    return [*lines, f"{w.so} {a - b}"]


def _multiply_lines(a: int, b: int, w: Words) -> list[str]:
    a, b = max(a, b), min(a, b)
    carry, lines = 0, []
    for i, x in enumerate(_digits(a, len(str(a)))):
        total = x * b + carry
        product = f"{x}×{b}={total}" if i == 0 else f"{x}×{b}={x * b}, {x * b}+{carry}={total}"
        carry = total // 10
        lines.append(f"{w.columns[i]}: {product}, {w.carry} {carry}")
    return [*lines, f"{w.so} {a * b}"]


def _list_lines(numbers: tuple[int, ...], w: Words) -> list[str]:
    total, lines, last = numbers[0], [], len(numbers) - 1
    for i, number in enumerate(numbers[1:], start=1):
        lines += [f"{w.step} {i}/{last}: {total}+{number}", _add_briefly(total, number)]
        total += number
        lines.append(f"{w.so} {total}")
    return lines


def make_trace(kind: str, operands: tuple[int, ...], language: str, rng: random.Random) -> str:
    """Write the scratchpad: an opening, the problem in symbols, digit-wise lines, the result."""
    w = WORDS[language]
    if kind == "list_sum":
        lines = _list_lines(operands, w)
    else:
        work = {"addition": _add_lines, "subtraction": _subtract_lines, "multiplication": _multiply_lines}
        lines = work[kind](*operands, w)
    restated = SIGNS[kind].join(map(str, operands))
    return "\n".join([rng.choice(w.openings), restated, *lines])


# ---------------------------------------------------------------------------- phrasing

BARE: Final = ("{a} {s} {b}", "{a}{s}{b}", "{a}{s}{b}=", "{a} {s} {b} =", "{a} {s} {b} = ?", "{a}{s}{b}=?")

QUESTIONS: Final = {
    ("addition", "en"): (
        "What is {a} + {b}?",
        "What is {a} plus {b}?",
        "Add {a} and {b}.",
        "How much is {a} + {b}?",
        "Calculate {a} + {b}.",
        "Compute {a} plus {b}",
        "What is the sum of {a} and {b}?",
        "I have {a} apples and get {b} more. How many apples do I have?",
    ),
    ("addition", "fr"): (
        "Combien font {a} + {b} ?",
        "Combien font {a} plus {b} ?",
        "Calcule {a} + {b}.",
        "Calculez {a} plus {b}",
        "Quelle est la somme de {a} et {b} ?",
        "Ajoute {b} à {a}.",
        "Que vaut {a} + {b} ?",
        "J'ai {a} pommes et j'en reçois {b}. Combien de pommes ai-je ?",
    ),
    ("addition", "ko"): (
        "{a} + {b}{topic} 얼마인가요?",
        "{a} 더하기 {b}{topic}?",
        "{a}에 {b}{object} 더하면 얼마예요?",
        "{a} + {b}{object} 계산해 주세요.",
        "{a}{with_a} {b}의 합은 얼마인가요?",
        "{a} 더하기 {b}의 값을 구해줘",
        "사과 {a}개가 있고 {b}개를 더 받았어요. 모두 몇 개인가요?",
    ),
    ("addition", "ja"): (
        "{a} + {b} はいくつですか？",
        "{a}足す{b}は？",
        "{a}に{b}を足すといくつになりますか？",
        "{a} + {b} を計算してください。",
        "{a}と{b}の合計はいくつですか？",
        "{a}+{b}を計算して",
        "りんごが{a}個あり、{b}個もらいました。全部で何個ですか？",
    ),
    ("subtraction", "en"): (
        "What is {a} - {b}?",
        "What is {a} minus {b}?",
        "Subtract {b} from {a}.",
        "How much is {a} - {b}?",
        "Calculate {a} - {b}.",
        "Compute {a} minus {b}",
        "Take {b} away from {a}.",
    ),
    ("subtraction", "fr"): (
        "Combien font {a} - {b} ?",
        "Combien font {a} moins {b} ?",
        "Calcule {a} - {b}.",
        "Calculez {a} moins {b}",
        "Soustrais {b} de {a}.",
        "Que vaut {a} - {b} ?",
        "Enlève {b} à {a}.",
    ),
    ("subtraction", "ko"): (
        "{a} - {b}{topic} 얼마인가요?",
        "{a} 빼기 {b}{topic}?",
        "{a}에서 {b}{object} 빼면 얼마예요?",
        "{a} - {b}{object} 계산해 주세요.",
        "{a} 빼기 {b}의 값을 구해줘",
        "{a}에서 {b}{object} 빼 주세요.",
    ),
    ("subtraction", "ja"): (
        "{a} - {b} はいくつですか？",
        "{a}引く{b}は？",
        "{a}から{b}を引くといくつになりますか？",
        "{a} - {b} を計算してください。",
        "{a}-{b}を計算して",
        "{a}から{b}を引いてください。",
    ),
    ("multiplication", "en"): (
        "What is {a} × {b}?",
        "What is {a} times {b}?",
        "Multiply {a} by {b}.",
        "How much is {a} * {b}?",
        "Calculate {a} x {b}.",
        "Compute {a} times {b}",
        "What is the product of {a} and {b}?",
    ),
    ("multiplication", "fr"): (
        "Combien font {a} × {b} ?",
        "Combien font {a} fois {b} ?",
        "Multiplie {a} par {b}.",
        "Calcule {a} * {b}.",
        "Calculez {a} fois {b}",
        "Que vaut {a} x {b} ?",
        "Quel est le produit de {a} et {b} ?",
    ),
    ("multiplication", "ko"): (
        "{a} × {b}{topic} 얼마인가요?",
        "{a} 곱하기 {b}{topic}?",
        "{a}에 {b}{object} 곱하면 얼마예요?",
        "{a} * {b}{object} 계산해 주세요.",
        "{a} 곱하기 {b}의 값을 구해줘",
        "{a} x {b}의 값은?",
    ),
    ("multiplication", "ja"): (
        "{a} × {b} はいくつですか？",
        "{a}掛ける{b}は？",
        "{a}に{b}を掛けるといくつになりますか？",
        "{a} * {b} を計算してください。",
        "{a}×{b}を計算して",
        "{a} x {b} の答えは？",
    ),
    ("list_sum", "en"): (
        "What is the sum of {and_list}?",
        "Add up {list}.",
        "Add {and_list}.",
        "What is {plus}?",
        "Sum these numbers: {list}",
        "What is the total of {list}?",
        "Calculate {plus}.",
    ),
    ("list_sum", "fr"): (
        "Quelle est la somme de {and_list} ?",
        "Additionne {list}.",
        "Additionne {and_list}.",
        "Combien font {plus} ?",
        "Fais le total de ces nombres : {list}",
        "Calcule {plus}.",
    ),
    ("list_sum", "ko"): (
        "{list}의 합은 얼마인가요?",
        "{list}{object} 모두 더해 주세요.",
        "{plus}{topic} 얼마인가요?",
        "다음 수를 모두 더해줘: {list}",
        "{plus}{object} 계산해 주세요.",
    ),
    ("list_sum", "ja"): (
        "{list}の合計はいくつですか？",
        "{list}を全部足してください。",
        "{plus} はいくつですか？",
        "次の数を全部足して: {list}",
        "{plus} を計算してください。",
    ),
}

FOLLOW_UPS: Final = {
    ("addition", "en"): ("Now add {b} to that.", "Add {b} to it.", "And plus {b}?", "Add {b} more."),
    ("addition", "fr"): ("Ajoute {b} à ce résultat.", "Maintenant, ajoute {b}.", "Et plus {b} ?"),
    ("addition", "ko"): (
        "그 결과에 {b}{object} 더해줘",
        "거기에 {b}{object} 더하면?",
        "이제 {b}{object} 더해 주세요.",
    ),
    ("addition", "ja"): ("その結果に{b}を足して", "それに{b}を足すと？", "さらに{b}を足してください。"),
    ("subtraction", "en"): (
        "Now subtract {b} from that.",
        "Take {b} away from it.",
        "And minus {b}?",
        "Subtract {b} more.",
    ),
    ("subtraction", "fr"): ("Enlève {b} à ce résultat.", "Maintenant, soustrais {b}.", "Et moins {b} ?"),
    ("subtraction", "ko"): (
        "그 결과에서 {b}{object} 빼줘",
        "거기에서 {b}{object} 빼면?",
        "이제 {b}{object} 빼 주세요.",
    ),
    ("subtraction", "ja"): (
        "その結果から{b}を引いて",
        "それから{b}を引くと？",
        "さらに{b}を引いてください。",
    ),
    ("multiplication", "en"): ("Now multiply that by {b}.", "Multiply it by {b}.", "And times {b}?"),
    ("multiplication", "fr"): (
        "Multiplie ce résultat par {b}.",
        "Maintenant, multiplie par {b}.",
        "Et fois {b} ?",
    ),
    ("multiplication", "ko"): (
        "그 결과에 {b}{object} 곱해줘",
        "거기에 {b}{object} 곱하면?",
        "이제 {b}{object} 곱해 주세요.",
    ),
    ("multiplication", "ja"): (
        "その結果に{b}を掛けて",
        "それに{b}を掛けると？",
        "さらに{b}を掛けてください。",
    ),
}

LEADS: Final = {
    "en": ("Hello! ", "Hi, ", "Please help me. ", "Quick question: ", "Can you tell me? ", "Next: ", "OK. "),
    "fr": ("Bonjour ! ", "Salut, ", "Aide-moi. ", "Petite question : ", "Peux-tu me dire ? ", "Ensuite : "),
    "ko": ("안녕하세요! ", "도와주세요. ", "질문이 있어요. ", "좋아요. ", "그럼 ", "다음 문제: "),
    "ja": ("こんにちは！", "教えてください。", "質問です。", "では、", "次の問題: ", "お願いします。"),
}

REPLIES: Final = {
    "en": ("{sum} = **{n}**", "The answer is **{n}**.", "The result of {sum} is **{n}**."),
    "fr": ("{sum} = **{n}**", "La réponse est **{n}**.", "Le résultat de {sum} est **{n}**."),
    "ko": ("{sum} = **{n}**", "답은 **{n}**입니다.", "{sum}의 결과는 **{n}**입니다."),
    "ja": ("{sum} = **{n}**", "答えは**{n}**です。", "{sum} の結果は**{n}**です。"),
}

AND: Final = {"en": " and ", "fr": " et ", "ko": ", ", "ja": "、"}
CONSONANT_ENDINGS: Final = "013678"
"""Digits whose Korean reading ends in a consonant: they take 을 and 은, the others 를 and 는."""


def _solve(kind: str, operands: tuple[int, ...]) -> int:
    if kind == "subtraction":
        return operands[0] - operands[1]
    if kind == "multiplication":
        return operands[0] * operands[1]
    return sum(operands)


def _fill(template: str, kind: str, operands: tuple[int, ...], language: str) -> str:
    """Put numbers, list spellings and Korean particles into a template."""
    shown = [str(n) for n in operands]
    hard = shown[-1][-1] in CONSONANT_ENDINGS
    comma = "、" if language == "ja" else ", "
    return template.format(
        a=shown[0],
        b=shown[-1],
        s=SIGNS[kind],
        list=comma.join(shown),
        and_list=comma.join(shown[:-1]) + AND[language] + shown[-1],
        plus=" + ".join(shown),
        object="을" if hard else "를",
        topic="은" if hard else "는",
        with_a="과" if shown[0][-1] in CONSONANT_ENDINGS else "와",
    )


def _vary(question: str, rng: random.Random) -> str:
    """Write as people type: sums without spaces, no capitals, no last full stop."""
    chances = [rng.random() for _ in range(3)]
    if chances[0] < 0.2:
        question = re.sub(r"(?<=\d) ([-+×*x]) (?=\d)", r"\1", question)
    if chances[1] < 0.08:
        question = question.lower()
    if chances[2] < 0.08:
        question = question.rstrip(" .?？。")
    return question


def make_problem(
    kind: str, operands: tuple[int, ...], language: str, rng: random.Random, template: str | None = None
) -> Problem:
    """Phrase, solve and explain one task; `template` overrides the random phrasing."""
    n, lead = _solve(kind, operands), ""
    bare = template is None and language == "en" and rng.random() < 0.25
    if bare:
        question = _fill(rng.choice(BARE), kind, operands, language)
        if kind == "list_sum":
            question = rng.choice((" + ", "+")).join(map(str, operands)) + rng.choice(
                ("", "", " =", "=", " = ?")
            )
        elif kind == "multiplication":
            question = question.replace("×", rng.choice("×*x"))
    else:
        if rng.random() < 0.12:
            lead = rng.choice(LEADS[language])
        asked = template or rng.choice(QUESTIONS[kind, language])
        question = _vary(lead + _fill(asked, kind, operands, language), rng)
    shown = f" {SIGNS[kind]} ".join(map(str, operands))
    reply = REPLIES[language][0] if bare else rng.choices(REPLIES[language], (3, 2, 1))[0]
    return Problem(
        kind=kind,
        operands=operands,
        language=language,
        question=question,
        trace=make_trace(kind, operands, language, rng),
        reply=reply.format(sum=shown, n=n),
        answer=str(n),
    )


# ---------------------------------------------------------------------------- drawing


def _number(rng: random.Random) -> int:
    """Draw a number of one to three digits, each length equally likely."""
    return rng.choice((rng.randint(0, 9), rng.randint(10, 99), rng.randint(100, 999)))


def draw_operands(kind: str, rng: random.Random) -> tuple[int, ...]:
    """Draw operands of one kind: two digits in most cases, one to three in the others."""
    if kind == "list_sum":
        return tuple(rng.randint(10, 99) for _ in range(rng.randint(3, 6)))
    if kind == "multiplication":
        low = 10 if rng.random() < 0.9 else 0
        pair = (rng.randint(low, 99), rng.randint(2, 9) if low else rng.randint(0, 9))
        return pair if rng.random() < 0.85 else pair[::-1]
    two_digits = rng.random() < 0.6
    pair = (rng.randint(10, 99), rng.randint(10, 99)) if two_digits else (_number(rng), _number(rng))
    if kind == "subtraction" and rng.random() < 0.5:
        pair = (max(pair), min(pair))
    return pair


def training_problem(
    rng: random.Random, language: str | None = None, weights: tuple[int, ...] = KIND_WEIGHTS
) -> Problem:
    """Draw a problem of which no part is held out; `weights` of KINDS."""
    kind = rng.choices(KINDS, weights)[0]
    operands = draw_operands(kind, rng)
    while touches_held_out(kind, operands):
        operands = draw_operands(kind, rng)
    return make_problem(kind, operands, language or rng.choice(LANGUAGES), rng)


def follow_up(previous: int, language: str, rng: random.Random) -> Problem | None:
    """Draw a task that begins with the previous result, or None where that would leave the range."""
    kinds = [k for k in KINDS[:3] if k != "multiplication" or 10 <= previous <= 99]
    kind = rng.choice(kinds)
    second = rng.randint(2, 9) if kind == "multiplication" else rng.randint(2, 99)
    operands = (previous, second)
    if not 0 <= previous <= 999 or touches_held_out(kind, operands):
        return None
    return make_problem(kind, operands, language, rng, rng.choice(FOLLOW_UPS[kind, language]))


def held_out_problems(n: int, seed: int) -> list[Problem]:
    """Draw `n` problems that training never saw, kinds and languages in turn, reproducibly.

    Kinds repeat every 4, languages every 16; `problem.answer` is the number as the reply prints it.
    """
    rng = random.Random(seed)  # noqa: S311 - reproducible problems, no secrets
    problems = []
    for i in range(n):
        kind, language = KINDS[i % 4], LANGUAGES[i // 4 % 4]
        operands = draw_operands(kind, rng)
        while not is_held_out(kind, operands):
            operands = draw_operands(kind, rng)
        problems.append(make_problem(kind, operands, language, rng))
    return problems


def is_right(text: str, answer: str) -> bool:
    """Say whether a generated text thinks first and then gives exactly this number in bold."""
    thinking, close, reply = text.partition("</think>")
    return (
        thinking.startswith("<think>") and bool(close) and re.findall(r"\*\*(-?\d+)\*\*", reply) == [answer]
    )
