"""Bundles in object storage, from a real S3-compatible server and from real HTTP servers, whole and at fault."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

import chameleon_deploy
from chameleon_deploy.contract.bundle import MANIFEST, open_bundle
from chameleon_deploy.contract.provenance import SIGNATURE
from chameleon_deploy.errors import (
    BundleNotFoundError,
    ChameleonError,
    DigestError,
    DownloadError,
    InputError,
    ManifestError,
    MissingFileError,
)
from chameleon_deploy.store import local_cache, remote
from tests.commands import run
from tests.file_server import FileHandler, served

WEIGHTS = "weights.bin"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHAMELEON_DEPLOY_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """A client of an S3-compatible server with the empty bucket `models`; s3fs finds the server by the environment."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="models")
        yield client
    server.stop()


@pytest.fixture
def uploaded(s3: Any, bundle: Path, tmp_path: Path) -> str:
    """The URL of the bundle, at a place of its own in the bucket."""
    for file in bundle.iterdir():
        s3.upload_file(str(file), "models", f"{tmp_path.name}/wiki/{file.name}")
    return f"s3://models/{tmp_path.name}/wiki"


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """The bundle in a directory that a test may damage and serve."""
    return shutil.copytree(bundle, tmp_path / "served" / "wiki")


def _partial_files() -> list[Path]:
    return list((local_cache.cache_root() / remote.BUNDLES).glob(".*.download/*"))


def test_a_bundle_from_s3(uploaded: str, bundle: Path, s3: Any) -> None:
    arrived: list[tuple[int, int]] = []
    path = remote.fetch(uploaded, lambda what, done, total: arrived.append((done, total)))
    assert path.name == "wiki" and open_bundle(path).digest == open_bundle(bundle).digest
    assert arrived == sorted(arrived) and arrived[-1][0] == arrived[-1][1]
    s3.delete_object(Bucket="models", Key=f"{uploaded.removeprefix('s3://models/')}/{WEIGHTS}")
    there = chameleon_deploy.load(uploaded + "/")  # from the cache: the weights are no longer in the bucket
    here = chameleon_deploy.load(bundle)
    assert there.bundle.path == path and not _partial_files()
    assert there.generate(["The river"], max_new_tokens=5) == here.generate(["The river"], max_new_tokens=5)


def test_files_of_a_directory_are_those_that_are_there_now(copy: Path) -> None:
    limits = {"a.bin": 8, "b.bin": 8}
    (copy / "a.bin").write_bytes(b"first")
    (copy / "b.bin").write_bytes(b"second")
    with served(copy.parent) as (url, handler):
        before = remote.fetch_files(url, limits, "some")
        assert [(before / name).read_bytes() for name in limits] == [b"first", b"second"]
        assert remote.fetch_files(url + "/", limits, "some") == before
        (copy / "a.bin").write_bytes(b"third")
        after = remote.fetch_files(url, limits, "some")
        assert after != before and (after / "a.bin").read_bytes() == b"third"
        assert (before / "a.bin").read_bytes() == b"first"  # of who read it before
        with pytest.raises(InputError, match=r"a\.bin has more than 4 bytes"):
            remote.fetch_files(url, {"a.bin": 4}, "some")
        with pytest.raises(MissingFileError, match=r"c\.bin is missing"):
            remote.fetch_files(url, {"c.bin": 4}, "some")
        handler.cut = 3
        with pytest.raises(DownloadError):
            remote.fetch_files(url, limits, "some")
    with pytest.raises(InputError, match="without a query"):
        remote.fetch_files(url + "?a=b", limits, "some")


def test_commands_take_a_url(uploaded: str) -> None:
    output = run("chameleon_deploy.generate", uploaded, "--prompt", "The river", "--max-new-tokens", 3)
    assert output.returncode == 0, output.stderr
    assert output.stdout


@pytest.mark.parametrize("ranges", [True, False])
def test_a_bundle_over_http(ranges: bool, copy: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BLOCK", 100_000)
    with served(copy.parent, ranges=ranges) as (url, handler):
        assert open_bundle(remote.fetch(url)).digest == open_bundle(bundle).digest
        assert any(first > 0 for _, first in handler.starts) == ranges


def test_a_new_upload_is_a_new_entry(copy: Path) -> None:
    with served(copy.parent) as (url, _):
        first = remote.fetch(url)
        text = (copy / MANIFEST).read_text()
        (copy / MANIFEST).write_text(text + "\n")
        second = remote.fetch(url)
        assert first != second and (first / MANIFEST).read_text() == text
        (copy / MANIFEST).unlink()
        with pytest.raises(BundleNotFoundError):  # not unreachable: it was taken away
            remote.fetch(url)
    assert remote.fetch(url) == second


def test_a_signature_comes_along(copy: Path) -> None:
    with served(copy.parent) as (url, _):
        unsigned = remote.fetch(url)
        (copy / SIGNATURE).write_bytes(bytes(range(64)))
        signed = remote.fetch(url)
    assert not (unsigned / SIGNATURE).exists() and (signed / SIGNATURE).read_bytes() == bytes(range(64))
    assert open_bundle(unsigned).digest == open_bundle(signed).digest


def test_offline_when_cached(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    with served(copy.parent) as (url, _):
        path = remote.fetch(url)
    with caplog.at_level("WARNING"):
        assert remote.fetch(url) == path
    assert "using the copy in the local cache" in caplog.text
    (path / WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(DownloadError):
        remote.fetch(url)


def _fetch_slowly(url: str) -> None:
    remote.BLOCK = 20_000
    remote.fetch(url)


def test_a_killed_download_is_resumed(copy: Path, bundle: Path, tmp_path: Path) -> None:
    size = (copy / WEIGHTS).stat().st_size
    with served(copy.parent, cut=None) as (url, handler):
        get = handler.do_GET

        def slowly(self: FileHandler) -> None:
            time.sleep(0.05)
            get(self)

        handler.do_GET = slowly  # type: ignore[method-assign]
        code = f"from chameleon_deploy.store import remote; remote.BLOCK = 20_000; remote.fetch({url!r})"
        process = subprocess.Popen([sys.executable, "-c", code])
        while not any(file.name == WEIGHTS and file.stat().st_size > 40_000 for file in _partial_files()):
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        (part,) = (file for file in _partial_files() if file.name == WEIGHTS)
        have = part.stat().st_size
        assert 0 < have < size
        handler.do_GET = get  # type: ignore[method-assign]
        handler.starts.clear()
        assert open_bundle(remote.fetch(url)).digest == open_bundle(bundle).digest
        assert min(first for name, first in handler.starts if name == WEIGHTS) == have
    assert not _partial_files()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_connection_is_resumed(ranges: bool, copy: Path, bundle: Path) -> None:
    with served(copy.parent, ranges=ranges, cut=100_000) as (url, handler):
        with pytest.raises(DownloadError, match="repeat the command"):
            remote.fetch(url)
        assert not list(local_cache.cache_root().glob(f"{remote.BUNDLES}/*/wiki"))
        handler.cut = None
        assert open_bundle(remote.fetch(url)).digest == open_bundle(bundle).digest


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def _remove(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(
    ("damage", "error"),
    [(_flip, DigestError), (_cut, DigestError), (_lengthen, DigestError), (_remove, MissingFileError)],
)
def test_a_wrong_object_never_becomes_an_entry(
    damage: Callable[[Path], None], error: type[ChameleonError], resumed: bool, copy: Path, bundle: Path
) -> None:
    with served(copy.parent) as (url, handler):
        if resumed:
            handler.cut = 100_000
            with pytest.raises(DownloadError):
                remote.fetch(url)
            handler.cut = None
        damage(copy / WEIGHTS)
        with pytest.raises(error, match=WEIGHTS):
            remote.fetch(url)
        assert [entry.key for entry in local_cache.stored()] == [None]  # what has arrived of it
        shutil.copy(bundle / WEIGHTS, copy / WEIGHTS)
        assert open_bundle(remote.fetch(url)).digest == open_bundle(bundle).digest


def test_a_damaged_object_in_s3(uploaded: str, s3: Any) -> None:
    key = f"{uploaded.removeprefix('s3://models/')}/{WEIGHTS}"
    s3.put_object(Bucket="models", Key=key, Body=b"damaged")
    with pytest.raises(DigestError, match="7 bytes"):
        remote.fetch(uploaded)
    s3.delete_object(Bucket="models", Key=key)
    with pytest.raises(MissingFileError):
        remote.fetch(uploaded)
    s3.delete_object(Bucket="models", Key=key.replace(WEIGHTS, MANIFEST))
    with pytest.raises(BundleNotFoundError):
        remote.fetch(uploaded)
    with pytest.raises(BundleNotFoundError):
        remote.fetch("s3://no-such-bucket/wiki")


def test_what_has_arrived_is_pruned(copy: Path) -> None:
    with served(copy.parent, cut=100_000) as (url, _), pytest.raises(DownloadError):
        remote.fetch(url)
    assert _partial_files()
    local_cache.prune(max_age=1e9)
    assert not _partial_files()


def test_one_download_among_processes(copy: Path) -> None:
    with served(copy.parent) as (url, handler):
        processes = [multiprocessing.get_context("spawn").Process(target=_fetch_slowly, args=(url,)) for _ in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * 3
        starts = [first for name, first in handler.starts if name == WEIGHTS]
        assert len(starts) == len(set(starts))


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("ftp://host/wiki", InputError),
        ("s3://", InputError),
        ("https://host/wiki?signature=abc", InputError),
        ("https://user:secret@host/wiki", InputError),
        ("simplecache::s3://models/wiki", InputError),
        ("http://127.0.0.1:9/wiki", DownloadError),
    ],
)
def test_urls_that_cannot_be_used(url: str, error: type[ChameleonError]) -> None:
    with pytest.raises(error) as caught:
        remote.fetch(url)
    assert "secret" not in str(caught.value)


def test_a_manifest_of_another_kind(copy: Path) -> None:
    (copy / MANIFEST).write_text("<html>")
    with served(copy.parent) as (url, _), pytest.raises(ManifestError):
        remote.fetch(url)
