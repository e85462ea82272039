"""The plan of an output directory: the sizes of the real 24B model, from its config alone."""

import json
import os
from dataclasses import replace

import mlx.core as mx
import pytest

from magistral_mlx.config import MAGISTRAL, Scheme
from magistral_mlx.convert import plan
from magistral_mlx.convert.plan import SHARD_BYTES
from magistral_mlx.convert.recipe import RECIPES, named, uniform
from magistral_mlx.memory import MemoryPlan, mac
from tests import models

GB = 10**9


def planned(recipe, config=MAGISTRAL, dtype=mx.bfloat16):
    return plan.plan(config, recipe, dtype)


@pytest.fixture(autouse=True)
def _nothing_is_read(monkeypatch):
    """A plan is arithmetic: no file is opened for it."""

    def refuse(*_, **__):
        raise AssertionError

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(mx, "load", refuse)


def test_magistrals_parameters_are_counted():
    assert MAGISTRAL.parameters == planned(named("4bit")).config.parameters == 23_572_403_200


@pytest.mark.parametrize(
    ("name", "size", "bits", "per_token", "files"),
    [
        ("4bit", 13.26, 4.5, 12.9, 3),
        ("4bit-g32", 14.7, 5.0, 14.3, 3),
        ("mixed-4-6", 14.3, 4.85, 13.9, 3),
        ("6bit", 19.15, 6.5, 18.6, 4),
        ("8bit", 25.0, 8.5, 24.3, 6),
        ("mxfp4", 12.5, 4.25, 12.2, 3),
        ("nvfp4", 13.26, 4.5, 12.9, 3),
        ("bf16", 47.14, 16.0, 45.8, 10),
    ],
)
def test_magistrals_figures(name, size, bits, per_token, files):
    found = planned(named(name))
    assert found.total_bytes / GB == pytest.approx(size, rel=0.004)
    assert found.bits_per_weight == pytest.approx(bits, rel=0.003)
    assert found.bytes_per_token / GB == pytest.approx(per_token, rel=0.004)
    assert len(found.heads) == files
    assert all(found.file_bytes(file) <= SHARD_BYTES for file in found.heads)
    assert sum(map(found.file_bytes, found.heads)) == found.total_bytes


def test_sizes_in_4_bit_are_exact():
    """Half a byte a weight and two 16-bit numbers a group of 64; the norms; embeddings are not read."""
    vectors = 81 * 5120
    matrices = MAGISTRAL.parameters - vectors
    embeddings = 131072 * 5120
    found = planned(named("4bit"))
    assert found.weight_bytes == matrices * 36 // 64 + 2 * vectors == 13_260_072_960
    assert found.bytes_per_token == found.weight_bytes - embeddings * 36 // 64


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32], ids=str)
def test_headers_hold_every_tensor_end_to_end(recipe, dtype):
    found = planned(recipe, dtype=dtype)
    entries = list(found.entries())
    index = json.loads(found.documents()["model.safetensors.index.json"])
    assert index["metadata"] == {"total_size": found.weight_bytes, "total_parameters": MAGISTRAL.parameters}
    assert index["weight_map"] == {entry.name: entry.file.name for entry in entries}
    for file, head in found.heads.items():
        assert len(head) % 8 == 0
        header = json.loads(head[8:])
        assert header.pop("__metadata__") == {"format": "mlx"}
        place = len(head)
        for entry in (entry for entry in entries if entry.file.name == file):
            assert header.pop(entry.name)["data_offsets"] == [
                place - len(head),
                place - len(head) + entry.nbytes,
            ]
            assert entry.offset == place
            place += entry.nbytes
        assert not header
        assert place == found.file_bytes(file)
    for name, parts in found.outputs.items():
        assert len({part.file for part in parts}) == 1, name  # a matrix and its scales are in one file
        scheme = found.scheme(name)
        assert len(parts) == (1 if scheme is None else 3 if scheme.has_biases else 2)


def test_the_shapes_of_a_quantized_matrix():
    parts = planned(named("mixed-4-6")).outputs["model.layers.0.mlp.down_proj.weight"]
    assert [(part.name.rpartition(".")[2], part.dtype, part.shape) for part in parts] == [
        ("weight", "U32", (5120, 32768 * 6 // 32)),
        ("scales", "BF16", (5120, 512)),
        ("biases", "BF16", (5120, 512)),
    ]
    parts = planned(named("nvfp4")).outputs["lm_head.weight"]
    assert [(part.dtype, part.shape) for part in parts] == [("U32", (131072, 640)), ("U8", (131072, 320))]


def test_config_json_says_what_is_planned():
    found = planned(named("4bit").but([("lm_head", "bf16"), ("*.v_proj", "8bit")]))
    raw = json.loads(found.documents()["config.json"])
    section = raw["quantization"]
    assert section == raw["quantization_config"]
    assert section["lm_head"] is False
    assert section["model.layers.39.self_attn.v_proj"] == Scheme(bits=8).to_json()
    assert len(section) == 3 + 1 + 40
    assert "quantization" not in json.loads(planned(named("bf16")).documents()["config.json"])


def test_tied_embeddings_are_read_for_every_token():
    found = planned(named("4bit"), replace(MAGISTRAL, tie_embeddings=True))
    assert "lm_head.weight" not in found.outputs
    assert found.bytes_per_token == found.weight_bytes


def test_a_source_with_a_vision_tower_becomes_a_text_model():
    assert planned(named("4bit"), replace(MAGISTRAL, has_vision=True)) == planned(named("4bit"))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_bits_per_weight(bits, group):
    found = planned(uniform(Scheme(bits=bits, group_size=group)))
    assert found.bits_per_weight == pytest.approx(bits + 32 / group, rel=1e-3)


def test_a_small_model_has_one_file():
    found = planned(named("4bit"), models.TINY)
    (head,) = found.heads.values()
    assert list(found.heads) == ["model.safetensors"]
    assert found.total_bytes == found.file_bytes("model.safetensors") == found.weight_bytes + len(head)


# What fits ------------------------------------------------------------------------------------------------


def plan_of_reply(name: str, context: int, gib: int) -> MemoryPlan:
    weights = planned(named(name)).weight_bytes
    return MemoryPlan(config=MAGISTRAL, weights=weights, context=context, machine=mac(gib))


def test_a_reply_needs_weights_cache_and_activations():
    """Weights, 160 KiB of KV cache per token, and less than 1.5 GB for a prefill chunk's activations."""
    assert MAGISTRAL.kv_bytes_per_token(2) == 160 * 1024
    assert pytest.approx(40960 * 163840 / GB, abs=0.02) == 6.7
    for context in (8192, 40960):
        plan = plan_of_reply("4bit", context, 32)
        held = plan.weights + context * 163840
        assert held < plan.total < held + 1.5 * GB


@pytest.mark.parametrize(
    ("name", "context", "fits"),
    [
        ("4bit", 8192, [False, True, True, True, True]),
        ("4bit", 40960, [False, False, True, True, True]),
        ("8bit", 8192, [False, False, False, True, True]),
        ("8bit", 40960, [False, False, False, True, True]),
        ("bf16", 8192, [False, False, False, False, True]),
        ("bf16", 40960, [False, False, False, False, False]),
    ],
)
def test_which_macs_fit_each_recipe(name, context, fits):
    assert [plan_of_reply(name, context, gib).fits for gib in (16, 24, 32, 48, 64)] == fits
