"""`python -m chameleon_deploy.triton`: add a bundle to a model repository of NVIDIA Triton Inference Server."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from chameleon_deploy.contract.bundle import MANIFEST, open_bundle
from chameleon_deploy.contract.provenance import SIGNATURE
from chameleon_deploy.directory import new_directory
from chameleon_deploy.errors import OutputError
from chameleon_deploy.terminal import console

MODEL = '''"""Needs chameleon-deploy[cpu] in the Python environment of tritonserver's backend."""

from chameleon_deploy.serve.triton import Model as TritonPythonModel

__all__ = ["TritonPythonModel"]
'''

CONFIG = """# {name}: a prompt in, one response per token out. Every instance is a process with an engine of its own.
name: "{name}"
backend: "python"
max_batch_size: 0  # the engine batches, token by token
model_transaction_policy {{ decoupled: true }}
input [
  {{ name: "text_input" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "max_tokens" data_type: TYPE_INT32 dims: [ 1 ] optional: true }},
  {{ name: "temperature" data_type: TYPE_FP32 dims: [ 1 ] optional: true }},
  {{ name: "top_p" data_type: TYPE_FP32 dims: [ 1 ] optional: true }},
  {{ name: "top_k" data_type: TYPE_INT32 dims: [ 1 ] optional: true }},
  {{ name: "seed" data_type: TYPE_UINT64 dims: [ 1 ] optional: true }},
  {{ name: "stop" data_type: TYPE_STRING dims: [ -1 ] optional: true }},
  {{ name: "mode" data_type: TYPE_STRING dims: [ 1 ] optional: true }},
  {{ name: "sampling_parameters" data_type: TYPE_STRING dims: [ 1 ] optional: true }}
]
output [
  {{ name: "index" data_type: TYPE_INT32 dims: [ 1 ] }},
  {{ name: "text_output" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "token_id" data_type: TYPE_INT32 dims: [ 1 ] }},
  {{ name: "logprob" data_type: TYPE_FP32 dims: [ 1 ] }},
  {{ name: "top_logprobs" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "finish_reason" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "cluster_id" data_type: TYPE_INT32 dims: [ 1 ] }}
]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]  # as many as the machine has times `threads` cores
parameters {{ key: "threads" value {{ string_value: "2" }} }}
parameters {{ key: "rows" value {{ string_value: "8" }} }}
parameters {{ key: "max_waiting" value {{ string_value: "1024" }} }}
"""


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Model repository, which is created if it does not exist.")],
) -> None:
    """Add a bundle to a model repository of Triton, and print its path there."""
    console.stdout.print(f"{write_repository(bundle, out)}", soft_wrap=True)


def write_repository(bundle: Path, repository: Path) -> Path:
    """Add a bundle to a model repository, under the name of its directory. Return the directory of the model.

    Raises the errors of `open_bundle`, OutputExistsError where the repository has the model, or OutputError.
    """
    opened = open_bundle(bundle)
    name = bundle.resolve().name
    try:
        repository.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {repository}: {error.strerror}") from error
    with new_directory(repository / name) as directory:
        (directory / "config.pbtxt").write_text(CONFIG.format(name=name))
        version = directory / "1"
        (version / "bundle").mkdir(parents=True)
        (version / "model.py").write_text(MODEL)
        for file in (MANIFEST, SIGNATURE, *opened.manifest.files):
            if (bundle / file).exists():  # a bundle need not be signed
                shutil.copyfile(bundle / file, version / "bundle" / file)
    return repository / name


if __name__ == "__main__":
    console.run(main)
