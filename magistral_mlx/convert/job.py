"""The settings of a conversion, and the fingerprint that must match for a later run to resume it.

Does not know how it is carried out (`conversion`), or how far it is (`journal`).
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from magistral_mlx.config import ModelConfig
from magistral_mlx.disk.checkpoint import Checkpoint
from magistral_mlx.disk.tensorfile import NAMES
from magistral_mlx.errors import ConversionError

from .plan import Plan, plan
from .recipe import RECIPES, Recipe


@dataclass(frozen=True, kw_only=True)
class Job:
    """A conversion to run.

    dtype: of norms, scales, biases and unquantized matrices; None: the source's.
    source_name: the source's name in the manifest (its Hub name); None: its directory's name.
    sidecars: relative path → bytes of the files beside the weights.
    dequantize: accept a source that is itself quantized, although that only adds error.
    allow_nonfinite: accept weights that are NaN or Inf.
    verify: hash source and output, and measure the quantization error, for the manifest.
    """

    checkpoint: Checkpoint
    out: Path
    recipe: Recipe = RECIPES["4bit"]
    dtype: mx.Dtype | None = None
    source_name: str | None = None
    sidecars: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    dequantize: bool = False
    allow_nonfinite: bool = False
    verify: bool = True

    def with_sidecars(self, sidecars: Mapping[str, bytes]) -> "Job":
        return replace(self, sidecars=sidecars)

    def plan(self) -> Plan:
        """What would be written."""
        if not self.dequantize:
            refuse_quantized(self.checkpoint.config, str(self.checkpoint.path))
        return plan(self.checkpoint.config, self.recipe, self.dtype or self.checkpoint.dtype)

    def fingerprint(self, planned: Plan) -> dict[str, Any]:
        """What must be unchanged for a conversion to resume.

        `allow_nonfinite` is not part of it and may be set later: without it no non-finite tensor is recorded
        as finished, and the journal marks those that were written with it.
        """
        config = json.dumps(self.checkpoint.config.to_json(), sort_keys=True).encode()
        beside = sorted(self.sidecars.items())
        return {
            "recipe": str(self.recipe),
            "dtype": NAMES[planned.dtype],
            "verification": self.verify,
            **self.source(),
            "source's configuration": hashlib.sha256(config).hexdigest(),
            **{f"file {name}": hashlib.sha256(data).hexdigest() for name, data in beside},
            **{f"version of {name}": number for name, number in versions().items()},
        }

    def source(self) -> dict[str, str]:
        """Size and modification time of each source file."""
        stats = {file.name: file.stat() for file in self.checkpoint.files}
        return {
            f"source {name}": f"{stat.st_size} bytes of time {stat.st_mtime_ns}"
            for name, stat in stats.items()
        }


def refuse_quantized(config: ModelConfig, name: str) -> None:
    if config.quantization is not None:
        raise ConversionError(
            f"{name} is already quantized, and doing it again only adds error; convert "
            "from the bf16 checkpoint, use this one as it is, or give --dequantize to convert it anyway"
        )


def versions() -> dict[str, str]:
    """Versions of the packages that determine the bytes that are written."""
    return {name: version(name) for name in ("magistral_mlx", "mlx")}
