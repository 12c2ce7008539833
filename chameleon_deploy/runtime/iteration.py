"""What one iteration of the engine did, for metrics."""

from __future__ import annotations

from dataclasses import dataclass, field

from chameleon_deploy.bundle import Mode
from chameleon_deploy.runtime.generation import FinishReason


@dataclass(frozen=True)
class FinishedRow:
    """A row that ended.

    prompt_tokens, new_tokens  counts
    seconds                    from its submit to its end
    """

    mode: Mode
    cluster_id: int
    finish_reason: FinishReason
    prompt_tokens: int
    new_tokens: int
    seconds: float


@dataclass
class Iteration:
    """All times in seconds.

    rows             that were given a token, or failed; most of them by the decoder's step
    factor_sets      resident during the step
    factor_set_hits  rows admitted whose factor set was resident already
    chunk_tokens     prompt tokens read; `chunk` is the time that took, with copies of prompts for more continuations
    step             the decoder's step
    queued           of every row admitted: from submit to admission
    first_tokens     of every row's first token: since its submit
    later_tokens     of every later token: since the token before it
    finished         rows that ended, for whatever reason
    """

    rows: int = 0
    factor_sets: int = 0
    factor_set_hits: int = 0
    chunk_tokens: int = 0
    chunk: float = 0.0
    step: float = 0.0
    queued: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    later_tokens: list[float] = field(default_factory=list)
    finished: list[FinishedRow] = field(default_factory=list)
