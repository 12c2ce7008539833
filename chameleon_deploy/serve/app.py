"""The ASGI application: routes, the files of the playground, and the answers to errors."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Lifespan

from chameleon_deploy import __version__
from chameleon_deploy.errors import ChameleonError
from chameleon_deploy.serve import metrics, openapi
from chameleon_deploy.serve.endpoint import Endpoint, json_response
from chameleon_deploy.serve.errors import ApiError, api_error, error_response
from chameleon_deploy.serve.logs import RequestLog
from chameleon_deploy.serve.operations import OPERATIONS
from chameleon_deploy.serve.schemas import Health, Version
from chameleon_deploy.serve.service import Service

_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_FILES = {  # by name, as they were when the server started
    file.name: (file.read_bytes(), _TYPES[file.suffix])
    for file in sorted((Path(__file__).parent / "page").glob("*"))
    if file.suffix in _TYPES
}


def build(service: Service, lifespan: Lifespan[Starlette] | None = None) -> ASGIApp:
    """The application of a service, which may still be loading."""
    faults = (ApiError, ChameleonError, HTTPException, Exception)
    app = Starlette(
        routes=[
            *(Route(o.path, Endpoint(service, o), methods=[o.method]) for o in OPERATIONS),
            Route("/v1/models/{model}", _model),
            Route("/health", _health),
            Route("/metrics", _metrics),
            Route("/version", _version),
            Route("/openapi.json", _openapi),
            Route("/", _page),
            Route("/{name}", _page),
        ],
        lifespan=lifespan,
        exception_handlers=dict.fromkeys(faults, _on_error),
    )
    app.state.service = service
    return RequestLog(app)


async def _on_error(request: Request, error: Exception) -> Response:
    answer = api_error(error)
    _service(request).metrics.reject(answer.code)
    return error_response(answer)


async def _model(request: Request) -> Response:
    service = _service(request)
    service.keys.holder(request.headers.get("authorization"))
    return json_response(service.served.models.get(request.path_params["model"]))


async def _health(request: Request) -> Response:
    _service(request).check_health()
    return json_response(Health("ok"))


async def _metrics(request: Request) -> Response:
    return Response(_service(request).metrics.text(), media_type=metrics.CONTENT_TYPE)


async def _version(request: Request) -> Response:
    runtime = _service(request).served.runtime
    return json_response(
        Version(__version__, runtime.bundle.digest, runtime.provider, runtime.manifest.precision)
    )  # fmt: skip


async def _page(request: Request) -> Response:
    """Return a file of the playground."""
    name = request.path_params.get("name", "index.html")
    if name not in _FILES:
        raise ApiError(404, "not_found", f"there is no {name!r} here")
    content, media_type = _FILES[name]
    return Response(content, headers=_HEADERS, media_type=media_type)


async def _openapi(request: Request) -> Response:
    return Response(_document(), media_type="application/json")


@cache
def _document() -> bytes:
    return msgspec.json.encode(openapi.document())


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service
