"""The reference model: a frozen Hugging Face model, which adapters.py updates.

This file is the definition that exported graphs are compared with. It is written to be read: no padding tricks, no
caching of factors, float32 throughout.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from chameleon_deploy.errors import CheckpointError, UnsupportedBaseError
from chameleon_deploy.reference import families
from chameleon_deploy.reference.chat_template import ChatTemplates
from chameleon_deploy.reference.families.spec import DecoderSpec
from chameleon_deploy.reference.gguf import converted, gguf_file


@dataclass
class Trunk:
    """A pretrained causal language model, frozen.

    causal_lm   the Hugging Face model
    tokenizer   the `tokenizers.Tokenizer` of its tokenizer.json
    gguf        the GGUF file that it was converted from
    transformers_tokenizer  what transformers makes of it, where that is another: it rebuilds some classes
    chat        its chat template
    """

    causal_lm: Any
    tokenizer: Any
    gguf: Path | None = None
    transformers_tokenizer: Any = None
    chat: ChatTemplates = ChatTemplates()  # noqa: RUF009  (immutable)

    @property
    def config(self) -> Any:
        return self.causal_lm.config

    @property
    def token_embedding(self) -> Tensor:
        """Return E [vocab, hidden]."""
        return cast(Tensor, self.causal_lm.get_input_embeddings().weight)

    @property
    def head_weight(self) -> Tensor:
        """Return the linear head's weight W [vocab, hidden]."""
        return cast(Tensor, self.causal_lm.get_output_embeddings().weight)

    @property
    def is_tied(self) -> bool:
        """Return whether the head's weight is the token embedding."""
        return self.head_weight.data_ptr() == self.token_embedding.data_ptr()

    @property
    def eos_token_id(self) -> int:
        eos = self.config.eos_token_id
        return int(eos[0] if isinstance(eos, list) else eos)

    @cached_property
    def spec(self) -> DecoderSpec:
        """Return the switches that make it a member of its family."""
        return families.decoder_spec(self.config)

    @property
    def max_positions(self) -> int:
        return self.spec.max_positions

    @property
    def num_key_value_heads(self) -> int:
        """Return the number of key-value heads, each of which several query heads may share."""
        return self.spec.num_key_value_heads

    @property
    def head_dim(self) -> int:
        """Return the number of channels of a head."""
        return self.spec.head_dim

    def num_parameters(self) -> int:
        """Return the number of parameters with tied weights counted once: 124,439,808 for GPT-2 small."""
        return sum(p.numel() for p in self.causal_lm.parameters())

    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Return in_features and out_features of every linear layer by its name, in the model's order."""
        from transformers.pytorch_utils import Conv1D

        shapes = {}
        for name, module in self.causal_lm.named_modules():
            if isinstance(module, Conv1D):  # GPT-2 stores weights as [in, out]
                shapes[name] = (int(module.weight.shape[0]), int(module.weight.shape[1]))
            elif isinstance(module, nn.Linear):
                shapes[name] = (module.in_features, module.out_features)
        return shapes

    def digest(self) -> str:
        """Return a SHA-256 of every weight with its name: the same for the same base, however it is stored."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.causal_lm.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()

    def drop_layers(self) -> None:
        """Free every weight except those of the embedding and the head, which are copied out of the mapped file.

        `hidden_states` cannot be called afterwards.
        """
        kept = {id(module): module for module in (self.causal_lm.get_input_embeddings(),
                                                  self.causal_lm.get_output_embeddings())}  # fmt: skip
        copies: dict[int, Tensor] = {}  # tied weights stay tied
        for module in kept.values():
            parameter = module.weight
            parameter.data = copies.setdefault(parameter.data_ptr(), parameter.detach().clone())
        for module in self.causal_lm.base_model.children():
            if id(module) not in kept:
                module.to("meta")

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None
    ) -> tuple[Tensor, Any]:
        """Return final hidden states [batch, sequence, hidden] (after the last norm, times a constant multiplier of the
        logits) and the key-value cache.

        The weights are frozen, so that gradients flow only to factors of an update (reference/adapters.py).

        input_ids       int64 [batch, sequence]
        attention_mask  int64 [batch, past + sequence], 1 = real token; None attends to everything
        """
        position_ids = None
        if attention_mask is not None:
            position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        output = self.causal_lm.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
        )
        multiplier = self.spec.logits_multiplier
        hidden = output.last_hidden_state if multiplier == 1 else output.last_hidden_state * multiplier
        return hidden, output.past_key_values

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., vocab] of final hidden states [..., hidden]."""
        logits: Tensor = self.causal_lm.get_output_embeddings()(hidden)
        cap = self.spec.logits_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)


def load_trunk(name_or_path: str | Path) -> Trunk:
    """Load a base model in float32, frozen and in evaluation mode.

    name_or_path  a Hugging Face directory, a GGUF file or the directory of one, or a hub id

    Raises UnsupportedBaseError for a model that cannot be exported, CheckpointError when nothing can be loaded,
    DependencyError for a GGUF file without the package that reads it, OutputError where it cannot be cached.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Renamed in transformers 5; the whole supported range accepts the old name.
    warnings.filterwarnings("ignore", message=".*past_key_values.*deprecated", category=FutureWarning)
    name = str(name_or_path)
    gguf = gguf_file(name_or_path)
    where = converted(gguf) if gguf else name_or_path
    source = {"local_files_only": not Path(where).exists() and not _is_hub_reachable()}
    try:
        config = transformers.AutoConfig.from_pretrained(where, **source)
    except Exception as error:
        raise CheckpointError(f"cannot load a base model from {name!r}: {_first_line(error)}") from error
    families.require_supported(config, name)
    try:
        causal_lm = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **source)
        tokenizer, theirs, chat = tokenizers_of(where, source)
    except Exception as error:
        raise CheckpointError(f"cannot load a base model from {name!r}: {_first_line(error)}") from error
    if tokenizer is None:
        raise CheckpointError(f"{name!r} has no fast tokenizer: save one as tokenizer.json next to it")
    if causal_lm.get_output_embeddings().bias is not None:
        raise UnsupportedBaseError(f"{name!r}: a head with a bias cannot be exported")
    trunk = trunk_from(causal_lm, tokenizer)
    trunk.gguf, trunk.transformers_tokenizer, trunk.chat = gguf, theirs, chat
    return trunk


def tokenizers_of(where: str | Path, source: dict[str, Any]) -> tuple[Any, Any, ChatTemplates]:
    """Return the tokenizer of tokenizer.json, that of transformers if it is another, and its chat template.

    Without tokenizer.json the first is that of transformers, or None if that has no `tokenizers.Tokenizer`.
    """
    import transformers
    from huggingface_hub import try_to_load_from_cache
    from tokenizers import Tokenizer

    failure, theirs, chat = None, None, ChatTemplates()
    try:
        found = transformers.AutoTokenizer.from_pretrained(where, **source)
        theirs = getattr(found, "backend_tokenizer", None)
        chat = ChatTemplates(getattr(found, "chat_template", None) or {}, found.special_tokens_map)
    except Exception as error:
        failure = error
    directory = Path(where)
    file = directory / "tokenizer.json" if directory.is_dir() else try_to_load_from_cache(str(where), "tokenizer.json")
    theirs = theirs and encoding_whole_texts(theirs)
    if not isinstance(file, str | Path) or not Path(file).is_file():
        if failure is not None:
            raise failure
        return theirs, None, chat
    tokenizer = encoding_whole_texts(Tokenizer.from_file(str(file)))
    return tokenizer, theirs if theirs and theirs.to_str() != tokenizer.to_str() else None, chat


def encoding_whole_texts(tokenizer: Any) -> Any:
    """Return a `tokenizers.Tokenizer` without padding, truncation and dropout, which training scripts may have saved.

    They would make a text's token ids depend on other rows or on chance, or truncate the text.
    """
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    return tokenizer


def trunk_from(causal_lm: Any, tokenizer: Any) -> Trunk:
    causal_lm.eval().requires_grad_(False)
    return Trunk(causal_lm, tokenizer)


def _is_hub_reachable() -> bool:
    """Make one request; from_pretrained would repeat a failing one for half a minute."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of requests or of httpx, depending on the release of huggingface_hub
        return False
    return True


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
