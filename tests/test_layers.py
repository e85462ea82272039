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
    {"errors", "events", "checks", "figures"},
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
    },
    {"model", "prefix", "recipe", "transcript", "sidecars", "manifest"},
    {"options", "checkpoint", "engine", "generation", "memory", "plan", "quantize", "closing", "real_layer"},
    {"convert", "hub", "worker", "reply", "answers", "stream", "batch", "saving", "conversation", "chat"}
    | {"display", "notebook"},
    {
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
    "manifest",
    "journal",
    "convert",
    "prefix",
    "generation",
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
    "reply",
    "answers",
}

PUBLIC = {
    *("Magistral", "Conversation", "Sampling", "Stream", "Reply", "consensus"),
    *("ThinkToken", "AnswerToken", "Finished", "Event", "Stats"),
    *("MagistralError", "CheckpointError", "ConfigError", "TokenizerError", "PromptError", "ContextError"),
    *("ConversationError", "SamplingError", "ConversionError", "HubError", "MemoryLimitError", "ClosedError"),
    *("MagistralWarning", "__version__"),
}


def imported(module: Path) -> Iterator[str]:
    """What a module imports, at its top or late in a function: our `.config`, others' `mlx.core`."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from (_ours(name.name) for name in names)
            case ast.ImportFrom(
                module=None | "magistral_mlx", names=names
            ):  # a module, or a name in __init__
                yield from (f".{name.name}" if name.name in FLOOR else ".__init__" for name in names)
            case ast.ImportFrom(module=str(name), level=level):
                yield f".{name}" if level else _ours(name)
            case _:
                pass


def _ours(name: str) -> str:
    return ".__init__" if name == "magistral_mlx" else name.replace("magistral_mlx.", ".", 1)


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
