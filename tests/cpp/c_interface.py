"""runtime/include/chameleon.h through ctypes, with the results in the Python runtime's own classes."""

from __future__ import annotations

import ctypes as c
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chameleon_deploy.runtime import Adaptation, Generation, Sampling, Score
from chameleon_deploy.runtime.factors import FactorSets, RowFactors

ROOT = Path(__file__).parents[2]
BUILD = Path(os.environ.get("CHAMELEON_BUILD", ROOT / "runtime" / "build" / "release"))
LIBRARY = BUILD / "libchameleon.so"

P, Z, I64 = c.c_void_p, c.c_size_t, c.c_int64


class LoadOptions(c.Structure):
    _fields_ = (("provider", c.c_char_p), ("mode", c.c_char_p), ("threads", c.c_int), ("map_weights", c.c_int),
                ("trusted_keys", c.POINTER(c.c_char_p)), ("num_trusted_keys", Z), ("max_adapter_bytes", Z))  # fmt: skip


class CText(c.Structure):
    _fields_ = (("text", c.c_char_p), ("text_size", Z), ("token_ids", c.POINTER(I64)), ("num_token_ids", Z))


class CFactor(c.Structure):
    _fields_ = (("name", c.c_char_p), ("data", P), ("rows", Z), ("columns", Z))


class CBatch(c.Structure):
    _fields_ = (("texts", c.POINTER(CText)), ("num_texts", Z), ("mode", c.c_char_p), ("tenants", c.POINTER(c.c_char_p)),
                ("factors", c.POINTER(CFactor)), ("num_factors", Z),
                ("adapters", c.POINTER(c.c_char_p)), ("conditioning", P), ("conditioning_size", Z),
                ("adapt_tokens", Z), ("adapt_text", c.POINTER(c.c_char_p)), ("num_adapt_text", Z))  # fmt: skip


class CSampling(c.Structure):
    _fields_ = (("temperature", c.c_double), ("top_k", I64), ("top_p", c.c_double), ("repetition_penalty", c.c_double),
                ("seed", c.c_uint64), ("stop_token_ids", c.POINTER(I64)), ("num_stop_token_ids", Z),
                ("stop", c.POINTER(c.c_char_p)), ("num_stop", Z), ("presence_penalty", c.c_double),
                ("frequency_penalty", c.c_double), ("logit_bias_token_ids", c.POINTER(I64)),
                ("logit_bias_values", c.POINTER(c.c_double)), ("num_logit_bias", Z), ("ignore_eos", c.c_int),
                ("logprobs", c.c_int), ("num_top_logprobs", c.c_int))  # fmt: skip


class CTokenLogprob(c.Structure):
    _fields_ = (("token_id", I64), ("logprob", c.c_float))


class CToken(c.Structure):
    _fields_ = (("row", Z), ("token_id", I64), ("text", P), ("text_size", Z), ("finished", c.c_int),
                ("logprob", c.c_float), ("top_logprobs", c.POINTER(CTokenLogprob)),
                ("num_top_logprobs", Z))  # fmt: skip


OnToken = c.CFUNCTYPE(c.c_int, c.POINTER(CToken), P)


class GenerateOptions(c.Structure):
    _fields_ = (("max_new_tokens", I64), ("sampling", c.POINTER(CSampling)), ("num_samplings", Z),
                ("n", Z), ("deadline_seconds", c.c_double), ("prompt_lookup_num_tokens", I64),
                ("cache_salt", c.c_char_p), ("exact_cache", c.c_int), ("errors", c.c_char_p),
                ("on_token", OnToken), ("user", P), ("tenant", P))  # fmt: skip


class CAdapterInfo(c.Structure):
    _fields_ = (("name", c.c_char_p), ("rank", I64), ("targets", c.POINTER(c.c_char_p)), ("num_targets", Z),
                ("size", Z), ("digest", c.c_char_p), ("uses", Z))  # fmt: skip


class NativeError(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{message} [{code}]")
        self.code = code


def _load_library() -> Any:
    library = c.CDLL(str(LIBRARY))
    for name, result, *arguments in (
        ("error_code", c.c_char_p, P), ("error_message", c.c_char_p, P), ("error_free", None, P),
        ("load", P, c.c_char_p, P, P), ("runtime_free", None, P), ("vocab_size", I64, P), ("hidden_size", I64, P),
        ("load_adapter", P, P, c.c_char_p, c.c_char_p), ("unload_adapter", P, P, c.c_char_p),
        ("replace_adapter", P, P, c.c_char_p, c.c_char_p), ("list_adapters", P, P, P), ("adapters_count", Z, P),
        ("adapters_at", CAdapterInfo, P, Z), ("adapters_free", None, P),
        ("adapt", P, P, P, P), ("adaptation_num_factor_sets", Z, P), ("adaptation_num_factors", Z, P),
        ("adaptation_embeddings", P, P), ("adaptation_cluster_ids", P, P), ("adaptation_factor_ids", P, P),
        ("adaptation_factor", CFactor, P, Z), ("adaptation_free", None, P),
        ("score", P, P, P, P), ("score_token_ids", P, P, Z, P), ("score_token_logprobs", P, P, Z, P),
        ("score_cluster_id", I64, P, Z), ("scores_free", None, P),
        ("generate", P, P, P, P, P), ("generation_token_ids", P, P, Z, P),
        ("generation_text", P, P, Z, P), ("generation_cluster_id", I64, P, Z),
        ("generation_finish_reason", c.c_char_p, P, Z), ("generation_token_logprobs", P, P, Z, P),
        ("generation_top_logprobs", c.POINTER(CTokenLogprob), P, Z, Z, P), ("generations_free", None, P),
        ("generation_error_code", c.c_char_p, P, Z),
        ("encode", P, P, c.c_char_p, Z, P, P), ("decode", P, P, P, Z, P, P), ("free", None, P),
    ):  # fmt: skip
        function = getattr(library, f"chameleon_{name}")
        function.restype, function.argtypes = result, arguments
    return library


def _adapter(choice: str | dict[str, float] | None) -> bytes | None:
    """Return an adapter as chameleon_batch takes it."""
    if isinstance(choice, dict):
        choice = ",".join(f"{name}={weight!r}" for name, weight in choice.items())
    return choice.encode() if choice else None


class NativeRuntime:
    """The same calls as chameleon_deploy.Runtime. Errors are NativeError with the code."""

    def __init__(self, path: Path, mode: str | None = None, threads: int = 0, max_adapter_bytes: int = 0) -> None:
        self._c = _load_library()
        self._handle = P()
        options = LoadOptions(None, mode.encode() if mode else None, threads, 0, None, 0, max_adapter_bytes)
        self._check(self._c.chameleon_load(os.fsencode(path), c.byref(options), c.byref(self._handle)))
        self._hidden_size = self._c.chameleon_hidden_size(self._handle)

    def close(self) -> None:
        self._c.chameleon_runtime_free(self._handle)
        self._handle = P()

    def load_adapter(self, name: str, path: Path, replace: bool = False) -> None:
        load = self._c.chameleon_replace_adapter if replace else self._c.chameleon_load_adapter
        self._check(load(self._handle, name.encode(), os.fsencode(path)))

    def unload_adapter(self, name: str) -> None:
        self._check(self._c.chameleon_unload_adapter(self._handle, name.encode()))

    def list_adapters(self) -> dict[str, tuple[int, tuple[str, ...], int, str | None, int]]:
        """Return rank, targets, size, digest and uses of each adapter."""
        handle, found = P(), {}
        self._check(self._c.chameleon_list_adapters(self._handle, c.byref(handle)))
        for index in range(self._c.chameleon_adapters_count(handle)):
            info = self._c.chameleon_adapters_at(handle, index)
            targets = tuple(info.targets[i].decode() for i in range(info.num_targets))
            found[info.name.decode()] = (info.rank, targets, info.size, info.digest and info.digest.decode(), info.uses)
        self._c.chameleon_adapters_free(handle)
        return found

    def adapt(self, texts: Any, **how: Any) -> Adaptation:
        batch, _keep = self._batch(texts, **how)
        handle = P()
        self._check(self._c.chameleon_adapt(self._handle, c.byref(batch), c.byref(handle)))
        sets = self._c.chameleon_adaptation_num_factor_sets(handle)

        def array(name: str, dtype: Any, *shape: int) -> Any:
            return _copy(getattr(self._c, f"chameleon_adaptation_{name}")(handle), int(np.prod(shape)), dtype).reshape(
                shape
            )

        tensors = {}
        for index in range(self._c.chameleon_adaptation_num_factors(handle)):
            factor = self._c.chameleon_adaptation_factor(handle, index)
            shape = (sets, factor.rows, factor.columns)
            tensors[factor.name.decode()] = _copy(factor.data, int(np.prod(shape)), np.float32).reshape(shape)
        adaptation = Adaptation(
            array("embeddings", np.float32, len(texts), self._hidden_size),
            array("cluster_ids", np.int64, len(texts)),
            RowFactors(FactorSets(tensors), array("factor_ids", np.int64, len(texts))),
        )
        self._c.chameleon_adaptation_free(handle)
        return adaptation

    def score(self, texts: Any, **how: Any) -> list[Score]:
        batch, _keep = self._batch(texts, **how)
        handle = P()
        self._check(self._c.chameleon_score(self._handle, c.byref(batch), c.byref(handle)))
        scores = [
            Score(
                self._row("score_token_ids", handle, row, np.int64).tolist(),
                self._row("score_token_logprobs", handle, row, np.float32).tolist(),
                self._c.chameleon_score_cluster_id(handle, row),
            )
            for row in range(len(texts))
        ]
        self._c.chameleon_scores_free(handle)
        return scores

    def generate(
        self,
        texts: Any,
        max_new_tokens: int = 20,
        sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008  (immutable)
        on_token: Callable[[int, int, str, bool], bool] | None = None,
        prompt_lookup_num_tokens: int = 0,
        errors: str | None = None,
        **how: Any,
    ) -> list[Generation]:
        batch, _keep = self._batch(texts, **how)
        samplings = [sampling] if isinstance(sampling, Sampling) else list(sampling)
        native, _kept = _samplings(samplings)

        def forward(token: Any, _user: Any) -> int:
            assert on_token is not None
            t = token.contents
            return on_token(t.row, t.token_id, c.string_at(t.text, t.text_size).decode(), bool(t.finished))

        options = GenerateOptions(
            max_new_tokens, native, len(samplings), 0, 0.0, prompt_lookup_num_tokens, None, 0,
            errors.encode() if errors else None, OnToken(forward) if on_token else OnToken(), None, None,
        )  # fmt: skip
        handle = P()
        self._check(self._c.chameleon_generate(self._handle, c.byref(batch), c.byref(options), c.byref(handle)))
        generations = [
            Generation(
                self._row("generation_token_ids", handle, row, np.int64).tolist(),
                self._row("generation_text", handle, row, np.uint8).tobytes().decode(),
                self._c.chameleon_generation_cluster_id(handle, row),
                self._c.chameleon_generation_finish_reason(handle, row).decode(),
                *self._logprobs(handle, row),
                self._error(handle, row),
            )
            for row in range(len(texts))
        ]
        self._c.chameleon_generations_free(handle)
        return generations

    def _error(self, handle: Any, row: int) -> Any:
        """Generation.error, which is a NativeError here."""
        code = self._c.chameleon_generation_error_code(handle, row)
        return None if code is None else NativeError(code.decode(), "")

    def _logprobs(self, handle: Any, row: int) -> tuple[Any, Any]:
        """Generation.token_logprobs and top_logprobs."""
        logprobs = self._row("generation_token_logprobs", handle, row, np.float32).tolist()
        places, count = [], Z()
        for token in range(len(logprobs)):
            found = self._c.chameleon_generation_top_logprobs(handle, row, token, c.byref(count))
            places.append(tuple((found[i].token_id, found[i].logprob) for i in range(count.value)))
        return logprobs or None, places or None

    def encode(self, text: bytes) -> list[int]:
        ids, count = P(), Z()
        self._check(self._c.chameleon_encode(self._handle, text, len(text), c.byref(ids), c.byref(count)))
        result: list[int] = _copy(ids.value, count.value, np.int64).tolist()
        self._c.chameleon_free(ids)
        return result

    def decode(self, ids: list[int]) -> str:
        text, size = P(), Z()
        array = np.asarray(ids, np.int64)
        self._check(self._c.chameleon_decode(self._handle, array.ctypes.data, len(array), c.byref(text), c.byref(size)))
        result = c.string_at(text, size.value).decode()
        self._c.chameleon_free(text)
        return result

    def _row(self, name: str, handle: Any, row: int, dtype: Any) -> Any:
        count = Z()
        return _copy(getattr(self._c, f"chameleon_{name}")(handle, row, c.byref(count)), count.value, dtype)

    def _batch(
        self, texts: Any, mode: str | None = None, tenants: Sequence[Any] | None = None, factors: Any = None,
        adapters: Sequence[str | dict[str, float] | None] | None = None, conditioning: Any = None,
        adapt_text: str | Sequence[str] | None = None,
    ) -> tuple[CBatch, Any]:  # fmt: skip
        """The batch, and what must live as long as it."""
        items = (CText * max(len(texts), 1))()
        keep: list[Any] = []
        for item, text in zip(items, texts, strict=False):
            if isinstance(text, str | bytes):
                raw = text if isinstance(text, bytes) else text.encode()
                item.text, item.text_size = raw, len(raw)
            else:
                ids = (I64 * max(len(text), 1))(*text)
                keep.append(ids)
                item.token_ids, item.num_token_ids = ids, len(text)
        batch = CBatch(items, len(texts), mode.encode() if mode else None, None, None, 0, None, None, 0, 0, None, 0)
        if tenants is not None:
            batch.tenants = (c.c_char_p * len(tenants))(*(str(tenant).encode() for tenant in tenants))
        if adapters is not None:
            batch.adapters = (c.c_char_p * len(adapters))(*map(_adapter, adapters))
        if conditioning is not None:
            vectors = np.ascontiguousarray(conditioning, np.float32)
            keep.append(vectors)
            batch.conditioning, batch.conditioning_size = vectors.ctypes.data, vectors.shape[1]
        if adapt_text is not None:
            descriptions = [adapt_text] if isinstance(adapt_text, str) else list(adapt_text)
            batch.adapt_text = (c.c_char_p * len(descriptions))(
                *(text.encode(errors="surrogatepass") for text in descriptions)
            )
            batch.num_adapt_text = len(descriptions)
        if factors is not None:
            matrices = {name: np.ascontiguousarray(matrix) for name, matrix in factors.items()}
            keep.append(matrices)
            batch.factors = (CFactor * len(matrices))(
                *(CFactor(name.encode(), matrix.ctypes.data, *matrix.shape) for name, matrix in matrices.items())
            )
            batch.num_factors = len(matrices)
        return batch, keep

    def _check(self, error: int | None) -> None:
        if error:
            found = NativeError(
                self._c.chameleon_error_code(error).decode(), self._c.chameleon_error_message(error).decode()
            )
            self._c.chameleon_error_free(error)
            raise found


def _samplings(samplings: list[Sampling]) -> tuple[Any, Any]:
    native, keep = (CSampling * len(samplings))(), []
    for item, s in zip(native, samplings, strict=True):
        ids = (I64 * max(len(s.stop_token_ids), 1))(*s.stop_token_ids)
        stop = (c.c_char_p * max(len(s.stop), 1))(*(text.encode() for text in s.stop))
        bias = dict(s.logit_bias)
        bias_ids, bias_values = (I64 * len(bias))(*bias), (c.c_double * len(bias))(*bias.values())
        keep += [ids, stop, bias_ids, bias_values]
        item.temperature, item.top_k, item.top_p, item.repetition_penalty = (
            s.temperature, s.top_k, s.top_p, s.repetition_penalty,
        )  # fmt: skip
        item.seed, item.stop_token_ids, item.num_stop_token_ids = s.seed, ids, len(s.stop_token_ids)
        item.stop, item.num_stop = stop, len(s.stop)
        item.presence_penalty, item.frequency_penalty = s.presence_penalty, s.frequency_penalty
        item.logit_bias_token_ids, item.logit_bias_values, item.num_logit_bias = bias_ids, bias_values, len(bias)
        item.ignore_eos, item.logprobs, item.num_top_logprobs = s.ignore_eos, s.logprobs is not None, s.logprobs or 0
    return native, keep


def _copy(address: int | None, count: int, dtype: Any) -> Any:
    size = count * np.dtype(dtype).itemsize
    return np.frombuffer(c.string_at(address, size), dtype) if address and count else np.empty(0, dtype)
