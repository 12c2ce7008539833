"""Where requests load adapters from: the directories and URLs of --adapters."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from chameleon_deploy.contract.manifest import is_adapter_name
from chameleon_deploy.errors import AdapterError, ChameleonError, InputError, MissingFileError
from chameleon_deploy.runtime import Runtime
from chameleon_deploy.serve.errors import ApiError, api_error
from chameleon_deploy.store import local_cache, remote

# A plain name, so that a request reads no other file of this machine.
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,254}")


class AdapterDirectories:
    """Directories and URLs that hold adapter files and PEFT directories, searched in order.

    resolves   whether a request may name an adapter that is not loaded
    has_peers  whether other servers answer the same requests, so that only what a name means everywhere may be loaded
    """

    def __init__(self, roots: Sequence[str], runtime: Runtime, resolves: bool, has_peers: bool = False) -> None:
        """Raises InputError for a directory that is missing."""
        for root in roots:
            if not remote.is_url(root) and not Path(root).is_dir():
                raise InputError(f"--adapters {root} is not a directory", "adapters")
        self._roots, self._runtime, self.resolves, self.has_peers = roots, runtime, resolves, has_peers
        self._lock = asyncio.Lock()  # one request loads an adapter, and the others that name it find it

    async def load(self, name: str, file: str, in_place: bool = False) -> None:
        """Load a file or a PEFT directory under a name. Raises ApiError."""
        if not await asyncio.to_thread(self._load, name, [file], in_place):
            message = f"{file!r} is in none of the directories of --adapters"
            raise ApiError(400, AdapterError.code, message, "lora_path")

    async def resolve(self, names: Sequence[str]) -> None:
        """Load what is there of these names, as `name.safetensors` or as a PEFT directory. Raises ApiError."""
        async with self._lock:
            for name in names:
                if is_adapter_name(name) and name not in self._runtime.adapters.names:
                    await asyncio.to_thread(self._load, name, [f"{name}.safetensors", name], False)

    def _load(self, name: str, files: Sequence[str], in_place: bool) -> bool:
        """Load the first of these files that there is, and return whether there is any. Raises ApiError."""
        if not all(map(_NAME.fullmatch, files)):
            raise ApiError(400, "path_unsafe", "lora_path must be the plain name of a file in --adapters", "lora_path")
        for root in self._roots:
            for file in files:
                path = f"{root.rstrip('/')}/{file}"
                if not remote.is_url(path) and not Path(path).exists():
                    continue
                try:
                    self._runtime.load_adapter(name, path, replace=in_place)
                except MissingFileError:  # of a URL, where nothing tells it before
                    continue
                except ChameleonError as error:  # without the paths of this machine
                    message = str(error).replace(path, file).replace(f"{local_cache.cache_root()}/", "")
                    raise replace(api_error(error), message=message) from error
                return True
        return False
