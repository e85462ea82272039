"""The layout of an output directory: every tensor's file, offset, dtype and shape, from the config alone.

Knows mlx-lm's directory format. Does not know sources, or how the bytes are written (`conversion`).
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx

from magistral_mlx.config import ModelConfig, Scheme
from magistral_mlx.disk.tensorfile import NAMES, Entry, plan_file

from .recipe import Recipe

SHARD_BYTES = 5 * 10**9
"""mlx-lm's limit for one file, which Hub tools expect."""

_Parts: TypeAlias = dict[str, tuple[str, tuple[int, ...]]]  # name → dtype, shape


@dataclass(frozen=True, kw_only=True)
class Plan:
    """heads: file name → header. outputs: source tensor → its parts: weight, then scales, then biases."""

    config: ModelConfig
    dtype: mx.Dtype
    heads: Mapping[str, bytes]
    outputs: Mapping[str, tuple[Entry, ...]]

    def scheme(self, name: str) -> Scheme | None:
        """How the source tensor `name` is quantized."""
        if len(self.outputs[name]) == 1 or self.config.quantization is None:
            return None
        return self.config.quantization.scheme(name.removesuffix(".weight"))

    @cached_property
    def weight_bytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries())

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + sum(len(head) for head in self.heads.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.weight_bytes / self.config.parameters

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights read for each decoded token: all but the embeddings, of which one row is read."""
        embeddings = self.outputs["model.embed_tokens.weight"]
        unread = 0 if self.config.tie_embeddings else sum(entry.nbytes for entry in embeddings)
        return self.weight_bytes - unread

    def file_bytes(self, file: str) -> int:
        """The final size of a file."""
        return len(self.heads[file]) + sum(e.nbytes for e in self.entries() if e.file.name == file)

    def entries(self) -> Iterator[Entry]:
        for parts in self.outputs.values():
            yield from parts

    def documents(self) -> dict[str, bytes]:
        """`config.json` and the index, as mlx-lm writes them."""
        weight_map = {entry.name: entry.file.name for entry in self.entries()}
        index = {
            "metadata": {"total_size": self.weight_bytes, "total_parameters": self.config.parameters},
            "weight_map": dict(sorted(weight_map.items())),
        }
        return {
            "config.json": to_json(self.config.to_json()),
            "model.safetensors.index.json": to_json(index),
        }


def plan(config: ModelConfig, recipe: Recipe, dtype: mx.Dtype) -> Plan:
    """Lay out `config`'s model quantized by `recipe`; norms, scales and unquantized matrices are `dtype`."""
    config = replace(config, quantization=recipe.quantization(config), has_vision=False)
    shapes: dict[str, tuple[int, ...]] = {f"{path}.weight": shape for path, shape in config.matrices()}
    shapes |= dict.fromkeys(config.vectors(), (config.dim,))
    parts = {name: _parts(config, name, shape, NAMES[dtype]) for name, shape in shapes.items()}
    heads, places = _lay_out(parts)
    outputs = {name: tuple(places[part] for part in own) for name, own in parts.items()}
    return Plan(config=config, dtype=dtype, heads=heads, outputs=outputs)


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=4, sort_keys=True) + "\n").encode()


def _parts(config: ModelConfig, name: str, shape: tuple[int, ...], dtype: str) -> _Parts:
    path = name.removesuffix(".weight")
    scheme = config.quantization.scheme(path) if config.quantization and len(shape) == 2 else None
    if scheme is None:
        return {name: (dtype, shape)}
    rows, columns = shape
    groups = (rows, columns // scheme.group_size)
    scales = {f"{path}.scales": (dtype if scheme.has_biases else "U8", groups)}
    biases = {f"{path}.biases": (dtype, groups)} if scheme.has_biases else {}
    return {name: ("U32", (rows, columns * scheme.bits // 32))} | scales | biases


def _lay_out(outputs: Mapping[str, _Parts]) -> tuple[dict[str, bytes], dict[str, Entry]]:
    """Fill files up to `SHARD_BYTES`, each matrix in one file with its scales; plan each file's header."""
    shards: list[_Parts] = [{}]
    filled = 0
    for parts in outputs.values():
        size = sum(entry.nbytes for entry in plan_file(Path(), parts)[1].values())
        if filled and filled + size > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1] |= parts
        filled += size
    heads: dict[str, bytes] = {}
    places: dict[str, Entry] = {}
    for number, shard in enumerate(shards, 1):
        name = (
            f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        )
        heads[name], entries = plan_file(Path(name), shard)
        places |= entries
    return heads, places
