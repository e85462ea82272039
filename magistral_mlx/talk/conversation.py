"""A conversation: its message history, and the KV cache kept for it.

Knows turns, and that the prompts of a conversation share a prefix. Does not know how messages are encoded
(`tokenizer`), how caches are reused (`prefix`), or how replies are generated (`stream`).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, Unpack, overload
from weakref import WeakSet

from magistral_mlx.decoder.prefix import Prefix
from magistral_mlx.errors import ConversationError, PromptError
from magistral_mlx.structured.grammar import Regex
from magistral_mlx.text.prompt import Messages
from magistral_mlx.text.tokenizer import Tokenizer

from . import saving
from .continuous import ContinuousBatch
from .options import Options, Plain, offered
from .reply import Reply
from .stream import Stream

T = TypeVar("T")


class ChatModel(saving.HostModel, Protocol):
    """What a conversation needs from a model; `Magistral` has it."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def kv_bits(self) -> int | None: ...
    def encode(self, messages: Messages, **options: Unpack[Options]) -> list[int]: ...
    def stream_ids(
        self,
        prompt: Sequence[int],
        *,
        prefix: Prefix | None = None,
        batch: ContinuousBatch | None = None,
        on_end: Callable[[Reply], None] = ...,
        **options: Unpack[Options],
    ) -> Stream: ...


class Conversation:
    """A message history: a turn is appended when its stream ends, even if that was closed early.

    The KV cache is kept between turns: of the next prompt, only what follows the common prefix is prefilled.
    It takes 160 KiB a token for Magistral, until `reset`, or until the conversation is dropped.

    options: for every reply; may be changed between replies.
    """

    def __init__(
        self,
        model: ChatModel,
        options: Options,
        *,
        turns: Sequence[tuple[saving.UserInput, Reply]] = (),
        prefix: Prefix | None = None,
    ) -> None:
        self.options = options
        self._model = model
        self._turns = list(turns)
        self._prefix = prefix  # the KV caches; None while a stream uses them
        self._streams: WeakSet[Stream] = WeakSet()

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages so far, in the form that `Magistral.stream` takes."""
        pairs = ([*_messages(message), reply.message] for message, reply in self._turns)
        return [message for pair in pairs for message in pair]

    def stream(self, message: saving.UserInput, **options: Unpack[Options]) -> Stream:
        """Send a message and stream the reply; `options` are for this reply only.

        message: text; or, after a reply with `tool_calls`, the result of each: `[call.result(…), …]`.
        """
        merged: Options = {**self.options, **options}

        prompt = self._prompt(message, merged)
        prefix = self._prefix or self._model.new_prefix(self._model.kv_bits)

        def remember(reply: Reply) -> None:
            self._prefix = prefix
            if reply.answer or reply.thinking or reply.tool_calls:
                self._turns.append((message if isinstance(message, str) else _messages(message), reply))

        stream = self._model.stream_ids(prompt, prefix=prefix, on_end=remember, **merged)
        self._prefix = None
        self._streams.add(stream)
        return stream

    @overload
    def ask(self, message: saving.UserInput, *, schema: type[T], **options: Unpack[Plain]) -> T: ...
    @overload
    def ask(
        self, message: saving.UserInput, *, schema: Mapping[str, Any], **options: Unpack[Plain]
    ) -> Any: ...
    @overload
    def ask(self, message: saving.UserInput, *, schema: Regex, **options: Unpack[Plain]) -> str: ...
    @overload
    def ask(self, message: saving.UserInput, **options: Unpack[Plain]) -> Reply: ...
    def ask(self, message: saving.UserInput, **options: Unpack[Options]) -> Any:
        """Send a message and wait for the reply; with a `schema`, for its value (see `Magistral.ask`)."""
        reply = self.stream(message, **options).drain()
        return reply if options.get("schema") is None else reply.parsed

    def astream(self, message: saving.UserInput, **options: Unpack[Options]) -> Stream:
        """`stream`, for `async for`."""
        return self.stream(message, **options)

    @overload
    async def aask(self, message: saving.UserInput, *, schema: type[T], **options: Unpack[Plain]) -> T: ...
    @overload
    async def aask(
        self, message: saving.UserInput, *, schema: Mapping[str, Any], **options: Unpack[Plain]
    ) -> Any: ...
    @overload
    async def aask(self, message: saving.UserInput, *, schema: Regex, **options: Unpack[Plain]) -> str: ...
    @overload
    async def aask(self, message: saving.UserInput, **options: Unpack[Plain]) -> Reply: ...
    async def aask(self, message: saving.UserInput, **options: Unpack[Options]) -> Any:
        """`ask`, for `await`."""
        reply = await self.stream(message, **options).adrain()
        return reply if options.get("schema") is None else reply.parsed

    def undo(self) -> saving.UserInput | None:
        """Remove the last turn; returns its message, to send it again or change it. None: no turn is left."""
        return self._turns.pop()[0] if self._turns else None

    def fork(self) -> "Conversation":
        """A copy that continues independently; the KV cache is shared until one of them writes to it."""
        return Conversation(self._model, {**self.options}, turns=self._turns, prefix=self._fork_prefix())

    def save(self, path: str | Path, *, with_cache: bool = True) -> None:
        """Save to a file from which `Magistral.load_conversation` continues, in any later process.

        with_cache: save the KV cache too (160 KiB a token for Magistral), so that nothing is prefilled again;
            False makes a small file, and everything is prefilled again.

        The write is atomic. It replaces an earlier save at that path, but no other file.

        Raises:
            ConversationError: a stream of this conversation is open, or the file cannot be written.
        """
        if any(stream.is_open for stream in self._streams):
            raise ConversationError(
                "a stream of this conversation is open; read it to its end or close it, then save"
            )
        prefix = self._fork_prefix() if with_cache else None  # a copy: a later stream may change the original
        saved = saving.Saved(options=self.options, turns=tuple(self._turns), prefix=prefix)
        saving.save(Path(path), saved, self._model)

    def reset(self) -> None:
        """Forget all messages, and drop the KV cache."""
        self._turns.clear()
        self._prefix = None

    def _fork_prefix(self) -> Prefix | None:
        """A copy of the caches, made on the model's thread: a stream just closed may be in mid-step there."""
        return self._model.run(self._prefix.fork) if self._prefix else None

    def _prompt(self, message: saving.UserInput, options: Options) -> list[int]:
        """The next prompt. Kept reasoning keeps its sampled ids: encoding its text again could give others.

        Reasoning that led to tool calls is kept while these are answered, until the next question.
        """
        tokenizer, last = self._model.tokenizer, self._turns[-1][1] if self._turns else None
        messages = _messages(message)
        keeps = options.get("keep_thinking") or not isinstance(message, str)
        if keeps and last and last.token_ids:
            end = [] if last.token_ids[-1] == tokenizer.eos_id else [tokenizer.eos_id]
            history = [*last.prompt_ids, *last.token_ids, *end]
            tools = offered(options)
            turn = tokenizer.encode_turn(message, calls=last.tool_calls, tools=tools, history=history)
            if turn is not None:
                return history + turn
        return self._model.encode([*self.messages, *messages], **options)


def _messages(message: saving.UserInput) -> list[dict[str, Any]]:
    if isinstance(message, str):
        return [{"role": "user", "content": message}]
    results = [{**result} for result in message]
    if not results or any(result.get("role") != "tool" for result in results):
        raise PromptError("Expected a question, or results of tool calls, found other messages.")
    return results
