"""Logits that stay on a device, where tokens and log-probabilities are computed. Only those are copied to the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from chameleon_deploy.contract.bundle import FloatArray, IntArray
from chameleon_deploy.errors import NumericError
from chameleon_deploy.runtime.device.cuda import DeviceArray
from chameleon_deploy.runtime.device.graph import Bound, DeviceGraph


class DeviceLogits:
    """Logits on a device. See `Logits`. numpy.asarray copies all of them to the host."""

    def __init__(self, values: DeviceArray, chooser: DeviceGraph, scorer: DeviceGraph) -> None:
        self._values, self._chooser, self._scorer = values, chooser, scorer
        batch, *positions, vocab = values.shape
        self._stacked = values.view((batch, *(positions or [1]), vocab))
        self._token_ids: DeviceArray | None = None
        self._choose: Bound | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self._values.shape

    def greedy(self) -> IntArray:
        device = self._values.device
        with device.lock:
            # bound once, since a step's logits always have one address
            if self._choose is None or self._token_ids is None:
                self._token_ids = device.empty(self._stacked.shape[:-1], "int64")
                self._choose = self._chooser.bind({"logits": self._stacked, "token_ids": self._token_ids})
            self._choose.run()
            token_ids: IntArray = device.read(self._token_ids)
        if token_ids.min() < 0:
            raise NumericError("the decoder produced logits that are not finite: check the factors")
        return token_ids.reshape(self._values.shape[:-1])

    def logprobs(self, targets: Sequence[IntArray]) -> Iterator[FloatArray]:
        padded = np.zeros(self._stacked.shape[:-1], np.int64)
        for i, ids in enumerate(targets):
            padded[i, : len(ids)] = ids
        device = self._values.device
        with device.lock:
            logprobs = device.empty(padded.shape, "float32")
            tensors = {"logits": self._stacked, "targets": device.upload(padded, "int64"), "logprobs": logprobs}
            self._scorer.bind(tensors).run()
            values = device.read(logprobs)
        yield from (row[: len(ids)] for row, ids in zip(values, targets, strict=True))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.asarray(self._values, dtype)
