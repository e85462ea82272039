"""The shape of the package, read from its own imports: floors, the two columns, the front door."""

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import magistral_mlx
from magistral_mlx import errors

PACKAGE = Path(magistral_mlx.__file__).parent

FLOORS = (
    {"errors", "events", "checks", "figures", "wire"},
    {
        "config",
        "configfile",
        "tensorfile",
        "matrix",
        "cache",
        "sampling",
        "thinking",
        "prompt",
        "tokenizer",
        "hf_tokenizer",
        "journal",
        "machine",
        "loops",
        "pace",
        "room",
        "download",
        "tools",
        "toolcalls",
    },
    {
        "model",
        "prefix",
        "recipe",
        "transcript",
        "sidecars",
        "manifest",
        "talkfile",
        "logprobs",
        "drawing",
        "grammar",
    },
    {
        "options",
        "callgrammar",
        "constraint",
        "shape",
        "checkpoint",
        "engine",
        "drafts",
        "speculation",
        "prefixes",
        "generation",
        "memory",
        "plan",
        "quantize",
        "real_layer",
        "job",
        "closing",
    },
    {
        "convert",
        "hub",
        "last_model",
        "worker",
        "reply",
        "step",
        "answers",
        "stream",
        "batch",
        "saving",
        "conversation",
        "chat",
    }
    | {"display", "notebook"},
    {"server/__init__", "server/wire", "server/slots", "server/failures", "server/requests", "server/voices"}
    | {
        "server/replies",
        "server/metrics",
        "server/service",
        "server/safety",
        "server/app",
        "server/host",
        "server/web",
    },
    {
        "cli_serve",
        "cli_service",
        "launchd",
        "repl",
        "cli_common",
        "cli_convert",
        "cli_plan",
        "trial",
        "bench",
        "cli_bench",
        "doctor",
        "cli_doctor",
        "cli",
        "__init__",
        "__main__",
    },
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}

ARRAYS = {"config", "configfile", "tensorfile", "matrix", "cache", "sampling", "model"}
ARRAYS |= {
    "checkpoint",
    "engine",
    "memory",
    "recipe",
    "plan",
    "quantize",
    "job",
    "manifest",
    "journal",
    "convert",
    "prefix",
    "pace",
    "drafts",
    "speculation",
    "prefixes",
    "generation",
    "logprobs",
    "drawing",
    "talkfile",
    "real_layer",
}
WORDS = {
    "events",
    "thinking",
    "transcript",
    "prompt",
    "tokenizer",
    "hf_tokenizer",
    "sidecars",
    "display",
    "notebook",
    "closing",
    "grammar",
    "constraint",
    "shape",
    "reply",
    "answers",
    "tools",
    "toolcalls",
    "callgrammar",
}

PUBLIC = {
    *("ToolCall", "ToolCallToken"),
    *("Magistral", "Conversation", "Sampling", "Stream", "Reply", "Regex", "consensus"),
    *("ThinkToken", "AnswerToken", "Finished", "Event", "Stats", "TokenLogprob"),
    *("MagistralError", "CheckpointError", "ConfigError", "TokenizerError", "PromptError", "ContextError"),
    *("ConversationError", "SamplingError", "ConversionError", "HubError", "MemoryLimitError", "ClosedError"),
    *("SchemaError", "AnswerError"),
    *("MagistralWarning", "ServerError", "__version__"),
}


def imported(module: Path) -> Iterator[str]:
    """What a module imports, at its top or late in a function: our `.config`, others' `mlx.core`."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from (_ours(name.name) for name in names)
            case ast.ImportFrom(
                module=None | "magistral_mlx", names=names, level=level
            ):  # a module, or a name in __init__
                found = (_relative(module, name.name, level) for name in names)
                yield from (name if name[1:] in FLOOR else ".__init__" for name in found)
            case ast.ImportFrom(module=str(name), level=level):
                yield _relative(module, name, level) if level else _ours(name)
            case _:
                pass


def _ours(name: str) -> str:
    return ".__init__" if name == "magistral_mlx" else name.replace("magistral_mlx.", ".", 1)


def _relative(module: Path, name: str, level: int) -> str:
    """`.slots` in server/app.py → `.server/slots`; `..errors` → `.errors`."""
    folder = module.relative_to(PACKAGE).parents[max(level, 1) - 1]
    return "." + (folder / name.replace(".", "/")).as_posix()


def siblings(module: Path) -> set[str]:
    """The modules of this package that a module imports, by their bare names."""
    return {name.removeprefix(".") for name in imported(module) if name.startswith(".")}


FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")}
IMPORTS = {name: siblings(path) for name, path in FILES.items()}


def test_every_file_has_a_floor():
    assert FILES.keys() <= FLOOR.keys(), "say in FLOORS (and in the design) where the new file stands"


@pytest.mark.parametrize("name", sorted(FILES.keys() & FLOOR.keys()))
def test_imports_never_go_up(name: str):
    above = {other for other in IMPORTS[name] if FLOOR.get(other, len(FLOORS)) > FLOOR[name]}
    assert not above, f"{name} stands on floor {FLOOR[name]}"


def test_imports_never_go_in_a_circle():
    TopologicalSorter(IMPORTS).prepare()  # raises CycleError


@pytest.mark.parametrize("name", sorted(FILES.keys() & ARRAYS))
def test_arrays_know_no_words(name: str):
    assert not IMPORTS[name] & WORDS


@pytest.mark.parametrize("name", sorted(FILES.keys() & WORDS))
def test_words_know_no_arrays(name: str):
    assert not IMPORTS[name] & ARRAYS
    assert not {other for other in imported(FILES[name]) if other.split(".")[0] == "mlx"}


def test_no_limit_of_memory_is_set_where_a_model_runs():
    """Not once and not per call: a wired limit that is set again and again has brought Macs down."""
    reached, new = set[str](), {"chat"}
    while new:
        reached |= new
        new = {other for name in new for other in IMPORTS[name] & FILES.keys()} - reached
    assert {"engine", "worker", "memory"} <= reached
    setters = ("set_wired_limit", "set_memory_limit", "set_cache_limit")
    assert not [name for name in reached if any(word in FILES[name].read_text("utf-8") for word in setters)]


def test_the_public_names():
    assert set(magistral_mlx.__all__) == PUBLIC
    assert all(getattr(magistral_mlx, name) is not None for name in PUBLIC)


def test_every_error_is_public():
    raised = {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.MagistralError)
    }
    assert raised <= PUBLIC


HEAVY = {
    "mlx",
    "mlx_lm",
    "mistral_common",
    "transformers",
    "tokenizers",
    "numpy",
    "pydantic",
    "huggingface_hub",
}


def test_importing_the_package_loads_nothing_heavy():
    code = "import magistral_mlx, sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "magistral_mlx" in loaded
    assert not loaded & HEAVY


def test_importing_the_package_is_quick():
    """Under 0.1 s beyond Python itself: the best of each so far, so that a busy machine does not decide."""

    def seconds(code: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - start

    bare = ours = float("inf")
    for _ in range(20):
        bare, ours = min(bare, seconds("pass")), min(ours, seconds("import magistral_mlx"))
        if ours - bare < 0.1:
            return
    pytest.fail(f"{ours:.3f} s against {bare:.3f} s")
