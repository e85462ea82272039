"""The final answer of a text, normalised, and the most common one of several."""

from collections.abc import Sequence

import pytest

from magistral_mlx.events import FinishReason, Stats
from magistral_mlx.talk.answers import consensus, final_answer
from magistral_mlx.talk.reply import Reply


def reply(answer: str, reason: FinishReason = "stop") -> Reply:
    return Reply(
        thinking="99",
        answer=answer,
        prompt_ids=(),
        token_ids=(),
        finish_reason=reason,
        seed=0,
        stats=Stats(),
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("48 + 37 = **85**", "85"),
        ("**85.**", "85"),
        ("**48 + 37 = 85**", "85"),
        ("It is **12**, no: **13**.", "13"),
        ("**Answer:** 85", "85"),
        ("**Answer**: 85", "85"),
        ("**Answer:** none of them\n\nAny questions?", "none of them"),
        ("**Step 1** add.\nSo **Final answer:** $x = 7$", "7"),
        ("**Step 1**: add 3", "3"),
        (r"So $\boxed{85}$. **Note** that 3 is odd.", "85"),
        (r"\boxed{1} and then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\left( 1, 2 \right)}", "(1,2)"),
        (r"\boxed{never closed, 5", "5"),
        ("The answer is 1,234.50 dollars.", "1234.5"),
        ("so it is 1 234.5.", "1234.5"),
        ("**1\u202f234\u00a0567**", "1234567"),
        (r"$\boxed{1{,}234\,567}$", r"1234567"),
        (r"\boxed{12\,345}", "12345"),
        ("12,34", "34"),
        ("**12,34**", "12,34"),
        ("**0.500**", "0.5"),
        ("**100**", "100"),
        ("**100.0**", "100"),
        ("**1.2.0**", "1.2.0"),
        ("**\u22125**", "-5"),
        ("it is -5.", "-5"),
        ("it is \u22125.0", "-5"),
        ("**+5**", "5"),
        ("10-7", "7"),
        ("three quarters, 3/4", "3/4"),
        ("** 7 **", "7"),
        ("**7 apples**", "7apples"),
        ("**No  solution**", "No solution"),
        ("**x = 3, y = 4**", "x=3,y=4"),
        ("No number at all.", None),
        ("", None),
        ("****", None),
    ],
)
def test_final_answers(text: str, expected: str | None):
    assert final_answer(text) == expected


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["**85**", "**84**", "it is 85.0"], "85"),
        (["**84**", "**85**"], "84"),
        (["**84**", "**85**", r"\boxed{85}", "84"], "84"),
        (["**Yes**", "**no**", "**yes**"], "Yes"),
        (["nothing", "", "**3**"], "3"),
        (["nothing", ""], None),
        ([], None),
    ],
)
def test_consensus_is_the_most_common_answer_or_the_first(answers: Sequence[str], expected: str | None):
    assert consensus([reply(answer) for answer in answers]) == expected


def test_replies_that_were_cut_off_have_no_vote():
    assert consensus([reply("It is 8", "length"), reply("It is 8", "cancelled"), reply("It is 85")]) == "85"
    assert consensus([reply("It is 8", "length")]) is None
