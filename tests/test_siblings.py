"""Magistral's later releases, end to end: 2507 has control tokens for thinking, 2509 a vision tower too."""

import json

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from mlx_lm.utils import load_model

from magistral_mlx.cli.app import cli
from magistral_mlx.disk import manifest
from magistral_mlx.disk.checkpoint import load, open_checkpoint
from magistral_mlx.text.tokenizer import Tokenizer
from tests import mlx_lm_reference, models
from tests.disk.test_checkpoint import LAYOUTS
from tests.tokenizers import tiny_tekken

PROMPT = "Think first.\n[THINK]A draft.[/THINK]Then answer."
SIBLINGS = {
    "2507": "native",
    "2507 of transformers": "hf shards",
    "2509": "native with vision",
    "2509 of transformers 4": "mistral3",
    "2509 of transformers 5": "mistral3 of transformers 5",
}
IDS = mx.array([[1, 17, 300, 4, 250, 99, 3, 3, 128]])


def run(*arguments):
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The tensors to which the text model alone is converted."""
    path = models.write_native(tmp_path_factory.mktemp("plain") / "source")
    tiny_tekken(path, "v13")
    run("convert", path, "--out", path.parent / "out")
    return mlx_lm_reference.read(path.parent / "out")


@pytest.mark.parametrize("name", SIBLINGS)
def test_sibling_converts_to_the_same_text_model(tmp_path, plain, name):
    source, out = tmp_path / "Magistral-Small", tmp_path / "out"
    LAYOUTS[SIBLINGS[name]](source)
    tiny_tekken(source, "v13")
    (source / "SYSTEM_PROMPT.txt").write_text(PROMPT)
    dry_run = run("convert", source, "--out", out, "--dry-run")
    run("convert", source, "--out", out)
    assert manifest.verify(out) == []

    found = mlx_lm_reference.read(out)
    assert found.keys() == plain.keys()
    assert all(mlx_lm_reference.same(found[name], plain[name]) for name in found)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "mistral"
    assert "vision_config" not in config
    assert f"{sum(file.stat().st_size for file in out.glob('*.safetensors')) / 1e3:.1f} kB" in dry_run

    tokenizer = Tokenizer.from_directory(out)
    assert (tokenizer.version, tokenizer.think_ids, tokenizer.system_prompt) == ("v13", (34, 35), PROMPT)
    assert "between control tokens" in run("info", out)
    model, _ = load_model(out)
    model.set_dtype(mx.float32)
    theirs = np.array(model(IDS))
    mine = load(open_checkpoint(out), mx.float32)
    ours = np.array(mine.logits(mine(IDS, mine.new_caches())))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3 * np.abs(theirs).max())
