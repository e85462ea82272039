"""One reply: `Reply` is the result, `ReplyBuilder` builds it id by id.

Knows text, phases, and when a reply ends. Does not know arrays, threads, or how ids are generated: all it
sees of the model is ids and their cost.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from magistral_mlx.errors import AnswerError
from magistral_mlx.events import Event, Finished, FinishReason, Stats, ToolCall
from magistral_mlx.structured.constraint import Constraint
from magistral_mlx.structured.shape import Shape
from magistral_mlx.text.closing import Closing
from magistral_mlx.text.loops import LoopGuard
from magistral_mlx.text.thinking import Phase
from magistral_mlx.text.tokenizer import Tokenizer
from magistral_mlx.text.transcript import Transcript
from magistral_mlx.wire import Cost, Guide, TokenLogprob


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A complete reply, or as much as there was when it was stopped.

    logprobs: if requested, one for each of `token_ids`; None for ids that were forced, not sampled.
    """

    thinking: str
    answer: str
    prompt_ids: tuple[int, ...] = field(repr=False)
    token_ids: tuple[int, ...] = field(repr=False)
    finish_reason: FinishReason
    seed: int
    stats: Stats
    tool_calls: tuple[ToolCall, ...] = ()
    """The complete ones; each needs a result (`ToolCall.result`) in the next turn."""
    stop_string: str | None = field(default=None, compare=False)
    """Which of `stop` ended the answer; not kept in a saved conversation."""
    logprobs: tuple[TokenLogprob | None, ...] | None = field(default=None, repr=False)
    shape: Shape | None = field(default=None, repr=False, compare=False)
    """The form of the answer, from the option `schema`."""

    @property
    def parsed(self) -> Any:
        """The value of a reply with a `schema`: an instance of its type, parsed JSON, or a `Regex`'s text.

        Raises:
            AnswerError: there was no `schema`, the answer was cut off, or its type rejects it.
        """
        if self.shape is None:
            raise AnswerError("Expected a reply to a question with schema=…, found one without.", self.answer)
        if self.finish_reason != "stop":
            raise AnswerError(
                f"the answer was cut off before it was complete ({_CUT_OFF[self.finish_reason]}); it begins: "
                f"{self.answer[:200]!r}",
                self.answer,
            )
        return self.shape.read(self.answer)

    @property
    def message(self) -> dict[str, Any]:
        """This reply as a message of a conversation's history."""
        message: dict[str, Any] = {"role": "assistant", "content": self.answer}
        if self.thinking:
            message["thinking"] = self.thinking
        if self.tool_calls:
            message["tool_calls"] = [call.message for call in self.tool_calls]
        return message


_CUT_OFF: dict[FinishReason, str] = {
    "length": "max_tokens or the context was used up: allow more, set think_budget, or bound the schema",
    "loop": "it repeated itself without end",
    "cancelled": "it was stopped",
}


class ReplyBuilder:
    """Ids go in (`add`), `events` come out; `finish_reason` is set when the reply has ended by itself."""

    def __init__(
        self,
        transcript: Transcript,
        tokenizer: Tokenizer,
        *,
        prompt_ids: tuple[int, ...],
        seed: int,
        max_tokens: int,
        think_budget: int | None,
        loops: LoopGuard | None = None,
        shape: Shape | None = None,
        constraint: Constraint | None = None,
        logprob: Callable[[], TokenLogprob | None] | None = None,
        watch: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._transcript = transcript
        self._tokenizer = tokenizer
        self._prompt_ids = prompt_ids
        self._seed = seed
        self._max_tokens = max_tokens
        self._closing = Closing(think_budget)
        self._loops = loops
        self._shape = shape
        self._constraint = constraint  # on the ids that may be sampled, from a schema or tools
        self._logprob = logprob  # of the id that was sampled last
        self._watch = watch  # called with the length of the context, as it grows
        self._ids: list[int] = []
        self._stats = Stats(prompt_tokens=len(prompt_ids))
        self.events: deque[Event] = deque()
        self.logprobs: list[TokenLogprob | None] = []  # of each id so far, if requested
        self.finish_reason: FinishReason | None = None

    @property
    def phase(self) -> Phase:
        return self._transcript.phase

    @property
    def reply(self) -> Reply:
        """The reply so far."""
        return Reply(
            thinking=self._transcript.thinking,
            answer=self._transcript.answer,
            prompt_ids=self._prompt_ids,
            token_ids=tuple(self._ids),
            finish_reason=self.finish_reason or "cancelled",
            seed=self._seed,
            stats=self._stats,
            tool_calls=self._transcript.tool_calls,
            stop_string=self._transcript.stop_string,
            logprobs=tuple(self.logprobs) if self._logprob else None,
            shape=self._shape,
        )

    def stop_thinking(self) -> None:
        """Close the reasoning at the next line or sentence. From any thread."""
        self._closing.request()

    def prefilled(self, reused: int, cost: Cost) -> None:
        """Account for a prefilled piece of the prompt, of which `reused` ids were in the KV cache before."""
        self._stats = _with_prefill(self._stats, reused, cost)

    def add(self, token: int, cost: Cost, passes: int | None = None) -> Guide | None:
        """Account for one id. Returns how the reply continues; None: it has ended, or nothing changes.

        passes: forward passes since the reply began; None: one more, for this id.
        """
        forced = list[int]()
        self._ids.append(token)
        if self._logprob:
            self.logprobs.append(self._logprob())
        self.events += self._transcript.feed(token)
        passes = self._stats.forward_passes + 1 if passes is None else passes
        self._stats = _with_id(self._stats, self._transcript.phase, cost, passes)
        if token == self._tokenizer.eos_id or self._transcript.stopped:
            self._finish("stop")
            return None
        self._watch(len(self._prompt_ids) + len(self._ids))
        if self._constraint:
            self._constraint.accept(token)
        if self._loops and self._loops.feed(token):
            if self.phase == "answer":
                self._finish("loop")
                return None
            self._closing.request()
            self._loops.reset()
        if self._closing.due(self._transcript, self._stats.thinking_tokens):
            forced = self._close_thinking()
        if len(self._ids) >= self._max_tokens:
            self._finish("length")
            return None
        return self._guide(forced)

    def _guide(self, forced: list[int]) -> Guide | None:
        allowed = self._constraint.mask() if self._constraint else None
        return Guide(forced=forced, allowed=allowed) if forced or allowed is not None else None

    def _close_thinking(self) -> list[int]:
        """Force the closing tag, unless it would exceed `max_tokens`; returns its ids."""
        ids = self._transcript.closing_ids(self._tokenizer)
        if len(self._ids) + len(ids) > self._max_tokens:
            return []
        # A closing tag that the model still generates is dropped; under a constraint it is the answer's.
        self.events += self._transcript.force_close(ids, late=self._constraint is None)
        if self._constraint:
            self._constraint.close_thinking()
        self._ids += ids
        if self._logprob:
            self.logprobs += [None] * len(ids)
        self._stats = replace(
            self._stats,
            thinking_tokens=self._stats.thinking_tokens + len(ids),
            forced_tokens=len(ids),
        )
        return ids

    def _finish(self, reason: FinishReason) -> None:
        events, leftover = self._transcript.flush()
        self.finish_reason = "tool_calls" if reason == "stop" and self._transcript.tool_calls else reason
        self.events += events
        self.events.append(Finished(reason=self.finish_reason, stats=self._stats, token_ids=leftover))


def _with_prefill(stats: Stats, reused: int, cost: Cost) -> Stats:
    """`stats` after a prefilled piece of the prompt."""
    return replace(
        stats,
        cached_tokens=reused,
        prefill_seconds=stats.prefill_seconds + cost.seconds,
        peak_memory=max(stats.peak_memory, cost.peak),
    )


def _with_id(stats: Stats, phase: Phase, cost: Cost, passes: int) -> Stats:
    """`stats` after one id, which counts for the phase that it leads to. Hot: so one `replace`, not three."""
    now = stats.prefill_seconds + stats.decode_seconds + cost.seconds
    thought, first_answer = phase == "thinking", stats.first_answer_seconds
    return replace(
        stats,
        forward_passes=passes,
        first_token_seconds=stats.first_token_seconds or now,
        first_answer_seconds=first_answer if thought else first_answer or now,
        thinking_tokens=stats.thinking_tokens + thought,
        thinking_seconds=stats.thinking_seconds + thought * cost.seconds,
        answer_tokens=stats.answer_tokens + (not thought),
        answer_seconds=stats.answer_seconds + (not thought) * cost.seconds,
        peak_memory=max(stats.peak_memory, cost.peak),
    )
