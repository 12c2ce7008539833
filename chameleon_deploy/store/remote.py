"""Bundles in object storage: downloaded into the local cache, each file checked before the bundle is used.

    chameleon_deploy.load("s3://models/wiki")

A bundle's entry in the cache is named by its URL and the digest of its manifest, so a new upload is a new entry, and a
process that has the old one open keeps it. Files arrive in a directory of their own, which a killed or failed download
leaves behind for the next one to resume.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard
from urllib.parse import urlsplit

from chameleon_deploy.contract.bundle import FileSpec, Manifest, file_sha256
from chameleon_deploy.contract.manifest import MANIFEST, parse_manifest
from chameleon_deploy.contract.provenance import SIGNATURE, SIGNATURE_BYTES
from chameleon_deploy.errors import (
    BundleNotFoundError,
    ChameleonError,
    DependencyError,
    DigestError,
    DownloadError,
    InputError,
    ManifestError,
    MissingFileError,
)
from chameleon_deploy.store import local_cache

BUNDLES = "bundles"  # the kind of these entries in the local cache
SCHEMES = ("s3", "gs", "hf", "https", "http")
BLOCK = 8 * 2**20  # bytes of one request
MAX_MANIFEST = 16 * 2**20  # bytes
MB = 1_000_000
Report = Callable[[str, int, int], None]  # see terminal/progress.py, which stands above this folder
_log = logging.getLogger(__name__)


def is_url(path: object) -> TypeGuard[str]:
    """Return whether a bundle's path is a URL."""
    return isinstance(path, str) and "://" in path


def local(bundle: str, progress: Report | None = None) -> Path:
    """Return the directory of a bundle that is given by its path or its URL, see `fetch`."""
    return fetch(bundle, progress) if is_url(bundle) else Path(bundle)


def fetch(url: str, progress: Report | None = None) -> Path:
    """Return the directory of a bundle in the local cache; download it if it is not there.

    url       of the directory that holds bundle.json. fsspec reads it, with the credentials of its protocol's library
    progress  called with the megabytes that have arrived

    One process downloads while the others wait for it. What a failed download leaves is resumed. Where the storage
    cannot be reached, the bundle that was used last of those from this URL is used again, and a warning is logged.

    Raises InputError for a URL that cannot be used, DependencyError where its protocol's library is missing,
    BundleNotFoundError, MissingFileError, DigestError (an object that is truncated or damaged), DownloadError, or
    another ChameleonError of the manifest or the cache.
    """
    url = _checked(url)
    files = _Storage(url)
    try:
        raw, signature = files.read_manifest(), files.read_signature()
    except DownloadError as error:
        return _newest(url, error)
    manifest = parse_manifest(raw, Path(MANIFEST))
    key = {"url": url, "digest": hashlib.sha256(raw).hexdigest(), "signature": (signature or b"").hex()}
    name = _name(url)

    def build(directory: Path) -> None:
        with local_cache.resumable(BUNDLES, key) as arrived:
            _download(files, manifest, arrived, progress)
            (directory / name).mkdir()
            for file in manifest.files:
                (arrived / file).rename(directory / name / file)
            (directory / name / MANIFEST).write_bytes(raw)
            if signature is not None:
                (directory / name / SIGNATURE).write_bytes(signature)

    return local_cache.find_or_build(BUNDLES, key, build) / name


def fetch_files(url: str, limits: Mapping[str, int], kind: str) -> Path:
    """Return a directory of the local cache with files of a directory in object storage, as they are now.

    limits  the bytes that a file may have, by its name
    kind    of the entry in the cache

    Raises InputError for a URL that cannot be used or a file that is larger, DependencyError, MissingFileError,
    DownloadError, or an error of the cache.
    """
    url = _checked(url)
    storage, files = _Storage(url), {}
    for name, limit in limits.items():
        files[name] = storage.read(name, limit, MissingFileError(f"{url}/{name} is missing"))
        if len(files[name]) > limit:
            raise InputError(f"{url}/{name} has more than {limit:,} bytes")
    digest = hashlib.sha256(b"".join(hashlib.sha256(raw).digest() for raw in files.values())).hexdigest()

    def build(directory: Path) -> None:
        for name, raw in files.items():
            (directory / name).write_bytes(raw)

    return local_cache.find_or_build(kind, {"url": url, "files": " ".join(files), "digest": digest}, build)


def _checked(url: str) -> str:
    """Return the URL without a slash at its end. Raises InputError."""
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise InputError(f"{url}: bundles are read from {', '.join(f'{scheme}://' for scheme in SCHEMES)}")
    if parts.query or parts.fragment or parts.password or "::" in url:
        raise InputError(
            f"{parts.scheme}://{parts.hostname}{parts.path}: pass the URL of a directory, without a query, a fragment "
            "or a password; credentials come from the environment or from the files of the protocol's library"
        )
    if not parts.netloc:
        raise InputError(f"{url} names no host or bucket")
    return url.rstrip("/")


def _name(url: str) -> str:
    """Return the name of the bundle's directory, which a server takes as the model's."""
    last = url.rpartition("/")[2]
    return last if re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", last) else "bundle"


def _newest(url: str, error: DownloadError) -> Path:
    """Return the bundle that was used last of those downloaded from a URL. Raises the error if there is none."""
    for stored in local_cache.stored():
        key = stored.key if stored.kind == BUNDLES else None
        if key and key.get("url") == url and (path := local_cache.find(BUNDLES, key)):
            _log.warning("%s; using the copy in the local cache, with digest %s", error, key["digest"])
            return path / _name(url)
    raise error


def _download(files: _Storage, manifest: Manifest, directory: Path, progress: Report | None) -> None:
    """Bring every file of a manifest into a directory that may hold some of them, or parts."""
    total = sum(spec.size for spec in manifest.files.values())
    before = 0
    for name, spec in manifest.files.items():

        def report(size: int, before: int = before) -> None:
            if progress is not None:
                progress("download, MB", (before + size) // MB, total // MB)

        files.download(name, spec, directory / name, report)
        before += spec.size


class _Storage:
    """The files of one directory in object storage."""

    def __init__(self, url: str) -> None:
        """Raises DependencyError."""
        try:
            from fsspec.core import url_to_fs
        except ModuleNotFoundError as error:
            raise DependencyError(f"{url} needs fsspec: pip install 'chameleon-deploy[remote]'") from error
        self._url = url
        try:
            self._system: Any = url_to_fs(url)[0]
        except ImportError as error:
            raise DependencyError(f"{url}: {error}") from error  # fsspec names the package

    def read_manifest(self) -> bytes:
        """Raises BundleNotFoundError, ManifestError or DownloadError."""
        missing = BundleNotFoundError(f"{self._url} has no {MANIFEST}: it is not a bundle")
        raw = self.read(MANIFEST, MAX_MANIFEST, missing)
        if len(raw) > MAX_MANIFEST:
            raise ManifestError(f"{self._url}/{MANIFEST} is larger than {MAX_MANIFEST:,} bytes")
        return raw

    def read_signature(self) -> bytes | None:
        """Return what `load(trusted_keys=...)` checks, or None for a bundle without one. Raises DownloadError."""
        try:
            return self.read(SIGNATURE, SIGNATURE_BYTES, MissingFileError(SIGNATURE))
        except MissingFileError:
            return None
        except DownloadError as error:
            if isinstance(error.__cause__, PermissionError):  # S3 says so of any missing object where it may not list
                return None
            raise

    def download(self, name: str, spec: FileSpec, to: Path, report: Callable[[int], None]) -> None:
        """Append to a file what is missing of it, and check the whole.

        report  called with the size that the file has reached

        Raises MissingFileError, DigestError (the file is deleted) or DownloadError (it is kept).
        """
        resumed = to.exists()
        while True:
            self._append(name, spec.size, to, report)
            fault = _fault(to, spec)
            if fault is None:
                return
            to.unlink()
            if not resumed:
                raise DigestError(f"{self._url}/{name}: {fault}: upload the bundle again")
            resumed = False  # the object may have changed since the first part arrived

    def read(self, name: str, limit: int, missing: ChameleonError) -> bytes:
        """Return a small file, or the beginning of one that is too large."""
        raw = b""
        for block in self._blocks(name, 0, missing):
            raw += block
            if len(raw) > limit:
                break
        return raw

    def _append(self, name: str, size: int, to: Path, report: Callable[[int], None]) -> None:
        missing = MissingFileError(f"{self._url}/{name} is listed in {MANIFEST} but missing: upload the bundle again")
        with to.open("ab") as part:
            have = part.tell()
            report(have)
            if have >= size:
                return
            for block in self._blocks(name, have, missing):
                part.write(block)
                have += len(block)
                report(have)
                if have > size:  # the object is too long, perhaps endless
                    return

    def _blocks(self, name: str, start: int, missing: ChameleonError) -> Iterator[bytes]:
        """The content of a file from a position on."""
        with self._faults(name, missing):
            try:
                with self._open(name, BLOCK) as opened:
                    opened.seek(start)
                    while block := opened.read(BLOCK):
                        start += len(block)
                        yield block
                return
            except ValueError:  # an HTTP server without ranges: what is there already is read again
                _log.debug("%s/%s cannot be read in parts", self._url, name)
            with self._open(name, 0) as opened:
                while start and (block := opened.read(min(start, BLOCK))):
                    start -= len(block)
                while block := opened.read(BLOCK):
                    yield block

    def _open(self, name: str, block_size: int) -> Any:
        return self._system.open(f"{self._url}/{name}", "rb", block_size=block_size, cache_type="none")

    @contextmanager
    def _faults(self, name: str, missing: ChameleonError) -> Iterator[None]:
        """Turn what any protocol's library raises into this package's errors."""
        try:
            yield
        except Exception as error:  # each library has its own, and many are no OSError
            if isinstance(error, FileNotFoundError) and not _hides_another(error):
                raise missing from error
            reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
            raise DownloadError(f"cannot read {self._url}/{name}: {reason}: repeat the command to resume") from error


def _hides_another(error: FileNotFoundError) -> bool:
    """Return whether it stands for a fault of the connection: fsspec's HTTP raises it for any that it meets first."""
    cause = error.__cause__
    if getattr(cause, "status", None) == 404:
        return False
    return type(cause).__module__.startswith("aiohttp") or isinstance(cause, ConnectionError | TimeoutError)


def _fault(file: Path, spec: FileSpec) -> str | None:
    size = file.stat().st_size
    if size != spec.size:
        return f"{size:,} bytes, {MANIFEST} says {spec.size:,}"
    if file_sha256(file) != spec.sha256:
        return f"its SHA-256 differs from {MANIFEST}"
    return None
