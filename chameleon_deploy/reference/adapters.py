"""A base model with named adapters: low-rank updates of any of its linear layers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from chameleon_deploy.contract import peft_lora
from chameleon_deploy.contract.adapter_file import Factors
from chameleon_deploy.contract.bundle import FloatArray, TargetSpec, factor_names
from chameleon_deploy.contract.manifest import ADAPTER_NAME, is_adapter_name
from chameleon_deploy.errors import CheckpointError, InputError
from chameleon_deploy.reference.model import Trunk, load_trunk
from chameleon_deploy.reference.targets import choose_targets

DEFAULT_MAX_RANK = 64  # of an adapter that is loaded later


@dataclass
class AdaptedBase:
    """A loaded base model with its adapters.

    name       of the base model
    adapters   factors by name; an adapter has tensors for the layers that it adapts
    digest     of the base and the adapters
    adaptable  layers that adapters which are loaded later may update, besides those of the adapters
    max_rank   the largest rank of those adapters
    invocations  tokens that activate an adapter, by name; others update every token
    """

    name: str
    trunk: Trunk
    adapters: dict[str, Factors]
    base_digest: str
    digest: str
    adaptable: tuple[str, ...] = ()
    max_rank: int = 0
    invocations: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def targets(self) -> tuple[TargetSpec, ...]:
        """Return the layers that adapters of now or later adapt, in the model's order."""
        adapted = {name for factors in self.adapters.values() for name in factors}
        return tuple(
            TargetSpec(layer, *sizes)
            for layer, sizes in self.trunk.linear_layers().items()
            if layer in self.adaptable or not adapted.isdisjoint(factor_names(layer))
        )

    @property
    def rank(self) -> int:
        """Return the largest rank of an adapter, 0 if there are none and will be none."""
        ranks = [len(array) for factors in self.adapters.values() for array in factors.values()]
        return max([*ranks, self.max_rank if self.adaptable else 0])


def load_adapted(
    base: str,
    directories: Mapping[str, Path],
    trunk: Trunk | None = None,
    adaptable: Sequence[str] = (),
    max_rank: int = DEFAULT_MAX_RANK,
) -> AdaptedBase:
    """Load a base model and PEFT directories.

    base         see `load_trunk`
    directories  by the adapters' names; none is a plain base model
    trunk        the base model, if it is loaded already
    adaptable    layers that later adapters may update, as `choose_targets` takes them
    max_rank     the largest rank of those

    Raises InputError for a name that cannot be used, CheckpointError for invocation tokens that the base has not, and
    the errors of `load_trunk`, `choose_targets` and `read_peft`.
    """
    for name in directories:
        if not is_adapter_name(name):
            raise InputError(f"{name!r} cannot name an adapter: use {ADAPTER_NAME}")
    trunk = trunk or load_trunk(base)
    layers = trunk.linear_layers()
    adapters: dict[str, Factors] = {
        name: peft_lora.read_peft(path, layers, trunk.head_weight) for name, path in directories.items()
    }
    invocations = {name: tokens for name, path in directories.items() if (tokens := peft_lora.read_invocation(path))}
    for name, tokens in invocations.items():
        if max(tokens) >= trunk.spec.vocab_size:
            raise CheckpointError(
                f"{directories[name]}: alora_invocation_tokens are not all in the vocabulary of {base}"
            )
    base_digest = trunk.digest()
    digest = hashlib.sha256(base_digest.encode())
    for name, path in directories.items():
        digest.update(name.encode())
        for file in (peft_lora.CONFIG_FILE, peft_lora.TENSOR_FILE):
            digest.update((path / file).read_bytes())
    chosen = choose_targets(trunk, adaptable) if adaptable else ()
    return AdaptedBase(base, trunk, adapters, base_digest, digest.hexdigest(), chosen, max_rank, invocations)


@contextmanager
def adapted(
    trunk: Trunk,
    factors: Factors | Mapping[str, Tensor],
    shifts: Mapping[str, FloatArray] = MappingProxyType({}),
    active: Tensor | None = None,
) -> Iterator[None]:
    """Let the layers of a trunk add the update of one factor set to their outputs: y + (x A^T) B.

    shifts  [in], added to the x of a layer's update; by layer
    active  bool [tokens] of what is read, those that are updated; None updates all
    """

    def update(lora_A: Tensor, lora_B: Tensor, shift: Tensor | float) -> Any:
        def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
            added: Tensor = ((inputs[0] + shift) @ lora_A.T) @ lora_B
            return output + (added if active is None else added * active[:, None])

        return hook

    hooks = []
    for layer in {name.rpartition(".")[0] for name in factors}:
        lora_A, lora_B = (torch.as_tensor(factors[name]) for name in factor_names(layer))
        shift = torch.from_numpy(shifts[layer]) if layer in shifts else 0.0
        hook = update(lora_A, lora_B, shift)
        hooks.append(trunk.causal_lm.get_submodule(layer).register_forward_hook(hook))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# Where a text activates an adapter of such invocation tokens, or the text's length.
Place = Callable[[Sequence[int], Sequence[int]], int]


def last_place(ids: Sequence[int], tokens: Sequence[int]) -> int:
    """Return where the last invocation of a text begins, or the text's length if there is none."""
    return max(_places(ids, tokens), default=len(ids))


def first_place(ids: Sequence[int], tokens: Sequence[int]) -> int:
    """Return where the first invocation of a text begins, or the text's length if there is none."""
    return min(_places(ids, tokens), default=len(ids))


def _places(ids: Sequence[int], tokens: Sequence[int]) -> list[int]:
    return [at for at in range(len(ids)) if list(ids[at : at + len(tokens)]) == list(tokens)]


@dataclass
class AdapterLogits:
    """Logits [positions, vocab] of one row with one adapter, computed alone: no padding, no cache.

    place   where a text activates an adapter
    hidden  final hidden states by adapter and text, which are computed once
    """

    base: AdaptedBase
    place: Place = last_place
    hidden: dict[tuple[str | None, tuple[int, ...]], Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(
        self, ids: Sequence[int], adapters: Sequence[str | None], row: int, positions: slice = slice(None)
    ) -> Tensor:
        """Return the logits of a row whose adapter is adapters[row]."""
        name = adapters[row]
        hidden, active = self.read(ids, name), self._active(ids, name)
        with adapted(self.base.trunk, self._factors(name), active=None if active is None else active[positions]):
            return self.base.trunk.logits(hidden[0, positions])

    @torch.no_grad()
    def read(self, ids: Sequence[int], adapter: str | None = None) -> Tensor:
        """Return hidden states [1, sequence, hidden] of a text with an adapter, or with none."""
        key = (adapter, tuple(ids))
        if key not in self.hidden:
            with adapted(self.base.trunk, self._factors(adapter), active=self._active(ids, adapter)):
                self.hidden[key], _ = self.base.trunk.hidden_states(torch.tensor([list(ids)]))
        return self.hidden[key]

    def _factors(self, adapter: str | None) -> Factors:
        return self.base.adapters[adapter] if adapter is not None else {}

    def _active(self, ids: Sequence[int], adapter: str | None) -> Tensor | None:
        """Return which tokens of a text an adapter updates, bool [tokens]; None for all of them."""
        tokens = self.base.invocations.get(adapter or "")
        return None if tokens is None else torch.arange(len(ids)) >= self.place(ids, tokens)
