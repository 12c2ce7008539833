"""/v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them: adapters that come and go while others run."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from chameleon_deploy.serve.call import Call
from chameleon_deploy.serve.errors import ApiError
from chameleon_deploy.serve.schemas import AdapterUnloaded, LoadAdapterRequest, Model, UnloadAdapterRequest
from chameleon_deploy.serve.service import Served


async def load(call: Call[LoadAdapterRequest]) -> Model:
    """Load a file of the server's directory. Raises ApiError, AdapterError, InputError or TensorError."""
    body, served = call.body, call.served
    directory = _directory(served)
    # A plain name, so that a request reads no other file of this machine.
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", body.lora_path):
        raise ApiError(400, "path_unsafe", "lora_path must be the plain name of a file in --adapters", "lora_path")
    await asyncio.to_thread(served.runtime.load_adapter, body.lora_name, directory / body.lora_path)
    return served.models.get(f"{served.models.name}:{body.lora_name}")


async def unload(call: Call[UnloadAdapterRequest]) -> AdapterUnloaded:
    """Forget an adapter; its running rows go on. Raises ApiError or AdapterError."""
    _directory(call.served)
    call.served.runtime.unload_adapter(call.body.lora_name)
    return AdapterUnloaded(call.body.lora_name)


def _directory(served: Served) -> Path:
    if served.adapter_files is None:
        raise ApiError(403, "adapters_fixed", "this server loads no adapters: start it with --adapters DIR")
    return served.adapter_files
