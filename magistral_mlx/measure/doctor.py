"""Self-checks for a Mac: does this machine compute correctly? Each check can fail.

Results of the default device (the GPU, if there is one) are compared with a reference: the CPU in float32
with dequantized weights, NumPy in float64, a known answer. Without a GPU the checks run too, and say that it
was not checked. Does not print (`cli.doctor`).
"""

import statistics
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from magistral_mlx.chat import Magistral
from magistral_mlx.decoder.cache import KVCache
from magistral_mlx.decoder.matrix import Matrix
from magistral_mlx.decoder.model import Transformer
from magistral_mlx.decoder.sampling import Sampler, Sampling
from magistral_mlx.disk.checkpoint import Reader, load, open_checkpoint
from magistral_mlx.memory import default_dtype
from magistral_mlx.talk.reply import Reply
from magistral_mlx.text.tokenizer import Tokenizer

from .bench import resolved_model, versions
from .figures import Json
from .machine import bandwidth_of, this_computer
from .real_layer import CONFIG, RandomWeights, computed, layer, spelled_out

FORMAT = 1
"""Version of the report, which `docs/benchmarks.md` describes."""
QUESTIONS = {"What is 48 + 37?": "85", "What is 6 × 14?": "84"}  # noqa: RUF001 -- as people write it
TOLERANCE = {mx.float32: 1e-3, mx.bfloat16: 5e-2}
"""Largest error allowed, relative to the largest value, by the dtype of the computation."""
EDGE = 1e-5
"""float32 cannot decide whether an id is in the nucleus if the mass above it is this close to top_p."""
SLACK = 2**20
"""Bytes that may stay allocated when a model is closed."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """The result of a check: whether it passed, and what was found."""

    name: str
    right: bool
    found: str
    figures: Json = field(default_factory=dict[str, Any])


def examine(tell: Callable[[Check], None]) -> Json:
    """Run every check, pass each result to `tell`, and return the report. A check that raises has failed."""
    checks = list[Check]()
    with resolved_model("demo") as (place, _):
        for name, check in CHECKS.items():
            checks.append(_run(name, check, Path(place)))
            tell(checks[-1])
            mx.clear_cache()
    computer = this_computer()
    info = dict(mx.device_info())
    return {
        "format": FORMAT,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": {"name": computer.name, **asdict(computer)},
        "device": {"type": mx.default_device().type.name, "info": info},
        "versions": versions(),
        "right": all(check.right for check in checks),
        "checks": [asdict(check) for check in checks],
    }


def _run(name: str, check: Callable[[Path], Check], place: Path) -> Check:
    try:
        return check(place)
    except Exception as error:  # noqa: BLE001 -- any exception is a finding
        what = f"{type(error).__name__}: {error}".replace(str(place), "demo").replace(str(Path.home()), "~")
        return Check(name=name, right=False, found=what)


def _logits(place: Path) -> Check:
    """The demo model's logits, at every position of a chat."""
    checkpoint = open_checkpoint(place)
    ids = Tokenizer.from_directory(place).encode_chat(next(iter(QUESTIONS)))

    def scores(model: Transformer) -> mx.array:
        return model.logits(model(mx.array([ids]), model.new_caches()))

    found = {dtype: _eval(scores(load(checkpoint, dtype))) for dtype in {mx.float32, default_dtype()}}
    with _on_cpu():
        expected = _eval(scores(Transformer(checkpoint.config, _Dequantized(checkpoint, mx.float32))))
    return _compared("the demo model's logits", found, expected)


class _Dequantized(Reader):
    """Reads a checkpoint's weights dequantized."""

    def matrix(self, path: str) -> Matrix:
        return Matrix(weight=super().matrix(path).dequantized())


def _layer(_: Path) -> Check:
    """A layer of real size: its outputs, and its time for one position."""
    x = mx.random.normal((4, CONFIG.dim), key=mx.random.key(0))
    found = {
        dtype: _eval(computed(RandomWeights(dtype), x.astype(dtype)))
        for dtype in {mx.float32, default_dtype()}
    }
    with _on_cpu():
        expected = _eval(spelled_out(RandomWeights(mx.float32), x))
    check = _compared("a layer of real size", found, expected)
    seconds, nbytes = _layer_seconds(x[:1].astype(default_dtype()))
    speed, known = nbytes / seconds, bandwidth_of(this_computer())
    share = f", {speed / known:.0%} of this chip's bandwidth" if known else ""
    timed = {"seconds": seconds, "weight_bytes": nbytes, "bytes_per_second": speed}
    return Check(
        name=check.name,
        right=check.right,
        found=f"{check.found}; {1e3 * seconds:.2f} ms for one position: {speed / 1e9:.1f} GB/s{share}",
        figures=check.figures | timed,
    )


def _layer_seconds(x: mx.array) -> tuple[float, int]:
    """Median seconds of the layer for one position, and the bytes of its weights."""
    block, cache = layer(RandomWeights(x.dtype)), KVCache()
    seconds = list[float]()
    for _ in range(6):
        start = time.perf_counter()
        mx.eval(block(x[None], cache))
        seconds.append(time.perf_counter() - start)
    read = block.attention.qkv, block.attention.out, block.feed_forward.gate_up, block.feed_forward.down
    return statistics.median(seconds[1:]), sum(array.nbytes for part in read for array in part.arrays())


def _nucleus(_: Path) -> Check:
    """The nucleus: its members, and whether draws are among them."""
    rng, sampling = np.random.default_rng(0), Sampling()
    asked = wrong = draws = outside = other = 0
    for seed, width in enumerate((0.5, 1.0, 2.0, 4.0)):
        logits = (width * rng.normal(size=CONFIG.vocab_size)).astype(np.float32)
        inside, certain, edge = _expected_nucleus(logits, sampling)
        array, sampler = mx.array(logits), Sampler(sampling, seed)
        ids = np.concatenate([edge, rng.integers(CONFIG.vocab_size, size=8)])
        kept = np.asarray(cast("Any", sampler.keeps(array, mx.array(ids))))
        asked += int(certain[ids].sum())
        wrong += int((kept != inside[ids])[certain[ids]].sum())
        for position in range(8):
            drawn = cast("int", sampler.draw(array, position).item())
            sorted_ = cast("int", sampler.settle(array, position).item())
            draws += 1
            outside += drawn >= 0 and bool(certain[drawn]) and not inside[drawn]
            other += drawn >= 0 and drawn != sorted_
    return Check(
        name="the nucleus",
        right=not (wrong or outside or other),
        found=f"of {CONFIG.vocab_size} ids {wrong} of {asked} on the wrong side of its edge; {draws} draws, "
        f"{outside} outside, {other} unlike the same draw by sorting",
        figures={"asked": asked, "wrong": wrong, "draws": draws, "outside": outside, "unlike_sorting": other},
    )


def _expected_nucleus(logits: Any, sampling: Sampling) -> tuple[Any, Any, Any]:
    """In float64: which ids are inside, for which float32 is certain, and some ids near the edge."""
    x = logits.astype(np.float64) / sampling.temperature
    down = np.argsort(-x, kind="stable")
    mass = np.exp(x[down] - x[down[0]])
    above = np.empty_like(x)
    above[down] = (np.cumsum(mass) - mass) / mass.sum()
    count = int((above < sampling.top_p).sum())
    edge = down[max(count - 60, 0) : count + 60 : 5]
    return above < sampling.top_p, np.abs(above - sampling.top_p) > EDGE, edge


def _reply(place: Path) -> Check:
    """The demo model's answers to questions that it can answer."""
    with Magistral.load(place) as model:
        greedy = Sampling(temperature=0)  # with a limit: a damaged model may never end its reply
        replies = {asked: model.ask(asked, sampling=greedy, max_tokens=256) for asked in QUESTIONS}
        sampled = model.ask(next(iter(QUESTIONS)), seed=0, max_tokens=256)
    answers = [f"{asked} {reply.answer.strip()!r}" for asked, reply in replies.items()]
    right = all(_is_right(reply, QUESTIONS[asked]) for asked, reply in replies.items())
    rate = sampled.stats.decode_tokens_per_second
    return Check(
        name="thinking and answer",
        right=right,
        found=f"{', '.join(answers)}; {rate:.0f} tokens/s at temperature 0.7",
        figures={"answers": {asked: reply.answer for asked, reply in replies.items()}}
        | {"thinking_tokens": sampled.stats.thinking_tokens, "decode_tokens_per_second": rate},
    )


def _is_right(reply: Reply, expected: str) -> bool:
    """There is reasoning, no tag in the answer, the expected answer, and a regular end."""
    tagged = "<think" in reply.answer or "</think" in reply.answer
    return bool(reply.thinking) and not tagged and expected in reply.answer and reply.finish_reason == "stop"


def _memory(place: Path) -> Check:
    """Memory that a loaded model takes, and releases when closed."""
    mx.clear_cache()
    before = mx.get_active_memory()
    with Magistral.load(place) as model:
        weights, loaded = open_checkpoint(place).nbytes(model.dtype), mx.get_active_memory() - before
        peak = model.ask(next(iter(QUESTIONS)), max_tokens=32, seed=0).stats.peak_memory - before
    mx.clear_cache()
    left = mx.get_active_memory() - before
    right = abs(loaded - weights) < SLACK and loaded <= peak < loaded + 64 * SLACK and left < SLACK
    return Check(
        name="memory",
        right=right,
        found=f"weights {weights:,} bytes, active {loaded:,}, peak {peak:,}, left after closing {left:,}",
        figures={"weights": weights, "active": loaded, "peak": peak, "left": left},
    )


def _compared(name: str, found: Mapping[mx.Dtype, mx.array], expected: mx.array) -> Check:
    """The largest error of each, relative to the largest value. NaN fails."""
    gpu = mx.default_device().type == mx.DeviceType.gpu
    against = "GPU against CPU" if gpu else "quantized against dequantized on the CPU (no GPU to check)"
    largest = mx.max(mx.abs(expected))
    errors = {
        dtype: cast("float", (mx.max(mx.abs(array.astype(mx.float32) - expected)) / largest).item())
        for dtype, array in found.items()
    }
    described = [
        f"{errors[dtype]:.1e} in {_dtype_name(dtype)} (at most {TOLERANCE[dtype]:.0e})" for dtype in errors
    ]
    return Check(
        name=name,
        right=all(errors[dtype] <= TOLERANCE[dtype] for dtype in errors),
        found=f"{against}: off by {', '.join(described)}",
        figures={"relative_error": {_dtype_name(dtype): value for dtype, value in errors.items()}},
    )


def _dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _eval(array: mx.array) -> mx.array:
    mx.eval(array)
    return array


@contextmanager
def _on_cpu() -> Generator[None]:
    device = mx.default_device()
    mx.set_default_device(mx.Device(mx.cpu))
    try:
        yield
    finally:
        mx.set_default_device(device)


CHECKS: dict[str, Callable[[Path], Check]] = {
    "the demo model's logits": _logits,
    "a layer of real size": _layer,
    "the nucleus": _nucleus,
    "thinking and answer": _reply,
    "memory": _memory,
}
