"""The files of the playground, by name only."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from chameleon_deploy.serve.errors import ApiError

FOLDER = Path(__file__).parent / "page"
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


async def page(request: Request) -> Response:
    """The file that is asked for: one that was there when the server started."""
    name = request.path_params.get("name", "index.html")
    if name not in _FILES:
        raise ApiError(404, "not_found", f"there is no {name!r} here")
    content, media_type = _FILES[name]
    return Response(content, headers=_HEADERS, media_type=media_type)


_FILES = {
    file.name: (file.read_bytes(), _TYPES[file.suffix]) for file in sorted(FOLDER.glob("*")) if file.suffix in _TYPES
}
