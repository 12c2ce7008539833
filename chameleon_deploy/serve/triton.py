"""The engine as a model of Triton's Python backend: one process per instance, one response per token.

`triton BUNDLE` writes the model repository whose model.py imports this. A request holds one prompt; the
engine batches the requests of an instance.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton  # part of tritonserver

import chameleon_deploy
from chameleon_deploy.contract.bundle import Mode, default_mode
from chameleon_deploy.errors import (
    AdapterError,
    ChameleonError,
    ClosedError,
    InputError,
    LengthError,
    ModeError,
    QueueFullError,
    TokenError,
)
from chameleon_deploy.runtime import Adapt, Engine, Generate, Sampling, Stream, StructuredOutputs, Token

BUNDLE = "bundle"  # directory of it beside model.py
CANCEL_SECONDS = 0.2  # between two looks for requests that their clients have cancelled
GENERATE_FIELDS = ("n", "deadline", "prompt_lookup_num_tokens", "cache_salt", "cache_generated")
# By name: Triton adds its error type to the module after this one is imported.
_CODES: dict[type[Exception], str] = {
    **dict.fromkeys((InputError, TokenError, LengthError, ModeError, AdapterError), "INVALID_ARG"),
    **dict.fromkeys((QueueFullError, ClosedError), "UNAVAILABLE"),
}


class Model:
    """A TritonPythonModel, whose methods Triton calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle and start the engine, with the parameters of config.pbtxt. Raises a ChameleonError."""
        config = json.loads(args["model_config"])
        given = {name: value["string_value"] for name, value in config["parameters"].items()}
        path = Path(args["model_repository"]) / args["model_version"] / BUNDLE
        runtime = chameleon_deploy.load(path, threads=int(given["threads"]), share_weights=True)
        modes = runtime.manifest.adaptation.modes
        self._mode: Mode = "centroid" if "centroid" in modes else default_mode(runtime.manifest.adaptation)
        self._engine = Engine(runtime, rows=int(given["rows"]), max_waiting=int(given["max_waiting"]))
        self._active: dict[Stream, Any] = {}  # the sender of each request's responses
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="chameleon-responses", daemon=True).start()
        self._watch = asyncio.run_coroutine_threadsafe(self._cancel(), self._loop)

    def execute(self, requests: list[Any]) -> None:
        """Submit requests and return; their responses follow from another thread."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                stream = self._submit(request)
            except Exception as error:
                _fail(sender, error)
                continue
            self._active[stream] = sender
            asyncio.run_coroutine_threadsafe(self._respond(stream, sender), self._loop)

    def finalize(self) -> None:
        """Finish what was accepted, and end the threads."""
        self._engine.close()
        self._watch.cancel()
        done: Future[None] = asyncio.run_coroutine_threadsafe(self._responded(), self._loop)
        done.result()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _submit(self, request: Any) -> Stream:
        values = {tensor.name(): tensor.as_numpy().ravel().tolist() for tensor in request.inputs()}
        fields = _parameters(values.pop("sampling_parameters", ()))
        for name, value in values.items():
            given = [_text(one) if isinstance(one, bytes) else one for one in value]
            if name == "stop":
                fields["stop"] = given
            elif len(given) != 1:
                raise InputError(f"{name} holds {len(given)} values: pass one per request", name)
            else:
                fields[name] = given[0]
        text, adapter = fields.pop("text_input"), fields.pop("lora_name", None)
        adapt = _take(fields, "mode", "adapt_tokens", "conditioning", "adapt_text")
        if adapter is not None or "adapters" in fields:
            adapt["adapters"] = [fields.pop("adapters", adapter)]
        else:
            adapt.setdefault("mode", self._mode)
        generate = _take(fields, *GENERATE_FIELDS)
        limit = fields.pop("max_tokens", 16)
        if unknown := fields.keys() - Sampling.__dataclass_fields__:
            raise InputError(f"sampling_parameters has the unknown field {min(unknown)!r:.60}", "sampling_parameters")
        if isinstance(outputs := fields.get("structured_outputs"), dict):
            if not outputs.keys() <= StructuredOutputs.__dataclass_fields__.keys():
                raise InputError(f"structured_outputs has unknown fields: {list(outputs)!r:.60}", "structured_outputs")
            fields["structured_outputs"] = StructuredOutputs(**outputs)
        sampling = Sampling(**{"seed": secrets.randbits(64), **fields})
        return self._engine.submit([text], Generate(limit, sampling, **generate), Adapt(**adapt))

    async def _respond(self, stream: Stream, sender: Any) -> None:
        try:
            async for token in stream:
                error = token.generation.error if token.generation else None
                if error is not None:
                    raise error
                sender.send(_response(token, stream.cluster_ids[0]))
            sender.send(flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception as error:
            stream.cancel()
            _fail(sender, error)
        finally:
            del self._active[stream]

    async def _cancel(self) -> None:
        while True:
            await asyncio.sleep(CANCEL_SECONDS)
            for stream, sender in list(self._active.items()):
                if sender.is_cancelled():
                    stream.cancel()

    async def _responded(self) -> None:
        while self._active:
            await asyncio.sleep(0.01)


def _parameters(values: Sequence[bytes]) -> dict[str, Any]:
    """Return the fields of sampling_parameters, a JSON object. Raises InputError."""
    if not values:
        return {}
    try:
        fields: dict[str, Any] = json.loads(values[0])
        # Keys of JSON are strings.
        return fields | {"logit_bias": {int(token_id): bias for token_id, bias in fields.get("logit_bias", {}).items()}}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise InputError(
            "sampling_parameters is not a JSON object, or its logit_bias no map of token ids", "sampling_parameters"
        ) from None


def _take(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    """Remove and return the fields of these names."""
    return {name: fields.pop(name) for name in names if name in fields}


def _response(token: Token, cluster_id: int) -> Any:
    reason = token.generation.finish_reason if token.generation else ""
    top = "" if token.top_logprobs is None else json.dumps(token.top_logprobs)
    return triton.InferenceResponse([
        triton.Tensor("index", np.array([token.row], np.int32)),
        triton.Tensor("text_output", np.array([token.text.encode()], np.object_)),
        triton.Tensor("token_id", np.array([token.token_id], np.int32)),
        triton.Tensor("logprob", np.array([math.nan if token.logprob is None else token.logprob], np.float32)),
        triton.Tensor("top_logprobs", np.array([top.encode()], np.object_)),
        triton.Tensor("finish_reason", np.array([reason.encode()], np.object_)),
        triton.Tensor("cluster_id", np.array([cluster_id], np.int32)),
    ])  # fmt: skip


def _fail(sender: Any, error: Exception) -> None:
    code = getattr(triton.TritonError, _CODES.get(type(error), "INTERNAL"))
    message = f"{error} [{error.code}]" if isinstance(error, ChameleonError) else f"{error!r}"
    response = triton.InferenceResponse(error=triton.TritonError(message, code))
    sender.send(response, flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"a text is not UTF-8: {error}") from error
