"""`ask` and `chat`: a question from the command line, or a conversation in the terminal.

Turns options into the library's objects. Does not know how a reply is displayed (`talk.display`).
"""

import dataclasses
import json
import sys
from typing import IO, TYPE_CHECKING, Any, Unpack, cast

import click

from .common import first_interrupt_stops_thinking
from .reply_options import ReplyOptions, load, reply_options, settings_of

if TYPE_CHECKING:  # mlx, mistral_common and rich load when a command needs them, not for --help
    from magistral_mlx.talk.display import Terminal
    from magistral_mlx.talk.reply import Reply
    from magistral_mlx.talk.stream import Stream

_QUOTED = 'put it in quotes: magistral-mlx ask "What is 48 + 37?"'


@click.command()
@click.argument("question", nargs=-1, metavar="[QUESTION]")
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object: ids, thinking, answer, statistics."
)
@click.option(
    "--schema",
    type=click.File(encoding="utf-8"),
    help="A file with a JSON schema that the answer must follow.",
)
@reply_options
def ask(
    question: tuple[str, ...], as_json: bool, schema: IO[str] | None, **options: Unpack[ReplyOptions]
) -> None:
    """Ask one question and print the answer.

    QUESTION is read from standard input if it is "-" or missing.

    Ctrl-C during the thinking ends it and asks for the answer; a second Ctrl-C stops the reply.
    """
    from magistral_mlx.talk.display import Terminal, print_error, problem_of

    text = _question(question)
    settings = settings_of(options)
    if schema is not None:
        settings["schema"] = _read_schema(schema)
    terminal = Terminal(show_thinking=not options["hide_thinking"])
    with load(options) as model, model.stream(text, **settings) as stream:
        if as_json:
            for _ in stream:
                pass
            click.echo(json.dumps(_as_json(stream.reply), ensure_ascii=False))
        else:
            _show(stream, terminal)
        if schema is not None:
            _ = stream.reply.parsed  # raises if the answer was cut off
        elif not as_json and (lacking := problem_of(stream.reply)):
            print_error(lacking)


def _question(words: tuple[str, ...]) -> str:
    """The question from the command line or standard input; refused if it is empty or several words."""
    if len(words) > 1:  # not joined: the shell may have expanded a * to file names
        raise click.UsageError(f"expected one question, found {len(words)} words; {_QUOTED}")
    text = "".join(words)
    if words == ("-",) or (not words and not sys.stdin.isatty()):
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise click.UsageError(
                f"expected a question in UTF-8 on standard input, found other bytes at {error.start}: "
                "give it text"
            ) from error
    if not text.strip():
        raise click.UsageError(f"expected a question, found none; {_QUOTED}")
    return text


def _show(stream: "Stream", terminal: "Terminal") -> None:
    from magistral_mlx.talk.display import summary

    with first_interrupt_stops_thinking(stream):
        finished = terminal.show(stream)
    if finished:
        terminal.note(summary(finished))


@click.command()
@reply_options
def chat(**options: Unpack[ReplyOptions]) -> None:
    """Chat in the terminal; /help lists its commands."""
    from .repl import Repl

    settings = settings_of(options)
    with load(options) as model:
        Repl(model, settings, show_thinking=not options["hide_thinking"]).run()


def _read_schema(file: IO[str]) -> dict[str, Any]:
    try:
        found: object = json.load(file)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"{file.name} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise click.BadParameter(f"{file.name} holds a {type(found).__name__}, not a JSON schema")
    return cast("dict[str, Any]", found)


def _as_json(reply: "Reply") -> dict[str, Any]:
    return {
        "prompt_ids": reply.prompt_ids,
        "token_ids": reply.token_ids,
        "thinking": reply.thinking,
        "answer": reply.answer,
        "finish_reason": reply.finish_reason,
        "seed": reply.seed,
        "stats": dataclasses.asdict(reply.stats)
        | {
            "prefill_tokens_per_second": reply.stats.prefill_tokens_per_second,
            "decode_tokens_per_second": reply.stats.decode_tokens_per_second,
            "tokens_per_pass": reply.stats.tokens_per_pass,
        },
    }
