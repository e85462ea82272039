"""The manifest: identical for identical conversions, and names every file that was changed."""

import hashlib
import json
import os
import re
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from magistral_mlx.convert import plan, quantize
from magistral_mlx.convert.conversion import Job, convert
from magistral_mlx.convert.recipe import RECIPES
from magistral_mlx.disk import manifest
from magistral_mlx.disk.checkpoint import open_checkpoint
from magistral_mlx.disk.manifest import PATH, verify, wrong_sizes
from magistral_mlx.errors import ConfigError, ConversionError, MagistralError
from tests import models

SMALL = replace(models.TINY, dim=64, n_layers=1, n_heads=4, n_kv_heads=2, hidden_dim=128, vocab_size=256)
SIDECARS = {
    "README.md": b"# A card\n",
    "NOTES.md": b"# A note\n",
    "mistral/tekken.json": b"{}",
    "mistral/empty.txt": b"",
}


def converted(source, out, **options):
    options = {"sidecars": SIDECARS} | options
    return convert(Job(checkpoint=open_checkpoint(source), out=out, **options))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return models.write_hf(tmp_path_factory.mktemp("source"), SMALL, shards=2, dtype=mx.bfloat16)


@pytest.fixture(scope="module")
def original(source, tmp_path_factory):
    """A conversion into two files. Tests must change copies only."""
    out = tmp_path_factory.mktemp("proven") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SHARD_BYTES", 24_000)
        converted(source, out)
    return out


@pytest.fixture
def out(original, tmp_path):
    return shutil.copytree(original, tmp_path / "out")


def read_manifest(directory):
    return json.loads((directory / PATH).read_text())


def write_manifest(directory, content):
    (directory / PATH).write_text(content if isinstance(content, str) else json.dumps(content))


# Its content ------------------------------------------------------------------------------------------


def test_the_manifest_lists_files_recipe_versions_and_errors(source, original):
    found = read_manifest(original)
    not_listed = (original / PATH, original / "README.md")  # users may edit the card
    files = [file for file in original.rglob("*") if file.is_file() and file not in not_listed]
    assert found == {
        "format": 1,
        "source_name": source.name,
        "recipe": "4bit",
        "source": {file.name: size_and_hash(file) for file in source.glob("*.safetensors")},
        "outputs": {str(file.relative_to(original)): size_and_hash(file) for file in files},
        "versions": {"magistral_mlx": version("magistral_mlx"), "mlx": version("mlx")},
        "relative_rms_error": found["relative_rms_error"],
    }
    assert set(found["relative_rms_error"]) == {path for path, _ in SMALL.matrices()}
    assert len(found["outputs"]) == 2 + 2 + len(SIDECARS) - 1


def size_and_hash(file):
    content = file.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_the_same_conversion_gives_the_same_manifest(source, original, tmp_path, monkeypatch):
    """Also later, in another directory, and from a copy with other modification times."""
    monkeypatch.setattr(plan, "SHARD_BYTES", 24_000)
    copy = shutil.copytree(source, tmp_path / source.name, copy_function=shutil.copyfile)
    for file in copy.iterdir():
        os.utime(file, (1, 1))
    converted(copy, tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / PATH).read_bytes() == (original / PATH).read_bytes()


def test_the_manifest_holds_no_time_and_no_path(source, original):
    text = (original / PATH).read_text()
    assert not re.search(r'"[^"]*time[^"]*":|\d{4}-\d\d-\d\d|"/', text)
    assert not [part for part in (*source.parts[:-1], *original.parts[:-1]) if len(part) > 1 and part in text]


def test_the_manifest_has_the_source_name_that_was_given(source, tmp_path):
    converted(source, tmp_path / "out", source_name="mistralai/Magistral-Small-2506")
    assert read_manifest(tmp_path / "out")["source_name"] == "mistralai/Magistral-Small-2506"


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=str)
def test_errors_of_small_tensors_are_of_all_their_rows(tmp_path, monkeypatch, recipe, dtype):
    """Every tensor here fits into one block's sample, so the error is that of all its rows."""
    monkeypatch.setattr(quantize, "SAMPLE_ROWS", 64)
    config = replace(SMALL, vocab_size=quantize.SAMPLE_ROWS, dim=64, head_dim=16, hidden_dim=64)
    assert max(rows for _, (rows, _) in config.matrices()) <= quantize.SAMPLE_ROWS
    made = converted(
        models.write_hf(tmp_path / "source", config, dtype=dtype), tmp_path / "out", recipe=recipe
    )
    weights = models.random_weights(config, dtype=dtype)
    expected = {}
    for path, _ in config.matrices():
        if (scheme := made.plan.scheme(f"{path}.weight")) is None:
            continue
        options = {"group_size": scheme.group_size, "bits": scheme.bits, "mode": scheme.mode}
        weight = weights[f"{path}.weight"]
        dequantized = mx.dequantize(*mx.quantize(weight, **options), **options)
        before, after = (np.array(array.astype(mx.float32), np.float64) for array in (weight, dequantized))
        expected[path] = float(np.linalg.norm(after - before) / np.linalg.norm(before))
    assert made.errors == pytest.approx(expected, rel=1e-5)
    assert read_manifest(tmp_path / "out")["relative_rms_error"] == pytest.approx(expected, rel=1e-5)
    assert all(0.001 < error < 0.3 for error in expected.values())
    assert bool(expected) == (recipe.name != "bf16")


def test_errors_of_large_tensors_are_of_each_blocks_first_rows(source, tmp_path, monkeypatch):
    """The first rows of every block are its sample: of 4 blocks of 64, the first 8 of each."""
    monkeypatch.setattr(quantize, "SAMPLE_ROWS", 8)
    monkeypatch.setattr(quantize, "BLOCK_BYTES", 64 * SMALL.dim * 2)
    made = converted(source, tmp_path / "out")
    weight = models.random_weights(SMALL, dtype=mx.bfloat16)["lm_head.weight"].reshape(4, 64, 64)[:, :8]
    dequantized = mx.dequantize(*mx.quantize(weight))
    before, after = (np.array(array.astype(mx.float32)) for array in (weight, dequantized))
    assert made.errors["lm_head"] == pytest.approx(
        np.linalg.norm(after - before) / np.linalg.norm(before), rel=1e-5
    )


def test_the_largest_errors_come_first():
    errors = {"a": 0.1, "b": 0.3, "c": float("inf"), "d": 0.0, "e": 0.3}
    assert manifest.worst(errors) == [("c", float("inf")), ("b", 0.3), ("e", 0.3)]
    assert manifest.worst(errors, n=1) == [("c", float("inf"))]
    assert manifest.worst({}) == []


# Verifying ---------------------------------------------------------------------------------------------


def test_an_unchanged_conversion_is_verified(original):
    seen = []
    assert verify(original, progress=lambda done, total: seen.append((done, total))) == []
    assert wrong_sizes(original) == []
    total = sum(output["bytes"] for output in read_manifest(original)["outputs"].values())
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def files_of(directory):
    return sorted(read_manifest(directory)["outputs"])


FILES = [
    *("NOTES.md", "config.json", "mistral/empty.txt", "mistral/tekken.json"),
    *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"),
]


def test_the_tests_cover_every_file(original):
    assert files_of(original) == FILES


@pytest.mark.parametrize("name", [name for name in FILES if name != "mistral/empty.txt"])
@pytest.mark.parametrize("where", [0, 0.5, -1])
def test_one_flipped_bit_is_found(out, name, where):
    content = bytearray((out / name).read_bytes())
    content[int(where * len(content)) if where > 0 else where] ^= 1
    (out / name).write_bytes(content)
    assert verify(out) == [f"{name} has other bytes than were written"]
    assert wrong_sizes(out) == []  # compares sizes only


@pytest.mark.parametrize("name", FILES)
def test_other_sizes_and_missing_files_are_found(out, name):
    size = (out / name).stat().st_size
    os.truncate(out / name, size + 3)
    longer = [f"{name} has {size + 3} bytes, was written with {size}"]
    assert verify(out) == wrong_sizes(out) == longer
    (out / name).unlink()
    assert verify(out) == wrong_sizes(out) == [f"{name} is missing"]
    (out / name).mkdir()
    assert len(verify(out)) == 1
    assert name in verify(out)[0]


def test_every_wrong_file_is_named(out):
    (out / "NOTES.md").unlink()
    (out / "config.json").write_text("{}")
    os.truncate(out / "model-00001-of-00002.safetensors", 100)
    assert [wrong.split()[0] for wrong in verify(out)] == [
        "NOTES.md",
        "config.json",
        "model-00001-of-00002.safetensors",
    ]


def test_a_file_that_cannot_be_read_is_named(out, monkeypatch):
    def refuse(file, **_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(manifest, "sha256", refuse)
    assert verify(out) == [f"{name} cannot be read: Permission denied" for name in FILES]


def test_without_hashes_only_sizes_are_compared(source, tmp_path):
    out = tmp_path / "out"
    made = converted(source, out, verify=False)
    found = read_manifest(out)
    assert made.errors == found["relative_rms_error"] == {}
    assert all(set(file) == {"bytes"} for file in (*found["outputs"].values(), *found["source"].values()))
    (note,) = verify(out)
    assert "no hashes (it was converted with --no-verify): only sizes were compared" in note
    os.truncate(out / "NOTES.md", 1)
    assert verify(out) == ["NOTES.md has 1 bytes, was written with 9", note]


def test_a_missing_manifest_is_an_error(out):
    (out / PATH).unlink()
    with pytest.raises(
        ConversionError, match=rf"{out} has no mistral/manifest.json, so nothing says what it should"
    ):
        verify(out)
    assert wrong_sizes(out) == []


# Foreign manifests -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "a/../../secret",
        "/etc/hostname",
        "..",
        ".",
        "",
        "mistral/..",
        "a\0b",
        "{absolute}",
        "x" * 5000,
    ],
    ids=lambda name: repr(name[:20]),
)
def test_names_outside_the_directory_are_refused_untouched(out, tmp_path, monkeypatch, name):
    (tmp_path / "secret").write_text("!")
    found = read_manifest(out)
    found["outputs"] = {name.format(absolute=tmp_path / "secret"): {"bytes": 1, "sha256": "0" * 64}}
    write_manifest(out, found)
    touched = []
    stat, read = Path.stat, manifest.sha256
    monkeypatch.setattr(
        Path, "stat", lambda path, **options: (touched.append(path), stat(path, **options))[1]
    )
    monkeypatch.setattr(manifest, "sha256", lambda path: (touched.append(path), read(path))[1])
    for check in (verify, wrong_sizes):
        if len(name) > 1000:  # inside the directory, but too long for a file name
            assert "cannot be read" in check(out)[0]
            continue
        with pytest.raises(
            ConversionError, match=f"{PATH} is damaged: expected outputs inside the directory"
        ):
            check(out)
    assert all(out in (path, *path.parents) for path in touched)
    assert tmp_path / "secret" not in touched


INVALID_MANIFESTS = ["", "null", "[]", "[1]", "1", "not JSON", "{", '"x"', "\ud800", "[" * 100_000]
INVALID_MANIFESTS += [
    f'{{"outputs": {value}}}'
    for value in ("[]", "null", "1", '"x"', "[1]", '{"a": 1}', '{"a": null}', '{"a": []}')
]
INVALID_MANIFESTS += [
    f'{{"outputs": {{"NOTES.md": {value}}}}}'
    for value in (
        "{}",
        '{"bytes": "9"}',
        '{"bytes": 9.5}',
        '{"bytes": 9, "sha256": 1}',
        '{"sha256": "0"}',
        "NaN",
    )
]


@pytest.mark.parametrize("content", INVALID_MANIFESTS, ids=lambda content: repr(content[:40]))
def test_invalid_manifests_are_refused(out, content):
    (out / PATH).write_bytes(content.encode("utf-8", "surrogatepass"))
    for check in (verify, wrong_sizes):
        with pytest.raises((ConversionError, ConfigError), match=re.escape(str(out / PATH))):
            check(out)


@pytest.mark.parametrize("content", ["{}", '{"outputs": {}}', '{"outputs": {"NOTES.md": {"bytes": -1}}}'])
def test_incomplete_manifests_are_not_verified(out, content):
    write_manifest(out, content)
    assert verify(out)


def test_a_dangling_link_is_no_manifest(out, tmp_path):
    (out / PATH).unlink()
    (out / PATH).symlink_to(tmp_path / "nothing")
    with pytest.raises(MagistralError, match="has no"):
        verify(out)


def test_linked_files_are_verified(out, tmp_path):
    """The Hub's cache consists of symlinks."""
    for name in FILES:
        blob = tmp_path / hashlib.sha256(name.encode()).hexdigest()
        (out / name).rename(blob)
        (out / name).symlink_to(blob)
    assert verify(out) == wrong_sizes(out) == []
