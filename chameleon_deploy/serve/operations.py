"""The endpoints that take requests: the table of which routes and /openapi.json are made, and the short handlers.

Adapters are loaded and unloaded as in vLLM, texts are tokenized as in lm-evaluation-harness and vLLM.
"""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from chameleon_deploy.contract.bundle import FloatArray
from chameleon_deploy.errors import ChameleonError
from chameleon_deploy.runtime.encoder import Encoder
from chameleon_deploy.serve import chat_schemas, schemas
from chameleon_deploy.serve.adapters import AdapterDirectories
from chameleon_deploy.serve.call import Call
from chameleon_deploy.serve.chat import complete_chat
from chameleon_deploy.serve.completions import complete
from chameleon_deploy.serve.errors import ApiError, api_error
from chameleon_deploy.serve.prompts import as_texts, encode
from chameleon_deploy.serve.responses import ResponseObject, ResponsesRequest, respond
from chameleon_deploy.serve.scoring import score


@dataclass(frozen=True)
class Operation:
    """body: type of the JSON body of a POST; None for other methods"""

    path: str
    handler: Callable[[Call[Any]], Awaitable[Any]]
    response: type[msgspec.Struct]
    summary: str
    body: type[msgspec.Struct] | None = None
    is_deletion: bool = False

    @property
    def method(self) -> str:
        return "POST" if self.body is not None else "DELETE" if self.is_deletion else "GET"


async def _models(call: Call[None]) -> schemas.ModelList:
    return call.served.models.list()


async def _adapt(call: Call[schemas.TextsRequest]) -> schemas.AdaptResponse:
    return await call.off_loop_if_large(lambda: _adapted(call))


def _adapted(call: Call[schemas.TextsRequest]) -> schemas.AdaptResponse:
    """Return where texts lie among the centroids."""
    body, served = call.body, call.served
    model = served.models.resolve(body.model, body.mode).model
    ids = [row[: body.adapt_tokens] for row in encode(body.input, "input", served)]
    embeddings, cluster_ids = served.runtime.embed(ids)
    items = [
        schemas.AdaptItem(
            index=i,
            cluster_id=int(cluster_ids[i]),
            embedding=embedding.tolist(),
            distances=np.linalg.norm(served.centroids - embedding, axis=1).tolist(),
            num_tokens=len(ids[i]),
        )
        for i, embedding in enumerate(embeddings)
    ]
    return schemas.AdaptResponse(model=model, data=items)


async def _embeddings(call: Call[schemas.EmbeddingsRequest]) -> schemas.EmbeddingsResponse:
    """Embed texts in OpenAI's form, one after the other, in turn with the other requests."""
    body, served = call.body, call.served
    model = served.models.resolve(body.model).model
    encoder = served.runtime.encoder
    if encoder is None:
        raise ApiError(400, "mode_unavailable", "this bundle has no encoder: export it with --encoder DIR", "model")
    if body.dimensions not in (None, encoder.spec.size):
        message = f"dimensions {body.dimensions}: the encoder's embeddings have {encoder.spec.size} numbers"
        raise ApiError(400, "input_invalid", message, "dimensions")
    texts = as_texts(body.input)
    if len(texts) > served.max_prompts:
        raise ApiError(400, "input_invalid", f"{len(texts)} texts, at most {served.max_prompts} are taken", "input")
    try:
        rows = await call.off_loop(lambda: encoder.encode(texts, "input"))
    except ChameleonError as error:
        raise api_error(error, "input") from error
    data = [
        schemas.EmbeddingItem(
            index=i, embedding=_written(await served.score(_embed, encoder, row), body.encoding_format)
        )
        for i, row in enumerate(rows)
    ]
    special = len(encoder.spec.prefix_ids) + len(encoder.spec.suffix_ids)
    tokens = sum(len(row) + special for row in rows)
    return schemas.EmbeddingsResponse(data=data, model=model, usage=schemas.EmbeddingsUsage(tokens, tokens))


def _embed(encoder: Encoder, row: list[int]) -> FloatArray:
    embedding: FloatArray = encoder.embed([row])[0]
    return embedding


def _written(embedding: FloatArray, encoding_format: str) -> list[float] | str:
    if encoding_format == "base64":
        return base64.b64encode(embedding.astype("<f4").tobytes()).decode()
    values: list[float] = embedding.tolist()
    return values


async def _clusters(call: Call[None]) -> schemas.ClusterList:
    sizes, centroids = call.served.cluster_sizes, call.served.centroids.tolist()
    return schemas.ClusterList(
        data=[schemas.Cluster(id=i, size=sizes[i], centroid=centroid) for i, centroid in enumerate(centroids)]
    )


async def _prefix_cache(call: Call[None]) -> schemas.PrefixCache:
    stats = call.served.engine.prefix_cache_stats(call.salt)
    return schemas.PrefixCache(tokens=stats.tokens, bytes=stats.bytes, max_bytes=stats.max_bytes)


async def _clear_prefix_cache(call: Call[None]) -> schemas.PrefixCache:
    call.served.engine.clear_prefix_cache(call.salt)
    return await _prefix_cache(call)


async def _load_adapter(call: Call[schemas.LoadAdapterRequest]) -> schemas.Model:
    """Load an adapter of the server's directories. Raises ApiError."""
    body, served = call.body, call.served
    await _adapter_directories(call).load(body.lora_name, body.lora_path, body.load_inplace)
    return served.models.get(f"{served.models.name}:{body.lora_name}")


async def _unload_adapter(call: Call[schemas.UnloadAdapterRequest]) -> schemas.AdapterUnloaded:
    """Forget an adapter; its running rows go on. Raises ApiError or AdapterError."""
    _adapter_directories(call)
    call.served.runtime.unload_adapter(call.body.lora_name)
    return schemas.AdapterUnloaded(call.body.lora_name)


def _adapter_directories(call: Call[Any]) -> AdapterDirectories:
    directories = call.served.adapter_directories
    if directories is None:
        raise ApiError(403, "adapters_fixed", "this server loads no adapters: start it with --adapters DIR")
    if directories.has_peers:
        message = "this request would change one replica only: name the adapter in a request, which loads it"
        raise ApiError(403, "adapters_fixed", message)
    if "load_adapters" not in call.rights:
        raise ApiError(403, "right_missing", "this API key may not load or unload adapters: it needs load_adapters")
    return directories


async def _tokenize(call: Call[schemas.TokenizeRequest]) -> schemas.TokenizeResponse:
    return await call.off_loop_if_large(lambda: _tokenized(call))


def _tokenized(call: Call[schemas.TokenizeRequest]) -> schemas.TokenizeResponse:
    """An empty text has no tokens, which is no fault here."""
    body, served = call.body, call.served
    served.models.resolve(body.model)
    encoding = served.runtime.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)
    length = served.models.max_length
    response = schemas.TokenizeResponse(count=len(encoding.ids), max_model_len=length, tokens=encoding.ids)
    if body.return_token_strs:
        response.token_strs = encoding.tokens
    return response


async def _detokenize(call: Call[schemas.DetokenizeRequest]) -> schemas.DetokenizeResponse:
    body, served = call.body, call.served
    served.models.resolve(body.model)
    vocab_size = served.runtime.manifest.model.vocab_size
    if (bad := next((i for i in body.tokens if i >= vocab_size), None)) is not None:
        message = f"token id {bad} is outside the vocabulary of {vocab_size}"
        raise ApiError(422, "token_invalid", message, "tokens")
    decode = served.runtime.tokenizer.decode
    text = await call.off_loop_if_large(lambda: decode(body.tokens, skip_special_tokens=False))
    return schemas.DetokenizeResponse(text)


async def _tokenizer_info(call: Call[None]) -> schemas.TokenizerInfo:
    tokenizer, model = call.served.runtime.tokenizer, call.served.runtime.manifest.model
    return schemas.TokenizerInfo(
        tokenizer_class=type(tokenizer.model).__name__,
        vocab_size=model.vocab_size,
        model_max_length=model.max_positions,
        eos_token=tokenizer.id_to_token(model.eos_token_id) or "",
        eos_token_id=model.eos_token_id,
    )


OPERATIONS = (
    Operation("/v1/completions", complete, schemas.Completion, "Continue prompts.", schemas.CompletionRequest),
    Operation(
        "/v1/chat/completions", complete_chat, chat_schemas.ChatCompletion, "Answer a conversation.",
        chat_schemas.ChatRequest,
    ),
    Operation("/v1/responses", respond, ResponseObject, "Answer a conversation, statelessly.", ResponsesRequest),
    Operation("/v1/models", _models, schemas.ModelList, "The bundle's modes, each as a model."),
    Operation("/v1/score", score, schemas.ScoreResponse, "Log-probabilities of texts.", schemas.ScoreRequest),
    Operation(
        "/v1/embeddings", _embeddings, schemas.EmbeddingsResponse, "Embeddings of texts, by the bundle's encoder.",
        schemas.EmbeddingsRequest,
    ),
    Operation("/v1/adapt", _adapt, schemas.AdaptResponse, "Embeddings and nearest clusters.", schemas.TextsRequest),
    Operation("/v1/clusters", _clusters, schemas.ClusterList, "Centroids, and prompts seen of each."),
    Operation("/v1/cache", _prefix_cache, schemas.PrefixCache, "The tenant's part of the prefix cache."),
    Operation(
        "/v1/cache", _clear_prefix_cache, schemas.PrefixCache, "Empty the tenant's part of the prefix cache.",
        is_deletion=True,
    ),
    Operation(
        "/v1/load_lora_adapter", _load_adapter, schemas.Model, "Load an adapter file.", schemas.LoadAdapterRequest
    ),
    Operation(
        "/v1/unload_lora_adapter", _unload_adapter, schemas.AdapterUnloaded, "Forget an adapter.",
        schemas.UnloadAdapterRequest,
    ),
    Operation("/tokenize", _tokenize, schemas.TokenizeResponse, "Token ids of a text.", schemas.TokenizeRequest),
    Operation("/detokenize", _detokenize, schemas.DetokenizeResponse, "Text of token ids.", schemas.DetokenizeRequest),
    Operation("/tokenizer_info", _tokenizer_info, schemas.TokenizerInfo, "About the tokenizer."),
)  # fmt: skip
