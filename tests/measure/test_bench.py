import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from benchmarks import tokens_per_second
from magistral_mlx import MagistralError
from magistral_mlx.cli import bench as command
from magistral_mlx.config import ModelConfig
from magistral_mlx.fetch.hub import DEMO
from magistral_mlx.measure import bench, figures, machine, trial
from magistral_mlx.measure.bench import Settings
from magistral_mlx.measure.machine import Computer

DOCS = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
QUICK = ("--length", "24", "--tokens", "4", "--trials", "1", "--reply-tokens", "8")


def computer(chip: str, **cores: int) -> Computer:
    return Computer(chip=chip, cores=cores, memory_bytes=64 * 2**30, system="macOS 26.0")


# Statistics


def test_spread():
    assert figures.spread([3.0, 1.0, 8.0]) == {"median": 3.0, "min": 1.0, "max": 8.0}


@pytest.mark.parametrize(
    ("n", "kth"), [(1, None), (4, None), (5, 1), (7, 1), (8, 2), (10, 2), (11, 3), (20, 6), (30, 11)]
)
def test_lower_bound_equals_a_table_of_the_sign_test(n: int, kth: int | None):
    values = [float(i) for i in range(n, 0, -1)]
    assert figures.lower_bound(values) == kth


def trial_result(context: int, first: float, decode: float, load: float = 1.0) -> dict:
    point = {
        "context": context,
        "first_token_seconds": first,
        "decode_tokens_per_second": decode,
        "peak_bytes": 7,
    }
    return {"import_seconds": 0.5, "load_seconds": load, "points": [point]}


def test_ratios_are_of_adjacent_trials_and_above_one_if_we_are_faster():
    ours = [trial_result(512, 1.0, 20.0), trial_result(512, 2.0, 30.0, load=0.5)]
    theirs = [trial_result(512, 3.0, 10.0, load=4.0), trial_result(512, 2.0, 60.0, load=0.5)]
    load, prefill, decode = figures.ratios(ours, theirs)
    assert (load["what"], load["context"], load["pairs"]) == ("import and load", None, [3.0, 1.0])
    assert (prefill["what"], prefill["context"], prefill["pairs"]) == ("prefill", 512, [3.0, 1.0])
    assert (decode["what"], decode["pairs"], decode["median"]) == ("decode", [2.0, 0.5], 1.25)
    assert decode["lower_95"] is None


def test_a_summary_takes_medians_and_the_largest_peak():
    trials = [trial_result(100, 2.0, 10.0), trial_result(100, 4.0, 30.0), trial_result(100, 5.0, 20.0)]
    trials[1]["points"][0]["peak_bytes"] = 9
    summary = figures.summary(trials, lambda context: context * 1.0)
    (row,) = summary["contexts"]
    assert row["prefill_tokens_per_second"] == {"median": 25.0, "min": 20.0, "max": 50.0}
    assert (row["decode_tokens_per_second"]["median"], row["share_of_ceiling"]) == (20.0, 0.2)
    assert row["peak_bytes"] == 9


# Machines


@pytest.mark.parametrize(
    ("chip", "gpu", "gigabytes"),
    [
        ("Apple M1", 8, 68),
        ("Apple M1 Max", 24, 400),
        ("Apple M3 Max", 30, 300),
        ("Apple M3 Max", 40, 400),
        ("Apple M3 Ultra", 60, 819),
        ("Apple M4 Max", 32, 410),
        ("Apple M4 Max", None, 546),
        ("Apple M5", 10, 153),
        ("Apple M5 Max", 40, 614),
        ("Apple M1 (Virtual)", None, None),
        ("Apple M99 Max", 40, None),
        ("AMD EPYC", None, None),
        ("", None, None),
    ],
)
def test_bandwidth_by_the_chips_name(chip: str, gpu: int | None, gigabytes: float | None):
    found = machine.bandwidth_of(computer(chip, **({"gpu": gpu} if gpu else {})))
    assert found == (gigabytes and gigabytes * 1e9)


def test_measured_bandwidth_is_plausible():
    assert 1e8 < machine.measured_bandwidth(2**22) < 1e13


def test_mac_is_described_by_its_system_tools(monkeypatch: pytest.MonkeyPatch):
    outputs = {
        "machdep.cpu.brand_string": "Apple M4 Max",
        "hw.perflevel0.physicalcpu": "12",
        "hw.perflevel0.name": "Performance",
        "hw.perflevel1.physicalcpu": "4",
        "hw.perflevel1.name": "Efficiency",
        "-json": '{"SPDisplaysDataType": [{"sppci_cores" : "40"}]}',
    }
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    monkeypatch.setattr(machine, "_output_of", lambda *command: outputs.get(command[-1], ""))
    found = machine.this_computer()
    assert found.chip == "Apple M4 Max"
    assert found.cores == {"performance": 12, "efficiency": 4, "gpu": 40}
    assert found.system.startswith("macOS")
    assert machine.bandwidth_of(found) == 546e9


def test_mac_whose_system_tools_all_fail(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    monkeypatch.setenv("PATH", "")
    found = machine.this_computer()
    assert found.chip
    assert set(found.cores) == {"cpu"}
    assert machine.bandwidth_of(found) is None


def test_machine_name_for_a_file():
    assert computer("Apple M4 Max").name == "apple-m4-max-64gb"
    assert computer("Intel(R) Xeon(R) CPU @ 2.00GHz").name == "intel-r-xeon-r-cpu-2-00ghz-64gb"


# Arithmetic


def test_ceiling_falls_with_context():
    model = {"read_bytes_per_token": 12e9, "kv_bytes_per_token": 1e6}
    assert figures.ceiling(120e9, model, 0) == 10
    assert figures.ceiling(120e9, model, 3000) == 8


def test_expected_speeds_are_in_the_docs():
    table = "\n".join(tokens_per_second.expected())
    assert table in DOCS
    assert "| M4 | 120 | 9.3 | 7.1 |" in table  # FACTS: 12.9 GB a token
    assert "| M3 Ultra | 819 | 63.6 | 48.3 |" in table  # where the share was measured: 48.4
    assert len(table.splitlines()) == 2 + len(machine.CHIPS) + len(machine.SMALLER)


@pytest.mark.parametrize("length", [1, 2, 17, 300])
def test_a_prompt_has_its_length_and_both_ends(length: int):
    ids = bench.prompt(lambda text: [1, *text.encode(), 2], length)
    assert len(ids) == length
    assert ids[-1] == 2
    assert length == 1 or ids[0] == 1


def test_a_narrow_model_has_the_real_depth_and_vocabulary():
    config = tokens_per_second.narrowed(tokens_per_second.MAGISTRAL, 2)
    assert isinstance(config, ModelConfig)
    assert (config.n_layers, config.vocab_size, config.dim, config.hidden_dim) == (40, 131072, 128, 512)
    assert (config.n_heads, config.n_kv_heads, config.head_dim) == (8, 2, 32)


# Trials


def test_decode_is_timed_from_the_first_id_and_not_to_the_last(monkeypatch: pytest.MonkeyPatch):
    now, limits, fed = 0.0, [], []

    def generate(ids: list[int], limit: int) -> Iterator[int]:
        nonlocal now
        limits.append(limit)
        fed.append(ids)
        now += 4.0  # the prompt, and the first id
        for n in range(limit):
            yield n
            now += 0.5

    monkeypatch.setattr(trial.time, "perf_counter", lambda: now)
    point = trial._point(generate, [7] * 100, 10)
    assert (point["context"], point["first_token_seconds"]) == (100, 4.0)
    assert point["decode_tokens_per_second"] == 2.0
    assert (limits, fed) == ([12], [[7] * 100])


def test_trials_take_turns_with_the_same_ids(monkeypatch: pytest.MonkeyPatch):
    jobs, progress = [], []

    def spawn(job: dict, begin: Callable[[str], None]) -> dict:
        jobs.append(job)
        begin("load")
        points = [trial_result(len(ids), 1.0, 10.0)["points"][0] for ids in job["prompts"]]
        return {"import_seconds": 1.0, "load_seconds": 1.0, "reply": None, "speculated": None} | {
            "points": points
        }

    monkeypatch.setattr(bench, "spawn", spawn)
    monkeypatch.setattr(machine, "measured_bandwidth", lambda: 1e9)
    settings = Settings(lengths=(512, 64, 100_000, 200_000), tokens=10, trials=3, against_peer=True)
    report = bench.run("demo", settings, lambda *step: progress.append(step))
    first, *rest = jobs
    assert (first["engine"], first["prompts"], first["reply_tokens"]) == (bench.OURS, [], 2048)
    assert [job["engine"] for job in rest] == [bench.OURS, bench.PEER] * 3
    assert [job["seed"] for job in rest] == [0, 0, 1, 1, 2, 2]
    assert [len(ids) for ids in rest[0]["prompts"]] == [64, 512, 4096 - 12]  # within the context, once
    assert all({**job, "engine": 0, "seed": 0} == {**rest[0], "engine": 0, "seed": 0} for job in rest)
    assert progress == [(n, 7, "load") for n in range(7)]
    assert [row["pairs"] for row in report["ratios"]] == [[1.0] * 3] * 7


# The command


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """One real run on the demo, in a directory of its own."""
    out = tmp_path_factory.mktemp("bench") / "new" / "here.json"
    done = CliRunner().invoke(
        command.bench, ["demo", *QUICK, "--speculate", "--json", str(out)], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    return done.stdout, out


def test_a_run_writes_what_the_docs_describe(measured: tuple[str, Path]):
    report = json.loads(measured[1].read_text())
    assert report["format"] == bench.FORMAT
    documented = DOCS.split("## The JSON")[1].split("## What to expect")[0]
    (context,) = report["summary"][bench.OURS]["contexts"]
    (point,) = report["trials"][bench.OURS][0]["points"]
    parts = [report, report["machine"], report["bandwidth"], report["model"], report["settings"]]
    for part in [*parts, report["versions"], report["summary"][bench.OURS], context, point]:
        assert all(f"`{key}`" in documented for key in part), part.keys()
    assert report["model"]["name"] == "demo"
    assert 4.5 < report["model"]["bits_per_weight"] < 4.6
    assert report["model"]["read_bytes_per_token"] < report["model"]["weight_bytes"] < 2e6
    assert (context["context"], report["settings"]["trials"], report["ratios"]) == (24, 1, [])
    assert context["decode_tokens_per_second"]["median"] > 0
    assert context["peak_bytes"] > report["model"]["weight_bytes"]
    assert report["reply"]["thinking_tokens"] == report["speculated"]["thinking_tokens"] == 8
    assert report["reply"]["tokens_per_pass"] == 1 <= report["speculated"]["tokens_per_pass"]
    assert str(Path.home()) not in json.dumps(report)


def test_a_run_prints_a_table_and_a_row(measured: tuple[str, Path]):
    printed, out = measured
    report = json.loads(out.read_text())
    assert report["machine"]["chip"] in printed
    assert "GB/s" in printed
    assert f"{report['speculated']['tokens_per_pass']:.2f} tokens per pass" in printed
    row = command.markdown(report)
    assert row in printed
    head = next(line for line in DOCS.splitlines() if line.startswith("| machine"))
    assert row.count("|") == head.count("|")


def test_table_is_complete_in_80_columns(measured: tuple[str, Path]):
    report = json.loads(measured[1].read_text())
    (row,) = report["summary"][bench.OURS]["contexts"]
    row |= {"context": 40_960, "first_token_seconds": {"median": 1234.5}, "peak_bytes": 21.4e9}
    row["decode_tokens_per_second"] = {"median": 123.4, "min": 122.1, "max": 125.6}
    output = io.StringIO()
    for part in command.shown(report):
        Console(file=output, width=80).print(part)
    text = next(line for line in output.getvalue().splitlines() if "40960" in line)
    assert text.split()[:2] == ["40960", "magistral_mlx"]
    for figure in ("1234.50 s", "123.4", "122.1–125.6", "21.4 GB"):
        assert figure in text
    assert "…" not in output.getvalue()


def test_chart_or_how_to_install_what_it_needs(
    measured: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    report = json.loads(measured[1].read_text())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'magistral_mlx[bench]'" in command.draw(report, tmp_path / "chart.svg")
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert "the chart" in command.draw(report, tmp_path / "chart.svg")
    assert "<svg" in (tmp_path / "chart.svg").read_text()


@pytest.mark.slow
def test_against_mlx_lm(tmp_path: Path):
    out = tmp_path / "both.json"
    arguments = ["demo", *QUICK, "--trials", "2", "--against", "mlx-lm", "--json", str(out), "--no-chart"]
    done = CliRunner().invoke(command.bench, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    assert [len(trials) for trials in report["trials"].values()] == [2, 2]
    assert [(row["what"], len(row["pairs"])) for row in report["ratios"]] == [
        ("import and load", 2),
        ("prefill", 2),
        ("decode", 2),
    ]
    assert "both compute in float32" in done.stdout
    assert "needs 5 trials" in done.stdout


@pytest.mark.slow
def test_a_random_model_of_the_real_depth(tmp_path: Path):
    script = Path(tokens_per_second.__file__)
    arguments = ("--shape", "24b", *QUICK, "--scales", "bfloat16", "--no-chart", "--json")
    command = [sys.executable, str(script), *arguments, str(tmp_path / "narrow.json")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    report = json.loads((tmp_path / "narrow.json").read_text())
    assert (report["model"]["layers"], report["model"]["vocabulary"]) == (40, 131072)
    assert report["settings"]["dtype"] == "bfloat16"
    assert report["reply"] is None


# Errors


def fail_on_progress(done: int, of: int, what: str) -> None:
    pytest.fail(what)


def test_comparing_without_mlx_lm_raises(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    with pytest.raises(MagistralError, match=r"pip install 'magistral_mlx\[bench\]'"):
        bench.run("demo", Settings(against_peer=True), fail_on_progress)


def test_comparing_in_the_native_layout_raises():
    with pytest.raises(MagistralError, match="magistral-mlx convert"):
        bench.run(str(DEMO), Settings(against_peer=True), fail_on_progress)


def test_benchmark_of_which_no_prompt_fits_raises(monkeypatch: pytest.MonkeyPatch):
    from magistral_mlx import memory  # noqa: PLC0415 -- beside what it changes

    monkeypatch.setattr(memory, "budget", lambda: 1000)
    with pytest.raises(MagistralError, match="no prompt fits"):
        bench.run(str(DEMO), Settings(), fail_on_progress)


def test_failed_trial_raises_its_cause():
    job = {"engine": bench.OURS, "model": "./nowhere", "dtype": None, "prompts": [], "reply_tokens": 0}
    with pytest.raises(MagistralError, match=r"found no directory '\./nowhere'"):
        trial.spawn(job, print)
    with pytest.raises(MagistralError, match=r"a trial of magistral_mlx failed: KeyError: 'model'"):
        trial.spawn({"engine": bench.OURS}, print)
