"""The command `serve`: a loaded model behind HTTP, until Ctrl-C."""

import re
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TypedDict, Unpack

import click

from magistral_mlx.errors import ServerError

from .common import chosen, download_option, kv_bits_option, model_option, quantize_after_option, resolve

_NEEDED = ("fastapi", "uvicorn", "sse_starlette", "prometheus_client")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_ANY = ("0.0.0.0", "::")  # noqa: S104 -- compared with, not bound to
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def _bytes(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    """`1GB`, `500 MB`, or bytes: decimal units, as in `size`."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,3})?)\s*([kmg]b)?", value.strip(), re.IGNORECASE | re.ASCII)
    if not found:
        raise click.BadParameter(f"expected a size such as 1GB or 500MB, found {value!r}")
    return int(float(found[1]) * _UNITS[(found[2] or "").lower()])


class _Serving(TypedDict):
    """The command's options."""

    model: str | None
    download: bool
    host: str
    port: int
    api_key: str | None
    api_key_file: Path | None
    max_running: int | None
    queue: int
    prefix_cache: int | None
    kv_bits: str
    quantize_after: int
    allow_host: tuple[str, ...]
    allow_origin: tuple[str, ...]


@click.command()
@model_option
@download_option
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; any but localhost needs a key.",
)
@click.option(
    "--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any free port."
)
@click.option(
    "--api-key",
    envvar="MAGISTRAL_API_KEY",
    help="The key that clients must send. Safer in MAGISTRAL_API_KEY: `ps` shows options.",
)
@click.option(
    "--api-key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file that holds the key.",
)
@click.option(
    "--max-running", type=click.IntRange(1), help="Replies at once. Default: by available memory, at most 8."
)
@click.option(
    "--queue",
    default=32,
    show_default=True,
    type=click.IntRange(0),
    help="Requests that may wait; more are refused.",
)
@click.option(
    "--prefix-cache",
    callback=_bytes,
    help="Memory for the KV cache of earlier prompts, such as 1GB. Default: by available memory.",
)
@kv_bits_option
@quantize_after_option
@click.option(
    "--allow-host",
    multiple=True,
    help="Another host name by which clients address this server. May be repeated.",
)
@click.option(
    "--allow-origin",
    multiple=True,
    help="A site whose pages may send requests, such as https://my.site. May be repeated.",
)
def serve(**options: Unpack[_Serving]) -> None:
    """Serve a model over HTTP: OpenAI and Anthropic APIs, and a page."""
    key = check(options)
    from magistral_mlx.chat import Magistral
    from magistral_mlx.fetch import hub, last_model
    from magistral_mlx.server.app import create_app
    from magistral_mlx.server.host import Host, bind
    from magistral_mlx.server.safety import LOOPBACK, Rules
    from magistral_mlx.server.service import Service

    host = options["host"]
    hosts = {*LOOPBACK, host, *options["allow_host"]}
    if host not in _LOOPBACK:
        hosts |= {socket.gethostname().lower(), f"{socket.gethostname().lower()}.local"}
    rules = Rules(
        key=key,
        hosts=frozenset(name.lower() for name in hosts),
        any_address=host in _ANY,
        origins=frozenset(options["allow_origin"]),
    )
    listening = bind(host, options["port"])
    name = chosen(options["model"])
    resolve(name, download=options["download"])
    kv_bits = 8 if options["kv_bits"] == "8" else None
    quantize_after = options["quantize_after"]
    with listening, Magistral.load(name, kv_bits=kv_bits, quantize_after=quantize_after) as model:
        last_model.remember(name)
        service = Service(
            model,
            ids=hub.known_as(name),
            running=options["max_running"] or model.at_once,
            waiting=options["queue"],
            prefix_bytes=options["prefix_cache"],
        )
        port = listening.getsockname()[1]
        shown = "127.0.0.1" if host in _ANY else f"[{host}]" if ":" in host else host
        click.echo(
            f"serving {service.ids[0]} at http://{shown}:{port} "
            f'(clients: base_url="http://{shown}:{port}/v1"; Ctrl-C ends it)'
        )
        Host(create_app(service, rules), close=service.close).run([listening])
    click.echo("ended", err=True)
    sys.stdout.flush()


def check(options: _Serving) -> str | None:
    """Check the options before anything is loaded; returns the API key, if there is one."""
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ServerError(
            f'the server needs {", ".join(missing)}, not installed here: pip install "magistral_mlx[server]"'
        )
    key = _key(options)
    if options["host"] not in _LOOPBACK and not key:
        raise ServerError(
            f"{options['host']} can be reached by other machines: expected a key for them, found none. Give "
            "MAGISTRAL_API_KEY or --api-key-file, or keep to 127.0.0.1"
        )
    if key is not None and not (key and key.isascii() and key.isprintable() and key == key.strip()):
        raise ServerError(
            "expected a key of printable ASCII without spaces around it, found "
            f"{'other characters' if key else 'an empty one'}; give it as text, as in --api-key-file FILE"
        )
    return key


def _key(options: _Serving) -> str | None:
    file = options["api_key_file"]
    if file is None:
        return options["api_key"]
    if options["api_key"] is not None:
        raise click.UsageError("--api-key (or MAGISTRAL_API_KEY) and --api-key-file exclude each other")
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ServerError(f"the key in {file} cannot be read: {error}") from error
    if not key:
        raise ServerError(f"{file} is empty; it should hold the key")
    return key
