"""Opens and loads a Mistral checkpoint of any layout: its config, and every tensor by the model's name.

Reads Mistral's native layout (`params.json`), HF's (`config.json`, one file or shards), and mlx-lm's
quantized directories (also LM Studio's). Opening reads headers only. It is strict: config and files must
agree to the last tensor, and one error lists every difference.

Names are those of mlx-lm's format; native ones are in one table here and nowhere else.
Does not know tokenizers, the Hub, or how a quantized checkpoint is made (`convert`).
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias, cast

import mlx.core as mx

from magistral_mlx.config import ModelConfig, Scheme
from magistral_mlx.decoder.matrix import Matrix
from magistral_mlx.decoder.model import Transformer
from magistral_mlx.errors import CheckpointError

from .configfile import read_config, read_json, read_params, text_name
from .tensorfile import DTYPES, Entry, read_header, to_bytes

Layout: TypeAlias = Literal["native", "hf"]

_NATIVE = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_VISION = re.compile(
    r"(model\.)?(vision_tower|vision_encoder|multi_modal_projector|vision_language_adapter|"
    r"patch_merger|pre_mm_projector_norm)\."
)
_FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One tensor by its model name. heads: the number of heads, if its rows are in native RoPE order."""

    name: str
    entry: Entry
    heads: int | None = None

    @property
    def block(self) -> int:
        """Rows that must be read together: a whole head if rows are reordered, else one."""
        return self.entry.shape[0] // self.heads if self.heads else 1

    def read(self, start: int = 0, stop: int | None = None) -> mx.array:
        """Rows `start:stop` in the model's order; both are multiples of `block`."""
        return self.reorder(self.entry.read(start, stop))

    def reorder(self, rows: mx.array) -> mx.array:
        """(head, pair, 2) → (head, 2, pair): native RoPE pairs adjacent rows, HF's rows half a head apart."""
        if not self.heads:
            return rows
        return rows.reshape(-1, self.block // 2, 2, rows.shape[1]).transpose(0, 2, 1, 3).reshape(rows.shape)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened, checked checkpoint: its config, and where every tensor is. No weight has been read."""

    path: Path
    layout: Layout
    config: ModelConfig
    tensors: Mapping[str, Tensor]

    @cached_property
    def files(self) -> list[Path]:
        return sorted({tensor.entry.file for tensor in self.tensors.values()})

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of the norms, which are always floats: that of the weights, or of the scales of
        quantized ones.
        """
        return DTYPES[self.tensors["model.norm.weight"].entry.dtype]

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(tensor.entry.nbytes for tensor in self.tensors.values())

    def scheme(self, path: str) -> Scheme | None:
        """How the matrix at `path` is quantized: the files decide whether, the config how."""
        if f"{path}.scales" not in self.tensors or self.config.quantization is None:
            return None
        return self.config.quantization.scheme(path)

    def fingerprint(self) -> str:
        """A hash that tells a fine-tune from its original: over each norm, and the first row of each matrix.

        Without queries and keys, whose row order depends on the layout. Reads the files each time.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            if ".q_proj." not in name and ".k_proj." not in name:
                rows = None if len(tensor.entry.shape) == 1 else 1
                digest.update(name.encode() + to_bytes(tensor.entry.read(0, rows)))
        return digest.hexdigest()

    def nbytes(self, dtype: mx.Dtype) -> int:
        """Bytes of memory after a load that computes in `dtype`."""
        return sum(
            _count(tensor)
            * (dtype.size if tensor.entry.dtype in _FLOATS else DTYPES[tensor.entry.dtype].size)
            for tensor in self.tensors.values()
        )


def open_checkpoint(path: Path) -> Checkpoint:
    """Detect the layout, read config and headers, check every tensor. Reads no weights."""
    try:
        layout, files = _find(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    config = read_params(path / "params.json") if layout == "native" else read_config(path / "config.json")
    tensors = _collect(files, layout, config)
    if config.tie_embeddings is None:
        config = replace(config, tie_embeddings="lm_head.weight" not in tensors)
    if config.tie_embeddings:
        tensors.pop("lm_head.weight", None)  # some writers store the tied head twice
    checkpoint = Checkpoint(path=path, layout=layout, config=config, tensors=tensors)
    _check(checkpoint)
    return checkpoint


def load(checkpoint: Checkpoint, dtype: mx.Dtype) -> Transformer:
    """Read all weights and compute in `dtype` (floats are cast; packed weights stay packed).

    Tensor by tensor: memory peaks at the model plus one tensor.
    """
    return Transformer(checkpoint.config, Reader(checkpoint, dtype))


class Reader:
    """Passes a checkpoint's weights to the model, each evaluated and removed from the file's lazy arrays."""

    def __init__(self, checkpoint: Checkpoint, dtype: mx.Dtype) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._lazy = {file: _open(file) for file in checkpoint.files}

    def vector(self, path: str) -> mx.array:
        tensor = self._checkpoint.tensors[path]
        array = tensor.reorder(self._lazy[tensor.entry.file].pop(tensor.entry.name))
        if tensor.entry.dtype in _FLOATS:
            array = array.astype(self._dtype)
        mx.eval(array)
        return array

    def matrix(self, path: str) -> Matrix:
        if (scheme := self._checkpoint.scheme(path)) is None:
            return Matrix(weight=self.vector(f"{path}.weight"))
        return Matrix(
            weight=self.vector(f"{path}.weight"),
            scales=self.vector(f"{path}.scales"),
            biases=self.vector(f"{path}.biases") if scheme.has_biases else None,
            scheme=scheme,
        )


def _open(file: Path) -> dict[str, mx.array]:
    """A file's lazy arrays. MLX refuses unknown dtypes even in tensors that are not used."""
    try:
        return cast("dict[str, mx.array]", mx.load(str(file)))
    except RuntimeError as error:
        raise CheckpointError(f"{file} cannot be read by MLX: {error}") from error


def _find(path: Path) -> tuple[Layout, list[Path]]:
    """The layout of a directory, and its weight files."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; expected one with params.json or config.json")
    if (path / "params.json").is_file() and (files := sorted(path.glob("consolidated*.safetensors"))):
        return "native", files
    if (path / "config.json").is_file() and (files := _hf_files(path)):
        return "hf", files
    raise CheckpointError(_what_is_missing(path))


def _hf_files(path: Path) -> list[Path]:
    """The weight files: those the index names, else every `model*.safetensors`."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(path.glob("model*.safetensors"))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing or empty; expected names of tensors and files")
    names = sorted({str(name) for name in cast("dict[str, object]", weight_map).values()})
    for name in names:
        # A name in the index must not lead out of the directory; a symlink may: the Hub's cache uses them.
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} names {name!r}; expected a plain file name ending in .safetensors"
            )
        if not (path / name).is_file():
            raise CheckpointError(f"{index} names {name}, which is not there: the download is incomplete")
    return [path / name for name in names]


def _what_is_missing(path: Path) -> str:
    expected = (
        "expected params.json with consolidated.safetensors (Mistral), "
        "or config.json with model.safetensors or its shards (HF, MLX)"
    )
    if any(path.glob("*.gguf")):
        found = "found GGUF files, which llama.cpp reads; get the safetensors checkpoint"
    elif any(path.glob("*.pth")) or any(path.glob("*.bin")):
        found = "found pickled weights, which can run code and are never read; get the safetensors checkpoint"
    else:
        names = sorted(child.name for child in path.iterdir())
        found = "found " + (", ".join(names[:8]) + (" …" if len(names) > 8 else "") if names else "nothing")
    return f"{path} holds no checkpoint: {expected}; {found}"


def _collect(files: Iterable[Path], layout: Layout, config: ModelConfig) -> dict[str, Tensor]:
    """Every tensor of the files by its model name; those of a vision tower are left out."""
    heads = {"self_attn.q_proj": config.n_heads, "self_attn.k_proj": config.n_kv_heads}
    tensors: dict[str, Tensor] = {}
    for file in files:
        for found, entry in read_header(file).items():
            if (config.has_vision and _VISION.match(found)) or found.endswith("rotary_emb.inv_freq"):
                continue
            name = _from_native(found) if layout == "native" else text_name(found)
            if name in tensors:
                raise CheckpointError(
                    f"{name} occurs twice: in {tensors[name].entry.file.name} and {file.name}"
                )
            module = ".".join(name.split(".")[3:5])
            tensors[name] = Tensor(
                name=name, entry=entry, heads=heads.get(module) if layout == "native" else None
            )
    return tensors


def _from_native(name: str) -> str:
    """`layers.3.attention.wq.weight` → `model.layers.3.self_attn.q_proj.weight`.

    Unknown names are marked: HF names in a native file would otherwise pass for rows in native order.
    """
    layer = re.match(r"(layers\.\d+)\.(.+)\.weight$", name)
    if layer and layer[2] in _NATIVE:
        return f"model.{layer[1]}.{_NATIVE[layer[2]]}.weight"
    stem = name.removesuffix(".weight")
    return f"{_NATIVE[stem]}.weight" if stem in _NATIVE else f"{name} (no native name)"


def _check(checkpoint: Checkpoint) -> None:
    """Every tensor that the config implies must be there, with its shape and dtype, and no other."""
    expected = dict(_expected(checkpoint))
    tensors = checkpoint.tensors
    wrong = [f"missing: {name}" for name in expected if name not in tensors]
    wrong += [f"not of this model: {name}" for name in tensors if name not in expected]
    for name, (shape, dtypes) in expected.items():
        if (tensor := tensors.get(name)) is None:
            continue
        if tensor.entry.shape != shape:
            wrong.append(f"{name}: expected shape {list(shape)}, found {list(tensor.entry.shape)}")
        if tensor.entry.dtype not in dtypes:
            wrong.append(f"{name}: expected {' or '.join(dtypes)}, found {tensor.entry.dtype}")
    if wrong:
        raise CheckpointError(
            f"{checkpoint.path} is not the model that its config describes ({len(wrong)} differences):\n  "
            + "\n  ".join(wrong)
        )


def _expected(checkpoint: Checkpoint) -> Iterator[tuple[str, tuple[tuple[int, ...], tuple[str, ...]]]]:
    """Name → (shape, possible dtypes) of every tensor that must be there."""
    for path, (rows, columns) in checkpoint.config.matrices():
        scheme = checkpoint.scheme(path)
        if scheme is None:
            yield f"{path}.weight", ((rows, columns), _FLOATS)
            continue
        yield f"{path}.weight", ((rows, columns * scheme.bits // 32), ("U32",))
        groups = (rows, columns // scheme.group_size)
        yield f"{path}.scales", (groups, _FLOATS if scheme.mode == "affine" else ("U8",))
        if scheme.has_biases:
            yield f"{path}.biases", (groups, _FLOATS)
    for name in checkpoint.config.vectors():
        yield name, ((checkpoint.config.dim,), _FLOATS)


def _count(tensor: Tensor) -> int:
    return tensor.entry.nbytes // DTYPES[tensor.entry.dtype].size
