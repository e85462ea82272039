"""A checkpoint → an MLX directory, in the memory of one row block whatever the model's size.

All output shapes are known before the first weight is read (`plan`), so every file's header is written first;
then each tensor's blocks (`quantize`) are written at their offsets, flushed, and recorded (`journal`). A
conversion that was killed resumes where it was, with the same bytes as its result. The target appears by one
rename, with its `manifest` inside.

Does not know tokenizers: the files beside the weights (`sidecars`) are passed as bytes. Prints nothing:
progress is a callback.
"""

import math
import os
import threading
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from magistral_mlx.disk import manifest
from magistral_mlx.disk.journal import Journal, fault, flush, flush_directory, work_directory
from magistral_mlx.disk.room import shortage
from magistral_mlx.disk.tensorfile import to_bytes
from magistral_mlx.errors import ConversionError

from .job import Job, versions
from .plan import Plan, to_json
from .quantize import Loss, blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a conversion is, in bytes of source weights."""

    done: int
    total: int
    tensor: str


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What was written. `errors`: relative RMS error of each quantized matrix, from a sample of its rows."""

    plan: Plan
    errors: Mapping[str, float]


def convert(job: Job, progress: Callable[[Progress], None] = lambda _: None) -> Converted:
    """Make the directory `job.out` in mlx-lm's format.

    Raises ConversionError with the reason. `job.out` does not exist then; what was written is kept beside it,
    and the same call resumes from there.
    """
    # A symlink or "." cannot be renamed over, but its real path can.
    job = replace(job, out=Path(os.path.realpath(job.out)))
    planned = job.plan()
    try:
        journal = Journal(job.out, job.fingerprint(planned))
        if not journal.published:
            _check_target(job, planned.total_bytes + sum(map(len, job.sidecars.values())))
        with journal, _hashing(job) as hashes:
            _check_allowed(job, journal)
            if not journal.published:
                _write_weights(job, planned, journal, progress)
                _write_files(journal.out, {**planned.documents(), **job.sidecars})
                _write_files(journal.out, {manifest.PATH: _manifest(job, planned, journal, hashes)})
                _check_source(job, journal)
            journal.publish()
    except OSError as error:
        source = job.checkpoint.path
        reads = error.filename is not None and Path(error.filename).is_relative_to(source)
        doing = f"reading {source}" if reads else f"writing {job.out}"
        raise ConversionError(
            f"{doing} failed: {error.strerror or error}; fix that and run it again: it resumes"
        ) from error
    return Converted(plan=planned, errors=_errors(journal))


def refuse_existing(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConversionError(f"{out} exists and nothing is overwritten; choose another --out or remove it")


def _check_target(job: Job, needed: int) -> None:
    out, source = job.out, job.checkpoint.path
    refuse_existing(out)
    if source.resolve() in [out.resolve(), *out.resolve().parents]:
        raise ConversionError(f"{out} lies inside the source {source}; choose an --out beside it")
    written = work_directory(out).rglob("*.safetensors")
    if short := shortage({out: needed - sum(file.stat().st_blocks * 512 for file in written)}):
        raise ConversionError(short)


def _check_allowed(job: Job, journal: Journal) -> None:
    """Non-finite weights that an earlier run was allowed to convert need `allow_nonfinite` again."""
    found = [name for name, error in journal.done.items() if error == math.inf]
    if found and not job.allow_nonfinite:
        raise ConversionError(
            f"{found[0]} holds weights that are not finite (NaN or Inf), which an earlier run accepted with "
            f"--allow-nonfinite; give it again, or remove {journal.work} to start over"
        )


def _check_source(job: Job, journal: Journal) -> None:
    """The source must not have changed since its fingerprint was taken."""
    if not job.source().items() <= journal.fingerprint.items():
        raise ConversionError(
            f"the source {job.checkpoint.path} changed while it was converted; remove {journal.work} and "
            "start over"
        )


def _write_weights(job: Job, planned: Plan, journal: Journal, progress: Callable[[Progress], None]) -> None:
    """Write every tensor that the journal does not list yet; each is flushed before it is recorded."""
    tensors = job.checkpoint.tensors
    done, total = 0, sum(tensors[name].entry.nbytes for name in planned.outputs)
    _check_unfinished(planned, journal)
    with ExitStack() as stack:
        files = _open_outputs(planned, journal, stack)
        for name, outputs in planned.outputs.items():
            if name in journal.done:
                done += tensors[name].entry.nbytes
                continue
            fd, loss = files[outputs[0].file.name], Loss()
            for block in blocks(
                job.checkpoint,
                name,
                planned.scheme(name),
                planned.dtype,
                measure=job.verify,
                allow_nonfinite=job.allow_nonfinite,
            ):
                for entry, part in zip(outputs, block.parts, strict=True):
                    _pwrite(fd, to_bytes(part), entry.offset + block.first * entry.row_bytes)
                loss.add(block)
                done += block.rows * tensors[name].entry.row_bytes
                fault("block")
                progress(Progress(done=done, total=total, tensor=name))
            flush(fd)
            journal.record(name, loss.relative())


def _open_outputs(planned: Plan, journal: Journal, stack: ExitStack) -> dict[str, int]:
    """The output files by name, of their final size and with their headers; `stack` closes them."""
    files: dict[str, int] = {}
    for name, head in planned.heads.items():
        files[name] = os.open(journal.out / name, os.O_RDWR | os.O_CREAT, 0o644)
        stack.callback(os.close, files[name])
        os.ftruncate(files[name], planned.file_bytes(name))
        _pwrite(files[name], memoryview(head), 0)
        flush(files[name])
        fault("header")
    flush_directory(journal.out)
    return files


def _check_unfinished(planned: Plan, journal: Journal) -> None:
    """Output files of an earlier run must still be there, at their full size."""
    for name in planned.heads if journal.done else ():
        file = journal.out / name
        if not file.is_file() or file.stat().st_size != planned.file_bytes(name):
            raise ConversionError(
                f"{file}, of an unfinished conversion, is missing or was cut off since; remove "
                f"{journal.work} to start over"
            )


def _pwrite(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def _write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            flush(file.fileno())
        fault("file")
    for parent in {directory, *((directory / name).parent for name in files)}:
        flush_directory(parent)


@contextmanager
def _hashing(job: Job) -> Generator[dict[Path, "Future[str]"]]:
    """Hash the source files in a separate thread while their weights are converted."""
    stopped = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            files = job.checkpoint.files if job.verify else []
            yield {file: pool.submit(manifest.sha256, file, stop=stopped.is_set) for file in files}
        finally:
            stopped.set()


def _manifest(job: Job, planned: Plan, journal: Journal, hashes: "Mapping[Path, Future[str]]") -> bytes:
    """The manifest, from what is on the disk now."""
    source = {file.name: (file, hashes[file].result() if hashes else None) for file in job.checkpoint.files}
    beside = job.sidecars.keys() - {"README.md"}  # people edit it, on the Hub too, and downloads leave it out
    names = [*planned.heads, *planned.documents(), *beside]
    outputs = {name: journal.out / name for name in names}
    return to_json(
        {
            "format": 1,
            "source_name": job.source_name or job.checkpoint.path.resolve().name,
            "recipe": str(job.recipe),
            "source": {name: manifest.described(file, digest) for name, (file, digest) in source.items()},
            "outputs": {
                name: manifest.described(file, manifest.sha256(file) if job.verify else None)
                for name, file in outputs.items()
            },
            "versions": versions(),
            "relative_rms_error": {  # JSON has no infinity
                path: error if math.isfinite(error) else None for path, error in _errors(journal).items()
            },
        }
    )


def _errors(journal: Journal) -> dict[str, float]:
    return {name.removesuffix(".weight"): error for name, error in journal.done.items() if error is not None}
