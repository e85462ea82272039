"""Fixtures that several test files share; what they build is in the helper modules beside this one."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

from magistral_mlx import Magistral, Reply
from magistral_mlx.text.tokenizer import Tokenizer
from tests.fake_hub import point_at
from tests.serving import QUESTION, Running
from tests.tokenizers import full_tekken, tiny_tekken

# A test must not fail because the machine is busy.
settings.register_profile("magistral", deadline=None)
settings.load_profile("magistral")


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty Hub cache, and a Hub address at which nothing listens."""
    from huggingface_hub import constants  # noqa: PLC0415 -- half a second, and not in every test

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    point_at("http://127.0.0.1:9", monkeypatch)


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    """Version → a tokenizer of some 1270 ids, in milliseconds."""
    return cache(lambda version: Tokenizer.from_file(tiny_tekken(tmp_path_factory.mktemp("tiny"), version)))


@pytest.fixture(scope="session")
def full_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    """Version → a tokenizer with the real 131072 ids, opened once a session."""
    return cache(lambda version: Tokenizer.from_file(full_tekken(tmp_path_factory.mktemp("full"), version)))


@pytest.fixture(scope="session")
def served() -> Iterator[Running]:
    """The demo model behind HTTP, started once a session; for tests that do not change it."""
    with Magistral.load("demo") as model, Running(model) as running:
        yield running


@pytest.fixture(scope="session")
def reply(served: Running) -> Reply:
    """The library's own reply to `QUESTION`, for comparison with the server's."""
    return served.service.model.ask(QUESTION, seed=1)
