"""The layers of the package, checked by its imports: who may import whom, and the public names."""

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

LAYERS = (
    {"errors", "events", "checks", "wire"},
    {"config", "decoder", "text"},
    {"disk", "structured", "memory"},
    {"convert", "fetch", "talk"},
    {"chat"},
    {"measure", "server"},
    {"cli", "__init__", "__main__"},
)
LAYER = {name: layer for layer, names in enumerate(LAYERS) for name in names}

ARRAY_FOLDERS = {"config", "decoder", "disk", "convert", "memory"}
TEXT_FOLDERS = {"events", "text", "structured"}

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
    package = ("magistral_mlx", *module.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from (_file(name.name) for name in names)
            case ast.ImportFrom(module=source, names=names, level=level):
                start = ".".join(
                    [*package[: -level or 0], *([source] if source else [])] if level else [source or ""]
                )
                yield from {_file(f"{start}.{name.name}", start) for name in names}
            case _:
                pass


def _file(name: str, otherwise: str = "") -> str:
    """A module by the path of its file in the package; `otherwise` if the name is an object in a module."""
    for tried in (name, otherwise):
        path = tried.removeprefix("magistral_mlx").removeprefix(".").replace(".", "/") or "__init__"
        found = next((file for file in (path, f"{path}/__init__") if file in FILES), None)
        if tried.startswith("magistral_mlx") and found:
            return found
    return otherwise or name


IMPORTS = {name: {other for other in imported(path) if other in FILES} for name, path in FILES.items()}


def folder_of(module: str) -> str:
    """The folder of a module, or its own name at the top."""
    return module.split("/", maxsplit=1)[0]


def test_every_folder_has_a_layer():
    assert {folder_of(name) for name in FILES} == LAYER.keys(), "add it to LAYERS (and to the design)"


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_import_from_a_higher_layer(name: str):
    above = {other for other in IMPORTS[name] if LAYER[folder_of(other)] > LAYER[folder_of(name)]}
    assert not above, f"{name} is on layer {LAYER[folder_of(name)]}"


def test_no_import_cycles():
    """Neither of modules nor of folders."""
    TopologicalSorter(IMPORTS).prepare()  # raises CycleError
    folders = dict[str, set[str]]()
    for name, others in IMPORTS.items():
        folders.setdefault(folder_of(name), set()).update(
            {folder_of(other) for other in others} - {folder_of(name)}
        )
    TopologicalSorter(folders).prepare()


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_docstring_lists_modules_in_import_order(folder: str):
    listed = re.findall(r"^ {4}(\w+) ", FILES[f"{folder}/__init__"].read_text(encoding="utf-8"), re.MULTILINE)
    modules = {name.removeprefix(f"{folder}/") for name in FILES if folder_of(name) == folder} - {"__init__"}
    assert sorted(listed) == sorted(modules)
    for index, name in enumerate(listed):
        later = {f"{folder}/{other}" for other in listed[index + 1 :]}
        assert not IMPORTS[f"{folder}/{name}"] & later, f"{name} imports what is listed below it"


@pytest.mark.parametrize("name", sorted(name for name in FILES if folder_of(name) in ARRAY_FOLDERS))
def test_array_folders_import_no_text_folders(name: str):
    assert not {other for other in IMPORTS[name] if folder_of(other) in TEXT_FOLDERS}


@pytest.mark.parametrize("name", sorted(name for name in FILES if folder_of(name) in TEXT_FOLDERS))
def test_text_folders_import_no_arrays(name: str):
    assert not {other for other in IMPORTS[name] if folder_of(other) in ARRAY_FOLDERS}
    assert not {other for other in imported(FILES[name]) if other.split(".")[0] == "mlx"}


def test_running_a_model_sets_no_memory_limit():
    """Neither once nor per call: setting the wired limit again and again has crashed Macs."""
    reached, new = set[str](), {"chat"}
    while new:
        reached |= new
        new = {other for name in new for other in IMPORTS[name]} - reached
    assert {"decoder/engine", "talk/worker", "memory"} <= reached
    setters = ("set_wired_limit", "set_memory_limit", "set_cache_limit")
    assert not [name for name in reached if any(word in FILES[name].read_text("utf-8") for word in setters)]


def test_public_names():
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
