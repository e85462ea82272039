"""The model used last: a valid name or none, whatever is in the file."""

import sys
from pathlib import Path

import pytest

from magistral_mlx.fetch import last_model
from magistral_mlx.fetch.hub import RECOMMENDED


@pytest.fixture
def memory(tmp_path, monkeypatch):
    monkeypatch.setenv("MAGISTRAL_MLX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "last_model"


def test_the_last_model_is_remembered(memory, tmp_path, monkeypatch):
    assert last_model.last_used() is None
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("demo", RECOMMENDED, "mistralai/Magistral-Small-2506@main"):
        last_model.remember(name)
        assert last_model.last_used() == name
    last_model.remember("./demo")
    assert last_model.last_used() == str(tmp_path / "demo"), "a directory is found from anywhere"
    assert [path.name for path in memory.parent.iterdir()] == ["last_model"]


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"\0", b"gone", b"/gone/away", b"a/b\nc/d", b"x" * 9999]
)
def test_a_spoilt_memory_is_none(memory, content):
    memory.parent.mkdir()
    memory.write_bytes(content)
    assert last_model.last_used() is None


def test_a_memory_without_a_home_is_none(monkeypatch):
    def homeless(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MAGISTRAL_MLX_CACHE", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    last_model.remember("demo")
    assert last_model.last_used() is None


def test_a_memory_that_cannot_be_written_is_none(memory):
    memory.parent.touch()
    last_model.remember("demo")
    assert last_model.last_used() is None


@pytest.mark.parametrize(
    ("platform", "xdg", "where"),
    [
        ("linux", "", ".cache/magistral_mlx/last_model"),
        ("linux", "xdg", "xdg/magistral_mlx/last_model"),
        ("darwin", "", "Library/Caches/magistral_mlx/last_model"),
    ],
)
def test_the_memory_is_where_the_platform_keeps_caches(platform, xdg, where, tmp_path, monkeypatch):
    monkeypatch.delenv("MAGISTRAL_MLX_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / xdg) if xdg else "")
    monkeypatch.setattr(sys, "platform", platform)
    last_model.remember("demo")
    assert (tmp_path / where).read_text() == "demo\n"
