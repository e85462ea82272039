"""The files of a Hub repository, how much of them is cached, and resumable downloads of the large ones.

When huggingface_hub is killed, it loses the partial download of a file: of a checkpoint in one file, all
47 GB. So large files are downloaded into its cache from here, each under its hash, appended to the part that
an earlier run had; huggingface_hub then finds them there and does the rest.

Knows the Hub's API and the paths of its cache. Does not know layouts or names of models (`hub`).
"""

import fcntl
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Self, cast

from magistral_mlx.disk import manifest
from magistral_mlx.errors import HubError

LARGE_BYTES = 32 * 10**6


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """blob: its path in the cache, named after its hash. sha256: None if it is not an LFS object."""

    name: str
    size: int
    blob: Path
    sha256: str | None

    @property
    def partial(self) -> Path:
        return self.blob.with_name(f"{self.blob.name}.partial")

    @property
    def missing(self) -> int:
        """Bytes still to be downloaded."""
        if self.blob.exists():
            return 0
        return self.size - (self.partial.stat().st_size if self.partial.exists() else 0)


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A Hub repository at one commit, with all or some of its files."""

    repo: str
    commit: str
    files: tuple[RemoteFile, ...]

    @classmethod
    def ask(cls, name: str) -> Self:
        """Query the Hub for "owner/repo" or "owner/repo@revision"; its errors are passed on."""
        from huggingface_hub import HfApi

        repo, _, revision = name.partition("@")
        info = HfApi().model_info(repo, revision=revision or None, files_metadata=True)
        blobs = cache() / f"models--{repo.replace('/', '--')}" / "blobs"
        found = (
            RemoteFile(
                name=file.rfilename,
                size=(file.lfs.size if file.lfs else file.size) or 0,
                blob=blobs / ((file.lfs.sha256 if file.lfs else file.blob_id) or "unknown"),
                sha256=file.lfs.sha256 if file.lfs else None,
            )
            for file in info.siblings or []
        )
        return cls(repo=repo, commit=info.sha or "main", files=tuple(found))

    def only(self, patterns: Iterable[str]) -> "Repository":
        patterns = tuple(patterns)
        kept = (file for file in self.files if any(fnmatch(file.name, pattern) for pattern in patterns))
        return replace(self, files=tuple(kept))

    @property
    def missing(self) -> int:
        return sum(file.missing for file in self.files)

    def fetch_large(self) -> None:
        """Download the large files into the cache; an interrupted one is resumed by the next run."""
        from huggingface_hub import constants

        for file in self.files:  # larger ones need Xet: left to huggingface_hub
            if LARGE_BYTES <= file.size <= constants.MAX_HTTP_DOWNLOAD_SIZE and not file.blob.exists():
                self._fetch(file)

    def _fetch(self, file: RemoteFile) -> None:
        from huggingface_hub import file_download, hf_hub_url, utils

        file.blob.parent.mkdir(parents=True, exist_ok=True)
        with file.partial.open("a+b") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise HubError(f"{self.repo} is being downloaded by another process; wait for it") from error
            if file.blob.exists():  # another process has just finished it
                return
            kept = stream.seek(0, os.SEEK_END)
            cast("Any", file_download).http_get(
                hf_hub_url(self.repo, file.name, revision=self.commit),
                stream,
                resume_size=kept,
                headers=cast("Any", utils).build_hf_headers(),
                expected_size=file.size,
                displayed_filename=file.name,
            )
            stream.flush()
            if kept and file.sha256 and manifest.sha256(file.partial) != file.sha256:
                file.partial.unlink()  # a crash may leave zeros where its last bytes should be
                raise HubError(f"{file.name} of {self.repo} was damaged; run it again: it starts over")
            file.partial.rename(file.blob)  # while locked, so that no other process resumes it


def cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
