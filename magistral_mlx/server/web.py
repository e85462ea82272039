"""The page at `/`: its files, and the content security policy for the browser.

Whatever text the page shows, it connects to this server only, and runs no scripts but the files in `page`.
Needs no key: the files hold nothing private, and the page asks for the key where there is one.
"""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

PAGE = Path(__file__).parent / "page"

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # revalidated each time; an unchanged file is not sent again
}


class _Files(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


def routes() -> list[BaseRoute]:
    return [Route("/", _index, methods=["GET"]), Mount("/page", _Files(directory=PAGE))]


async def _index(_: Request) -> Response:
    return FileResponse(PAGE / "index.html", headers=HEADERS)
