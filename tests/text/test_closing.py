"""Reasoning with a forced close: where it comes, the most tokens it takes, and that no tag leaks.

Transcripts are checked against `parse`, the reference: text before the forced close is reasoning, and text
after it is the answer, without its first closing tag, which is the model's own, late.
"""

import codecs
import random
import re
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import islice, pairwise
from typing import Any

import mlx.core as mx
import pytest

from magistral_mlx import AnswerToken, Event, Finished, Magistral, Reply, SamplingError, Stream, ThinkToken
from magistral_mlx.decoder.cache import KVCache
from magistral_mlx.talk.reply import ReplyBuilder
from magistral_mlx.talk.stream import OnDemand
from magistral_mlx.talk.worker import Pending
from magistral_mlx.text.closing import GRACE, TEAR, Closing
from magistral_mlx.text.thinking import CLOSE, OPEN, ThinkParser, parse
from magistral_mlx.text.tokenizer import Tokenizer
from magistral_mlx.text.transcript import TextEvent, Transcript
from magistral_mlx.wire import Guide
from tests.scripted import ENDS_OF_PROMPT, Script, scripted
from tests.tokenizers import CONTROLS, LANGUAGES

Open = Callable[[str], Tokenizer]
EOS = 2
BUDGETS = (0, 1, 5, 20, 100)


def as_bytes(text: str) -> list[int]:
    """One id per byte: characters and tags are split everywhere."""
    return [CONTROLS + byte for byte in text.encode()]


def shown_answer(answer: str) -> str:
    """An answer as it is shown: what the reference finds after a closing tag."""
    return parse(f"{OPEN}{CLOSE}{answer}")[1]


# ------------------------------------------------------------------ transcripts


def play(transcript: Transcript, ids: Sequence[int]) -> list[TextEvent]:
    return [event for token_id in ids for event in transcript.feed(token_id)]


def forced(tokenizer: Tokenizer, before: Sequence[int], after: Sequence[int]) -> tuple[str, str]:
    """(thinking, answer) of ids with a forced close between them; checks that no id is lost or moved."""
    transcript = Transcript(tokenizer)
    events = play(transcript, before)
    assert transcript.phase == "thinking"
    ids = transcript.closing_ids(tokenizer)
    events += transcript.force_close(ids)
    assert transcript.phase == "answer"
    events += play(transcript, after)
    last, leftover = transcript.flush()
    joined = [i for event in events + last for i in event.token_ids] + list(leftover)
    assert joined == [*before, *ids, *after]
    marked = [event for event in events if isinstance(event, ThinkToken) and event.forced]
    assert [list(event.token_ids) for event in marked] == [ids]
    return transcript.thinking, transcript.answer


def natural(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, str]:
    transcript = Transcript(tokenizer)
    play(transcript, ids)
    assert transcript.phase == "answer", "a close was missed"
    transcript.flush()
    return transcript.thinking, transcript.answer


def expected(before: str, after: str) -> tuple[str, str]:
    return before.strip().removeprefix(OPEN).strip(), shown_answer(after.replace(CLOSE, "", 1))


THOUGHTS = [
    *LANGUAGES.values(),
    "So 48 + 37:\n8 + 7 = 15, carry 1.\n\n4 + 3 + 1 = 8 (tens).\nIt is 85.",
    "```py\nif a < b and c</d:\n    return '<th'\n```\nπ is 3.14, e is 2.72; <b>bold</b> <",
    "- one\n- two\n  - three 👩‍🚀👩🏽‍💻\n\n\\boxed{85} $x<y$ **?",
]
ANSWERS = [
    "The sum of 48 and 37 is **85**.\n\nCheck: 85 - 37 = 48. 👍🏽 Write <b>85</b>, not <think>.\n",
    "\n\n    x = 48 + 37\n    print(x)  # 85, since 15 < 20\n",
    "答えは**八十五**です。四十八に三十七を足します。\n\n- 一の位は五、十の位は八。",
    "답은 85입니다. 48에 37을 더하면, 일의 자리는 5이고 십의 자리는 8입니다. 꿟뛝뷁!",
]
NATURAL = (
    ".\n</think>\n\n",
    ")</think>",
    "。</think>",
    "</think>The ",
    "\n</think>\n",
    "`</think>` ",
    "<</think>>",
)
LATE = (
    "</think>",
    "\n</think>\n\n",
    ".\n</think>\n\n",
    ")</think>",
    "。</think>",
    " </think>The",
    "  </think>\n\n",
)


def transcripts(
    tokenizer: Tokenizer, count: int, seed: int
) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """Pairs of (actual, expected), every kind in turn. Texts are tokenized once, and cut between ids."""
    draw = random.Random(seed)
    thoughts = [tokenizer.encode(f"{OPEN}\n{text}\n{text}\n") for text in THOUGHTS]
    answers = [tokenizer.encode(text) for text in ANSWERS]
    late = [tokenizer.encode(text) for text in LATE]
    halves = [(tokenizer.encode(CLOSE[:at]), tokenizer.encode(CLOSE[at:])) for at in range(1, len(CLOSE))]
    opening = len(tokenizer.encode(OPEN)) + 1
    closings = {}
    for kind in range(count):
        thought, answer = draw.choice(thoughts), draw.choice(answers)
        at = draw.randrange(min(51, len(answer)))  # the model's own tag comes after that many ids of answer
        before = thought[: draw.randrange(opening, len(thought) + 1)]
        match kind % 8:
            case 0 | 1:  # the model's own close, merged with the text around it
                key = draw.randrange(len(THOUGHTS)), draw.choice(NATURAL), draw.randrange(len(ANSWERS))
                if key not in closings:
                    text = f"{OPEN}\n{THOUGHTS[key[0]]}{key[1]}{ANSWERS[key[2]]}"
                    closings[key] = tokenizer.encode(text), parse(text)
                ids, expected_pair = closings[key]
                yield natural(tokenizer, ids), expected_pair
                continue
            case 2 | 3:  # late
                after = answer[:at] + draw.choice(late) + answer[at:]
            case 4:  # late, and once more: that one is text
                after = answer[:at] + draw.choice(late) + answer[at:] + draw.choice(late) + answer[:5]
            case 5:  # late, and split
                first, second = draw.choice(halves)
                after = answer[:at] + first + second + answer[at:]
            case 6:  # half of it at the end
                after = answer[:at] + draw.choice(halves)[0]
            case _:
                after = answer
        yield forced(tokenizer, before, after), expected(tokenizer.decode(before), tokenizer.decode(after))


@pytest.mark.parametrize("count", [1_000, pytest.param(12_000, marks=pytest.mark.slow)])
def test_real_vocabulary_leaks_no_tag_and_misses_no_close(full_tokenizer: Open, count: int):
    tokenizer = full_tokenizer("v11")
    wrong = [pair for pair in transcripts(tokenizer, count, seed=count) if pair[0] != pair[1]]
    assert wrong == []


@pytest.mark.parametrize("padding", ["", " ", "\n", " \n ", "  ", "a", "a ", " a"])
@pytest.mark.parametrize("rest", ["", "\n\nb", "b", "  b", "\n  b", " \n", "</think>c", "<think>"])
def test_late_close_is_dropped_however_it_is_chunked(padding: str, rest: str):
    """White space before it is not shown until it is known whether it leads the answer."""
    text = f"{padding}{CLOSE}{rest}"
    for size in range(1, len(text) + 1):
        parser = ThinkParser()
        parser.feed(f"{OPEN}a")
        assert parser.force_close() == []
        pieces = [p for at in range(0, len(text), size) for p in parser.feed(text[at : at + size])]
        pieces += parser.flush()
        assert {piece.phase for piece in pieces} <= {"answer"}
        assert "".join(piece.text for piece in pieces) == shown_answer(padding + rest)


@pytest.mark.parametrize("cut", range(1, len(CLOSE)))
def test_half_a_late_close_is_text(cut: int):
    parser = ThinkParser()
    parser.feed(f"{OPEN}a")
    parser.force_close()
    pieces = [piece for character in f"b{CLOSE[:cut]}" for piece in parser.feed(character)] + parser.flush()
    assert "".join(piece.text for piece in pieces) == f"b{CLOSE[:cut]}"


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_control_tags_are_forced_and_late_ones_ignored(full_tokenizer: Open, count: int):
    tokenizer, draw = full_tokenizer("v13"), random.Random(3)
    for _ in range(count):
        thought, answer = (tokenizer.encode(draw.choice(texts)) for texts in (THOUGHTS, ANSWERS))
        before, at = [34, *thought[: draw.randrange(len(thought))]], draw.randrange(len(answer))
        after = [*answer[:at], 35, *answer[at:], EOS]
        assert Transcript(tokenizer).closing_ids(tokenizer) == [35]
        # Control tokens end a character, so the reference is what both sides of one decode to.
        decoded = tokenizer.decode(answer[:at]) + tokenizer.decode(answer[at:])
        assert forced(tokenizer, before, after) == (tokenizer.decode(before).strip(), shown_answer(decoded))


@pytest.mark.parametrize("torn", ["<", "</", "</think", "<<"])
def test_a_tag_split_by_a_forced_close_is_text(tiny_tokenizer: Open, torn: str):
    tokenizer = tiny_tokenizer("v11")
    transcript = Transcript(tokenizer)
    play(transcript, as_bytes(f"{OPEN}a {torn}"))
    assert transcript.torn
    assert forced(tokenizer, as_bytes(f"{OPEN}a {torn}"), as_bytes("b")) == (f"a {torn}", "b")


def test_character_split_by_a_forced_close_is_one_replacement(tiny_tokenizer: Open):
    for version, opening in (("v11", as_bytes(OPEN)), ("v13", [34])):
        transcript = Transcript(tiny_tokenizer(version))
        before = [*opening, *as_bytes("a한")[:-1]]
        play(transcript, before)
        assert transcript.torn
        assert forced(tiny_tokenizer(version), before, as_bytes("b")) == ("a\ufffd", "b")


@pytest.mark.parametrize(
    ("text", "pause"),
    [
        *(("a\n", True), ("a.", True), ("a. ", True), ('"So!"', True), ("(a.)", True), ("終。", True)),
        *(
            ("はい。」", True),
            ("है।", True),
            ("a…", True),
            ("a?**", True),
            ("a.\n\n", True),
            ("a.\r\n", True),
        ),
        *(("3.", False), ("3.14", False), ("a", False), ("a,", False), ("5!", False), ("a:", False)),
        *(("a.b", False), ("a.  ", False), ("3.\n", True), ("", False)),
    ],
)
def test_pauses(tiny_tokenizer: Open, text: str, pause: bool):
    transcript = Transcript(tiny_tokenizer("v11"))
    play(transcript, as_bytes(text))
    assert transcript.at_pause == pause


# ------------------------------------------------------------------ budgets


class InlineWorker:
    """A worker without a thread: a step runs when it is submitted."""

    def submit(self, job: Callable[[], Any]) -> Pending[Any]:
        future: Pending[Any] = Pending()
        future.set_result(job())
        future.finish()
        return future


class ScriptedSteps:
    """Thinks the given ids until it is closed or has no more, then answers: the steps of a `Source`."""

    def __init__(
        self, thought: Sequence[int], answer: Sequence[int], own: Sequence[int] | None = None
    ) -> None:
        """own: its answer if it closes its reasoning itself."""
        self.thought, self.answer = thought, answer
        self.own = answer if own is None else own
        self.sent: list[list[int]] = []

    def steps(self) -> Generator[int | None, Guide | None, None]:
        yield None
        for token in self.thought:
            if sent := (yield token):
                self.sent.append(list(sent.forced))
                break
        for token in (*(self.answer if self.sent else self.own), EOS):
            if sent := (yield token):
                self.sent.append(list(sent.forced))


def open_stream(
    tokenizer: Tokenizer, model: ScriptedSteps, *, budget: int | None, max_tokens: int = 10_000
) -> Stream:
    source = OnDemand(InlineWorker(), model.steps(), reused=lambda: 0)  # type: ignore[arg-type]
    builder = ReplyBuilder(
        Transcript(tokenizer),
        tokenizer,
        prompt_ids=(1, 2, 3),
        seed=0,
        max_tokens=max_tokens,
        think_budget=budget,
    )
    return Stream(source, builder)


def texts(events: Sequence[Event], kind: type[ThinkToken] | type[AnswerToken]) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


def check_events(events: Sequence[Event], reply: Reply) -> None:
    """Check what holds for every stream that ran to its end."""
    assert tuple(i for event in events for i in event.token_ids) == reply.token_ids
    assert texts(events, ThinkToken) == reply.thinking
    assert texts(events, AnswerToken) == reply.answer
    assert CLOSE not in reply.thinking + reply.answer
    assert OPEN not in reply.thinking + reply.answer
    marked = [event for event in events if isinstance(event, ThinkToken) and event.forced]
    assert sum(len(event.token_ids) for event in marked) == reply.stats.forced_tokens
    assert len(marked) <= 1
    assert all(event.text == "" for event in marked)
    assert isinstance(events[-1], Finished)
    assert events[-1].stats == reply.stats
    assert reply.stats.thinking_tokens + reply.stats.answer_tokens == len(reply.token_ids)


def sentences(draw: random.Random, words: Sequence[str], pauses: Sequence[str], length: int) -> str:
    return "".join(draw.choice(words) + draw.choice(pauses) for _ in range(length))


KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "sentences": (("Carry one", "so it is", "8 + 7 = 15", "wait"), (" ", ", ", ". ", ".\n", "? ")),
    "lines": (("- add", "= 85", "x"), (" ", "  ", "\n", "\n\n")),
    "no pause": (("and", "then", "carry", "on,"), (" ",)),
    "Korean": (("받아올림을", "하면", "답은", "85입니다"), (" ", " ", ".\n", ". ")),
    "Japanese": (("繰り上がりに", "注意すると", "答えは", "「85」です"), ("", "、", "。")),
    "digits": (("3.14", "2.72", "1.", "12.5", "x = 7."), (" ", " + ", "\n")),
    "code": (("a < b", "c</d>", "</th", "<<", "'</thin'"), (" ", "<", ";")),
    "emoji": (("👩‍🚀", "한", "é", "👩🏽‍💻"), ("", " ", "!")),
}
ANSWER_TEXTS = (
    "The answer is **85**.",
    "\n</think>\n\nThe answer is **85**.",
    " 답은</think> 85",
    "</think>85",
)


def thoughts_and_answers(
    tokenizer: Tokenizer, count: int, seed: int
) -> Iterator[tuple[list[int], str, list[int]]]:
    """(ids of the thought, its text, ids of the answer), tokenized or one per byte; short and long."""
    draw = random.Random(seed)
    control = tokenizer.think_ids is not None
    for number in range(count):
        words, pauses = list(KINDS.values())[number % len(KINDS)]
        text = sentences(draw, words, pauses, draw.choice([1, 10, 60]))
        spell = as_bytes if draw.random() < 0.3 else tokenizer.encode
        answer = draw.choice(ANSWER_TEXTS)
        if control:
            yield [34, *spell(f"\n{text}"), 35], text, spell(answer.replace(CLOSE, ""))
        else:
            yield spell(f"{OPEN}\n{text}\n{CLOSE}"), text, spell(answer)


PAUSE = re.compile(r"(?:\n|[^\d][.!?…]|[。！？؟।])[\"'”’»)\]*`」』）]*\s?\Z")


def close_position(tokenizer: Tokenizer, ids: Sequence[int], budget: int) -> int | None:
    """After how many of `ids` the reasoning is to be closed; None if it closes by itself before.

    Computed from the whole text each time, not incrementally.
    """
    for waited, size in enumerate(range(max(budget, 1), len(ids) + 1), start=1):
        raw = b"".join(tokenizer.pieces[i] or b"" for i in ids[:size])
        text = raw.decode(errors="replace")
        half = len(codecs.getincrementaldecoder("utf-8")("replace").decode(raw)) < len(text)
        if tokenizer.think_ids:
            begun, ended = True, 35 in ids[:size]
        else:
            begun, ended = text.startswith(OPEN), CLOSE in text
            half |= any(text.endswith(CLOSE[:n]) for n in range(1, len(CLOSE)))
        nothing = not text.removeprefix(OPEN).strip()
        good = nothing or PAUSE.search(text) is not None or waited > GRACE
        if ended:
            return None
        if begun and (waited > GRACE + TEAR or (good and not half)):
            return size
    return None


@pytest.mark.parametrize("version", ["v11", "v13"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_budgets_hold(tiny_tokenizer: Open, version: str, budget: int):
    """At most budget + GRACE ids of thinking, TEAR more where that would split a tag, and the forced ids."""
    tokenizer = tiny_tokenizer(version)
    closed, early = 0, 0
    for thought, text, answer in thoughts_and_answers(tokenizer, 200, seed=budget):
        model = ScriptedSteps(thought, answer, tokenizer.encode("85"))
        stream = open_stream(tokenizer, model, budget=budget)
        events = list(stream)
        reply, stats = stream.reply, stream.reply.stats
        check_events(events, reply)
        sampled = stats.thinking_tokens - stats.forced_tokens
        size = close_position(tokenizer, thought, budget)
        if size is None:
            assert (model.sent, reply.thinking, reply.answer) == ([], text.strip(), "85")
            assert stats.forced_tokens == 0
            continue
        assert sampled == size <= max(budget, 1) + GRACE + TEAR
        assert model.sent == [list(reply.token_ids[sampled : stats.thinking_tokens])]
        assert list(reply.token_ids) == [*thought[:sampled], *model.sent[0], *answer, EOS]
        assert tokenizer.decode(model.sent[0]).strip() == ("" if tokenizer.think_ids else CLOSE)
        assert reply.thinking == tokenizer.decode(thought[:sampled]).strip().removeprefix(OPEN).strip()
        assert reply.answer == shown_answer(tokenizer.decode(answer).replace(CLOSE, "", 1))
        closed += 1
        early += sampled < max(budget, 1) + GRACE
    assert closed > 50
    assert closed > early > 20 or budget < 5


def test_the_bound_is_reached_and_never_passed(tiny_tokenizer: Open):
    """`<<<…` may always be half a tag, bytes E2 always half a character: they are split at the limit."""
    for version, opening in (("v11", as_bytes(OPEN)), ("v13", [34])):
        tokenizer = tiny_tokenizer(version)
        for torn in (as_bytes("<"), [CONTROLS + 0xE2]):
            stream = open_stream(
                tokenizer, ScriptedSteps([*opening, *as_bytes("a"), *torn * 500], as_bytes("b")), budget=50
            )
            check_events(list(stream), stream.reply)
            sampled = stream.reply.stats.thinking_tokens - stream.reply.stats.forced_tokens
            half = version == "v11" or torn != as_bytes("<")
            assert sampled == 50 + GRACE + (TEAR if half else 0)
            assert stream.reply.answer == "b"


def test_own_close_that_begins_within_the_grace_is_awaited(tiny_tokenizer: Open):
    tokenizer = tiny_tokenizer("v11")
    for late in range(-len(CLOSE) - 2, 2):
        size = 50 + GRACE + late
        thought = as_bytes(OPEN + "a" * (size - len(OPEN)) + CLOSE)
        stream = open_stream(tokenizer, ScriptedSteps(thought, as_bytes("b")), budget=50)
        check_events(list(stream), stream.reply)
        own = late < 0
        assert (stream.reply.stats.forced_tokens == 0) == own
        assert stream.reply.thinking == "a" * (min(size, 50 + GRACE) - len(OPEN))


@pytest.mark.parametrize("budget", [0, 10, 40])
def test_max_tokens_hold_when_the_close_does_not_fit(tiny_tokenizer: Open, budget: int):
    tokenizer = tiny_tokenizer("v11")
    thought, answer = as_bytes(f"{OPEN}\nSo. " + "a. " * 60), as_bytes("b" * 9)
    whole = open_stream(tokenizer, ScriptedSteps(thought, answer), budget=budget)
    list(whole)
    ids, stats = whole.reply.token_ids, whole.reply.stats
    sampled = stats.thinking_tokens - stats.forced_tokens
    assert stats.forced_tokens > 3
    for limit in range(1, len(ids) + 2):
        stream = open_stream(tokenizer, ScriptedSteps(thought, answer), budget=budget, max_tokens=limit)
        events = list(stream)
        check_events(events, stream.reply)
        assert len(stream.reply.token_ids) == min(limit, len(ids))
        if limit < len(ids):
            assert stream.reply.finish_reason == "length"
        fits = limit >= sampled + stats.forced_tokens
        assert bool(stream.reply.stats.forced_tokens) == fits
        if fits:
            assert stream.reply.token_ids == ids[:limit]
        assert stream.reply.stats.thinking_tokens <= max(budget, 1) + GRACE + TEAR + stats.forced_tokens


def test_reply_without_thinking_is_never_closed(tiny_tokenizer: Open):
    for text in ("85.\nThat is all.\n" * 20, "\n\n  85", ".", "<thin"):
        for version in ("v11", "v13"):
            model = ScriptedSteps(as_bytes(text), [])
            stream = open_stream(tiny_tokenizer(version), model, budget=0)
            check_events(list(stream), stream.reply)
            assert (model.sent, stream.reply.stats.forced_tokens) == ([], 0)
            assert stream.reply.answer == shown_answer(text)


def test_own_close_and_forced_close_never_both(tiny_tokenizer: Open):
    """For every budget up to its length."""
    tokenizer = tiny_tokenizer("v11")
    thought = as_bytes(f"{OPEN}\nSo it is.\n{CLOSE}")
    own = 0
    for budget in range(len(thought) + 2):
        model = ScriptedSteps(thought, as_bytes("\nb\nc"))
        stream = open_stream(tokenizer, model, budget=budget)
        check_events(list(stream), stream.reply)
        assert stream.reply.answer == "b\nc"
        assert len(model.sent) <= 1
        own += not model.sent
    assert 0 < own < len(thought)


@pytest.mark.parametrize("budget", [-1, -100])
def test_negative_budget_is_refused_at_once(tiny_tokenizer: Open, budget: int):
    with pytest.raises(SamplingError, match=f"0 or more.*{budget}"):
        Closing(budget)
    with scripted(tiny_tokenizer("v11"), "a") as model:
        talk = model.conversation()
        talk.ask("one")
        with pytest.raises(SamplingError, match="think_budget"):
            talk.stream("two", think_budget=budget)
        assert talk.ask("two").stats.cached_tokens > 0


# ------------------------------------------------------------------ on a model, and from other threads


class ClosableScript(Script):
    """A `Script` that answers once its reasoning is closed, by itself or by force."""

    def __init__(
        self, thought: Sequence[int], answer: Sequence[int], tokenizer: Tokenizer, seconds: float
    ) -> None:
        super().__init__([*thought, *answer], tokenizer, seconds)
        self.thought = len(thought)
        self.closes = [tokenizer.encode(f"{before}{CLOSE}\n") for before in ("\n", "")]

    def __call__(self, ids: mx.array, caches: Sequence[KVCache], *, last: bool = False) -> mx.array:
        hidden = super().__call__(ids, caches, last=last)
        fed = caches[0].fed  # type: ignore[attr-defined]
        generated = fed[max(at for at, token in enumerate(fed) if token in ENDS_OF_PROMPT) + 1 :]
        for close in self.closes:
            for at in range(len(generated) - len(close) + 1):
                if generated[at : at + len(close)] == close:
                    return mx.full((1, 1, 1), self.thought + len(generated) - at - len(close))
        return hidden


@pytest.fixture
def make_model(tiny_tokenizer: Open) -> Iterator[Callable[..., Magistral]]:
    models: list[Magistral] = []

    def make(thought: str, answer: str = "b", *, seconds: float = 0.0, version: str = "v11") -> Magistral:
        tokenizer = tiny_tokenizer(version)
        model = scripted(tokenizer, [])
        model._model = ClosableScript(tokenizer.encode(thought), tokenizer.encode(answer), tokenizer, seconds)  # type: ignore[assignment]
        models.append(model)
        return model

    yield make
    for model in models:
        model.close()


LONG_THOUGHT = f"{OPEN}\n" + "So it goes on. And on, and on\n" * 60


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("options", [{}, {"think": False}, {"max_tokens": 30}])
def test_a_budget_through_the_engine(make_model: Callable[..., Magistral], budget: int, options: Any):
    model = make_model(LONG_THOUGHT)
    stream = model.stream("?", think_budget=budget, **options)
    check_events(list(stream), stream.reply)
    reply = stream.reply
    if reply.stats.forced_tokens:
        assert reply.answer == "b"
    assert len(reply.token_ids) <= options.get("max_tokens", 1000)
    assert bool(reply.stats.forced_tokens) == (budget < 20 or "max_tokens" not in options)


def test_control_tokens_through_the_engine(tiny_tokenizer: Open):
    """The forced `[/THINK]` is fed in the place of an id: the script continues after it."""
    tokenizer = tiny_tokenizer("v13")
    thought = [34, *tokenizer.encode("One. Two. Three. ")]
    with scripted(
        tokenizer, [*thought, *tokenizer.encode("Four.\nAn answer"), 35, *tokenizer.encode("!")]
    ) as model:
        stream = model.stream("?", think_budget=len(thought))
        check_events(list(stream), stream.reply)
    assert (stream.reply.thinking, stream.reply.answer) == ("One. Two. Three.", "our.\nAn answer!")
    assert stream.reply.stats.forced_tokens == 1


def test_stop_thinking_before_the_first_id(make_model: Callable[..., Magistral]):
    stream = make_model(LONG_THOUGHT).stream("?")
    stream.stop_thinking()
    stream.stop_thinking()
    check_events(list(stream), stream.reply)
    assert (stream.reply.thinking, stream.reply.answer, stream.reply.finish_reason) == ("", "b", "stop")


def test_stop_thinking_from_another_thread_in_mid_thought(make_model: Callable[..., Magistral]):
    stream = make_model(LONG_THOUGHT, seconds=0.004).stream("?")
    timer = threading.Timer(0.15, stream.stop_thinking)
    timer.start()
    check_events(list(stream), stream.reply)
    timer.join()
    assert stream.reply.answer == "b"
    assert stream.reply.thinking
    assert stream.reply.thinking.endswith((".", "on"))  # a sentence, or a line
    assert stream.reply.stats.thinking_tokens < 500


def test_stop_thinking_while_the_prompt_is_read(make_model: Callable[..., Magistral]):
    model = make_model(LONG_THOUGHT, seconds=0.1)
    stream = model.stream("?", max_tokens=20)
    reader = threading.Thread(target=list, args=(stream,))
    reader.start()
    stream.stop_thinking()
    reader.join()
    assert (stream.reply.thinking, stream.reply.answer) == ("", "b")


def test_stop_thinking_twice_closes_once(make_model: Callable[..., Magistral]):
    stream = make_model(LONG_THOUGHT).stream("?")
    events = list(islice(stream, 20))
    stream.stop_thinking()
    events.append(next(stream))
    stream.stop_thinking()
    events += stream
    check_events(events, stream.reply)
    assert stream.reply.answer == "b"


@pytest.mark.parametrize("thought", [f"{OPEN}\nSo.\n{CLOSE}\n", ""])
def test_stop_thinking_in_the_answer_does_nothing(make_model: Callable[..., Magistral], thought: str):
    model = make_model(thought, "One. Two.\nThree. Four.")
    alone = model.ask("?")
    stream = model.stream("?")
    events = [next(event for event in stream if isinstance(event, AnswerToken))]
    stream.stop_thinking()
    list(stream)
    assert stream.reply.token_ids == alone.token_ids
    assert stream.reply.stats.forced_tokens == 0
    stream.stop_thinking()  # nor after the end
    assert events


def test_a_budget_and_stop_thinking_close_once(make_model: Callable[..., Magistral]):
    for at, budget in pairwise(range(12)):
        stream = make_model(LONG_THOUGHT).stream("?", think_budget=budget)
        events = list(islice(stream, at))
        stream.stop_thinking()
        events += stream
        check_events(events, stream.reply)
        assert stream.reply.answer == "b"


def test_next_turn_continues_from_a_forced_close(make_model: Callable[..., Magistral]):
    """Kept reasoning has the forced ids where they were fed, so the next prompt begins with the same ids."""
    model = make_model(LONG_THOUGHT)
    talk = model.conversation(keep_thinking=True)
    first = talk.ask("one", think_budget=9)
    second = talk.ask("two", think_budget=9)
    assert (
        second.prompt_ids[: len(first.prompt_ids) + len(first.token_ids)]
        == first.prompt_ids + first.token_ids
    )
    assert second.stats.cached_tokens >= len(first.prompt_ids) + len(first.token_ids) - 1
    assert second.answer == "b"
