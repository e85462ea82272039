"""Record the logits of transformers' MistralForCausalLM for the tests' random checkpoints.

    python scripts/record_reference.py

Needs torch and transformers, which this project does not: run it from a checkout in a separate environment
that also has mlx and numpy. The checkpoints are those of `tests/models.py`, written in HF's layout and read
by `from_pretrained`, so that the config that we write is tested as well. The tests compare with the recorded
file and never run this.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from magistral_mlx.config import ModelConfig  # noqa: E402
from tests import models  # noqa: E402

OUT = ROOT / "tests" / "data" / "transformers_logits.npz"
SEED = 11
SHORT, LONG = 24, 700
"""Every position of a short text; the last one of a long text, for which the cache must grow."""
COLUMNS = 97
"""Of a large vocabulary, every 97th logit: 1352 of them, spread over all of it."""


def main() -> None:
    ids = np.random.default_rng(SEED).integers(0, models.TINY.vocab_size, size=LONG)
    tied = replace(models.TINY, tie_embeddings=True)
    wide = models.wide_vocab()
    wide_ids = np.random.default_rng(SEED).integers(0, wide.vocab_size, size=SHORT)
    recorded = {
        "ids": ids.astype(np.int32),
        "wide_ids": wide_ids.astype(np.int32),
        "short": _logits(models.TINY, ids[:SHORT]),
        "long": _logits(models.TINY, ids)[-1],
        "tied": _logits(tied, ids[:SHORT])[-1],
        "wide": _logits(wide, wide_ids)[-1, ::COLUMNS],
    }
    OUT.parent.mkdir(exist_ok=True)
    np.savez_compressed(OUT, **recorded)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    for name, values in recorded.items():
        print(f"{name}: {values.shape}, largest {np.abs(values).max():.4f}")


def _logits(config: ModelConfig, ids: np.ndarray) -> np.ndarray:
    """`(positions, vocabulary)` in float32."""
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        path = models.write_hf(Path(directory), config, seed=SEED)
        model = transformers.MistralForCausalLM.from_pretrained(path, dtype=torch.float32)
        return model(torch.tensor(ids[None])).logits[0].numpy()


if __name__ == "__main__":
    main()
