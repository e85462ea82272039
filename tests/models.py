"""Random checkpoints with Magistral's proportions, in every layout the package reads."""

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from magistral_mlx.config import ModelConfig

TINY = ModelConfig(
    dim=192,
    n_layers=3,
    n_heads=8,
    n_kv_heads=2,
    head_dim=32,
    hidden_dim=512,
    vocab_size=320,
    norm_eps=1e-5,
    rope_theta=1e9,
    max_context=4096,
)
"""head_dim is not dim / heads, four query heads share one key head, theta is 1e9: easily misread."""


def random_weights(
    config: ModelConfig = TINY, *, seed: int = 0, dtype: mx.Dtype = mx.float32
) -> dict[str, mx.array]:
    """Weights by model name, scaled so that activations neither vanish nor explode."""
    rng = np.random.default_rng(seed)
    weights = {
        f"{path}.weight": rng.normal(size=shape).astype(np.float32) * shape[1] ** -0.5 * 1.5
        for path, shape in config.matrices()
    }
    weights |= {name: 1 + 0.1 * rng.normal(size=config.dim).astype(np.float32) for name in config.vectors()}
    return {name: mx.array(array).astype(dtype) for name, array in weights.items()}


def write_hf(
    path: Path, config: ModelConfig = TINY, *, shards: int = 1, prefix: str = "", **weights: object
) -> Path:
    """An HF directory: one file, or shards with an index."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = {prefix + name: array for name, array in random_weights(config, **weights).items()}
    (path / "config.json").write_text(json.dumps(config.to_json()))
    save_shards(path, tensors, shards)
    return path


def save_shards(path: Path, tensors: dict[str, mx.array], shards: int) -> None:
    if shards == 1:
        mx.save_safetensors(str(path / "model.safetensors"), tensors)
        return
    names = sorted(tensors)
    weight_map = {
        name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)
    }
    for file in set(weight_map.values()):
        mx.save_safetensors(
            str(path / file), {name: tensors[name] for name in names if weight_map[name] == file}
        )
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_native(path: Path, config: ModelConfig = TINY, **weights: object) -> Path:
    """Mistral's own layout; the same random weights as `write_hf`, so both must give the same logits."""
    path.mkdir(parents=True, exist_ok=True)
    params = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "head_dim": config.head_dim,
        "hidden_dim": config.hidden_dim,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "norm_eps": config.norm_eps,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_context,
    }
    (path / "params.json").write_text(json.dumps(params))
    tensors = {
        native_name(name): native(name, array, config)
        for name, array in random_weights(config, **weights).items()
    }
    mx.save_safetensors(str(path / "consolidated.safetensors"), tensors)
    return path


def native_name(name: str) -> str:
    """HF name → native name, from the format's description and not from the package."""
    for ours, theirs in (
        ("model.embed_tokens", "tok_embeddings"),
        ("model.layers", "layers"),
        ("model.norm", "norm"),
        ("lm_head", "output"),
        ("self_attn.q_proj", "attention.wq"),
        ("self_attn.k_proj", "attention.wk"),
        ("self_attn.v_proj", "attention.wv"),
        ("self_attn.o_proj", "attention.wo"),
        ("mlp.gate_proj", "feed_forward.w1"),
        ("mlp.down_proj", "feed_forward.w2"),
        ("mlp.up_proj", "feed_forward.w3"),
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    ):
        name = name.replace(ours, theirs)
    return name


def native(name: str, array: mx.array, config: ModelConfig) -> mx.array:
    """HF → native row order of q and k: (head, 2, pair) → (head, pair, 2)."""
    for path, heads in (("q_proj", config.n_heads), ("k_proj", config.n_kv_heads)):
        if path in name:
            half = config.head_dim // 2
            return array.reshape(heads, 2, half, -1).transpose(0, 2, 1, 3).reshape(array.shape)
    return array


def wide_vocab(config: ModelConfig = TINY) -> ModelConfig:
    """The real vocabulary at a small width."""
    return replace(config, vocab_size=131072, dim=64, n_layers=2, n_heads=4, n_kv_heads=1, hidden_dim=128)
