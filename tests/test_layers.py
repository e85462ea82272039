"""The shape of the package, read from its own imports: floors, the two columns, the front door."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import magistral_mlx
from magistral_mlx import errors

PACKAGE = Path(magistral_mlx.__file__).parent

FLOORS = (
    {"errors", "events", "checks", "wire"},
    {"config", "decoder", "text"},
    {"disk", "structured", "memory"},
    {"convert", "fetch", "talk"},
    {"chat"},
    {"measure", "server"},
    {"cli", "__init__", "__main__"},
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}

ARRAYS = {"config", "decoder", "disk", "convert", "memory"}
WORDS = {"events", "text", "structured"}

PUBLIC = {
    *("ToolCall", "ToolCallToken"),
    *("Magistral", "Conversation", "Sampling", "Stream", "Reply", "Regex", "consensus"),
    *("ThinkToken", "AnswerToken", "Finished", "Event", "Stats", "TokenLogprob"),
    *("MagistralError", "CheckpointError", "ConfigError", "TokenizerError", "PromptError", "ContextError"),
    *("ConversationError", "SamplingError", "ConversionError", "HubError", "MemoryLimitError", "ClosedError"),
    *("SchemaError", "AnswerError"),
    *("MagistralWarning", "ServerError", "__version__"),
}


FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")}
FOLDERS = sorted(path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.glob("*/__init__.py"))


def imported(module: Path) -> Iterator[str]:
    """What a module imports, at its top or late in a function: our "decoder/cache", others' "mlx.core"."""
    here = ("magistral_mlx", *module.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from (_file(name.name) for name in names)
            case ast.ImportFrom(module=source, names=names, level=level):
                start = ".".join(
                    [*here[: -level or 0], *([source] if source else [])] if level else [source or ""]
                )
                yield from {_file(f"{start}.{name.name}", start) for name in names}
            case _:
                pass


def _file(name: str, otherwise: str = "") -> str:
    """A module by the path of its file in the package; `otherwise` where the name is a thing in a module."""
    for tried in (name, otherwise):
        path = tried.removeprefix("magistral_mlx").removeprefix(".").replace(".", "/") or "__init__"
        found = next((file for file in (path, f"{path}/__init__") if file in FILES), None)
        if tried.startswith("magistral_mlx") and found:
            return found
    return otherwise or name


IMPORTS = {name: {other for other in imported(path) if other in FILES} for name, path in FILES.items()}


def home(module: str) -> str:
    """The folder of a module, or its own name at the top."""
    return module.split("/", maxsplit=1)[0]


def test_every_folder_has_a_floor():
    assert {home(name) for name in FILES} == FLOOR.keys(), "say in FLOORS (and in the design) where it stands"


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_never_go_up(name: str):
    above = {other for other in IMPORTS[name] if FLOOR[home(other)] > FLOOR[home(name)]}
    assert not above, f"{name} stands on floor {FLOOR[home(name)]}"


def test_imports_never_go_in_a_circle():
    """Neither of modules nor of folders."""
    TopologicalSorter(IMPORTS).prepare()  # raises CycleError
    between = dict[str, set[str]]()
    for name, others in IMPORTS.items():
        between.setdefault(home(name), set()).update({home(other) for other in others} - {home(name)})
    TopologicalSorter(between).prepare()


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_lists_its_modules_in_the_order_of_their_imports(folder: str):
    listed = re.findall(r"^ {4}(\w+) ", FILES[f"{folder}/__init__"].read_text(encoding="utf-8"), re.MULTILINE)
    there = {name.removeprefix(f"{folder}/") for name in FILES if home(name) == folder} - {"__init__"}
    assert sorted(listed) == sorted(there)
    for place, name in enumerate(listed):
        below = {f"{folder}/{other}" for other in listed[place + 1 :]}
        assert not IMPORTS[f"{folder}/{name}"] & below, f"{name} imports what is listed below it"


@pytest.mark.parametrize("name", sorted(name for name in FILES if home(name) in ARRAYS))
def test_arrays_know_no_words(name: str):
    assert not {other for other in IMPORTS[name] if home(other) in WORDS}


@pytest.mark.parametrize("name", sorted(name for name in FILES if home(name) in WORDS))
def test_words_know_no_arrays(name: str):
    assert not {other for other in IMPORTS[name] if home(other) in ARRAYS}
    assert not {other for other in imported(FILES[name]) if other.split(".")[0] == "mlx"}


def test_no_limit_of_memory_is_set_where_a_model_runs():
    """Not once and not per call: a wired limit that is set again and again has brought Macs down."""
    reached, new = set[str](), {"chat"}
    while new:
        reached |= new
        new = {other for name in new for other in IMPORTS[name]} - reached
    assert {"decoder/engine", "talk/worker", "memory"} <= reached
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
    "asyncio",
    "rich",
}


def test_importing_the_package_loads_nothing_heavy():
    code = "import magistral_mlx, sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "magistral_mlx" in loaded
    assert not loaded & HEAVY
