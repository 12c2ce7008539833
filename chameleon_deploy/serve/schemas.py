"""The bodies of all requests and responses. /openapi.json is generated from them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from chameleon_deploy.contract.bundle import Mode
from chameleon_deploy.runtime.generation import MAX_DRAFT_TOKENS
from chameleon_deploy.runtime.sampling_settings import MAX_BIASES, MAX_STOP_CHARACTERS, MAX_STOP_TOKEN_IDS

MAX_CHOICES = 128  # of one prompt
MAX_SALT = 1024
MAX_BLENDED = 8  # adapters of one text
MAX_COMPLETION_LOGPROBS = 5  # as in OpenAI's API; chat has more

Count = Annotated[int, Meta(ge=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
TokenId = Annotated[int, Meta(ge=0)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Prompt = Annotated[
    str | list[str | int | list[int]],
    Meta(description="A text, a list of texts, a list of token ids, or a list of such lists."),
]

Conditioning = Annotated[
    list[list[float]], Meta(description="Mode request of a bundle that takes the caller's vectors: one for each text.")
]
AdapterChoice = Annotated[
    str | Annotated[dict[str, float], Meta(max_length=MAX_BLENDED)] | None,
    Meta(description="The name of an adapter, weights by name, or null for the base model; one for each text or all."),
]


class StreamOptions(Struct, kw_only=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchema(Struct, kw_only=True):
    """The text follows the schema, whatever `strict` says."""

    name: str
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct, kw_only=True):
    """json_schema: needed where it is the type"""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class OutputConstraint(Struct, kw_only=True):
    """What the text must be, by exactly one field: a JSON schema, a regular expression, one of some texts, or a grammar
    in Lark or GBNF.
    """

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class AdaptedRequest(Struct, kw_only=True):
    """What names the model that reads texts. Unknown fields are ignored, and null means that a field is left out."""

    model: str | None = None
    mode: Mode | None = None
    adapt_tokens: Annotated[int, Meta(ge=1, description="Embed only the first so many tokens.")] | None = None
    conditioning: Conditioning | None = None
    adapt_text: (
        Annotated[
            str | list[str],
            Meta(description="What the texts are for, for a bundle with an encoder: for all texts or one for each."),
        ]
        | None
    ) = None
    adapters: list[AdapterChoice] | None = None


class GenerationRequest(AdaptedRequest, kw_only=True):
    """What completions and conversations have in common."""

    temperature: Annotated[float, Meta(ge=0)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=4)] | None = None
    seed: int | None = None
    logit_bias: Annotated[dict[int, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_BIASES)] | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    response_format: ResponseFormat | None = None
    structured_outputs: OutputConstraint | None = None
    user: str | None = None
    top_k: Annotated[int, Meta(ge=-1, description="0 and -1 keep all.")] = 0
    repetition_penalty: Annotated[float, Meta(gt=0)] = 1.0
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool = False
    return_token_ids: bool = False
    deadline: (
        Annotated[float, Meta(gt=0, description="Seconds after which rows that have not ended finish with it.")] | None
    ) = None
    prompt_lookup_num_tokens: Annotated[
        int, Meta(ge=0, le=MAX_DRAFT_TOKENS, description="Tokens that are drafted for a call while a row is alone.")
    ] = 0
    cache_salt: Annotated[
        str, Meta(max_length=MAX_SALT, description="The prefix cache shares only among requests of equal salts.")
    ] = ""
    cache_generated: Annotated[
        bool,
        Meta(description="Whether the prefix cache may give and keep what steps wrote, which is not bitwise equal."),
    ] = True


class CompletionRequest(GenerationRequest, kw_only=True):
    prompt: Prompt
    max_tokens: Annotated[int, Meta(ge=0, description="0 only with echo.")] = 16
    best_of: Annotated[int, Meta(ge=1, description="1, or the value of n.")] = 1
    logprobs: Annotated[int, Meta(ge=0, le=MAX_COMPLETION_LOGPROBS)] | None = None
    echo: bool = False
    suffix: str | None = None
    return_tokens_as_token_ids: bool = False


class CohortInfo(Struct):
    """The prompts whose embeddings were averaged: which cohort of this server, and how many prompts."""

    id: int
    size: int


class ChoiceAdaptation(Struct):
    mode: Mode
    cluster_id: int
    cohort: CohortInfo | None


class Logprobs(Struct):
    """One entry per token. A log-probability of minus infinity is -9999.0."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Struct, kw_only=True):
    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length", "deadline"] | None
    chameleon: ChoiceAdaptation
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class PromptDetails(Struct):
    """cached_tokens were found in the prefix cache."""

    cached_tokens: int


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Completion(Struct, kw_only=True):
    """A whole response, or one chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class ErrorDetail(Struct):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(Struct):
    error: ErrorDetail


class AdapterInfo(Struct):
    """An adapter's rank, its bytes in memory, the layers that it updates, the SHA-256 of its file, which the bundle's
    own have not, and how many texts have chosen it.
    """

    rank: int
    size: int
    targets: list[str]
    digest: str | None
    uses: int


class Model(Struct, kw_only=True):
    """A mode of the bundle is a model of its own, and an adapter too."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "chameleon-deploy"
    root: str
    mode: Mode
    max_model_len: int
    adapter: AdapterInfo | UnsetType = UNSET


class ModelList(Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Model]


class LoadAdapterRequest(Struct, kw_only=True):
    """lora_path is the name of a file or of a PEFT directory in one of the server's directories of adapters."""

    lora_name: str
    lora_path: str
    load_inplace: Annotated[bool, Meta(description="Replace the adapter of this name; rows that use it keep it.")] = (
        False
    )


class UnloadAdapterRequest(Struct, kw_only=True):
    lora_name: str


class AdapterUnloaded(Struct):
    lora_name: str


class TokenizeRequest(Struct, kw_only=True):
    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeResponse(Struct, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | UnsetType = UNSET


class DetokenizeRequest(Struct, kw_only=True):
    tokens: list[TokenId]
    model: str | None = None


class DetokenizeResponse(Struct):
    prompt: str


class TokenizerInfo(Struct, kw_only=True):
    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    eos_token: str
    eos_token_id: int
    bos_token: str | None = None
    pad_token: str | None = None


class TextsRequest(AdaptedRequest, kw_only=True):
    """Texts to score or to adapt to; one cohort in the modes cohort and tenant."""

    input: Prompt


class ScoreRequest(TextsRequest, kw_only=True):
    """Texts to score; with continuations, what is scored of each text is what follows it."""

    continuations: Annotated[
        Prompt | None, Meta(description="Score only these, each after its text, or all after the one text.")
    ] = None
    cache_salt: Annotated[str, Meta(description="Of the prefix cache, which continuations use.")] = ""
    cache_generated: bool = True


class ScoreItem(Struct, kw_only=True, omit_defaults=True):
    """token_logprobs[i] is the log-probability of token_ids[i + 1], or of token_ids[i] in a continuation. perplexity is
    null for a single token that nothing comes before. cached_tokens: of the text before a continuation
    """

    index: int
    cluster_id: int
    logprob: float
    perplexity: float | None
    token_ids: list[int]
    token_logprobs: list[float]
    cached_tokens: int | None = None


class ScoreResponse(Struct, kw_only=True):
    object: Literal["list"] = "list"
    model: str
    mode: Mode
    system_fingerprint: str
    data: list[ScoreItem]


class AdaptItem(Struct, kw_only=True):
    """distances are Euclidean, one per centroid; embeddings have length one."""

    index: int
    cluster_id: int
    embedding: list[float]
    distances: list[float]
    num_tokens: int


class AdaptResponse(Struct, kw_only=True):
    object: Literal["list"] = "list"
    model: str
    data: list[AdaptItem]


class EmbeddingsRequest(Struct, kw_only=True):
    """As in OpenAI's API; token ids are of the encoder's tokenizer, without special tokens."""

    input: Prompt
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Meta(ge=1, description="The encoder's own, no other.")] | None = None
    user: str | None = None


class EmbeddingItem(Struct, kw_only=True):
    """embedding is a list of numbers, or with base64 their bytes as little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(Struct):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingsUsage


class Cluster(Struct, kw_only=True):
    """size counts the prompts that were accepted since the server started."""

    id: int
    size: int
    centroid: list[float]


class ClusterList(Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Cluster]


class PrefixCache(Struct, kw_only=True):
    """The prefix cache: tokens and bytes of this key's tenant, and the most bytes of all tenants together."""

    tokens: int
    bytes: int
    max_bytes: int


class Health(Struct):
    status: Literal["ok"]


class Version(Struct):
    version: str
    bundle_digest: str | None
    provider: str | None
    precision: str | None
