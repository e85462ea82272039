"""Logits equal mlx-lm's llama model and, recorded, transformers' MistralForCausalLM, in every layout.

Quantized models are compared with float32 scales and activations: MLX's CPU kernels are inaccurate with
16-bit ones, and the comparison is of the two readings of one directory, not of kernels.
"""

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import convert as mlx_lm_convert
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from magistral_mlx.config import Scheme
from magistral_mlx.convert.conversion import Job, convert
from magistral_mlx.convert.recipe import RECIPES, Recipe, uniform
from magistral_mlx.decoder.engine import decode
from magistral_mlx.decoder.model import Transformer
from magistral_mlx.decoder.sampling import Sampler, Sampling
from magistral_mlx.disk.checkpoint import load, open_checkpoint
from magistral_mlx.text import sidecars
from tests import models
from tests.decoder.test_cache import feed
from tests.tokenizers import tiny_tekken

CLOSE = 1e-4
"""Tolerance for float32, relative to the logits' scale."""
EVEN = replace(models.TINY, dim=256, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=64, hidden_dim=384)
"""Every width divides by 128, so that every group size fits."""
IDS = np.random.default_rng(5).integers(0, models.TINY.vocab_size, size=40).tolist()
RECORDED = Path(__file__).parents[1] / "data" / "transformers_logits.npz"


def our_logits(path: Path, ids: list[int] = IDS, dtype: mx.Dtype = mx.float32) -> np.ndarray:
    """All positions' logits, `(L, V)`, in float32."""
    model = load(open_checkpoint(path), dtype)
    return as_numpy(model.logits(model(mx.array([ids]), model.new_caches()))[0])


def mlx_lms_logits(path: Path, ids: list[int] = IDS, dtype: mx.Dtype = mx.float32) -> np.ndarray:
    model, _ = load_model(path)
    model.set_dtype(dtype)
    return as_numpy(model(mx.array([ids]))[0])


def as_numpy(logits: mx.array) -> np.ndarray:
    return np.array(logits.astype(mx.float32))


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest logit."""
    assert found.shape == expected.shape
    assert np.isfinite(expected).all()
    assert 0.5 < np.abs(expected).max() < 100  # neither vanished nor exploded, else this means nothing
    return float(np.abs(found - expected).max() / np.abs(expected).max())


CONFIGS = {
    "proportions": models.TINY,
    "tied": replace(models.TINY, tie_embeddings=True),
    "vocabulary": models.wide_vocab(),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_layout_equals_mlx_lm(name: str, tmp_path: Path):
    config = CONFIGS[name]
    ids = np.random.default_rng(6).integers(0, config.vocab_size, size=12).tolist()
    single = models.write_hf(tmp_path / "single", config)
    expected = mlx_lms_logits(single, ids)
    layouts = [single]
    if name != "vocabulary":
        layouts.append(models.write_hf(tmp_path / "sharded", config, shards=3))
    if not config.tie_embeddings:
        layouts.append(models.write_native(tmp_path / "native", config))
    for path in layouts:
        assert difference(our_logits(path, ids), expected) <= CLOSE, path.name


def test_greedy_sequences_equal_mlx_lm_for_200_tokens(tmp_path: Path):
    # With this seed no runner-up is closer than 6e-4 of the logits' scale: rounding changes no id.
    hf, native = models.write_hf(tmp_path / "hf", seed=4), models.write_native(tmp_path / "native", seed=4)
    theirs, _ = load_model(hf)
    expected = [int(token) for token, _ in generate_step(mx.array(IDS), theirs, max_tokens=200)]
    assert len(expected) == 200
    assert len(set(expected)) > 100  # not a loop of a few ids, which any two models could share
    for path in (hf, native):
        assert greedy(load(open_checkpoint(path), mx.float32), IDS, 200) == expected


def greedy(model: Transformer, ids: list[int], n: int) -> list[int]:
    caches = model.new_caches()
    logits = feed(model, ids, caches, chunk=16)
    return list(decode(model, logits, caches, sampler=Sampler(Sampling(temperature=0), 0), limit=n))


def test_logits_equal_those_recorded_from_transformers(tmp_path: Path):
    """`scripts/record_reference.py` records them, from the same random checkpoints."""
    recorded = np.load(RECORDED)
    ids, wide_ids = recorded["ids"].tolist(), recorded["wide_ids"].tolist()
    tied, wide = CONFIGS["tied"], CONFIGS["vocabulary"]
    hf = models.write_hf(tmp_path / "hf", seed=11)
    native = models.write_native(tmp_path / "native", seed=11)
    short = len(recorded["short"])
    assert difference(our_logits(hf, ids[:short]), recorded["short"]) <= CLOSE
    assert difference(our_logits(native, ids[:short]), recorded["short"]) <= CLOSE
    # Rotations by 700 positions differ in float32's last digits from one library to the other.
    assert difference(our_logits(native, ids)[-1], recorded["long"]) <= CLOSE
    found = our_logits(models.write_hf(tmp_path / "tied", tied, seed=11), ids[:short])[-1]
    assert difference(found, recorded["tied"]) <= CLOSE
    found = our_logits(models.write_native(tmp_path / "wide", wide, seed=11), wide_ids)[-1]
    assert difference(found[::97], recorded["wide"]) <= CLOSE


SCHEMES = [
    *[Scheme(bits=bits, group_size=32) for bits in (2, 4, 6)],
    *[Scheme(bits=bits, group_size=64) for bits in (3, 4, 5, 8)],
    *[Scheme(bits=bits, group_size=128) for bits in (2, 3, 4, 6, 8)],
    *[Scheme.of_mode(mode) for mode in ("mxfp4", "nvfp4", "mxfp8")],
]


def scheme_id(scheme: Scheme) -> str:
    return f"{scheme.mode}-{scheme.bits}-{scheme.group_size}"


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_hf(tmp_path_factory.mktemp("even") / "hf", EVEN)


@pytest.fixture(scope="module")
def even_native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_native(tmp_path_factory.mktemp("even") / "native", EVEN)


@pytest.mark.parametrize("scheme", SCHEMES, ids=scheme_id)
def test_quantized_models_read_alike_whoever_wrote_them(
    scheme: Scheme, even: Path, even_native: Path, tmp_path: Path
):
    quantize(even_native, tmp_path / "ours", scheme)
    assert difference(our_logits(tmp_path / "ours"), mlx_lms_logits(tmp_path / "ours")) <= CLOSE
    mlx_lm_quantize(even, tmp_path / "theirs", scheme)
    # Both quantized with MLX's quantizer: the same directory, whoever wrote it and whatever the source.
    assert difference(our_logits(tmp_path / "theirs"), our_logits(tmp_path / "ours")) <= 1e-6
    assert difference(our_logits(tmp_path / "theirs"), mlx_lms_logits(tmp_path / "theirs")) <= CLOSE


def quantize(source: Path, out: Path, recipe: Scheme | Recipe) -> None:
    """Through our converter."""
    recipe = uniform(recipe) if isinstance(recipe, Scheme) else recipe
    convert(Job(checkpoint=open_checkpoint(source), out=out, recipe=recipe, verify=False))


def mlx_lm_quantize(source: Path, out: Path, scheme: Scheme, predicate: object = None) -> None:
    """What mlx_lm.convert does, without a tokenizer."""
    model, config = load_model(source)
    model, config = quantize_model(
        model, config, scheme.group_size, scheme.bits, mode=scheme.mode, quant_predicate=predicate
    )
    save_model(out, model)
    save_config(config, out / "config.json")


def test_model_that_mlx_lm_converted(tmp_path: Path):
    """The whole command, tokenizer and all; 4 bits in groups of 64."""
    config = replace(models.TINY, vocab_size=1280)
    source = models.write_hf(tmp_path / "source", config)
    tiny_tekken(tmp_path / "words", "v11")
    for name, data in sidecars.files(tmp_path / "words", name="x", recipe="none", context=4096).items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(data)
    out = tmp_path / "out"
    mlx_lm_convert(str(source), str(out), quantize=True, q_bits=4, q_group_size=64)
    assert open_checkpoint(out).scheme("lm_head") == Scheme(bits=4, group_size=64)
    assert difference(our_logits(out), mlx_lms_logits(out)) <= CLOSE


def test_a_recipe_with_overrides_that_mlx_lm_wrote(even: Path, tmp_path: Path):
    def predicate(path: str, module: object) -> bool | dict[str, object]:
        if path == "lm_head":
            return False
        if "down_proj" in path:
            return {"bits": 6, "group_size": 32, "mode": "affine"}
        if "layers.1.self_attn.v_proj" in path:
            return {"bits": 8, "group_size": 32, "mode": "mxfp8"}
        return True

    mlx_lm_quantize(even, tmp_path / "out", Scheme(), predicate)
    opened = open_checkpoint(tmp_path / "out")
    assert opened.scheme("lm_head") is None
    assert opened.scheme("model.layers.0.mlp.down_proj") == Scheme(bits=6, group_size=32)
    assert opened.scheme("model.layers.1.self_attn.v_proj") == Scheme.of_mode("mxfp8")
    assert difference(our_logits(tmp_path / "out"), mlx_lms_logits(tmp_path / "out")) <= CLOSE


def test_a_recipe_with_overrides_that_we_wrote(even_native: Path, tmp_path: Path):
    recipe = RECIPES["mixed-4-6"].but([("model.layers.1.self_attn.q_proj", "bf16"), ("*.o_proj", "mxfp4")])
    quantize(even_native, tmp_path / "out", recipe)
    opened = open_checkpoint(tmp_path / "out")
    assert opened.scheme("model.layers.1.self_attn.q_proj") is None
    assert opened.scheme("model.layers.0.self_attn.o_proj") == Scheme.of_mode("mxfp4")
    assert opened.scheme("lm_head") == Scheme(bits=6)
    assert difference(our_logits(tmp_path / "out"), mlx_lms_logits(tmp_path / "out")) <= CLOSE


def test_width_that_no_group_divides_stays_unquantized(tmp_path: Path):
    """192 columns, groups of 128: only some matrices are quantized, and both libraries know which."""
    source = models.write_native(tmp_path / "native")
    quantize(source, tmp_path / "out", Scheme(bits=4, group_size=128))
    opened = open_checkpoint(tmp_path / "out")
    assert opened.scheme("model.embed_tokens") is None
    assert opened.scheme("model.layers.0.mlp.down_proj") == Scheme(bits=4, group_size=128)
    assert difference(our_logits(tmp_path / "out"), mlx_lms_logits(tmp_path / "out")) <= CLOSE


def test_quantized_tied_head(tmp_path: Path):
    source = models.write_hf(tmp_path / "hf", replace(EVEN, tie_embeddings=True))
    quantize(source, tmp_path / "ours", Scheme())
    mlx_lm_quantize(source, tmp_path / "theirs", Scheme())
    for name in ("ours", "theirs"):
        assert difference(our_logits(tmp_path / name), mlx_lms_logits(tmp_path / name)) <= CLOSE


@pytest.mark.parametrize("prefix", ["language_model.", "new"])
def test_the_text_model_of_a_mistral3(prefix: str, tmp_path: Path):
    """Both spellings of the prefix, a vision tower beside it, RoPE's base where transformers 5 puts it."""
    plain = models.write_hf(tmp_path / "plain")
    wrapped = wrap(plain, tmp_path / "wrapped", prefix)
    assert open_checkpoint(wrapped).config.has_vision
    assert difference(our_logits(wrapped), mlx_lms_logits(wrapped)) <= CLOSE
    assert difference(our_logits(wrapped), our_logits(plain)) == 0
    quantize(wrapped, tmp_path / "out", Scheme(bits=4, group_size=32))
    assert difference(our_logits(tmp_path / "out"), mlx_lms_logits(tmp_path / "out")) <= CLOSE


def wrap(plain: Path, out: Path, prefix: str) -> Path:
    def name(plain: str) -> str:
        if prefix == "language_model.":
            return prefix + plain
        return plain.replace("model.", "model.language_model.", 1)  # lm_head keeps its name

    out.mkdir()
    tensors = {name(path): a for path, a in mx.load(str(plain / "model.safetensors")).items()}
    tower = "vision_tower" if prefix == "language_model." else "model.vision_tower"
    tensors |= {f"{tower}.patch_conv.weight": mx.ones((4, 3, 2, 2))}
    tensors |= {f"{tower.replace('vision_tower', 'multi_modal_projector')}.norm.weight": mx.ones(4)}
    mx.save_safetensors(str(out / "model.safetensors"), tensors)
    text = json.loads((plain / "config.json").read_text())
    config = {"model_type": "mistral3", "text_config": text, "vision_config": {"model_type": "pixtral"}}
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_a_quantized_mistral3_with_overrides(even: Path, tmp_path: Path):
    """As mlx-lm writes it: the prefix is on tensors and on overrides."""
    wrapped = wrap(even, tmp_path / "wrapped", "language_model.")

    def predicate(path: str, module: object) -> bool | dict[str, object]:
        return {"bits": 8, "group_size": 64} if "down_proj" in path else "lm_head" not in path

    mlx_lm_quantize(wrapped, tmp_path / "out", Scheme(bits=3, group_size=32), predicate)
    opened = open_checkpoint(tmp_path / "out")
    assert opened.scheme("model.layers.1.mlp.down_proj") == Scheme(bits=8, group_size=64)
    assert difference(our_logits(tmp_path / "out"), mlx_lms_logits(tmp_path / "out")) <= CLOSE


@pytest.mark.parametrize(("dtype", "step"), [(mx.bfloat16, 2**-8), (mx.float16, 2**-11)])
def test_16_bit_is_close_to_float32(dtype: mx.Dtype, step: float, tmp_path: Path):
    """Rounding errors add up over three layers to 8 steps (root mean square over all logits); 16 are allowed.
    mlx-lm, which rounds at the same points, is as far off.
    """
    path = models.write_hf(tmp_path)
    exact, ours16, theirs16 = (
        our_logits(path),
        our_logits(path, dtype=dtype),
        mlx_lms_logits(path, dtype=dtype),
    )
    error, their_error = (np.sqrt(np.mean((x - exact) ** 2)) / exact.std() for x in (ours16, theirs16))
    assert 0 < error < 16 * step
    assert error < 1.25 * their_error, (error, their_error)
    model = load(open_checkpoint(path), dtype)
    caches = model.new_caches()
    assert feed(model, IDS, caches).dtype == dtype
    assert {array.dtype for cache in caches for array in cache.arrays()} == {dtype}
    assert len(greedy(model, IDS, 5)) == 5


@pytest.mark.parametrize("stored", [mx.bfloat16, mx.float16])
def test_16_bit_weights_load_in_any_dtype(stored: mx.Dtype, tmp_path: Path):
    native = models.write_native(tmp_path / "native", dtype=stored)
    hf = models.write_hf(tmp_path / "hf", dtype=stored)
    assert difference(our_logits(native), mlx_lms_logits(hf)) <= CLOSE


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_quantized_embedding_keeps_the_models_dtype(dtype: mx.Dtype, even: Path, tmp_path: Path):
    """Float modes always dequantize to bfloat16; together with float16 that would give float32."""
    quantize(even, tmp_path / "out", Scheme.of_mode("mxfp4"))
    model = load(open_checkpoint(tmp_path / "out"), dtype)
    caches = model.new_caches()
    assert feed(model, IDS[:3], caches).dtype == dtype
    assert {array.dtype for cache in caches for array in cache.arrays()} == {dtype}


def test_a_batch_equals_its_rows(tmp_path: Path):
    model = load(open_checkpoint(models.write_hf(tmp_path)), mx.float32)
    rows = [IDS[:12], IDS[12:24]]
    both = as_numpy(model.logits(model(mx.array(rows), model.new_caches())))
    for row, found in zip(rows, both, strict=True):
        assert difference(found, as_numpy(model.logits(model(mx.array([row]), model.new_caches()))[0])) < 1e-5


def test_last_position_only_equals_the_whole_pass(tmp_path):
    """The top layer computes nothing else but its keys and values; also with a filled cache."""
    model = load(open_checkpoint(models.write_hf(tmp_path / "hf")), mx.float32)
    ids = mx.array([list(range(3, 60))])
    whole, alone = model.new_caches(), model.new_caches()
    for part in (ids[:, :20], ids[:, 20:]):
        every, last = model(part, whole), model(part, alone, last=True)
        assert last.shape == (1, 1, models.TINY.dim)
        assert mx.allclose(every[:, -1:], last, atol=1e-5)
    for a, b in zip(whole, alone, strict=True):
        assert all(mx.allclose(x, y, atol=1e-5) for x, y in zip(a.arrays(), b.arrays(), strict=True))
