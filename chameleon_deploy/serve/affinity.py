"""What a request has in common with those that should meet it in one replica."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request

from chameleon_deploy.contract.bundle import open_bundle
from chameleon_deploy.errors import ChameleonError, InputError
from chameleon_deploy.runtime.adaptation import assign, embed
from chameleon_deploy.runtime.inputs import encode
from chameleon_deploy.runtime.tokenizer import load_tokenizer
from chameleon_deploy.serve.errors import ApiError
from chameleon_deploy.serve.keys import Keys
from chameleon_deploy.serve.prompts import as_texts
from chameleon_deploy.serve.routing import Routing
from chameleon_deploy.store import remote

PREFIX_BYTES = 512  # of a text's beginning that routing by prefix compares


class Affinity:
    """The keys of one kind of routing. A request that a replica will refuse has none: any replica may refuse it."""

    def __init__(self, routing: Routing, bundle: str, api_keys: Path | None) -> None:
        """Raises a ChameleonError, among them InputError for a routing whose keys nothing would have."""
        if routing == "tenant" and api_keys is None:
            raise InputError("routing by tenant needs api_keys: a tenant is known by its API key")
        self._routing, self._keys = routing, Keys(api_keys)
        self._cluster_of = _clusters(bundle) if routing == "cluster" else None

    async def key(self, request: Request, body: bytes) -> str | None:
        """Return the tenant, the cluster of the first prompt, a digest of how it begins, or None."""
        if self._cluster_of is not None and request.method == "POST":
            return await asyncio.to_thread(self._cluster_of, body)
        if self._routing in ("tenant", "prefix"):
            try:
                tenant = self._keys.holder(request.headers.get("authorization")).tenant
            except ApiError:
                return None
            return tenant if self._routing == "tenant" else _prefix(body, tenant)
        return None


class _Beginning(msgspec.Struct):
    """The fields of a body that say how its text begins."""

    prompt: Any = None
    input: Any = None
    messages: list[Any] = []
    instructions: Any = None
    tools: Any = None
    cache_salt: Any = None


def _prefix(body: bytes, tenant: str | None) -> str | None:
    """Return a key that is equal for requests which may find what another has left in a replica's prefix cache.

    It is made of the first bytes of the first prompt, or of the first message, which stays the same while a
    conversation grows. Adapters are no part of it: activated ones share what they begin with.
    """
    try:
        fields = msgspec.json.decode(body, type=_Beginning)
        first: Any
        if fields.messages:
            first = [fields.messages[0], fields.tools]
        elif fields.instructions is not None:
            first = [fields.instructions, fields.tools]
        else:
            first = as_texts(fields.input if fields.prompt is None else fields.prompt)[0]
        beginning = msgspec.json.encode(first)[:PREFIX_BYTES]
        return hashlib.sha256(msgspec.json.encode([tenant, fields.cache_salt]) + beginning).hexdigest()
    except (msgspec.MsgspecError, UnicodeDecodeError, TypeError, IndexError, KeyError):
        return None


class _Prompts(msgspec.Struct):
    """The fields of a body that routing reads."""

    prompt: Any = None
    input: Any = None
    adapt_tokens: int | None = None


def _clusters(path: str) -> Callable[[bytes], str | None]:
    """Return a function from a body to its cluster; it needs a bundle's tokenizer and centroids, but no session."""
    bundle = open_bundle(remote.local(path))
    model, spec = bundle.manifest.model, bundle.manifest.adaptation
    tokenizer, token_embedding = load_tokenizer(bundle.path / "tokenizer.json"), bundle.token_embedding()
    centroids = bundle.centroids()
    if "centroid" not in spec.modes:
        raise InputError(f"routing by cluster needs a bundle whose factors depend on the cluster: {path} has none")

    def cluster(body: bytes) -> str | None:
        try:
            fields = msgspec.json.decode(body, type=_Prompts)
            texts = as_texts(fields.input if fields.prompt is None else fields.prompt)
            ids = encode(texts[:1], tokenizer, model)[0][: fields.adapt_tokens]
            return str(assign(embed([ids], token_embedding, spec, model.eos_token_id), centroids)[0])
        except (ChameleonError, msgspec.MsgspecError, UnicodeDecodeError, TypeError, IndexError):
            return None

    return cluster
