"""Non-finite and extreme weights: found in the source's bits, named, refused, or converted."""

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from magistral_mlx.config import Scheme
from magistral_mlx.convert import quantize
from magistral_mlx.convert.conversion import Job, convert
from magistral_mlx.convert.recipe import RECIPES, named, uniform
from magistral_mlx.disk.checkpoint import load, open_checkpoint
from magistral_mlx.errors import ConversionError
from tests import mlx_lm_reference, models

SMALL = replace(models.TINY, dim=64, n_layers=1, n_heads=4, n_kv_heads=2, hidden_dim=128, vocab_size=256)
BITS = {
    mx.float32: (np.uint32, "F32"),
    mx.bfloat16: (np.uint16, "BF16"),
    mx.float16: (np.uint16, "F16"),
}
NONFINITE = {
    mx.float32: [0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF],
    mx.bfloat16: [0x7F80, 0xFF80, 0x7FC0, 0xFFC0, 0x7F81, 0xFFFF],
    mx.float16: [0x7C00, 0xFC00, 0x7E00, 0xFE00, 0x7C01, 0xFFFF],
}
"""Infinities, quiet and signalling NaNs, of both signs."""
EXTREME = {
    mx.float32: [0x80000000, 0x00000001, 0x807FFFFF, 0x00800000, 0x7F7FFFFF],
    mx.bfloat16: [0x8000, 0x0001, 0x807F, 0x0080, 0x7F7F],
    mx.float16: [0x8000, 0x0001, 0x83FF, 0x0400, 0x7BFF],
}
"""Minus zero, the smallest and largest subnormal, the smallest normal, the largest finite number."""
NAMES = ["model.embed_tokens", "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj", "lm_head"]


def with_bits(path, dtype, name, bits, *, place=-1):
    """An HF checkpoint in which one number of the tensor `name` has these bits."""
    weights = models.random_weights(SMALL, dtype=dtype)
    kind, _ = BITS[dtype]
    array = np.array(weights[name].view(mx.uint32 if dtype == mx.float32 else mx.uint16))
    array.reshape(-1)[place] = kind(bits)
    weights[name] = mx.array(array).view(dtype)
    models.write_hf(path, SMALL)
    models.save_shards(path, weights, 1)
    return path


def converted(source, out, **options):
    return convert(Job(checkpoint=open_checkpoint(source), out=out, **options))


def as_bytes(array):
    """The array's bytes, so that a NaN equals itself."""
    return bytes(memoryview(array.view(mx.uint8)))


# Non-finite weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "bits"), [(dtype, bits) for dtype, all_bits in NONFINITE.items() for bits in all_bits]
)
def test_nonfinite_weights_are_refused_by_name(tmp_path, dtype, bits):
    source = with_bits(tmp_path / "source", dtype, "model.layers.0.mlp.down_proj.weight", bits)
    with pytest.raises(
        ConversionError,
        match=r"model\.layers\.0\.mlp\.down_proj\.weight holds weights that are not finite \(NaN or Inf\): "
        ".*get it again, or give --allow-nonfinite",
    ):
        converted(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", ["nvfp4", "bf16"])
@pytest.mark.parametrize("name", [*(f"{path}.weight" for path in NAMES), "model.norm.weight"])
@pytest.mark.parametrize("place", [0, -1])
def test_nonfinite_weights_are_found_in_every_tensor(tmp_path, monkeypatch, name, recipe, place):
    """In the first row block and in the last."""
    monkeypatch.setattr(quantize, "BLOCK_BYTES", 2000)
    source = with_bits(tmp_path / "source", mx.bfloat16, name, 0x7FC0, place=place)
    with pytest.raises(ConversionError, match=f"{name} holds weights that are not finite"):
        converted(source, tmp_path / "out", recipe=named(recipe))


def test_errors_about_native_tensors_use_the_models_names(tmp_path):
    """q and k are reordered to HF's rows; the non-finite value is still found."""
    source = models.write_native(tmp_path / "source", SMALL, dtype=mx.bfloat16)
    file = source / "consolidated.safetensors"
    tensors = mx.load(str(file))
    tensors["layers.0.attention.wq.weight"][5, 5] = float("inf")
    mx.save_safetensors(str(file), tensors)
    with pytest.raises(ConversionError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight holds"):
        converted(source, tmp_path / "out")


def test_the_quantizer_alone_would_hide_a_nan():
    """Why the source is checked: a NaN's group would get ordinary scales and codes."""
    weight = mx.zeros((1, 64)).at[0, 3].add(float("nan"))
    assert mx.isfinite(mx.dequantize(*mx.quantize(weight, bits=4))).sum() > 0


@pytest.mark.parametrize("recipe", ["4bit", "mxfp4", "bf16"])
@pytest.mark.parametrize("bits", [0x7FC0, 0x7F80, 0xFF80])
def test_nonfinite_weights_can_be_allowed(tmp_path, recipe, bits):
    """Bit for bit what the quantizer makes of it; the manifest stays JSON, and the matrix is the worst."""
    source = with_bits(tmp_path / "source", mx.bfloat16, "lm_head.weight", bits, place=0)
    made = converted(source, tmp_path / "out", recipe=named(recipe), allow_nonfinite=True)
    found, raw = mlx_lm_reference.read(tmp_path / "out"), mlx_lm_reference.read(source)["lm_head.weight"]
    scheme = named(recipe).default
    options = {"group_size": scheme.group_size, "bits": scheme.bits, "mode": scheme.mode} if scheme else {}
    expected = mx.quantize(raw, **options) if scheme else [raw]
    for part, array in zip(("weight", "scales", "biases"), expected, strict=False):
        assert as_bytes(found[f"lm_head.{part}"]) == as_bytes(array)

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "out" / "mistral" / "manifest.json").read_text()
    errors = json.loads(text, parse_constant=refuse)["relative_rms_error"]
    assert all(error is None or 0 < error < 1 for error in errors.values())
    assert {path for path, error in errors.items() if error is None} <= {"lm_head"}
    assert all(error > 0 for error in made.errors.values())
    if made.errors and errors["lm_head"] is None:
        assert max(made.errors, key=lambda path: made.errors[path]) == "lm_head"


# Extreme finite weights --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "bits"), [(dtype, bits) for dtype, all_bits in EXTREME.items() for bits in all_bits]
)
@pytest.mark.parametrize("recipe", ["4bit", "bf16"])
def test_extreme_finite_weights_are_converted(tmp_path, dtype, bits, recipe):
    source = with_bits(tmp_path / "source", dtype, "lm_head.weight", bits)
    made = converted(source, tmp_path / "out", recipe=named(recipe))
    assert all(0 < error < 1 for error in made.errors.values())
    found = mlx_lm_reference.read(tmp_path / "out")
    raw = mlx_lm_reference.read(source)["lm_head.weight"]
    if recipe == "bf16":
        assert as_bytes(found["lm_head.weight"]) == as_bytes(raw)
    else:
        expected = mx.quantize(raw)
        assert mlx_lm_reference.same(found["lm_head.weight"], expected[0])
        assert mlx_lm_reference.same(found["lm_head.scales"], expected[1])
        assert mlx_lm_reference.same(found["lm_head.biases"], expected[2])


@pytest.mark.parametrize(
    ("dtype", "bits", "options"),
    [
        (mx.bfloat16, 0x7F7F, {"dtype": mx.float16, "recipe": named("bf16")}),
        (mx.float32, 0x47800000, {"dtype": mx.float16}),  # 65536
        (mx.float32, 0x47800000, {"dtype": mx.float16, "recipe": named("mxfp4")}),
        (mx.float32, 0x7F7FFFFF, {"dtype": mx.bfloat16, "recipe": named("bf16")}),
    ],
)
def test_weights_too_large_for_the_dtype_are_refused(tmp_path, dtype, bits, options):
    """Infinities that were finite in the source: the target's dtype is too small."""
    source = with_bits(tmp_path / "source", dtype, "lm_head.weight", bits)
    with pytest.raises(
        ConversionError,
        match=r"lm_head\.weight holds weights too large for .* in B?F16; choose another --dtype",
    ):
        converted(source, tmp_path / "out", **options)
    converted(source, tmp_path / "out", allow_nonfinite=True, **options)


def test_weights_too_large_for_their_scale_are_refused(tmp_path):
    """The largest numbers of both signs in one group: their difference overflows 32 bits."""
    weights = models.random_weights(SMALL, dtype=mx.bfloat16)
    weights["lm_head.weight"][3, 4] = 3e38
    weights["lm_head.weight"][3, 5] = -3e38
    source = models.write_hf(tmp_path / "source", SMALL)
    models.save_shards(source, weights, 1)
    with pytest.raises(ConversionError, match=r"lm_head\.weight holds weights too large for .* in BF16"):
        converted(source, tmp_path / "out")
    shutil.rmtree(tmp_path / ".out.partial")
    converted(source, tmp_path / "out", recipe=named("bf16"))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_zero_rows_stay_exactly_zero(tmp_path, recipe):
    """A matrix of zeros, and rows of zeros in others: exact, without error, and finite logits."""
    weights = models.random_weights(SMALL)
    weights["model.layers.0.mlp.up_proj.weight"] *= 0
    weights["lm_head.weight"][100:] = 0
    weights["model.embed_tokens.weight"][:2] = 0
    source = models.write_hf(tmp_path / "source", SMALL)
    models.save_shards(source, weights, 1)
    made = converted(source, tmp_path / "out", recipe=recipe)
    assert made.errors.get("model.layers.0.mlp.up_proj", 0.0) == 0.0
    ids = mx.array([[0, 1, 200]])
    model = load(open_checkpoint(tmp_path / "out"), mx.float32)
    ours = np.array(model.logits(model(ids, model.new_caches())))
    assert np.isfinite(ours).all()
    assert (ours[..., 100:] == 0).all()
    assert (ours[:, 2, :100] != 0).all()
    theirs, _ = load_model(tmp_path / "out")
    theirs.set_dtype(mx.float32)
    np.testing.assert_allclose(np.array(theirs(ids)), ours, atol=1e-3 * np.abs(ours).max())


# The row block -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_blocks_of_a_packed_source_are_as_small_as_others(tmp_path, monkeypatch, bits):
    """A packed row is small, and many times as large once it is dequantized."""
    source = models.write_hf(tmp_path / "source", SMALL, dtype=mx.bfloat16)
    converted(source, tmp_path / "packed", recipe=uniform(Scheme(bits=bits)))
    monkeypatch.setattr(quantize, "BLOCK_BYTES", 16 * SMALL.dim * 2)
    checkpoint = open_checkpoint(tmp_path / "packed")
    found = list(quantize.blocks(checkpoint, "lm_head.weight", None, mx.bfloat16))
    assert [(block.first, block.rows) for block in found] == [(first, 16) for first in range(0, 256, 16)]
    assert all(block.parts[0].nbytes <= quantize.BLOCK_BYTES for block in found)


def test_blocks_are_whole_heads(tmp_path, monkeypatch):
    """Native rows of q and k are reordered within a head, so a head is read at once even in small blocks."""
    source = models.write_native(tmp_path / "source", SMALL)
    monkeypatch.setattr(quantize, "BLOCK_BYTES", 1)
    checkpoint = open_checkpoint(source)
    for kind, heads, rows in (("q", 4, 32), ("k", 2, 32), ("v", 64, 1)):
        name = f"model.layers.0.self_attn.{kind}_proj.weight"
        found = list(quantize.blocks(checkpoint, name, Scheme(), mx.float32))
        assert [(block.first, block.rows) for block in found] == [(n * rows, rows) for n in range(heads)]
