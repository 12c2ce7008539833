"""API keys: a file maps each key to its tenant, with the tenant's share and limits, and to the key's rights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import msgspec

from chameleon_deploy.errors import InputError
from chameleon_deploy.runtime.engine.tenants import NOBODY, Tenant
from chameleon_deploy.serve.errors import ApiError

Right = Literal["load_adapters"]
RIGHTS: frozenset[Right] = frozenset(get_args(Right))
_KEY = re.compile(r"[!-~]+")  # what an Authorization header can hold


@dataclass(frozen=True)
class Holder:
    """Who calls: the tenant of a key, what else the key may do than ask, and the tenant's share of the engine."""

    tenant: str | None
    rights: frozenset[Right]
    share: Tenant = NOBODY


class Limits(msgspec.Struct, forbid_unknown_fields=True):
    """What a tenant may take, see Tenant."""

    rows: int | None = None
    max_waiting: int | None = None
    tokens_per_minute: int | None = None


class Entry(msgspec.Struct, forbid_unknown_fields=True):
    """A key's value in the file. A tenant alone stands for one without rights.

    weight, limits  of the tenant: all of its keys that have them have the same
    """

    tenant: str
    rights: list[Right] = []
    weight: int | None = None
    limits: Limits | None = None


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
    found = {key: Entry(entry) if isinstance(entry, str) else entry for key, entry in entries.items()}
    if not found or not all(entry.tenant for entry in found.values()):
        raise InputError(f"{file}: needs at least one key, and no empty tenant")
    shares = _shares(file, found.values())
    holders = {key: Holder(entry.tenant, frozenset(entry.rights), shares[entry.tenant]) for key, entry in found.items()}
    for number, key in enumerate(holders, 1):  # a key itself is never shown
        if not _KEY.fullmatch(key):
            raise InputError(f"{file}: key {number} must be of printable ASCII characters without blanks")
    return holders


def _shares(file: Path, entries: Collection[Entry]) -> dict[str, Tenant]:
    """Return each tenant with what its keys say of it. Raises InputError."""
    shares = {}
    for name in {entry.tenant for entry in entries}:
        own = [entry for entry in entries if entry.tenant == name]
        weights = {entry.weight for entry in own} - {None}
        limits = {msgspec.json.encode(entry.limits) for entry in own if entry.limits is not None}
        if max(len(weights), len(limits)) > 1:
            raise InputError(f"{file}: the keys of tenant {name!r} differ in its weight or limits")
        given = msgspec.json.decode(limits.pop()) if limits else {}
        try:
            shares[name] = Tenant(name, weights.pop() if weights else 1, **given)  # type: ignore[arg-type]
        except InputError as error:
            raise InputError(f"{file}: tenant {name!r}: {error}") from error
    return shares
