"""Write a base model whose weights lie on no grid: `python -m benchmarks.off_grid MODEL --out DIRECTORY`.

Weights that were rounded once, as those of a quantised GGUF file, round again without an error to the same grid, and
nearly so to others: an engine whose format is the file's looks better than it is. Here channels are multiplied by
random factors that cancel: the model computes the same, and its weights are as unround as any.

    a norm's weight    and the columns of the matrices that read it
    values             and the columns of attention's output projection
    up                 and the columns of down, of a gated MLP

So in a Llama all inputs of every matrix of the trunk get factors of their own. Where a family has no norm before
attention, or no gate, the matrices there keep their inputs. The token embedding
stays as it is, and so does a head that is tied to it: the residual stream has no free factors.

What rounding costs is printed, before and after, for three layers.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import gguf
import numpy as np
import torch
import typer
from torch import Tensor

from chameleon_deploy.bench.peers.gguf_writer import write_gguf
from chameleon_deploy.directory import new_directory, write_whole
from chameleon_deploy.errors import InputError
from chameleon_deploy.export.int8.layers import Linear, Norm, layers_of
from chameleon_deploy.reference.gguf import converted
from chameleon_deploy.reference.model import Trunk, load_trunk
from chameleon_deploy.terminal import console

Types = gguf.GGMLQuantizationType
ROUNDED_TO = (Types.Q8_0, Types.Q4_0)
LEAST, MOST = 0.7, 1.4  # of the factors
BESIDE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def main(
    model: Annotated[Path, typer.Argument(help="A directory in Hugging Face format, or a GGUF file.")],
    out: Annotated[Path, typer.Option(help="The directory to write, in Hugging Face format, float32.")],
    seed: Annotated[int, typer.Option(help="Of the factors.")] = 0,
    llama_cpp: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it for llama.cpp too. MODEL is a GGUF file then.")
    ] = None,
) -> None:
    """Multiply channels by random factors that cancel, in float64, and write the model."""
    trunk = load_trunk(model)
    if llama_cpp and trunk.gguf is None:
        raise InputError(f"{model} is no GGUF file, whose tokenizer that for llama.cpp would have", "llama_cpp")
    before = rounding_errors(trunk)
    trunk.causal_lm.double()
    leave_grid(trunk, seed)
    trunk.causal_lm.float()
    source = model if trunk.gguf is None else converted(trunk.gguf)
    with new_directory(out) as directory:
        trunk.causal_lm.save_pretrained(directory)
        for name in BESIDE:
            if (source / name).is_file():
                shutil.copy(source / name, directory / name)
    if llama_cpp:
        write_whole(llama_cpp, lambda file: write_gguf(trunk, file, Types.F32, trunk.gguf))
    for kind, after in rounding_errors(trunk).items():
        console.stdout.print(f"{kind}: relative error of rounding {before[kind]:.2e}, now {after:.2e}")
    console.stdout.print(f"{out}: {trunk.num_parameters():,} parameters")


@torch.no_grad()
def leave_grid(trunk: Trunk, seed: int = 0) -> None:
    """Multiply channels of a model by random factors that cancel, in place."""
    generator, spec = torch.Generator().manual_seed(seed), trunk.spec
    dtype = trunk.token_embedding.dtype

    def factors(count: int) -> Tensor:
        drawn = torch.rand(count, generator=generator, dtype=torch.float64)
        return (LEAST + (MOST - LEAST) * drawn).to(dtype)

    for layer in layers_of(trunk):
        for norm, readers in _norms(layer.after_norms):
            by = factors(spec.hidden_size)
            norm.weight = norm.weight * by
            if norm.bias is not None:
                norm.bias.mul_(by)
            for linear in readers:
                linear.matrix = linear.matrix / by[:, None]
        by = factors(spec.num_key_value_heads * spec.head_dim)
        _multiply_outputs(layer.v, by)
        groups = spec.num_attention_heads // spec.num_key_value_heads
        of_queries = by.view(-1, spec.head_dim).repeat_interleave(groups, 0).flatten()
        layer.o.matrix = layer.o.matrix / of_queries[:, None]
        if spec.gated:
            by = factors(len(layer.down.matrix))
            _multiply_outputs(layer.ups[1], by)
            layer.down.matrix = layer.down.matrix / by[:, None]
    if not trunk.is_tied:
        by = factors(spec.hidden_size)
        last = Norm(trunk.causal_lm.get_submodule(spec.names.last_norm), spec.norm_offset)
        last.weight = last.weight * by
        if last.bias is not None:
            last.bias.mul_(by)
        trunk.head_weight.div_(by)


def rounding_errors(trunk: Trunk) -> dict[str, float]:
    """Return by GGUF type the relative error of rounding the matrices of the first, a middle and the last layer."""
    layers, squares = list(layers_of(trunk)), np.zeros((len(ROUNDED_TO), 2))
    for layer in (layers[0], layers[len(layers) // 2], layers[-1]):
        for linear in (layer.q, layer.k, layer.v, layer.o, *layer.ups, layer.down):
            matrix = linear.matrix.T.contiguous().numpy()
            for sums, kind in zip(squares, ROUNDED_TO, strict=True):
                rounded = gguf.quants.dequantize(gguf.quants.quantize(matrix, kind), kind)
                sums += np.square(rounded - matrix).sum(), np.square(matrix).sum()
    return {kind.name: float(np.sqrt(error / total)) for kind, (error, total) in zip(ROUNDED_TO, squares, strict=True)}


def _norms(after_norms: list[tuple[Norm | None, str, list[Linear]]]) -> list[tuple[Norm, list[Linear]]]:
    """Return each norm with all that read it: in parallel layers attention and MLP may share one."""
    found: list[tuple[Norm, list[Linear]]] = []
    for norm, _, linears in after_norms:
        if norm is None:
            continue
        if found and found[-1][0].module is norm.module:
            found[-1][1].extend(linears)
        else:
            found.append((norm, list(linears)))
    return found


def _multiply_outputs(linear: Linear, by: Tensor) -> None:
    linear.matrix = linear.matrix * by
    if linear.bias is not None:
        linear.bias = linear.bias * by


if __name__ == "__main__":
    console.run(main)
