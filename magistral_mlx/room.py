"""Room on disks: what is to be written, where, against what is free there.

Knows disks. Does not know what is written (`hub`, `convert`).
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from .errors import ConversionError


def check_room(needed: Mapping[Path, int]) -> None:
    """Refuse what a disk has no room for, with all figures.

    needed: path → bytes still to be written there; what lies on one disk is summed.
    """
    disks: dict[int, list[Path]] = {}
    for path in needed:
        disks.setdefault(_place(path).stat().st_dev, []).append(path)
    for paths in disks.values():
        total, place = sum(needed[path] for path in paths), _place(paths[0])
        if (free := shutil.disk_usage(place).free) < total:
            wanted = " and ".join(f"{path} needs {needed[path] / 1e9:.1f} GB more" for path in paths)
            raise ConversionError(
                f"{wanted} on disk and {place} has {free / 1e9:.1f} GB free; make room or choose another disk"
            )


def _place(path: Path) -> Path:
    """What of a path is there already."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
