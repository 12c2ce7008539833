"""The forms of a prompt: a text, texts, token ids, or lists of them."""

from __future__ import annotations

from typing import Any, cast

from chameleon_deploy.errors import ChameleonError
from chameleon_deploy.runtime.inputs import Texts
from chameleon_deploy.serve.errors import ApiError, api_error
from chameleon_deploy.serve.service import ServedModel


def encode(prompt: Any, param: str, served: ServedModel) -> list[list[int]]:
    """The token ids of every prompt. Raises ApiError."""
    texts = as_texts(prompt)
    if len(texts) > served.max_prompts:
        raise ApiError(400, "input_invalid", f"{len(texts)} prompts, at most {served.max_prompts} are taken", param)
    try:
        return served.runtime.encode(texts)
    except ChameleonError as error:
        raise api_error(error, param) from error


def as_texts(prompt: Any) -> Texts:
    """Return the prompts of a body in the types that the runtime takes; the runtime checks them."""
    is_single = isinstance(prompt, str) or (bool(prompt) and all(isinstance(item, int) for item in prompt))
    return cast(Texts, [prompt] if is_single else prompt)
