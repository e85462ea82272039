"""Events → text for the client: reasoning separate, in tags within the text, or the raw text.

Pure: events in, texts and pieces of tool calls out. A rendering gets the events of one reply, in order.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from magistral_mlx.events import AnswerToken, Event, Finished, ThinkToken, ToolCallToken
from magistral_mlx.text.thinking import CLOSE, OPEN
from magistral_mlx.text.tokenizer import Tokenizer
from magistral_mlx.text.transcript import StopStrings
from magistral_mlx.wire import TokenLogprob


class Delta(NamedTuple):
    """What one event adds to the reply."""

    thinking: str = ""
    text: str = ""
    call: ToolCallToken | None = None
    logprobs: Sequence[TokenLogprob | None] = ()


class Rendering(Protocol):
    @property
    def stopped(self) -> bool:
        """Whether the reply ends here although the model would continue."""
        ...

    @property
    def holds_back(self) -> bool:
        """Whether the text of an event may be held back until a later one."""
        ...

    def render(self, event: Event) -> Delta: ...


class SeparateReasoning:
    """Reasoning and answer as two separate texts."""

    stopped = holds_back = False

    def render(self, event: Event) -> Delta:
        match event:
            case ThinkToken(text=text):
                return Delta(thinking=text)
            case AnswerToken(text=text):
                return Delta(text=text)
            case ToolCallToken():
                return Delta(call=event)
            case Finished():
                return Delta()


class TaggedReasoning:
    """One text in the format of the model's template: `<think>`, the reasoning, `</think>`, the answer."""

    stopped = holds_back = False

    def __init__(self) -> None:
        self._open = False

    def render(self, event: Event) -> Delta:
        match event:
            case ThinkToken(text=text) if text and not self._open:
                self._open = True
                return Delta(text=f"{OPEN}\n{text}")
            case ThinkToken(text=text):
                return Delta(text=text)
            case AnswerToken(text=text):
                return Delta(text=self._close() + text)
            case ToolCallToken():
                return Delta(text=self._close(), call=event)
            case Finished(stats=stats):
                return Delta(text=self._close() if stats.answer_tokens else "")

    def _close(self) -> str:
        was_open, self._open = self._open, False
        return f"\n{CLOSE}\n\n" if was_open else ""


class RawText:
    """The decoded text of all ids, up to a stop string."""

    holds_back = True

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
        self._detokenizer = tokenizer.detokenizer()
        self._stop = StopStrings(stops)

    @property
    def stopped(self) -> bool:
        return self._stop.met is not None

    def render(self, event: Event) -> Delta:
        text = "".join(self._stop.feed(self._detokenizer.feed(id_)) for id_ in event.token_ids)
        if isinstance(event, Finished):
            text += self._stop.feed(self._detokenizer.flush()) + self._stop.flush()
        return Delta(text=text)
