"""The process of a cluster that takes requests: it reads one, chooses a replica, and passes the answer on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from chameleon_deploy.serve import metrics
from chameleon_deploy.serve.affinity import Affinity
from chameleon_deploy.serve.bodies import DisconnectedError, UnfinishedBodies, read_body
from chameleon_deploy.serve.errors import ApiError, api_error, error_response
from chameleon_deploy.serve.event_stream import DONE, event
from chameleon_deploy.serve.ray.replica import Head
from chameleon_deploy.serve.routing import Routing
from chameleon_deploy.serve.settings import Settings
from chameleon_deploy.serve.totals import Totals

ATTEMPTS = 4  # replicas that may die one after the other with a request that they have not begun to answer
HEALTH_SECONDS = 5  # for some replica to answer /health
_SCOPE = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client", "server")
_log = logging.getLogger(__name__)


class Ingress:
    """Ray Serve's deployment class of what listens to HTTP."""

    def __init__(self, replicas: DeploymentHandle, bundle: str, routing: Routing, settings: Settings) -> None:
        """Raises a ChameleonError."""
        self._replicas = replicas.options(stream=True)
        self._affinity = Affinity(routing, bundle, settings.api_keys)
        self._max_body_bytes = settings.max_body_bytes
        self._unfinished = UnfinishedBodies(max(settings.max_unfinished_bytes, settings.max_body_bytes))
        self._totals = Totals()

    async def __call__(self, request: Request) -> Response:
        """Answer one request; Ray cancels this when the client goes."""
        try:
            if request.url.path == "/metrics":
                texts = await self._replicas.broadcast("metrics").results_async()
                return Response(self._totals.add_up(dict(texts)), media_type=metrics.CONTENT_TYPE)
            if request.url.path == "/health":
                async with asyncio.timeout(HEALTH_SECONDS):
                    return await self._forward(request)
            return await self._forward(request)
        except TimeoutError:
            return error_response(ApiError(503, "loading", "no replica answers"))
        except BackPressureError:
            return error_response(ApiError(429, "queue_full", "every replica is busy: try again later"))
        except DisconnectedError:
            return Response(status_code=499)  # nobody reads it
        except Exception as error:
            answer = api_error(error)
            if answer.status == 500:
                _log.exception("a request failed")
            return error_response(answer)

    async def _forward(self, request: Request) -> Response:
        """Ask one replica after the other until one begins to answer."""
        body = await read_body(request.receive, self._max_body_bytes, self._unfinished)
        scope = {name: request.scope[name] for name in _SCOPE if name in request.scope}
        key = await self._affinity.key(request, body)
        for _ in range(ATTEMPTS):
            answer = self._replicas.answer.remote(scope, body, key)
            try:
                return _response(await anext(answer), answer)
            except RayActorError:
                _log.warning("a replica died before it had begun to answer: the request goes to another")
            except asyncio.CancelledError:
                answer.cancel()
                raise
        raise ApiError(503, "closed", f"{ATTEMPTS} replicas died, one after the other: try again later")


def _response(head: Head, rest: Any) -> Response:
    response = (
        StreamingResponse(_stream(head.body, rest), head.status) if head.more else Response(head.body, head.status)
    )
    response.raw_headers = head.headers  # as the application wrote them
    return response


async def _stream(first: bytes, rest: Any) -> AsyncIterator[bytes]:
    """The bytes of a stream. A replica that dies before it has sent all of them ends it with one error event."""
    ended = False
    try:
        yield first
        ended = first.endswith(DONE)
        async for part in rest:
            yield part
            ended = part.endswith(DONE)
        ended = True
    except RayActorError:
        if not ended:
            ended = True
            yield event(ApiError(503, "closed", "the replica died before the end of the stream").body)
    finally:
        if not ended:
            rest.cancel()
