"""The server's API key: where it comes from, and which are valid, checked before anything is loaded."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from magistral_mlx.cli.app import cli
from magistral_mlx.cli.serve import check, serve
from magistral_mlx.errors import ServerError


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MAGISTRAL_API_KEY", raising=False)
    return tmp_path / "key"


def key(*words: object) -> str | None:
    return check(serve.make_context("serve", [str(word) for word in words]).params)  # type: ignore[arg-type]


def test_the_key_is_the_files_without_the_line_end(file: Path):
    file.write_text("a key\n")
    assert key("--host", "0.0.0.0", "--api-key-file", file) == "a key"
    assert key() is None


@pytest.mark.parametrize(
    ("content", "told"), [(b"\n", "is empty"), (b"\xff", "cannot be read"), ("é", "ASCII")]
)
def test_a_file_without_a_key(file: Path, content: bytes | str, told: str):
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ServerError, match=told):
        key("--api-key-file", file)


def test_two_keys_are_one_too_many(file: Path, monkeypatch: pytest.MonkeyPatch):
    file.write_text("one")
    monkeypatch.setenv("MAGISTRAL_API_KEY", "two")
    done = CliRunner().invoke(cli, ["serve", "--model", "demo", "--api-key-file", str(file)])
    assert done.exit_code == 2
    assert "exclude each other" in done.stderr
    assert "two" not in done.output


def test_no_other_address_without_a_key(file: Path):
    done = CliRunner().invoke(cli, ["serve", "--model", "demo", "--host", "0.0.0.0"])
    assert done.exit_code == 1
    assert "--api-key-file" in done.stderr
