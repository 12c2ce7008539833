"""What a command names as its reference: a checkpoint, or a base model, alone, with adapters or a released network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from chameleon_deploy.contract.peft_lora import CONFIG_FILE as PEFT_CONFIG_FILE
from chameleon_deploy.contract.peft_lora import is_of_the_head, read_config
from chameleon_deploy.errors import CheckpointError, InputError
from chameleon_deploy.reference.adapters import DEFAULT_MAX_RANK, AdaptedBase, load_adapted
from chameleon_deploy.reference.checkpoint import CONFIG_FILE, Checkpoint, is_checkpoint, load_checkpoint
from chameleon_deploy.reference.gguf import gguf_file
from chameleon_deploy.reference.merging import load_merged
from chameleon_deploy.reference.sentence_encoder import load_encoder
from chameleon_deploy.reference.text_to_lora import TextToLora, TextToLoraFiles, load_text_to_lora

Source = Checkpoint | AdaptedBase


def load_source(
    path: Path,
    base: str | None,
    adapters: Mapping[str, Path],
    adaptable: Sequence[str] = (),
    max_rank: int | None = None,
    network: TextToLoraFiles | None = None,
) -> Source:
    """Load a checkpoint, or the base model at `path`, which may be a hub id, with its adapters or a released network.

    A PEFT directory of other layers than the head is merged into its base model.

    base                 see `load_checkpoint`
    adaptable, max_rank  see `load_adapted`; None takes the default

    Raises InputError, and the errors of `load_checkpoint`, `load_adapted` and `load_text_to_lora`.
    """
    if network is not None and (adapters or adaptable):
        raise InputError("--hypernetwork generates the updates: leave out --adapter and --adaptable")
    if is_checkpoint(path):
        if network is not None:
            raise InputError(f"{path}: --hypernetwork is of a base model: pass its directory or hub id in its place")
        if adapters or adaptable:
            raise InputError(f"{path}: adapters are of a base model: pass its directory or hub id in its place")
        peft = path / PEFT_CONFIG_FILE
        if peft.is_file() and not is_of_the_head(read_config(peft, merged=True)):
            return load_adapted(str(path), {}, trunk=load_merged(path, base))
        return load_checkpoint(path, base)
    if not path.exists() and len(path.parts) > 2:  # no hub id
        raise CheckpointError(f"{path} does not exist: pass the directory of a checkpoint or of a base model")
    if path.is_dir() and not (path / "config.json").is_file() and gguf_file(path) is None:
        raise CheckpointError(
            f"{path} has neither {CONFIG_FILE} nor adapter_config.json, so it is not a checkpoint, and neither "
            "config.json nor a GGUF file, so it is no base model"
        )
    if base is not None:
        raise InputError(f"{path} is no checkpoint: --base goes with one, a base model is named alone")
    if network is not None:
        return load_text_to_lora(str(path), network)
    max_rank = DEFAULT_MAX_RANK if max_rank is None else max_rank
    return load_adapted(str(path), adapters, adaptable=adaptable, max_rank=max_rank)


def add_encoder(source: Source, path: Path) -> None:
    """Let a sentence encoder make the vectors that a checkpoint is conditioned on.

    Raises InputError where the checkpoint reads none, or those of another encoder, and what `load_encoder` raises.
    """
    if not isinstance(source, Checkpoint) or not source.config.conditioning_size:
        raise InputError("--encoder is of a hypernetwork that reads vectors: a text-to-LoRA network, or --conditioning")
    encoder = load_encoder(path)
    size = source.config.conditioning_size
    if encoder.size != size:
        raise InputError(f"{path} gives embeddings of {encoder.size} numbers, the hypernetwork reads {size}")
    if isinstance(source.factors, TextToLora) and (fault := source.factors.encoder_fault(encoder.pooling)):
        raise InputError(f"--encoder {path}: {fault}")
    source.encoder = encoder
