"""Writes tests/data, which pytest and the C++ tests read, and the graph of known integer products that the runtimes of
both languages run: `python -m tests.make_data`.

    bundles/NAME/    good bundles of random weights, under 200 KB each: one for each of BUNDLES; that which
                     reads vectors of the caller has a sentence encoder too
    adapters.json    adapter files for a bundle, and the error code of each that must be refused
    signatures.json  keys, signatures of a good bundle, and the error code of each where it must be refused
    hostile.json     bundles that must be refused: a good one, what is done to it, and the error code
    golden.json      what the Python runtime gives for ragged batches in every mode
    sampling.json    numbers of `uniform`, choices of `choose`, what `log_probabilities` reports, limits of settings
    schedules.json   schedules of requests, and what the Python engine gives for them (tests/schedules.py)
    tokenizer.json   texts with their token ids, ids with their text, and byte strings that are no text

The same versions of torch, transformers and ONNX Runtime write the same bytes. Goldens were made by the Python
runtime and are checked by both; who changes the semantics runs this again and reads the difference.
"""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import chameleon_deploy
from chameleon_deploy.contract.bundle import LM_HEAD, TrainedRegime, factor_names
from chameleon_deploy.contract.manifest import ENCODER_TOKENIZER
from chameleon_deploy.errors import ChameleonError
from chameleon_deploy.export import tiled_scorer
from chameleon_deploy.runtime import Sampling
from chameleon_deploy.runtime.decode.session import INTEGER_PRODUCTS
from chameleon_deploy.runtime.sampling import choose, log_probabilities, uniform
from chameleon_deploy.runtime.sampling_settings import (
    MAX_BIASES,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
)
from tests.schedules import random_schedule, run_schedule
from tests.sentence_encoders import save_encoder
from tests.shared_data import (
    DATA,
    adapter_case,
    case_arguments,
    case_logits,
    choice_arguments,
    good_bundle,
    hostile_bundle,
)

VOCAB_SIZE, HIDDEN, HEADS, POSITIONS = 320, 16, 2, 48
BUNDLES: dict[str, tuple[TrainedRegime, str, int, int]] = {
    # name: regime, protocol, layers, conditioning_size
    "chameleon_masked": ("chameleon", "masked", 2, 0),
    "chameleon_paper": ("chameleon", "paper", 1, 0),
    "lora_masked": ("lora", "masked", 1, 0),
    "chameleon_given": ("chameleon", "masked", 1, 5),
}
DESCRIPTIONS = ("answer like a lawyer", "Write code.", "the court, finds")


def main() -> None:
    tiled_scorer.TILE = 128  # of a vocabulary of 320, so that bundles have several tiles and an uneven one
    for made in (DATA / "bundles", *DATA.glob("*.json")):  # released/ is not made again
        shutil.rmtree(made) if made.is_dir() else made.unlink()
    (DATA / "bundles").mkdir(parents=True)
    for seed, (name, how) in enumerate(BUNDLES.items()):
        make_bundle(good_bundle(name), *how, seed=seed)
    INTEGER_PRODUCTS.write_bytes(integer_products())
    write("hostile.json", hostile_cases())
    write("adapters.json", adapter_cases())
    write("signatures.json", signature_cases())
    write("golden.json", golden_cases())
    write("sampling.json", sampling_cases())
    write("schedules.json", schedule_cases())
    write("tokenizer.json", tokenizer_cases())


def integer_products() -> bytes:
    """The graph that `session.exact_weights` runs: sums [rows, 32] = (activations - 128) weights, in float32.

    Two neighbouring products of 255 and 127, or 255 and -128, are beyond 16 bits.
    """
    from onnx import TensorProto, helper, numpy_helper

    constants: dict[str, np.ndarray[Any, Any]] = {
        "weights": np.tile(np.array([127, -128], np.int8), (64, 16)),
        "one": np.array(1, np.float32),
        "zero_point": np.array(128, np.uint8),
    }
    product = helper.make_node(
        "MatMulIntegerToFloat", ["activations", "weights", "one", "one", "zero_point"], ["sums"], domain="com.microsoft"
    )
    graph = helper.make_graph(
        [product],
        "integer_products",
        [helper.make_tensor_value_info("activations", TensorProto.UINT8, ["rows", 64])],
        [helper.make_tensor_value_info("sums", TensorProto.FLOAT, ["rows", 32])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(model.SerializeToString(deterministic=True))


def write(name: str, records: Any) -> None:
    """One record per line, so that a change shows as a few lines."""
    sections = records.items() if isinstance(records, dict) else [(None, records)]
    blocks = []
    for key, lines in sections:
        body = "[\n" + ",\n".join(json.dumps(line, ensure_ascii=True) for line in lines) + "\n]"
        blocks.append(body if key is None else f"{json.dumps(key)}: {body}")
    text = blocks[0] if isinstance(records, list) else "{\n" + ",\n".join(blocks) + "\n}"
    (DATA / name).write_text(text + "\n")


def code_of(function: Callable[..., Any], *arguments: Any) -> str | None:
    """The code of the error that a call raises; None for a call that raises none."""
    try:
        function(*arguments)
    except ChameleonError as error:
        return error.code
    return None


def make_bundle(out: Path, regime: Any, protocol: Any, layers: int, conditioning_size: int, seed: int) -> None:
    import torch
    import transformers

    from chameleon_deploy.export.exporter import export_bundle
    from chameleon_deploy.reference.checkpoint import CheckpointConfig, build_factors, load_checkpoint, save_checkpoint
    from chameleon_deploy.reference.clustering import embed_texts, fit_centroids
    from chameleon_deploy.reference.corpus import encode_texts
    from chameleon_deploy.reference.model import trunk_from
    from chameleon_deploy.reference.python_corpus import KINDS, python_texts
    from chameleon_deploy.reference.source import add_encoder
    from chameleon_deploy.reference.tiny import save_base, train_tokenizer

    torch.manual_seed(seed)
    texts = [text for kind in KINDS for text in python_texts(kind, 60)]
    tokenizer = train_tokenizer(texts, VOCAB_SIZE)
    config = transformers.GPT2Config(
        n_layer=layers, n_embd=HIDDEN, n_head=HEADS, n_positions=POSITIONS, vocab_size=VOCAB_SIZE, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # the usual start gives logits so close together that a last bit decides
    checkpoint = CheckpointConfig(
        regime=regime, base_model="./base", rank=2, alpha=0.5, hidden_sizes=(8, 4) if regime == "chameleon" else (),
        num_clusters=0 if conditioning_size else 3, protocol=protocol, max_length=24,
        conditioning_size=conditioning_size,
    )  # fmt: skip
    ids = encode_texts(texts, tokenizer, "masked", checkpoint.max_length)
    embeddings = embed_texts(ids, model.transformer.wte.weight.detach(), protocol, checkpoint.max_length, 0)
    factors = build_factors(checkpoint, trunk_from(model, tokenizer))
    with torch.no_grad():
        for parameter in factors.parameters():
            parameter.mul_(4)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "checkpoint"
        path.mkdir()
        save_base(model, tokenizer, path / "base")
        save_checkpoint(path, checkpoint, factors, fit_centroids(embeddings, 3, seed)[: checkpoint.num_clusters])
        loaded = load_checkpoint(path)
        if conditioning_size:
            add_encoder(loaded, save_encoder(path / "encoder", size=conditioning_size))
        export_bundle(loaded, out)


def adapter_cases() -> list[dict[str, Any]]:
    """Files that are loaded as adapters, and the code that refuses each; null for one that is loaded.

    The bundle has one adapter of its own, named "own".
    """
    from safetensors.numpy import save

    digest = "c0de" * 16
    changes = [
        {"do": "set", "path": ["adaptation", "adapters"], "value": ["own"]},
        {"do": "set", "path": ["adaptation", "base_digest"], "value": digest},
    ]
    metadata = {"format": "chameleon-adapter", "format_version": "1", "base_digest": digest, "targets": '["lm_head"]'}
    A = (np.arange(HIDDEN, dtype=np.float32) % 5 - 2)[None] / 8
    B = (np.arange(VOCAB_SIZE, dtype=np.float32) % 7 - 3)[None] / 4
    good = {"lm_head.lora_A": A, "lm_head.lora_B": B}
    cases: list[dict[str, Any]] = []

    def case(name: str, code: str | None, content: bytes, changed: list[dict[str, Any]] = changes) -> None:
        encoded = base64.b64encode(content).decode()
        cases.append({"name": name, "base": "lora_masked", "code": code, "changes": changed, "base64": encoded})

    def with_metadata(**values: str) -> bytes:
        return save(good, metadata | values)

    def with_tensors(**tensors: Any) -> bytes:
        named = {name.replace("lora", "lm_head.lora"): array for name, array in tensors.items()}
        return save({name: array for name, array in (good | named).items() if array is not None}, metadata)

    def with_header(data: bytes, **tensors: Any) -> bytes:
        header = json.dumps({"__metadata__": metadata} | {f"lm_head.{name}": value for name, value in tensors.items()})
        return len(header).to_bytes(8, "little") + header.encode() + data

    def entry(begin: int, width: int, dtype: str = "F32") -> dict[str, Any]:
        return {
            "dtype": dtype,
            "shape": [1, width],
            "data_offsets": [begin, begin + width * (2 if "16" in dtype else 4)],
        }

    both, size = A.tobytes() + B.tobytes(), A.nbytes
    case("good", None, save(good, metadata))
    case("of_another_rank", None, with_tensors(lora_A=np.tile(A, (3, 1)), lora_B=np.tile(B, (3, 1))))
    case("its_logits_overflow", None, with_tensors(lora_B=np.full_like(B, 3e38)))
    case("a_target_twice", None, with_metadata(targets='["lm_head", "lm_head"]'))
    # Where it comes from
    case("a_bundle_without_adapters", "adapter_invalid", save(good, metadata), [])
    case("no_metadata", "adapter_invalid", save(good))
    for field, value in (("format", "pt"), ("format_version", "2"), ("base_digest", "0" * 64)):
        case(f"another_{field}", "adapter_invalid", with_metadata(**{field: value}))
    for name, targets in {
        "no_JSON": "[", "empty": "[]", "a_number": "7", "an_object": '{"lm_head": 1}', "nested": '[["lm_head"]]',
        "of_no_layer": '["transformer.h.0.attn.c_attn"]', "numbers": "[1]",
    }.items():  # fmt: skip
        case(f"targets_{name}", "adapter_invalid", with_metadata(targets=targets))
    # What activates it
    case("activated", None, with_metadata(invocation_tokens="[3, 5]"))
    for name, tokens in {
        "no_JSON": "[", "empty": "[]", "a_number": "7", "a_text": '["3"]', "a_float": "[3.0]", "true": "[true]",
        "negative": "[-1]", "beyond": f"[3, {VOCAB_SIZE}]", "too_many": str([3] * 257),
        "huge": "[18446744073709551616]",
    }.items():  # fmt: skip
        case(f"invocation_tokens_{name}", "adapter_invalid", with_metadata(invocation_tokens=tokens))
    own = {"do": "set", "path": ["adaptation", "invocation_tokens"], "value": {"own": [9]}}
    case("beside_an_activated_adapter", None, save(good, metadata), [*changes, own])
    # Its tensors
    for part in ("lora_A", "lora_B"):
        case(f"no_{part}", "tensor_invalid", with_tensors(**{part: None}))
    case("no_tensors", "tensor_invalid", with_tensors(lora_A=None, lora_B=None))
    case("another_tensor", "tensor_invalid", with_tensors(lora_C=A))
    case("another_width", "tensor_invalid", with_tensors(lora_A=A[:, 1:]))
    case("another_rank_of_A", "tensor_invalid", with_tensors(lora_A=np.tile(A, (2, 1))))
    case("rank_0", "tensor_invalid", with_tensors(lora_A=A[:0], lora_B=B[:0]))
    case("one_dimension", "tensor_invalid", with_tensors(lora_A=A[0], lora_B=B[0]))
    case("no_dimension", "tensor_invalid", with_tensors(lora_A=np.array(A[0, 0]), lora_B=np.array(B[0, 0])))
    for dtype in (np.float64, np.float16, np.int32):
        case(f"of_{np.dtype(dtype)}", "tensor_invalid", with_tensors(lora_A=A.astype(dtype)))
    halved = with_header(both[size // 2 :], lora_A=entry(0, HIDDEN, "BF16"), lora_B=entry(size // 2, VOCAB_SIZE))
    case("of_bfloat16", "tensor_invalid", halved)
    for bad in ("nan", "inf"):
        case(f"of_{bad}", "tensor_invalid", with_tensors(lora_A=np.full_like(A, float(bad))))
    # The file
    case("empty", "adapter_invalid", b"")
    case("text", "adapter_invalid", b"no adapter")
    case("cut", "adapter_invalid", save(good, metadata)[:-1])
    case("longer", "adapter_invalid", save(good, metadata) + b"\0")
    case("a_header_beyond_the_file", "adapter_invalid", b"\xff" * 8 + save(good, metadata)[8:])
    case("an_unknown_dtype", "adapter_invalid", with_header(both, lora_A=entry(0, HIDDEN, "F33")))
    for name, lora_A in {
        "claims_more_than_there_is": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, size]},
        "overlaps": entry(4, HIDDEN),
        "ends_before_it_begins": {"dtype": "F32", "shape": [1, HIDDEN], "data_offsets": [size, 0]},
    }.items():
        case(name, "adapter_invalid", with_header(both, lora_A=lora_A, lora_B=entry(size, VOCAB_SIZE)))
    hole = with_header(both + b"\0" * 4, lora_A=entry(0, HIDDEN), lora_B=entry(size + 4, VOCAB_SIZE))
    case("a_hole", "adapter_invalid", hole)
    for c in cases:
        with tempfile.TemporaryDirectory() as directory:
            bundle, file = adapter_case(c, Path(directory))
            found = code_of(chameleon_deploy.load(bundle).load_adapter, "legal", file)
            if found != c["code"]:
                sys.exit(f"{c['name']}: {found}, expected {c['code']}")
    return cases


def signature_cases() -> dict[str, list[dict[str, Any]]]:
    """Keys are made of fixed numbers, and Ed25519 has no randomness: the same bundles give the same signatures."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, x25519
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    signers = {name: ed25519.Ed25519PrivateKey.from_private_bytes(name.encode() * 32) for name in "abc"}
    others: dict[str, Any] = {
        "x25519": x25519.X25519PrivateKey.from_private_bytes(b"x" * 32),
        "p256": ec.derive_private_key(7, ec.SECP256R1()),
    }
    pem = {
        name: key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        for name, key in (signers | others).items()
    }
    private = signers["a"].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    keys = pem | {
        "private": private,
        "empty": "",
        "garbage": "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
    }
    content, another = (
        (good_bundle(name) / "bundle.json").read_bytes() for name in ("chameleon_masked", "lora_masked")
    )
    right = signers["a"].sign(content)
    order = 2**252 + 27742317777372353535851937790883648493
    larger = right[:32] + (int.from_bytes(right[32:], "little") + order).to_bytes(32, "little")
    cases: list[dict[str, Any]] = []

    def case(
        name: str, code: str | None, signature: bytes | None, trusted: list[str] | None, *changes: dict[str, Any]
    ) -> None:
        encoded = None if signature is None else base64.b64encode(signature).decode()
        cases.append({"name": name, "base": "chameleon_masked", "code": code, "signature": encoded,
                      "trusted": trusted, "changes": list(changes)})  # fmt: skip

    case("trusted", None, right, ["a"])
    case("one_of_several", None, right, ["c", "b", "a"])
    case("not_asked_for", None, right[:10], None)
    case("unsigned", "signature_invalid", None, ["a"])
    case("of_another_key", "signature_invalid", right, ["b", "c"])
    case("of_another_bundle", "signature_invalid", signers["a"].sign(another), ["a"])
    case("bundle_changed", "signature_invalid", right, ["a"], {"do": "append", "file": "bundle.json", "text": "\n"})
    case("not_parsed_first", "signature_invalid", right, ["a"], {"do": "truncate", "file": "bundle.json", "size": 99})
    case("file_changed", "digest_mismatch", right, ["a"], {"do": "flip", "file": "weights.bin", "offset": 1000})
    for name, signature in {
        "empty": b"", "short": right[:-1], "long": right + b"\0", "zero": bytes(64),
        "flipped": bytes([right[0] ^ 1]) + right[1:],
        "flipped_at_the_end": right[:-1] + bytes([right[-1] ^ 1]), "scalar_too_large": larger,
        "hexadecimal": right.hex().encode(),
    }.items():  # fmt: skip
        case(name, "signature_invalid", signature, ["a"])
    link = {"do": "symlink", "file": "bundle.json.sig", "target": "weights.bin"}
    case("a_link", "signature_invalid", None, ["a"], link)
    case("a_link_not_asked_for", "path_unsafe", None, None, link)
    case("a_directory", "signature_invalid", None, ["a"], {"do": "mkdir", "file": "bundle.json.sig"})
    case("a_directory_not_asked_for", "file_unknown", None, None, {"do": "mkdir", "file": "bundle.json.sig"})
    case("no_keys", "input_invalid", right, [])
    for name in (*others, "private", "empty", "garbage", "missing"):
        case(f"key_{name}", "input_invalid", right, ["a", name])
    return {"keys": [{"name": name, "pem": text} for name, text in keys.items()], "cases": cases}


def hostile_cases() -> list[dict[str, Any]]:
    """Every case is tried here first: a code that the Python runtime does not give is an error of this script."""
    cases: list[dict[str, Any]] = []

    def case(name: str, code: str, *changes: dict[str, Any], base: str = "chameleon_masked") -> None:
        cases.append({"name": name, "base": base, "code": code, "changes": list(changes)})

    def manifest(value: Any, *path: str) -> dict[str, Any]:
        return {"do": "set", "path": list(path), "value": value}

    def without(*path: str) -> dict[str, Any]:
        return {"do": "unset", "path": list(path)}

    def written(file: str, content: bytes, times: int = 1) -> dict[str, Any]:
        return {"do": "write", "file": file, "base64": base64.b64encode(content).decode(), "times": times}

    def tensors(file: str, **arrays: Any) -> list[dict[str, Any]]:
        from safetensors.numpy import save

        return [written(file, save(arrays)), {"do": "redigest", "file": file}]

    # The directory
    case("not_a_bundle", "bundle_not_found", {"do": "delete", "file": "bundle.json"})
    case("missing_file", "file_missing", {"do": "delete", "file": "weights.bin"})
    case("missing_parity", "file_missing", {"do": "delete", "file": "parity.json"})
    case(
        "directory_for_file",
        "file_missing",
        {"do": "delete", "file": "parity.json"},
        {"do": "mkdir", "file": "parity.json"},
    )
    case("extra_file", "file_unknown", written("plugin.so", b"\x7fELF"))
    case("extra_hidden_file", "file_unknown", written(".hidden", b""))
    case("extra_directory", "file_unknown", {"do": "mkdir", "file": "cache"})
    case("symlink", "path_unsafe", {"do": "delete", "file": "weights.bin"},
         {"do": "symlink", "file": "weights.bin", "target": "/etc/hostname"})  # fmt: skip
    case("symlink_not_listed", "path_unsafe", {"do": "symlink", "file": "extra", "target": "bundle.json"})
    # Digests
    for file in ("weights.bin", "decoder.onnx", "tokenizer.json", "centroids.safetensors"):
        case(f"truncated_{file}", "digest_mismatch", {"do": "truncate", "file": file, "size": 100})
    case("empty_weights", "digest_mismatch", {"do": "truncate", "file": "weights.bin", "size": 0})
    case("one_byte_changed", "digest_mismatch", {"do": "flip", "file": "weights.bin", "offset": 1000})
    case("wrong_size", "digest_mismatch", manifest(1, "files", "parity.json", "size"))
    case("negative_size", "digest_mismatch", manifest(-1, "files", "parity.json", "size"))
    case("wrong_digest", "digest_mismatch", manifest("0" * 64, "files", "parity.json", "sha256"))
    case("uppercase_digest", "digest_mismatch", manifest("A" * 64, "files", "parity.json", "sha256"))
    # The manifest as JSON
    case("empty_manifest", "manifest_invalid", written("bundle.json", b""))
    case("half_a_manifest", "manifest_invalid", {"do": "truncate", "file": "bundle.json", "size": 1500})
    case("not_utf8", "manifest_invalid", written("bundle.json", b'{"format": "\xff"}'))
    case("a_list", "manifest_invalid", written("bundle.json", b"[]"))
    case("null", "manifest_invalid", written("bundle.json", b"null"))
    case("nested_lists", "manifest_invalid", written("bundle.json", b"[", 100_000))
    case("nested_objects", "manifest_invalid", written("bundle.json", b'{"a":', 100_000))
    case("nan", "manifest_invalid", written("bundle.json", b'{"format": NaN}'))
    case("trailing_text", "manifest_invalid", {"do": "append", "file": "bundle.json", "text": "{}"})
    case("other_format", "manifest_invalid", manifest("chameleon-checkpoint", "format"))
    case("no_format", "manifest_invalid", without("format"))
    for version in (0, 2, 99, "1", None):
        case(f"version_{version}", "version_unsupported", manifest(version, "format_version"))
    case("no_version", "version_unsupported", without("format_version"))
    # Its fields
    case("unknown_field", "manifest_invalid", manifest(1, "surprise"))
    case("unknown_model_field", "manifest_invalid", manifest(1, "model", "surprise"))
    case("unknown_graph_field", "manifest_invalid", manifest("x", "graphs", "decoder", "custom_op_library"))
    for field in ("model", "adaptation", "graphs", "files", "token_embedding", "parameters", "limits", "tools",
                  "parity"):  # fmt: skip
        case(f"no_{field}", "manifest_invalid", without(field))
    case("rank_is_text", "manifest_invalid", manifest("2", "adaptation", "rank"))
    case("rank_is_float", "manifest_invalid", manifest(2.5, "adaptation", "rank"))
    case("rank_is_true", "manifest_invalid", manifest(True, "adaptation", "rank"))
    case("rank_zero", "manifest_invalid", manifest(0, "adaptation", "rank"))
    case("rank_null", "manifest_invalid", manifest(None, "adaptation", "rank"))
    case("precision_unknown", "manifest_invalid", manifest("fp8", "precision"))
    case("regime_unknown", "manifest_invalid", manifest("ia3", "adaptation", "regime"))
    case("protocol_unknown", "manifest_invalid", manifest("author", "adaptation", "protocol"))
    case("role_unknown", "manifest_invalid", manifest("encoder", "graphs", "decoder", "role"))
    case("role_of_an_older_export", "manifest_invalid", manifest("scorer", "graphs", "hidden_scorer", "role"))
    case("determinism_of_an_older_export", "manifest_invalid", manifest(["F", "R"], "determinism"))
    case("modes_of_an_older_export", "manifest_invalid", manifest(["none", "static"], "adaptation", "modes"))
    head = {"name": "lm_head", "in_features": HIDDEN, "out_features": VOCAB_SIZE}
    case("no_targets", "manifest_invalid", without("adaptation", "targets"))
    for name, targets in {
        "empty": [],
        "twice": [head, head],
        "no_name": [{**head, "name": ""}],
        "no_features": [{**head, "in_features": 0}],
        "other_features": [{**head, "out_features": VOCAB_SIZE + 1}],
        "of_no_graph": [{**head, "name": "transformer.h.0.attn.c_attn"}],
        "too_many": [head, {**head, "name": "transformer.h.0.attn.c_attn"}],
    }.items():
        case(f"targets_{name}", "manifest_invalid", manifest(targets, "adaptation", "targets"))
    own = manifest(["own"], "adaptation", "adapters"), manifest("0" * 64, "adaptation", "base_digest")
    for name, tokens in {
        "of_no_adapter": {"other": [3]}, "empty": {"own": []}, "too_many": {"own": [3] * 257}, "a_list": [3],
        "negative": {"own": [-1]}, "beyond": {"own": [VOCAB_SIZE]}, "a_text": {"own": ["3"]}, "a_float": {"own": [3.5]},
    }.items():  # fmt: skip
        case(f"invocation_tokens_{name}", "manifest_invalid", *own, manifest(tokens, "adaptation", "invocation_tokens"),
             base="lora_masked")  # fmt: skip
    case("negative_clusters", "manifest_invalid", manifest(-1, "adaptation", "num_clusters"))
    for size in (-1, 5, 2**31):  # none goes with clusters
        case(f"conditioning_size_{size}", "manifest_invalid", manifest(size, "adaptation", "conditioning_size"))
    given = "chameleon_given"
    case("conditioning_size_is_text", "manifest_invalid", manifest("5", "adaptation", "conditioning_size"), base=given)
    for size in (-1, 0, 4, HIDDEN, 2**31):
        case(f"given_conditioning_size_{size}", "manifest_invalid", manifest(size, "adaptation", "conditioning_size"),
             base=given)  # fmt: skip
    case("given_clusters", "manifest_invalid", manifest(3, "adaptation", "num_clusters"), base=given)
    case("given_regime_lora", "manifest_invalid", manifest("lora", "adaptation", "regime"), base=given)
    for field, value in {
        "size": 4, "vocab_size": 0, "max_tokens": 2, "prefix_ids": [99], "suffix_ids": [-1], "conditioning_norm": -1.0,
        "full_stop": 1, "pooling": "cls",
    }.items():  # fmt: skip
        case(f"encoder_{field}", "manifest_invalid", manifest(value, "encoder", field), base=given)
    case("encoder_without_size", "manifest_invalid", without("encoder", "size"), base=given)
    case("encoder_graph_alone", "manifest_invalid", without("encoder"), base=given)
    case("encoder_without_a_graph", "manifest_invalid", without("graphs", "encoder"), base=given)
    case("encoder_of_floats", "manifest_invalid", manifest("float32", "graphs", "encoder", "inputs", "0", "dtype"),
         base=given)  # fmt: skip
    case("encoder_not_for_cpu", "manifest_invalid", manifest(["cuda"], "graphs", "encoder", "providers"), base=given)
    case("encoder_tokenizer_not_listed", "manifest_invalid", without("files", ENCODER_TOKENIZER), base=given)
    case("encoder_tokenizer_pads", "manifest_invalid",
         {"do": "set", "file": ENCODER_TOKENIZER, "path": ["padding"], "value": {}},
         {"do": "redigest", "file": ENCODER_TOKENIZER}, base=given)  # fmt: skip
    case("max_length_zero", "manifest_invalid", manifest(0, "adaptation", "max_length"))
    case("eos_out_of_range", "manifest_invalid", manifest(VOCAB_SIZE, "model", "eos_token_id"))
    case("eos_negative", "manifest_invalid", manifest(-1, "model", "eos_token_id"))
    case("layers_zero", "manifest_invalid", manifest(0, "model", "num_layers"))
    case("vocab_differs", "manifest_invalid", manifest(VOCAB_SIZE + 1, "model", "vocab_size"))
    for limit in ("batch", "sequence", "past", "factor_sets"):
        case(f"limit_{limit}_zero", "manifest_invalid", manifest(0, "limits", limit))
    case("limit_sequence_beyond_positions", "manifest_invalid", manifest(POSITIONS + 1, "limits", "sequence"))
    case("limit_past_beyond_positions", "manifest_invalid", manifest(POSITIONS, "limits", "past"))
    case("limit_missing", "manifest_invalid", without("limits", "past"))
    case("limit_unknown", "manifest_invalid", manifest(1, "limits", "beams"))
    case("no_decoder", "manifest_invalid", without("graphs", "decoder"), without("graphs", "decoder_cpu"))
    case("no_hypernetwork", "manifest_invalid", without("graphs", "hypernetwork"))
    case("no_hidden_scorer", "manifest_invalid", without("graphs", "hidden_scorer"))
    for_cuda = [manifest(["cuda"], "graphs", name, "providers") for name in ("decoder", "decoder_cpu")]
    case("no_graph_for_cpu", "manifest_invalid", *for_cuda)
    case("cache_unknown", "manifest_invalid", manifest("paged", "graphs", "decoder_cpu", "cache"))
    case("cache_missing", "manifest_invalid", without("graphs", "decoder_cpu", "cache"))
    case("cache_does_not_fit", "manifest_invalid", manifest(None, "graphs", "decoder_cpu", "cache"))
    case("cache_of_a_hypernetwork", "manifest_invalid", manifest("shared", "graphs", "hypernetwork", "cache"))
    case("tokenizer_not_listed", "manifest_invalid", without("files", "tokenizer.json"))
    case("graph_not_listed", "manifest_invalid", manifest("other.onnx", "graphs", "decoder", "file"))
    case("centroids_not_listed", "manifest_invalid", without("files", "centroids.safetensors"))
    case("embedding_shape", "manifest_invalid", manifest([HIDDEN, VOCAB_SIZE], "token_embedding", "shape"))
    case("embedding_beyond_file", "manifest_invalid", manifest(10**9, "token_embedding", "offset"))
    case("embedding_far_beyond_file", "manifest_invalid", manifest(2**63 - 1, "token_embedding", "offset"))
    case("embedding_before_file", "manifest_invalid", manifest(-4, "token_embedding", "offset"))
    case("embedding_overflows", "manifest_invalid", manifest(2**62, "model", "vocab_size"),
         manifest([2**62, HIDDEN], "token_embedding", "shape"))  # fmt: skip
    case("embedding_dtype", "manifest_invalid", manifest("float64", "token_embedding", "dtype"))
    case("embedding_int8_without_scales", "manifest_invalid", manifest("int8", "token_embedding", "dtype"))
    case("embedding_rotated_in_float32", "manifest_invalid", manifest(4, "token_embedding", "rotation"))
    int8 = {"dtype": "int8", "row_scales_offset": 0, "channel_scales_offset": 0, "rotation": 4}
    for field, values in {"row_scales_offset": (-4, 2**63 - 1), "channel_scales_offset": (-4, 10**9),
                          "rotation": (-4, 0, 2, 64, 2**62)}.items():  # fmt: skip
        for value in values:
            stored = {**int8, field: value}
            case(f"embedding_{field}_{value}", "manifest_invalid",
                 *(manifest(new, "token_embedding", name) for name, new in stored.items()))  # fmt: skip
    # Its dimensions against the inputs and outputs of the graphs
    for field, values in {
        "num_layers": (1, 3, 2 * 10**9, 2**63, 10**30),
        "num_attention_heads": (3,),
        "num_key_value_heads": (1, 4),
        "head_dim": (4,),
        "max_positions": (2**31,),
    }.items():
        for value in values:
            case(f"{field}_{value}", "manifest_invalid", manifest(value, "model", field))
    case("rank_differs", "manifest_invalid", manifest(8, "adaptation", "rank"))
    for precision in ("int8", "fp16"):
        case(f"precision_{precision}", "manifest_invalid", manifest(precision, "precision"))
    case("cache_is_growing", "manifest_invalid", manifest("shared", "graphs", "decoder", "cache"))
    case("cache_is_shared", "manifest_invalid", manifest("growing", "graphs", "decoder_cpu", "cache"))
    case("role_differs", "manifest_invalid", manifest("logits_scorer", "graphs", "chooser", "role"))
    inputs = ("graphs", "decoder_cpu", "inputs")
    case("input_name", "manifest_invalid", manifest("ids", *inputs, "0", "name"))
    case("input_dtype", "manifest_invalid", manifest("float32", *inputs, "0", "dtype"))
    case("input_shape", "manifest_invalid", manifest(["batch", 7], *inputs, "0", "shape"))
    case("input_missing", "manifest_invalid", without(*inputs, "1"))
    case("input_twice", "manifest_invalid", manifest("position_ids", *inputs, "0", "name"))
    case("output_missing", "manifest_invalid", without("graphs", "hypernetwork", "outputs", "1"))
    case("hypernetwork_rank", "manifest_invalid",
         manifest(["factor_sets", 3, HIDDEN], "graphs", "hypernetwork", "outputs", "0", "shape"))  # fmt: skip
    case("chooser_vocab", "manifest_invalid",
         manifest(["batch", "positions", VOCAB_SIZE - 1], "graphs", "chooser", "inputs", "0", "shape"))  # fmt: skip
    case("scorer_hidden_size", "manifest_invalid",
         manifest(["positions", 8], "graphs", "hidden_scorer", "inputs", "0", "shape"))  # fmt: skip
    # Paths
    entry = {"size": 0, "sha256": "0" * 64}
    for number, name in enumerate(
        ("../weights.bin", "/etc/passwd", "a/b", "..", ".hidden", "a\\b", "a\nb", "", "é", "a b")
    ):
        case(f"path_{number}", "path_unsafe", manifest(entry, "files", name))
    case("path_too_long", "path_unsafe", manifest(entry, "files", "x" * 256))
    # Tensors
    good = np.zeros((3, HIDDEN), np.float32)
    nan = good.copy()
    nan[1, 2] = np.nan
    case("centroids_shape", "tensor_invalid", *tensors("centroids.safetensors", centroids=good[:2]))
    case("centroids_dtype", "tensor_invalid", *tensors("centroids.safetensors", centroids=good.astype(np.float64)))
    case("centroids_nan", "tensor_invalid", *tensors("centroids.safetensors", centroids=nan))
    case("centroids_infinite", "tensor_invalid", *tensors("centroids.safetensors", centroids=good + np.inf))
    case("centroids_name", "tensor_invalid", *tensors("centroids.safetensors", means=good))
    case("centroids_extra", "tensor_invalid", *tensors("centroids.safetensors", centroids=good, more=good))
    redigest = {"do": "redigest", "file": "centroids.safetensors"}
    case("centroids_empty", "tensor_invalid", written("centroids.safetensors", b""), redigest)
    case("centroids_header_too_long", "tensor_invalid", written("centroids.safetensors", b"\xff" * 8 + b"{}"), redigest)
    case(
        "centroids_header_not_json",
        "tensor_invalid",
        written("centroids.safetensors", b"\x02" + b"\0" * 7 + b"xx"),
        redigest,
    )
    header = b'{"centroids":{"dtype":"F32","shape":[3,16],"data_offsets":[0,192]}}'
    length = len(header).to_bytes(8, "little")
    case("centroids_cut", "tensor_invalid", written("centroids.safetensors", length + header + b"\0" * 100), redigest)
    case("centroids_rest", "tensor_invalid", written("centroids.safetensors", length + header + b"\0" * 200), redigest)
    lora_A, lora_B = np.zeros((1, 2, HIDDEN), np.float32), np.zeros((1, 2, VOCAB_SIZE), np.float32)
    lora, (name_A, name_B) = "lora_masked", factor_names(LM_HEAD)
    case(
        "lora_rank",
        "tensor_invalid",
        *tensors("lora.safetensors", **{name_A: lora_A[:, :1], name_B: lora_B[:, :1]}),
        base=lora,
    )
    case("lora_nan", "tensor_invalid", *tensors("lora.safetensors", **{name_A: lora_A + np.nan, name_B: lora_B}),
         base=lora)  # fmt: skip
    case("lora_half", "tensor_invalid", *tensors("lora.safetensors", **{name_A: lora_A}), base=lora)
    case("lora_without_target", "tensor_invalid", *tensors("lora.safetensors", lora_A=lora_A, lora_B=lora_B), base=lora)
    # Graphs
    case(
        "not_onnx",
        "graph_invalid",
        written("decoder_cpu.onnx", b"not a graph"),
        {"do": "redigest", "file": "decoder_cpu.onnx"},
    )
    case(
        "half_a_graph",
        "graph_invalid",
        {"do": "truncate", "file": "decoder_cpu.onnx", "size": 3000},
        {"do": "redigest", "file": "decoder_cpu.onnx"},
    )
    case(
        "empty_graph",
        "graph_invalid",
        written("hypernetwork.onnx", b""),
        {"do": "redigest", "file": "hypernetwork.onnx"},
    )
    for name, model in hostile_models().items():
        replaced = written("hypernetwork.onnx", model)
        case(f"graph_{name}", "graph_invalid", replaced, {"do": "redigest", "file": "hypernetwork.onnx"})
    case("graphs_swapped", "graph_invalid", manifest("hypernetwork.onnx", "graphs", "decoder_cpu", "file"))
    embedding_only = {"do": "truncate", "file": "weights.bin", "size": 4 * VOCAB_SIZE * HIDDEN}
    case("weights_too_short_for_graph", "graph_invalid", embedding_only, {"do": "redigest", "file": "weights.bin"})
    # The tokenizer
    for name, content in (("not_json", b"{"), ("no_model", b"{}"), ("empty", b"")):
        case(
            f"tokenizer_{name}",
            "manifest_invalid",
            written("tokenizer.json", content),
            {"do": "redigest", "file": "tokenizer.json"},
        )
    options: dict[str, tuple[list[str], Any]] = {
        "truncation": (
            ["truncation"],
            {"direction": "Right", "max_length": 32, "strategy": "LongestFirst", "stride": 0},
        ),
        "padding": (
            ["padding"],
            {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
             "pad_type_id": 0, "pad_token": "<|endoftext|>"},
        ),
        "dropout": (["model", "dropout"], 0.1),
        # Found by mutated bundles, where the languages differed
        "flag_is_text": (["pre_tokenizer", "trim_offsets"], "fp16"),
        "decoder_flag_is_text": (["decoder", "use_regex"], "x"),
        "template_is_true": (["post_processor", "single", "0", "Sequence"], True),
        "template_without_text": (["post_processor", "single"], []),
        "template_of_an_unknown_token": (
            ["post_processor", "single", "0"],
            {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
        ),
        "type_id_negative": (["post_processor", "pair", "0", "Sequence", "type_id"], -1),
        "fuse_unk_null": (["model", "fuse_unk"], None),
        "merge_is_text": (["model", "merges", "0"], "a b"),
        "merge_of_three": (["model", "merges", "0"], ["a", "b", "c"]),
        "id_too_large": (["model", "vocab", "a"], 2**24),
        "id_is_float": (["model", "vocab", "a"], 1.5),
        "version": (["version"], "2.0"),
        "unknown_field": (["surprise"], 1),
    }  # fmt: skip
    changes: dict[str, dict[str, Any]] = {
        name: {"do": "set", "path": place, "value": value} for name, (place, value) in options.items()
    }
    for place in (["padding"], ["added_tokens", "0", "special"], ["model", "byte_fallback"], ["post_processor"]):
        changes[f"no_{place[-1]}"] = {"do": "unset", "path": place}
    redigest = {"do": "redigest", "file": "tokenizer.json"}
    for name, change in changes.items():
        case(f"tokenizer_{name}", "manifest_invalid", {**change, "file": "tokenizer.json"}, redigest)
    for c in cases:
        with tempfile.TemporaryDirectory() as directory:
            found = code_of(chameleon_deploy.load, hostile_bundle(c, Path(directory) / "bundle"))
            if found != c["code"]:
                sys.exit(f"{c['name']}: {found}, expected {c['code']}")
    return cases


def hostile_models() -> dict[str, bytes]:
    """Graphs that ONNX Runtime would take, hang on, or fill the memory with."""
    from onnx import TensorProto, helper

    def model(*nodes: Any, initializers: Any = (), domains: Any = ("",)) -> Any:
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("conditioning", "y")]
        graph = helper.make_graph(nodes, "graph", values[:1], values[1:], initializers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid(domain, 20) for domain in domains])

    def constant(name: str, **value: Any) -> Any:
        return helper.make_node("Constant", [], [name], **value)

    condition = helper.make_tensor_value_info("go_on", TensorProto.BOOL, [])
    body = helper.make_graph(
        [helper.make_node("Equal", ["i", "i"], ["go_on"])], "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("c", 9, [])],
        [condition],
    )  # fmt: skip
    relu = helper.make_node("Relu", ["conditioning"], ["y"])
    one, many = constant("one", value_float=1.0), constant("many", value_ints=[30_000, 30_000])
    loop = helper.make_node("Loop", ["", ""], ["y"], body=body)

    def branch_of(node: Any) -> Any:
        return helper.make_graph([node], "branch", [], [helper.make_tensor_value_info("y", 1, ["n"])])

    nested = relu
    for _ in range(5):
        branch = branch_of(nested)
        nested = helper.make_node("If", ["conditioning"], ["y"], then_branch=branch, else_branch=branch)
    outside = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    outside.ClearField("float_data")
    outside.data_location = TensorProto.EXTERNAL
    outside.external_data.add(key="location", value="../weights.bin")
    unfilled = TensorProto(name="w", dims=[2**40, 2**40], data_type=TensorProto.FLOAT)
    size = (good_bundle("chameleon_masked") / "weights.bin").stat().st_size

    def all_weights(name: str, **values: Any) -> Any:
        """The bytes of weights.bin as another constant."""
        tensor = TensorProto(name=name, data_type=TensorProto.INT8, data_location=TensorProto.EXTERNAL, **values)
        tensor.external_data.add(key="location", value="weights.bin")
        return tensor

    names = [f"w{i}" for i in range(20)]
    casts = [helper.make_node("Cast", [name], [f"{name}.double"], to=TensorProto.DOUBLE) for name in names[:4]]
    chain = [
        helper.make_node("Cast", [name], [to], to=TensorProto.FLOAT if i % 2 else TensorProto.FLOAT16)
        for i, (name, to) in enumerate(itertools.pairwise(names))
    ]
    turned = [helper.make_node("Transpose", ["w0"], [f"t{i}"], perm=[1, 0]) for i in range(20)]
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [], [1.0])
    floats = [helper.make_node("DequantizeLinear", ["w0", "scale"], [f"f{i}"]) for i in range(4)]
    functions = model(relu)
    functions.functions.add(name="f", domain="")
    sparse = model(relu)
    sparse.graph.sparse_initializer.add(dims=[2**40])
    models = {
        "loop": model(loop),
        "loop_in_a_branch": model(
            helper.make_node("If", ["conditioning"], ["y"], then_branch=branch_of(loop), else_branch=branch_of(relu))
        ),
        "folded_to_3_6_gb": model(one, many, helper.make_node("Expand", ["one", "many"], ["y"])),
        "other_domain": model(helper.make_node("Relu", ["conditioning"], ["y"], domain="evil"), domains=("", "evil")),
        "unused_domain": model(relu, domains=("", "evil")),
        "function": functions,
        "sparse": sparse,
        "nested_graphs": model(nested),
        "external_data_elsewhere": model(relu, initializers=[outside]),
        "more_elements_than_values": model(relu, initializers=[unfilled]),
        # Of weights.bin, half of the bundle's bytes
        "weights_named_often": model(relu, initializers=[all_weights(n, dims=[size]) for n in names]),
        "weights_folded_to_double": model(*casts, relu, initializers=[all_weights(n, dims=[size]) for n in names[:4]]),
        "weights_folded_in_a_chain": model(*chain, relu, initializers=[all_weights("w0", dims=[size])]),
        "weights_transposed_often": model(*turned, relu, initializers=[all_weights("w0", dims=[size // 2, 2])]),
        "weights_dequantized_often": model(*floats, relu, initializers=[all_weights("w0", dims=[size]), scale]),
        "constant_twice": model(relu, initializers=[scale, scale]),
        "reads_what_comes_later": model(helper.make_node("Expand", ["one", "many"], ["y"]), one, many),
    }
    return {name: model.SerializeToString() for name, model in models.items()}


def golden_cases() -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    cases = []
    for bundle, (regime, _, _, size) in BUNDLES.items():
        runtime = chameleon_deploy.load(good_bundle(bundle))
        for mode in runtime.manifest.adaptation.modes:
            for number in range(4):
                lengths = [1, 5, 2] if number == 0 else random.integers(1, 30, random.integers(1, 7)).tolist()
                case: dict[str, Any] = {
                    "bundle": bundle,
                    "mode": mode,
                    "rows": [random.integers(1, VOCAB_SIZE, n).tolist() for n in lengths],
                    "tenants": [f"t{n}" for n in random.integers(0, 2, len(lengths))] if mode == "tenant" else None,
                    "rank": 3 if mode == "static" and (regime == "chameleon" or number % 2) else None,
                    "max_new_tokens": int(random.integers(1, 12)),
                    "sampling": {
                        "temperature": float(random.choice([0.7, 1.0, 1.6])),
                        "top_k": int(random.choice([0, 20])),
                        "top_p": float(random.choice([1.0, 0.9])),
                        "repetition_penalty": float(random.choice([1.0, 1.2])),
                        "seed": int(random.integers(0, 2**63)),
                        "stop_token_ids": [9],
                        "stop": ["e", "\u00e9t"],
                    },
                }
                if size and mode == "request":
                    tasks = random.standard_normal((3, size)).astype(np.float32) / 8
                    chosen_tasks = random.integers(0, 3, len(lengths))
                    if number < 3:
                        case["conditioning"] = tasks[chosen_tasks].tolist()
                    else:
                        case["adapt_text"] = [DESCRIPTIONS[task] for task in chosen_tasks]
                cases.append(case | golden(runtime, case))
    return cases


def golden(runtime: Any, case: dict[str, Any]) -> dict[str, Any]:
    rows, how = case_arguments(case, runtime.manifest.model)
    adaptation = runtime.adapt(rows, **how)
    lora_B = np.asarray(adaptation.factors.sets.tensors[factor_names(LM_HEAD)[1]])
    limit, sampling = case["max_new_tokens"], Sampling(**case["sampling"])
    return {
        "cluster_ids": adaptation.cluster_ids.tolist(),
        "factor_ids": adaptation.factors.factor_ids.tolist(),
        "embeddings": adaptation.embeddings.tolist(),
        "lora_B_first": lora_B[:, 0, :4].tolist(),
        "token_logprobs": [score.token_logprobs for score in runtime.score(rows, **how)],
        "greedy": [vars(g) for g in runtime.generate(rows, max_new_tokens=limit, **how)],
        "sampled": [vars(g) for g in runtime.generate(rows, max_new_tokens=limit, sampling=sampling, **how)],
        "stream": [
            [token.row, token.token_id, token.text, token.generation is not None]
            for token in runtime.stream(rows, max_new_tokens=limit, sampling=sampling, **how)
        ],
    }


def sampling_cases() -> dict[str, list[Any]]:
    random = np.random.default_rng(1)
    places: list[Any] = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2**64 - 1, 2**31, 2**20)]
    places += [tuple(int(n) for n in random.integers(0, [2**62, 2**20, 2**20])) for _ in range(40)]
    # Numbers beyond 2^53 as text: not every JSON reader keeps them.
    numbers = [
        {"seed": str(seed), "stream": stream, "step": step, "u": uniform(seed, stream, step)}
        for seed, stream, step in places
    ]
    choices = [chosen(random_choice(random, 12)) for _ in range(300)]
    settings = [{"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 0.7, "top_k": 40},
                {"temperature": 3.0, "top_k": 4000, "top_p": 0.5}, {"temperature": 1e5, "top_p": 0.97}]  # fmt: skip
    longs = [chosen({"vocab_size": 50_257, **how, "u": float(random.random())}) for how in settings for _ in range(4)]
    reports = [reported({"logits": random_logits(random, 12), "token_id": 3, "count": n % 6}) for n in range(60)]
    reports += [reported({"vocab_size": 50_257, "token_id": token_id, "count": 5}) for token_id in (0, 40_000)]
    return {
        "uniform": numbers, "choose": choices + longs, "log_probabilities": reports, "settings": settings_cases(),
    }  # fmt: skip


def settings_cases() -> list[dict[str, Any]]:
    """Settings at their limits and beyond, for a vocabulary of 4,096 tokens; with the code that refuses them."""
    ids = list(range(MAX_BIASES + 1))
    cases: list[tuple[str | None, dict[str, Any]]] = [
        (None, {"stop": ["\u00e9" * MAX_STOP_CHARACTERS] + ["a"] * (MAX_STOP_STRINGS - 1)}),  # two bytes each
        ("input_invalid", {"stop": ["\u00e9" * (MAX_STOP_CHARACTERS + 1)]}),
        ("input_invalid", {"stop": ["a"] * (MAX_STOP_STRINGS + 1)}),
        ("input_invalid", {"stop": ["a", ""]}),
        (None, {"stop_token_ids": ids[:MAX_STOP_TOKEN_IDS]}),
        ("input_invalid", {"stop_token_ids": ids[: MAX_STOP_TOKEN_IDS + 1]}),
        (None, {"logit_bias": [[token_id, 1.0] for token_id in ids[:MAX_BIASES]]}),
        ("input_invalid", {"logit_bias": [[token_id, 1.0] for token_id in ids]}),
        ("input_invalid", {"logit_bias": [[5, 100.5]]}),
        (None, {"logit_bias": [[4095, 1.0]]}),
        ("token_invalid", {"logit_bias": [[5, 1.0], [4096, 1.0]]}),
    ]
    return [{"code": code, "settings": settings} for code, settings in cases]


def random_logits(random: np.random.Generator, size: int) -> list[float]:
    logits = np.round(random.standard_normal(size) * 3, int(random.integers(0, 4))).clip(-4, 4)  # ties are likely
    values: list[float] = logits.astype(np.float32).tolist()
    return values


def random_choice(random: np.random.Generator, size: int) -> dict[str, Any]:
    def some(count: int) -> list[int]:
        return [int(n) for n in random.integers(0, size, count)]

    allowed = (random.random(size) < 0.7).tolist()
    return {
        "logits": random_logits(random, size),
        "prompt": some(4),
        "generated": some(int(random.integers(0, 6))),
        "allowed": allowed if any(allowed) and random.random() < 0.2 else None,
        "u": float(random.choice([0.0, random.random(), 1 - 2.0**-53])),
        "temperature": float(random.choice([0.0, 0.3, 1.0, 4.0])),
        "top_k": int(random.integers(0, 14)),
        "top_p": float(random.choice([1.0, 0.95, 0.5, 0.01])),
        "repetition_penalty": float(random.choice([1.0, 1.5, 0.8])),
        "presence_penalty": float(random.choice([0.0, 0.6, -0.3])),
        "frequency_penalty": float(random.choice([0.0, 0.7, -0.1])),
        "logit_bias": sorted({n: float(random.choice([0.5, -100.0, 2.3])) for n in some(2)}.items())
        if random.random() < 0.3
        else [],
    }


def chosen(case: dict[str, Any]) -> dict[str, Any]:
    return case | {"token_id": choose(*choice_arguments(case))}


def reported(case: dict[str, Any]) -> dict[str, Any]:
    choice = log_probabilities(case_logits(case), case["token_id"], case["count"])
    return case | {"logprob": choice.logprob, "top_logprobs": choice.top_logprobs}


def schedule_cases() -> list[dict[str, Any]]:
    random = np.random.default_rng(3)
    cases = []
    for bundle in BUNDLES:
        runtime = chameleon_deploy.load(good_bundle(bundle))
        for _ in range(8):
            schedule = random_schedule(random, runtime)
            cases.append({"bundle": bundle, "schedule": schedule, "result": run_schedule(runtime, schedule)})
    return cases


def tokenizer_cases() -> dict[str, list[Any]]:
    tokenizer = chameleon_deploy.load(good_bundle("chameleon_masked")).tokenizer
    random = np.random.default_rng(2)
    texts = [
        "", " ", "Hello, world!", "The river runs.", "don't we'll they've I'm it's you're he'd 'S", "  leading",
        "trailing  ", "a\n\n\nb", "\t\ttabs", "x" * 300, " " * 300, "1234567890 12,345.67", "na\u00efve caf\u00e9",
        "\u00dcn\u00efc\u00f6d\u00e9", "\u65e5\u672c\u8a9e", "\u041f\u0440\u0438\u0432\u0435\u0442",
        "\u05e9\u05dc\u05d5\u05dd",
        "\u0928\u092e\u0938\u094d\u0924\u0947",
        "\U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469 \U0001f1e9\U0001f1ea",
        "\u0000\u0001\u001f\u007f\u0085", "a\u00a0b\u2003c\u3000d", "\u180e x", "\u200b\ufeff", "<|endoftext|>",
        "a<|endoftext|>b<|endoftext|>", "<|endoftext|", "\U0010ffff\U000e0001", "\u0e33\u0e4d", "x\u00b2\u00bd\u2167",
        "_under_score_", "def f(x):\n    return x['key']  # 'tis", "\ufffd", "e\u0301",
    ]  # fmt: skip
    for _ in range(100):
        points = random.choice([0x80, 0x250, 0x3000, 0x110000]) * random.random(random.integers(1, 20))
        texts.append("".join(chr(int(p)) for p in points if not 0xD800 <= p < 0xE000))
    encoded = [{"text": text, "token_ids": tokenizer.encode(text).ids} for text in texts]
    ids = [random.integers(0, VOCAB_SIZE + 5, random.integers(0, 9)).tolist() for _ in range(100)]
    decoded = [{"token_ids": row, "text": tokenizer.decode(row, skip_special_tokens=True)} for row in ids]
    invalid = [
        b"\xff",
        b"a\x80",
        b"\xc3",
        b"\xc0\x80",
        b"\xe0\x80\x80",
        b"\xed\xa0\x80",
        b"\xf0\x80\x80\x80",
        b"\xf4\x90\x80\x80",
        b"\xf5",
    ]
    return {"encode": encoded, "decode": decoded, "invalid": [base64.b64encode(raw).decode() for raw in invalid]}


if __name__ == "__main__":
    main()
