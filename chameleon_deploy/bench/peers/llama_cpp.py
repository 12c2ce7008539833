"""llama.cpp with the frozen base model or LoRAs of it, through the C interface of llama-cpp-python.

All rows of a batch are decoded in one call. llama.cpp applies a LoRA to all rows of a call, so that rows with different
LoRAs take a call each. It has no log-softmax of logits, so scoring ends in PyTorch's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from chameleon_deploy.bench.peers import DECODE, PREFILL, Rows
from chameleon_deploy.bench.peers.gguf_writer import write_gguf
from chameleon_deploy.bench.timing import Lap
from chameleon_deploy.reference.model import Trunk

F32 = gguf.GGMLQuantizationType.F32
TYPES = {"fp32": F32, "int8": gguf.GGMLQuantizationType.Q8_0, "int4": F32}  # of files that we write
MIXES = {"int4": "Q4_K_M"}  # to which `LlamaCpp` then quantises them


class LlamaCpp:
    """llama.cpp. See `Peer`.

    In float32 the cache is float32 and attention is plain, since the fused one computes in 16 bits. Other settings are
    llama.cpp's defaults, with a cache in float16.

    It runs in an `OwnProcess`. Other engines' kernels undo the AMX tiles that it configures once for each thread, and
    beside OpenVINO and CTranslate2 it ended the process with a segmentation fault. The process's end frees its memory.
    """

    scores, generates, is_ablation = True, True, False

    def __init__(
        self, file: Path, precision: str, threads: int, loras: Sequence[Path] = (), mix: str | None = None
    ) -> None:
        """Load GGUF files.

        precision  the bundle's: every quantised type is compared with int8 or int4, since its activations are 8-bit
        loras      an update of each row that is generated
        mix        of llama.cpp's types, such as "Q4_K_M", to which the file is quantised first, beside it

        Raises ValueError for a file that llama.cpp does not read.
        """
        import llama_cpp

        self._api: Any = llama_cpp
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept: llama.cpp calls it later
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        if mix:
            file = _quantised(llama_cpp, file, mix)
        self.name, self.precision, self.size = f"llama.cpp {mix or _type_of(file)}", precision, file.stat().st_size
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise ValueError(f"llama.cpp cannot read {file.name}")
        self.adapts = bool(loras)
        self._loras = [(self._opened(lora), [row for row, own in enumerate(loras) if own == lora])
                       for lora in dict.fromkeys(loras)]  # fmt: skip
        self._vocab_size: int = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._threads = threads
        torch.set_num_threads(threads)
        self._context: Any = None
        self._shape = (0, 0)

    def _opened(self, lora: Path) -> Any:
        opened = self._api.llama_adapter_lora_init(self._model, str(lora).encode())
        if not opened:
            raise ValueError(f"llama.cpp cannot read {lora.name}")
        return opened

    def logits(self, ids: Sequence[int]) -> Any:
        return self._all_logits([ids])[0].copy()

    def score(self, rows: Rows) -> Any:
        logits = torch.from_numpy(self._all_logits(rows))[:, :-1]
        chosen = logits.gather(2, torch.tensor(rows)[:, 1:, None])[..., 0]
        return (chosen - logits.logsumexp(-1)).numpy()

    def generate(self, rows: Rows, num_tokens: int, lap: Lap) -> Any:
        batch, width = len(rows), len(rows[0])
        self._begin(batch, width + num_tokens)
        chosen = np.empty((batch, num_tokens), np.int64)
        chosen[:, 0] = self._best(np.array(rows), 0)
        lap(PREFILL)
        for step in range(1, num_tokens):
            chosen[:, step] = self._best(chosen[:, step - 1 : step], width + step - 1)
        lap(DECODE)
        return chosen

    def _best(self, rows: Any, past: int) -> Any:
        """Return the token of the largest logit after each row."""
        best = np.empty(len(rows), np.int64)
        for lora, own in self._loras or [(None, list(range(len(rows))))]:
            if lora:
                loras = (self._api.llama_adapter_lora_p_ctypes * 1)(lora)
                self._api.llama_set_adapters_lora(self._context, loras, 1, (ctypes.c_float * 1)(1.0))
            best[own] = self._decode(rows[own], past, last_only=True, seq_ids=own).argmax(-1)
        return best

    def _all_logits(self, rows: Rows) -> Any:
        """Return [batch, length, vocab], valid until the next call."""
        batch, width = len(rows), len(rows[0])
        self._begin(batch, width)
        return self._decode(rows, 0, last_only=False).reshape(batch, width, -1)

    def _begin(self, batch: int, length: int) -> None:
        """Empty the cache; make a new one if the number of rows or their length is new."""
        api = self._api
        if self._shape != (batch, length):
            if self._context:
                api.llama_free(self._context)
            params = api.llama_context_default_params()
            params.n_ctx = batch * ((length + 255) // 256 * 256)  # of all rows, each of which gets an equal part
            params.n_seq_max = batch
            params.n_batch = batch * length
            params.n_threads = params.n_threads_batch = self._threads
            if self.precision == "fp32":
                params.type_k = params.type_v = api.GGML_TYPE_F32
                params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
            self._context = api.llama_init_from_model(self._model, params)
            if not self._context:
                raise ValueError(f"llama.cpp has no context for {batch} rows of {length} tokens")
            self._shape = batch, length
        api.llama_memory_clear(api.llama_get_memory(self._context), False)

    def _decode(self, rows: Any, past: int, last_only: bool, seq_ids: Sequence[int] | None = None) -> Any:
        """Decode rows in one call and return logits [rows, vocab] of each last token, or of every token, valid until
        the next call.

        seq_ids  of the rows in the cache; in order if not given
        """
        ids = np.asarray(rows, np.int32)
        count, width = ids.size, ids.shape[1]
        batch = self._api.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            _array(batch.token, ids)
            _array(batch.pos, np.tile(np.arange(past, past + width, dtype=np.int32), len(ids)))
            _array(batch.n_seq_id, np.ones(count, np.int32))
            for i in range(count):
                batch.seq_id[i][0] = seq_ids[i // width] if seq_ids else i // width
            asked = np.ones(ids.shape, np.int8)
            if last_only:
                asked[:, :-1] = 0
            _array(batch.logits, asked)
            status = self._api.llama_decode(self._context, batch)
        finally:
            self._api.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        logits = self._api.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (int(asked.sum()), self._vocab_size))


def converted_file(trunk: Trunk, precision: str, directory: Path) -> Path:
    """Write the base model in the type nearest to a precision, float32 where it has a mix. Raises ValueError if there
    is none.
    """
    if precision not in TYPES:
        raise ValueError(f"no comparison in {precision}")
    file = directory / f"{precision}.gguf"
    write_gguf(trunk, file, TYPES[precision])
    return file


def _quantised(api: Any, file: Path, mix: str) -> Path:
    """Write a file as one of llama.cpp's mixes of types, beside it. Raises ValueError where it cannot."""
    mixed, params = file.with_suffix(f".{mix}.gguf"), api.llama_model_quantize_default_params()
    params.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{mix}")
    if api.llama_model_quantize(str(file).encode(), str(mixed).encode(), ctypes.byref(params)):
        raise ValueError(f"llama.cpp cannot quantise {file.name}")
    return mixed


def _array(pointer: Any, values: Any) -> None:
    """Copy values into an array of C."""
    np.ctypeslib.as_array(pointer, (values.size,))[:] = values.reshape(-1)


def _type_of(file: Path) -> str:
    """Return the name of the type that most bytes of a file's tensors have."""
    sizes: dict[str, int] = {}
    for tensor in gguf.GGUFReader(file).tensors:
        sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + tensor.n_bytes
    return max(sizes, key=lambda name: sizes[name])
