"""CTranslate2 with the frozen base model, converted by its own converter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import transformers

from chameleon_deploy.bench.peers import DECODE, PREFILL, Rows
from chameleon_deploy.bench.timing import Lap
from chameleon_deploy.reference.model import Trunk

COMPUTE_TYPES: dict[str, str] = {"fp32": "float32", "int8": "int8"}


class CTranslate2:
    """CTranslate2. See `Peer`."""

    adapts, scores, generates, is_ablation = False, True, True, False

    def __init__(self, trunk: Trunk, precision: str, threads: int, directory: Path) -> None:
        """Convert the model into `directory` and load it.

        Raises KeyError for a precision that it does not have on a CPU, and what CTranslate2 raises.
        """
        import ctranslate2

        self.name, self.precision = f"CTranslate2 {precision}", precision
        self._tokens = _convert(trunk, directory / "ctranslate2", COMPUTE_TYPES[precision])
        self.size = sum(file.stat().st_size for file in (directory / "ctranslate2").iterdir())
        self._generator: Any = ctranslate2.Generator(
            str(directory / "ctranslate2"),
            compute_type=COMPUTE_TYPES[precision],
            intra_threads=threads,
            inter_threads=1,
        )

    def logits(self, ids: Sequence[int]) -> Any:
        return np.array(self._generator.forward_batch([self._strings(ids)]))[0]

    def score(self, rows: Rows) -> Any:
        results = self._generator.score_batch([self._strings(ids) for ids in rows])
        return np.array([result.log_probs for result in results])

    def generate(self, rows: Rows, num_tokens: int, lap: Lap) -> Any:
        last = len(rows) - 1

        def after_each_token(step: Any) -> bool:
            if step.step == 0 and step.batch_id == last:
                lap(PREFILL)
            return False

        results = self._generator.generate_batch(
            [self._strings(ids) for ids in rows],
            max_length=num_tokens,
            min_length=num_tokens,  # otherwise it would stop at the end of text and do less
            include_prompt_in_result=False,
            sampling_topk=1,
            callback=after_each_token,
        )
        lap(DECODE)
        return np.array([result.sequences_ids[0] for result in results])

    def _strings(self, ids: Any) -> list[str]:
        return [self._tokens[i] for i in ids]


def _convert(trunk: Trunk, out: Path, compute_type: str) -> list[str]:
    """Convert the model and return its vocabulary.

    A model may have more rows than its tokenizer has tokens; CTranslate2 needs names for all.
    """
    from ctranslate2.converters import TransformersConverter

    eos = trunk.tokenizer.id_to_token(trunk.eos_token_id)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trunk.tokenizer, bos_token=eos, eos_token=eos, unk_token=eos
    )
    size = trunk.config.vocab_size
    tokenizer.add_tokens([f"<unused {i}>" for i in range(len(tokenizer), size)])
    with TemporaryDirectory() as original:
        tokenizer.save_pretrained(original)
        trunk.causal_lm.save_pretrained(original)
        TransformersConverter(original).convert(str(out), quantization=compute_type)
    return [str(token) for token in tokenizer.convert_ids_to_tokens(range(size))]
