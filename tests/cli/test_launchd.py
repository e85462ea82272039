"""The launchd agent: its plist by launchd's rules, and `service`, with a fake launchctl."""

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

KINDS = {  # the keys of launchd.plist(5) that are used here
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
    return lambda *arguments: CliRunner().invoke(cli, ["service", *map(str, arguments)])


@pytest.fixture
def launchctl(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A simulated Mac: a launchctl that records its arguments, and fails as `set_failures` says."""
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    directory = home / "bin"
    directory.mkdir()
    (directory / "launchctl").write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {directory}/calls\n'
        f'code=$(sed -n "s/^$1 //p" {directory}/fails | head -n 1)\n'
        f'sed -i.old "0,/^$1 /{{/^$1 /d;}}" {directory}/fails\n'
        '[ "$1" = print ] && printf "gui/1/x = {\\n\\tstate = running\\n\\t\\tstate = active\\n}\\n"\n'
        '[ -z "$code" ] || echo "$1 failed: $code: of old" >&2\n'
        "exit ${code:-0}\n"
    )
    (directory / "launchctl").chmod(0o755)
    (directory / "fails").touch()
    (directory / "calls").touch()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return directory


def set_failures(launchctl: Path, *lines: str) -> None:
    (launchctl / "fails").write_text("".join(f"{line}\n" for line in lines))


def recorded_calls(launchctl: Path) -> list[str]:
    return (launchctl / "calls").read_text().splitlines()


def parse_agent(content: bytes) -> dict:
    """Parse the agent and check that launchd would accept it: known keys and types, absolute paths, no empty
    values.
    """
    assert content.startswith(b"<?xml")
    agent = plistlib.loads(content)
    assert {"Label", "ProgramArguments"} <= agent.keys() <= KINDS.keys()
    for name, value in agent.items():
        assert type(value) is KINDS[name], name
    assert all(type(argument) is str and argument for argument in agent["ProgramArguments"])
    assert all(type(value) is str for value in agent["EnvironmentVariables"].values())
    paths = [agent[name] for name in ("WorkingDirectory", "StandardOutPath", "StandardErrorPath")]
    for path in (agent["ProgramArguments"][0], *paths):
        assert Path(path).is_absolute()
        assert "~" not in path
        assert "$" not in path
    assert os.access(agent["ProgramArguments"][0], os.X_OK)
    assert agent["KeepAlive"].keys() <= {"SuccessfulExit", "Crashed", "PathState", "OtherJobEnabled"}
    assert agent["ProcessType"] in ("Background", "Standard", "Adaptive", "Interactive")
    assert not any(name in content for name in (b"HF_TOKEN", b"API_KEY"))
    return agent


def test_an_agent_serves_from_login_on_and_again_when_it_failed(home: Path):
    environment = {"HF_HOME": "/models", "HF_TOKEN": "secret", "MAGISTRAL_API_KEY": "secret"}
    agent = parse_agent(launchd.agent(["serve", "--model", "demo"], home=home, environment=environment))
    assert agent["ProgramArguments"] == [sys.executable, "-m", "magistral_mlx", "serve", "--model", "demo"]
    assert agent["EnvironmentVariables"] == {"HF_HOME": "/models"}
    assert agent["RunAtLoad"] is True
    assert agent["KeepAlive"] == {"SuccessfulExit": False}
    assert launchd.file(home).stem == agent["Label"]
    assert agent["StandardOutPath"].startswith(f"{home}/Library/Logs/")
    assert agent["Umask"] == 0o077


def test_the_agents_program_runs(home: Path):
    agent = parse_agent(launchd.agent(["serve", "--help"], home=home, environment={}))
    done = subprocess.run(agent["ProgramArguments"], capture_output=True, text=True, check=True)
    assert "Serve a model" in done.stdout


def test_print_shows_the_agent_and_installs_nothing(run: Run, home: Path):
    done = run(
        "install", "--print", "--model", "demo", "--port", 8123, "--allow-host", "a", "--allow-host", "b"
    )
    assert done.exit_code == 0
    agent = parse_agent(done.stdout.encode())
    serve = ["serve", "--model", "demo", "--port", "8123", "--allow-host", "a", "--allow-host", "b"]
    assert agent["ProgramArguments"][3:] == serve
    assert f"launchctl bootstrap gui/{os.getuid()} {launchd.file(home)}" in done.stderr
    assert not (home / "Library").exists()


def test_relative_paths_become_absolute(run: Run, home: Path):
    (home / "model").symlink_to(launchd.__file__.replace("cli/launchd.py", "demo"))
    (home / "key").write_text("abc\n")
    done = run("install", "--print", "--model", "./model", "--host", "0.0.0.0", "--api-key-file", "key")
    arguments = parse_agent(done.stdout.encode())["ProgramArguments"][3:]
    assert arguments == [
        *("serve", "--model", str((home / "model").resolve())),
        *("--host", "0.0.0.0", "--api-key-file", str(home / "key")),
    ]
    assert "abc" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
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
def test_what_would_fail_at_login_is_refused_at_install(
    run: Run, home: Path, arguments: tuple[str, ...], message: str
):
    done = run("install", "--print", *arguments)
    assert done.exit_code
    assert message in done.stderr
    assert "s3cret" not in done.output


def test_a_key_in_the_environment_is_not_enough(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MAGISTRAL_API_KEY", "s3cret")
    done = run("install", "--print", "--model", "demo", "--host", "0.0.0.0")
    assert done.exit_code
    assert "put it in a file" in done.stderr


@pytest.mark.parametrize("arguments", [("install", "--model", "demo"), ("uninstall",), ("status",)])
def test_other_systems_than_macos_are_refused(run: Run, home: Path, monkeypatch, arguments: tuple[str, ...]):
    monkeypatch.setattr("platform.system", lambda: "Linux")
    done = run(*arguments)
    assert done.exit_code
    assert "launchd is macOS's; on Linux use deploy/Dockerfile" in done.stderr
    assert not (home / "Library").exists()


def test_install_status_and_uninstall(run: Run, home: Path, launchctl: Path):
    domain = f"gui/{os.getuid()}"
    agent = f"{domain}/{launchd.LABEL}"
    assert run("install", "--model", "demo").exit_code == 0
    parse_agent(launchd.file(home).read_bytes())
    assert stat.S_IMODE(launchd.file(home).stat().st_mode) == 0o600
    assert launchd.log(home).parent.is_dir()
    assert [path.name for path in launchd.file(home).parent.iterdir()] == [launchd.file(home).name]
    assert recorded_calls(launchctl) == [f"bootout {agent}", f"bootstrap {domain} {launchd.file(home)}"]
    assert run("status").stdout.startswith("running;")
    assert run("uninstall").exit_code == 0
    assert not launchd.file(home).exists()
    assert recorded_calls(launchctl)[2:] == [f"print {agent}", f"bootout {agent}"]


def test_an_installed_agent_is_replaced_only_with_force(run: Run, home: Path, launchctl: Path):
    run("install", "--model", "demo")
    before = launchd.file(home).read_bytes()
    done = run("install", "--model", "demo", "--port", 8123)
    assert done.exit_code
    assert "--force replaces it" in done.stderr
    assert launchd.file(home).read_bytes() == before
    assert run("install", "--force", "--model", "demo", "--port", 8123).exit_code == 0
    assert b"8123" in launchd.file(home).read_bytes()


def test_install_retries_until_launchd_has_unloaded_the_old_agent(run: Run, launchctl: Path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    set_failures(launchctl, "bootout 3", "bootstrap 5", "bootstrap 37", "bootstrap 5")
    assert run("install", "--model", "demo").exit_code == 0
    assert [line.split()[0] for line in recorded_calls(launchctl)] == ["bootout", *["bootstrap"] * 4]


def test_an_error_of_launchctl_is_reported(run: Run, home: Path, launchctl: Path):
    set_failures(launchctl, "bootstrap 125")
    done = run("install", "--model", "demo")
    assert done.exit_code
    assert "bootstrap failed: 125: of old" in done.stderr
    assert f"`launchctl bootstrap gui/{os.getuid()} {launchd.file(home)}`" in done.stderr


def test_status_and_uninstall_without_an_agent(run: Run, launchctl: Path):
    assert "no agent is installed" in run("status").stderr
    set_failures(launchctl, "bootout 3")
    assert "no agent is installed" in run("uninstall").stderr


def test_status_of_an_agent_that_is_not_loaded(run: Run, launchctl: Path):
    run("install", "--model", "demo")
    set_failures(launchctl, "print 113")
    done = run("status")
    assert done.exit_code
    assert "launchd does not have it; start it: launchctl bootstrap" in done.stderr


def test_a_directory_that_cannot_be_written_is_an_error(run: Run, home: Path, launchctl: Path):
    (home / "Library").write_text("not a directory")
    done = run("install", "--model", "demo")
    assert done.exit_code
    assert "cannot be written" in done.stderr


def test_install_uses_the_last_used_model(run: Run, home: Path):
    (home / "cache").mkdir()
    (home / "cache" / "last_model").write_text("demo\n")
    assert parse_agent(run("install", "--print").stdout.encode())["ProgramArguments"][3:] == [
        "serve",
        "--model",
        "demo",
    ]
