"""The command `bench`: the results of `measure.bench` as a table, JSON, a row of Markdown and a chart."""

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import download_option, dtype_option, resolve, size, writable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from magistral_mlx.measure.bench import Json

_QUICK: "Json" = {"lengths": (512,), "tokens": 32, "trials": 2, "reply_tokens": 512}


@click.command()
@click.argument("model")
@click.option(
    "--length",
    "lengths",
    type=click.IntRange(min=1),
    multiple=True,
    help="Prompt length in tokens, at most the context. May be repeated. Default: 512, 4096, 16384, 40960.",
)
@click.option(
    "--tokens", type=click.IntRange(min=1), help="Tokens to decode after each prompt. Default: 128."
)
@click.option(
    "--trials", type=click.IntRange(min=1), help="Number of trials, each in its own process. Default: 5."
)
@click.option(
    "--reply-tokens",
    type=click.IntRange(min=0),
    help="Token limit of the one complete reply. 0: no such reply. Default: 2048.",
)
@click.option("--quick", is_flag=True, help="One length, few tokens, two trials: a first impression.")
@click.option("--greedy", is_flag=True, help="Decode greedily, not at temperature 0.7.")
@click.option("--speculate", is_flag=True, help="Measure the complete reply with speculative decoding, too.")
@click.option(
    "--against", type=click.Choice(["mlx-lm"]), help="Measure this too, in alternating trials, and compare."
)
@dtype_option
@click.option(
    "--json",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for the figures; the chart goes beside it. Default: named after the machine, here.",
)
@click.option("--no-chart", is_flag=True, help="Draw no chart.")
@download_option
def bench(
    *,
    model: str,
    lengths: tuple[int, ...],
    tokens: int | None,
    trials: int | None,
    reply_tokens: int | None,
    quick: bool,
    greedy: bool,
    speculate: bool,
    against: str | None,
    dtype: str | None,
    file: Path | None,
    no_chart: bool,
    download: bool,
) -> None:
    """Measure a model on this machine: tokens per second, memory, time.

    MODEL is a directory, a Hub name, or 'demo'. Takes minutes; with long prompts on a small Mac, an hour:
    --quick and --length make it shorter. Close other programs that keep this machine busy.
    """
    from rich.console import Console

    from magistral_mlx.measure.bench import Settings, run, this_computer

    given: Json = {"lengths": lengths, "tokens": tokens, "trials": trials, "reply_tokens": reply_tokens}
    wanted: Json = (_QUICK if quick else {}) | {
        key: value for key, value in given.items() if value not in (None, ())
    }
    if greedy:
        wanted["temperature"] = 0.0
    settings = Settings(**wanted, dtype=dtype, against_peer=against is not None, speculate=speculate)
    file = writable(file or Path(f"{this_computer().name}.json"))
    resolve(model, download=download)
    with _progress() as advance:
        report = run(model, settings, advance)
    console = Console()
    for part in shown(report):
        console.print(part, highlight=False, markup=False)
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    click.echo(f"\n{markdown(report)}\n\n{file}: these figures, to send or to keep")
    if not no_chart:
        click.echo(draw(report, file.with_suffix(".svg")))


def shown(report: "Json") -> "list[RenderableType]":
    """The report for a terminal: the machine and the model, the figures, the comparison."""
    from rich import box
    from rich.table import Column, Table

    heads = ("prompt", "engine", "prefill/s", "first", "decode/s", "from to", "ceiling", "peak")
    columns = (Column(head, no_wrap=True, justify="left" if head == "engine" else "right") for head in heads)
    figures = Table(*columns, box=box.SIMPLE_HEAD, padding=0)  # narrower than 80
    for engine, summary in report["summary"].items():
        for row in summary["contexts"]:
            decode = row["decode_tokens_per_second"]
            figures.add_row(
                f"{row['context']}",
                engine,
                f"{row['prefill_tokens_per_second']['median']:.1f}",
                f"{row['first_token_seconds']['median']:.2f} s",
                f"{decode['median']:.1f}",
                f"{decode['min']:.1f}–{decode['max']:.1f}",  # noqa: RUF001 -- a range's dash
                f"{row['share_of_ceiling']:.0%}",
                size(row["peak_bytes"]),
            )
    parts: list[RenderableType] = [_heading(report), figures]
    if report["ratios"]:
        faster = Table(
            *("times as fast as mlx-lm", "prompt", "median", "from to", "at least (95 %)"),
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for row in report["ratios"]:
            bound = "needs 5 trials" if row["lower_95"] is None else f"{row['lower_95']:.2f}"
            context = f"{row['context']}" if row["context"] else ""
            span = f"{row['min']:.2f} to {row['max']:.2f}"
            faster.add_row(row["what"], context, f"{row['median']:.2f}", span, bound)
        parts += [f"both compute in {report['settings']['dtype']}, the same ids, trials in turn", faster]
    return [*parts, *_notes(report)]


def _heading(report: "Json") -> str:
    model, settings, bandwidth = report["model"], report["settings"], report["bandwidth"]
    sampling = f"temperature {settings['temperature']}, top_p 0.95" if settings["temperature"] else "greedy"
    return (
        f"{_machine(report)}\n"
        f"memory bandwidth {bandwidth['bytes_per_second'] / 1e9:.3g} GB/s ({bandwidth['source']})\n"
        f"{model['name']}: {model['parameters'] / 1e9:.3g} billion parameters, "
        f"{model['bits_per_weight']:.2f} bits each, {size(model['read_bytes_per_token'])} read per token\n"
        f"{settings['dtype']} on the {settings['device']}, {sampling}, "
        f"{settings['tokens']} tokens decoded, medians of {settings['trials']} trials"
    )


def _machine(report: "Json") -> str:
    machine = report["machine"]
    cores = ", ".join(f"{count} {kind}" for kind, count in machine["cores"].items())
    return f"{machine['chip']} ({cores} cores), {machine['memory_bytes'] / 2**30:.0f} GB, {machine['system']}"


def _notes(report: "Json") -> list[str]:
    ours = report["summary"]["magistral_mlx"]
    load, imports = ours["load_seconds"]["median"], ours["import_seconds"]["median"]
    first = report["first_load_seconds"]
    notes = [f"loads in {load:.1f} s, after {imports:.1f} s of imports; the first time in {first:.1f} s"]
    if reply := report["reply"]:
        thought = f"thought {reply['thinking_tokens']} tokens in {reply['thinking_seconds']:.1f} s"
        answered = f"answered {reply['answer_tokens']} in {reply['answer_seconds']:.1f} s"
        notes.append(f"“{reply['question']}” {thought}, {answered} ({reply['finish_reason']})")
    if found := report["speculated"]:
        notes.append(
            f"the same with speculation: {found['tokens_per_pass']:.2f} tokens per pass, "
            f"{found['decode_tokens_per_second']:.1f} tokens/s instead of "
            f"{report['reply']['decode_tokens_per_second']:.1f}"
        )
    return notes + [f"skipped a prompt of {length}: {why}" for length, why in report["skipped"].items()]


def markdown(report: "Json") -> str:
    """One row for the docs' table of results: decode and prefill at each context."""
    rows = report["summary"]["magistral_mlx"]["contexts"]
    decode = " · ".join(
        f"{row['context']:,}: {row['decode_tokens_per_second']['median']:.1f} ({row['share_of_ceiling']:.0%})"
        for row in rows
    )
    prefill = " · ".join(
        f"{row['context']:,}: {row['prefill_tokens_per_second']['median']:.0f}" for row in rows
    )
    model = f"{report['model']['name']}, {report['model']['bits_per_weight']:.2f} bits"
    peak = size(max(row["peak_bytes"] for row in rows))
    versions = f"{report['versions']['magistral_mlx']}, mlx {report['versions']['mlx']}"
    return f"| {_machine(report)} | {model} | {decode} | {prefill} | {peak} | {versions} |"


def draw(report: "Json", path: Path) -> str:
    """Draw decode speed over context, with the ceiling, as SVG; returns a line for the user."""
    try:
        figure = import_module("matplotlib.figure").Figure(figsize=(6, 3.5), layout="constrained")
    except ImportError:
        return "no chart: it needs matplotlib (pip install 'magistral_mlx[bench]')"
    axes = figure.subplots()
    for engine, summary in report["summary"].items():
        contexts = [row["context"] for row in summary["contexts"]]
        found = [row["decode_tokens_per_second"] for row in summary["contexts"]]
        middle = [row["median"] for row in found]
        down = [row["median"] - row["min"] for row in found]
        up = [row["max"] - row["median"] for row in found]
        axes.errorbar(contexts, middle, yerr=[down, up], marker="o", capsize=3, label=engine)
    rows = report["summary"]["magistral_mlx"]["contexts"]
    limits = [row["ceiling_tokens_per_second"] for row in rows]
    axes.plot([row["context"] for row in rows], limits, "--", color="grey", label="memory bandwidth allows")
    axes.set(xlabel="context, tokens", ylabel="decode, tokens/s", xscale="log", yscale="log")
    axes.set_title(f"{report['model']['name']} on {report['machine']['chip']}")
    axes.legend()
    figure.savefig(path)
    return f"{path}: the chart"


@contextmanager
def _progress() -> Generator[Callable[[int, int, str], None]]:
    """A progress bar on standard error; redrawn once a second, to disturb the measurement little."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=1) as progress:
        task = progress.add_task("starting", total=None)
        yield lambda done, of, what: progress.update(task, completed=done, total=of, description=what)
        progress.update(task, completed=progress.tasks[0].total, description="measured")
