"""What a steering run has measured and not yet turned into records; kept on disk so that a kill costs minutes."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cellcircuits.jsonio import write_atomically
from cellcircuits.panel import PanelFeature

log = logging.getLogger(__name__)


@dataclass
class Unfinished:
    """What is measured so far for a group of features.

    Attributes:
        features: the group.
        marks: of each feature, what says that numbers on disk are this feature's in this run.
        alphas: steering coefficients.
        mean_changes: (n_early, n_features, n_alphas, d_model) float64, steered - clean means of the head's transform.
        done: (n_early, n_features, n_alphas) which of them are measured.
        active: (n_early, n_features) whether the feature is active in the cell.
        mean_transformed: (n_ends, d_model) float64, means of the clean passes of all early and late cells.
        cell_done: (n_ends,) whether nothing is left to do in the cell.
    """

    features: tuple[PanelFeature, ...]
    marks: tuple[str, ...]
    alphas: tuple[float, ...]
    mean_changes: NDArray[np.float64]
    done: NDArray[np.bool_]
    active: NDArray[np.bool_]
    mean_transformed: NDArray[np.float64]
    cell_done: NDArray[np.bool_]

    @classmethod
    def empty(
        cls, marks: Mapping[PanelFeature, str], alphas: Sequence[float], n_early: int, n_ends: int, d_model: int
    ) -> "Unfinished":
        """Nothing measured yet."""
        runs = (n_early, len(marks), len(alphas))
        return cls(
            features=tuple(marks),
            marks=tuple(marks.values()),
            alphas=tuple(alphas),
            mean_changes=np.zeros((*runs, d_model)),
            done=np.zeros(runs, dtype=bool),
            active=np.zeros(runs[:2], dtype=bool),
            mean_transformed=np.zeros((n_ends, d_model)),
            cell_done=np.zeros(n_ends, dtype=bool),
        )

    def save(self, path: Path) -> None:
        """Write everything measured to `path`, whole or not at all."""
        arrays = {
            "marks": np.array(self.marks),
            "alphas": np.array(self.alphas),
            "done": self.done,
            "mean_changes": self.mean_changes[self.done],  # (n_done, d_model)
            "active": self.active,
            "mean_transformed": self.mean_transformed,
            "cell_done": self.cell_done,
        }
        write_atomically(path, lambda stream: np.savez(stream, **arrays))

    def restore(self, path: Path) -> None:
        """Take up what `save` wrote if it has all of these features; else nothing."""
        kept = read_arrays(path)
        if kept is None:
            return
        try:
            columns = [kept["marks"].tolist().index(mark) for mark in self.marks]
            alphas = [kept["alphas"].tolist().index(alpha) for alpha in self.alphas]
            mean_changes = np.zeros((*kept["done"].shape, self.mean_changes.shape[-1]))
            mean_changes[kept["done"]] = kept["mean_changes"]
            restored = {
                "mean_changes": mean_changes[:, columns][:, :, alphas],
                "done": kept["done"][:, columns][:, :, alphas],
                "active": kept["active"][:, columns],
                "mean_transformed": kept["mean_transformed"],
                "cell_done": kept["cell_done"],
            }
        except (KeyError, ValueError, IndexError, TypeError, AttributeError):
            return
        if all(array.shape == getattr(self, name).shape for name, array in restored.items()):
            for name, array in restored.items():
                getattr(self, name)[:] = array


def marks_in(path: Path) -> frozenset[str]:
    """Marks of the features that an interrupted run had begun and kept in `path`."""
    kept = read_arrays(path)
    return frozenset() if kept is None or "marks" not in kept else frozenset(kept["marks"].tolist())


def read_arrays(path: Path) -> dict[str, NDArray] | None:
    """All arrays of an .npz file; None where there is none or it is damaged, which is said."""
    if not path.exists():
        return None
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as kept:
            return dict(kept)
    except Exception as error:  # a damaged archive makes zipfile and NumPy raise almost anything
        log.warning("%s is damaged (%s): it is not used.", path, type(error).__name__)
        return None
