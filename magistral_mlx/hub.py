"""A model's name → directories on this machine, by way of the Hub's cache where the name is one of the Hub's.

    "demo"                        the model embedded in this package ("./demo" is a directory of yours)
    a directory                   itself
    "owner/repo", "…@revision"    its snapshot in the Hub's cache, downloaded only when asked to

Weights and words may come from two places: conversions often lack tekken.json, which is then the original
repository's. A repository with both layouts is downloaded in one, Mistral's own: 47 GB and not 94.

Knows names, layouts and huggingface_hub, whose settings (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN …) hold; it is
imported late. Does not know what is in a file. Also keeps which model was used last.
"""

import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from .errors import CheckpointError, HubError

RECOMMENDED = "mlx-community/Magistral-Small-2506-4bit"
RECOMMENDED_GB = 13
"""What to offer a user who names no model, and what downloading it takes."""

DEMO = Path(__file__).parent / "demo"

_WORDS = ("tekken.json", "SYSTEM_PROMPT.txt")
_NATIVE = ("consolidated*.safetensors", "consolidated*.index.json", "params.json", *_WORDS)
_HF = (
    *("model*.safetensors", "model*.index.json", "config.json", "generation_config.json"),
    *("tokenizer*", "special_tokens_map.json", "chat_template.jinja", *_WORDS, "mistral/*"),
)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@.+)?", re.ASCII)
_FAMILY = re.compile(r"Magistral-Small-\d{4}")
_BASE = re.compile(r"---\n(?:.*\n)*?base_model: *([\w.-]+/[\w.-]+) *\n(?:.*\n)*?---\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """Where a model is: its weights with their config, and its tekken.json with the system prompt.

    Either file of words is in the directory's root or in its `mistral/`.
    """

    weights: Path
    words: Path


def resolve(name: str, *, download: bool = False) -> Local:
    """Find the model called `name`; without `download`, only what is on this machine is looked at.

    With it, a Hub model is fetched or brought up to date. Where the Hub cannot be reached, what was fetched
    before will do.

    Raises:
        CheckpointError: neither a directory nor a name that the Hub could have.
        HubError: not on this machine and not to be downloaded, unknown to the Hub, gated, or out of reach.
    """
    if name == "demo":
        return Local(weights=DEMO, words=DEMO)
    if directory := _directory(name):
        return Local(weights=directory, words=directory)
    if not _HUB_NAME.fullmatch(name) or name.startswith("."):
        raise CheckpointError(
            f'Expected a directory, a Hub name such as "{RECOMMENDED}", or "demo"; found no directory '
            f"{name!r}."
        )
    weights = (_fetch if download else _cached)(name, None)
    return Local(weights=weights, words=_words(name, weights, download=download))


def source(name: str) -> str | None:
    """The Hub's name of what the model called `name` was made from, or is; None where nothing tells."""
    directory = _directory(name)
    if name == "demo" or directory:
        card = (directory or DEMO) / "README.md"
        found = _BASE.match(card.read_text(encoding="utf-8")) if card.is_file() else None
        return found.group(1) if found else None
    family = _FAMILY.search(name)
    return f"mistralai/{family.group()}" if family else name.partition("@")[0]


def known_as(name: str) -> list[str]:
    """The names a model answers to, its source's first: clients ask the Hub for its prompt by that."""
    directory = _directory(name)
    own = directory.resolve().name if directory and name != "demo" else name
    return list(dict.fromkeys(filter(None, (source(name), own))))


def upload(directory: Path, repo: str) -> str:
    """Publish a directory as the Hub model `repo`, made if it is not there; returns its address."""
    from huggingface_hub import HfApi, errors

    transport: type[Exception] = vars(errors)["HTTPError"]
    try:
        address = HfApi().create_repo(repo, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=directory)
    except (transport, OSError, ValueError) as error:
        raise HubError(f"{directory} cannot be published as {repo!r}: {_reason(error)}") from error
    return str(address)


def last_used() -> str | None:
    """The name last remembered, if it can be read and, where it is a directory's, is still there."""
    try:
        name = _memory().read_text(encoding="utf-8").strip()
    except (OSError, ValueError, RuntimeError):  # RuntimeError: nobody's home
        return None
    known = name == "demo" or _HUB_NAME.fullmatch(name) or (name.startswith("/") and _directory(name))
    return name if known else None


def remember(name: str) -> None:
    """Keep `name` as the model last used. A convenience: where it cannot be written, nothing happens."""
    directory = None if name == "demo" else _directory(name)
    with suppress(OSError, ValueError, RuntimeError):
        file = _memory()
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f"{file.name}.{os.getpid()}")
        beside.write_text(f"{directory.resolve() if directory else name}\n", encoding="utf-8")
        beside.replace(file)


def _directory(name: str) -> Path | None:
    """`name` as a directory that is there."""
    with suppress(OSError, ValueError, RuntimeError):  # too long, a null byte, an unknown ~user
        directory = Path(name).expanduser()
        return directory if name and directory.is_dir() else None  # Path("") is the working directory
    return None


def _cached(name: str, patterns: tuple[str, ...] | None) -> Path:
    """A model's snapshot in the cache, if it is whole in one layout (or in `patterns`)."""
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    for layout in (patterns,) if patterns else (_NATIVE, _HF):
        with suppress(LocalEntryNotFoundError, HFValidationError):
            found = _snapshot(name, layout, local_files_only=True)
            if any(found.glob(layout[0])):  # a repository without such files is whole without them
                return found
    raise HubError(
        f"{name!r} is neither a directory here nor a model on this machine. If it is a Hub name, ask again "
        f"with --download, or: {_how(name, patterns)}"
    )


def _fetch(name: str, patterns: tuple[str, ...] | None) -> Path:
    """A model's snapshot in one layout (or in `patterns`), with what is not here yet downloaded."""
    from huggingface_hub import errors

    transport: type[Exception] = vars(errors)["HTTPError"]  # of httpx or its successor, whichever is used
    try:
        return _snapshot(name, patterns or _layout(name), local_files_only=False)
    except (transport, OSError, ValueError) as error:
        with suppress(HubError):
            return _cached(name, patterns)
        raise HubError(f"{name!r} cannot be downloaded: {_reason(error)}") from error


def _snapshot(name: str, patterns: tuple[str, ...], *, local_files_only: bool) -> Path:
    import huggingface_hub as hf

    repo, _, revision = name.partition("@")
    return Path(
        hf.snapshot_download(  # pyright: ignore[reportUnknownMemberType]  # its progress bar is untyped
            repo, revision=revision or None, allow_patterns=[*patterns], local_files_only=local_files_only
        )
    )


def _layout(name: str) -> tuple[str, ...]:
    """The layout to take of a repository: Mistral's own where it has it."""
    from huggingface_hub import HfApi

    repo, _, revision = name.partition("@")
    files = HfApi().model_info(repo, revision=revision or None).siblings or []  # fails at once, not in 23 s
    for layout in (_NATIVE, _HF):
        if any(fnmatch(file.rfilename, layout[0]) for file in files):
            return layout
    raise HubError(f"{name!r} has no safetensors weights. Choose a model such as {RECOMMENDED!r}.")


def _words(name: str, weights: Path, *, download: bool) -> Path:
    """Where the tekken.json is: with the weights, or in the repository that they were converted from."""
    if any((place / "tekken.json").is_file() for place in (weights, weights / "mistral")):
        return weights
    family = _FAMILY.search(name)
    original = f"mistralai/{family.group() if family else 'Magistral-Small-2506'}"
    return (_fetch if download else _cached)(original, _WORDS)


def _reason(error: BaseException) -> str:
    """What went wrong, in words that say what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__  # "not here either", said of what went wrong before
    what = (str(error) or type(error).__name__).splitlines()[0]
    known = (  # the narrower kind before the wider one
        (errors.GatedRepoError, "it is gated. Accept the conditions on its page, then `hf auth login`."),
        (errors.RepositoryNotFoundError, "the Hub has none, or a private one. Check it, or `hf auth login`."),
        (errors.RevisionNotFoundError, "the Hub has it in no such revision. Check what follows the @."),
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set, and it is not here. Unset it to download."),
        (errors.HFValidationError, f"it cannot be a Hub name ({what})."),
    )
    for kind, words in known:
        if isinstance(error, kind):
            return words
    if isinstance(error, OSError) and error.errno is not None:
        return f"this machine cannot keep it ({what}). Make room for it, or set HF_HOME."
    return f"the Hub was not reached, or broke off ({what}). Check the network and try again."


def _how(name: str, patterns: tuple[str, ...] | None) -> str:
    repo, _, revision = name.partition("@")
    wanted = patterns or (_NATIVE if repo.startswith("mistralai/") else ())
    options = [f"--revision {revision}"] * bool(revision) + [f"--include '{pattern}'" for pattern in wanted]
    return " ".join(["hf download", repo, *options])


def _memory() -> Path:
    """The file that keeps the last name: in MAGISTRAL_MLX_CACHE, or where the platform keeps caches."""
    home = Path("~/Library/Caches" if sys.platform == "darwin" else "~/.cache").expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME") or home) / "magistral_mlx"
    return Path(os.environ.get("MAGISTRAL_MLX_CACHE") or base) / "last_model"
