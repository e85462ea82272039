"""Make a checkpoint of Magistral's true shape in a second, with almost no disk space.

    python scripts/sparse_checkpoint.py DIR [--layout native|hf] [--layers 40] [--words DIR]

The header is real and the file has its real size, 47 GB with all 40 layers, but it is sparse: weights are
zeros that take no room, except for some real random tensors spread over the file, so that a wrong offset,
order or permutation in a reader is detected. tekken.json is the demo model's (its vocabulary is smaller),
unless --words names a directory with another.
"""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from magistral_mlx.config import MAGISTRAL, ModelConfig
from magistral_mlx.disk.tensorfile import Entry, plan_file
from magistral_mlx.fetch.hub import DEMO

NATIVE = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "model.": "",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def real_names(config: ModelConfig) -> list[str]:
    """The tensors that hold random numbers: every norm, and one of each kind of matrix up to 42 MB."""
    layers = config.n_layers
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj")
    spread = {f"model.layers.{i * (layers - 1) // 3}.self_attn.{kind}.weight" for i, kind in enumerate(kinds)}
    return [*config.vectors(), *sorted(spread)]


def random_bits(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Normally distributed numbers as bfloat16 bits, seeded by the name."""
    rng = np.random.default_rng(list(name.encode()))
    floats = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
    return (floats.view(np.uint32) >> 16).astype(np.uint16)


def write_sparse(
    path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], real: dict[str, str], *, full: bool = False
) -> None:
    """One file: the header, a hole, and the tensors of `real` (name in the file → name that seeds it).

    full: instead of holes, the same few random rows over and over, for benchmarks that must read the disk.
    """
    head, entries = plan_file(path, tensors)
    last: Entry = list(entries.values())[-1]
    with path.open("wb") as file:
        file.write(head)
        file.truncate(last.offset + last.nbytes)
        rows = random_bits("rows", (2**22,)).tobytes()
        for start in range(len(head), last.offset + last.nbytes, len(rows)) if full else ():
            file.write(rows[: last.offset + last.nbytes - start])
        for name, seed in real.items():
            file.seek(entries[name].offset)
            file.write(random_bits(seed, entries[name].shape).tobytes())


def make(
    directory: Path,
    *,
    layout: str = "native",
    layers: int = 40,
    config: ModelConfig = MAGISTRAL,
    full: bool = False,
    words: Path = DEMO,
) -> None:
    """Write the checkpoint to `directory`, which must not exist."""
    config = replace(config, n_layers=layers)
    directory.mkdir(parents=True)
    shapes: dict[str, tuple[int, ...]] = {f"{path}.weight": shape for path, shape in config.matrices()}
    shapes |= dict.fromkeys(config.vectors(), (config.dim,))
    names = {name: native_name(name) if layout == "native" else name for name in shapes}
    tensors = {names[name]: ("BF16", shape) for name, shape in sorted(shapes.items())}
    real = {names[name]: name for name in real_names(config)}
    if layout == "native":
        write_sparse(directory / "consolidated.safetensors", tensors, real, full=full)
        (directory / "params.json").write_text(json.dumps(params(config), indent=1))
    else:
        write_sparse(directory / "model.safetensors", tensors, real, full=full)
        (directory / "config.json").write_text(json.dumps(config.to_json(), indent=1))
    for name in ("tekken.json", "SYSTEM_PROMPT.txt"):
        shutil.copy((words if (words / name).is_file() else DEMO) / name, directory)


def native_name(name: str) -> str:
    """A model's tensor name as Mistral's native name."""
    for ours, theirs in NATIVE.items():
        name = name.replace(ours, theirs)
    return name


def params(config: ModelConfig) -> dict[str, float]:
    """`params.json`."""
    names = ("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps", "vocab_size")
    own = {name: getattr(config, name) for name in names}
    return own | {"rope_theta": config.rope_theta, "max_position_embeddings": config.max_context}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layout", choices=["native", "hf"], default="native")
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--words", type=Path, default=DEMO, help="a directory with a tekken.json")
    args = parser.parse_args()
    make(args.directory, layout=args.layout, layers=args.layers, words=args.words)
    files = sorted(args.directory.glob("*.safetensors"))
    size, room = (
        sum(count(file) for file in files)
        for count in (lambda f: f.stat().st_size, lambda f: f.stat().st_blocks * 512)
    )
    print(f"{args.directory}: {size / 1e9:.1f} GB, {room / 1e6:.0f} MB on disk")


if __name__ == "__main__":
    main()
