"""The commands convert, verify and info.

Puts the pieces of a conversion together: the source (`hub`, `checkpoint`), the recipe, the files beside the
weights (`sidecars`), the target; and reports the result.
"""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import DTYPES, resolve, size

if TYPE_CHECKING:  # mlx loads when a command runs, not for --help
    from magistral_mlx.config import Quantization
    from magistral_mlx.convert.conversion import Converted
    from magistral_mlx.convert.plan import Plan
    from magistral_mlx.convert.recipe import Recipe

_MACS = (16, 24, 32, 48, 64)


@click.command()
@click.argument("source")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The directory to create.")
@click.option(
    "--recipe", "name", help="4bit (default), 4bit-g32, mixed-4-6, 6bit, 8bit, mxfp4, nvfp4 or bf16."
)
@click.option("--bits", type=int, help="Bits per weight: 2, 3, 4, 5, 6 or 8.")
@click.option("--group-size", type=int, help="Weights that share a scale: 32, 64 or 128.")
@click.option("--mode", help="affine, mxfp4, nvfp4 or mxfp8.")
@click.option(
    "--override",
    "overrides",
    multiple=True,
    help="PATTERN=RECIPE: another recipe for some matrices. May be repeated.",
)
@click.option("--dtype", type=DTYPES, help="Data type of what is not quantized. Default: as in SOURCE.")
@click.option("--download", is_flag=True, help="Download SOURCE if it is not here yet.")
@click.option("--dry-run", is_flag=True, help="Show sizes and what fits; write nothing, read no weights.")
@click.option("--dequantize", is_flag=True, help="Accept a SOURCE that is quantized already.")
@click.option("--allow-nonfinite", is_flag=True, help="Accept weights that are NaN or Inf.")
@click.option("--no-verify", is_flag=True, help="Skip hashes and quantization errors; a little faster.")
@click.option("--upload", metavar="REPO", help="Publish the result on the Hub as REPO.")
def convert(
    *,
    source: str,
    out: Path,
    name: str | None,
    bits: int | None,
    group_size: int | None,
    mode: str | None,
    overrides: tuple[str, ...],
    dtype: str | None,
    download: bool,
    dry_run: bool,
    dequantize: bool,
    allow_nonfinite: bool,
    no_verify: bool,
    upload: str | None,
) -> None:
    """Convert a checkpoint to a quantized MLX directory.

    SOURCE is a directory, a Hub name, or 'demo'. Needs little memory, whatever the model's size. After an
    interruption the same command resumes.
    """
    import mlx.core as mx

    from magistral_mlx.convert import conversion
    from magistral_mlx.convert.job import Job
    from magistral_mlx.disk.checkpoint import open_checkpoint
    from magistral_mlx.disk.journal import work_directory
    from magistral_mlx.fetch import hub
    from magistral_mlx.talk.display import progress_bar
    from magistral_mlx.text import sidecars

    local = source == "demo" or hub.directory(source)
    name_of_source = None if local else source
    recipe = _recipe(name, bits, group_size, mode, overrides)
    planned = partial(_planned, source, recipe, dtype, dequantize=dequantize)
    job_of = partial(
        Job,
        out=out,
        recipe=recipe,
        dtype=getattr(mx, dtype) if dtype else None,
        source_name=name_of_source,
        dequantize=dequantize,
        allow_nonfinite=allow_nonfinite,
        verify=not no_verify,
    )
    if dry_run:
        directory, missing = hub.look(source)
        plan = (
            planned(directory)
            if missing is not None
            else job_of(checkpoint=open_checkpoint(directory)).plan()
        )
        return _show_plan(plan, recipe, missing)
    if not work_directory(out).exists():  # an unfinished run may have renamed it already
        conversion.refuse_existing(out)  # before hours of download
    if upload:
        hub.check_upload(upload)
    found = resolve(source, download=download, then=lambda directory: {out: planned(directory).total_bytes})
    job = job_of(checkpoint=(checkpoint := open_checkpoint(found.weights)))
    plan = job.plan()
    beside = sidecars.files(
        found.tokenizer,
        name=name_of_source or str(found.weights.resolve()),
        recipe=str(recipe),
        context=checkpoint.config.max_context,
        size=f"{size(plan.total_bytes)}, {plan.bits_per_weight:.2f} bits per weight",
    )
    with progress_bar("converting") as advance:
        made = conversion.convert(job.with_sidecars(beside), lambda p: advance(p.done, p.total))
    _report(out, made, recipe)
    if upload:
        click.echo(f"published: {hub.upload(out, upload)}")
    return None


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
def verify(directory: Path) -> None:
    """Check every byte of a converted directory.

    Every file in DIRECTORY is compared with what was written when it was made.
    """
    from magistral_mlx.disk import manifest
    from magistral_mlx.talk.display import progress_bar

    with progress_bar("verifying") as advance:
        wrong = manifest.verify(directory, progress=advance)
    for line in wrong:
        click.echo(line, err=True)
    if wrong:
        sys.exit(1)
    click.echo(f"{directory}: every file is as it was written")


@click.command()
@click.argument("model")
def info(model: str) -> None:
    """Show what a model contains, and the memory it takes.

    MODEL is a directory, a Hub name, or 'demo'.
    """
    from magistral_mlx import memory
    from magistral_mlx.disk.checkpoint import open_checkpoint
    from magistral_mlx.text.tokenizer import Tokenizer

    found = resolve(model, download=False)
    checkpoint, tokenizer = open_checkpoint(found.weights), Tokenizer.from_directory(found.tokenizer)
    config, packed = checkpoint.config, checkpoint.config.quantization
    stored = checkpoint.stored_bytes
    rows = {
        "layout": checkpoint.layout,
        "parameters": f"{config.parameters:,}",
        "weights": f"{size(stored)}, {stored * 8 / config.parameters:.2f} bits each",
        "quantization": _quantization(packed) if packed else "none",
        "layers": f"{config.n_layers} of dim {config.dim}, feed-forward {config.hidden_dim}",
        "heads": f"{config.n_heads} of queries, {config.n_kv_heads} of keys, {config.head_dim} wide",
        "vocabulary": f"{config.vocab_size:,} ids, tokenizer {tokenizer.version}",
        "context": f"{config.max_context:,} tokens, {size(config.kv_bytes_per_token(2))} each in 16 bit",
        "thinking": f"between {'control tokens' if tokenizer.think_ids else 'plain-text tags'}",
        "in memory": f"{size(checkpoint.nbytes(memory.default_dtype()))} of {size(memory.budget())}",
    }
    for name, value in rows.items():
        click.echo(f"{name:13} {value}")


def _quantization(packed: "Quantization") -> str:
    scheme, exceptions = packed.default, len(packed.overrides)
    shown = f"{scheme.bits} bit in groups of {scheme.group_size} ({scheme.mode})"
    return f"{shown}, {exceptions} exception{'s' * (exceptions > 1)}" if exceptions else shown


def _recipe(
    name: str | None, bits: int | None, group_size: int | None, mode: str | None, overrides: tuple[str, ...]
) -> "Recipe":
    """The recipe from the options: a name or numbers, and exceptions."""
    from magistral_mlx.config import Scheme
    from magistral_mlx.convert.recipe import named, uniform

    numbers = bits is not None or group_size is not None or mode is not None
    if name and numbers:
        raise click.UsageError(
            "--recipe sets bits, group size and mode; give either it, or --bits, --group-size and --mode"
        )
    pairs = [tuple(override.split("=", 1)) for override in overrides]
    if any(len(pair) != 2 for pair in pairs):
        raise click.UsageError("--override is PATTERN=RECIPE, such as 'model.layers.*.mlp.down_proj=6bit'")
    chosen = named(name or "4bit")
    if numbers:
        chosen = uniform(Scheme.of_mode(mode or "affine", bits=bits, group_size=group_size))
    return chosen.but((pattern, to) for pattern, to in pairs)


def _report(out: Path, made: "Converted", recipe: "Recipe") -> None:
    """Report what was written, and its quantization error."""
    from magistral_mlx.disk import manifest

    click.echo(
        f"{out}: {size(made.plan.total_bytes)}, {made.plan.bits_per_weight:.2f} bits per weight ({recipe})"
    )
    if worst := manifest.worst(made.errors):
        listed = ", ".join(f"{path} {error:.2%}" for path, error in worst)
        click.echo(f"quantization error (relative RMS), the worst: {listed}")


def _planned(
    source: str, recipe: "Recipe", dtype: str | None, directory: Path, *, dequantize: bool
) -> "Plan":
    """The plan of the output of `source`, from its config alone."""
    import mlx.core as mx

    from magistral_mlx.convert.job import refuse_quantized
    from magistral_mlx.convert.plan import plan
    from magistral_mlx.disk.configfile import read_directory

    config, stored = read_directory(directory)
    if not dequantize:
        refuse_quantized(config, source)
    return plan(config, recipe, getattr(mx, dtype or stored))


def _show_plan(plan: "Plan", recipe: "Recipe", missing: int | None) -> None:
    """The output of a dry run: sizes, and which Macs it fits."""
    click.echo(f"recipe            {recipe}")
    if missing:
        click.echo(f"to download       {size(missing)}")
    click.echo(
        f"on disk           {size(plan.total_bytes)} in {len(plan.heads)} file{'s' * (len(plan.heads) > 1)}"
    )
    click.echo(f"bits per weight   {plan.bits_per_weight:.2f}")
    click.echo(f"read per token    {size(plan.bytes_per_token)}, and the KV cache")
    click.echo("\nfits a Mac with   " + "".join(f"{memory:>7} GB" for memory in _MACS))
    for context in sorted({min(context, plan.config.max_context) for context in (8192, 40960)}):
        shown = "".join(f"{_fits(plan, context, memory):>10}" for memory in _MACS)
        click.echo(f"{context:6,} tokens    {shown}")
    click.echo("\nEstimates: the GPU gets 2/3 of a Mac's memory up to 32 GB and 3/4 above; 16-bit KV cache.")


def _fits(plan: "Plan", context: int, memory_gib: int) -> str:
    from magistral_mlx.memory import MemoryPlan, mac

    reply = MemoryPlan(
        config=plan.config, weights=plan.weight_bytes, context=context, machine=mac(memory_gib)
    )
    return f"{reply.total / reply.machine.budget:.0%}{'' if reply.fits else ' no'}"
