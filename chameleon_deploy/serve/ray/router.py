"""Ray's request router with our choice of a replica."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from chameleon_deploy.serve.routing import choose


class Router(RequestRouter):  # type: ignore[misc]  # Ray is not installed where types are checked
    """Orders replicas by `routing.choose`. Ray passes over those that have max_ongoing_requests, and asks again."""

    _bound = 1.25

    def initialize_state(self, bound: float) -> None:
        """Called by Ray with the arguments of the configuration."""
        self._bound = bound

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return replicas in the order in which they are to be tried."""
        if not candidate_replicas:
            return []
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        lengths = self.replica_queue_len_cache
        queues = {name: lengths.get(replica.replica_id) or 0 for name, replica in by_name.items()}
        key = _key(pending_request)
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        names = choose(queues, key, self._bound)
        if key is None:
            return [[by_name[name] for name in names]]
        return [[by_name[name]] for name in names]


def _key(request: Any) -> str | None:
    """Return the argument `key` of `Replica.answer`; other methods have none."""
    return request.args[2] if request is not None and len(request.args) == 3 else None
