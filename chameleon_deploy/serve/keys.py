"""API keys: a file maps each key to its tenant."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from chameleon_deploy.errors import InputError
from chameleon_deploy.serve.errors import ApiError


class Keys:
    """Who may call, and for which tenant. Without a file everybody may, for no tenant."""

    def __init__(self, file: Path | None) -> None:
        """file: a JSON object of keys and tenants. Raises InputError."""
        # By digest: how long a look-up takes then tells nothing of a key.
        self._tenants = None if file is None else {_digest(key): tenant for key, tenant in _read(file).items()}

    def __bool__(self) -> bool:
        return self._tenants is not None

    def tenant(self, authorization: str | None) -> str | None:
        """The tenant of an Authorization header. Raises ApiError."""
        if self._tenants is None:
            return None
        scheme, _, key = (authorization or "").partition(" ")
        tenant = self._tenants.get(_digest(key.strip())) if scheme.lower() == "bearer" else None
        if tenant is None:
            raise ApiError(401, "invalid_api_key", "pass a valid API key: Authorization: Bearer KEY")
        return tenant


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def _read(file: Path) -> dict[str, str]:
    try:
        keys = msgspec.json.decode(file.read_bytes(), type=dict[str, str])
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InputError(f'{file}: expected a JSON object {{"key": "tenant"}}: {error}') from error
    if not keys or not all(keys) or not all(keys.values()):
        raise InputError(f"{file}: needs at least one key, and no empty key or tenant")
    return keys
