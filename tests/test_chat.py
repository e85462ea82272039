"""A loaded model through its public interface: streams, replies, conversations, threads, asyncio, exit."""

import asyncio
import gc
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from magistral_mlx import (
    AnswerToken,
    CheckpointError,
    ClosedError,
    ContextError,
    Event,
    Finished,
    Magistral,
    MagistralWarning,
    PromptError,
    Reply,
    Sampling,
    SamplingError,
    Stream,
    ThinkToken,
)
from magistral_mlx.convert.conversion import Job, convert
from magistral_mlx.disk.checkpoint import open_checkpoint
from magistral_mlx.fetch.hub import DEMO
from magistral_mlx.text.sidecars import files
from magistral_mlx.text.thinking import parse
from magistral_mlx.text.tokenizer import Tokenizer
from tests.scripted import scripted

QUESTION = "What is 48 + 37?"
REPLY = "<think>\nTwo words.\n</think>\nAn answer, 한국어."


@pytest.fixture(scope="module")
def demo() -> Iterator[Magistral]:
    with Magistral.load("demo") as model:
        yield model


@pytest.fixture
def make_model(tiny_tokenizer: Callable[[str], Tokenizer]) -> Iterator[Callable[..., Magistral]]:
    """Makes models with a scripted reply; closed when the test ends."""
    models: list[Magistral] = []

    def make(reply: Any = REPLY, **options: Any) -> Magistral:
        models.append(scripted(tiny_tokenizer("v11"), reply, **options))
        return models[-1]

    yield make
    for model in models:
        model.close()


def texts(events: list[Event], kind: type[ThinkToken] | type[AnswerToken]) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


# ------------------------------------------------------------------ one reply


def test_stream_ends_with_finished_and_its_text_is_the_replys(make_model: Callable[..., Magistral]):
    with make_model().stream(QUESTION) as stream:
        events = list(stream)
    reply, finished = stream.reply, events[-1]
    assert isinstance(finished, Finished)
    assert [isinstance(event, Finished) for event in events].count(True) == 1
    assert (texts(events, ThinkToken), texts(events, AnswerToken)) == ("Two words.", "An answer, 한국어.")
    assert (reply.thinking, reply.answer) == ("Two words.", "An answer, 한국어.")
    assert (reply.finish_reason, finished.reason) == ("stop", "stop")
    assert reply.stats == finished.stats


def test_events_carry_every_token_id_once(make_model: Callable[..., Magistral]):
    stream = make_model().stream(QUESTION)
    joined = tuple(token for event in stream for token in event.token_ids)
    assert joined == stream.reply.token_ids
    assert joined[-1] == 2, "the end-of-text id is counted"


def test_stats_count_prompt_thinking_and_answer_tokens(make_model: Callable[..., Magistral]):
    stats = (reply := make_model().ask(QUESTION)).stats
    assert stats.prompt_tokens == len(reply.prompt_ids)
    assert stats.thinking_tokens + stats.answer_tokens == len(reply.token_ids)
    assert min(stats.thinking_tokens, stats.answer_tokens, stats.prefill_seconds, stats.decode_seconds) > 0


def test_partial_reply_is_readable_while_streaming(make_model: Callable[..., Magistral]):
    stream = make_model().stream(QUESTION)
    text = ""
    for event in stream:
        text += event.text if isinstance(event, ThinkToken | AnswerToken) else ""
        assert stream.reply.thinking + stream.reply.answer == text


def test_peak_memory_covers_only_the_replys_own_steps(demo: Magistral):
    weights = demo._guard.weights
    long = "Add up 12, 34, 56. " * 15
    short_, long_ = demo.ask(QUESTION, max_tokens=5), demo.ask(long, max_tokens=5)
    peaks = [reply.stats.peak_memory for reply in (short_, long_)]
    assert weights < peaks[0] < peaks[1]
    with demo.stream(QUESTION, max_tokens=5) as outer:
        next(outer)
        inner = demo.ask(long, max_tokens=5)  # its passes are not the outer reply's
        finished = list(outer)[-1]
    assert isinstance(finished, Finished)
    assert outer.reply.stats.peak_memory == finished.stats.peak_memory < inner.stats.peak_memory
    together = demo.ask_many([QUESTION, long], max_tokens=5)
    assert all(reply.stats.peak_memory > peaks[0] for reply in together)


def test_warns_once_past_the_advised_context(
    make_model: Callable[..., Magistral], monkeypatch: pytest.MonkeyPatch
):
    model = make_model("word " * 40)
    monkeypatch.setattr("magistral_mlx.talk.guard.USUAL_CONTEXT", len(model.encode(QUESTION)) + 20)
    with pytest.warns(MagistralWarning, match="tokens of context the model's quality drops") as warnings:
        first = model.ask(QUESTION)
    model.ask(QUESTION)  # warned before: another warning would be an error here
    assert (len(warnings), first.finish_reason, first.answer) == (1, "stop", "word " * 40)


def test_demo_thinks_and_answers(demo: Magistral):
    reply = demo.ask(QUESTION, seed=1)
    assert parse(demo.tokenizer.decode(reply.token_ids)) == (reply.thinking, reply.answer)
    assert reply.thinking
    assert "**" in reply.answer


def test_cache_is_not_quantized_before_quantize_after():
    """Up to `quantize_after` a reply is the same as without `kv_bits`."""
    with Magistral.load("demo") as plain, Magistral.load("demo", kv_bits=8, quantize_after=10**4) as late:
        options = {"seed": 5, "max_tokens": 40}
        assert late.ask(QUESTION, **options).token_ids == plain.ask(QUESTION, **options).token_ids
        assert late.fingerprint() == plain.fingerprint()
        assert [cache.after for cache in late.new_prefix(8).caches] == [10**4] * late.config.n_layers


@pytest.mark.parametrize(("kv_bits", "after"), [(None, 1), (8, -1), (8, 1.5)])
def test_invalid_quantize_after_is_refused(kv_bits, after):
    with pytest.raises(SamplingError, match="quantize_after"):
        Magistral.load("demo", kv_bits=kv_bits, quantize_after=after)


def test_same_seed_gives_the_same_reply(demo: Magistral):
    first, again, other = (
        demo.ask(QUESTION, seed=seed, sampling=Sampling(temperature=2)) for seed in (5, 5, 6)
    )
    assert first.token_ids == again.token_ids != other.token_ids
    unseeded = demo.ask(QUESTION, max_tokens=8)
    assert demo.ask(QUESTION, max_tokens=8, seed=unseeded.seed).token_ids == unseeded.token_ids


def test_loop_guard_ends_loops_only_if_enabled(make_model: Callable[..., Magistral]):
    loop = "round and round it goes, where it stops. " * 16
    in_thinking = make_model("<think>\n" + loop).ask(QUESTION, loop_guard=True)
    assert (in_thinking.stats.forced_tokens > 0, in_thinking.finish_reason) == (True, "loop")
    assert len(in_thinking.token_ids) < len(make_model(loop).ask(QUESTION).token_ids)
    in_answer = make_model(loop).ask(QUESTION, loop_guard=True)
    assert (in_answer.finish_reason, in_answer.stats.forced_tokens) == ("loop", 0)
    assert make_model(loop).ask(QUESTION).finish_reason == "stop"


def test_string_prompt_equals_one_user_message(demo: Magistral):
    assert demo.encode(QUESTION) == demo.encode([{"role": "user", "content": QUESTION}])
    assert demo.ask(QUESTION, max_tokens=1).prompt_ids == tuple(demo.encode(QUESTION))


def test_stop_string_applies_to_the_answer_only(make_model: Callable[..., Magistral]):
    model = make_model("<think>\nSTOP here? no.\n</think>\nOne STOP two")
    reply = model.ask(QUESTION, stop=["never", "STOP"])
    assert (reply.stop_string, model.ask(QUESTION).stop_string) == ("STOP", None)
    assert model.ask(QUESTION, stop="STOP").answer == reply.answer
    assert (reply.thinking, reply.answer, reply.finish_reason) == ("STOP here? no.", "One ", "stop")


@pytest.mark.parametrize("limit", [1, 5, 9])
def test_max_tokens_ends_a_reply_with_reason_length(make_model: Callable[..., Magistral], limit: int):
    events = list(make_model().stream(QUESTION, max_tokens=limit))
    assert events[-1].reason == "length"  # type: ignore[union-attr]
    assert sum(len(event.token_ids) for event in events) == limit


def test_full_context_ends_a_reply_with_reason_length(make_model: Callable[..., Magistral]):
    model = make_model("word " * 500)
    room = len(model.encode(QUESTION)) + 20
    short = make_model("word " * 500, max_context=room)
    reply = short.ask(QUESTION)
    assert (len(reply.token_ids), reply.finish_reason) == (20, "length")
    with pytest.raises(ContextError, match=f"context {room - 20}"):
        make_model(max_context=room - 20).stream(QUESTION)


@pytest.mark.parametrize(
    ("messages", "options", "error"),
    [
        ([], {}, PromptError),
        ("", {}, PromptError),
        ([{"role": "assistant", "content": "hm"}], {}, PromptError),
        (QUESTION, {"max_tokens": 0}, SamplingError),
        (QUESTION, {"stop": [""]}, SamplingError),
        (QUESTION, {"stop": 3}, SamplingError),
        (QUESTION, {"stop": [3]}, SamplingError),
        (QUESTION, {"sampling": 0.7}, SamplingError),
        (QUESTION, {"temperature": 0.7}, SamplingError),
        (QUESTION, {"think": "no"}, SamplingError),
        (QUESTION, {"speculate": "x"}, SamplingError),
    ],
)
def test_invalid_arguments_raise_before_generation(
    make_model: Callable[..., Magistral], messages: Any, options: Any, error: type[Exception]
):
    with pytest.raises(error):
        make_model().stream(messages, **options)
    with pytest.raises(error):
        make_model().ask_many([messages], **options)


@pytest.mark.parametrize("prompt", [[], [-1], [2024], ["1"]])
def test_invalid_prompt_ids_are_refused(demo: Magistral, prompt: list[int]):
    """MLX would read other memory, or crash."""
    with pytest.raises(PromptError, match="ids from 0 to 2023, and one at least"):
        demo.stream_ids(prompt)


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"kv_bits": 4}])
def test_invalid_load_options_are_refused(options: Any):
    with pytest.raises(SamplingError, match="or is left out; found"):
        Magistral.load("demo", **options)


def test_loading_a_missing_directory_raises():
    with pytest.raises(CheckpointError, match="no directory"):
        Magistral.load("./no-such-directory")


def test_changed_file_size_warns_on_load(tmp_path: Path):
    sidecar_files = files(DEMO, name="demo", recipe="4bit", context=4096)
    convert(Job(checkpoint=open_checkpoint(DEMO), out=tmp_path / "out", sidecars=sidecar_files))
    with (tmp_path / "out" / "mistral" / "SYSTEM_PROMPT.txt").open("a") as file:
        file.write("Be brief.")
    with pytest.warns(MagistralWarning, match="SYSTEM_PROMPT.txt has 241 bytes, was written with 232"):
        Magistral.load(tmp_path / "out").close()


# ------------------------------------------------------------------ close, errors, exit


def test_close_stops_generation_and_keeps_the_text_so_far(make_model: Callable[..., Magistral]):
    model = make_model("<think>\n" + "word " * 300)
    with model.stream(QUESTION) as stream:
        text = texts(list(islice(stream, 7)), ThinkToken)
        stream.close()
        assert list(stream) == []
    assert (stream.reply.finish_reason, stream.reply.thinking) == ("cancelled", text)
    assert model._model.steps < 40  # type: ignore[union-attr]


def test_exception_inside_with_closes_the_stream(demo: Magistral):
    def raise_inside(stream: Stream) -> None:
        with stream:
            next(stream)
            raise ZeroDivisionError

    stream = demo.stream(QUESTION)
    with pytest.raises(ZeroDivisionError):
        raise_inside(stream)
    assert stream.reply.finish_reason == "cancelled"
    assert demo.ask(QUESTION, max_tokens=3).token_ids


def test_a_finished_stream_stays_finished(make_model: Callable[..., Magistral]):
    stream = make_model().stream(QUESTION)
    list(stream)
    stream.close()
    assert stream.reply.finish_reason == "stop"
    assert list(stream) == []


def test_closed_and_abandoned_streams_free_their_caches(demo: Magistral):
    prompt = "Add 12 and 13. " * 8

    def active_memory() -> int:
        gc.collect()
        return demo._worker.run(mx.get_active_memory)

    demo.ask(QUESTION, max_tokens=2)
    before = active_memory()
    for at in range(0, 36, 3):
        stream = demo.stream(prompt)
        list(islice(stream, at))
        if at % 2:
            stream.close()
        del stream
    assert active_memory() - before < 100_000


def test_an_interrupted_wait_loses_no_token(make_model: Callable[..., Magistral]):
    """Ctrl-C while waiting, caught: the next `next` waits for the same step."""
    expected = make_model().ask(QUESTION)
    stream, events, interrupts = make_model(step_seconds=0.02).stream(QUESTION), [], 0
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        while True:
            signal.setitimer(signal.ITIMER_REAL, 0.03)
            try:
                events.append(next(stream))
            except KeyboardInterrupt:
                interrupts += 1
            except StopIteration:
                break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert interrupts > 3
    assert stream.reply.token_ids == expected.token_ids
    assert texts(events, AnswerToken) == expected.answer


def test_model_remains_usable_after_an_error_in_a_stream(
    make_model: Callable[..., Magistral], monkeypatch: pytest.MonkeyPatch
):
    model = make_model()
    stream = model.stream(QUESTION)
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(type(model._model), "logits", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(stream)
    assert stream.reply.finish_reason == "cancelled"
    assert model.ask(QUESTION).answer == "An answer, 한국어."


def test_closed_model_raises(tiny_tokenizer: Callable[[str], Tokenizer]):
    model = scripted(tiny_tokenizer("v11"), REPLY)
    stream = model.stream(QUESTION)
    next(stream)
    model.close()
    model.close()
    with pytest.raises(ClosedError, match="load it again"):
        list(stream)
    with pytest.raises(ClosedError, match="load it again"):
        model.ask(QUESTION)


EXIT = """
import sys
from magistral_mlx import Magistral
model = Magistral.load("demo")
streams = [model.stream("What is 48 + 37?", seed=seed) for seed in range(3)]
for stream in streams:
    next(stream)
print("mid-stream", flush=True)
{ending}
"""
ENDINGS = ["", "sys.exit(0)", "del model", "model.close()", "raise KeyboardInterrupt"]


def exits_cleanly(ending: str) -> bool:
    done = subprocess.run(
        [sys.executable, "-c", EXIT.format(ending=ending)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    expected = -signal.SIGINT if "Interrupt" in ending else 0
    return (done.stdout, done.returncode) == ("mid-stream\n", expected) and "terminate" not in done.stderr


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_interpreter_exits_cleanly_in_mid_stream(ending: str):
    assert exits_cleanly(ending)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_interpreter_exits_cleanly_fifty_times():
    assert [exits_cleanly(ending) for ending in ENDINGS * 10] == [True] * 50


# ------------------------------------------------------------------ concurrency


def replies(model: Magistral, seeds: range) -> list[Reply]:
    return [model.ask(QUESTION, seed=seed, max_tokens=20) for seed in seeds]


def test_interleaved_streams_equal_single_replies(demo: Magistral):
    alone = replies(demo, range(3))
    streams = [demo.stream(QUESTION, seed=seed, max_tokens=20) for seed in range(3)]
    open_streams = list(streams)
    while open_streams:
        open_streams = [stream for stream in open_streams if next(stream, None) is not None]
    assert [stream.reply.token_ids for stream in streams] == [reply.token_ids for reply in alone]


def test_replies_in_ten_threads_equal_single_replies(demo: Magistral):
    alone = replies(demo, range(10))
    with ThreadPoolExecutor(10) as pool:
        together = list(pool.map(lambda seed: demo.ask(QUESTION, seed=seed, max_tokens=20), range(10)))
    assert [reply.token_ids for reply in together] == [reply.token_ids for reply in alone]


def test_close_from_another_thread(make_model: Callable[..., Magistral]):
    stream = make_model("word " * 2000, step_seconds=0.005).stream(QUESTION)
    threading.Timer(0.2, stream.close).start()
    list(stream)
    assert stream.reply.finish_reason == "cancelled"
    assert 0 < len(stream.reply.token_ids) < 500


def test_concurrent_asyncio_replies_equal_single_replies(demo: Magistral):
    alone = replies(demo, range(4))

    async def main() -> list[Reply]:
        asks = [demo.aask(QUESTION, seed=seed, max_tokens=20) for seed in range(3)]
        stream = demo.astream(QUESTION, seed=3, max_tokens=20)

        async def streamed() -> Reply:
            events = [event async for event in stream]
            assert isinstance(events[-1], Finished)
            return stream.reply

        return [*await asyncio.gather(*asks, streamed())]

    assert [reply.token_ids for reply in asyncio.run(main())] == [reply.token_ids for reply in alone]


def test_the_event_loop_is_never_blocked(make_model: Callable[..., Magistral]):
    model = make_model("word " * 20, step_seconds=0.02)

    async def main() -> int:
        ticks = 0
        task = asyncio.create_task(model.aask(QUESTION))
        while not task.done():
            await asyncio.sleep(0.001)
            ticks += 1
        return ticks

    assert asyncio.run(main()) > 50


def test_cancelling_the_task_closes_the_stream(make_model: Callable[..., Magistral]):
    model = make_model("word " * 2000, step_seconds=0.005)

    async def main() -> Reply:
        async with model.astream(QUESTION) as stream:

            async def read() -> None:
                async for _ in stream:
                    pass

            with pytest.raises(TimeoutError):
                await asyncio.wait_for(read(), 0.2)
        return stream.reply

    reply = asyncio.run(main())
    assert (reply.finish_reason, 0 < len(reply.token_ids) < 500) == ("cancelled", True)
    assert model.ask(QUESTION, max_tokens=2).token_ids


def test_an_awaited_error_is_raised_and_not_also_logged_by_asyncio(
    make_model: Callable[..., Magistral], monkeypatch: pytest.MonkeyPatch
):
    model, logged = make_model(), list[str]()

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context["message"]))
        stream = model.stream(QUESTION)
        await anext(stream)
        with monkeypatch.context() as patch:
            patch.setattr(type(model._model), "logits", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await stream.adrain()

    asyncio.run(main())
    gc.collect()
    assert logged == []


# ------------------------------------------------------------------ conversations


def test_a_conversation_drops_reasoning_from_history(make_model: Callable[..., Magistral]):
    model = make_model()
    talk = model.conversation()
    talk.ask("one")
    second = talk.ask("two")
    history = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "An answer, 한국어."},
        {"role": "user", "content": "two"},
    ]
    assert list(second.prompt_ids) == model.encode(history)
    assert talk.messages[1] == history[1] | {"thinking": "Two words."}


def test_keep_thinking_continues_from_the_sampled_ids(make_model: Callable[..., Magistral]):
    model = make_model()
    talk = model.conversation(keep_thinking=True)
    first, second = talk.ask("one"), talk.ask("two")
    assert second.prompt_ids == (*first.prompt_ids, *first.token_ids, *model.tokenizer.encode_turn("two"))
    cut = talk.ask("three", max_tokens=4)
    after = talk.ask("four")
    assert after.prompt_ids[: len(cut.prompt_ids) + 5] == (
        *cut.prompt_ids,
        *cut.token_ids,
        model.tokenizer.eos_id,
    )


def test_partial_answer_of_a_closed_stream_stays_in_the_history(make_model: Callable[..., Magistral]):
    talk = make_model().conversation()
    with talk.stream("one") as stream:
        for event in stream:
            if isinstance(event, AnswerToken):
                break
    with talk.stream("nothing came of this"):
        pass
    assert [message["content"] for message in talk.messages] == ["one", stream.reply.answer]


def test_reply_without_an_answer_can_be_followed(make_model: Callable[..., Magistral]):
    talk = make_model("<think>\nand on and on").conversation()
    assert talk.ask("one").answer == ""
    assert talk.ask("two").finish_reason == "stop"


def test_undo_and_reset(make_model: Callable[..., Magistral]):
    talk = make_model().conversation()
    talk.ask("one")
    before = talk.messages
    talk.ask("two")
    assert talk.undo() == "two"
    assert talk.messages == before
    talk.reset()
    assert (talk.messages, talk.undo()) == ([], None)


def test_refused_question_leaves_the_history_unchanged(make_model: Callable[..., Magistral]):
    talk = make_model().conversation()
    with pytest.raises(PromptError):
        talk.ask("")
    assert talk.messages == []


def test_an_async_conversation(make_model: Callable[..., Magistral]):
    async def main() -> list[str]:
        talk = make_model().conversation()
        await talk.aask("one")
        async for _ in talk.astream("two"):
            pass
        return [message["content"] for message in talk.messages if message["role"] == "user"]

    assert asyncio.run(main()) == ["one", "two"]


def test_options_of_a_reply_override_the_conversations(make_model: Callable[..., Magistral]):
    model = make_model()
    talk = model.conversation(system="Be brief.", max_tokens=3)
    assert list(talk.ask("one").prompt_ids) == model.encode("one", system="Be brief.")
    assert len(talk.ask("two", max_tokens=4).token_ids) == 4
