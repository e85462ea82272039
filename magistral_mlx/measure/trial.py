"""One trial: load, warm up and time a model in a process of its own, with this package or with mlx-lm.

Both ends of that process are here. `spawn` starts it (`python -m magistral_mlx.measure.trial`), writes the
job to its standard input, and reads JSON lines: one as each step begins, and a last one with the results. So
two models are never in memory together, and no trial depends on the state that another left.

Does not know which jobs to run (`bench`), nor statistics (`figures`).
"""
# ruff: noqa: PLC0415 -- importing is part of what is measured

import json
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from typing import Any, TypeAlias, TypeVar

from magistral_mlx.errors import MagistralError

from .figures import Json

T = TypeVar("T")
OURS, PEER = "magistral_mlx", "mlx-lm"
QUESTION = "What is 48 + 37?"
WARM_UP = 512
_MARK = "@bench "
"""Prefix of our lines; libraries print others."""

_Generate: TypeAlias = Callable[[list[int], int], Generator[int, Any, None]]
"""(prompt, limit) → ids, each as soon as it is known."""


def spawn(job: Json, begin: Callable[[str], None]) -> Json:
    """Run one trial to its end in a process of its own; `begin` is called as each step begins."""
    command = [sys.executable, "-m", "magistral_mlx.measure.trial"]
    last, noise = Json(), ""
    with subprocess.Popen(  # noqa: S603
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as process:
        assert process.stdin
        assert process.stdout
        try:
            with suppress(BrokenPipeError):  # it exited early; its last output tells why
                process.stdin.write(json.dumps(job))
                process.stdin.close()
            for line in process.stdout:
                if not line.startswith(_MARK):
                    noise = line.strip() or noise
                    continue
                last = json.loads(line.removeprefix(_MARK))
                if "begins" in last:
                    begin(f"{job['engine']}: {last['begins']}")
        except BaseException:
            process.kill()
            raise
    if "error" in last:
        raise MagistralError(last["error"])
    if process.returncode or "points" not in last:
        how = noise or f"exit code {process.returncode}; out of memory?"
        raise MagistralError(f"a trial of {job['engine']} failed: {how}")
    return last


def _trial(job: Json) -> Json:
    return (_ours if job["engine"] == OURS else _peers)(job)


def _ours(job: Json) -> Json:
    _report(begins="load")
    start = time.perf_counter()
    from magistral_mlx.chat import Magistral
    from magistral_mlx.decoder.engine import decode, prefill
    from magistral_mlx.decoder.sampling import Sampler, Sampling

    imported = time.perf_counter()
    with Magistral.load(job["model"], dtype=job["dtype"]) as model:
        loaded = time.perf_counter()

        def generate(ids: list[int], limit: int) -> Generator[int, Any, None]:
            caches = model.transformer.new_caches()
            logits = exhaust(prefill(model.transformer, ids, caches))
            sampler = Sampler(Sampling(temperature=job["temperature"]), job["seed"])
            yield from decode(model.transformer, logits, caches, sampler=sampler, limit=limit)

        return {
            "import_seconds": imported - start,
            "load_seconds": loaded - imported,
            "reply": _reply(model, job["reply_tokens"]),
            "speculated": _reply(model, job["reply_tokens"], speculate=True) if job["speculate"] else None,
            "points": model.run(lambda: _points(job, generate)),
        }


def _peers(job: Json) -> Json:
    """mlx-lm, run as by its own `stream_generate`, with wired memory; weights cast to our dtype."""
    _report(begins="load")
    start = time.perf_counter()
    import mlx.core as mx

    utils, generating = import_module("mlx_lm.utils"), import_module("mlx_lm.generate")
    samplers, sampling = import_module("mlx_lm.sample_utils"), {"temp": job["temperature"], "top_p": 0.95}
    imported = time.perf_counter()
    model: Any = utils.load(job["weights"])[0]
    loaded = time.perf_counter()
    model.set_dtype(getattr(mx, job["dtype"]))
    mx.eval(model.parameters())
    if mx.metal.is_available():
        mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    mx.random.seed(job["seed"])

    def generate(ids: list[int], limit: int) -> Generator[int, Any, None]:
        sampler = samplers.make_sampler(**sampling)
        for token, _ in generating.generate_step(mx.array(ids), model, max_tokens=limit, sampler=sampler):
            yield token

    return {
        "import_seconds": imported - start,
        "load_seconds": loaded - imported,
        "reply": None,
        "speculated": None,
        "points": _points(job, generate),
    }


def _points(job: Json, generate: _Generate) -> list[Json]:
    """A warm-up, then each prompt."""
    for ids in job["prompts"][:1]:
        _point(generate, ids[-WARM_UP:], 8)
    points = list[Json]()
    for ids in job["prompts"]:
        _report(begins=f"a prompt of {len(ids)}")
        points.append(_point(generate, ids, job["tokens"]))
    return points


def _point(generate: _Generate, ids: list[int], tokens: int) -> Json:
    """Time to the first id, then of `tokens` more; the last id is not read, since it may be cheaper."""
    import mlx.core as mx

    mx.clear_cache()
    mx.reset_peak_memory()
    start = time.perf_counter()
    drawn = generate(ids, tokens + 2)
    next(drawn)
    first = time.perf_counter()
    for _ in range(tokens):
        next(drawn)
    end = time.perf_counter()
    drawn.close()
    return {
        "context": len(ids),
        "first_token_seconds": first - start,
        "decode_tokens_per_second": tokens / (end - first),
        "peak_bytes": mx.get_peak_memory(),
    }


def _reply(model: Any, max_tokens: int, *, speculate: bool = False) -> Json | None:
    """A whole reply to one question, with its statistics; None if `max_tokens` is 0."""
    if not max_tokens:
        return None
    _report(begins="a whole reply, with speculation" if speculate else "a whole reply")
    model.ask(QUESTION, max_tokens=2, seed=0)
    start = time.perf_counter()
    reply = model.ask(QUESTION, max_tokens=max_tokens, seed=0, speculate=speculate)
    seconds = time.perf_counter() - start
    rates = {
        "decode_tokens_per_second": reply.stats.decode_tokens_per_second,
        "tokens_per_pass": reply.stats.tokens_per_pass,
    }
    outcome = {"question": QUESTION, "answer": reply.answer, "finish_reason": reply.finish_reason}
    return outcome | asdict(reply.stats) | rates | {"seconds": seconds}


def exhaust(steps: Generator[Any, Any, T]) -> T:
    """Exhaust a generator and return its return value: the logits of `prefill`."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value


def _report(**line: Any) -> None:
    sys.stdout.write(_MARK + json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        _report(**_trial(json.load(sys.stdin)))
    except MagistralError as error:
        _report(error=str(error))
        sys.exit(1)
