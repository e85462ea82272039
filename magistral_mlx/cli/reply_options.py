"""The options that `ask` and `chat` share, and how they become the library's options and a loaded model."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import click

from .common import (
    NO_MODEL,
    download_option,
    dtype_option,
    kv_bits_option,
    model_option,
    quantize_after_option,
    read_text,
    resolve,
)

if TYPE_CHECKING:  # mlx and mistral_common load when a command needs them, not for --help
    from magistral_mlx.chat import Magistral
    from magistral_mlx.talk.options import Options

_Command = TypeVar("_Command", bound=Callable[..., Any])


class ReplyOptions(TypedDict):
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


_OPTIONS = (
    *(model_option, download_option, dtype_option, kv_bits_option, quantize_after_option),
    click.option("--draft-model", help="A smaller model with the same vocabulary, for speculative decoding."),
    click.option(
        "--speculate/--no-speculate",
        default=None,
        help="Speculative decoding: the same reply, faster where it quotes. Default: with a draft model.",
    ),
    click.option("--system", help="Text to place before the model's own system prompt."),
    click.option(
        "--system-file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="A file with that text.",
    ),
    click.option(
        "--think-budget",
        type=int,
        help="Limit of reasoning tokens; then the answer follows. Default: no limit.",
    ),
    click.option(
        "--loop-guard", is_flag=True, help="End reasoning or an answer that repeats itself. Experimental."
    ),
    click.option("--no-think", is_flag=True, help="Answer at once, without reasoning."),
    click.option("--hide-thinking", is_flag=True, help="Think, but show the answer only."),
    click.option(
        "--max-tokens", type=int, help="Token limit of reasoning and answer together. Default: 40960."
    ),
    click.option("--seed", type=int, help="The same seed gives the same reply."),
    click.option("--temperature", type=float, default=0.7, show_default=True, help="0: greedy."),
    click.option("--top-p", type=float, default=0.95, show_default=True),
    click.option("--top-k", type=int, default=0, help="0: off."),
    click.option("--min-p", type=float, default=0.0, help="0: off."),
    click.option("--repetition-penalty", type=float, default=1.0, help="1: off."),
    click.option("--stop", multiple=True, help="A string that ends the answer. May be repeated."),
)


def reply_options(command: _Command) -> _Command:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def settings_of(options: ReplyOptions) -> "Options":
    """The command line's options as the library's."""
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


def load(options: ReplyOptions) -> "Magistral":
    """Load the given model, or the one used last, or the one that the user chooses now."""
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
        raise click.UsageError(f"{NO_MODEL}: give {choices}")
    click.echo(f"{NO_MODEL.capitalize()}.")
    click.echo("  1  the demo model: small arithmetic, nothing to download")
    click.echo(f"  2  {hub.RECOMMENDED}, {hub.RECOMMENDED_GB} GB")
    return "demo" if click.prompt("Which", type=click.IntRange(1, 2), default=1) == 1 else hub.RECOMMENDED
