"""Remembers the model used last: the default of `--model`.

Knows one small file in the cache. Does not know how a name is resolved (`hub`).
"""

import os
import sys
from contextlib import suppress
from pathlib import Path

from .hub import HUB_NAME, directory


def last_used() -> str | None:
    """The remembered name, if it can be read; a directory must still exist."""
    try:
        name = _file().read_text(encoding="utf-8").strip()
    except (OSError, ValueError, RuntimeError):  # RuntimeError: no home directory
        return None
    known = name == "demo" or HUB_NAME.fullmatch(name) or (name.startswith("/") and directory(name))
    return name if known else None


def remember(name: str) -> None:
    """Remember `name` as the model used last. If that cannot be written, nothing happens."""
    place = None if name == "demo" else directory(name)
    with suppress(OSError, ValueError, RuntimeError):
        file = _file()
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f"{file.name}.{os.getpid()}")
        beside.write_text(f"{place.resolve() if place else name}\n", encoding="utf-8")
        beside.replace(file)


def _file() -> Path:
    """The file with the last name: in MAGISTRAL_MLX_CACHE, or in the platform's cache directory."""
    home = Path("~/Library/Caches" if sys.platform == "darwin" else "~/.cache").expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME") or home) / "magistral_mlx"
    return Path(os.environ.get("MAGISTRAL_MLX_CACHE") or base) / "last_model"
