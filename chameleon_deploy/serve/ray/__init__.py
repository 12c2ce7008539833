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

from chameleon_deploy.errors import InputError
from chameleon_deploy.serve.ray.ingress import Ingress
from chameleon_deploy.serve.ray.replica import Replica
from chameleon_deploy.serve.ray.router import Router
from chameleon_deploy.serve.routing import Routing
from chameleon_deploy.serve.settings import Settings, converted

HEALTH_SECONDS = 5  # between two checks of a replica
QUEUED_REQUESTS_PER_ROW = 2  # that a replica is given, so that it never waits for the ingress


class Cluster(msgspec.Struct):
    """Settings that the command of one machine does not have.

    bundle        directory or URL; every node must be able to read it
    replicas      engines, or the least number of them where max_replicas is given
    max_replicas  Ray adds replicas while the requests that each has exceed its rows
    ingresses     processes that take requests
    routing       load, cluster or tenant: see `routing.choose`
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

    args  the fields of Cluster, and the options of the command of one machine with underscores, such as threads=2;
          here threads is 1 and share_weights true by default

    Raises InputError.
    """
    cluster, settings = _parse(args)
    scale: dict[str, Any] = {"num_replicas": cluster.replicas}
    if cluster.max_replicas is not None:
        scale = {
            "num_replicas": "auto",
            "autoscaling_config": {
                "min_replicas": cluster.replicas,
                "max_replicas": cluster.max_replicas,
                "target_ongoing_requests": settings.rows,
            },
        }
    replica = serve.deployment(Replica).options(
        **scale,
        max_ongoing_requests=QUEUED_REQUESTS_PER_ROW * settings.rows,
        max_queued_requests=settings.max_waiting,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        health_check_period_s=HEALTH_SECONDS,
        health_check_timeout_s=2 * HEALTH_SECONDS,
        ray_actor_options={"num_cpus": settings.threads},
        request_router_config=RequestRouterConfig(
            request_router_class=Router, request_router_kwargs={"bound": cluster.bound}
        ),
    )
    ingress = serve.deployment(Ingress).options(
        num_replicas=cluster.ingresses,
        max_ongoing_requests=settings.max_requests,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        health_check_period_s=HEALTH_SECONDS,
    )
    return ingress.bind(replica.bind(cluster.bundle, settings), cluster.bundle, cluster.routing, settings)


def _parse(args: dict[str, Any]) -> tuple[Cluster, Settings]:
    if "adapters" in args:
        raise InputError("a request would load an adapter into one replica only: serve adapters on one machine")
    ours = set(Cluster.__struct_fields__)
    options = {field.name for field in fields(Settings)} - {"bundle"}
    if unknown := set(args) - ours - options:
        raise InputError(f"no option {', '.join(sorted(unknown))}: choose of {', '.join(sorted(ours | options))}")
    defaults = {"threads": 1, "share_weights": True, "bundle": ""}  # the replica knows where it has the bundle
    given = {name: value for name, value in args.items() if name in options}
    if isinstance(given.get("trusted_keys"), str):  # from the command line
        given["trusted_keys"] = given["trusted_keys"].split(",")
    try:
        cluster = msgspec.convert({name: args[name] for name in ours & set(args)}, Cluster, strict=False)
        settings = converted({**defaults, **given})
    except msgspec.ValidationError as error:
        raise InputError(f"{error}") from error
    if cluster.max_replicas is not None and cluster.max_replicas < cluster.replicas:
        raise InputError(f"max_replicas {cluster.max_replicas} is less than replicas {cluster.replicas}")
    return cluster, settings
