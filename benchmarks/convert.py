"""Conversion: our memory and time against `mlx_lm.convert`, and our memory over the model's size.

    python benchmarks/convert.py [--trials 5] [--sizes 1 4 16 47] [--work DIR]

Both convert the same checkpoint (4.9 GB of random bf16 weights: two layers of Magistral's shape, with its
whole vocabulary) to 4 bit, in separate processes, in turn; --trials 0 skips that. The sizes are sparse files
of the true shape, with a tekken.json as large as published ones; every real tensor in them is compared, bit
for bit, with the result of MLX's quantizer for the whole tensor. Prints tables and writes
`benchmarks/results/convert.json` and `convert.svg`. Peak memory is that of the process (or of a child
process, if larger) minus that of a process that has only imported mlx.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from magistral_mlx.config import MAGISTRAL, ModelConfig
from magistral_mlx.text.sidecars import files

HERE = Path(__file__).parent
sys.path += [str(HERE.parent), str(HERE.parent / "scripts")]

from sparse_checkpoint import make, random_bits, real_names  # noqa: E402 -- not in the package

from tests.tokenizers import published_tekken  # noqa: E402

SCRIPT = HERE.parent / "scripts" / "convert.py"
SHAPES = {1: (1, 8192), 4: (2, 131072), 16: (12, 131072), 47: (40, 131072)}
"""Gigabytes of bf16 (about) → layers and vocabulary."""


LAUNCHER = """
import json, os, sys, time
start = time.perf_counter()
pid = os.posix_spawn(sys.executable, [sys.executable, *sys.argv[1:]], os.environ)
_, status, usage = os.wait4(pid, 0)
kilobyte = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
with os.fdopen(3, "w") as out:
    json.dump([status, time.perf_counter() - start, usage.ru_maxrss * kilobyte / 2**20], out)
"""
"""A small process: on Linux a process starts with the peak of its parent."""


def run(*words: object) -> tuple[float, float]:
    """Seconds and peak MiB of a process."""
    read, write = os.pipe()
    actions = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
    actions.append((os.POSIX_SPAWN_DUP2, write, 3))
    command = [sys.executable, "-S", "-c", LAUNCHER, *map(str, words)]
    pid = os.posix_spawn(sys.executable, command, os.environ, file_actions=actions)
    os.close(write)
    with os.fdopen(read) as report:
        status, seconds, peak = json.load(report)
    os.waitpid(pid, 0)
    if status:
        sys.exit(f"failed: {words}")
    return seconds, peak


def compare(work: Path, words: Path, trials: int) -> dict[str, list[tuple[float, float]]]:
    """Ours with and without verification, and mlx-lm's, in turn on one checkpoint."""
    source = work / "source"
    make(source, layout="hf", layers=2, full=True, words=words)
    for name, data in files(words, name="random", recipe="none", context=4096).items():
        if "/" not in name and name.startswith(("tokenizer", "chat", "generation")):
            (source / name).write_bytes(data)  # mlx-lm loads a tokenizer
    (source / "tekken.json").rename(work / "tekken.json")  # next to a tokenizer.json it would mislead mlx-lm
    (source / "mistral").mkdir()
    shutil.move(work / "tekken.json", source / "mistral")
    out = work / "out"
    commands = {
        "magistral_mlx": (SCRIPT, source, "--out", out),
        "magistral_mlx --no-verify": (SCRIPT, source, "--out", out, "--no-verify"),
        "mlx_lm.convert": (
            "-m",
            "mlx_lm",
            "convert",
            "--hf-path",
            source,
            "--mlx-path",
            out,
            "-q",
            "--q-bits",
            4,
            "--q-group-size",
            64,
        ),
    }
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for trial in range(trials + 1):  # the first warms the page cache and is not counted
        for name, command in commands.items():
            measured = run(*command)
            shutil.rmtree(out)
            if trial:
                runs[name].append(measured)
    shutil.rmtree(source)
    return runs


def sizes(work: Path, words: Path, wanted: list[int]) -> dict[int, tuple[float, float, str]]:
    """Our seconds and peak for each source size, and how many of its real tensors are correct."""
    found = {}
    for size in wanted:
        layers, vocabulary = SHAPES[size]
        config = replace(MAGISTRAL, n_layers=layers, vocab_size=vocabulary)
        make(work / "sparse", layers=layers, config=config, words=words)
        found[size] = (*run(SCRIPT, work / "sparse", "--out", work / "out"), right(work / "out", config))
        shutil.rmtree(work / "sparse")
        shutil.rmtree(work / "out")
    return found


def right(out: Path, config: ModelConfig) -> str:
    """How many of the real tensors equal, bit for bit, the whole tensor quantized at once."""
    import mlx.core as mx

    found = {name: array for file in out.glob("*.safetensors") for name, array in mx.load(str(file)).items()}
    shapes = {f"{path}.weight": shape for path, shape in config.matrices()}
    names, good = real_names(config), 0
    for name in names:
        path, shape = name.removesuffix(".weight"), shapes.get(name, (config.dim,))
        whole = mx.array(random_bits(name, shape)).view(mx.bfloat16)
        if heads := {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}.get(path.rpartition(".")[2]):
            pairs = whole.reshape(heads, config.head_dim // 2, 2, config.dim)  # native RoPE's order, to HF's
            whole = pairs.transpose(0, 2, 1, 3).reshape(shape)
        parts = [whole] if name not in shapes else mx.quantize(whole, group_size=64, bits=4)
        kept = (
            [found[name]]
            if name not in shapes
            else [found[f"{path}.{p}"] for p in ("weight", "scales", "biases")]
        )
        good += all(
            a.dtype == b.dtype and mx.array_equal(a, b).item() for a, b in zip(parts, kept, strict=True)
        )
        del parts, kept
    return f"{good} of {len(names)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 4, 16, 47], choices=SHAPES)
    parser.add_argument(
        "--work", type=Path, help="directory for 20 GB of files; default: a temporary directory"
    )
    parser.add_argument("--out", type=Path, help="the JSON to write, with a chart beside it")
    args = parser.parse_args()
    idle = statistics.median(run("-c", "import mlx.core as mx; mx.eval(mx.zeros(1))")[1] for _ in range(3))
    with tempfile.TemporaryDirectory(dir=args.work) as directory:
        work, words = Path(directory), Path(directory) / "words"
        published_tekken(words, "v11")
        runs = compare(work, words, args.trials) if args.trials else {}
        peaks = sizes(work, words, args.sizes)
    report = {
        "idle_mib": round(idle, 1),
        "compare": {
            name: {
                "seconds": [round(s, 2) for s, _ in trials],
                "peak_mib_above_idle": [round(peak - idle, 1) for _, peak in trials],
            }
            for name, trials in runs.items()
        },
        "sizes": {
            str(size): {
                "seconds": round(s, 1),
                "peak_mib_above_idle": round(peak - idle, 1),
                "real_tensors_right": real,
            }
            for size, (s, peak, real) in peaks.items()
        },
    }
    show(report)
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    (args.out or results / "convert.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, args.out.with_suffix(".svg") if args.out else results / "convert.svg")


def show(report: dict) -> None:
    console = Console()
    if report["compare"]:
        table = Table(
            "4.9 GB → 4 bit", "seconds", "from to", "peak MiB above idle", "time ratio", "memory ratio"
        )
        peer = report["compare"]["mlx_lm.convert"]
        for name, row in report["compare"].items():
            ratios = [ours / theirs for ours, theirs in zip(row["seconds"], peer["seconds"], strict=True)]
            seconds, peak = (statistics.median(row[key]) for key in ("seconds", "peak_mib_above_idle"))
            memory = peak / statistics.median(peer["peak_mib_above_idle"])
            spread = f"{min(row['seconds']):.1f} to {max(row['seconds']):.1f}"
            table.add_row(
                name,
                f"{seconds:.1f}",
                spread,
                f"{peak:.0f}",
                f"{statistics.median(ratios):.2f}",
                f"{memory:.3f}",
            )
        console.print(table)
    table = Table("source GB", "seconds", "peak MiB above idle", "real tensors bit for bit")
    for size, row in report["sizes"].items():
        table.add_row(
            size, f"{row['seconds']:.0f}", f"{row['peak_mib_above_idle']:.0f}", row["real_tensors_right"]
        )
    console.print(table)


def draw(report: dict, path: Path) -> None:
    """Peak memory over the source's size, ours and mlx-lm's."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    ours = [(int(size), row["peak_mib_above_idle"]) for size, row in report["sizes"].items()]
    if ours:
        axes.plot(*zip(*ours, strict=True), "o-", label="magistral_mlx")
    if report["compare"]:
        peer = statistics.median(report["compare"]["mlx_lm.convert"]["peak_mib_above_idle"])
        axes.plot([4.9], [peer], "s", label="mlx_lm.convert")
    axes.set(xlabel="source, GB of bf16", ylabel="peak memory, MiB", yscale="log", ylim=(10, 10_000))
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
