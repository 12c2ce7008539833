"""One request on its way to its handler."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import msgspec

from chameleon_deploy.runtime import Stream, StructuredOutputs
from chameleon_deploy.runtime.engine.tenants import NOBODY, Tenant
from chameleon_deploy.serve.keys import Right
from chameleon_deploy.serve.service import ServedModel

B = TypeVar("B", bound=msgspec.Struct | None)
T = TypeVar("T")

LARGE = 8192  # bytes of a body that takes milliseconds to tokenize


@dataclass(frozen=True)
class Call(Generic[B]):
    """body        checked
    size        of the body, in bytes
    tenant      of its API key
    rights      of its API key
    share       of the engine, of its tenant
    streams     of the engine, as the handler begins them
    """

    body: B
    size: int
    served: ServedModel
    tenant: str | None
    rights: frozenset[Right]
    request_id: str
    share: Tenant = NOBODY
    streams: list[Stream] = field(default_factory=list)

    @property
    def salt(self) -> str:
        """Return what the prefix cache's salts of this tenant begin with, and no other's."""
        return "" if self.tenant is None else f"{len(self.tenant)}:{self.tenant}:"

    async def off_loop_if_large(self, work: Callable[[], T], undo: Callable[[T], None] | None = None) -> T:
        """Do what takes the longer the larger the body is, without holding up other requests.

        undo  called with the result where the client has left meanwhile
        """
        return work() if self.size <= LARGE else await self.off_loop(work, undo)

    async def off_loop(
        self, work: Callable[[], T], undo: Callable[[T], None] | None = None, outputs: StructuredOutputs | None = None
    ) -> T:
        """Do what may wait, without holding up other requests.

        undo     as in `off_loop_if_large`
        outputs  structured outputs that the work compiles
        """
        # Those that are new are compiled one after the other, so that nobody waits for them who has none.
        compiles = outputs is not None and not self.served.runtime.has_compiled(outputs)
        executor = self.served.compiler if compiles else None
        working = asyncio.get_running_loop().run_in_executor(executor, work)
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            working.add_done_callback(lambda done: undo(done.result()) if undo and not done.exception() else None)
            raise
