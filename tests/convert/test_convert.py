"""Checkpoint → MLX directory: bit for bit mlx-lm's with blocks and shards of any size; else no directory."""

import errno
import hashlib
import json
import os
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from magistral_mlx.config import Scheme
from magistral_mlx.convert import plan, quantize
from magistral_mlx.convert.conversion import Job, convert
from magistral_mlx.convert.recipe import RECIPES, uniform
from magistral_mlx.disk.checkpoint import load, open_checkpoint
from magistral_mlx.disk.journal import work_directory
from magistral_mlx.disk.tensorfile import Entry
from magistral_mlx.errors import CheckpointError, ConversionError, MagistralError
from tests import mlx_lm_reference, models
from tests.mlx_lm_reference import SCHEMES, same

FLAT = replace(models.TINY, dim=128, n_layers=2, hidden_dim=256, vocab_size=96)
"""Every row is a multiple of 128, so that every group size divides it."""
FIELDS = {
    "model_type": "mistral",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e9,
    "vocab_size": 96,
    "tie_word_embeddings": False,
}
"""What other readers need in `config.json`; their defaults are wrong for this model."""


def converted(source, out, scheme=Scheme(), progress=lambda _: None, **options):  # noqa: B008 -- frozen
    recipe = uniform(scheme) if scheme else RECIPES["bf16"]
    convert(Job(checkpoint=open_checkpoint(source), out=out, recipe=recipe, **options), progress)
    return out


def hashes(directory):
    """The hashes of all weights and of the config."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for pattern in ("*.safetensors", "config.json", "*.index.json", "params.json")
        for file in directory.glob(pattern)
    }


def rows(config):
    """Every matrix of a model: its path, and the length of its rows."""
    weights = models.random_weights(config)
    return {name.removesuffix(".weight"): a.shape[1] for name, a in weights.items() if a.ndim == 2}


def quantized(weights, scheme_of):
    """The reference: every matrix quantized as a whole."""
    expected = {}
    for name, array in weights.items():
        path = name.removesuffix(".weight")
        if path.endswith("norm") or (scheme := scheme_of(path)) is None:
            expected[name] = array
            continue
        parts = mx.quantize(array, group_size=scheme.group_size, bits=scheme.bits, mode=scheme.mode)
        names = ("weight", "scales", "biases")
        expected |= {f"{path}.{part}": a for part, a in zip(names, parts, strict=False)}
    return expected


def assert_same(found, expected):
    assert set(found) == set(expected)
    assert [name for name in found if not same(found[name], expected[name])] == []


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """A source shared by all tests: conversions must not change it."""
    path = models.write_native(tmp_path_factory.mktemp("native"), FLAT, dtype=mx.bfloat16)
    before = {file: file.read_bytes() for file in path.rglob("*")}
    yield path
    assert {file: file.read_bytes() for file in path.rglob("*")} == before


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return models.write_hf(tmp_path_factory.mktemp("hf"), FLAT, dtype=mx.bfloat16)


@pytest.fixture(scope="module")
def weights():
    return models.random_weights(FLAT, dtype=mx.bfloat16)


# The result ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_bit_for_bit_what_mlx_lm_writes(tmp_path, native, hf, weights, scheme):
    ours = converted(native, tmp_path / "ours", scheme)
    theirs = mlx_lm_reference.quantized(hf, tmp_path / "theirs", scheme)
    assert_same(mlx_lm_reference.read(ours), mlx_lm_reference.read(theirs))
    assert_same(mlx_lm_reference.read(ours), quantized(weights, lambda _: scheme))
    assert mlx_lm_reference.config(ours)["quantization"] == mlx_lm_reference.config(theirs)["quantization"]


@pytest.mark.parametrize("name", ["4-bit-g64", "3-bit-g32", "nvfp4"])
def test_mlx_lm_loads_the_result(tmp_path, native, name):
    out = converted(native, tmp_path / "out", SCHEMES[name])
    model, config = load_model(out)
    assert_same(dict(tree_flatten(model.parameters())), mlx_lm_reference.read(out))
    assert config.items() >= FIELDS.items()
    assert config["rope_parameters"]["rope_theta"] == 1e9
    assert model.args.rope_theta == 1e9
    assert config["quantization"] == config["quantization_config"] == SCHEMES[name].to_json()
    assert list(mlx_lm_reference.config(out)) == sorted(config)


def test_the_result_is_read_back(tmp_path, native):
    checkpoint = open_checkpoint(converted(native, tmp_path / "out"))
    assert checkpoint.config == replace(FLAT, quantization=checkpoint.config.quantization)
    assert all(checkpoint.scheme(path) == Scheme() for path in rows(FLAT))
    load(checkpoint, mx.float32)


def test_hf_and_native_sources_give_the_same_directory(tmp_path, native, hf):
    assert hashes(converted(native, tmp_path / "a")) == hashes(converted(hf, tmp_path / "b"))


def test_an_unquantized_conversion_keeps_the_weights(tmp_path, native, weights):
    out = converted(native, tmp_path / "out", None)
    assert_same(mlx_lm_reference.read(out), weights)
    assert not {"quantization", "quantization_config"} & set(mlx_lm_reference.config(out))
    model, _ = load_model(out)
    assert_same(dict(tree_flatten(model.parameters())), weights)


def test_native_rows_are_reordered_as_by_a_loop(tmp_path, native):
    """RoPE turns rows 2i and 2i + 1 of a native head together, i and i + head_dim / 2 of HF's."""
    out = mlx_lm_reference.read(converted(native, tmp_path / "out", None))
    raw = mlx_lm_reference.read(native)
    for ours, theirs, heads in (("q_proj", "wq", 8), ("k_proj", "wk", 2)):
        source_rows = np.array(raw[f"layers.1.attention.{theirs}.weight"].astype(mx.float32))
        result_rows = np.array(out[f"model.layers.1.self_attn.{ours}.weight"].astype(mx.float32))
        for row in range(heads * 32):
            head, i = divmod(row, 32)
            part, pair = divmod(i, 16)
            assert (result_rows[row] == source_rows[head * 32 + 2 * pair + part]).all()


@pytest.mark.parametrize("target", [None, mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("source", [mx.float32, mx.float16, mx.bfloat16])
def test_weights_are_cast_before_they_are_quantized(tmp_path, source, target):
    path = models.write_native(tmp_path / "source", FLAT, dtype=source)
    out = converted(path, tmp_path / "out", dtype=target)
    cast = {
        name: array.astype(target or source)
        for name, array in models.random_weights(FLAT, dtype=source).items()
    }
    assert_same(mlx_lm_reference.read(out), quantized(cast, lambda _: Scheme()))


@pytest.mark.parametrize("name", ["4-bit-g128", "8-bit-g128"])
def test_rows_that_no_group_divides_stay_unquantized(tmp_path, name):
    """Rows of 192 are not quantized, and the config says so, as other readers need it."""
    scheme = SCHEMES[name]
    uneven = {path for path, columns in rows(models.TINY).items() if columns == 192}
    out = converted(models.write_native(tmp_path / "source"), tmp_path / "out", scheme)
    section = mlx_lm_reference.config(out)["quantization"]
    assert section == scheme.to_json() | dict.fromkeys(uneven, False)
    expected = quantized(models.random_weights(), lambda path: None if path in uneven else scheme)
    assert_same(mlx_lm_reference.read(out), expected)
    model, _ = load_model(out)
    assert_same(dict(tree_flatten(model.parameters())), expected)
    checkpoint = open_checkpoint(out)
    assert {path for path in rows(models.TINY) if checkpoint.scheme(path) is None} == uneven


def test_tied_embeddings_give_no_head(tmp_path):
    source = models.write_hf(tmp_path / "source", replace(FLAT, tie_embeddings=True))
    out = converted(source, tmp_path / "out")
    assert mlx_lm_reference.config(out)["tie_word_embeddings"] is True
    assert not any(name.startswith("lm_head") for name in mlx_lm_reference.read(out))
    load_model(out)


# Blocks and shards --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"), [("4-bit-g64", 1), ("4-bit-g64", 10_000), ("3-bit-g32", 4000), ("mxfp4", 4000)]
)  # 1: a row at a time
def test_block_size_does_not_matter(tmp_path, monkeypatch, native, name, size):
    whole = converted(native, tmp_path / "whole", SCHEMES[name])
    monkeypatch.setattr(quantize, "BLOCK_BYTES", size)
    assert hashes(converted(native, tmp_path / "blocks", SCHEMES[name])) == hashes(whole)


@pytest.mark.parametrize("limit", [1, 20_000, 100_000])
def test_shards_keep_to_the_limit_and_hold_the_same_weights(tmp_path, monkeypatch, native, limit):
    whole = mlx_lm_reference.read(converted(native, tmp_path / "whole"))
    monkeypatch.setattr(plan, "SHARD_BYTES", limit)
    out = converted(native, tmp_path / "shards")
    assert_same(mlx_lm_reference.read(out), whole)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert files == [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) > 1
    assert index["weight_map"] == {name: file for file in files for name in mx.load(str(out / file))}
    assert list(index["weight_map"]) == sorted(whole)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in whole.values())
    for file in files:
        arrays, metadata = mx.load(str(out / file), return_metadata=True)
        assert metadata == {"format": "mlx"}
        assert arrays
        modules = {name.rpartition(".")[0] for name in arrays}
        assert sum(array.nbytes for array in arrays.values()) <= limit or len(modules) == 1
        assert modules.isdisjoint(name.rpartition(".")[0] for name in whole.keys() - arrays.keys())
    model, _ = load_model(out)
    assert_same(dict(tree_flatten(model.parameters())), whole)
    assert_same(dict(open_tensors(out)), whole)


def open_tensors(path):
    return ((name, tensor.read()) for name, tensor in open_checkpoint(path).tensors.items())


def test_one_file_has_an_index_too(tmp_path, native):
    out = converted(native, tmp_path / "out")
    assert {file.name for file in out.iterdir()} >= {
        "config.json", "model.safetensors", "model.safetensors.index.json"
    }  # fmt: skip
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model.safetensors"}


def test_progress_names_every_tensor_and_reaches_the_total(tmp_path, monkeypatch, native, weights):
    monkeypatch.setattr(quantize, "BLOCK_BYTES", 5000)
    seen = []
    converted(native, tmp_path / "out", progress=seen.append)
    assert [step.done for step in seen] == sorted(step.done for step in seen)
    assert {step.total for step in seen} == {seen[-1].done} == {sum(a.nbytes for a in weights.values())}
    assert {step.tensor for step in seen} == set(weights)
    assert len(seen) > 2 * len(weights)


def test_sidecars_are_written(tmp_path, native):
    out = converted(
        native, tmp_path / "a" / "b" / "out", sidecars={"README.md": b"#", "mistral/tekken.json": b"{}"}
    )
    assert (out / "README.md").read_bytes() == b"#"
    assert (out / "mistral" / "tekken.json").read_bytes() == b"{}"


# Refusals and failures -------------------------------------------------------------------------------------


def tree(path):
    return sorted(str(child.relative_to(path)) for child in path.rglob("*"))


@pytest.mark.parametrize("target", ["out", "link", "dangling", "out/.", "."])
def test_empty_directories_and_links_to_them_are_valid_targets(tmp_path, monkeypatch, native, target):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    (tmp_path / "dangling").symlink_to("new")
    monkeypatch.chdir(tmp_path / ("out" if target == "." else "."))
    converted(native, Path(target))
    assert (tmp_path / ("new" if target == "dangling" else "out") / "config.json").is_file()


@pytest.mark.parametrize("existing", ["file", "directory", "link"])
def test_nothing_is_overwritten(tmp_path, native, existing):
    out = tmp_path / "out"
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "precious").write_text("!")
    {
        "file": lambda: out.write_text("!"),
        "directory": lambda: (tmp_path / "old").rename(out),
        "link": lambda: out.symlink_to("old"),
    }[existing]()
    before = tree(tmp_path)
    with pytest.raises(
        ConversionError, match=f"{out.parent}/.* exists and nothing is overwritten; choose another --out"
    ):
        converted(native, out)
    assert tree(tmp_path) == before


def test_a_target_inside_the_source_is_refused(tmp_path):
    source = models.write_hf(tmp_path / "source", FLAT)
    (tmp_path / "link").symlink_to("source")
    before = tree(tmp_path)
    for out in (source / "4bit", source / "a" / "b", tmp_path / "link" / "4bit"):
        with pytest.raises(
            ConversionError, match=r"lies inside the source .*source; choose an --out beside it"
        ):
            converted(source, out)
    assert tree(tmp_path) == before


def test_a_quantized_source_is_refused(tmp_path, native):
    once = converted(native, tmp_path / "once")
    with pytest.raises(ConversionError, match=f"{once} is already quantized"):
        converted(once, tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_too_little_disk_space_is_refused_at_once(tmp_path, monkeypatch, native):
    usage = namedtuple("usage", "total used free")  # noqa: PYI024
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 1000))
    with pytest.raises(
        ConversionError, match=r"out needs .* [MG]B .*on disk and .* has .* [MG]B free; make room"
    ):
        converted(native, tmp_path / "deep" / "out")
    assert tree(tmp_path) == []


def assert_unfinished(out):
    """Nothing under the target's name, and beside it what the next run resumes from."""
    assert list(out.parent.iterdir()) == [work_directory(out)]


def make_a_read_fail(monkeypatch, error):
    """Make the twelfth read fail, in the middle of the conversion."""
    read, calls = Entry.raw, []

    def fail(entry, *rows):
        calls.append(entry)
        if len(calls) == 12:
            raise error
        return read(entry, *rows)

    monkeypatch.setattr(Entry, "raw", fail)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.EIO, os.strerror(errno.EIO)), (ConversionError, "Input/output error")),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), (ConversionError, "No space left on device")),
        (CheckpointError("x.safetensors ends inside a"), (CheckpointError, "ends inside a")),
        (KeyboardInterrupt(), (KeyboardInterrupt, None)),
        (MemoryError(), (MemoryError, None)),
    ],
    ids=repr,
)
def test_a_failed_conversion_resumes_with_the_same_result(tmp_path, monkeypatch, native, error, expected):
    make_a_read_fail(monkeypatch, error)
    with pytest.raises(expected[0], match=expected[1]):
        converted(native, tmp_path / "out")
    assert_unfinished(tmp_path / "out")
    monkeypatch.undo()
    assert hashes(converted(native, tmp_path / "out")) == hashes(converted(native, tmp_path / "fresh"))


def test_an_interrupt_in_the_progress_callback_leaves_no_result(tmp_path, native):
    def interrupt(step):
        if step.done > step.total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converted(native, tmp_path / "out", progress=interrupt)
    assert_unfinished(tmp_path / "out")


def test_a_source_that_shrinks_is_an_error(tmp_path):
    source = models.write_native(tmp_path / "source", FLAT)
    checkpoint = open_checkpoint(source)
    file = source / "consolidated.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="it was cut off"):
        convert(Job(checkpoint=checkpoint, out=tmp_path / "deep" / "out"))
    assert_unfinished(tmp_path / "deep" / "out")


@pytest.mark.parametrize("midway", [False, True])
def test_a_source_that_disappears_is_named_in_the_error(tmp_path, midway):
    """For example, its disk was unplugged: the error must not blame the target."""
    source = models.write_native(tmp_path / "source", FLAT)
    job = Job(checkpoint=open_checkpoint(source), out=tmp_path / "out")

    def unplug(*_):
        (source / "consolidated.safetensors").unlink(missing_ok=True)

    if not midway:
        unplug()
    with pytest.raises(MagistralError, match=f"(reading {source} failed|cannot be read now).*No such file"):
        convert(job, unplug)
    assert not (tmp_path / "out").exists()


def test_a_target_that_cannot_be_created_is_an_error(tmp_path, native):
    (tmp_path / "file").touch()
    for out, reason in ((tmp_path / "file" / "out", "Not a directory"), (tmp_path / ("x" * 250), "too long")):
        with pytest.raises(ConversionError, match=f"writing {out} failed: .*{reason}"):
            converted(native, out)
    assert tree(tmp_path) == ["file"]
