"""API keys: a file maps each key to its tenant, and to the rights that it has."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import msgspec

from chameleon_deploy.errors import InputError
from chameleon_deploy.serve.errors import ApiError

Right = Literal["load_adapters"]
RIGHTS: frozenset[Right] = frozenset(get_args(Right))
_KEY = re.compile(r"[!-~]+")  # what an Authorization header can hold


@dataclass(frozen=True)
class Holder:
    """Who calls: the tenant of a key, and what else the key may do than ask."""

    tenant: str | None
    rights: frozenset[Right]


class Entry(msgspec.Struct, forbid_unknown_fields=True):
    """A key's value in the file. A tenant alone stands for one without rights."""

    tenant: str
    rights: list[Right] = []


class Keys:
    """Who may call, and for which tenant. Without a file everybody may, for no tenant and with all rights."""

    def __init__(self, file: Path | None) -> None:
        """file: a JSON object of keys and tenants. Raises InputError."""
        # By digest: how long a look-up takes then tells nothing of a key.
        self._holders = None if file is None else {_digest(key): holder for key, holder in _read(file).items()}

    def __bool__(self) -> bool:
        return self._holders is not None

    def holder(self, authorization: str | None) -> Holder:
        """Who sends an Authorization header. Raises ApiError."""
        if self._holders is None:
            return Holder(tenant=None, rights=RIGHTS)
        scheme, _, key = (authorization or "").partition(" ")
        holder = self._holders.get(_digest(key.strip())) if scheme.lower() == "bearer" else None
        if holder is None:
            raise ApiError(401, "invalid_api_key", "pass a valid API key: Authorization: Bearer KEY")
        return holder


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def _read(file: Path) -> dict[str, Holder]:
    try:
        entries = msgspec.json.decode(file.read_bytes(), type=dict[str, str | Entry])
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InputError(f'{file}: expected a JSON object {{"key": "tenant"}}: {error}') from error
    holders = {
        key: Holder(entry, frozenset()) if isinstance(entry, str) else Holder(entry.tenant, frozenset(entry.rights))
        for key, entry in entries.items()
    }
    if not holders or not all(holder.tenant for holder in holders.values()):
        raise InputError(f"{file}: needs at least one key, and no empty tenant")
    for number, key in enumerate(holders, 1):  # a key itself is never shown
        if not _KEY.fullmatch(key):
            raise InputError(f"{file}: key {number} must be of printable ASCII characters without blanks")
    return holders
