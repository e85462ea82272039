"""Every layout gives the same tensors; a checkpoint that contradicts its config is refused."""

import errno
import json
import os
import pickle
import random
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magistral_mlx.config import Scheme
from magistral_mlx.disk.checkpoint import load, open_checkpoint
from magistral_mlx.disk.tensorfile import plan_file
from magistral_mlx.errors import CheckpointError, ConfigError, MagistralError
from tests import mlx_lm_reference, models
from tests.mlx_lm_reference import SCHEMES, same

FLAT = replace(models.TINY, dim=128, n_layers=2, hidden_dim=256, vocab_size=96)
"""Every row is a multiple of 128, so that every group size divides it."""
MICRO = replace(
    models.TINY, dim=8, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=4, hidden_dim=16, vocab_size=12
)
LAYER = 9
"""Tensors of one layer."""


def write_zeros(path, config=MICRO, change=None, *, name="model.safetensors"):
    """An HF directory of the right names and shapes, all zeros; `change` edits name → (dtype, shape)."""
    tensors = {name: ("BF16", array.shape) for name, array in models.random_weights(config).items()}
    if change:
        change(tensors)
    path.mkdir(exist_ok=True)
    head, entries = plan_file(path / name, tensors)
    (path / name).write_bytes(head + bytes(sum(entry.nbytes for entry in entries.values())))
    write_config(path, config.to_json())
    return path


def modules(config):
    """Every matrix of a model: its path, and the length of its rows."""
    weights = models.random_weights(config)
    return {name.removesuffix(".weight"): a.shape[1] for name, a in weights.items() if a.ndim == 2}


def write_config(path, config):
    (path / "config.json").write_text(json.dumps(config))


def edit_config(path, **change):
    write_config(path, mlx_lm_reference.config(path) | change)
    return path


def differences(error):
    """The differences that the error about a refused checkpoint lists."""
    first, *lines = str(error).split("\n")
    assert f"({len(lines)} differences)" in first
    return [line.strip() for line in lines]


# Every layout ------------------------------------------------------------------------------------------


def native_shards(path):
    models.write_native(path)
    whole = mx.load(str(path / "consolidated.safetensors"))
    for part in (0, 1):
        tensors = {name: array for i, (name, array) in enumerate(sorted(whole.items())) if i % 2 == part}
        mx.save_safetensors(str(path / f"consolidated-{part + 1:05}-of-00002.safetensors"), tensors)
    (path / "consolidated.safetensors").unlink()


def both_layouts(path):
    """As in Mistral's repository on the Hub; the native files are used."""
    models.write_hf(path, shards=2)
    models.write_native(path)


def without_index(path):
    models.write_hf(path, shards=3)
    (path / "model.safetensors.index.json").unlink()


def hub_cache(path):
    """Every file of a snapshot is a link into `blobs`."""
    blobs, snapshot = path.parent / "blobs", models.write_hf(path, shards=2)
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(Path("..") / "blobs" / str(number))


def mistral3(rename, vision):
    """A writer of a multimodal checkpoint whose text tensors are renamed, beside a vision tower."""

    def write(path):
        path.mkdir()
        tensors = {rename(name): array for name, array in models.random_weights().items()}
        tensors |= {name: mx.zeros((2, 2)) for name in vision}
        models.save_shards(path, tensors, shards=2)
        text = models.TINY.to_json() | {"tie_word_embeddings": None}
        write_config(
            path,
            {
                "model_type": "mistral3",
                "text_config": text,
                "vision_config": {},
                "tie_word_embeddings": False,
            },
        )

    return write


def native_vision(path):
    models.write_native(path)
    params = json.loads((path / "params.json").read_text())
    (path / "params.json").write_text(json.dumps(params | {"vision_encoder": {"hidden_size": 2}}))
    names = ("vision_encoder.ln_pre", "vision_language_adapter.w_in", "patch_merger.merging_layer")
    vision = {f"{name}.weight": mx.zeros((2, 2)) for name in names}
    mx.save_safetensors(str(path / "consolidated-vision.safetensors"), vision)


def rotary_buffers(path):
    """Old transformers kept RoPE's frequencies among the weights."""
    models.write_hf(path)
    mx.save_safetensors(
        str(path / "model-buffers.safetensors"),
        {"model.layers.0.self_attn.rotary_emb.inv_freq": mx.zeros(16)},
    )


LAYOUTS = {
    "native": models.write_native,
    "native shards": native_shards,
    "native with vision": native_vision,
    "both": both_layouts,
    "hf": models.write_hf,
    "hf shards": lambda path: models.write_hf(path, shards=3),
    "hf shards without index": without_index,
    "hub cache": hub_cache,
    "rotary buffers": rotary_buffers,
    "mistral3": mistral3(
        lambda name: f"language_model.{name}",
        ["vision_tower.patch_conv.weight", "multi_modal_projector.linear_1.weight"],
    ),
    "mistral3 of transformers 5": mistral3(
        lambda name: name.replace("model.", "model.language_model.", 1),
        ["model.vision_tower.patch_conv.weight", "model.multi_modal_projector.norm.weight"],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tensors(tmp_path, layout):
    path = tmp_path / "model"
    LAYOUTS[layout](path)
    checkpoint = open_checkpoint(path)
    weights = models.random_weights()
    assert set(checkpoint.tensors) == set(weights)
    assert all(same(tensor.read(), weights[name]) for name, tensor in checkpoint.tensors.items())
    assert replace(checkpoint.config, has_vision=False) == models.TINY
    assert checkpoint.layout == ("native" if layout.startswith(("native", "both")) else "hf")
    assert all(file.parent == path for file in checkpoint.files)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_every_float_dtype_is_read(tmp_path, dtype):
    checkpoint = open_checkpoint(models.write_native(tmp_path, FLAT, dtype=dtype))
    weights = models.random_weights(FLAT, dtype=dtype)
    assert checkpoint.dtype == dtype
    assert all(same(tensor.read(), weights[name]) for name, tensor in checkpoint.tensors.items())


def test_native_rows_are_read_in_blocks_of_heads(tmp_path):
    tensors = open_checkpoint(models.write_native(tmp_path)).tensors
    for name, heads in (("q_proj", 8), ("k_proj", 2)):
        tensor = tensors[f"model.layers.1.self_attn.{name}.weight"]
        whole = tensor.read()
        assert tensor.block == models.TINY.head_dim
        blocks = [tensor.read(head * 32, head * 32 + 32) for head in range(heads)]
        assert same(mx.concatenate(blocks), whole)
    assert tensors["model.layers.1.self_attn.v_proj.weight"].block == 1


def test_native_rows_are_reordered_as_by_a_loop(tmp_path):
    """RoPE turns rows 2i and 2i + 1 of a native head together, i and i + head_dim / 2 of HF's."""
    checkpoint = open_checkpoint(models.write_native(tmp_path))
    raw = mx.load(str(tmp_path / "consolidated.safetensors"))
    for ours, theirs, heads in (("q_proj", "wq", 8), ("k_proj", "wk", 2)):
        native_rows = np.array(raw[f"layers.2.attention.{theirs}.weight"])
        hf_rows = np.array(checkpoint.tensors[f"model.layers.2.self_attn.{ours}.weight"].read())
        for head in range(heads):
            for i in range(16):
                for part in (0, 1):
                    assert (hf_rows[head * 32 + part * 16 + i] == native_rows[head * 32 + 2 * i + part]).all()


@pytest.mark.parametrize(
    ("claimed", "has_head", "tied"),
    [(True, False, True), (True, True, True), (False, True, False), (None, True, False), (None, False, True)],
)
def test_embeddings_are_tied_by_the_config_or_without_a_head(tmp_path, claimed, has_head, tied):
    path = write_zeros(tmp_path, change=None if has_head else lambda tensors: tensors.pop("lm_head.weight"))
    edit_config(path, tie_word_embeddings=claimed)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.tie_embeddings is tied
    assert ("lm_head.weight" in checkpoint.tensors) is not tied
    model = load(checkpoint, mx.float32)
    assert (model.head is model.embedding) is tied


def test_native_embeddings_are_tied_by_the_params(tmp_path):
    models.write_native(tmp_path, replace(MICRO, tie_embeddings=True))
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
        open_checkpoint(tmp_path)
    params = json.loads((tmp_path / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps(params | {"tied_embeddings": True}))
    assert open_checkpoint(tmp_path).config.tie_embeddings is True


# Quantized directories that mlx-lm wrote ------------------------------------------------------------------


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    return models.write_hf(tmp_path_factory.mktemp("flat"), FLAT)


def compare_with_mlx_lm(path, scheme_of, *, prefix=""):
    """Opened and loaded, every packed array is what mlx-lm reads."""
    checkpoint = open_checkpoint(path)
    theirs = mlx_lm_reference.read(path)
    assert {prefix + name for name in checkpoint.tensors} == set(theirs)
    assert all(same(tensor.read(), theirs[prefix + name]) for name, tensor in checkpoint.tensors.items())
    for module in modules(checkpoint.config):
        assert checkpoint.scheme(module) == scheme_of(module), module
    model = load(checkpoint, mx.float32)
    down = model.blocks[1].feed_forward.down
    name = f"{prefix}model.layers.1.mlp.down_proj"
    assert down.scheme == scheme_of("model.layers.1.mlp.down_proj")
    assert all(
        same(ours, theirs[f"{name}.{part}"])
        for part, ours in (("weight", down.weight), ("scales", down.scales), ("biases", down.biases))
        if ours is not None
    )
    return checkpoint


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_directories_quantized_by_mlx_lm_are_read(tmp_path, flat, scheme):
    compare_with_mlx_lm(mlx_lm_reference.quantized(flat, tmp_path / "out", scheme), lambda _: scheme)


def test_overrides_of_mlx_lm_are_read(tmp_path, flat):
    overrides = {
        "lm_head": SCHEMES["6-bit-g128"],
        "model.embed_tokens": SCHEMES["mxfp8"],
        "model.layers.0.mlp.down_proj": SCHEMES["8-bit-g32"],
        "model.layers.1.self_attn.v_proj": None,  # mlx-lm then writes floats and says nothing
        "model.layers.0.self_attn.k_proj": None,
    }
    path = mlx_lm_reference.quantized(flat, tmp_path / "out", Scheme(), overrides)
    section = mlx_lm_reference.config(path)["quantization"]
    edit_config(path, quantization=section | {"model.layers.0.self_attn.k_proj": False})
    compare_with_mlx_lm(path, lambda module: overrides.get(module, Scheme()))


def test_rows_that_no_group_divides_are_read_unquantized(tmp_path):
    source = models.write_hf(tmp_path / "source")  # dim 192, hidden 512
    scheme = SCHEMES["4-bit-g128"]
    path = mlx_lm_reference.quantized(source, tmp_path / "out", scheme)
    unquantized = {module for module, columns in modules(models.TINY).items() if columns % 128}
    assert len(unquantized) == 2 + 5 * 3
    compare_with_mlx_lm(path, lambda module: None if module in unquantized else scheme)


def test_a_quantized_mistral3_is_read(tmp_path):
    write = mistral3(lambda name: f"language_model.{name}", ["vision_tower.patch_conv.weight"])
    write(tmp_path / "source")
    overrides = {"language_model.lm_head": SCHEMES["6-bit-g64"]}
    path = mlx_lm_reference.quantized(tmp_path / "source", tmp_path / "out", Scheme(), overrides)
    compare_with_mlx_lm(
        path, lambda module: overrides.get(f"language_model.{module}", Scheme()), prefix="language_model."
    )


def test_a_quantized_model_with_tied_embeddings_is_read(tmp_path):
    source = models.write_hf(tmp_path / "source", replace(FLAT, tie_embeddings=True))
    path = mlx_lm_reference.quantized(source, tmp_path / "out", Scheme())
    assert compare_with_mlx_lm(path, lambda _: Scheme()).config.tie_embeddings is True


@pytest.mark.parametrize("name", ["4-bit-g64", "mxfp8"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_bytes_of_a_load_are_predicted(tmp_path, flat, name, dtype):
    """The bytes predicted for a load are those it takes."""
    for path in (flat, mlx_lm_reference.quantized(flat, tmp_path / "out", SCHEMES[name])):
        checkpoint = open_checkpoint(path)
        model = load(checkpoint, dtype)
        arrays = [*model.embedding.arrays(), *model.head.arrays(), model.norm]
        for block in model.blocks:
            attention, ffn = block.attention, block.feed_forward
            arrays += [block.attention_norm, block.ffn_norm]
            for matrix in (attention.qkv, attention.out, ffn.gate_up, ffn.down):
                arrays += matrix.arrays()
        assert sum(array.nbytes for array in arrays) == checkpoint.nbytes(dtype)
        assert {array.dtype for array in arrays} <= {dtype, mx.uint32, mx.uint8}


# Bad input ----------------------------------------------------------------------------------------------


def test_one_error_lists_every_difference(tmp_path):
    def change(tensors):
        del tensors["lm_head.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = ("BF16", (16, 8))
        tensors["lm_head.bias"] = ("BF16", (12,))
        tensors["model.norm.weight"] = ("BF16", (8, 1))
        tensors["model.embed_tokens.weight"] = ("BF16", (13, 8))
        tensors["model.layers.0.self_attn.o_proj.weight"] = ("F8_E4M3", (8, 8))
        tensors["model.layers.0.input_layernorm.weight"] = ("F64", (8,))
        tensors["model.layers.0.mlp.down_proj.weight"] = ("I32", (1,))  # wrong shape and dtype

    path = write_zeros(tmp_path, change=change)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert sorted(differences(caught.value)) == sorted(
        [
            "missing: lm_head.weight",
            "missing: model.layers.1.mlp.up_proj.weight",
            "not of this model: model.layers.2.mlp.up_proj.weight",
            "not of this model: lm_head.bias",
            "model.norm.weight: expected shape [8], found [8, 1]",
            "model.embed_tokens.weight: expected shape [12, 8], found [13, 8]",
            "model.layers.0.self_attn.o_proj.weight: expected BF16 or F16 or F32, found F8_E4M3",
            "model.layers.0.input_layernorm.weight: expected BF16 or F16 or F32, found F64",
            "model.layers.0.mlp.down_proj.weight: expected shape [8, 16], found [1]",
            "model.layers.0.mlp.down_proj.weight: expected BF16 or F16 or F32, found I32",
        ]
    )


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ({"num_hidden_layers": 1}, LAYER),
        ({"num_hidden_layers": 3}, LAYER),
        ({"num_hidden_layers": 1000}, 998 * LAYER),
        ({"vocab_size": 13}, 2),
        ({"intermediate_size": 17}, 3 * 2),
        ({"num_attention_heads": 4}, 2 * 2),
        ({"num_key_value_heads": 2}, 2 * 2),
        ({"head_dim": 8}, 4 * 2),
        ({"hidden_size": 2**31 - 1}, 2 + LAYER * 2 + 1),
        (
            {"head_dim": None, "num_attention_heads": 1},
            2 * 2,
        ),  # 1 head of 8 is 2 of 4; keys and values are not
        ({"quantization": Scheme().to_json()}, 0),  # nothing is packed: the files decide
    ],
    ids=str,
)
def test_a_config_that_contradicts_the_weights_is_refused(tmp_path, change, lines):
    path = edit_config(write_zeros(tmp_path), **change)
    if not lines:
        assert open_checkpoint(path).scheme("lm_head") is None
        return
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert len(differences(caught.value)) == lines


@pytest.mark.parametrize(
    ("section", "line"),
    [
        (None, "lm_head.weight: expected BF16 or F16 or F32, found U32"),
        ({"bits": 8}, "lm_head.weight: expected shape [96, 32], found [96, 16]"),
        ({"group_size": 32}, "lm_head.scales: expected shape [96, 4], found [96, 2]"),
        ({"mode": "mxfp4", "group_size": 32}, "not of this model: lm_head.biases"),
        ({"lm_head": False}, "lm_head.weight: expected BF16 or F16 or F32, found U32"),
        (
            {"lm_head": {"bits": 2, "group_size": 64}},
            "lm_head.weight: expected shape [96, 8], found [96, 16]",
        ),
    ],
    ids=str,
)
def test_a_config_that_contradicts_the_quantization_is_refused(tmp_path, flat, section, line):
    path = mlx_lm_reference.quantized(flat, tmp_path / "out", Scheme())
    claimed = section and Scheme().to_json() | section
    edit_config(path, quantization=claimed, quantization_config=claimed)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert line in differences(caught.value)


def test_hf_names_in_a_native_file_are_refused(tmp_path):
    """Their rows would be permuted wrongly, and the model would generate nonsense."""
    models.write_native(tmp_path, MICRO)
    mx.save_safetensors(str(tmp_path / "consolidated.safetensors"), models.random_weights(MICRO))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert len(differences(caught.value)) == 2 * len(models.random_weights(MICRO))
    assert "not of this model: model.norm.weight (no native name)" in differences(caught.value)


def test_native_fp8_is_refused(tmp_path):
    models.write_native(tmp_path, MICRO)
    file = tmp_path / "consolidated.safetensors"
    tensors = {name: ("BF16", array.shape) for name, array in mx.load(str(file)).items()}
    tensors |= {"output.weight": ("F8_E4M3", (12, 8)), "output.qscale_weight": ("F32", ())}
    head, _ = plan_file(file, tensors)
    file.write_bytes(
        head
        + bytes(sum(np.prod(s, dtype=int) * {"BF16": 2, "F32": 4}.get(d, 1) for d, s in tensors.values()))
    )
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert differences(caught.value) == [
        "not of this model: output.qscale_weight (no native name)",
        "lm_head.weight: expected BF16 or F16 or F32, found F8_E4M3",
    ]


def test_a_tensor_in_two_files_is_refused(tmp_path):
    write_zeros(tmp_path)
    write_zeros(tmp_path, name="model-copy.safetensors")
    with pytest.raises(
        CheckpointError, match=r"occurs twice: in model-copy\.safetensors and model\.safetensors"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            {"weight_map": {"a": "../model.safetensors"}},
            "names '../model.safetensors'; expected a plain file name",
        ),
        ({"weight_map": {"a": "/etc/model.safetensors"}}, "names '/etc/model.safetensors'; expected a plain"),
        ({"weight_map": {"a": "sub/model.safetensors"}}, "names 'sub/model.safetensors'; expected a plain"),
        ({"weight_map": {"a": "./model.safetensors"}}, r"names './model.safetensors'; expected a plain"),
        ({"weight_map": {"a": "sub\\model.safetensors"}}, "expected a plain file name"),
        ({"weight_map": {"a": ".."}}, "names '..'; expected a plain"),
        ({"weight_map": {"a": ""}}, "names ''; expected a plain"),
        ({"weight_map": {"a": "model.bin"}}, "names 'model.bin'; expected a plain"),
        ({"weight_map": {"a": 5}}, "names '5'; expected a plain"),
        ({"weight_map": {"a": None}}, "names 'None'; expected a plain"),
        ({"weight_map": {"a": ["model.safetensors"]}}, "expected a plain"),
        (
            {"weight_map": {"a": "model-2.safetensors"}},
            "model-2.safetensors, which is not there: the download",
        ),
        ({"weight_map": {"a": "\0.safetensors"}}, "not there"),
        ({"weight_map": {"a": "\ud800.safetensors"}}, "not there"),
        ({"weight_map": {"a": "x" * 5000 + ".safetensors"}}, "cannot be read: File name too long|not there"),
        ({"weight_map": {}}, "weight_map is missing or empty"),
        ({"weight_map": ["model.safetensors"]}, "weight_map is missing or empty"),
        ({}, "weight_map is missing or empty"),
        ([], "expected a JSON object, found list"),
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_invalid_index_is_refused(tmp_path, index, message):
    path = write_zeros(tmp_path / "model")
    write_zeros(path / "sub")
    (tmp_path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    data = index if isinstance(index, bytes) else json.dumps(index).encode()
    (path / "model.safetensors.index.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_an_index_without_one_of_the_shards_is_refused(tmp_path):
    path = models.write_hf(tmp_path, MICRO, shards=2)
    index = path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    kept = {name: file for name, file in weight_map.items() if "00001-of" in file}
    index.write_text(json.dumps({"weight_map": kept}))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert set(differences(caught.value)) == {f"missing: {name}" for name in weight_map.keys() - kept.keys()}


class Explosive:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "expected params.json with consolidated.safetensors.*found nothing"),
        ({"README.md": b"#"}, "found README.md"),
        ({f"{i}.txt": b"" for i in range(20)}, r"found 0\.txt, .* …"),
        ({"config.json": b"{}"}, "found config.json"),
        ({"params.json": b"{}"}, "found params.json"),
        ({"model.safetensors": b""}, "found model.safetensors"),
        ({"config.json": b"{}", "model-Q4_K_M.gguf": b"GGUF"}, "found GGUF files, which llama.cpp reads"),
        (
            {"config.json": b"{}", "pytorch_model.bin": pickle.dumps(Explosive())},
            "pickled weights.*never read",
        ),
        (
            {"params.json": b"{}", "consolidated.00.pth": pickle.dumps(Explosive())},
            "pickled weights.*never read",
        ),
        ({"params.json": b"{}", "consolidated.safetensors": b""}, "params.json: .* missing"),
        ({"config.json": b"{}", "model.safetensors": b""}, "config.json: model_type is missing"),
        ({"config.json": b"\xff", "model.safetensors": b""}, "config.json is not JSON"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_directories_without_a_checkpoint_are_refused(tmp_path, monkeypatch, files, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model"
    path.mkdir()
    for name, data in files.items():
        (path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen2", "gemma"])
def test_another_architecture_is_refused(tmp_path, kind):
    path = edit_config(write_zeros(tmp_path), model_type=kind)
    with pytest.raises(ConfigError, match=f"model_type is 'mistral' or 'mistral3', found '{kind}'"):
        open_checkpoint(path)


def test_a_path_that_is_no_directory_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    for path in (file, tmp_path / "none", Path("\0")):
        with pytest.raises(CheckpointError, match=r"is not a directory; expected one with params\.json"):
            open_checkpoint(path)


def test_an_unreadable_directory_is_an_error(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        open_checkpoint(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "."])
def test_unreadable_files_are_an_error(tmp_path, name):
    path = write_zeros(tmp_path / "model")
    (path / name).chmod(0)
    try:
        with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
            open_checkpoint(path)
    finally:
        (path / name).chmod(0o700)


def test_a_header_that_only_mlx_refuses_is_an_error(tmp_path):
    file = write_zeros(tmp_path) / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data.replace(b'{"format":"mlx"}', b'{"format":12345}'))
    with pytest.raises(CheckpointError, match=f"{file} cannot be read by MLX"):
        load(open_checkpoint(tmp_path), mx.float32)


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    return write_zeros(tmp_path_factory.mktemp("micro"))


@given(st.data())
def test_weights_cut_off_anywhere_are_refused(micro, data):
    file = micro / "model.safetensors"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        with pytest.raises(CheckpointError, match=r"model\.safetensors.* was cut off"):
            open_checkpoint(micro)
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_damaged_files_are_read_or_refused_by_name(micro, name):
    """A checkpoint with a damaged header or config still loads, or the error names it."""
    file = micro / name
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little") if name.endswith("safetensors") else len(whole)
    rng = random.Random(0)
    refused = 0
    try:
        for _ in range(300):
            data = bytearray(whole)
            for _ in range(rng.choice((1, 1, 2, 5))):
                data[rng.randrange(header)] = rng.choice((rng.randrange(256), *b'"{}[]:,0123456789-e.'))
            file.write_bytes(data)
            try:
                load(open_checkpoint(micro), mx.float32)
            except MagistralError as error:
                refused += 1
                assert str(micro) in str(error)  # noqa: PT017 -- loading is as good
    finally:
        file.write_bytes(whole)
    assert 100 < refused < 300
