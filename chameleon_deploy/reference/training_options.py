"""The options that `train` and `compare` share. An option that is left out has the preset's default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chameleon_deploy.reference.presets import Architecture, MatmulPrecision, PresetName, default_of

Base = Annotated[str, typer.Option(help="Base model: a Hugging Face directory or hub id, or a GGUF file.")]
TrainingText = Annotated[
    list[Path] | None,
    typer.Option(help='Training text: UTF-8 files, or .jsonl with a "text" field.'),
]
ValidationText = Annotated[
    list[Path] | None,
    typer.Option(help="Validation text for early stopping; default: a tenth of the training text."),
]
Dataset = Annotated[str | None, typer.Option(help="Named dataset instead, such as wikitext, with its splits.")]
PresetOption = Annotated[
    PresetName,
    typer.Option(help="Preset: default values of the options below and the form of the hypernetwork."),
]
Rank = Annotated[
    int | None,
    typer.Option(min=1, help="Rank of the factors.", show_default=default_of("rank")),
]
Alpha = Annotated[
    float | None,
    typer.Option(help="Scale of the update.", show_default=default_of("alpha")),
]
Clusters = Annotated[
    int | None,
    typer.Option(min=1, help="Number of k-means clusters.", show_default=default_of("num_clusters")),
]
MaxLength = Annotated[
    int | None,
    typer.Option(min=2, help="Maximum number of tokens per text.", show_default=default_of("max_length")),
]
Epochs = Annotated[
    int | None,
    typer.Option(min=1, help="Maximum number of epochs.", show_default=default_of("epochs")),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1, help="Texts of one cluster per batch.", show_default=default_of("batch_size"), rich_help_panel="Training"
    ),
]
LearningRate = Annotated[
    float | None,
    typer.Option(min=0, help="Learning rate of AdamW.", show_default=default_of("lr")),
]
Dropout = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=0.95,
        help="Dropout of the hypernetwork's hidden units.",
        show_default=default_of("dropout"),
        rich_help_panel="Training",
    ),
]
Patience = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Epochs without improvement before stopping.",
        show_default=default_of("patience"),
    ),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        metavar="lm_head|attention|mlp|all|NAME",
        show_default="lm_head",
        help="Linear layers to update: a group, a layer's name or its end as in PEFT, such as q_proj; repeatable.",
    ),
]
ArchitectureOption = Annotated[
    Architecture,
    typer.Option(
        help="Hypernetwork: the paper's, whose last layer gives all factors, or one that is shared by all layers and "
        "told the layer and the module by embeddings."
    ),
]
MatmulPrecisionOption = Annotated[
    MatmulPrecision,
    typer.Option(
        help="Precision of PyTorch's products of float32 matrices. Below the highest they use bfloat16 or TF32 units "
        "where the processor has them, several times as fast.",
        rich_help_panel="Training",
    ),
]
