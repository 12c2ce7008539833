"""The tokenizer of a bundle. A text's token ids must depend on that text only, and represent all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from chameleon_deploy.errors import ManifestError


def load_tokenizer(file: Path) -> Any:
    """Return the `tokenizers.Tokenizer` of a bundle's tokenizer.json.

    Raises ManifestError for a file that `tokenizers` does not read, and for one that pads, truncates or has dropout:
    padding makes a text's ids depend on other rows, dropout makes them random.
    """
    try:
        tokenizer: Any = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises Exception itself
        raise ManifestError(f"{file}: {error}") from error
    options = {
        "truncation": tokenizer.truncation,
        "padding": tokenizer.padding,
        "model.dropout": getattr(tokenizer.model, "dropout", None),
    }
    for name, value in options.items():
        if value:
            raise ManifestError(f"{file}: {name} is not supported: export again, which sets it to null")
    return tokenizer
