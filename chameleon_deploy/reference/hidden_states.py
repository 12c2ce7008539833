"""Final hidden states of the frozen trunk, computed once and memory-mapped.

The update changes only the head, so training needs the trunk's output and not the trunk. A position is stored if its
protocol scores it:

masked   every real token but the last of each text; its target is the next token
paper    the last position of the text padded to max_length with EOS; its target is that position's own token
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from chameleon_deploy.directory import write_whole
from chameleon_deploy.reference.clustering import embed_texts
from chameleon_deploy.reference.model import Trunk

BATCH = 16  # texts that are read in one call


@dataclass
class HiddenStates:
    """The stored states of a list of texts.

    hidden      float32 [positions, hidden], memory-mapped
    targets     int64 [positions]
    offsets     int64 [texts + 1]; text i has positions offsets[i]:offsets[i+1]
    embeddings  float32 [texts, hidden]
    """

    hidden: npt.NDArray[np.float32]
    targets: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    embeddings: torch.Tensor

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def num_positions(self, rows: Sequence[int]) -> int:
        return int(sum(self.offsets[row + 1] - self.offsets[row] for row in rows))

    def batch(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return hidden [positions, hidden] and targets [positions] of some texts, concatenated."""
        spans = [slice(self.offsets[row], self.offsets[row + 1]) for row in rows]
        hidden = np.concatenate([self.hidden[span] for span in spans])
        return torch.from_numpy(hidden), torch.from_numpy(np.concatenate([self.targets[span] for span in spans]))


def cache_hidden_states(
    trunk: Trunk,
    texts: Sequence[Sequence[int]],
    protocol: str,
    max_length: int,
    directory: Path,
    report: Callable[[int], None] = lambda done: None,
) -> HiddenStates:
    """Compute the hidden states of `texts` in `directory`, or map the existing ones.

    A cache made from other texts, weights or settings is recomputed. `report` gets the number of finished texts.
    """
    directory.mkdir(parents=True, exist_ok=True)
    key = _key(trunk, texts, protocol, max_length)
    lengths = [1 if protocol == "paper" else len(ids) - 1 for ids in texts]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    targets = np.concatenate([targets_of(ids, protocol, max_length, trunk.eos_token_id) for ids in texts])
    file = directory / "hidden_states.npy"
    key_file = directory / "hidden_states.json"
    if not (file.is_file() and key_file.is_file() and json.loads(key_file.read_text()) == {"key": key}):
        key_file.unlink(missing_ok=True)  # a kill must not leave the old key with new states
        write_whole(file, lambda partial: _compute(trunk, texts, protocol, max_length, offsets, partial, report))
        write_whole(key_file, lambda partial: partial.write_text(json.dumps({"key": key})))
    embeddings = embed_texts(texts, trunk.token_embedding, protocol, max_length, trunk.eos_token_id)
    return HiddenStates(np.load(file, mmap_mode="r"), targets, offsets, embeddings)


def scored_states(trunk: Trunk, texts: Sequence[Sequence[int]], protocol: str, max_length: int) -> list[torch.Tensor]:
    """Return the hidden states [positions, hidden] of every text's scored positions, computed in one padded batch."""
    width = max_length if protocol == "paper" else max(map(len, texts))
    input_ids = torch.full((len(texts), width), trunk.eos_token_id)
    attention_mask = torch.zeros(len(texts), width, dtype=torch.int64)
    for i, ids in enumerate(texts):
        input_ids[i, : len(ids)] = torch.tensor(ids)
        attention_mask[i, : len(ids)] = 1
    # The paper's scripts attend to the padding.
    hidden, _ = trunk.hidden_states(input_ids, None if protocol == "paper" else attention_mask)
    return [hidden[i, -1:] if protocol == "paper" else hidden[i, : len(ids) - 1] for i, ids in enumerate(texts)]


def targets_of(ids: Sequence[int], protocol: str, max_length: int, eos_token_id: int) -> npt.NDArray[np.int64]:
    """Return the target of each scored position of a text: int64 [positions]."""
    if protocol == "paper":
        return np.array([ids[-1] if len(ids) == max_length else eos_token_id], dtype=np.int64)
    return np.array(ids[1:], dtype=np.int64)


def _compute(
    trunk: Trunk,
    texts: Sequence[Sequence[int]],
    protocol: str,
    max_length: int,
    offsets: npt.NDArray[np.int64],
    file: Path,
    report: Callable[[int], None],
) -> None:
    shape = (int(offsets[-1]), trunk.config.hidden_size)
    stored = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # minimises padding in each batch
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        states = scored_states(trunk, [texts[row] for row in rows], protocol, max_length)
        for row, hidden in zip(rows, states, strict=True):
            stored[offsets[row] : offsets[row + 1]] = hidden.numpy()
        report(start + len(rows))
    stored.flush()


def _key(trunk: Trunk, texts: Sequence[Sequence[int]], protocol: str, max_length: int) -> str:
    digest = hashlib.sha256(json.dumps([protocol, max_length, [list(ids) for ids in texts]]).encode())
    for name, parameter in trunk.causal_lm.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()
