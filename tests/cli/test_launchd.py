"""The launchd agent: its plist by launchd's rules, and the commands around it, with a fake launchctl."""

import os
import plistlib
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from magistral_mlx.cli import launchd
from magistral_mlx.cli.app import cli

KINDS = {  # of launchd.plist(5), those that are used here
    "Label": str,
    "ProgramArguments": list,
    "EnvironmentVariables": dict,
    "WorkingDirectory": str,
    "StandardOutPath": str,
    "StandardErrorPath": str,
    "RunAtLoad": bool,
    "KeepAlive": dict,
    "ThrottleInterval": int,
    "ProcessType": str,
    "Umask": int,
}
Run = Callable[..., Result]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MAGISTRAL_MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("MAGISTRAL_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(home: Path) -> Run:
    return lambda *words: CliRunner().invoke(cli, ["service", *map(str, words)])


@pytest.fixture
def launchctl(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A simulated Mac: a launchctl that records its arguments, and fails when told to."""
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    place = home / "bin"
    place.mkdir()
    (place / "launchctl").write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {place}/calls\n'
        f'code=$(sed -n "s/^$1 //p" {place}/fails | head -n 1)\n'
        f'sed -i.old "0,/^$1 /{{/^$1 /d;}}" {place}/fails\n'
        '[ "$1" = print ] && printf "gui/1/x = {\\n\\tstate = running\\n\\t\\tstate = active\\n}\\n"\n'
        '[ -z "$code" ] || echo "$1 failed: $code: of old" >&2\n'
        "exit ${code:-0}\n"
    )
    (place / "launchctl").chmod(0o755)
    (place / "fails").touch()
    (place / "calls").touch()
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    return place


def fails(launchctl: Path, *lines: str) -> None:
    (launchctl / "fails").write_text("".join(f"{line}\n" for line in lines))


def told(launchctl: Path) -> list[str]:
    return (launchctl / "calls").read_text().splitlines()


def lint(content: bytes) -> dict:
    """Parse the agent and check that launchd would accept it: known keys and types, absolute paths, no empty
    values.
    """
    assert content.startswith(b"<?xml")
    agent = plistlib.loads(content)
    assert {"Label", "ProgramArguments"} <= agent.keys() <= KINDS.keys()
    for name, value in agent.items():
        assert type(value) is KINDS[name], name
    assert all(type(word) is str and word for word in agent["ProgramArguments"])
    assert all(type(value) is str for value in agent["EnvironmentVariables"].values())
    paths = [agent[name] for name in ("WorkingDirectory", "StandardOutPath", "StandardErrorPath")]
    for path in (agent["ProgramArguments"][0], *paths):
        assert Path(path).is_absolute()
        assert "~" not in path
        assert "$" not in path
    assert os.access(agent["ProgramArguments"][0], os.X_OK)
    assert agent["KeepAlive"].keys() <= {"SuccessfulExit", "Crashed", "PathState", "OtherJobEnabled"}
    assert agent["ProcessType"] in ("Background", "Standard", "Adaptive", "Interactive")
    assert not any(word in content for word in (b"HF_TOKEN", b"API_KEY"))
    return agent


def test_an_agent_serves_from_login_on_and_again_when_it_failed(home: Path):
    environment = {"HF_HOME": "/models", "HF_TOKEN": "secret", "MAGISTRAL_API_KEY": "secret"}
    agent = lint(launchd.agent(["serve", "--model", "demo"], home=home, environment=environment))
    assert agent["ProgramArguments"] == [sys.executable, "-m", "magistral_mlx", "serve", "--model", "demo"]
    assert agent["EnvironmentVariables"] == {"HF_HOME": "/models"}
    assert agent["RunAtLoad"] is True
    assert agent["KeepAlive"] == {"SuccessfulExit": False}
    assert launchd.file(home).stem == agent["Label"]
    assert agent["StandardOutPath"].startswith(f"{home}/Library/Logs/")
    assert agent["Umask"] == 0o077


def test_its_program_runs(home: Path):
    agent = lint(launchd.agent(["serve", "--help"], home=home, environment={}))
    done = subprocess.run(agent["ProgramArguments"], capture_output=True, text=True, check=True)
    assert "Serve a model" in done.stdout


def test_printing_shows_what_would_be_and_does_nothing(run: Run, home: Path):
    done = run(
        "install", "--print", "--model", "demo", "--port", 8123, "--allow-host", "a", "--allow-host", "b"
    )
    assert done.exit_code == 0
    agent = lint(done.stdout.encode())
    serve = ["serve", "--model", "demo", "--port", "8123", "--allow-host", "a", "--allow-host", "b"]
    assert agent["ProgramArguments"][3:] == serve
    assert f"launchctl bootstrap gui/{os.getuid()} {launchd.file(home)}" in done.stderr
    assert not (home / "Library").exists()


def test_paths_become_whole(run: Run, home: Path):
    (home / "model").symlink_to(launchd.__file__.replace("cli/launchd.py", "demo"))
    (home / "key").write_text("abc\n")
    done = run("install", "--print", "--model", "./model", "--host", "0.0.0.0", "--api-key-file", "key")
    words = lint(done.stdout.encode())["ProgramArguments"][3:]
    assert words == [
        *("serve", "--model", str((home / "model").resolve())),
        *("--host", "0.0.0.0", "--api-key-file", str(home / "key")),
    ]
    assert "abc" not in done.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "no model was given, and there is no last used one"),
        (("--model", "no/where"), "no/where"),
        (("--model", "demo", "--prot", "1"), "No such option"),
        (("--model", "demo", "--port", "x"), "'x' is not a valid integer"),
        (("--model", "demo", "--host", "0.0.0.0"), "expected a key"),
        (("--model", "demo", "--api-key", "s3cret"), "put it in a file"),
        (("--model", "demo", "--api-key-file", "none"), "does not exist"),
    ],
)
def test_what_would_fail_at_login_fails_now(run: Run, home: Path, words: tuple[str, ...], told: str):
    done = run("install", "--print", *words)
    assert done.exit_code
    assert told in done.stderr
    assert "s3cret" not in done.output


def test_a_key_of_the_shells_is_not_relied_on(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MAGISTRAL_API_KEY", "s3cret")
    done = run("install", "--print", "--model", "demo", "--host", "0.0.0.0")
    assert done.exit_code
    assert "put it in a file" in done.stderr


@pytest.mark.parametrize("words", [("install", "--model", "demo"), ("uninstall",), ("status",)])
def test_elsewhere_than_on_a_mac_it_says_so(run: Run, home: Path, monkeypatch, words: tuple[str, ...]):
    monkeypatch.setattr("platform.system", lambda: "Linux")
    done = run(*words)
    assert done.exit_code
    assert "launchd is macOS's; on Linux use deploy/Dockerfile" in done.stderr
    assert not (home / "Library").exists()


def test_it_is_installed_asked_about_and_removed(run: Run, home: Path, launchctl: Path):
    domain = f"gui/{os.getuid()}"
    agent = f"{domain}/{launchd.LABEL}"
    assert run("install", "--model", "demo").exit_code == 0
    lint(launchd.file(home).read_bytes())
    assert stat.S_IMODE(launchd.file(home).stat().st_mode) == 0o600
    assert launchd.log(home).parent.is_dir()
    assert [path.name for path in launchd.file(home).parent.iterdir()] == [launchd.file(home).name]
    assert told(launchctl) == [f"bootout {agent}", f"bootstrap {domain} {launchd.file(home)}"]
    assert run("status").stdout.startswith("running;")
    assert run("uninstall").exit_code == 0
    assert not launchd.file(home).exists()
    assert told(launchctl)[2:] == [f"print {agent}", f"bootout {agent}"]


def test_what_is_there_is_replaced_only_with_force(run: Run, home: Path, launchctl: Path):
    run("install", "--model", "demo")
    before = launchd.file(home).read_bytes()
    done = run("install", "--model", "demo", "--port", 8123)
    assert done.exit_code
    assert "--force replaces it" in done.stderr
    assert launchd.file(home).read_bytes() == before
    assert run("install", "--force", "--model", "demo", "--port", 8123).exit_code == 0
    assert b"8123" in launchd.file(home).read_bytes()


def test_launchd_is_given_time_to_let_go_of_the_last_one(run: Run, launchctl: Path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    fails(launchctl, "bootout 3", "bootstrap 5", "bootstrap 37", "bootstrap 5")
    assert run("install", "--model", "demo").exit_code == 0
    assert [line.split()[0] for line in told(launchctl)] == ["bootout", *["bootstrap"] * 4]


def test_a_refusal_of_launchds_is_told(run: Run, home: Path, launchctl: Path):
    fails(launchctl, "bootstrap 125")
    done = run("install", "--model", "demo")
    assert done.exit_code
    assert "bootstrap failed: 125: of old" in done.stderr
    assert f"`launchctl bootstrap gui/{os.getuid()} {launchd.file(home)}`" in done.stderr


def test_status_and_uninstall_where_there_is_none(run: Run, launchctl: Path):
    assert "no agent is installed" in run("status").stderr
    fails(launchctl, "bootout 3")
    assert "no agent is installed" in run("uninstall").stderr


def test_installed_but_not_with_launchd(run: Run, launchctl: Path):
    run("install", "--model", "demo")
    fails(launchctl, "print 113")
    done = run("status")
    assert done.exit_code
    assert "launchd does not have it; start it: launchctl bootstrap" in done.stderr


def test_a_directory_that_cannot_be_written(run: Run, home: Path, launchctl: Path):
    (home / "Library").write_text("not a directory")
    done = run("install", "--model", "demo")
    assert done.exit_code
    assert "cannot be written" in done.stderr


def test_the_model_last_used_is_named(run: Run, home: Path):
    (home / "cache").mkdir()
    (home / "cache" / "last_model").write_text("demo\n")
    assert lint(run("install", "--print").stdout.encode())["ProgramArguments"][3:] == [
        "serve",
        "--model",
        "demo",
    ]
