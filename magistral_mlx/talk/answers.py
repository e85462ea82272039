r"""The final answer of each reply, normalised, and the most common one of several replies.

For mathematics: "**1,234.50**", "\boxed{1234.5}" and "so it is 1 234.5." are one answer. Whether `1/2` and
`\frac{1}{2}` are equal is algebra, and not decided here. Pure: text in, text out.
"""

import re
from collections import Counter
from collections.abc import Sequence

from .reply import Reply

_BOLD = re.compile(r"\*\*(?!\s)([^*\n]+?)(?<!\s)\*\*")
_NUMBER = re.compile(
    r"(?:(?<![\w)])[-\u2212+])?(?:\d{1,3}(?:[, \u00a0\u202f]\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?"
)

_TYPESETTING = re.compile(r"\$|\\[()\[\],;:! ]|\\(?:left|right)(?![a-z])")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?![\d,])")
_TRAILING_ZEROS = re.compile(r"(?<![\d.])(\d+)\.(?:0+|(\d*?[1-9])0+)(?![\d.])")
_SPACES = re.compile(r"(?<![^\W\d_])\s+|\s+(?![^\W\d_])")
"""White space, except between two letters."""


def consensus(replies: Sequence[Reply]) -> str | None:
    """The final answer that most replies give, normalised; on a tie, the first.

    Replies that were cut off, or that have no final answer, have no vote. None: there were no votes.
    """
    answers = [final_answer(reply.answer) for reply in replies if reply.finish_reason == "stop"]
    votes = Counter(answer.casefold() for answer in answers if answer)
    # A Counter keeps the order of the replies, and `max` takes the first of equals.
    winner = max(votes, key=lambda vote: votes[vote], default=None)
    return next((answer for answer in answers if answer and answer.casefold() == winner), None)


def final_answer(text: str) -> str | None:
    r"""The final answer in a text: its last `\boxed{…}`, or else its last **bold** words, or its last number.

    Bold words with a colon are a label; the answer is what follows them.
    """
    for found in (_boxed(text), _bold(text), _number(text)):
        if found and (answer := normalized(found)):
            return answer
    return None


def normalized(answer: str) -> str:
    """The canonical spelling: without typesetting, spaces, thousands separators, trailing zeros, `x =`."""
    text = answer.replace("{,}", ",")
    text = re.sub(r"\\[,;:! ](?=\d)", " ", text)
    text = _TYPESETTING.sub("", text).replace("\u2212", "-")
    text = " ".join(text.split()).rstrip(".")
    text = _THOUSANDS.sub(lambda found: re.sub("[, ]", "", found[0]), text)
    text = _TRAILING_ZEROS.sub(lambda found: f"{found[1]}.{found[2]}" if found[2] else found[1], text)
    text = _SPACES.sub("", text).removeprefix("+")
    name, equals, value = text.partition("=")
    return value if name and equals and value and "=" not in value else text


def _boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{…}`, which may contain nested braces."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth = 0
    for at in range(start + len(r"\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if not depth:
            return text[start + len(r"\boxed{") : at]
    return None


def _bold(text: str) -> str | None:
    *_, last = [None, *_BOLD.finditer(text)]
    if last is None:
        return None
    after = text[last.end() :]
    if not (last[1].endswith(":") or after.startswith(":")):
        return last[1]
    return _number(after) or after.lstrip(": \n").partition("\n")[0]


def _number(text: str) -> str | None:
    *_, last = [None, *_NUMBER.finditer(text)]
    return last and last[0]
