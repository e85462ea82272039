"""The page's files: nothing from elsewhere, nothing inline, vendored files with their recorded hashes."""

import hashlib
import json
import re
from html.parser import HTMLParser
from urllib.parse import urlsplit

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from magistral_mlx.server.safety import Rules
from magistral_mlx.server.web import HEADERS, PAGE, routes
from tests.serving import Running

OWN_FILES = sorted(path for path in PAGE.iterdir() if path.is_file())
VENDOR = PAGE / "vendor"
VERSIONS = json.loads((VENDOR / "versions.json").read_text())
NAMESPACE = "http://www.w3.org/"


class Elements(HTMLParser):
    """Every start tag with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed((PAGE / "index.html").read_text())

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def elements() -> list[tuple[str, dict[str, str | None]]]:
    return Elements().found


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(Starlette(routes=routes()))


@pytest.mark.parametrize("path", OWN_FILES, ids=lambda path: path.name)
def test_own_files_refer_to_no_other_host(path):
    found = re.findall(r"(?:https?:)?//[\w.-]+\.\w+[\w./-]*", re.sub(r"(?m)^\s*//.*", "", path.read_text()))
    assert [url for url in found if not url.startswith(NAMESPACE)] == []


def test_vendored_styles_load_nothing_from_elsewhere():
    loaded = re.findall(r"url\(['\"]?([^'\")]+)", (VENDOR / "temml.css").read_text())
    assert loaded
    for url in loaded:
        assert url.startswith(("data:", "%23")) or (VENDOR / url).is_file()


def test_every_file_the_page_refers_to_is_served(elements, client):
    referred = [attrs.get("src") or attrs.get("href") for tag, attrs in elements if tag in ("script", "link")]
    assert len(referred) >= 9
    for url in referred:
        assert url
        assert not urlsplit(url).netloc
        assert client.get(url).status_code == 200, url
    modules = "".join(path.read_text() for path in OWN_FILES if path.suffix == ".js")
    for url in re.findall(r"from '\./([^']+)'", modules):
        assert (PAGE / url).is_file()


def test_no_script_or_style_is_inline(elements):
    assert "unsafe" not in HEADERS["Content-Security-Policy"]
    for tag, attrs in elements:
        assert not [name for name in attrs if name.startswith("on") or name == "style"]
        assert tag != "style"
        assert tag != "script" or attrs["src"]


@pytest.mark.parametrize("path", ["/", "/page/app.js", "/page/vendor/temml.css", "/page/none"])
def test_every_response_carries_the_security_headers(client, path):
    response = client.get(path)
    assert response.status_code == (404 if path == "/page/none" else 200)
    if response.status_code == 200:
        for name, value in HEADERS.items():
            assert response.headers[name] == value


@pytest.mark.parametrize(
    "path", ["/page/../app.py", "/page/%2e%2e/app.py", "/page/vendor/../../app.py", "/page//etc/passwd"]
)
def test_no_other_file_is_served(client, path):
    assert client.get(path).status_code == 404


def test_an_unchanged_file_is_not_sent_again(client):
    first = client.get("/page/app.js")
    again = client.get("/page/app.js", headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_every_id_that_the_scripts_look_up_exists_once(elements):
    ids = [attrs["id"] for _, attrs in elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    looked_up = set(re.findall(r"\$\('([\w-]+)'\)", (PAGE / "app.js").read_text()))
    assert len(looked_up) > 10
    assert looked_up <= set(ids)
    icons = {(attrs["href"] or "").removeprefix("#") for tag, attrs in elements if tag == "use"}
    assert icons <= set(ids)


def test_every_icon_button_has_a_name(elements):
    for tag, attrs in elements:
        if tag == "button" and attrs.get("title"):
            assert attrs["aria-label"]


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_has_enough_contrast(scheme: int):
    """WCAG's 4.5 : 1 for every text colour on every background that it may have."""
    style = (PAGE / "style.css").read_text()
    pairs = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", style)
    colours = {name: luminance(pair[scheme]) for name, *pair in pairs}
    code = [luminance(pair[scheme]) for pair in re.findall(r"color: light-dark\((#\w{6}), (#\w{6})\)", style)]
    backgrounds = [(colours["raised"], code), (colours["accent"], [colours["on-accent"]])]
    backgrounds += [
        (colours[background], [colours[text] for text in ("text", "faint", "accent", "bad")])
        for background in ("ground", "raised", "soft")
    ]
    assert len(code) == 4
    for background, texts in backgrounds:
        for text in texts:
            assert (max(background, text) + 0.05) / (min(background, text) + 0.05) >= 4.5


@pytest.mark.parametrize("package", VERSIONS, ids=lambda package: package["package"])
def test_vendored_files_have_their_recorded_hashes(package):
    assert re.fullmatch(r"\d+\.\d+\.\d+", package["version"])
    assert any(entry["as"].endswith(".LICENSE") for entry in package["files"])
    for entry in package["files"]:
        assert hashlib.sha256((VENDOR / entry["as"]).read_bytes()).hexdigest() == entry["sha256"]


def test_everything_vendored_is_recorded():
    recorded = {entry["as"] for package in VERSIONS for entry in package["files"]}
    assert {path.name for path in VENDOR.iterdir()} == recorded | {"versions.json"}


def test_the_page_needs_no_key_and_does_not_bypass_it(served):
    with Running(served.service.model, rules=Rules(key="secret")) as guarded:
        assert guarded.get("/").status == guarded.get("/page/app.js").status == 200
        for path in ("/v1/models", "/page/../v1/models", "/page/../metrics", "//page/../metrics"):
            assert guarded.get(path).status in (401, 404), path
