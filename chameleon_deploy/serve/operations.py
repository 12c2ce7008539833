"""The table of endpoints that take requests: routes and /openapi.json are both made of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from chameleon_deploy.serve import lora_adapters, schemas
from chameleon_deploy.serve.call import Call
from chameleon_deploy.serve.clusters import adapt, clusters
from chameleon_deploy.serve.completions import complete
from chameleon_deploy.serve.scoring import score
from chameleon_deploy.serve.tokenization import detokenize, tokenize, tokenizer_info


@dataclass(frozen=True)
class Operation:
    """body: type of the JSON body of a POST; None for a GET"""

    path: str
    handler: Callable[[Call[Any]], Awaitable[Any]]
    body: type[msgspec.Struct] | None
    response: type[msgspec.Struct]
    summary: str

    @property
    def method(self) -> str:
        return "GET" if self.body is None else "POST"


async def _models(call: Call[None]) -> schemas.ModelList:
    return call.served.models.list()


OPERATIONS = (
    Operation("/v1/completions", complete, schemas.CompletionRequest, schemas.Completion, "Continue prompts."),
    Operation("/v1/models", _models, None, schemas.ModelList, "The bundle's modes, each as a model."),
    Operation("/v1/score", score, schemas.TextsRequest, schemas.ScoreResponse, "Log-probabilities of texts."),
    Operation("/v1/adapt", adapt, schemas.TextsRequest, schemas.AdaptResponse, "Embeddings and nearest clusters."),
    Operation("/v1/clusters", clusters, None, schemas.ClusterList, "Centroids, and prompts seen of each."),
    Operation(
        "/v1/load_lora_adapter", lora_adapters.load, schemas.LoadAdapterRequest, schemas.Model, "Load an adapter file."
    ),
    Operation(
        "/v1/unload_lora_adapter",
        lora_adapters.unload,
        schemas.UnloadAdapterRequest,
        schemas.AdapterUnloaded,
        "Forget an adapter.",
    ),
    Operation("/tokenize", tokenize, schemas.TokenizeRequest, schemas.TokenizeResponse, "Token ids of a text."),
    Operation("/detokenize", detokenize, schemas.DetokenizeRequest, schemas.DetokenizeResponse, "Text of token ids."),
    Operation("/tokenizer_info", tokenizer_info, None, schemas.TokenizerInfo, "About the tokenizer."),
)
