"""/tokenize, /detokenize and /tokenizer_info, as lm-evaluation-harness and vLLM have them."""

from __future__ import annotations

from chameleon_deploy.serve.call import Call
from chameleon_deploy.serve.errors import ApiError
from chameleon_deploy.serve.schemas import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
)


async def tokenize(call: Call[TokenizeRequest]) -> TokenizeResponse:
    return await call.off_loop_if_large(lambda: _tokenize(call))


def _tokenize(call: Call[TokenizeRequest]) -> TokenizeResponse:
    """An empty text has no tokens, which is no fault here."""
    body, served = call.body, call.served
    served.models.resolve(body.model, None)
    encoding = served.runtime.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)
    length = served.models.max_length
    response = TokenizeResponse(count=len(encoding.ids), max_model_len=length, tokens=encoding.ids)
    if body.return_token_strs:
        response.token_strs = encoding.tokens
    return response


async def detokenize(call: Call[DetokenizeRequest]) -> DetokenizeResponse:
    body, served = call.body, call.served
    served.models.resolve(body.model, None)
    vocab_size = served.runtime.manifest.model.vocab_size
    if (bad := next((i for i in body.tokens if i >= vocab_size), None)) is not None:
        message = f"token id {bad} is outside the vocabulary of {vocab_size}"
        raise ApiError(422, "token_invalid", message, "tokens")
    decode = served.runtime.tokenizer.decode
    return await call.off_loop_if_large(lambda: DetokenizeResponse(decode(body.tokens, skip_special_tokens=False)))


async def tokenizer_info(call: Call[None]) -> TokenizerInfo:
    tokenizer, model = call.served.runtime.tokenizer, call.served.runtime.manifest.model
    return TokenizerInfo(
        tokenizer_class=type(tokenizer.model).__name__,
        vocab_size=model.vocab_size,
        model_max_length=model.max_positions,
        eos_token=tokenizer.id_to_token(model.eos_token_id) or "",
        eos_token_id=model.eos_token_id,
    )
