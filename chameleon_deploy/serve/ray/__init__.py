"""Serve a bundle on a Ray cluster: `serve run chameleon_deploy.serve.ray:app bundle=DIR replicas=2 routing=load`.

Ray Serve starts, watches and scales two kinds of actors. A `Replica` is the server of one machine, with its engine, its
application and its limits, called over Ray instead of HTTP: the interface between the two kinds is ASGI. The
`Ingress` reads requests, chooses a replica, and passes the answer on.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any

import msgspec
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from chameleon_deploy.errors import InputError
from chameleon_deploy.serve.ray.ingress import Ingress
from chameleon_deploy.serve.ray.replica import Replica
from chameleon_deploy.serve.routing import Routing, choose
from chameleon_deploy.serve.settings import Settings, converted

HEALTH_SECONDS = 5  # between two checks of a replica
QUEUED_REQUESTS_PER_ROW = 2  # that a replica is given, so that it never waits for the ingress


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


class Deployment(msgspec.Struct):
    """Settings that the command of one machine does not have.

    bundle        directory or URL; every node must be able to read it
    replicas      engines, or the least number of them where max_replicas is given
    max_replicas  Ray adds replicas while the requests that each has exceed its rows
    ingresses     processes that take requests
    routing       load, cluster, tenant or prefix: see `routing.choose`
    bound         of a replica's queue, in multiples of the mean: see there
    """

    bundle: str
    replicas: Annotated[int, msgspec.Meta(ge=1)] = 1
    max_replicas: int | None = None
    ingresses: Annotated[int, msgspec.Meta(ge=1)] = 1
    routing: Routing = "load"
    bound: Annotated[float, msgspec.Meta(ge=1)] = 1.25


def app(args: dict[str, Any]) -> serve.Application:
    """Build the application for `serve run` and `serve deploy`.

    args  the fields of Deployment, and the options of the command of one machine with underscores, such as threads=2;
          here threads is 1 and share_weights true by default

    Raises InputError.
    """
    deployment, settings = _parse(args)
    scale: dict[str, Any] = {"num_replicas": deployment.replicas}
    if deployment.max_replicas is not None:
        scale = {
            "num_replicas": "auto",
            "autoscaling_config": {
                "min_replicas": deployment.replicas,
                "max_replicas": deployment.max_replicas,
                "target_ongoing_requests": settings.rows,
            },
        }
    replica = serve.deployment(Replica).options(
        **scale,
        # With keys all requests wait in the replicas, which divide rows among tenants; the ingress would not.
        max_ongoing_requests=settings.max_requests if settings.api_keys else QUEUED_REQUESTS_PER_ROW * settings.rows,
        max_queued_requests=settings.max_waiting,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        health_check_period_s=HEALTH_SECONDS,
        health_check_timeout_s=2 * HEALTH_SECONDS,
        ray_actor_options={"num_cpus": settings.threads},
        request_router_config=RequestRouterConfig(
            request_router_class=Router, request_router_kwargs={"bound": deployment.bound}
        ),
    )
    ingress = serve.deployment(Ingress).options(
        num_replicas=deployment.ingresses,
        max_ongoing_requests=settings.max_requests,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        health_check_period_s=HEALTH_SECONDS,
    )
    return ingress.bind(replica.bind(deployment.bundle, settings), deployment.bundle, deployment.routing, settings)


def _parse(args: dict[str, Any]) -> tuple[Deployment, Settings]:
    ours = set(Deployment.__struct_fields__)
    options = {field.name for field in fields(Settings)} - {"bundle"}
    if unknown := set(args) - ours - options:
        raise InputError(f"no option {', '.join(sorted(unknown))}: choose of {', '.join(sorted(ours | options))}")
    defaults = {"threads": 1, "share_weights": True, "bundle": ""}  # the replica knows where it has the bundle
    given = {name: value for name, value in args.items() if name in options}
    for name in ("trusted_keys", "adapters"):
        if isinstance(given.get(name), str):  # from the command line
            given[name] = given[name].split(",")
    try:
        deployment = msgspec.convert({name: args[name] for name in ours & set(args)}, Deployment, strict=False)
        settings = converted({**defaults, **given})
    except msgspec.ValidationError as error:
        raise InputError(f"{error}") from error
    if settings.adapters and not settings.adapter_resolver:
        raise InputError("adapters of a cluster are loaded by the requests that name them: pass adapter_resolver=true")
    if deployment.max_replicas is not None and deployment.max_replicas < deployment.replicas:
        raise InputError(f"max_replicas {deployment.max_replicas} is less than replicas {deployment.replicas}")
    return deployment, settings
