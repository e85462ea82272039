"""The command line as a user sees it: pipes, a terminal, errors."""

import errno
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from magistral_mlx import AnswerToken
from magistral_mlx.cli import repl
from magistral_mlx.cli.app import cli
from magistral_mlx.cli.common import first_interrupt_stops_thinking
from magistral_mlx.fetch import hub
from magistral_mlx.fetch.hub import RECOMMENDED
from magistral_mlx.talk.display import Terminal as Display
from magistral_mlx.talk.display import problem_of

QUESTION = "What is 48 + 37?"
ASK = ("ask", "--model", "demo", "--seed", "1", "--max-tokens", "60")
Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in this process, offline and with its own `last_model` file."""
    monkeypatch.setenv("MAGISTRAL_MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the variable is read on import
    monkeypatch.chdir(tmp_path)
    return lambda *arguments, stdin="": CliRunner().invoke(
        cli, [str(argument) for argument in arguments], input=stdin
    )


def test_a_pipe_gets_the_answer_and_standard_error_the_thinking(run: Run):
    done = run(*ASK, QUESTION)
    reply = json.loads(run(*ASK, "--json", QUESTION).stdout)
    assert done.exit_code == 0
    assert done.stdout == reply["answer"] + "\n"
    assert reply["thinking"] in done.stderr
    assert reply["thinking"] not in done.stdout


def test_json_is_one_object_and_nothing_else(run: Run):
    done = run(*ASK, "--json", QUESTION)
    reply = json.loads(done.stdout)
    assert set(reply) == {"prompt_ids", "token_ids", "thinking", "answer", "finish_reason", "seed", "stats"}
    assert (reply["seed"], done.stderr) == (1, "")
    assert reply["stats"]["thinking_tokens"] + reply["stats"]["answer_tokens"] == len(reply["token_ids"])
    assert reply["stats"]["peak_memory"] > 4_000_000
    assert reply["stats"]["prefill_tokens_per_second"] > 0 < reply["stats"]["decode_tokens_per_second"]


@pytest.mark.parametrize("arguments", [(), ("-",)])
def test_the_question_may_come_from_standard_input(run: Run, arguments: tuple[str, ...]):
    asked = run(*ASK, "--json", QUESTION).stdout
    piped = run(*ASK, "--json", *arguments, stdin=QUESTION).stdout
    assert json.loads(asked)["token_ids"] == json.loads(piped)["token_ids"]


def test_hidden_thinking_is_on_neither_stream(run: Run):
    done = run(*ASK, "--hide-thinking", QUESTION)
    reply = json.loads(run(*ASK, "--json", QUESTION).stdout)
    assert done.stdout == reply["answer"] + "\n"
    assert reply["thinking"] not in done.stderr


def test_options_reach_the_model(run: Run, tmp_path: Path):
    def prompt_ids(*arguments: str) -> list[int]:
        return json.loads(run(*ASK, "--json", *arguments, QUESTION).stdout)["prompt_ids"]

    (tmp_path / "system.txt").write_text("Be brief.")
    plain, brief = prompt_ids(), prompt_ids("--system", "Be brief.")
    assert prompt_ids("--system-file", "system.txt") == brief != plain
    assert len(prompt_ids("--no-think")) < len(plain)
    first, second = (run(*ASK, "--temperature", "0", "--json", QUESTION).stdout for _ in range(2))
    assert json.loads(first)["token_ids"] == json.loads(second)["token_ids"]
    assert len(json.loads(run(*ASK, "--max-tokens", "3", "--json", QUESTION).stdout)["token_ids"]) == 3


def test_a_quantized_cache_needs_kv_bits(run: Run):
    assert run(*ASK, "--kv-bits", 8, "--quantize-after", 100, QUESTION).exit_code == 0
    done = run(*ASK, "--quantize-after", 100, QUESTION)
    assert (done.exit_code, "kv_bits=8" in done.stderr) == (1, True)


def test_the_last_model_is_remembered(run: Run):
    assert run(*ASK, QUESTION).exit_code == 0
    assert run("ask", "--max-tokens", "3", QUESTION).exit_code == 0


def test_without_a_model_both_choices_are_named(run: Run):
    done = run("ask", QUESTION)
    assert done.exit_code == 2
    assert "--model demo" in done.stderr
    assert f"--model {RECOMMENDED} --download (13 GB)" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ask", "--model", "", QUESTION), "found no directory ''"),
        ((*ASK, "--top-p", "1.5", QUESTION), "top_p is above 0 and at most 1, found 1.5"),
        ((*ASK, "--temperature", "-1", QUESTION), "temperature"),
        ((*ASK, "--max-tokens", "0", QUESTION), "max_tokens"),
        (("ask", "--model", "./nowhere", QUESTION), "no directory"),
        (("ask", "--model", "no/such-model", QUESTION), "hf download"),
        (("ask", "--model", "no/such-model", "--download", QUESTION), "HF_HUB_OFFLINE"),
        (("ask", "--model", __file__, QUESTION), f"or \"demo\"; found the file '{__file__}'"),
        (("info", "."), "holds no checkpoint"),
        (("convert", "demo", "--out", "out", "--bits", "7"), "bits"),
        (("convert", "demo", "--out", "out", "--mode", "int3"), "int3"),
        (("convert", "nowhere", "--out", "out"), "nowhere"),
    ],
)
def test_an_error_is_one_message_and_no_traceback(run: Run, arguments: tuple[str, ...], message: str):
    done = run(*arguments)
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: ")
    assert message in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        ((*ASK, ""), "", "expected a question"),
        ((*ASK, *QUESTION.split()), "", "expected one question, found 5 words; put it in quotes"),
        ((*ASK, "-"), " \n", "expected a question"),
        (ASK, b"What is \xff?", "expected a question in UTF-8 on standard input, found other bytes at 8"),
        (("doctor", "--json", "file/doctor.json"), "", "file/doctor.json cannot be written"),
        (("bench", "demo", "--json", "file/bench.json"), "", "file/bench.json cannot be written"),
    ],
)
def test_unusable_questions_and_output_files_are_usage_errors(
    run: Run, arguments: tuple[str, ...], stdin: str, message: str
):
    Path("file").touch()
    done = run(*arguments, stdin=stdin)
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr


def test_help_lists_every_command_with_a_whole_sentence(run: Run):
    commands = run("--help").stdout.partition("Commands:")[2].strip().splitlines()
    assert [line.split()[0] for line in commands] == [*cli.commands]
    assert all(line.endswith(".") and "..." not in line for line in commands)


@pytest.mark.parametrize(
    ("reason", "answer", "message"),
    [
        ("stop", "85", None),
        ("stop", "", "it ended without an answer"),
        ("length", "8", "cut off"),
        ("loop", "8 8 8 8", "without end"),
        ("cancelled", "", None),
    ],
)
def test_an_incomplete_reply_is_reported(reason: str, answer: str, message: str | None):
    problem = problem_of(SimpleNamespace(finish_reason=reason, answer=answer, tool_calls=[]))  # type: ignore[arg-type]
    assert (problem is None) if message is None else (message in problem)


def test_a_truncated_answer_is_reported_on_standard_error(run: Run):
    done = run("ask", "--model", "demo", "--max-tokens", "5", "--hide-thinking", QUESTION)
    assert done.exit_code == 0
    assert done.stderr.strip() == "cut off: max_tokens or the context was used up"


def test_convert_then_ask_then_refuse_to_overwrite(run: Run, tmp_path: Path):
    done = run("convert", "demo", "--out", "small", "--bits", "4", "--group-size", "64")
    assert done.exit_code == 0, done.stderr
    assert "small: 1.4 MB, 4.51 bits per weight (4bit)" in done.stdout
    assert "the worst: " in done.stdout
    assert {"config.json", "model.safetensors", "tokenizer.json", "mistral"} <= {
        path.name for path in Path("small").iterdir()
    }
    assert json.loads(run("ask", "--model", "small", "--max-tokens", "40", "--json", QUESTION).stdout)[
        "thinking"
    ]
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "small").rglob("*"))
    again = run("convert", "demo", "--out", "small")
    assert (again.exit_code, "nothing is overwritten" in again.stderr) == (1, True)
    assert before == sorted(path.stat().st_mtime_ns for path in (tmp_path / "small").rglob("*"))
    twice = run("convert", "small", "--out", "smaller")
    assert (twice.exit_code, "already quantized" in twice.stderr) == (1, True)


def test_the_convert_script_is_the_convert_command(tmp_path: Path):
    script = Path(__file__).parents[2] / "scripts" / "convert.py"
    shown = subprocess.run([sys.executable, script, "-h"], capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("Usage: magistral-mlx convert [OPTIONS] SOURCE\n")
    command = [sys.executable, str(script), "demo", "--out", str(tmp_path / "out"), "--mode", "mxfp4"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "4.26 bits per weight (mxfp4)" in done.stdout


def test_convert_with_a_recipe_and_an_override(run: Run):
    done = run("convert", "demo", "--recipe", "mixed-4-6", "--override", "lm_head=bf16", "--out", "out")
    assert done.exit_code == 0, done.stderr
    assert "mixed-4-6, lm_head: unquantized" in done.stdout
    section = json.loads(Path("out/config.json").read_text())["quantization"]
    assert (section["bits"], section["lm_head"]) == (4, False)
    assert run("ask", "-m", "out", "--max-tokens", "3", QUESTION).exit_code == 0


def test_a_dry_run_writes_nothing(run: Run, tmp_path: Path):
    done = run("convert", "demo", "--out", "small", "--dry-run")
    assert done.exit_code == 0
    for text in ("1.4 MB in 1 file\n", "4.51", "16 GB", "64 GB", " 4,096 tokens"):
        assert text in done.stdout
    assert "8,192" not in done.stdout  # the demo's context is shorter
    assert not any(path.name.endswith(("small", ".partial")) for path in tmp_path.iterdir())


def test_verify_finds_a_changed_byte(run: Run):
    run("convert", "demo", "--out", "small")
    assert "every file is as it was written" in run("verify", "small").stdout
    weights = Path("small/model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    done = run("verify", "small")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "model.safetensors has other bytes" in done.stderr


def test_an_unreadable_or_unwritable_file_is_a_usage_error(run: Run, tmp_path: Path):
    (tmp_path / "latin-1").write_bytes(b"\xe9")
    (tmp_path / "file").touch()
    for arguments in (
        (*ASK, "--system-file", "latin-1", QUESTION),
        ("doctor", "--json", "file/report.json"),
        ("bench", "demo", "--quick", "--json", "file/report.json"),
    ):
        done = run(*arguments)
        assert (done.exit_code, done.stdout) == (2, "")
        assert "cannot be read as UTF-8 text" in done.stderr or "cannot be written" in done.stderr


def test_a_local_directory_is_not_taken_for_a_hub_name(run: Run, tmp_path: Path):
    shutil.copytree(hub.DEMO, tmp_path / "models" / "mine")
    (tmp_path / "models" / "mine" / "README.md").unlink(missing_ok=True)
    assert run("convert", "models/mine", "--out", "small").exit_code == 0
    card = (tmp_path / "small" / "README.md").read_text()
    assert "- Source: `mine`." in card
    assert "models/mine" not in card


@pytest.mark.parametrize(
    "arguments",
    [
        ("--recipe", "4bit", "--bits", "4"),
        ("--override", "lm_head"),
    ],
)
def test_contradictory_or_incomplete_options_are_usage_errors(run: Run, arguments: tuple[str, ...]):
    assert run("convert", "demo", "--out", "out", *arguments).exit_code == 2


@pytest.mark.parametrize("name", ["demo", "small"])
def test_info_shows_the_models_figures(run: Run, name: str):
    assert run("convert", "demo", "--out", "small").exit_code == 0
    output = run("info", name).stdout
    for text in ("2,450,112", "4 of dim 192", "8 of queries, 2 of keys, 32 wide", "plain-text tags", "v11"):
        assert text in output
    assert ("16.00 bits each" if name == "demo" else "4.51 bits each") in output
    assert ("none" if name == "demo" else "4 bit in groups of 64 (affine)\n") in output


def test_chat_reads_questions_and_commands_from_a_pipe(run: Run, tmp_path: Path):
    lines = [
        QUESTION,
        "/think off",
        "And 3 + 4?",
        "/nonsense",
        "/save sums.talk",
        "/export talk.json",
        "/reset",
        "/load sums.talk",
        "/load talk.json",
        "/load nowhere",
        "/export again.json",
        "/save",
        "/load",
        "/help",
        "/quit",
        "never",
    ]
    done = run("chat", *ASK[1:], stdin="\n".join(lines))
    assert done.exit_code == 0, done.stderr
    assert "/retry" in done.stdout
    messages = json.loads((tmp_path / "talk.json").read_text())
    assert json.loads((tmp_path / "again.json").read_text()) == messages
    assert [m["content"] for m in messages if m["role"] == "user"] == [QUESTION, "And 3 + 4?"]
    assert all(m["content"] in done.stdout for m in messages if m["role"] == "assistant")


def test_errors_in_a_piped_chat_are_reported_and_do_not_end_it(run: Run):
    lines = ["/load none.talk", "/save", "/budget much", "/export /", "/dance", "/undo"]
    lines += [
        "/export ~nobody-of-this-name/a",
        "/save ~nobody-of-this-name/a",
        f"/budget {'9' * 5000}",
        "/think maybe",
    ]
    done = run("chat", *ASK[1:], stdin="\n".join(lines))
    assert (done.exit_code, done.stdout) == (0, "")
    errors = done.stderr.splitlines()
    assert len(errors) == 9
    assert all("~nobody-of-this-name" in line for line in errors[5:7])
    assert errors[7] == errors[2]
    assert "error: " in errors[0]
    assert "none.talk" in errors[0]
    assert [line.split(":")[0] for line in errors[1:3]] == [
        "expected a file name",
        "expected a number of tokens",
    ]
    assert errors[3].endswith("/ exists and nothing is overwritten; choose another name")
    assert errors[4] == "no such command; /help lists them"
    assert errors[8] == "error: expected on or off, found 'maybe'"


class Terminal:
    """A command in a pseudo-terminal: its output, and keys to press."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.chdir(cwd)
            os.environ |= {"MAGISTRAL_MLX_CACHE": str(cwd), "HF_HUB_OFFLINE": "1", "TERM": "xterm-256color"}
            os.execv(sys.executable, [sys.executable, "-m", "magistral_mlx", *arguments])
        self.screen = ""

    def until(self, text: str, seconds: float = 40) -> str:
        """Wait until `text` appears after the text that was waited for last."""
        end = time.monotonic() + seconds
        while text not in self.screen:
            assert time.monotonic() < end, f"{text!r} is not in {self.screen!r}"
            self._read()
        before, _, self.screen = self.screen.partition(text)
        return before

    def press(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def wait_for_exit(self) -> int:
        while self._read():
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self) -> bool:
        if not select.select([self.fd], [], [], 0.1)[0]:
            return True
        try:
            data = os.read(self.fd, 65536)
        except OSError:  # the process has ended
            return False
        if b"\x1b[6n" in data:  # prompt_toolkit asks for the position of the cursor
            self.press("\x1b[1;1R")
        self.screen += data.decode(errors="replace")
        return bool(data)


def test_in_a_terminal_thinking_is_dim_and_the_answer_is_not(tmp_path: Path):
    terminal = Terminal(*ASK, QUESTION, cwd=tmp_path)
    assert terminal.wait_for_exit() == 0
    dim = "".join(re.findall(r"\x1b\[2m(.*?)\x1b\[0m", terminal.screen, re.DOTALL))
    plain = re.sub(r"\x1b\[2m.*?\x1b\[0m", "", terminal.screen, flags=re.DOTALL)
    assert "48+37" in dim
    assert "**" in plain
    assert "**" not in dim
    assert "tokens/s" in dim
    assert "GB at most" in dim


def test_a_budget_ends_the_thinking(run: Run):
    arguments = [*ASK[:-2], "--json", "--think-budget", "5", "What is 12 + 34 + 56 + 78?"]
    reply = json.loads(run(*arguments).stdout)
    assert reply["stats"]["forced_tokens"] > 0
    assert reply["answer"]
    assert "think>" not in reply["thinking"] + reply["answer"]


def test_ctrl_c_during_the_thinking_starts_the_answer(tmp_path: Path):
    terminal = Terminal("ask", "-m", "demo", "--seed", "1", "12 + 34 + 56 + 78 + 91 + 23 = ?", cwd=tmp_path)
    terminal.until("\x1b[1A\x1b[2K")
    terminal.press("\x03")
    assert terminal.wait_for_exit() == 0
    assert "ended early" in terminal.screen


@pytest.mark.parametrize(("phases", "stop_requests"), [(["thinking", "thinking"], 1), (["answer"], 0)])
def test_the_first_interrupt_starts_the_answer_and_the_second_stops(phases: list[str], stop_requests: int):
    class FakeStream:
        phase = "thinking"
        stop_requests = 0

        def stop_thinking(self) -> None:
            self.stop_requests += 1

    def interrupt(stream: FakeStream) -> None:
        with first_interrupt_stops_thinking(stream):  # type: ignore[arg-type]
            for stream.phase in phases:
                signal.raise_signal(signal.SIGINT)

    stream = FakeStream()
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupt(stream)
        assert stream.stop_requests == stop_requests
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, previous)


def test_ctrl_c_ends_ask_cleanly(tmp_path: Path):
    terminal = Terminal("ask", "-m", "demo", "--top-p", "1", "--temperature", "9", QUESTION, cwd=tmp_path)
    terminal.until("\x1b[1A\x1b[2K")  # the spinner is gone: the first text is there
    terminal.press("\x03")
    assert terminal.wait_for_exit() == 130
    assert "interrupted" in terminal.screen
    assert "Traceback" not in terminal.screen


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (click.Abort(), 130, "interrupted\n"),
        (OSError(errno.ENOSPC, "full", "a.json"), 1, "Error: a.json cannot be written: the disk is full"),
        (OSError(errno.ENOSPC, "full"), 1, "Error: the output cannot be written: the disk is full"),
    ],
)
def test_interrupts_and_output_errors_are_reported_in_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(hub, "resolve", fail)
    done = run("info", "demo")
    assert (done.exit_code, done.stdout) == (code, "")
    assert done.stderr.startswith(message)


def test_standard_streams_may_be_closed(tmp_path: Path):
    command = f'"{sys.executable}" -m magistral_mlx ask -m demo --max-tokens 3'
    for closed in ('"48 + 37" >&-', '"48 + 37" 2>&-', "<&-"):
        done = subprocess.run(
            f"{command} {closed}", shell=True, capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert done.returncode == (2 if closed == "<&-" else 0)
        assert "Traceback" not in done.stderr


def test_a_failed_export_leaves_no_file(run: Run, monkeypatch: pytest.MonkeyPatch):
    def full(_: object, file: Any, **__: object) -> None:
        file.write("[")
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(repl.json, "dump", full)
    done = run("chat", *ASK[1:], stdin="/export talk.json")
    assert "talk.json cannot be written: full" in done.stderr
    assert not Path("talk.json").exists()


def test_chat_in_a_terminal_handles_ctrl_c_commands_and_ctrl_d(tmp_path: Path):
    terminal = Terminal("chat", "-m", "demo", "--top-p", "1", "--temperature", "9", cwd=tmp_path)
    terminal.until("/help lists the commands")
    terminal.until("›")
    terminal.press(QUESTION + "\r")
    terminal.until("\x1b[1A\x1b[2K")
    terminal.press("\x03")  # stops the reply
    terminal.until("stopped")
    terminal.until("›")
    terminal.press("\x03")  # does nothing at the prompt
    terminal.until("›")
    terminal.press("/think off\r")
    terminal.until("thinking is off")
    terminal.until("›")
    terminal.press("\x04")
    assert terminal.wait_for_exit() == 0
    assert "Traceback" not in terminal.screen


def test_model_output_cannot_send_control_sequences_to_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    Display().show([AnswerToken(text="a\x1b]52;c;ZXZpbA==\x07b\x9b2Jc\td\n")])
    assert "a]52;c;ZXZpbA==b2Jc\td\n" in capsys.readouterr().out
