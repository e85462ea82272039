"""Loads and replies that cannot fit are refused before anything is computed; tight ones warn, once."""

from dataclasses import replace

import pytest

from magistral_mlx import memory
from magistral_mlx.config import MAGISTRAL, ModelConfig, Quantization
from magistral_mlx.errors import MagistralWarning, MemoryLimitError
from magistral_mlx.talk.guard import Guard

WEIGHTS = 13_260_000_000
"""In 4 bit."""


def make_guard(
    monkeypatch: pytest.MonkeyPatch, gib: int, config: ModelConfig = MAGISTRAL, kv_bits: int | None = None
) -> Guard:
    monkeypatch.setattr(memory, "this_machine", lambda: memory.mac(gib))
    return Guard(config, WEIGHTS, itemsize=2, kv_bits=kv_bits)


PACKED = replace(MAGISTRAL, quantization=Quantization())


def test_what_fits_gives_no_warning(monkeypatch: pytest.MonkeyPatch):
    guard = make_guard(monkeypatch, 32)
    guard.check_load("it")
    guard.check_reply(300, 40000)


def test_load_with_little_room_warns_once(monkeypatch: pytest.MonkeyPatch):
    guard = make_guard(monkeypatch, 24)
    with pytest.warns(
        MagistralWarning, match=r"40,960 tokens of context with it take 20\.\d GB .*sysctl"
    ) as warnings:
        guard.check_load("it")
    guard.check_load("it")  # warned before: another warning would be an error here
    assert len(warnings) == 1


def test_load_that_cannot_fit_is_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(
        MemoryLimitError, match=r"it takes 13\.\d GB .* can give 11\.5 GB; .*wired_limit_mb=13312"
    ):
        make_guard(monkeypatch, 16, PACKED).check_load("it")
    with pytest.raises(MemoryLimitError, match="quantize it first: magistral-mlx convert it --out DIR"):
        make_guard(monkeypatch, 8).check_load("it")
    with pytest.raises(MemoryLimitError, match="nothing shorter fits either"):
        make_guard(monkeypatch, 8, PACKED).check_load("it")


def test_prompt_that_cannot_fit_is_refused_and_a_long_reply_warns(monkeypatch: pytest.MonkeyPatch):
    guard = make_guard(monkeypatch, 24)
    with pytest.warns(
        MagistralWarning, match=r"a reply of 40,960 tokens may run out of memory: .* what would fit"
    ):
        guard.check_reply(300, 40960)
    guard.check_reply(300, 40960)  # warned before
    with pytest.raises(MemoryLimitError, match=r"the prompt of 30,000 tokens takes .* 8-bit KV cache"):
        guard.check_reply(30_000, 1)
    packed = make_guard(monkeypatch, 24, kv_bits=8)
    packed.check_reply(30_000, 1)
    with pytest.raises(MemoryLimitError, match=r"held 2\.0 GB"):
        packed.check_reply(30_000, 1, held=2 * 10**9)


def test_warns_once_past_the_advised_context(monkeypatch: pytest.MonkeyPatch):
    guard = make_guard(monkeypatch, 64)
    guard.check_context(40960)
    with pytest.warns(MagistralWarning, match="past 40,960 tokens of context") as warnings:
        guard.check_context(40961)
    guard.check_reply(50_000, 10)
    assert len(warnings) == 1


@pytest.mark.parametrize(("gib", "expected"), [(16, 1), (24, 4), (32, 8), (64, 8)])
def test_at_once_is_limited_by_memory(monkeypatch, gib, expected):
    monkeypatch.setattr(memory, "this_machine", lambda: memory.mac(gib))
    guard = Guard(MAGISTRAL, WEIGHTS, itemsize=2)
    assert guard.at_once(8) == expected
    assert guard.at_once(2) == min(expected, 2)
    assert Guard(MAGISTRAL, WEIGHTS, itemsize=2, kv_bits=8).at_once(8) >= expected
