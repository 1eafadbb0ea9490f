"""What one run of `prepare_inputs.py` is asked to make, and from what."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cellcircuits.activations import CellSplit
from cellcircuits.annotation import AnnotationSettings
from cellcircuits.gene_sets import TermTable
from cellcircuits.inputs import ModelAndCells
from cellcircuits.preparation_state import Unfinished, open_unfinished
from cellcircuits.sae_store import run_folder
from cellcircuits.sae_training import TrainingSettings


@dataclass(frozen=True)
class PreparationSettings:
    """What to make, beyond which model and cells."""

    layers: tuple[int, ...]
    training: TrainingSettings = field(default_factory=TrainingSettings)
    annotation: AnnotationSettings = field(default_factory=AnnotationSettings)
    train_rows: int = 1_000_000
    mask_share: float = 0.0
    min_firings: int = 5
    n_top_genes: int = 20
    n_loss_cells: int = 20
    max_memory_gb: float = 8.0
    relabel: bool = False


@dataclass(frozen=True)
class Preparation:
    """Everything one run works with.

    `record` holds the settings that determine the numbers of every layer, `terms` is None without gene sets,
    `mix_versions` goes on with the unfinished work of other software.
    """

    data_root: Path
    inputs: ModelAndCells
    split: CellSplit
    settings: PreparationSettings
    terms: TermTable | None
    record: Mapping[str, Any]
    mix_versions: bool = False

    def folder(self, layer: int) -> Path:
        """Where the files of a layer go."""
        return run_folder(self.data_root, layer, self.settings.training.expansion, self.settings.training.k)

    def layer_record(self, layer: int) -> dict[str, Any]:
        """The settings that determine the numbers of one layer, as flat JSON values."""
        settings = self.settings
        return {
            **self.record,
            "layer": layer,
            **asdict(settings.training),
            "train_rows": settings.train_rows,
            "mask_share": settings.mask_share,
            "min_firings": settings.min_firings,
            "top_genes": settings.n_top_genes,
            "loss_cells": settings.n_loss_cells,
            "alpha": settings.annotation.alpha,
        }

    def unfinished(self, name: str, settings: Mapping[str, Any]) -> Unfinished:
        """What is kept of the unfinished work on a layer; see `open_unfinished`.

        Raises:
            UserError: it has other settings, or other software made it.
        """
        provenance = self.inputs.provenance()
        return open_unfinished(self.data_root, name, settings, provenance, mix_versions=self.mix_versions)
