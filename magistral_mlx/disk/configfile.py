"""`params.json` (Mistral) or `config.json` (HF, mlx-lm) → a `ModelConfig`.

JSON is parsed once, here. Settings that would silently give wrong logits if they were ignored (a RoPE
scaling, a sliding window, another architecture) are refused by name.

Does not know tensors, files other than the two JSON documents, or tokenizers.
"""

import json
import math
import reprlib
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

from magistral_mlx.config import ModelConfig, Quantization, Scheme
from magistral_mlx.errors import ConfigError

Json: TypeAlias = dict[str, Any]

_KINDS: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    dict: "an object",
}
_T = TypeVar("_T")


def read_params(path: Path) -> ModelConfig:
    """`params.json` of a Mistral-native checkpoint."""
    raw = read_json(path)
    with _about(path):
        return _from_params(_Fields(raw))


def read_config(path: Path) -> ModelConfig:
    """`config.json` of an HF or mlx-lm directory: `mistral`, or the text part of `mistral3`."""
    raw = read_json(path)
    with _about(path):
        return _from_config(_Fields(raw))


def _from_params(fields: "_Fields") -> ModelConfig:
    fields.refuse("moe", "is a mixture of experts; this is a decoder of dense layers")
    fields.refuse("sliding_window", "asks for sliding-window attention, which Magistral does not have")
    fields.refuse("yarn", "asks for a RoPE scaling, which Magistral does not have")
    fields.refuse("quantization", "is quantized in a foreign format; convert from the bf16 checkpoint")
    return ModelConfig(
        dim=fields.integer("dim"),
        n_layers=fields.integer("n_layers"),
        n_heads=fields.integer("n_heads"),
        n_kv_heads=fields.integer("n_kv_heads"),
        head_dim=fields.integer("head_dim"),
        hidden_dim=fields.integer("hidden_dim"),
        vocab_size=fields.integer("vocab_size"),
        norm_eps=fields.number("norm_eps"),
        rope_theta=fields.number("rope_theta"),
        max_context=fields.integer("max_position_embeddings", "max_seq_len", default=131072),
        tie_embeddings=fields.get(bool, "tied_embeddings", default=False),
        has_vision=isinstance(fields.raw.get("vision_encoder"), dict),
    )


def _from_config(top: "_Fields") -> ModelConfig:
    kind = top.get(str, "model_type")
    if kind not in ("mistral", "mistral3"):
        raise ConfigError(f"model_type is 'mistral' or 'mistral3', found {kind!r}")
    text = top.section("text_config") if kind == "mistral3" else top
    if kind == "mistral3" and text.raw.get("model_type", "mistral") != "mistral":
        raise ConfigError(f"the text model of a mistral3 is 'mistral', found {text.raw['model_type']!r}")
    text.refuse("sliding_window", "asks for sliding-window attention, which Magistral does not have")
    text.refuse("attention_bias", "asks for attention biases, which Magistral does not have")
    text.refuse("mlp_bias", "asks for feed-forward biases, which Magistral does not have")
    if (act := text.raw.get("hidden_act", "silu")) != "silu":
        raise ConfigError(f"hidden_act is 'silu', found {act!r}")
    dim, n_heads = text.integer("hidden_size"), text.integer("num_attention_heads")
    tie = text.raw.get("tie_word_embeddings", top.raw.get("tie_word_embeddings"))
    return ModelConfig(
        dim=dim,
        n_layers=text.integer("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=text.integer("num_key_value_heads", default=n_heads),
        head_dim=text.integer("head_dim", default=dim // max(n_heads, 1)),
        hidden_dim=text.integer("intermediate_size"),
        vocab_size=text.integer("vocab_size"),
        norm_eps=text.number("rms_norm_eps"),
        rope_theta=_rope_theta(text),
        max_context=text.integer("max_position_embeddings", default=131072),
        tie_embeddings=tie if isinstance(tie, bool) else None,
        has_vision=kind == "mistral3",
        quantization=_quantization(top),
    )


def read_directory(path: Path) -> tuple[ModelConfig, str]:
    """The config of a directory whose weights may not be there yet, and their dtype (default: bfloat16)."""
    if (params := path / "params.json").is_file():
        return read_params(params), "bfloat16"
    config = read_config(path / "config.json")
    raw = read_json(path / "config.json")
    levels: list[Json] = [raw, raw["text_config"]] if raw["model_type"] == "mistral3" else [raw]
    told = (level.get(name) for level in levels for name in ("dtype", "torch_dtype"))
    dtype = next((name for name in told if name in ("bfloat16", "float16", "float32")), "bfloat16")
    return replace(config, tie_embeddings=bool(config.tie_embeddings)), dtype


def read_json(path: Path) -> Json:
    """A JSON object from a file, or a `ConfigError` that names the file and what is wrong."""
    try:
        raw: object = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return cast("Json", raw)


@contextmanager
def _about(path: Path) -> Generator[None, None, None]:
    """Puts the file's name in front of every `ConfigError` raised inside."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _rope_theta(text: "_Fields") -> float:
    """RoPE's base, wherever the checkpoint's writer put it; any scaling is refused.

    transformers 5 writes `rope_parameters`; a reader of the top level alone would fall back to 10000 and
    generate nonsense.
    """
    for name in ("rope_parameters", "rope_scaling"):
        if text.raw.get(name) is None:
            continue
        section = text.section(name)
        if (kind := section.get(str, "rope_type", "type", default="default")) != "default":
            raise ConfigError(f"{name} asks for RoPE scaling {kind!r}, which Magistral does not have")
        if "rope_theta" in section.raw:
            return section.number("rope_theta")
    return text.number("rope_theta")


def _quantization(top: "_Fields") -> Quantization | None:
    """mlx-lm's `quantization`: the default scheme, and module paths whose value is a scheme or false."""
    name = "quantization" if top.raw.get("quantization") else "quantization_config"
    if not top.raw.get(name):
        return None
    section = top.section(name)
    if "quant_method" in section.raw or "group_size" not in section.raw:
        method = section.raw.get("quant_method", "unknown")
        raise ConfigError(
            f"weights are quantized by {method!r}, which is not MLX's format; "
            "convert from the bf16 checkpoint"
        )
    overrides: dict[str, Scheme | None] = {}
    for path, value in section.raw.items():
        if isinstance(value, dict):
            overrides[text_name(path)] = _scheme(section.section(path))
        elif value is False:
            overrides[text_name(path)] = None
    return Quantization(default=_scheme(section), overrides=overrides)


def _scheme(section: "_Fields") -> Scheme:
    return Scheme.of_mode(
        section.get(str, "mode", default="affine"),
        bits=section.integer("bits"),
        group_size=section.integer("group_size"),
    )


def text_name(name: str) -> str:
    """A text model's tensor name without the prefix of multimodal checkpoints (there are two spellings)."""
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name.removeprefix("language_model.")


class _Fields:
    """A JSON object read field by field, with type checks; each error names the field."""

    def __init__(self, raw: Json) -> None:
        self.raw = raw

    def get(self, kind: type[_T], *names: str, default: _T | None = None) -> _T:
        """The first of `names` that is there. A bool is not accepted as a number; an int is, as a float."""
        for name in names:
            value: object = self.raw.get(name)
            if value is None:
                continue
            if kind is float and type(value) is int and abs(value) < 2**53:
                value = float(value)
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise ConfigError(f"{name} is {_KINDS[kind]}, found {reprlib.repr(value)}")
            return cast("_T", value)
        if default is None:
            raise ConfigError(f"{' or '.join(names)} is missing")
        return default

    def integer(self, *names: str, default: int | None = None) -> int:
        """A positive count that fits 32 bits, as MLX's shapes do."""
        if not 1 <= (value := self.get(int, *names, default=default)) < 2**31:
            raise ConfigError(
                f"{' or '.join(names)} is a number from 1 to 2^31 - 1, found {reprlib.repr(value)}"
            )
        return value

    def number(self, name: str) -> float:
        if not 0 < (value := self.get(float, name)) < math.inf:
            raise ConfigError(f"{name} is positive and finite, found {value}")
        return value

    def section(self, name: str) -> "_Fields":
        return _Fields(cast("Json", self.get(dict, name)))

    def refuse(self, name: str, why: str) -> None:
        """A feature that the decoder does not have: any value but null, false or empty is an error."""
        if self.raw.get(name):
            raise ConfigError(f"{name} {why}")
