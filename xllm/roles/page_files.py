"""The live page's files, which are in the package: GET / and /page/… on a master's operator port.

They hold nothing that is secret and are for everybody, so that the page can ask for the operators'
key. What the page then does needs that key, in a header that no other site's page can send. The
headers here say that it runs no code but its own files, talks to nobody but where it came from, and
is shown in no other site's frame.
"""

from __future__ import annotations

from functools import cache
from importlib import resources

from aiohttp import web

OPEN_PREFIX = "/page/"

_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'; "
        # No markup is ever made of text: not by mistake either.
        "require-trusted-types-for 'script'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # The files of another version of xllm must not be mixed with these.
    "Cache-Control": "no-cache",
}


@cache
def page_files() -> dict[str, bytes]:
    """By name."""
    folder = resources.files("xllm") / "page"
    return {
        item.name: item.read_bytes()
        for item in folder.iterdir()
        if item.name.rpartition(".")[2] in _TYPES
    }


def is_open(path: str) -> bool:
    """Whether a path of the operator port is one of these files'."""
    return path == "/" or path.startswith(OPEN_PREFIX)


def page_routes() -> list[web.RouteDef]:
    return [web.get("/", _show_page), web.get(OPEN_PREFIX + "{name}", _show_file)]


async def _show_page(request: web.Request) -> web.Response:
    return _response("index.html")


async def _show_file(request: web.Request) -> web.Response:
    return _response(request.match_info["name"])


def _response(name: str) -> web.Response:
    body = page_files().get(name)
    if body is None:
        raise web.HTTPNotFound
    headers = _HEADERS | {"Content-Type": _TYPES[name.rpartition(".")[2]]}
    return web.Response(body=body, headers=headers)
