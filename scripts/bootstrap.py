"""Make `.venv`: this package, editable, with its development group. Run by `make`, or by hand.

Runs on any Python ≥ 3.9 with nothing installed, on macOS and Linux, and may be run again at any time: a
usable `.venv` is kept and updated, anything else in its place is recreated. In this order:

    uv on PATH             uv does all of it
    this Python ≥ 3.11     venv and pip
    an older Python, or    uv is fetched with pip into build/uv, and finds or fetches a newer Python
    one without ensurepip

Does not check whether anything is up to date: the Makefile does. Written in the syntax of Python 3.9.
"""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PRIVATE = ROOT / "build" / "uv"
OLDEST = (3, 11)
NEW_ENOUGH = sys.version_info[:2] >= OLDEST


class SetupError(Exception):
    """Why setup failed, and what to do about it."""


def run(*command: object) -> None:
    """Run a step and show its output; its input is closed, so that nothing waits for an answer."""
    words = [str(word) for word in command]
    print("+", " ".join(words), flush=True)
    done = subprocess.run(words, cwd=ROOT, stdin=subprocess.DEVNULL, check=False)  # noqa: S603 (ours)
    if done.returncode:
        raise SetupError(f"this step failed with exit code {done.returncode}: {' '.join(words)}")


def works(python: object, code: str) -> bool:
    """Whether an interpreter is there and runs `code`."""
    command = [str(python), "-c", code]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0  # noqa: S603
    except OSError:
        return False


def kept() -> bool:
    """Whether the existing `.venv` can be kept: its Python still runs and is new enough."""
    return works(VENV / "bin" / "python", f"import sys; assert sys.version_info >= {OLDEST}")


def with_uv(uv: object) -> None:
    """Environment and packages by uv, which looks for Python on PATH first and downloads one if needed."""
    if not kept():
        shutil.rmtree(VENV, ignore_errors=True)
        run(uv, "venv", "--python", sys.executable if NEW_ENOUGH else ">=3.11", VENV)
    run(uv, "pip", "install", "--python", VENV / "bin" / "python", "--editable", ".", "--group", "dev")


def with_pip() -> None:
    """Environment by venv, packages by pip; pip is updated first, since an old one knows no groups."""
    python = VENV / "bin" / "python"
    if not (kept() and works(python, "import pip")):
        run(sys.executable, "-m", "venv", "--clear", VENV)
    run(python, "-m", "pip", "install", "--quiet", "--upgrade", "pip>=25.1")
    run(python, "-m", "pip", "install", "--quiet", "--editable", ".", "--group", "dev")


def private_uv() -> Path:
    """A private uv in build/uv, installed with whichever pip this Python has."""
    shutil.rmtree(PRIVATE, ignore_errors=True)
    if works(sys.executable, "import venv, ensurepip"):
        run(sys.executable, "-m", "venv", PRIVATE)
        run(PRIVATE / "bin" / "python", "-m", "pip", "install", "--quiet", "uv")
    elif works(sys.executable, "import pip"):
        run(sys.executable, "-m", "pip", "install", "--quiet", "--target", PRIVATE, "uv")
    else:
        raise SetupError(
            f"{sys.executable} has neither ensurepip nor pip. Install uv, or (Debian, Ubuntu) the package "
            "python3-venv, and run this again."
        )
    return PRIVATE / "bin" / "uv"


def main() -> None:
    if sys.argv[1:]:
        if sys.argv[1] not in ("-h", "--help"):
            raise SetupError(f"expected no arguments, found {' '.join(sys.argv[1:])}; run it without")
        print(__doc__)
        return
    if sys.version_info < (3, 9):  # noqa: UP036 (a clear message instead of a syntax error)
        raise SetupError(f"this needs Python 3.9 or newer, found {sys.version.split()[0]}")
    uv = shutil.which("uv")
    if uv:
        with_uv(uv)
    elif NEW_ENOUGH and works(sys.executable, "import venv, ensurepip"):
        with_pip()
    else:
        with_uv(private_uv())


if __name__ == "__main__":
    try:
        main()
    except (SetupError, OSError) as problem:
        sys.exit(f"setup: {problem}")
