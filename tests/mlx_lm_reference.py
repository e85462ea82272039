"""mlx-lm as the reference: it writes quantized directories for us to read, and reads what we write."""

import json
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from magistral_mlx.config import Scheme

SCHEMES = {
    **{
        f"{bits}-bit-g{group}": Scheme(bits=bits, group_size=group)
        for bits in (2, 3, 4, 5, 6, 8)
        for group in (32, 64, 128)
    },
    **{mode: Scheme.of_mode(mode) for mode in ("mxfp4", "nvfp4", "mxfp8")},
}


def quantized(
    source: Path, out: Path, scheme: Scheme, overrides: dict[str, Scheme | None] | None = None
) -> Path:
    """What `mlx_lm.convert -q` makes of an HF directory; `overrides` by module path, None: left alone."""

    def predicate(path, _):
        chosen = (overrides or {}).get(path, scheme)
        return True if chosen == scheme else chosen.to_json() if chosen else False

    model, config = load_model(source, lazy=True)
    model, config = quantize_model(
        model, config, scheme.group_size, scheme.bits, mode=scheme.mode, quant_predicate=predicate
    )
    save_model(out, model)
    save_config(config, out / "config.json")
    return out


def read(path: Path) -> dict[str, mx.array]:
    """Every array of a directory's weight files, by its stored name."""
    return {
        name: array
        for file in sorted(path.glob("*.safetensors"))
        for name, array in mx.load(str(file)).items()
    }


def config(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())


def same(a: mx.array, b: mx.array) -> bool:
    """Bit for bit, dtype and shape included."""
    return a.dtype == b.dtype and a.shape == b.shape and mx.array_equal(a, b).item()
