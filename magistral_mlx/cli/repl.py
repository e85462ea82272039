"""The interactive chat: a line in, a reply out, and a few commands that begin with "/".

Knows the keyboard. Does not know how messages are kept (`Conversation`) or displayed (`display`).
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from magistral_mlx.errors import MagistralError
from magistral_mlx.talk.display import Terminal, print_error, problem_of, summary

from .common import first_interrupt_stops_thinking

if TYPE_CHECKING:  # the model is passed in
    from magistral_mlx.chat import Magistral
    from magistral_mlx.talk.options import Options
    from magistral_mlx.talk.saving import UserInput

_HELP = """\
/think [on|off]   reason before answering, or answer at once
/budget [N]       think for at most N tokens (without N: no limit)
/show [on|off]    show the reasoning, or only the answer
/system [TEXT]    put TEXT before the model's own system prompt (without TEXT: nothing)
/retry            ask the last question again, with another seed
/undo             forget the last question and its answer
/reset            forget the whole conversation
/save FILE        save the conversation to FILE, with its KV cache
/load FILE        continue a saved conversation, with its settings
/export FILE      write the messages to FILE, as JSON
/quit             leave (or Ctrl-D)

Ctrl-C ends the thinking and asks for the answer; a second Ctrl-C stops the reply."""


class Repl:
    """The loop: read a line, reply or run a command, repeat."""

    def __init__(self, model: "Magistral", settings: "Options", *, show_thinking: bool) -> None:
        self._model = model
        self._talk = model.conversation(**settings)
        self._terminal = Terminal(show_thinking=show_thinking)
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: print(_HELP),  # noqa: T201 -- its output
            "/think": self._think,
            "/budget": self._budget,
            "/show": self._show,
            "/system": self._system,
            "/retry": self._retry,
            "/undo": lambda _: self._note("forgotten" if self._talk.undo() else "the conversation is empty"),
            "/reset": lambda _: (self._talk.reset(), self._note("forgotten"))[1],
            "/save": self._save,
            "/load": self._load,
            "/export": self._export,
        }

    def run(self) -> None:
        """Run until /quit or the end of input."""
        self._note("/help lists the commands; Ctrl-D leaves.")
        for line in _lines():
            text = line.strip()
            command, _, rest = text.partition(" ")
            if command in ("/quit", "/exit"):
                return
            try:
                if command.startswith("/") and command[1:].isalpha():
                    self._commands.get(command, self._unknown)(rest.strip())
                elif text:
                    self._reply(text)
            except MagistralError as error:
                print_error(f"error: {error}")

    def _reply(self, message: "UserInput") -> None:
        with self._talk.stream(message) as stream:
            try:
                with first_interrupt_stops_thinking(stream):
                    finished = self._terminal.show(stream)
            except KeyboardInterrupt:
                finished = None
        self._note(summary(finished) if finished else "stopped; the reply so far is kept")
        if lacking := problem_of(stream.reply):
            print_error(lacking)

    def _retry(self, _: str) -> None:
        message = self._talk.undo()
        if message is None:
            return self._note("the conversation is empty")
        self._talk.options["seed"] = None
        return self._reply(message)

    def _think(self, value: str) -> None:
        self._talk.options["think"] = _switch(value, self._talk.options.get("think", True))
        self._note(
            "thinking is on" if self._talk.options["think"] else "thinking is off: answers come at once"
        )

    def _budget(self, value: str) -> None:
        if value and not (value.isdecimal() and len(value) < 10):
            return print_error("expected a number of tokens: /budget 2000")
        self._talk.options["think_budget"] = int(value) if value else None
        return self._note(f"thinking ends after {value} tokens" if value else "thinking has no limit")

    def _show(self, value: str) -> None:
        self._terminal.show_thinking = _switch(value, self._terminal.show_thinking)
        self._note("the reasoning is shown" if self._terminal.show_thinking else "the reasoning is hidden")

    def _system(self, text: str) -> None:
        self._talk.options["system"] = text or None
        self._note("system text set" if text else "system text removed")

    def _save(self, name: str) -> None:
        if not name:
            return print_error("expected a file name: /save sums.talk")
        self._talk.save(_path(name))
        return self._note(f"saved {len(self._talk.messages)} messages to {name}")

    def _load(self, name: str) -> None:
        if not name:
            return print_error("expected a file name: /load sums.talk")
        self._talk = self._model.load_conversation(_path(name))
        return self._note(f"loaded {len(self._talk.messages)} messages from {name}")

    def _export(self, name: str) -> None:
        if not name:
            return print_error("expected a file name: /export talk.json")
        path = _path(name)
        try:
            with path.open("x", encoding="utf-8") as file:  # never overwrites a file
                json.dump(self._talk.messages, file, ensure_ascii=False, indent=1)
        except FileExistsError:
            return print_error(f"error: {path} exists and nothing is overwritten; choose another name")
        except OSError as error:
            with suppress(OSError):
                path.unlink()  # a partly written file
            return print_error(f"error: {path} cannot be written: {error.strerror}")
        return self._note(f"wrote {len(self._talk.messages)} messages to {path}")

    def _unknown(self, _: str) -> None:
        print_error("no such command; /help lists them")

    def _note(self, text: str) -> None:
        self._terminal.note(text)


def _path(name: str) -> Path:
    """A path with `~` expanded; with an unknown ~user it stays as it is, and no such file is found."""
    with suppress(RuntimeError):
        return Path(name).expanduser()
    return Path(name)


def _switch(value: str, now: bool) -> bool:
    if value not in ("", "on", "off"):
        raise MagistralError(f"expected on or off, found {value!r}")
    return value == "on" if value else not now


def _lines() -> Iterator[str]:
    """Lines from the keyboard, with editing and history, or from a pipe."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory

    session: PromptSession[str] = PromptSession(history=InMemoryHistory())
    while True:
        try:
            yield session.prompt([("", "\n"), ("bold", "› ")])  # noqa: RUF001 -- not a greater-than
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
