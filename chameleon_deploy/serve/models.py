"""Names of models: the bundle's own, one per mode, such as `wiki:none`, and one per adapter, such as `wiki:legal`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from chameleon_deploy.contract.bundle import Manifest, Mode, default_mode
from chameleon_deploy.errors import AdapterError, ChameleonError, ModeError
from chameleon_deploy.runtime.adapters import AdapterChoice, Adapters, Blend, check_adapters
from chameleon_deploy.serve.errors import ApiError, api_error
from chameleon_deploy.serve.schemas import AdaptedRequest, AdapterInfo, Model, ModelList


class Meant(NamedTuple):
    """What a request is computed with: the name to answer with, the mode, and its adapters, which it holds.

    blends  one for all texts, or one for each; None where the request names no adapter
    """

    model: str
    mode: Mode
    blends: tuple[Blend, ...] | None = None


class Models:
    """The names of models that requests may use, and their meaning.

    name        the bundle's directory
    default     mode of the name alone
    max_length  tokens of a row, prompt and answer: the model's positions, unless the engine holds less
    """

    def __init__(
        self,
        name: str,
        manifest: Manifest,
        mode: Mode | None,
        has_tenants: bool,
        adapters: Adapters,
    ) -> None:
        """mode: what the name alone means; None is centroid, or the bundle's default where it has no centroids

        adapters  of the runtime, which may change

        Raises ModeError.
        """
        served = _served(manifest, has_tenants)
        self.name, self._adapters = name, adapters
        self.default: Mode = mode or ("centroid" if "centroid" in served else default_mode(manifest.adaptation))
        if self.default not in served:
            raise ModeError(f"mode {self.default!r} cannot be served: choose one of {', '.join(served)}")
        self._modes: dict[str, Mode] = {name: self.default, **{f"{name}:{mode}": mode for mode in served}}
        self._created = int(time.time())
        self.max_length = manifest.model.max_positions

    def hold(self, body: AdaptedRequest) -> Meant:
        """Return what a request is computed with, whatever is unloaded or replaced from now on. Raises ApiError."""
        if body.adapters is None:
            meant = self.resolve(body.model, body.mode)
            if meant.model in self._modes:
                return meant
            return meant._replace(blends=self._blends([meant.model.removeprefix(f"{self.name}:")], "model"))
        model = self.resolve(body.model).model
        if model != self.name or body.mode not in (None, "static"):
            message = f"adapters go with model {self.name!r} and mode 'static': leave model and mode out"
            raise ApiError(400, "input_invalid", message, "adapters")
        return Meant(model, "static", self._blends(body.adapters, "adapters"))

    def unknown(self, model: str | None, choices: Sequence[str | Mapping[str, float] | None] | None) -> list[str]:
        """Return the names of adapters that a request has and nothing is loaded under."""
        chosen = [[choice] if isinstance(choice, str) else choice or () for choice in choices or ()]
        named = [name for names in chosen for name in names]
        if model is not None and model.startswith(f"{self.name}:") and model not in self._modes:
            named.append(model.removeprefix(f"{self.name}:"))
        loaded = self._adapters.names
        return [name for name in dict.fromkeys(named) if name not in loaded]

    def _blends(self, choices: Sequence[AdapterChoice], param: str) -> tuple[Blend, ...]:
        try:
            check_adapters(choices, len(choices))
            return tuple(self._adapters.blends(choices))
        except ChameleonError as error:
            raise api_error(error, param) from error

    def resolve(self, model: str | None, mode: Mode | None = None) -> Meant:
        """Raises ApiError for a name that no model has, or a mode that it does not go with."""
        named = self.name if model is None else model
        adapter = named.removeprefix(f"{self.name}:")
        if adapter != named and named not in self._modes and adapter in self._adapters.names:
            if mode not in (None, "static"):
                raise ApiError(400, "input_invalid", f"model {named!r} and mode {mode!r} contradict each other", "mode")
            return Meant(named, "static")
        if named not in self._modes:
            message = f"no model {named!r}: choose one of {', '.join(self._names()[:20])}"
            raise ApiError(404, "model_not_found", message, "model")
        if mode is None or mode == self._modes[named]:
            return Meant(named, self._modes[named])
        if named != self.name:
            raise ApiError(400, "input_invalid", f"model {named!r} and mode {mode!r} contradict each other", "mode")
        if mode not in self._modes.values():
            modes = ", ".join(dict.fromkeys(self._modes.values()))
            raise ApiError(400, "mode_unavailable", f"mode {mode!r} is not served here: choose one of {modes}", "mode")
        return Meant(named, mode)

    def list(self) -> ModelList:
        return ModelList(data=[self._model(name) for name in self._names()])

    def get(self, name: str) -> Model:
        """Raises ApiError."""
        return self._model(self.resolve(name).model)

    def _names(self) -> Sequence[str]:
        return [*self._modes, *(f"{self.name}:{adapter}" for adapter in self._adapters.names)]

    def _model(self, name: str) -> Model:
        mode = self._modes.get(name, "static")
        model = Model(id=name, created=self._created, root=self.name, mode=mode, max_model_len=self.max_length)
        if name not in self._modes:
            with contextlib.suppress(AdapterError):  # unloaded meanwhile
                adapter = self._adapters[name.removeprefix(f"{self.name}:")]
                model.adapter = AdapterInfo(
                    adapter.rank, adapter.size, list(adapter.targets), adapter.digest, self._adapters.uses(adapter),
                )  # fmt: skip
        return model


def _served(manifest: Manifest, has_tenants: bool) -> list[Mode]:
    """Factors are never taken from a body, so static needs the bundle's own, and without a name of an adapter; a tenant
    is known by its API key.
    """
    hidden = {mode for mode, served in (
        ("static", manifest.adaptation.regime == "lora" and not manifest.adaptation.adapters), ("tenant", has_tenants)
    ) if not served}  # fmt: skip
    return [mode for mode in manifest.adaptation.modes if mode not in hidden]
