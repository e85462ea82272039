"""The command line: ask and chat here; convert, verify, info, plan, bench and doctor in files of their own.

Turns options into the library's own objects and its errors into one line each. Whatever a command does, the
library does it; nothing is decided here but what a person is asked and shown.
"""

import dataclasses
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack, cast

import click

from magistral_mlx.errors import MagistralError, MagistralWarning

from . import bench, convert, doctor, plan, serve, service
from .common import first_interrupt_stops_thinking, read_text, resolve

if TYPE_CHECKING:  # mlx, mistral_common and rich load when a command needs them, not for --help
    from magistral_mlx.chat import Magistral
    from magistral_mlx.talk.display import Terminal
    from magistral_mlx.talk.options import Options
    from magistral_mlx.talk.reply import Reply
    from magistral_mlx.talk.stream import Stream

_Command = TypeVar("_Command", bound=Callable[..., Any])


class _Reply(TypedDict):
    """The options that `ask` and `chat` share."""

    model: str | None
    download: bool
    dtype: str | None
    kv_bits: str
    quantize_after: int
    draft_model: str | None
    speculate: bool | None
    system: str | None
    system_file: Path | None
    think_budget: int | None
    loop_guard: bool
    no_think: bool
    hide_thinking: bool
    max_tokens: int | None
    seed: int | None
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    stop: tuple[str, ...]


_REPLY_OPTIONS = (
    click.option("--model", "-m", help="A directory, a Hub name, or 'demo'. Default: the last one used."),
    click.option("--download", is_flag=True, help="Download the model if it is not here yet."),
    click.option(
        "--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="What to compute in."
    ),
    click.option("--kv-bits", type=click.Choice(["16", "8"]), default="16", help="8: half the KV cache."),
    click.option(
        "--quantize-after",
        type=click.IntRange(0),
        default=0,
        help="With --kv-bits 8: tokens up to which the KV cache stays in 16 bit.",
    ),
    click.option("--draft-model", help="A smaller model of the same vocabulary, which guesses ahead."),
    click.option(
        "--speculate/--no-speculate",
        default=None,
        help="Guess ahead and check: the same reply, sooner where it quotes. Default: with a draft model.",
    ),
    click.option("--system", help="Placed before the model's own system prompt."),
    click.option(
        "--system-file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="The same, in a file.",
    ),
    click.option("--think-budget", type=int, help="Tokens of reasoning, then the answer. Default: no limit."),
    click.option("--loop-guard", is_flag=True, help="End what goes round in circles. Experimental."),
    click.option("--no-think", is_flag=True, help="Answer at once, without reasoning."),
    click.option("--hide-thinking", is_flag=True, help="Think, but show the answer only."),
    click.option("--max-tokens", type=int, help="Of reasoning and answer together. Default: 40960."),
    click.option("--seed", type=int, help="The same seed gives the same reply."),
    click.option(
        "--temperature", type=float, default=0.7, show_default=True, help="0: always the likeliest."
    ),
    click.option("--top-p", type=float, default=0.95, show_default=True),
    click.option("--top-k", type=int, default=0, help="0: off."),
    click.option("--min-p", type=float, default=0.0, help="0: off."),
    click.option("--repetition-penalty", type=float, default=1.0, help="1: off."),
    click.option("--stop", multiple=True, help="A string that ends the answer. May be given again."),
)


def _reply_options(command: _Command) -> _Command:
    for option in reversed(_REPLY_OPTIONS):
        command = option(command)
    return command


class _Group(click.Group):
    """A user's mistake ends in one line and exit code 1, never in a traceback; commands in our order."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 -- click's signature
        return [*self.commands]

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MagistralError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="magistral_mlx", prog_name="magistral-mlx")
def cli() -> None:
    """Run Mistral's reasoning model Magistral Small on this machine."""
    warnings.showwarning = _show_warning


@cli.command()
@click.argument("question", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object: ids, thinking, answer, statistics.")
@click.option(
    "--schema", type=click.File(encoding="utf-8"), help="The JSON schema that the answer is held to."
)
@_reply_options
def ask(question: str | None, as_json: bool, schema: IO[str] | None, **options: Unpack[_Reply]) -> None:
    """Ask one question and print the answer.

    QUESTION may come from standard input: "-", or nothing.

    Ctrl-C while it thinks ends the thinking and asks for the answer; once more stops it.
    """
    from magistral_mlx.talk.display import Terminal, complain, shortcoming

    text = _question(question)
    settings = _settings(options)
    if schema is not None:
        settings["schema"] = _read_schema(schema)
    terminal = Terminal(show_thinking=not options["hide_thinking"])
    with _load(options) as model, model.stream(text, **settings) as stream:
        if as_json:
            for _ in stream:
                pass
            click.echo(json.dumps(_as_json(stream.reply), ensure_ascii=False))
        else:
            _show(stream, terminal)
        if schema is not None:
            _ = stream.reply.parsed  # an answer that was cut off is an error
        elif not as_json and (lacking := shortcoming(stream.reply)):
            complain(lacking)


def _question(given: str | None) -> str:
    """The question as it was typed, or from standard input; refused where nothing is in it."""
    text = given or ""
    if given == "-" or (given is None and not sys.stdin.isatty()):
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise click.UsageError(
                f"expected a question in UTF-8 on standard input, found other bytes at {error.start}: "
                "give it text"
            ) from error
    if not text.strip():
        raise click.UsageError('expected a question: magistral-mlx ask "What is 48 + 37?"')
    return text


def _show(stream: "Stream", terminal: "Terminal") -> None:
    from magistral_mlx.talk.display import summary

    try:
        with first_interrupt_stops_thinking(stream):
            finished = terminal.show(stream)
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        sys.exit(130)
    if finished:
        terminal.note(summary(finished))


@cli.command()
@_reply_options
def chat(**options: Unpack[_Reply]) -> None:
    """Talk, with a memory of what was said; /help lists the rest."""
    from .repl import Repl

    settings = _settings(options)
    with _load(options) as model:
        Repl(model, settings, show_thinking=not options["hide_thinking"]).run()


for _command in (
    *(serve.serve, convert.convert, convert.verify, convert.info, plan.plan),
    *(bench.bench, doctor.doctor, service.service),
):
    cli.add_command(_command)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    if issubclass(category, MagistralWarning):
        click.echo(f"note: {message}", err=True)


def _read_schema(file: IO[str]) -> dict[str, Any]:
    try:
        found: object = json.load(file)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"{file.name} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise click.BadParameter(f"{file.name} holds a {type(found).__name__}, not a JSON schema")
    return cast("dict[str, Any]", found)


def _settings(options: _Reply) -> "Options":
    """The library's options from the command line's."""
    from magistral_mlx.decoder.sampling import Sampling
    from magistral_mlx.talk.options import MAX_TOKENS

    if options["system"] is not None and options["system_file"] is not None:
        raise click.UsageError("--system and --system-file exclude each other")
    system = options["system"]
    if options["system_file"] is not None:
        system = read_text(options["system_file"])
    settings: Options = {
        "sampling": Sampling(
            temperature=options["temperature"],
            top_p=options["top_p"],
            top_k=options["top_k"],
            min_p=options["min_p"],
            repetition_penalty=options["repetition_penalty"],
        ),
        "seed": options["seed"],
        "max_tokens": MAX_TOKENS if options["max_tokens"] is None else options["max_tokens"],
        "think": not options["no_think"],
        "think_budget": options["think_budget"],
        "loop_guard": options["loop_guard"],
        "system": system,
        "stop": options["stop"],
    }
    if options["speculate"] is not None:
        settings["speculate"] = options["speculate"]
    return settings


def _load(options: _Reply) -> "Magistral":
    """The model that was asked for, else the last one, else the one that is chosen now."""
    from magistral_mlx.chat import Magistral
    from magistral_mlx.fetch import last_model

    name = last_model.last_used() or _choose() if options["model"] is None else options["model"]
    resolve(name, download=options["download"])
    draft_model = options["draft_model"]
    if draft_model is not None:
        resolve(draft_model, download=options["download"])
    model = Magistral.load(
        name,
        dtype=options["dtype"],  # type: ignore[arg-type] -- one of click's choices
        kv_bits=8 if options["kv_bits"] == "8" else None,
        quantize_after=options["quantize_after"],
        draft_model=draft_model,
    )
    last_model.remember(name)
    return model


def _choose() -> str:
    from magistral_mlx.fetch import hub

    choices = f"--model demo, or --model {hub.RECOMMENDED} --download ({hub.RECOMMENDED_GB} GB)"
    if not sys.stdin.isatty():
        raise click.UsageError(f"no model was used yet: give {choices}")
    click.echo("No model was used yet.")
    click.echo("  1  the demo model: small arithmetic, nothing to download")
    click.echo(f"  2  {hub.RECOMMENDED}, {hub.RECOMMENDED_GB} GB")
    return "demo" if click.prompt("Which", type=click.IntRange(1, 2), default=1) == 1 else hub.RECOMMENDED


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
