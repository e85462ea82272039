"""The examples of the README and the guide run as written, and what they and the docs name exists."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from magistral_mlx.cli.app import cli
from tests.serving import Running

ROOT = Path(__file__).parent.parent


def blocks(language: str, file: str = "README.md") -> list[str]:
    text = (ROOT / file).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize(
    ("file", "expected"), [("README.md", r"\[stop, \d+ \+ \d+ tokens\]"), ("docs/guide.md", r"\d+\n")]
)
def test_python_examples_run(
    *,
    file: str,
    expected: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    served: Running,
):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks("python", file)).replace("http://127.0.0.1:8000", served.url)
    exec(compile(code, file, "exec"), {})
    assert re.search(expected, capsys.readouterr().out)


def test_commands_and_options_exist():
    """Every command line parses: its command is there, and so is each option (none is run)."""
    text = re.sub(r"\\\n", " ", "\n".join(blocks("sh")))
    lines = [
        line for line in text.splitlines() if line.startswith(("magistral-mlx", "python scripts/convert.py"))
    ]
    assert len(lines) >= 6
    for line in lines:
        words = shlex.split(line.partition(" |")[0], comments=True)
        name = "convert" if words[0] == "python" else words[1]
        shown = CliRunner().invoke(cli, [name, "--help"])
        assert shown.exit_code == 0, line
        assert all(word in shown.output for word in words if word.startswith("--")), line


def test_files_named_in_the_docs_exist():
    """Every file that they link to, and every benchmark and result that they name."""
    documents = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    for document in documents:
        text = document.read_text(encoding="utf-8")
        linked = [document.parent / found for found in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text)]
        named = [ROOT / found for found in re.findall(r"\b(?:benchmarks|scripts)/[\w/-]+\.(?:py|json)", text)]
        for file in (*linked, *named):
            assert file.exists(), f"{document.name}: {file}"


def test_node_counts_in_the_docs_equal_the_results():
    found = json.loads((ROOT / "benchmarks" / "results" / "graph_nodes.json").read_text(encoding="utf-8"))
    document = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for row in found["rows"]:
        ours, theirs = row["nodes"].values()
        device = "as on a GPU" if row["as_on"] == "gpu" else "on a CPU"
        sampling = "greedy" if row["sampling"] == "greedy" else "temperature 0.7, top_p 0.95"
        [line] = [line for line in document.splitlines() if line.startswith(f"| {device}, {sampling} |")]
        assert line.endswith(f"| {ours} | {theirs} | {row['ratio']:.2f} |")


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", "\n".join(blocks("sh")), re.MULTILINE):
        assert f"\n{target}:" in makefile


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("-h", 0), ("demo", 1)])
def test_bootstrap_with_an_argument_installs_nothing(tmp_path: Path, argument: str, code: int):
    script = tmp_path / "scripts" / "bootstrap.py"  # a copy: it would create its .venv in tmp_path
    script.parent.mkdir()
    shutil.copy(ROOT / "scripts" / "bootstrap.py", script)
    done = subprocess.run([sys.executable, script, argument], capture_output=True, text=True, check=False)
    assert done.returncode == code
    output = done.stderr if code else done.stdout
    assert ("expected no arguments, found demo" if code else "Run by `make`, or by hand.") in output
    assert not (tmp_path / ".venv").exists()
