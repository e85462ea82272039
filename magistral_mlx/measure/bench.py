"""How fast a model runs here, with this package and mlx-lm, and how close to the memory-bandwidth ceiling.

Knows what to measure and in which order: both engines in turn, with the same ids, dtype and sampling. Does
not know statistics (`figures`), the machine (`machine`) or how a trial runs (`trial`). Does not print
(`cli.bench`).
"""

import platform
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from magistral_mlx.errors import CheckpointError, MagistralError, MemoryLimitError

from .figures import Json, ceiling, ratios, summary
from .machine import bandwidth_of, measured_bandwidth, this_computer
from .trial import OURS, PEER, spawn

if TYPE_CHECKING:
    import mlx.core as mx

    from magistral_mlx.disk.checkpoint import Checkpoint

FORMAT = 1
"""Version of the report, which `docs/benchmarks.md` describes."""
_FILLER = "A train of {n} wagons carries {n} passengers in each; how many does it carry in all? "

_Progress: TypeAlias = Callable[[int, int, str], None]
"""(trials done, trials in all, what begins now)."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure: decoding `tokens` ids after prompts of `lengths` ids, `trials` times.

    reply_tokens: limit of the one whole reply to a real question; 0: no such reply.
    temperature: for the ids after prompts; 0: greedy.
    speculate: generate the whole reply once more, with speculation.
    """

    lengths: tuple[int, ...] = (512, 4096, 16384, 40960)
    tokens: int = 128
    trials: int = 5
    reply_tokens: int = 2048
    temperature: float = 0.7
    dtype: str | None = None
    against_peer: bool = False
    speculate: bool = False


def run(name: str, settings: Settings, progress: _Progress) -> Json:
    """Measure the model called `name` and return the report; `progress` is called as each step begins.

    Raises a MagistralError: no such model, it does not fit, or the peer is missing or cannot read it.
    """
    if settings.against_peer and not util.find_spec("mlx_lm"):
        raise MagistralError(f"{PEER} is not installed; get it with: pip install 'magistral_mlx[bench]'")
    with resolved_model(name) as (place, tokenizer_path):
        return _run(name, place, tokenizer_path, settings, progress)


def _run(name: str, place: str, tokenizer_path: Path, settings: Settings, progress: _Progress) -> Json:
    import mlx.core as mx

    from magistral_mlx import memory
    from magistral_mlx.disk.checkpoint import open_checkpoint
    from magistral_mlx.fetch import hub
    from magistral_mlx.text.tokenizer import Tokenizer

    weights = hub.resolve(place).weights
    checkpoint, tokenizer = open_checkpoint(weights), Tokenizer.from_directory(tokenizer_path)
    if settings.against_peer and checkpoint.layout == "native":
        raise CheckpointError(
            f"{PEER} does not read Mistral's own layout; first: magistral-mlx convert {name} --out DIR"
        )
    dtype: mx.Dtype = getattr(mx, settings.dtype) if settings.dtype else memory.default_dtype()
    lengths, skipped = _lengths(checkpoint, settings, dtype)
    job: Json = {
        "engine": OURS,
        "model": place,
        "weights": str(weights),
        "dtype": str(dtype).removeprefix("mlx.core."),
        "prompts": [prompt(tokenizer.encode_chat, length) for length in lengths],
        "tokens": settings.tokens,
        # A model of random weights may sample ids that its tokenizer does not have.
        "reply_tokens": settings.reply_tokens if tokenizer.vocab_size >= checkpoint.config.vocab_size else 0,
        "speculate": settings.speculate,
        "temperature": settings.temperature,
        "seed": 0,
    }
    opening, trials = _trials(job, settings, progress)
    computer, model = this_computer(), _model(name, checkpoint, dtype)
    known = bandwidth_of(computer)
    bandwidth = known or measured_bandwidth()

    def limit(context: int) -> float:
        return ceiling(bandwidth, model, context + settings.tokens / 2)

    return {
        "format": FORMAT,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": {"name": computer.name, **asdict(computer)},
        "bandwidth": {"bytes_per_second": bandwidth, "source": "table" if known else "measured"},
        "versions": versions(),
        "model": model,
        "settings": asdict(settings) | {"dtype": job["dtype"], "device": mx.default_device().type.name},
        "skipped": skipped,
        "first_load_seconds": opening["load_seconds"],
        "reply": opening["reply"],
        "speculated": opening["speculated"],
        "summary": {engine: summary(found, limit) for engine, found in trials.items()},
        "ratios": ratios(trials[OURS], trials[PEER]) if settings.against_peer else [],
        "trials": trials,
    }


def _trials(job: Json, settings: Settings, progress: _Progress) -> tuple[Json, dict[str, list[Json]]]:
    """First a load with a whole reply, which warms the file cache; then the trials, engines in turn."""
    engines = (OURS, PEER) if settings.against_peer else (OURS,)
    each = Json(job, reply_tokens=0, speculate=False)
    jobs = [Json(each, engine=engine, seed=trial) for trial in range(settings.trials) for engine in engines]
    opening = spawn(Json(job, prompts=[]), lambda what: progress(0, 1 + len(jobs), what))
    trials: dict[str, list[Json]] = {engine: [] for engine in engines}
    for done, one in enumerate(jobs, 1):
        trials[one["engine"]].append(spawn(one, lambda what, n=done: progress(n, 1 + len(jobs), what)))
    return opening, trials


def prompt(encode: Callable[[str], list[int]], length: int) -> list[int]:
    """Exactly `length` ids of a chat prompt: too many are cut in the middle, so that both ends stay valid."""
    repeats, ids = 1, list[int]()
    while len(ids) < length:
        ids = encode("".join(_FILLER.format(n=n) for n in range(repeats)))
        repeats *= 2
    tail = min(16, max(1, length // 2))
    return ids[: length - tail] + ids[len(ids) - tail :]


@contextmanager
def resolved_model(name: str) -> Generator[tuple[str, Path]]:
    """Where to load the model from, and its tokenizer's directory. The demo is converted to 4 bit first."""
    from magistral_mlx.convert import conversion
    from magistral_mlx.disk.checkpoint import open_checkpoint
    from magistral_mlx.fetch import hub
    from magistral_mlx.text import sidecars

    found = hub.resolve(name)
    if name != "demo":
        yield name, found.tokenizer
        return
    with tempfile.TemporaryDirectory() as directory:
        out, checkpoint = Path(directory) / "demo-4bit", open_checkpoint(found.weights)
        beside = sidecars.files(
            found.tokenizer, name=name, recipe="4bit", context=checkpoint.config.max_context
        )
        conversion.convert(conversion.Job(checkpoint=checkpoint, out=out, sidecars=beside))
        yield str(out), out


def _lengths(
    checkpoint: "Checkpoint", settings: Settings, dtype: "mx.Dtype"
) -> tuple[list[int], dict[str, str]]:
    """The lengths that fit context and memory, and why others are skipped: swap would measure a disk."""
    from magistral_mlx.memory import MemoryPlan, this_machine

    config, weights, machine = checkpoint.config, checkpoint.nbytes(dtype), this_machine()
    most = config.max_context - settings.tokens - 2
    kept, skipped = list[int](), dict[str, str]()
    for length in sorted({max(1, min(length, most)) for length in settings.lengths}):
        plan = MemoryPlan(
            config=config,
            weights=weights,
            context=length + settings.tokens,
            prompt=length,
            machine=machine,
            itemsize=dtype.size,
        )
        if plan.fits:
            kept.append(length)
        else:
            skipped[str(length)] = f"takes {plan.excess()}"
    if not kept:
        raise MemoryLimitError("no prompt fits beside the weights: " + "; ".join(skipped.values()))
    return kept, skipped


def _model(name: str, checkpoint: "Checkpoint", dtype: "mx.Dtype") -> Json:
    """The properties that determine the model's speed; bytes as in memory, computing in `dtype`."""
    config = checkpoint.config
    tensors = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if config.tie_embeddings or not name.startswith("model.embed_tokens.")
    }
    return {
        "name": Path(name).resolve().name if Path(name).exists() and name != "demo" else name,
        "parameters": config.parameters,
        "layers": config.n_layers,
        "vocabulary": config.vocab_size,
        "bits_per_weight": 8 * checkpoint.stored_bytes / config.parameters,
        "weight_bytes": checkpoint.nbytes(dtype),
        "read_bytes_per_token": replace(checkpoint, tensors=tensors).nbytes(dtype),
        "kv_bytes_per_token": config.kv_bytes_per_token(dtype.size),
    }


def versions() -> dict[str, str | None]:
    """Versions of the packages that affect speed; None: not installed."""

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    found = {package: version(package) for package in ("magistral_mlx", "mlx", "mlx-lm")}
    return found | {"python": platform.python_version()}
