"""The model used last: a valid name or none, whatever is in the file."""

import sys
from pathlib import Path

import pytest

from magistral_mlx.fetch import last_model
from magistral_mlx.fetch.hub import RECOMMENDED


@pytest.fixture
def last_model_file(tmp_path, monkeypatch):
    monkeypatch.setenv("MAGISTRAL_MLX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "last_model"


def test_the_last_model_is_remembered(last_model_file, tmp_path, monkeypatch):
    assert last_model.last_used() is None
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("demo", RECOMMENDED, "mistralai/Magistral-Small-2506@main"):
        last_model.remember(name)
        assert last_model.last_used() == name
    last_model.remember("./demo")
    assert last_model.last_used() == str(tmp_path / "demo"), "a directory is found from anywhere"
    assert [path.name for path in last_model_file.parent.iterdir()] == ["last_model"]


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"\0", b"gone", b"/gone/away", b"a/b\nc/d", b"x" * 9999]
)
def test_an_invalid_file_names_no_model(last_model_file, content):
    last_model_file.parent.mkdir()
    last_model_file.write_bytes(content)
    assert last_model.last_used() is None


def test_without_a_home_directory_nothing_is_remembered(monkeypatch):
    def no_home(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MAGISTRAL_MLX_CACHE", raising=False)
    monkeypatch.setattr(Path, "expanduser", no_home)
    last_model.remember("demo")
    assert last_model.last_used() is None


def test_a_directory_that_cannot_be_written_is_no_error(last_model_file):
    last_model_file.parent.touch()
    last_model.remember("demo")
    assert last_model.last_used() is None


@pytest.mark.parametrize(
    ("platform", "xdg", "expected"),
    [
        ("linux", "", ".cache/magistral_mlx/last_model"),
        ("linux", "xdg", "xdg/magistral_mlx/last_model"),
        ("darwin", "", "Library/Caches/magistral_mlx/last_model"),
    ],
)
def test_the_file_is_where_the_platform_keeps_caches(platform, xdg, expected, tmp_path, monkeypatch):
    monkeypatch.delenv("MAGISTRAL_MLX_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / xdg) if xdg else "")
    monkeypatch.setattr(sys, "platform", platform)
    last_model.remember("demo")
    assert (tmp_path / expected).read_text() == "demo\n"
