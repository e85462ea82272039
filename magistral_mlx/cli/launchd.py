"""The server as a launchd agent: it starts at login, and restarts when it fails.

Knows launchd's files and launchctl. Does not know what is served: it is passed the arguments of a command,
run by this Python. They must not contain secrets: other programs can see them while the command runs.
"""

import os
import plistlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from magistral_mlx.errors import ServerError

LABEL = "local.magistral-mlx"

_PASSED_ON = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "MAGISTRAL_MLX_CACHE")
"""Environment variables that locate models: launchd starts an agent without the shell's environment."""

_BUSY = (5, 37)
"""Exit codes of `launchctl bootstrap` while the previous agent is still shutting down."""

_PATIENCE = 30
"""Seconds to wait for that; launchd kills a process that has not exited after 20."""


def file(home: Path) -> Path:
    return home / "Library" / "LaunchAgents" / f"{LABEL}.plist"


def log(home: Path) -> Path:
    return home / "Library" / "Logs" / "magistral-mlx" / "server.log"


def bootstrap(home: Path) -> list[str]:
    """The command that loads the agent into launchd, and so starts it."""
    return ["launchctl", "bootstrap", _domain(), str(file(home))]


def bootout() -> list[str]:
    """The command that stops the agent and unloads it from launchd."""
    return ["launchctl", "bootout", f"{_domain()}/{LABEL}"]


def agent(arguments: Sequence[str], *, home: Path, environment: Mapping[str, str]) -> bytes:
    """The agent's plist. arguments: those of `magistral-mlx`."""
    return plistlib.dumps(
        {
            "Label": LABEL,
            "ProgramArguments": [sys.executable, "-m", "magistral_mlx", *arguments],
            "EnvironmentVariables": {name: environment[name] for name in _PASSED_ON if name in environment},
            "WorkingDirectory": str(home),
            "StandardOutPath": str(log(home)),
            "StandardErrorPath": str(log(home)),
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},  # restart, but not after an orderly exit
            "ThrottleInterval": 30,  # seconds between two starts: each may read 13 GB
            "ProcessType": "Interactive",  # otherwise launchd throttles it as background work
            "Umask": 0o077,  # only the owner may read the log
        }
    )


def install(content: bytes, *, home: Path, force: bool = False) -> None:
    """Write the plist and start the agent; an installed agent is replaced only with `force`.

    Raises:
        ServerError: one is installed, the plist cannot be written, or launchd refuses it.
    """
    if file(home).exists() and not force:
        raise ServerError(f"{file(home)} is there already; --force replaces it")
    _run(bootout())  # fails if there is none, which is fine
    _write(content, home)
    done = _run(bootstrap(home))
    end = time.monotonic() + _PATIENCE
    while done.returncode in _BUSY and time.monotonic() < end:
        time.sleep(1)
        done = _run(bootstrap(home))
    if done.returncode:
        raise ServerError(
            f"launchd did not start the agent ({_message(done)}). {file(home)} is written; try "
            f"`{' '.join(bootstrap(home))}` while you are logged in at the Mac itself"
        )


def uninstall(*, home: Path) -> None:
    """Stop the agent and remove its plist; the log stays.

    Raises:
        ServerError: no agent is installed, or its plist cannot be removed.
    """
    stopped = _run(bootout())
    try:
        file(home).unlink()
    except FileNotFoundError as error:
        if stopped.returncode:
            raise ServerError(f"no agent is installed: there is no {file(home)}") from error
    except OSError as error:
        raise ServerError(f"{file(home)} cannot be removed: {error.strerror}") from error


def status(*, home: Path) -> str | None:
    """The agent's state in launchd ("running", "not running"); None: it is not loaded.

    Raises:
        ServerError: no agent is installed.
    """
    if not file(home).exists():
        raise ServerError("no agent is installed; `magistral-mlx service install` installs one")
    printed = _run(["launchctl", "print", f"{_domain()}/{LABEL}"])
    if printed.returncode:
        return None
    lines = (line.strip().partition(" = ") for line in printed.stdout.splitlines())
    return next((value for name, _, value in lines if name == "state"), "unknown")


def _write(content: bytes, home: Path) -> None:
    """Write to a temporary file, then rename it; readable by its owner only."""
    beside = file(home).with_suffix(f".{os.getpid()}")
    try:
        file(home).parent.mkdir(parents=True, exist_ok=True)
        log(home).parent.mkdir(parents=True, exist_ok=True)
        beside.touch(mode=0o600)
        beside.write_bytes(content)
        beside.replace(file(home))
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise ServerError(f"{file(home)} cannot be written: {error.strerror}") from error


def _domain() -> str:
    return f"gui/{os.getuid()}"


def _run(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 -- our own arguments
    except OSError as error:
        raise ServerError(f"launchctl cannot be run: {error.strerror}") from error


def _message(done: "subprocess.CompletedProcess[str]") -> str:
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[0] if lines else f"error {done.returncode}"
