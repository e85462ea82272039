"""Free disk space, compared with what is to be written.

Knows disks. Does not know what is written (`hub`, `convert`).
"""

import shutil
from collections.abc import Mapping
from pathlib import Path


def shortage(needed: Mapping[Path, int]) -> str | None:
    """What does not fit on its disk, with all figures; None: there is room.

    needed: path → bytes still to be written there, summed for each disk.
    """
    disks: dict[int, list[Path]] = {}
    for path in needed:
        disks.setdefault(_place(path).stat().st_dev, []).append(path)
    for paths in disks.values():
        place = _place(paths[0])
        if (free := shutil.disk_usage(place).free) < sum(needed[path] for path in paths):
            wanted = " and ".join(f"{path} needs {_size(needed[path])} more" for path in paths)
            return f"{wanted} on disk and {place} has {_size(free)} free; make room or use another disk"
    return None


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


def _place(path: Path) -> Path:
    """The longest part of a path that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
