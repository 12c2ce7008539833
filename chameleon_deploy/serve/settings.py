"""The server's options, each declared once: command line, Ray's builder and the table of docs/serving.md follow."""

from __future__ import annotations

from dataclasses import dataclass, fields
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from chameleon_deploy.contract.bundle import Mode
from chameleon_deploy.runtime.decode.schedule import MIN_PREFILL_TOKENS
from chameleon_deploy.runtime.inputs import MAX_ROWS, MAX_THREADS


@dataclass(frozen=True)
class Settings:
    """The options of the command that are not uvicorn's.

    A field's Meta has its help, its range, and in `extra` what typer.Option takes besides.
    """

    bundle: Path
    mode: Annotated[Mode | None, Meta(description="Adaptation mode where a request names none.")] = None
    rows: Annotated[int, Meta(ge=1, le=MAX_ROWS, description="Rows that are generated at a time.")] = 8
    max_waiting: Annotated[int, Meta(ge=0, description="Rows that may wait; more are refused with 429.")] = 256
    prefill_tokens: Annotated[
        int, Meta(ge=MIN_PREFILL_TOKENS, description="Prompt tokens that are read between two steps.")
    ] = 256
    capacity: (
        Annotated[
            int, Meta(ge=1, description="Tokens of a row; default: all positions that half the free memory holds.")
        ]
        | None
    ) = None
    prefix_cache_bytes: (
        Annotated[
            int,
            Meta(
                ge=0,
                description="Bytes of keys and values that later prompts may begin with, 0 for none; default: a tenth "
                "of the free memory.",
            ),
        ]
        | None
    ) = None
    max_factor_sets: (
        Annotated[int, Meta(ge=1, description="Factor sets of the running rows; default: as many as --rows.")] | None
    ) = None
    adapters: (
        Annotated[
            list[str],
            Meta(description="Let requests load adapters of this directory or URL; may be given several times."),
        ]
        | None
    ) = None
    adapter_resolver: Annotated[
        bool, Meta(description="Load an adapter of --adapters with the first request that names it.")
    ] = False
    max_adapter_bytes: Annotated[
        int, Meta(ge=1, description="Bytes of loaded adapters that stay in memory; others are read again.")
    ] = 2**30
    api_keys: Annotated[
        Path | None,
        Meta(description='JSON file, {"key": "tenant"} or {"key": {"tenant": ..., "rights": [...], "weight": ...}}.'),
    ] = None
    cohort_window_ms: Annotated[
        float, Meta(ge=0, description="Milliseconds for which a cohort waits for other requests.")
    ] = 0
    sanitize_control_tokens: Annotated[
        bool,
        Meta(
            description="Read control tokens that messages spell as text.",
            extra={"option": "--sanitize-control-tokens/--no-sanitize-control-tokens"},
        ),
    ] = True
    max_body_bytes: Annotated[int, Meta(ge=1, description="Bytes of a body; a larger one is refused with 413.")] = (
        4 * 2**20
    )
    max_requests: Annotated[int, Meta(ge=1, description="Requests at a time; more are refused with 429.")] = 512
    max_connections: Annotated[
        int, Meta(ge=1, description="Connections at a time; beyond, the longest silent are closed.")
    ] = 1000
    max_unfinished_bytes: Annotated[
        int, Meta(ge=1, description="Bytes of bodies over 64 KiB that are arriving; more are refused with 429.")
    ] = 64 * 2**20
    max_step_seconds: Annotated[
        float, Meta(ge=0.001, description="Seconds of an engine's step; a longer one is logged and makes /health 503.")
    ] = 30
    drain_seconds: Annotated[float, Meta(ge=0, description="Seconds for requests to end after SIGTERM.")] = 30
    provider: Annotated[str, Meta(description="cpu, cuda, tensorrt or auto.")] = "cpu"
    threads: (
        Annotated[int, Meta(ge=1, le=MAX_THREADS, description="Threads of ONNX Runtime; default: one per core.")] | None
    ) = None
    share_weights: Annotated[bool, Meta(description="Map weights that other processes share.")] = False
    self_check: Annotated[
        bool, Meta(description="Refuse to serve unless this machine computes what export recorded.")
    ] = False
    trusted_keys: Annotated[
        list[Path] | None,
        Meta(
            description="Refuse a bundle that this Ed25519 public key (PEM) did not sign.",
            extra={"option": "--trusted-key"},
        ),
    ] = None
    log_prompts: Annotated[bool, Meta(description="Log the bodies of requests.")] = False


def parameters(option: Any) -> list[Parameter]:
    """Return the settings as keyword parameters of a typer command; the bundle is the command's argument.

    option  typer.Option
    """
    found = []
    for name, kind, meta, default in _declared():
        extra = dict(meta.extra or {})
        flag = extra.pop("option", f"--{name.replace('_', '-')}")
        info = option(flag, min=meta.ge, max=meta.le, help=meta.description, **extra)
        found.append(Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]))
    return found


def table() -> list[str]:
    """Return the lines of the table of docs/serving.md."""
    lines = ["| option | default | range | meaning |", "|---|---|---|---|"]
    for name, _, meta, default in _declared():
        flag = (meta.extra or {}).get("option", f"--{name.replace('_', '-')}")
        bounds = [f"{sign} {bound:,}" for sign, bound in (("from", meta.ge), ("to", meta.le)) if bound is not None]
        lines.append(f"| `{flag}` | {_shown(default)} | {' '.join(bounds)} | {meta.description} |")
    return lines


def _shown(default: Any) -> str:
    if default is None or isinstance(default, bool):
        return "on" if default else ""
    return f"{default:,}" if isinstance(default, int) else str(default)


def converted(values: dict[str, Any]) -> Settings:
    """Return settings from text or numbers. Raises msgspec.ValidationError for one of a wrong type or out of range."""
    return msgspec.convert(values, Settings, strict=False, dec_hook=_path)


def _declared() -> list[tuple[str, Any, Meta, Any]]:
    """Return name, type, Meta and default of each setting but the bundle."""
    hints, found = get_type_hints(Settings, include_extras=True), []
    for field in fields(Settings)[1:]:
        hint = hints[field.name]
        # A range is of the number, so that an option that may be None has it inside.
        kind, meta = get_args(hint if get_origin(hint) is Annotated else get_args(hint)[0])
        found.append((field.name, kind if get_origin(hint) is Annotated else kind | None, meta, field.default))
    return found


def _path(kind: type, value: Any) -> Any:
    if kind is not Path:
        raise NotImplementedError  # so a msgspec hook says that it does not know a type
    return Path(value)
