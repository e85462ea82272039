"""The memory plan: the machine's numbers, the plan against MLX's counter, early refusals."""

import math
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magistral_mlx import Magistral, memory
from magistral_mlx.config import MAGISTRAL, ModelConfig
from magistral_mlx.decoder.engine import decode
from magistral_mlx.decoder.matrix import Matrix
from magistral_mlx.decoder.model import Transformer
from magistral_mlx.decoder.sampling import Sampler, Sampling
from magistral_mlx.disk.checkpoint import open_checkpoint
from magistral_mlx.disk.tensorfile import Entry
from magistral_mlx.errors import MemoryLimitError
from magistral_mlx.memory import Machine, MemoryPlan
from tests import models
from tests.decoder.test_cache import feed


def test_model_that_cannot_fit_is_refused_before_reading(tmp_path, monkeypatch):
    def read(*_, **__):
        raise AssertionError

    path = models.write_native(tmp_path / "model")
    needed = open_checkpoint(path).nbytes(mx.float32)
    monkeypatch.setattr(memory, "budget", lambda: needed - 1)
    monkeypatch.setattr(mx, "load", read)
    monkeypatch.setattr(Entry, "read", read)
    with pytest.raises(MemoryLimitError) as caught:
        Magistral.load(path, dtype="float32")
    assert f"magistral-mlx convert {path} --out DIR" in str(caught.value)
    assert "quantize it first" in str(caught.value)


def test_budget_of_a_gpu_is_its_working_set(monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 22_906_503_168})
    assert memory.budget() == 22_906_503_168


@pytest.mark.skipif(mx.metal.is_available(), reason="a GPU has a limit of its own")
def test_budget_of_a_cpu_is_its_physical_memory():
    assert 2**28 < memory.budget() < 2**50


@pytest.mark.parametrize(("device", "dtype"), [("gpu", mx.bfloat16), ("cpu", mx.float32)])
def test_dtype_follows_the_device(monkeypatch, device, dtype):
    device_class = type("Device", (), {"type": getattr(mx.DeviceType, device)})
    monkeypatch.setattr(mx, "default_device", device_class)
    assert memory.default_dtype() == dtype


WEIGHTS = 13_260_000_000
"""In 4 bit."""


def planned(machine: Machine, context: int = 40960, **values: Any) -> MemoryPlan:
    return MemoryPlan(config=MAGISTRAL, weights=WEIGHTS, context=context, machine=machine, **values)


def peak(config: ModelConfig, prompt: int, reply: int, *, chunk: int, kv_bits: int | None) -> tuple[int, int]:
    """Bytes of weights, and MLX's own peak during prefill and decoding."""
    shapes = dict(config.matrices())

    class Random:
        def matrix(self, path: str) -> Matrix:
            weight = mx.random.normal(shapes[path]) * shapes[path][1] ** -0.5
            mx.eval(weight)
            return Matrix(weight=weight)

        def vector(self, _: str) -> mx.array:
            weight = mx.ones(config.dim)
            mx.eval(weight)
            return weight

    before = mx.get_active_memory()
    model = Transformer(config, Random())
    weights = mx.get_active_memory() - before
    mx.reset_peak_memory()
    caches = model.new_caches(kv_bits)
    ids = [i * 7919 % config.vocab_size for i in range(prompt)]
    logits = feed(model, ids, caches, chunk=chunk)
    assert len(list(decode(model, logits, caches, sampler=Sampler(Sampling(), 1), limit=reply))) == reply
    return weights, mx.get_peak_memory() - before


BASE = replace(models.TINY, vocab_size=512)
SHAPES = {  # by what is large: config, prompt, reply, chunk
    "feed-forward": (replace(BASE, dim=256, hidden_dim=2048), 150, 4, 2048),
    "scores": (replace(BASE, hidden_dim=256), 1000, 4, 512),
    "cache": (
        replace(BASE, n_layers=6, dim=64, n_heads=4, n_kv_heads=4, head_dim=64, hidden_dim=64),
        *(900, 4, 128),
    ),
    "vocabulary": (models.wide_vocab(), 20, 4, 2048),
}


@pytest.mark.parametrize(
    ("name", "kv_bits"),
    [
        *(("feed-forward", None), ("scores", 8), ("cache", 8), ("vocabulary", None)),
        *(
            pytest.param(name, kv_bits, marks=pytest.mark.slow)
            for name, kv_bits in (("feed-forward", 8), ("scores", None), ("cache", None), ("vocabulary", 8))
        ),
    ],
)
def test_the_plan_is_within_10_percent_of_the_measured_peak(name: str, kv_bits: int | None):
    config, prompt, reply, chunk = SHAPES[name]
    weights, measured = peak(config, prompt, reply, chunk=chunk, kv_bits=kv_bits)
    plan = MemoryPlan(
        config=config,
        weights=weights,
        context=prompt + reply,
        prompt=prompt,
        machine=memory.this_machine(),
        itemsize=4,
        kv_bits=kv_bits,
        chunk=chunk,
    )
    assert plan.total == pytest.approx(measured, rel=0.1)


def test_plan_of_the_real_shape():
    """24 B in 4 bit with 40,960 tokens on a Mac: 13.3 + 6.7 + 0.9 GB, or 13.3 + 3.6 + 1.0."""
    plan = planned(memory.mac(32))
    assert (plan.kv, plan.fits) == (40960 * 160 * 1024, True)
    assert plan.transient == pytest.approx(0.86e9, rel=0.03)
    packed = replace(plan, kv_bits=8)
    assert packed.kv == 40960 * 85 * 1024
    assert plan.total - packed.total > 2.5e9
    # the scores that Metal never materializes: 32 heads x 2048 x 40,960, in a CPU's float32
    cpu = replace(plan, itemsize=4, machine=Machine(memory=2**35, budget=2**35, metal=False))
    assert cpu.transient > 32 * 2048 * 40960 * 4


def test_late_quantization_peaks_before_it_starts():
    plain, packed = (planned(memory.mac(32), 40960, kv_bits=bits) for bits in (None, 8))
    never, late = (replace(packed, quantize_after=after) for after in (40960, 32768))
    assert never.total == plain.total
    assert packed.total < late.total < plain.total
    assert late.kv == packed.kv
    assert late.total > late.weights + memory.kv_bytes(MAGISTRAL, 32768, itemsize=2)


def test_scores_are_counted_for_head_dims_metal_does_not_fuse():
    odd = replace(planned(memory.mac(32)), config=replace(MAGISTRAL, head_dim=96))
    assert odd.transient > 32 * 2048 * 40960 * 2


@pytest.mark.parametrize(("gib", "share"), [(16, 2 / 3), (32, 2 / 3), (36, 3 / 4), (128, 3 / 4)])
def test_budget_of_another_mac_is_an_estimate(gib: int, share: float):
    machine = memory.mac(gib)
    assert machine.estimated
    assert machine.budget == pytest.approx(gib * 2**30 * share, abs=1)


@given(
    gib=st.integers(8, 128),
    context=st.integers(1, 131072),
    kv_bits=st.sampled_from([None, 8]),
    prompt=st.integers(0),
)
def test_remedies_fit_and_longer_contexts_do_not(gib: int, context: int, kv_bits: int | None, prompt: int):
    plan = planned(memory.mac(gib), context, kv_bits=kv_bits, prompt=min(prompt, context) or None)
    assert plan.fits or plan.longest < context
    assert all(other.fits for other in plan.remedies)
    assert not (plan.fits and plan.remedies)
    if plan.longest:
        assert plan.longest % 1024 == 0
        assert plan.at(plan.longest).fits
    if plan.longest + 1024 <= context:
        assert not plan.at(plan.longest + 1024).fits
    if limit := plan.wired_limit_mb:
        raised = replace(plan, machine=replace(plan.machine, budget=limit * 2**20))
        assert raised.fits
        assert limit * 2**20 <= plan.machine.highest_limit


def test_24_gb_plan_advises_less_context_or_a_higher_limit():
    plan = planned(memory.mac(24))
    assert not plan.fits
    short, packed = plan.remedies
    assert (short.kv_bits, packed.kv_bits) == (None, 8)
    assert 16384 < short.context < packed.context < 40960
    assert plan.wired_limit_mb == math.ceil(plan.total / 2**28) * 256
    assert f"sudo sysctl iogpu.wired_limit_mb={plan.wired_limit_mb}" in plan.advice()


def test_plan_of_a_cpu_advises_no_wired_limit():
    plan = planned(Machine(memory=2**34, budget=2**34, metal=False))
    assert not plan.fits
    assert plan.with_limit is None
    assert "sysctl" not in plan.advice()


def test_this_machine_on_metal(monkeypatch: pytest.MonkeyPatch):
    info = {"memory_size": 2**35, "max_recommended_working_set_size": 22_906_503_168}
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: info)
    machine = memory.this_machine()
    assert (machine.memory, machine.budget) == (2**35, 22_906_503_168)
    assert machine.metal
    assert not machine.estimated
