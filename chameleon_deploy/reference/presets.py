"""Named ways to train: `train --recipe NAME`. (What export builds is another recipe: export/recipe.py.)

paper     arXiv 2502.04315 and its authors' scripts
residual  for text of clearly different kinds: a trained LoRA that all texts share, and a counted correction of it for
          each cluster (reference/residual.py); steps that see several clusters
"""

from __future__ import annotations

from dataclasses import dataclass

from chameleon_deploy.reference.head import TrainingSettings
from chameleon_deploy.reference.hypernetwork import HIDDEN_SIZES


@dataclass(frozen=True)
class TrainingRecipe:
    """settings    of the optimiser
    rank          of the factors
    num_clusters  of k-means"""

    settings: TrainingSettings
    rank: int
    num_clusters: int

    def hidden_sizes(self, num_clusters: int) -> tuple[int, ...]:
        """Of the hypernetwork: the paper's, or one unit for each cluster."""
        return HIDDEN_SIZES if self.settings.recipe == "paper" else (num_clusters, num_clusters)


RECIPES = {
    "paper": TrainingRecipe(TrainingSettings(), rank=4, num_clusters=8),
    "residual": TrainingRecipe(
        TrainingSettings(epochs=10, batch_size=8, lr=2e-3, cohorts_per_step=4, recipe="residual"),
        rank=16,
        num_clusters=32,
    ),
}
