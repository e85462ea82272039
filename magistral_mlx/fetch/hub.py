"""A model's name → directories on this machine: for a Hub name, in the Hub's cache.

    "demo"                        the model embedded in this package ("./demo" is a directory of yours)
    a directory                   itself
    "owner/repo", "…@revision"    its snapshot in the Hub's cache, downloaded only on request

Weights and tokenizer may come from two repositories: conversions often lack tekken.json, which is then taken
from the original one. Of a repository with both layouts only one is downloaded, Mistral's own: 47 GB, not 94.

Knows names, layouts and huggingface_hub, whose settings (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN …) apply; it is
imported late. Does not know what is in a file, or how it is downloaded (`download`).
"""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from magistral_mlx.disk.room import shortage
from magistral_mlx.errors import CheckpointError, HubError

from .download import Repository, cache

RECOMMENDED = "mlx-community/Magistral-Small-2506-4bit"
RECOMMENDED_GB = 13
"""The model to offer a user who names none, and the size of its download in GB."""

DEMO = Path(__file__).parents[1] / "demo"

_TOKENIZER_FILES = ("tekken.json", "SYSTEM_PROMPT.txt")
_NATIVE = ("consolidated*.safetensors", "consolidated*.index.json", "params.json", *_TOKENIZER_FILES)
_HF = (
    *("model*.safetensors", "model*.index.json", "config.json", "generation_config.json"),
    *("tokenizer*", "special_tokens_map.json", "chat_template.jinja", *_TOKENIZER_FILES, "mistral/*"),
)
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@.+)?", re.ASCII)
_FAMILY = re.compile(r"Magistral-Small-\d{4}")
_BASE = re.compile(r"---\n(?:(?!---\n).*\n)*?base_model: *([\w.-]+/[\w.-]+) *\n", re.ASCII)
_CONFIGS: dict[tuple[str, ...], str] = {_NATIVE: "params.json", _HF: "config.json"}

Needs: TypeAlias = Callable[[Path], Mapping[Path, int]]
"""A directory with a model's config → what else will be written: path → bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """Where a model is. weights: the directory of the weights and their config. tokenizer: the directory of
    tekken.json and the system prompt, which are in its root or in its `mistral/`.
    """

    weights: Path
    tokenizer: Path


def resolve(name: str, *, download: bool = False, then: Needs | None = None) -> Local:
    """Find the model called `name`; without `download`, only on this machine.

    With it, a Hub model is downloaded or updated, if the disk has room for it and for what will be written
    `then`. If the Hub cannot be reached, an earlier download is used.

    Raises:
        CheckpointError: neither a directory nor a name that the Hub could have.
        HubError: not on this machine and not to be downloaded, unknown to the Hub, gated, out of reach, or
            larger than the disk has room for.
    """
    if local := _local(name):
        return local
    weights = _fetch(name, None, then) if download else _cached(name, None)
    return Local(weights=weights, tokenizer=_tokenizer_directory(name, weights, download=download))


def look(name: str) -> tuple[Path, int | None]:
    """The directory of the model called `name`, and None; or one with its config alone, and a number.

    Of a Hub model that is not on this machine only the config is downloaded, a few hundred bytes; the number
    is the bytes that a download of the rest would take.
    """
    if local := _local(name):
        return local.weights, None
    with suppress(HubError):
        return _cached(name, None), None
    try:
        wanted, layout = _ask(name)
        return _snapshot(name, (_CONFIGS[layout],), local_files_only=False), wanted.missing
    except _failures() as error:
        raise HubError(f"{name!r} cannot be looked at: {_reason(error)}") from error


def _local(name: str) -> Local | None:
    """The model called `name`, if that is the demo or a directory; an invalid name is refused."""
    if name == "demo":
        return Local(weights=DEMO, tokenizer=DEMO)
    if found := directory(name):
        return Local(weights=found, tokenizer=found)
    if not HUB_NAME.fullmatch(name) or name.startswith("."):
        raise CheckpointError(
            f'Expected a directory, a Hub name such as "{RECOMMENDED}", or "demo"; found '
            f"{'the file' if _is_file(name) else 'no directory'} {name!r}."
        )
    return None


def check_upload(repo: str) -> None:
    """Raise if `repo` is no Hub name or nobody is logged in: before the work that is to be published."""
    from huggingface_hub import HfApi

    if not HUB_NAME.fullmatch(repo) or "@" in repo:
        raise HubError(
            f'Expected a Hub name such as "you/Magistral-Small-2506-4bit" to publish as, found {repo!r}.'
        )
    try:
        HfApi().whoami()
    except _failures() as error:
        raise HubError(f"nothing can be published as {repo!r}: {_reason(error)}") from error


def source(name: str) -> str | None:
    """The Hub name of the original that the model called `name` is or was made from; None: unknown."""
    place = directory(name)
    if name == "demo" or place:
        card = (place or DEMO) / "README.md"
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        found = _BASE.match(text)
        return found.group(1) if found else None
    family = _FAMILY.search(name)
    return f"mistralai/{family.group()}" if family else name.partition("@")[0]


def known_as(name: str) -> list[str]:
    """The names under which a server offers a model. First its source's: clients may fetch the system
    prompt from the Hub by that name.
    """
    place = directory(name)
    own = place.resolve().name if place and name != "demo" else name
    return list(dict.fromkeys(filter(None, (source(name), own))))


def upload(directory: Path, repo: str) -> str:
    """Publish a directory as the Hub model `repo`, which is created if needed; returns its URL."""
    from huggingface_hub import HfApi

    try:
        address = HfApi().create_repo(repo, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=directory)
    except (*_failures(), RuntimeError) as error:  # RuntimeError: one file failed among several
        raise HubError(
            f"{directory} is there, but cannot be published as {repo!r}: {_reason(error)} "
            f"Then: hf upload {repo} {directory}"
        ) from error
    return str(address)


def directory(name: str) -> Path | None:
    """`name` as a path, if it is an existing directory."""
    with suppress(OSError, ValueError, RuntimeError):  # too long, a null byte, an unknown ~user
        found = Path(name).expanduser()
        return found if name and found.is_dir() else None  # Path("") is the working directory
    return None


def _is_file(name: str) -> bool:
    with suppress(OSError, ValueError, RuntimeError):
        return Path(name).expanduser().is_file()
    return False


def _cached(name: str, patterns: tuple[str, ...] | None) -> Path:
    """A model's snapshot in the cache, if it is complete in one layout (or in `patterns`)."""
    for layout in (patterns,) if patterns else (_NATIVE, _HF):
        with suppress(OSError, ValueError):  # not there, or a name that cannot be
            found = _snapshot(name, layout, local_files_only=True)
            if any(found.glob(layout[0])):  # a repository without such files counts as complete
                return found
    raise HubError(
        f"{name!r} is neither a directory here nor a model on this machine. If it is a Hub name, --download "
        f"(of ask, chat, serve, convert, bench) fetches it, or: {_download_command(name, patterns)}"
    )


def _fetch(name: str, patterns: tuple[str, ...] | None, then: Needs | None = None) -> Path:
    """A model's snapshot in one layout (or in `patterns`); downloads what is missing."""
    try:
        wanted, layout = (Repository.ask(name).only(patterns), patterns) if patterns else _ask(name)
        _check_room(name, wanted, layout, then)
        wanted.fetch_large()
        return _snapshot(name, layout, local_files_only=False)
    except _failures() as error:
        with suppress(HubError):
            return _cached(name, patterns)
        raise HubError(f"{name!r} cannot be downloaded: {_reason(error)}") from error


def _check_room(name: str, wanted: Repository, layout: tuple[str, ...], then: Needs | None) -> None:
    """Refuse a download before it starts, if the disk has no room for it and what is to be made of it."""
    if not wanted.missing:
        return
    needed = {cache(): wanted.missing}
    if then:
        needed |= then(_snapshot(name, (_CONFIGS[layout],), local_files_only=False))
    if short := shortage(needed):
        raise HubError(f"{name!r} is not downloaded: {short}")


def _failures() -> tuple[type[Exception], ...]:
    """The exceptions that a request to the Hub may raise."""
    from huggingface_hub import errors

    return vars(errors)["HTTPError"], OSError, ValueError  # of httpx or its successor, whichever is used


def _snapshot(name: str, patterns: tuple[str, ...], *, local_files_only: bool) -> Path:
    import huggingface_hub as hf

    repo, _, revision = name.partition("@")
    return Path(
        hf.snapshot_download(  # pyright: ignore[reportUnknownMemberType]  # its progress bar is untyped
            repo, revision=revision or None, allow_patterns=[*patterns], local_files_only=local_files_only
        )
    )


def _ask(name: str) -> tuple[Repository, tuple[str, ...]]:
    """A repository's files in the preferred layout: Mistral's own, if it has that."""
    repository = Repository.ask(name)  # fails at once, not in 23 s
    for layout in (_NATIVE, _HF):
        if repository.only(layout[:1]).files:
            return repository.only(layout), layout
    raise HubError(f"{name!r} has no safetensors weights. Choose a model such as {RECOMMENDED!r}.")


def _tokenizer_directory(name: str, weights: Path, *, download: bool) -> Path:
    """The directory of tekken.json: that of the weights, or the repository they were converted from."""
    if any((place / "tekken.json").is_file() for place in (weights, weights / "mistral")):
        return weights
    family = _FAMILY.search(name)
    original = f"mistralai/{family.group() if family else 'Magistral-Small-2506'}"
    return (_fetch if download else _cached)(original, _TOKENIZER_FILES)


def _reason(error: BaseException) -> str:
    """The cause of an error, and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__  # it says "not in the cache either"; the cause is what failed first
    what = (str(error) or type(error).__name__).splitlines()[0]
    known = (  # subclasses before their base classes
        (errors.LocalTokenNotFoundError, "nobody is logged in here. `hf auth login`, or set HF_TOKEN."),
        (errors.GatedRepoError, "it is gated. Accept the conditions on its page, then `hf auth login`."),
        (
            errors.RepositoryNotFoundError,
            "the Hub has no such model, or it is private. Check it, or `hf auth login`.",
        ),
        (errors.RevisionNotFoundError, "the Hub has no such revision of it. Check what follows the @."),
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set. Unset it to ask the Hub."),
        (errors.HFValidationError, f"it cannot be a Hub name ({what})."),
    )
    for kind, words in known:
        if isinstance(error, kind):
            return words
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the Hub does not allow it ({what}). `hf auth login` with a token that may."
    if isinstance(error, OSError) and error.errno is not None:
        return f"it cannot be stored ({what}). Make room for it, or set HF_HOME."
    return f"the Hub was not reached, or the connection broke off ({what}). Check the network and try again."


def _download_command(name: str, patterns: tuple[str, ...] | None) -> str:
    repo, _, revision = name.partition("@")
    wanted = patterns or (_NATIVE if repo.startswith("mistralai/") else ())
    options = [f"--revision {revision}"] * bool(revision) + [f"--include '{pattern}'" for pattern in wanted]
    return " ".join(["hf download", repo, *options])
