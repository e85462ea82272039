"""Recipes: the scheme of each matrix, and the same logits here and in mlx-lm for every recipe."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.convert import mixed_quant_predicate_builder
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.utils import load_model

from magistral_mlx.config import Scheme
from magistral_mlx.convert.conversion import Job, convert
from magistral_mlx.convert.recipe import RECIPES, Recipe, named, uniform
from magistral_mlx.disk.checkpoint import load, open_checkpoint
from magistral_mlx.errors import ConfigError, ConversionError
from tests import mlx_lm_reference, models

CONFIG = replace(models.TINY, dim=128, n_layers=8, hidden_dim=256)
"""Eight layers: the first and the last eighth are one each."""
IDS = mx.array([[1, 17, 300, 4, 250, 99, 3, 3, 128]])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """In float32, where MLX's CPU products are exact enough to compare."""
    return models.write_native(tmp_path_factory.mktemp("source"), CONFIG)


def converted(source, out, recipe, **options):
    convert(Job(checkpoint=open_checkpoint(source), out=out, recipe=recipe, **options))
    return out


def our_logits(path):
    model = load(open_checkpoint(path), mx.float32)
    return np.array(model.logits(model(IDS, model.new_caches())))


def mlx_lm_logits(path):
    model, _ = load_model(path)
    model.set_dtype(mx.float32)
    return np.array(model(IDS))


def assert_same_logits(path):
    found, expected = our_logits(path), mlx_lm_logits(path)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


def schemes(recipe, config=CONFIG):
    quantization = recipe.quantization(config)
    return {path: quantization.scheme(path) if quantization else None for path, _ in config.matrices()}


# Each recipe ---------------------------------------------------------------------------------------------

EXCEPTIONS = {
    "bf16 head": named("4bit").but([("lm_head", "bf16")]),
    "only feed-forwards": named("bf16").but([("*.mlp.*", "4bit"), ("*.down_proj", "6bit")]),
    "modes mixed": named("nvfp4").but([("model.layers.?.self_attn.*", "mxfp4"), ("lm_head", "8bit")]),
    "mixed and more": named("mixed-4-6").but([("model.embed_tokens", "8bit")]),
    "uniform": uniform(Scheme(bits=3, group_size=128)),
    "mxfp8": uniform(Scheme.of_mode("mxfp8")),
}


@pytest.mark.parametrize("recipe", [*RECIPES.values(), *EXCEPTIONS.values()], ids=[*RECIPES, *EXCEPTIONS])
def test_the_same_logits_here_and_in_mlx_lm(source, tmp_path, recipe):
    out = converted(source, tmp_path / "out", recipe)
    assert_same_logits(out)
    checkpoint = open_checkpoint(out)
    assert {path: checkpoint.scheme(path) for path, _ in CONFIG.matrices()} == schemes(recipe)
    assert checkpoint.config == replace(CONFIG, quantization=recipe.quantization(CONFIG))


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("4bit", Scheme(bits=4, group_size=64)),
        ("4bit-g32", Scheme(bits=4, group_size=32)),
        ("6bit", Scheme(bits=6, group_size=64)),
        ("8bit", Scheme(bits=8, group_size=64)),
        ("mxfp4", Scheme(bits=4, group_size=32, mode="mxfp4")),
        ("nvfp4", Scheme(bits=4, group_size=16, mode="nvfp4")),
        ("bf16", None),
    ],
)
def test_uniform_recipes_have_one_scheme_for_every_matrix(name, scheme):
    assert set(schemes(named(name)).values()) == {scheme}


@pytest.mark.parametrize("layers", [1, 7, 8, 9, 16, 24, 40])
def test_mixed_4_6_has_the_schemes_of_mlx_lm(layers):
    """Module by module, by mlx-lm's own predicate on its own model with as many layers."""
    config = replace(CONFIG, n_layers=layers)
    model = Model(ModelArgs.from_dict(config.to_json()))
    predicate = mixed_quant_predicate_builder("mixed_4_6", model)
    theirs = {
        path: Scheme(**predicate(path, module))
        for path, module in model.named_modules()
        if hasattr(module, "to_quantized")
    }
    assert schemes(named("mixed-4-6"), config) == theirs
    assert {scheme.bits for scheme in theirs.values()} == {4, 6}


def test_mixed_4_6_at_forty_layers():
    """In numbers: v and down of layers 0 to 4, 35 to 39 and every third between; the head."""
    found = schemes(named("mixed-4-6"), replace(CONFIG, n_layers=40))
    finer = {int(path.split(".")[2]) for path, s in found.items() if s.bits == 6 and path != "lm_head"}
    assert finer == {0, 1, 2, 3, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 34, 35, 36, 37, 38, 39}
    assert found["lm_head"].bits == 6
    assert sum(scheme.bits == 6 for scheme in found.values()) == 2 * 20 + 1


def test_mixed_4_6_is_bit_for_bit_what_mlx_lm_writes(tmp_path):
    source = models.write_hf(tmp_path / "source", CONFIG)
    mixed = schemes(named("mixed-4-6"))
    theirs = mlx_lm_reference.quantized(source, tmp_path / "theirs", Scheme(), mixed)
    found = mlx_lm_reference.read(converted(source, tmp_path / "ours", named("mixed-4-6")))
    expected = mlx_lm_reference.read(theirs)
    assert found.keys() == expected.keys()
    assert all(mlx_lm_reference.same(found[name], expected[name]) for name in found)


# Exceptions ----------------------------------------------------------------------------------------------


def test_the_last_exception_wins():
    recipe = named("4bit").but([("*.mlp.*", "8bit"), ("*.down_proj", "bf16"), ("model.layers.3.*", "6bit")])
    found = schemes(recipe)
    assert found["model.layers.2.mlp.up_proj"] == Scheme(bits=8)
    assert found["model.layers.2.mlp.down_proj"] is None
    assert found["model.layers.3.mlp.down_proj"] == Scheme(bits=6)
    assert found["model.layers.3.self_attn.q_proj"] == Scheme(bits=6)
    assert found["model.layers.2.self_attn.q_proj"] == Scheme()
    assert recipe.but([("model.layers.3.*", "4bit")]) != recipe
    assert schemes(recipe.but([("*", "4bit")])) == schemes(named("4bit"))


def test_exceptions_come_before_the_finer_scheme():
    found = schemes(named("mixed-4-6").but([("lm_head", "4bit"), ("*.v_proj", "bf16")]))
    assert found["lm_head"] == Scheme()
    assert found["model.layers.0.self_attn.v_proj"] is None
    assert found["model.layers.0.mlp.down_proj"] == Scheme(bits=6)


def test_a_recipe_that_quantizes_nothing_has_no_quantization():
    assert named("4bit").but([("*", "bf16")]).quantization(CONFIG) is None
    assert named("bf16").quantization(CONFIG) is None


def test_rows_that_no_group_divides_stay_unquantized():
    found = schemes(uniform(Scheme(group_size=128)), replace(CONFIG, dim=192))
    whole = {path for path, (_, columns) in replace(CONFIG, dim=192).matrices() if columns % 128}
    assert whole == {path for path, scheme in found.items() if scheme is None} != set()


@pytest.mark.parametrize(
    ("pattern", "name", "message"),
    [
        ("lm_head", "5bit", "expected one of the recipes 4bit, .*, bf16, found '5bit'"),
        ("lm_head", "mixed-4-6", "'lm_head' needs a recipe of one precision; mixed-4-6 has two"),
        (
            "down_proj",
            "6bit",
            r"'down_proj' matches no matrix of this model; they are called model\.embed_tokens, ",
        ),
        ("model.layers.8.*", "6bit", "matches no matrix"),
        ("", "6bit", "'' matches no matrix"),
    ],
)
def test_invalid_exceptions_are_refused(pattern, name, message):
    with pytest.raises(ConversionError, match=message):
        named("4bit").but([(pattern, name)]).quantization(CONFIG)


def test_an_exception_that_matches_nothing_writes_nothing(source, tmp_path):
    with pytest.raises(ConversionError, match="matches no matrix"):
        converted(source, tmp_path / "out", named("4bit").but([("head", "8bit")]))
    assert list(tmp_path.iterdir()) == []


# Names ---------------------------------------------------------------------------------------------------


def test_recipes_are_found_by_name():
    assert list(RECIPES) == ["4bit", "4bit-g32", "mixed-4-6", "6bit", "8bit", "mxfp4", "nvfp4", "bf16"]
    assert all(named(name).name == str(named(name)) == name for name in RECIPES)
    with pytest.raises(
        ConversionError, match=r"expected one of the recipes 4bit, 4bit-g32, .*, found '4-bit'"
    ):
        named("4-bit")


def test_uniform_finds_a_named_recipe_or_makes_one():
    assert uniform(Scheme()) is RECIPES["4bit"]
    assert uniform(Scheme(group_size=32)) is RECIPES["4bit-g32"]
    assert uniform(Scheme.of_mode("nvfp4")) is RECIPES["nvfp4"]
    made = uniform(Scheme(bits=5, group_size=128))
    assert made == Recipe(name="affine-5bit-g128", default=Scheme(bits=5, group_size=128))
    with pytest.raises(ConfigError, match="affine quantization takes bits"):
        uniform(Scheme(bits=7))


def test_different_recipes_have_different_strings():
    """The journal compares recipes by their strings."""
    affine = [Scheme(bits=bits, group_size=group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
    recipes = [*RECIPES.values(), *map(uniform, affine), *EXCEPTIONS.values()]
    recipes += [named("4bit").but([("lm_head", name)]) for name in RECIPES if name != "mixed-4-6"]
    assert len({str(recipe) for recipe in recipes}) == len(set(recipes))


# From a quantized source ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixed-4-6", "mxfp4", "nvfp4"])
def test_dequantizing_gives_mlxs_dequantized_weights(source, tmp_path, name):
    packed = mlx_lm_reference.read(converted(source, tmp_path / "packed", named(name)))
    bf16 = converted(tmp_path / "packed", tmp_path / "bf16", named("bf16"), dequantize=True)
    found = mlx_lm_reference.read(bf16)
    for path, scheme in schemes(named(name)).items():
        parts = [
            packed[f"{path}.{part}"] for part in ("weight", "scales", "biases") if f"{path}.{part}" in packed
        ]
        expected = mx.dequantize(*parts, group_size=scheme.group_size, bits=scheme.bits, mode=scheme.mode)
        assert mlx_lm_reference.same(found.pop(f"{path}.weight"), expected.astype(mx.float32)), path
    assert set(found) == set(CONFIG.vectors())
    assert all(mlx_lm_reference.same(found[name], packed[name]) for name in found)
    assert open_checkpoint(bf16).config.quantization is None


def test_requantizing_is_dequantizing_and_quantizing(source, tmp_path):
    packed = converted(source, tmp_path / "packed", named("4bit"))
    unquantized = converted(packed, tmp_path / "bf16", named("bf16"), dequantize=True)
    expected_weights = mlx_lm_reference.read(converted(unquantized, tmp_path / "a", named("8bit")))
    requantized = converted(packed, tmp_path / "b", named("8bit"), dequantize=True)
    found = mlx_lm_reference.read(requantized)
    assert all(mlx_lm_reference.same(found[name], expected_weights[name]) for name in expected_weights)
    assert_same_logits(requantized)
    expected = our_logits(packed)
    np.testing.assert_allclose(our_logits(requantized), expected, rtol=0, atol=0.05 * np.abs(expected).max())
    with pytest.raises(
        ConversionError, match=r"is already quantized, .* or give --dequantize to convert it anyway"
    ):
        converted(packed, tmp_path / "c", named("8bit"))
