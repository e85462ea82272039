"""How fast does it run here? `magistral-mlx bench`, also on random models of the real depth and vocabulary.

    python benchmarks/tokens_per_second.py demo --against mlx-lm
    python benchmarks/tokens_per_second.py --shape 24b --width-scale 1 --against mlx-lm --length 64

`--shape 24b` makes a model of random weights with Magistral's 40 layers and 131072 ids, but narrow: 64 wide
times the scale, feed-forward 256, 4 query heads and 1 KV head, each 32 wide. Costs that do not shrink with
the width show on any machine: Python's time, the number of kernels, the sampler. It is converted to 4 bit by
the package itself. `--scales` sets the dtype of its scales, in which both engines compute.

All other arguments are those of `magistral-mlx bench`; the model comes first (default: "demo"). Writes
`benchmarks/results/<machine>.json` and `.svg` unless `--json` is given. `--expected` prints the table of
docs/benchmarks.md.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from magistral_mlx import MagistralError, memory
from magistral_mlx.cli.bench import bench as command
from magistral_mlx.config import MAGISTRAL, ModelConfig
from magistral_mlx.convert.conversion import Job, convert
from magistral_mlx.convert.plan import plan, to_json
from magistral_mlx.convert.recipe import named
from magistral_mlx.disk.checkpoint import open_checkpoint
from magistral_mlx.fetch.hub import DEMO
from magistral_mlx.measure import figures, machine
from magistral_mlx.text.sidecars import files

HERE = Path(__file__).parent


SHAPES = {"24b": MAGISTRAL}
BEST_SHARE = 0.76
"""Share of the ceiling: the best published run of a sibling (Mistral Small 24B at 4 bit on an M3 Ultra)."""


def narrowed(config: ModelConfig, scale: int) -> ModelConfig:
    """The same depth and vocabulary, and a very small width."""
    return replace(
        config, dim=64 * scale, hidden_dim=256 * scale, n_heads=4 * scale, n_kv_heads=scale, head_dim=32
    )


def make(directory: Path, config: ModelConfig, dtype: mx.Dtype) -> Path:
    """Random weights, scaled so that activations neither die nor explode, at 4 bit in groups of 64."""
    kept = mx.bfloat16
    keys = iter(mx.random.split(mx.random.key(0), len(list(config.matrices()))))
    weights = {
        f"{path}.weight": (mx.random.normal(shape, key=next(keys)) * (1.5 * shape[1] ** -0.5)).astype(kept)
        for path, shape in config.matrices()
    }
    weights |= {name: mx.ones(config.dim, kept) for name in config.vectors()}
    name = f"random-{config.n_layers}-layers-{config.dim}-wide-4bit-{str(dtype).removeprefix('mlx.core.')}"
    source, out = directory / "source", directory / name
    source.mkdir()
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    (source / "config.json").write_bytes(to_json(config.to_json()))
    beside = files(DEMO, name="demo", recipe="4bit", context=config.max_context)
    convert(Job(checkpoint=open_checkpoint(source), out=out, dtype=dtype, sidecars=beside, verify=False))
    return out


def expected() -> list[str]:
    """Computed, not measured: Magistral at 4 bit on every chip, the table in docs/benchmarks.md."""
    read = plan(MAGISTRAL, named("4bit"), mx.bfloat16).bytes_per_token
    model = {"read_bytes_per_token": read, "kv_bytes_per_token": MAGISTRAL.kv_bytes_per_token(2)}
    lines = [
        "| chip | GB/s | ceiling, 0 | expected, 0 | ceiling, 40,960 | expected, 40,960 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for chip, bandwidth in machine.CHIPS.items():
        smaller = (
            {f"{chip}, fewer than 40 GPU cores": machine.SMALLER[chip]} if chip in machine.SMALLER else {}
        )
        for name, speed in (smaller | {chip: bandwidth}).items():
            limits = [figures.ceiling(speed * 1e9, model, context) for context in (0, 40960)]
            cells = " | ".join(f"{limit:.1f} | {BEST_SHARE * limit:.1f}" for limit in limits)
            lines.append(f"| {name} | {speed} | {cells} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this depth and vocabulary")
    parser.add_argument("--width-scale", type=int, default=1, help="times 64 wide; default: 1")
    parser.add_argument("--scales", choices=["float32", "bfloat16"], help="default: as loading computes")
    parser.add_argument("--expected", action="store_true", help="print the table by arithmetic, and stop")
    args, words = parser.parse_known_args()
    if args.expected:
        print("\n".join(expected()))
        return
    if not any(word.startswith("--json") for word in words):
        words += ["--json", str(HERE / "results" / f"{machine.this_computer().name}.json")]
    with tempfile.TemporaryDirectory() as directory:
        if args.shape:
            dtype = getattr(mx, args.scales) if args.scales else memory.default_dtype()
            config = narrowed(SHAPES[args.shape], args.width_scale)
            made = make(Path(directory), config, dtype)
            words += [str(made), "--dtype", made.name.rpartition("-")[2]]
        elif not words or words[0].startswith("-"):
            words.insert(0, "demo")
        try:
            command.main(words, prog_name=Path(__file__).name, standalone_mode=True)
        except MagistralError as error:
            sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
