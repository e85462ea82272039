"""Fetch the libraries that the web page ships with, as pinned in its vendor/versions.json.

    python scripts/vendor_page.py            fetch what is pinned; refuse files whose hash differs
    python scripts/vendor_page.py --record   after editing a version: fetch, and record the new SHA-256s

Uses npm to download the registry's package files only: no package's scripts are run.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

VENDOR = Path(__file__).parent.parent / "magistral_mlx" / "server" / "page" / "vendor"
VERSIONS = VENDOR / "versions.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--record", action="store_true")
    record = parser.parse_args().record
    packages = json.loads(VERSIONS.read_text(encoding="utf-8"))
    fetched = [found for package in packages for found in fetch(package)]
    wrong = [entry["as"] for entry, content in fetched if entry.get("sha256") != sha256(content)]
    if wrong and not record:
        sys.exit(f"not as recorded, nothing was written: {', '.join(wrong)}")
    for entry, content in fetched:
        (VENDOR / entry["as"]).write_bytes(content)
        entry["sha256"] = sha256(content)
    VERSIONS.write_text(json.dumps(packages, indent=2) + "\n", encoding="utf-8")
    print(f"{len(fetched)} files, {sum(len(content) for _, content in fetched):,} bytes")


def fetch(package: dict[str, Any]) -> list[tuple[dict[str, str], bytes]]:
    """The wanted files of one package."""
    name = f"{package['package']}@{package['version']}"
    with tempfile.TemporaryDirectory() as place:
        subprocess.run(  # noqa: S603 -- our own pins
            ["npm", "pack", "--silent", "--ignore-scripts", name],  # noqa: S607 -- wherever npm is
            cwd=place,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        with tarfile.open(next(Path(place).glob("*.tgz"))) as archive:
            return [(entry, read(archive, entry["file"])) for entry in package["files"]]


def read(archive: tarfile.TarFile, name: str) -> bytes:
    found = archive.extractfile(f"package/{name}")
    if found is None:
        sys.exit(f"{archive.name}: {name} is no file")
    return found.read()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    main()
