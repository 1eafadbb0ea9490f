"""What is read from a steered cell: signature, marker genes, maturity probe; NumPy only.

Every readout is the change, steered - clean, of one number per cell; above 0 is towards late cells. `..._linear` is
what the direct path alone gives: the displacement added to the clean final stream at the same positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cellcircuits.errors import UserError
from cellcircuits.jsonio import read_json
from cellcircuits.state_shift import LogitMap, Signatures, state_shifts

SIGNATURE, MARKERS, PROBE = "signature", "markers", "probe"
READOUTS = (SIGNATURE, MARKERS, PROBE)
PROBABILITY = "probability"  # of the probe, beside its log-odds
LINEAR = {readout: f"{readout}_linear" for readout in READOUTS}
N_MOVED, N_MOVED_MASKED = "n_positions", "n_positions_masked"
VALUES = (*READOUTS, PROBABILITY, *LINEAR.values(), N_MOVED, N_MOVED_MASKED)
DEFINITIONS = {
    SIGNATURE: "change of cos(z, late) - cos(z, early), z the cell's mean logits over its gene positions, late and "
    "early the mean over the late and early cells of the first half",
    MARKERS: "mean change of log p(true gene) over the late markers of the cell minus that over its early ones; all "
    "marker genes of the cell are masked at once, and the edit is made in that masked pass, where the feature is "
    "active there; cells without a marker of either kind have none",
    PROBE: "change of the log-odds of late of a logistic probe on the mean final residual stream over gene positions, "
    "trained on other cells",
}
FORM = '{"early": ["CD34", "KIT"], "late": ["CD14", "LYZ"]}'
# The study's panels; see the README for what is mixed in them.
PROGENITOR = (
    "CD34", "KIT", "FLT3", "MPO", "GATA2", "SPINK2", "PROM1", "CRHBP", "AVP", "HLF", "MECOM", "AZU1", "ELANE", "CTSG",
    "TCF7", "LEF1", "SELL", "CCR7",
)  # fmt: skip
TERMINAL = (
    "LYZ", "S100A8", "S100A9", "S100A12", "FCN1", "CSF3R", "FCGR3B", "ITGAM", "CD14", "CST3", "GNLY", "NKG7", "PRF1",
    "GZMB", "MS4A1", "CD79A", "JCHAIN", "MZB1",
)  # fmt: skip


@dataclass(frozen=True)
class MarkerPanel:
    """Gene names whose prediction counts for early and for late cells."""

    early: tuple[str, ...] = PROGENITOR
    late: tuple[str, ...] = TERMINAL


@dataclass(frozen=True)
class MarkerTokens:
    """Tokens of a panel's genes that the model knows, and the names of those it does not."""

    early: tuple[int, ...]
    late: tuple[int, ...]
    unknown: tuple[str, ...]


class Mean(Protocol):
    """Mean changes of transform and stream, as `displacements.MeanChanges` has them."""

    transformed: NDArray[np.float64]
    stream: NDArray[np.float64]


class LogOdds(Protocol):
    """A probe: weights on the raw mean stream, and its log-odds."""

    direction: NDArray[np.float64]

    def log_odds(self, stream: NDArray[np.float64]) -> NDArray[np.float64]:
        """Log-odds of late."""


@dataclass(frozen=True)
class StateReadouts:
    """Reads signature and probe from the mean changes of one cell."""

    logit_map: LogitMap
    signatures: Signatures
    probe: LogOdds

    def of(
        self, mean_transformed: NDArray[np.float64], mean_stream: NDArray[np.float64], changes: Mean
    ) -> dict[str, NDArray[np.float64]]:
        """Signature, probe log-odds and probability of every displacement, (n_moves,) each.

        Args:
            mean_transformed: (d_model,) clean mean of the head's transform.
            mean_stream: (d_model,) clean mean of the final stream.
            changes: mean changes.
        """
        clean = np.broadcast_to(mean_transformed, changes.transformed.shape)
        odds, change = self.probe.log_odds(mean_stream), changes.stream @ self.probe.direction
        return {
            SIGNATURE: state_shifts(clean, changes.transformed, self.logit_map, self.signatures),
            PROBE: change,
            PROBABILITY: _probability(odds + change) - _probability(odds),
        }


def marker_change(changes: NDArray[np.float64], is_late: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mean over late minus mean over early markers of (n_moves, n_masked) changes of log p -> (n_moves,)."""
    return changes[:, is_late].mean(axis=1) - changes[:, ~is_late].mean(axis=1)


def _probability(log_odds: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 * (1 + np.tanh(0.5 * log_odds))  # the logistic function, without overflow


def read_markers(path: Path) -> MarkerPanel:
    """Read `{"early": [...], "late": [...]}`.

    Raises:
        UserError: the file is missing, damaged, has an empty list or something else than names, or a gene twice.
    """
    content = read_json(path)
    lists = [content.get(side) if isinstance(content, dict) else None for side in ("early", "late")]
    if not all(_is_names(names) for names in lists):
        raise UserError(f"{path}: needs `early` and `late`, a list of gene names each, such as {FORM}.")
    early, late = (tuple(dict.fromkeys(names)) for names in lists)
    both = sorted(set(early) & set(late))
    if both:
        raise UserError(f"{path}: {both[0]} is listed as early and as late; leave it out of one of them.")
    return MarkerPanel(early, late)


def _is_names(names: Any) -> bool:
    return isinstance(names, list) and bool(names) and all(isinstance(name, str) and name for name in names)


def marker_tokens(panel: MarkerPanel, token_of: Any, where: str) -> MarkerTokens:
    """The panel's genes as the model's tokens.

    Args:
        panel: gene names.
        token_of: function name -> token, None for a gene that the model does not know.
        where: what names the panel, for errors.

    Raises:
        UserError: the model knows no early or no late gene.
    """
    found, unknown = [], []
    for side, names in (("early", panel.early), ("late", panel.late)):
        tokens = {name: token_of(name) for name in names}
        unknown += [name for name, token in tokens.items() if token is None]
        known = tuple(dict.fromkeys(token for token in tokens.values() if token is not None))
        if not known:
            raise UserError(
                f"{where}: the model knows none of the {side} markers ({', '.join(names[:5])}, ...); name genes of its "
                "dictionary (--markers)."
            )
        found.append(known)
    return MarkerTokens(found[0], found[1], tuple(unknown))


def markers_in(
    tokens: NDArray[np.int64], gene_positions: Sequence[int] | NDArray[np.int64], markers: MarkerTokens
) -> tuple[NDArray[np.int64], NDArray[np.bool_]] | None:
    """Where a cell has markers.

    Args:
        tokens: (n_pos,) the cell's.
        gene_positions: (n_gene,) positions of genes.
        markers: the panel.

    Returns:
        Their rows among the gene positions, (n_masked,) ascending, and which are late; None where a side has none.
    """
    genes = tokens[np.asarray(gene_positions)]
    is_late = np.isin(genes, markers.late)
    rows = np.flatnonzero(is_late | np.isin(genes, markers.early))
    sides = is_late[rows]
    return (rows, sides) if sides.any() and not sides.all() else None
