"""The shape of a model and how its matrices are quantized, validated.

Knows numbers, and their keys in mlx-lm's `config.json`. Does not read files (`configfile`) or tensors
(`checkpoint`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, cast

from .errors import ConfigError

Mode: TypeAlias = Literal["affine", "mxfp4", "nvfp4", "mxfp8"]

MAX_LAYERS = 1000
"""Far more than any Mistral model has, so that a wrong config fails here and not in an allocation."""

_FLOAT_MODES: dict[str, tuple[int, int]] = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}
_AFFINE_BITS, _AFFINE_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How one matrix is quantized: `bits` per weight in groups of `group_size` along its input.

    `affine` keeps a scale and a bias per group; the float modes (OCP microscaling, NVIDIA's fp4) keep one
    8-bit scale and fix bits and group size.
    """

    bits: int = 4
    group_size: int = 64
    mode: Mode = "affine"

    def __post_init__(self) -> None:
        if self.mode == "affine":
            if self.bits not in _AFFINE_BITS or self.group_size not in _AFFINE_GROUPS:
                raise ConfigError(
                    f"affine quantization takes bits {_AFFINE_BITS} and group sizes {_AFFINE_GROUPS}, "
                    f"found bits={self.bits}, group_size={self.group_size}"
                )
        elif self.mode not in _FLOAT_MODES:
            known = ", ".join(["affine", *_FLOAT_MODES])
            raise ConfigError(f"the quantization mode is one of {known}, found {self.mode!r}")
        elif (self.bits, self.group_size) != _FLOAT_MODES[self.mode]:
            bits, group = _FLOAT_MODES[self.mode]
            raise ConfigError(
                f"{self.mode} means bits={bits}, group_size={group}; "
                f"found bits={self.bits}, group_size={self.group_size}"
            )

    @classmethod
    def of_mode(cls, mode: str, *, bits: int | None = None, group_size: int | None = None) -> "Scheme":
        """A scheme from what a user or a file states; what is left out takes the mode's default."""
        own_bits, own_group = _FLOAT_MODES.get(mode, (4, 64))
        return cls(
            bits=own_bits if bits is None else bits,
            group_size=own_group if group_size is None else group_size,
            mode=cast("Mode", mode),
        )

    @property
    def has_biases(self) -> bool:
        return self.mode == "affine"

    def to_json(self) -> dict[str, Any]:
        return {"bits": self.bits, "group_size": self.group_size, "mode": self.mode}


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """The scheme of every quantized module: a default, and overrides by module path (None: not quantized)."""

    default: Scheme = field(default_factory=Scheme)
    overrides: Mapping[str, Scheme | None] = field(default_factory=dict[str, Scheme | None])

    def scheme(self, path: str) -> Scheme | None:
        """The scheme of the module at `path` ("model.layers.0.mlp.down_proj")."""
        return self.overrides.get(path, self.default)

    def to_json(self) -> dict[str, Any]:
        """The dictionary that mlx-lm keeps under `quantization`: default and overrides side by side."""
        overrides = {path: s.to_json() if s else False for path, s in self.overrides.items()}
        return self.default.to_json() | overrides


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a Mistral decoder. Magistral Small: 40 layers, dim 5120, 32/8 heads of 128, FFN 32768."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    max_context: int
    tie_embeddings: bool | None = False
    """None: the config does not say; the checkpoint decides by whether it has an `lm_head`."""
    has_vision: bool = False
    """The checkpoint has a vision tower (2509); its tensors are left out."""
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        if self.n_layers > MAX_LAYERS:
            raise ConfigError(f"n_layers is at most {MAX_LAYERS}, found {self.n_layers}")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"n_heads is a multiple of n_kv_heads (grouped-query attention), "
                f"found {self.n_heads} and {self.n_kv_heads}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ConfigError(f"head_dim is even (RoPE rotates pairs), found {self.head_dim}")

    def matrices(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Every matrix, `(path, (out, in))`, in the order of a forward pass."""
        D, d, F = self.dim, self.head_dim, self.hidden_dim
        yield "model.embed_tokens", (self.vocab_size, D)
        for n in range(self.n_layers):
            layer = f"model.layers.{n}"
            yield f"{layer}.self_attn.q_proj", (self.n_heads * d, D)
            yield f"{layer}.self_attn.k_proj", (self.n_kv_heads * d, D)
            yield f"{layer}.self_attn.v_proj", (self.n_kv_heads * d, D)
            yield f"{layer}.self_attn.o_proj", (D, self.n_heads * d)
            yield f"{layer}.mlp.gate_proj", (F, D)
            yield f"{layer}.mlp.up_proj", (F, D)
            yield f"{layer}.mlp.down_proj", (D, F)
        if not self.tie_embeddings:
            yield "lm_head", (self.vocab_size, D)

    def vectors(self) -> Iterator[str]:
        """The name of every norm weight, each `(dim,)`."""
        for n in range(self.n_layers):
            yield f"model.layers.{n}.input_layernorm.weight"
            yield f"model.layers.{n}.post_attention_layernorm.weight"
        yield "model.norm.weight"

    @property
    def parameters(self) -> int:
        """Number of weights, however they are quantized: 23.57 billion for Magistral."""
        return sum(rows * columns for _, (rows, columns) in self.matrices()) + self.dim * len(
            [*self.vectors()]
        )

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of the KV cache per position: 160 KiB for Magistral in 16 bit."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * itemsize

    def to_json(self) -> dict[str, Any]:
        """`config.json` as mlx-lm, LM Studio and transformers read it.

        `head_dim` and `tie_word_embeddings` are always stated: mlx-lm's defaults for them are wrong for this
        model. `rope_theta` stands at the top level for mlx-lm, `rope_parameters` for transformers 5.
        """
        quantization = self.quantization.to_json() if self.quantization else None
        return {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "hidden_size": self.dim,
            "intermediate_size": self.hidden_dim,
            "head_dim": self.head_dim,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "num_hidden_layers": self.n_layers,
            "vocab_size": self.vocab_size,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "max_position_embeddings": self.max_context,
            "sliding_window": None,
            "tie_word_embeddings": bool(self.tie_embeddings),
            "bos_token_id": 1,
            "eos_token_id": 2,
        } | ({"quantization": quantization, "quantization_config": quantization} if quantization else {})


MAGISTRAL = ModelConfig(
    dim=5120,
    n_layers=40,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    hidden_dim=32768,
    vocab_size=131072,
    norm_eps=1e-5,
    rope_theta=1e9,
    max_context=131072,
)
"""Magistral Small (24B), 2506 and its successors: what this library is for."""
