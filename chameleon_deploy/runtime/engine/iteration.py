"""The record of one engine iteration, for metrics."""

from __future__ import annotations

from dataclasses import dataclass, field

from chameleon_deploy.contract.bundle import Mode
from chameleon_deploy.runtime.generation import FinishReason


@dataclass(frozen=True)
class FinishedRow:
    """A row that ended.

    prompt_tokens, new_tokens  numbers of tokens
    seconds                    from its submit to its end
    queued, first_token        seconds from its submit to its admission, and to its first token; None without that
    tenant                     the name of its tenant
    adapters                   names of its adapters, of all where it blends several
    """

    mode: Mode
    cluster_id: int
    finish_reason: FinishReason
    prompt_tokens: int
    new_tokens: int
    seconds: float
    queued: float | None = None
    first_token: float | None = None
    adapters: tuple[str, ...] = ()
    tenant: str = ""


@dataclass
class Iteration:
    """One iteration of the engine. All times are in seconds.

    rows              rows that were given a token, or failed; most of them by the decoder's step
    factor_sets       resident during the step
    factor_set_hits   admitted rows whose factor set was resident already
    prefilled_tokens  of prompts; `chunk` is the time of that, with copies of prompts for more continuations
    step              time of the decoder's step
    queued            time from submit to admission, of every admitted row
    first_tokens      time from submit to the first token, of every row that got it
    later_tokens      time since the token before it, of every later token
    finished          rows that ended, for any reason
    """

    rows: int = 0
    factor_sets: int = 0
    factor_set_hits: int = 0
    prefilled_tokens: int = 0
    chunk: float = 0.0
    step: float = 0.0
    queued: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    later_tokens: list[float] = field(default_factory=list)
    finished: list[FinishedRow] = field(default_factory=list)
