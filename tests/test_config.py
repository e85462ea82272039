"""`params.json` and `config.json`: what is read out of them, what is refused, and what is written back."""

import json
import math
from dataclasses import replace

import pytest
from transformers import MistralConfig

from magistral_mlx.config import MAX_LAYERS, ModelConfig, Quantization, Scheme
from magistral_mlx.disk.configfile import read_config, read_directory, read_params, text_name
from magistral_mlx.errors import ConfigError

PARAMS = {
    "dim": 5120,
    "n_layers": 40,
    "head_dim": 128,
    "hidden_dim": 32768,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "vocab_size": 131072,
    "rope_theta": 1000000000.0,
    "max_position_embeddings": 131072,
}
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
HF = MAGISTRAL.to_json() | {"rope_parameters": None}
MLX = {"group_size": 64, "bits": 4, "mode": "affine"}


def write_file(path, document, name="config.json"):
    """`document` (bytes as they are, anything else as JSON) in a file."""
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    (path / name).write_bytes(data)
    return path / name


def without(document, *names):
    return {name: value for name, value in document.items() if name not in names}


def test_params_of_magistral(tmp_path):
    assert read_params(write_file(tmp_path, PARAMS, "params.json")) == MAGISTRAL


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"tied_embeddings": True}, "tie_embeddings", True),
        ({"vision_encoder": {"hidden_size": 1024}}, "has_vision", True),
        ({"sliding_window": None, "moe": None, "quantization": None}, "dim", 5120),
        ({"max_position_embeddings": None, "max_seq_len": 40960}, "max_context", 40960),
        ({"max_position_embeddings": None}, "max_context", 131072),
        ({"rope_theta": 1000000000}, "rope_theta", 1e9),  # a whole number is a fine float
    ],
)
def test_params_fields(tmp_path, change, field, value):
    assert getattr(read_params(write_file(tmp_path, PARAMS | change)), field) == value


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (HF, "rope_theta", 1e9),
        (HF | {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta", 5e5),
        (HF | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e9}}, "rope_theta", 1e9),
        (HF | {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e9}}, "rope_theta", 1e9),
        (HF | {"rope_scaling": {"type": "default"}}, "rope_theta", 1e9),
        (HF | {"rope_scaling": None}, "rope_theta", 1e9),
        (HF, "tie_embeddings", False),
        (HF | {"tie_word_embeddings": True}, "tie_embeddings", True),
        (without(HF, "tie_word_embeddings"), "tie_embeddings", None),
        (without(HF, "head_dim"), "head_dim", 160),
        (HF | {"head_dim": None}, "head_dim", 160),
        (without(HF, "num_key_value_heads"), "n_kv_heads", 32),
        (without(HF, "max_position_embeddings"), "max_context", 131072),
        (HF | {"sliding_window": None, "attention_bias": False}, "n_layers", 40),
        ({"model_type": "mistral3", "text_config": HF}, "has_vision", True),
        ({"model_type": "mistral3", "text_config": without(HF, "model_type")}, "dim", 5120),
        (
            {"model_type": "mistral3", "tie_word_embeddings": True}
            | {"text_config": without(HF, "tie_word_embeddings")},
            "tie_embeddings",
            True,
        ),
    ],
)
def test_config_fields(tmp_path, config, field, value):
    assert getattr(read_config(write_file(tmp_path, config)), field) == value


def test_config_as_transformers_writes_it(tmp_path):
    """Version 5 keeps the RoPE base inside `rope_parameters` only, and wins over the top level there."""
    config = MistralConfig(
        hidden_size=192,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=512,
        vocab_size=320,
        rms_norm_eps=1e-5,
        sliding_window=None,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e9},
    )
    config.save_pretrained(tmp_path)
    assert "rope_theta" not in json.loads((tmp_path / "config.json").read_text())
    read = read_config(tmp_path / "config.json")
    assert (read.dim, read.n_layers, read.n_heads, read.n_kv_heads) == (192, 3, 8, 2)
    assert (read.head_dim, read.hidden_dim, read.vocab_size) == (32, 512, 320)
    assert (read.rope_theta, read.norm_eps, read.max_context) == (1e9, 1e-5, 4096)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "quantization",
    [
        None,
        Quantization(),
        Quantization(default=Scheme.of_mode("mxfp4")),
        Quantization(
            default=Scheme(bits=3, group_size=128),
            overrides={"lm_head": Scheme(bits=6), "model.layers.3.mlp.down_proj": None},
        ),
    ],
)
def test_written_config_is_read_back(tmp_path, quantization, tied):
    config = replace(MAGISTRAL, quantization=quantization, tie_embeddings=tied)
    assert read_config(write_file(tmp_path, config.to_json())) == config


@pytest.mark.parametrize(
    ("section", "path", "scheme"),
    [
        (MLX, "lm_head", Scheme()),
        ({"group_size": 64, "bits": 4}, "lm_head", Scheme()),  # written before there were modes
        (MLX | {"lm_head": {"group_size": 32, "bits": 6}}, "lm_head", Scheme(bits=6, group_size=32)),
        (MLX | {"lm_head": False}, "lm_head", None),
        (MLX | {"lm_head": True}, "lm_head", Scheme()),
        (MLX | {"language_model.lm_head": False}, "lm_head", None),
        (
            MLX | {"lm_head": {"group_size": 32, "bits": 8, "mode": "mxfp8"}},
            "lm_head",
            Scheme.of_mode("mxfp8"),
        ),
    ],
)
@pytest.mark.parametrize("name", ["quantization", "quantization_config"])
def test_quantization_section(tmp_path, section, path, scheme, name):
    quantization = read_config(write_file(tmp_path, HF | {name: section})).quantization
    assert quantization is not None
    assert quantization.scheme(path) == scheme
    assert quantization.scheme("model.embed_tokens") == Scheme()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        # invalid numbers
        *[({name: value}, [name, str(value)]) for name in PARAMS for value in (0, -1)],
        *[({name: "40"}, [name, "'40'"]) for name in PARAMS],
        *[({name: True}, [name, "True"]) for name in PARAMS],
        *[({name: [1]}, [name, "[1]"]) for name in PARAMS],
        *[({name: 10**4000}, [name, "1000"]) for name in PARAMS],
        *[({name: None}, [name, "missing"]) for name in PARAMS if name != "max_position_embeddings"],
        *[({"norm_eps": number}, ["norm_eps", str(number)]) for number in (math.nan, math.inf, -math.inf)],
        *[({"rope_theta": number}, ["rope_theta", str(number)]) for number in (math.nan, math.inf)],
        *[({name: math.nan}, [name, "nan"]) for name in ("dim", "n_layers")],
        ({"dim": 5120.0}, ["dim", "whole number", "5120.0"]),
        ({"n_layers": MAX_LAYERS + 1}, ["n_layers", "1001"]),
        ({"dim": 2**31}, ["dim", "2147483648"]),
        ({"n_kv_heads": 7}, ["multiple of n_kv_heads", "32 and 7"]),
        ({"n_kv_heads": 64}, ["multiple of n_kv_heads", "32 and 64"]),
        ({"head_dim": 127}, ["head_dim", "even", "127"]),
        ({"tied_embeddings": "no"}, ["tied_embeddings", "true or false", "'no'"]),
        # unsupported models
        ({"moe": {"num_experts": 8}}, ["moe", "experts"]),
        ({"sliding_window": 4096}, ["sliding_window"]),
        ({"sliding_window": [4096, None]}, ["sliding_window"]),
        ({"yarn": {"factor": 16}}, ["yarn", "RoPE scaling"]),
        ({"quantization": {"qformat_weight": "fp8_e4m3"}}, ["quantization", "bf16"]),
    ],
)
def test_invalid_params_are_refused(tmp_path, change, words):
    path = write_file(tmp_path, PARAMS | change, "params.json")
    with pytest.raises(ConfigError) as caught:
        read_params(path)
    assert all(word in str(caught.value) for word in [str(path), *words]), str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        *[
            (HF | {"model_type": kind}, [f"found '{kind}'"])
            for kind in ("llama", "mixtral", "qwen2", "gemma")
        ],
        (without(HF, "model_type"), ["model_type is missing"]),
        (HF | {"model_type": 5}, ["model_type is a string", "5"]),
        ({"model_type": "mistral3"}, ["text_config is missing"]),
        ({"model_type": "mistral3", "text_config": []}, ["text_config is an object", "[]"]),
        ({"model_type": "mistral3", "text_config": HF | {"model_type": "mistral4"}}, ["'mistral4'"]),
        (HF | {"sliding_window": 4096}, ["sliding_window"]),
        (HF | {"attention_bias": True}, ["attention_bias"]),
        (HF | {"mlp_bias": True}, ["mlp_bias"]),
        (HF | {"hidden_act": "gelu"}, ["hidden_act", "'gelu'"]),
        (HF | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["rope_scaling", "'yarn'"]),
        (HF | {"rope_scaling": {"type": "linear", "factor": 4.0}}, ["rope_scaling", "'linear'"]),
        (HF | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e9}}, ["rope_parameters", "'yarn'"]),
        (HF | {"rope_parameters": "yarn"}, ["rope_parameters is an object", "'yarn'"]),
        (HF | {"rope_parameters": {"rope_type": 5}}, ["rope_type is a string", "5"]),
        (HF | {"rope_parameters": {"rope_theta": "1e9"}}, ["rope_theta is a number", "'1e9'"]),
        (without(HF, "rope_theta"), ["rope_theta is missing"]),
        (HF | {"num_attention_heads": 0}, ["num_attention_heads", "0"]),
        (without(HF, "head_dim") | {"num_attention_heads": -1}, ["num_attention_heads", "-1"]),
        (without(HF, "head_dim") | {"num_attention_heads": 10**9}, ["head_dim", "0"]),
        *[
            (HF | {"quantization_config": {"quant_method": method}}, [f"'{method}'", "bf16"])
            for method in ("fp8", "bitsandbytes", "gptq", "awq", "compressed-tensors", "mxfp4")
        ],
        (HF | {"quantization_config": {"bits": 4}}, ["'unknown'", "bf16"]),
        (HF | {"quantization": "4bit"}, ["quantization is an object", "'4bit'"]),
        (HF | {"quantization": MLX | {"bits": 7}}, ["bits=7"]),
        (HF | {"quantization": MLX | {"bits": "4"}}, ["bits is a whole number", "'4'"]),
        (HF | {"quantization": MLX | {"group_size": 48}}, ["group_size=48"]),
        (HF | {"quantization": MLX | {"mode": "int4"}}, ["'int4'", "affine"]),
        (HF | {"quantization": MLX | {"mode": "mxfp4"}}, ["mxfp4", "group_size=32"]),
        (HF | {"quantization": MLX | {"lm_head": {"bits": 4}}}, ["group_size is missing"]),
    ],
)
def test_invalid_configs_are_refused(tmp_path, config, words):
    path = write_file(tmp_path, config)
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert all(word in str(caught.value) for word in [str(path), *words]), str(caught.value)


@pytest.mark.parametrize("read", [read_params, read_config])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"dim": }', "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b'{"model_type": "mistr\xe9l"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"dim": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[1, 2]", "found list"),
        (b"null", "found NoneType"),
        (b"{}", "missing"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_file_that_is_no_config_is_refused(tmp_path, read, data, words):
    path = write_file(tmp_path, data)
    with pytest.raises(ConfigError, match=words) as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("read", [read_params, read_config])
def test_missing_file_and_directory_are_refused(tmp_path, read):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("found", "name"),
    [
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("language_model.model.norm.weight", "model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
    ],
)
def test_text_name(found, name):
    assert text_name(found) == name


def test_default_values_of_each_mode():
    assert Scheme.of_mode("affine") == Scheme(bits=4, group_size=64, mode="affine")
    assert Scheme.of_mode("affine", bits=8, group_size=32) == Scheme(bits=8, group_size=32)
    for mode, bits, group in (("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)):
        scheme = Scheme.of_mode(mode)
        assert (scheme.bits, scheme.group_size, scheme.has_biases) == (bits, group, False)
    assert Scheme().has_biases


def test_cache_bytes_per_token():
    assert MAGISTRAL.kv_bytes_per_token(2) == 160 * 1024


def test_text_config_is_ignored_except_for_mistral3(tmp_path):
    path = write_file(tmp_path, HF | {"text_config": [1], "torch_dtype": "float16"})
    assert read_directory(path.parent)[1] == "float16"
