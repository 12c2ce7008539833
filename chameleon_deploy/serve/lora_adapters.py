"""/v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them: adapters that come and go while others run."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from chameleon_deploy.errors import ChameleonError
from chameleon_deploy.serve.call import Call
from chameleon_deploy.serve.errors import ApiError, api_error
from chameleon_deploy.serve.schemas import AdapterUnloaded, LoadAdapterRequest, Model, UnloadAdapterRequest


async def load(call: Call[LoadAdapterRequest]) -> Model:
    """Load a file of the server's directory. Raises ApiError, AdapterError, InputError or TensorError."""
    body, served = call.body, call.served
    directory = _directory(call)
    # A plain name, so that a request reads no other file of this machine.
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,254}", body.lora_path):
        raise ApiError(400, "path_unsafe", "lora_path must be the plain name of a file in --adapters", "lora_path")
    file = directory / body.lora_path
    try:
        await asyncio.to_thread(served.runtime.load_adapter, body.lora_name, file)
    except ChameleonError as error:  # without the path of the directory
        raise replace(api_error(error), message=str(error).replace(str(file), body.lora_path)) from error
    return served.models.get(f"{served.models.name}:{body.lora_name}")


async def unload(call: Call[UnloadAdapterRequest]) -> AdapterUnloaded:
    """Forget an adapter; its running rows go on. Raises ApiError or AdapterError."""
    _directory(call)
    call.served.runtime.unload_adapter(call.body.lora_name)
    return AdapterUnloaded(call.body.lora_name)


def _directory(call: Call[Any]) -> Path:
    if call.served.adapter_files is None:
        raise ApiError(403, "adapters_fixed", "this server loads no adapters: start it with --adapters DIR")
    if "load_adapters" not in call.rights:
        raise ApiError(403, "right_missing", "this API key may not load or unload adapters: it needs load_adapters")
    return call.served.adapter_files
