"""One request on its way to its handler."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

from chameleon_deploy.serve.bodies import Receive
from chameleon_deploy.serve.service import Served

B = TypeVar("B", bound=msgspec.Struct | None)
T = TypeVar("T")

LARGE = 8192  # bytes of a body that takes milliseconds to tokenize


@dataclass(frozen=True)
class Call(Generic[B]):
    """body        checked
    size        of the body, in bytes
    tenant      of its API key
    receive     tells of the client's disconnect
    """

    body: B
    size: int
    served: Served
    tenant: str | None
    request_id: str
    receive: Receive

    async def off_loop_if_large(self, work: Callable[[], T]) -> T:
        """Do what takes the longer the larger the body is, without holding up other requests."""
        return work() if self.size <= LARGE else await asyncio.to_thread(work)
