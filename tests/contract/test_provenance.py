"""A bundle that no trusted key signed is refused; openssl makes and checks the same signatures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import chameleon_deploy
from chameleon_deploy.contract.bundle import open_bundle
from chameleon_deploy.contract.provenance import SIGNATURE, check_signature, read_signing_key
from chameleon_deploy.errors import ChameleonError, DependencyError, InputError, SignatureError
from tests.commands import call, find_program, run
from tests.shared_data import good_bundle, read, signed_bundle

GOOD = good_bundle("lora_masked")


def openssl(*arguments: Any) -> subprocess.CompletedProcess[str]:
    program = find_program("openssl", install="apt-get install openssl")
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A private and a public key, made by openssl as the documentation says."""
    directory = tmp_path_factory.mktemp("keys")
    private, public = directory / "key.pem", directory / "key.pub"
    assert openssl("genpkey", "-algorithm", "ed25519", "-out", private).returncode == 0
    assert openssl("pkey", "-in", private, "-pubout", "-out", public).returncode == 0
    return private, public


def verify_with_openssl(bundle: Path, public: Path) -> bool:
    result = openssl("pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", public, "-in", bundle / "bundle.json",
                     "-sigfile", bundle / SIGNATURE)  # fmt: skip
    return result.returncode == 0


@pytest.mark.parametrize("case", read("signatures.json")["cases"], ids=lambda case: case["name"])
def test_signatures(case: dict[str, Any], tmp_path: Path) -> None:
    bundle, trusted = signed_bundle(case, tmp_path)
    if case["code"] is None:
        opened = open_bundle(bundle, trusted)
        assert opened.signed_by == (None if trusted is None else tmp_path / "a")
        return
    with pytest.raises(ChameleonError) as error:
        chameleon_deploy.load(bundle, trusted_keys=trusted)
    assert error.value.code == case["code"]


def test_a_signature_that_is_a_link_or_cannot_be_read(tmp_path: Path) -> None:
    (case,) = (case for case in read("signatures.json")["cases"] if case["name"] == "trusted")
    bundle, trusted = signed_bundle(case, tmp_path)
    content, signature = (bundle / "bundle.json").read_bytes(), bundle / SIGNATURE
    assert trusted is not None
    assert check_signature(content, signature, trusted) == trusted[0]
    signature.rename(tmp_path / "elsewhere")
    signature.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SignatureError, match="missing or not a signature"):
        check_signature(content, signature, trusted)
    with pytest.raises(SignatureError, match=r"cannot read .*: File name too long"):
        check_signature(content, bundle / ("x" * 300), trusted)


def test_signatures_without_cryptography(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    with pytest.raises(DependencyError, match=r"chameleon-deploy\[sign\]"):
        open_bundle(GOOD, [tmp_path / "key.pub"])


def test_export_signs_what_openssl_verifies(mini_path: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    bundle = tmp_path / "signed"
    exported = call("chameleon_deploy.export", mini_path, "--out", bundle, "--no-verify", "--sign", private)
    assert exported.returncode == 0, exported.stderr
    assert verify_with_openssl(bundle, public)
    chameleon_deploy.load(bundle, trusted_keys=[public])
    checked = call("chameleon_deploy.verify_signature", bundle, "--trusted-key", public)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert str(public) in checked.stdout
    scored = call("chameleon_deploy.generate", bundle, "--prompt", "x", "--max-new-tokens", 1, "--trusted-key", public)
    assert scored.returncode == 0, scored.stderr
    (bundle / "bundle.json").write_text(json.dumps(json.loads((bundle / "bundle.json").read_text())))
    assert not verify_with_openssl(bundle, public)
    checked = call("chameleon_deploy.verify_signature", bundle, "--trusted-key", public)
    assert (checked.returncode, checked.stderr.count("\n")) == (1, 1)
    assert "[signature_invalid]" in checked.stderr
    for module, *options in (("generate", "--prompt", "x"), ("score", "--text", mini_path / "chameleon_config.json"),
                             ("serve", "--port", 0)):  # fmt: skip
        refused = call(f"chameleon_deploy.{module}", bundle, *options, "--trusted-key", public)
        assert refused.returncode == 2
        assert refused.stderr.splitlines()[-1].endswith("[signature_invalid]")


def test_openssl_signs_what_load_accepts(keys: tuple[Path, Path], copy_of: Callable[[Path], Path]) -> None:
    private, public = keys
    bundle = copy_of(GOOD)
    made = openssl("pkeyutl", "-sign", "-rawin", "-inkey", private, "-in", bundle / "bundle.json",
                   "-out", bundle / SIGNATURE)  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert open_bundle(bundle, [str(public)]).signed_by == public


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-algorithm", "ed25519", "-aes256", "-pass", "pass:secret"], "without a passphrase"),
        (["-algorithm", "ed448"], "not an Ed25519 key"),
        (None, "cannot read the key"),
    ],
)
def test_keys_that_cannot_sign(arguments: list[str] | None, message: str, tmp_path: Path) -> None:
    if arguments:
        assert openssl("genpkey", *arguments, "-out", tmp_path / "key").returncode == 0
    with pytest.raises(InputError, match=message):
        read_signing_key(tmp_path / "key")


def test_a_key_that_cannot_sign_is_refused_before_the_export_begins(mini_path: Path, tmp_path: Path) -> None:
    refused = run("chameleon_deploy.export", mini_path, "--out", tmp_path / "out", "--sign", tmp_path / "key")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert not (tmp_path / "out").exists()


def test_what_a_key_signs_is_signed_by_it(keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    (tmp_path / "signature").write_bytes(read_signing_key(private)(b"content"))
    assert check_signature(b"content", tmp_path / "signature", [public]) == public
    with pytest.raises(SignatureError, match="not made by a trusted key"):
        check_signature(b"other content", tmp_path / "signature", [public])


@pytest.mark.parametrize("trusted", ["key.pub", Path("key.pub"), b"key.pub", {"key.pub"}, 1, [1], [None], ["a\0b"]])
def test_trusted_keys_of_a_wrong_type(trusted: Any) -> None:
    with pytest.raises(InputError, match="key"):
        chameleon_deploy.load(GOOD, trusted_keys=trusted)


def test_cryptography_is_imported_only_to_check_signatures(keys: tuple[Path, Path]) -> None:
    code = (
        "import sys, chameleon_deploy\n"
        "chameleon_deploy.load(sys.argv[1]).generate(['x'], max_new_tokens=1)\n"
        "print('cryptography' in sys.modules)\n"
        "sys.modules['cryptography'] = None\n"
        "chameleon_deploy.load(sys.argv[1], trusted_keys=[sys.argv[2]])\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(GOOD), str(keys[1])], capture_output=True, text=True,
                            check=False)  # fmt: skip
    assert result.stdout == "False\n"
    assert f"{DependencyError.__name__}: signatures need cryptography: pip install" in result.stderr
