"""The command plan: the memory a model needs at a context, on this machine or another Mac, and what to do.

Reads headers, no weights. Does not compute the figures (`memory`), only prints them with a verdict.
"""

import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from .common import size

if TYPE_CHECKING:
    import mlx.core as mx

    from magistral_mlx.config import ModelConfig
    from magistral_mlx.memory import MemoryPlan

_MACS = (16, 24, 32, 36, 48, 64, 96, 128)
_CONTEXTS = (8192, 40960, 131072)


def _gib(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    """`32GB`, `32 GB` or `32`: a Mac's memory as it is sold, in units of 2**30 bytes."""
    if value is None:
        return None
    found = re.fullmatch(r"([1-9]\d{0,3})\s*(g|gb|gib)?", value.strip(), re.IGNORECASE | re.ASCII)
    if not found:
        raise click.BadParameter(f"expected a size such as 32GB, found {value!r}")
    return int(found[1])


@click.command()
@click.argument("model")
@click.option(
    "--context", type=click.IntRange(min=1), help="Tokens of prompt and reply together. Default: 40960."
)
@click.option(
    "--memory", "memory_gib", callback=_gib, help="Estimate for another Mac, with this memory, such as 32GB."
)
@click.option("--kv-bits", type=click.Choice(["16", "8"]), default="16", help="Bits of the KV cache.")
@click.option("--quantize-after", type=click.IntRange(0), default=0, help="With --kv-bits 8: see ask --help.")
@click.option("--all-macs", is_flag=True, help="Every size of Mac in one table (Markdown).")
def plan(
    *,
    model: str,
    context: int | None,
    memory_gib: int | None,
    kv_bits: str,
    quantize_after: int,
    all_macs: bool,
) -> None:
    """Show how much memory a model takes, and whether it fits.

    MODEL is a directory, a Hub name, or 'demo'. Reads no weights; of a Hub model that is not on this machine
    only the config is downloaded.
    """
    if quantize_after and kv_bits != "8":
        raise click.UsageError("--quantize-after says when an 8-bit KV cache begins; give --kv-bits 8 too")
    import mlx.core as mx

    from magistral_mlx import memory

    config, weights = _weights(model)
    if all_macs:
        click.echo(table(config, weights(mx.bfloat16)), nl=False)
        return
    if context and context > config.max_context:
        raise click.BadParameter(
            f"the model's context is {config.max_context:,} tokens", param_hint="--context"
        )
    dtype = mx.bfloat16 if memory_gib else memory.default_dtype()
    made = memory.MemoryPlan(
        config=config,
        weights=weights(dtype),
        context=context or min(memory.USUAL_CONTEXT, config.max_context),
        machine=memory.mac(memory_gib) if memory_gib else memory.this_machine(),
        itemsize=dtype.size,
        kv_bits=8 if kv_bits == "8" else None,
        quantize_after=quantize_after,
    )
    _show(made, f"a Mac with {memory_gib} GB" if memory_gib else "this machine")
    if made.fits:
        return
    if config.quantization is None:
        click.echo(f"Fewer bits take less: magistral-mlx convert {model} --out DIR --bits 4 --dry-run")
    if not made.remedies:
        sys.exit(1)


def _weights(model: str) -> "tuple[ModelConfig, Callable[[mx.Dtype], int]]":
    """A model's config, and a function: dtype of the computation → bytes of its weights in memory."""
    from magistral_mlx.convert.plan import plan
    from magistral_mlx.convert.recipe import stored
    from magistral_mlx.disk.checkpoint import open_checkpoint
    from magistral_mlx.disk.configfile import read_directory
    from magistral_mlx.fetch import hub

    directory, missing = hub.look(model)
    if missing is None:
        checkpoint = open_checkpoint(directory)
        return checkpoint.config, checkpoint.nbytes
    config, _ = read_directory(directory)
    return config, lambda dtype: plan(config, stored(config), dtype).weight_bytes


def table(config: "ModelConfig", weights: int) -> str:
    """The share of each Mac's GPU memory that is used, as Markdown (see `docs/memory.md`); bold: it fits."""
    from magistral_mlx.memory import MemoryPlan, mac

    contexts = [n for n in _CONTEXTS if n <= config.max_context] or [config.max_context]
    head = ["Mac", "for the GPU", *(f"{n // 1024}k, {bits} bit" for n in contexts for bits in (16, 8))]
    rows = [[*head, "longest, 16 bit", "longest, 8 bit"], ["---", *["--:"] * (len(head) + 1)]]
    for gib in _MACS:
        plans = [
            MemoryPlan(config=config, weights=weights, context=n, machine=mac(gib), kv_bits=bits)
            for n in [*contexts, config.max_context]
            for bits in (None, 8)
        ]
        shares = [f"{plan.total / plan.machine.budget:.0%}" for plan in plans[:-2]]
        cells = [f"**{share}**" if plan.fits else share for share, plan in zip(shares, plans, strict=False)]
        longest = [f"{plan.longest:,}" if plan.longest else "none" for plan in plans[-2:]]
        rows.append([f"{gib} GB", size(plans[0].machine.budget), *cells, *longest])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _show(plan: "MemoryPlan", machine: str) -> None:
    estimate = ", an estimate" if plan.machine.estimated else ""
    for name, nbytes, what in (
        ("weights", plan.weights, ""),
        ("KV cache", plan.kv, f"{plan.context:,} tokens in {plan.cache_bits} bit"),
        ("computing", plan.transient, "at its peak, at the end of the prefill of a prompt that long"),
        ("together", plan.total, f"{plan.total / plan.machine.budget:.0%} of what {machine} can give"),
        ("can be given", plan.machine.budget, f"by {machine}{estimate}"),
    ):
        click.echo(f"{name:13} {size(nbytes):>9}  {what}".rstrip())
    if plan.fits:
        click.echo("\nIt fits.")
    elif plan.remedies:
        click.echo(f"\nIt does not fit as it is; {plan.advice()}")
    else:
        click.echo(f"\nIt does not fit; {plan.advice()}")
