"""Signatures: who made a bundle (docs/security.md).

A signature is Ed25519 over the bytes of bundle.json, which holds the SHA-256 of every other file. It stands next to it,
64 raw bytes in `bundle.json.sig`, and keys are PEM files, so that openssl can sign and verify too:

    openssl genpkey -algorithm ed25519 -out key.pem
    openssl pkey -in key.pem -pubout -out key.pub
    openssl pkeyutl -sign -rawin -inkey key.pem -in bundle.json -out bundle.json.sig
    openssl pkeyutl -verify -rawin -pubin -inkey key.pub -in bundle.json -sigfile bundle.json.sig

`cryptography` is imported only to sign or to verify.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chameleon_deploy.errors import DependencyError, InputError, SignatureError

SIGNATURE = "bundle.json.sig"
SIGNATURE_BYTES = 64

TrustedKeys = Sequence[str | os.PathLike[str]]


def read_signing_key(file: Path) -> Callable[[bytes], bytes]:
    """Return the function that signs bytes with the private key of a PEM file.

    Raises InputError for a file that is not an Ed25519 private key without a passphrase, or DependencyError.
    """
    ed25519, serialization = _import_cryptography()
    try:
        key = serialization.load_pem_private_key(_read(file), None)
    except (ValueError, TypeError) as error:  # TypeError: it has a passphrase
        raise InputError(
            f"{file} is not a private key in PEM without a passphrase: make one with `openssl genpkey -algorithm "
            f"ed25519`, or sign {SIGNATURE.removesuffix('.sig')} with openssl"
        ) from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise InputError(f"{file} is not an Ed25519 key: make one with `openssl genpkey -algorithm ed25519`")
    sign: Callable[[bytes], bytes] = key.sign
    return sign


def check_signature(content: bytes, signature: Path, trusted_keys: TrustedKeys) -> Path:
    """Return the file of the trusted key that signed the content.

    signature     the file of the signature
    trusted_keys  PEM files, each with one Ed25519 public key

    Raises SignatureError if no key did, InputError for trusted keys that cannot be used, or DependencyError.
    """
    keys = _read_public_keys(trusted_keys)
    try:
        if signature.is_symlink() or not signature.is_file() or signature.stat().st_size != SIGNATURE_BYTES:
            raise SignatureError(f"{signature} is missing or not a signature: get a signed bundle, or sign this one")
        signed = signature.read_bytes()
    except OSError as error:
        raise SignatureError(f"cannot read {signature}: {error.strerror}") from error
    for file, key in keys.items():
        if _is_signed_by(key, signed, content):
            return file
    raise SignatureError(
        f"{signature} was not made by a trusted key, or {signature.with_suffix('').name} was changed: do not load it"
    )


def _read_public_keys(trusted_keys: TrustedKeys) -> dict[Path, Any]:
    if isinstance(trusted_keys, str | bytes | os.PathLike) or not isinstance(trusted_keys, Sequence):
        raise InputError(f"trusted_keys must be a list of files, got a single {type(trusted_keys).__name__}")
    if not trusted_keys:
        raise InputError("trusted_keys is empty: pass at least one public key, or None to accept unsigned bundles")
    ed25519, serialization = _import_cryptography()
    keys = {}
    for given in trusted_keys:
        if not isinstance(given, str | os.PathLike):
            raise InputError(f"trusted_keys must be a list of files, got a {type(given).__name__} in it")
        file = Path(given)
        try:
            keys[file] = serialization.load_pem_public_key(_read(file))
        except ValueError as error:
            raise InputError(f"{file} is not a public key in PEM: `openssl pkey -in KEY -pubout` writes it") from error
        if not isinstance(keys[file], ed25519.Ed25519PublicKey):
            raise InputError(f"{file} is not an Ed25519 key: make one with `openssl genpkey -algorithm ed25519`")
    return keys


def _is_signed_by(key: Any, signed: bytes, content: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signed, content)
    except InvalidSignature:
        return False
    return True


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise InputError(f"cannot read the key {file}: {getattr(error, 'strerror', error)}") from error


def _import_cryptography() -> tuple[Any, Any]:
    """Return the modules `ed25519` and `serialization`."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise DependencyError("signatures need cryptography: pip install 'chameleon-deploy[sign]'") from error
    return ed25519, serialization
