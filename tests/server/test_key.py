"""The server's API key: where it comes from, and which are valid, checked before anything is loaded."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from magistral_mlx.cli.app import cli
from magistral_mlx.cli.serve import check, serve
from magistral_mlx.errors import ServerError


@pytest.fixture
def key_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MAGISTRAL_API_KEY", raising=False)
    return tmp_path / "key"


def key_of(*arguments: object) -> str | None:
    return check(serve.make_context("serve", [str(argument) for argument in arguments]).params)  # type: ignore[arg-type]


def test_the_key_is_the_files_content_without_the_line_end(key_file: Path):
    key_file.write_text("a key\n")
    assert key_of("--host", "0.0.0.0", "--api-key-file", key_file) == "a key"
    assert key_of() is None


@pytest.mark.parametrize(
    ("content", "message"), [(b"\n", "is empty"), (b"\xff", "cannot be read"), ("é", "ASCII")]
)
def test_a_file_without_a_valid_key_is_refused(key_file: Path, content: bytes | str, message: str):
    key_file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ServerError, match=message):
        key_of("--api-key-file", key_file)


def test_key_file_and_environment_variable_exclude_each_other(
    key_file: Path, monkeypatch: pytest.MonkeyPatch
):
    key_file.write_text("one")
    monkeypatch.setenv("MAGISTRAL_API_KEY", "two")
    done = CliRunner().invoke(cli, ["serve", "--model", "demo", "--api-key-file", str(key_file)])
    assert done.exit_code == 2
    assert "exclude each other" in done.stderr
    assert "two" not in done.output


def test_other_addresses_than_loopback_need_a_key(key_file: Path):
    done = CliRunner().invoke(cli, ["serve", "--model", "demo", "--host", "0.0.0.0"])
    assert done.exit_code == 1
    assert "--api-key-file" in done.stderr
