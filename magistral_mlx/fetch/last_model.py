"""Which model was used last, so that `ask` need not be told again.

Knows one small file in the cache. Does not know what a name leads to (`hub`).
"""

import os
import sys
from contextlib import suppress
from pathlib import Path

from .hub import HUB_NAME, directory


def last_used() -> str | None:
    """The name last remembered, if it can be read and, where it is a directory's, is still there."""
    try:
        name = _file().read_text(encoding="utf-8").strip()
    except (OSError, ValueError, RuntimeError):  # RuntimeError: nobody's home
        return None
    known = name == "demo" or HUB_NAME.fullmatch(name) or (name.startswith("/") and directory(name))
    return name if known else None


def remember(name: str) -> None:
    """Keep `name` as the model last used. A convenience: where it cannot be written, nothing happens."""
    place = None if name == "demo" else directory(name)
    with suppress(OSError, ValueError, RuntimeError):
        file = _file()
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f"{file.name}.{os.getpid()}")
        beside.write_text(f"{place.resolve() if place else name}\n", encoding="utf-8")
        beside.replace(file)


def _file() -> Path:
    """The file that keeps the last name: in MAGISTRAL_MLX_CACHE, or where the platform keeps caches."""
    home = Path("~/Library/Caches" if sys.platform == "darwin" else "~/.cache").expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME") or home) / "magistral_mlx"
    return Path(os.environ.get("MAGISTRAL_MLX_CACHE") or base) / "last_model"
