"""Which features turn on or off along a trajectory: activations of each cell, and the rule that chooses.

The rule: a feature is tested where it is active in at least 5% of the cells with a pseudotime. Its effect
size is the difference of its mean activation between late and early cells (the outer thirds of pseudotime)
over their pooled standard deviation. Per layer the 12 largest d >= 0.5 are ON, the 8 smallest d <= -0.5 OFF.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import BertForMaskedLM

    from cellcircuits.cells import Cell
    from sae_model import TopKSAE

ON, OFF = "ON", "OFF"
ABOUT = (
    "layer_L: mean latent of each SAE feature over the cell's gene positions, zeros included (n_cells, n_features).",
    "layer_L_max: largest latent over those positions.",
    "layer_L_frac: share of those positions where the feature is among the k selected.",
    "cell_ids: names of the cells, in the order of the rows.",
)


@dataclass(frozen=True)
class SwitchRule:
    """When a feature counts as a switch.

    Attributes:
        min_freq: smallest share of cells in which the feature has an activation above 0.
        min_abs_d: smallest |d|.
        n_on: most ON features per layer.
        n_off: most OFF features per layer.

    Source: the study's revision, but for its variances with ddof 0; the list of the first release was made by a
    rule that does not reproduce it.
    """

    min_freq: float = 0.05
    min_abs_d: float = 0.5
    n_on: int = 12
    n_off: int = 8

    def text(self) -> str:
        """The rule in one sentence, for the record."""
        return (
            f"Active (mean latent above 0) in at least {self.min_freq:.0%} of the cells with a pseudotime; "
            "d = (mean of late - mean of early cells) / pooled SD (ddof 1) of the mean latent per cell, early and late "
            "being the cells up to the 33.3rd and from the 66.7th percentile of pseudotime; per layer ON: the "
            f"{self.n_on} largest d >= {self.min_abs_d:g}, OFF: the {self.n_off} smallest d <= -{self.min_abs_d:g}. "
            "Reported beside it, not part of it: Spearman correlation with pseudotime, its Benjamini-Hochberg q over "
            "all tested features of all layers, and the partial rank correlation given the number of detected genes."
        )


def cell_activations(
    model: "BertForMaskedLM",
    saes: Mapping[int, "TopKSAE"],
    cells: Sequence["Cell"],
    kept_in: Path | None = None,
    fingerprint: str = "",
) -> dict[str, NDArray[np.float32]]:
    """Activations of every feature in every cell, from one clean pass per cell.

    Args:
        model: the Geneformer.
        saes: {layer: SAE}, on the model's device.
        cells: the cells.
        kept_in: folder for the finished cells, which a later call goes on from; None keeps them in memory only.
        fingerprint: of what determines the activations.

    Returns:
        `layer_L`, `layer_L_max` and `layer_L_frac`, each (n_cells, n_features); see `ABOUT`.

    Raises:
        UserError: the model or an SAE gives NaN or infinite values.
    """
    import torch

    from cellcircuits.activations import stream
    from cellcircuits.effects import TopKLatents
    from cellcircuits.kept_rows import KeptRows

    kinds = ("", "_max", "_frac")
    found = {
        f"layer_{layer}{kind}": np.zeros((len(cells), sae.n_features), dtype=np.float32)
        for layer, sae in saes.items()
        for kind in kinds
    }
    kept = KeptRows(found, kept_in, fingerprint)
    try:
        for number, cell, streams in stream(model, cells, list(saes), "activations", kept.n_done):
            n_gene = len(cell.gene_positions)
            for layer, sae in saes.items():
                with torch.inference_mode():
                    latents = TopKLatents.of_cell(sae, streams[layer], cell, layer)
                selected = np.bincount(latents.features.ravel(), minlength=sae.n_features)
                found[f"layer_{layer}"][number] = latents.total(sae.n_features) / n_gene
                np.maximum.at(found[f"layer_{layer}_max"][number], latents.features.ravel(), latents.values.ravel())
                found[f"layer_{layer}_frac"][number] = selected / n_gene
            kept.finished(number + 1)
    except KeyboardInterrupt:
        kept.save()
        raise
    return found


@dataclass(frozen=True)
class LayerStatistics:
    """What pseudotime does to the features of one layer; arrays over the tested features.

    Attributes:
        features: (n_tested,) ascending indices.
        freq: share of cells with an activation above 0.
        d: Cohen's d of late against early cells; NaN where neither group varies.
        rho: Spearman's correlation with pseudotime; `p` its two-sided p-value.
        rho_given_n_genes: partial rank correlation; NaN where the number of genes explains all of the ranks.
    """

    features: NDArray[np.int64]
    freq: NDArray[np.float64]
    d: NDArray[np.float64]
    rho: NDArray[np.float64]
    p: NDArray[np.float64]
    rho_given_n_genes: NDArray[np.float64]


@dataclass(frozen=True)
class CellOrder:
    """The cells as the statistics need them.

    Attributes:
        pseudotime: (n_cells,); NaN is left out.
        early: numbers of the early cells; `late` of the late ones.
        n_genes: (n_cells,) detected genes.
    """

    pseudotime: NDArray[np.float64]
    early: NDArray[np.int64]
    late: NDArray[np.int64]
    n_genes: NDArray[np.float64]


def layer_statistics(activations: NDArray[np.floating], order: CellOrder, min_freq: float) -> LayerStatistics:
    """Test the features of one layer that are active in enough cells and not the same in all.

    Args:
        activations: (n_cells, n_features) mean activation per cell.
        order: where the cells stand.
        min_freq: smallest share of cells with an activation above 0.
    """
    used = ~np.isnan(order.pseudotime)
    freq = (activations[used] > 0).mean(axis=0)
    varies = np.ptp(activations[used], axis=0) > 0
    features = np.flatnonzero((freq >= min_freq) & varies)
    tested = activations[:, features].astype(np.float64)
    rho, p = spearman(tested[used], order.pseudotime[used])
    partial = partial_spearman(tested[used], order.pseudotime[used], order.n_genes[used])
    return LayerStatistics(features, freq[features], late_early_d(tested, order.early, order.late), rho, p, partial)


def late_early_d(values: NDArray[np.float64], early: NDArray[np.int64], late: NDArray[np.int64]) -> NDArray[np.float64]:
    """Cohen's d of two groups of cells, per feature.

        d = (mean late - mean early) / sqrt(((n_e - 1) var_e + (n_l - 1) var_l) / (n_e + n_l - 2))

    Args:
        values: (n_cells, n_features).
        early: numbers of the early cells, at least two.
        late: numbers of the late cells, at least two.

    Returns:
        (n_features,); NaN where both groups are constant, as no size is defined there.

    Source: Cohen (1988), chapter 2.
    """
    n_early, n_late = len(early), len(late)
    squares = (n_early - 1) * values[early].var(axis=0, ddof=1) + (n_late - 1) * values[late].var(axis=0, ddof=1)
    pooled = np.sqrt(squares / (n_early + n_late - 2))
    constant = (np.ptp(values[early], axis=0) == 0) & (np.ptp(values[late], axis=0) == 0)
    change = values[late].mean(axis=0) - values[early].mean(axis=0)
    return np.where(constant, np.nan, change / np.where(constant, 1.0, pooled))


def spearman(values: NDArray[np.float64], time: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Spearman's rho of each feature with pseudotime and its two-sided p-value by the t distribution.

    Args:
        values: (n_cells, n_features), no feature constant.
        time: (n_cells,), not constant.

    Returns:
        rho and p, (n_features,) each; p is 1 for fewer than three cells.
    """
    from scipy.stats import rankdata, t

    rho = np.clip(_correlation(rankdata(values, axis=0), rankdata(time)[:, None]), -1.0, 1.0)
    freedom = len(time) - 2
    if freedom < 1:
        return rho, np.ones_like(rho)
    with np.errstate(divide="ignore"):  # a perfect correlation has an infinite t and p = 0
        size = np.abs(rho) * np.sqrt(freedom / ((1 - rho) * (1 + rho)))
    return rho, 2 * t.sf(size, freedom)


def partial_spearman(
    values: NDArray[np.float64], time: NDArray[np.float64], given: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Correlation of the ranks of each feature and of pseudotime, both less what the ranks of `given` explain.

    Args:
        values: (n_cells, n_features).
        time: (n_cells,).
        given: (n_cells,); where it is constant it explains nothing.

    Returns:
        (n_features,); NaN where nothing is left of one of the two.
    """
    from scipy.stats import rankdata

    ranks = [rankdata(array, axis=0) for array in (values, time[:, None], given[:, None])]
    of_values, of_time, of_given = (rank - rank.mean(axis=0) for rank in ranks)
    scale = (of_given**2).sum()
    if scale > 0:
        of_values = of_values - of_given * (of_given.T @ of_values) / scale
        of_time = of_time - of_given * (of_given.T @ of_time) / scale
    # a rank explained in full leaves rounding only: its length is tiny beside the ranks' own
    floor = 1e-9 * len(time) ** 1.5
    left = (np.linalg.norm(of_values, axis=0) > floor) & (np.linalg.norm(of_time) > floor)
    partial = np.full(values.shape[1], np.nan)
    partial[left] = _correlation(of_values[:, left], of_time)
    return partial


def _correlation(columns: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson's r of each of (n, m) columns with the one of `other` (n, 1)."""
    columns, other = columns - columns.mean(axis=0), other - other.mean(axis=0)
    return (columns * other).sum(axis=0) / (np.linalg.norm(columns, axis=0) * np.linalg.norm(other))


def switch_features(
    statistics: Mapping[int, LayerStatistics], rule: SwitchRule, labels: Mapping[int, Mapping[int, str]]
) -> list[dict[str, Any]]:
    """The features that switch, layer by layer, ON by falling d, then OFF by rising d; ties by ascending index.

    Args:
        statistics: {layer: the tested features}.
        rule: the thresholds.
        labels: {layer: {feature: label}}.

    Returns:
        One record per feature; the list is a panel for steering. A number that is not defined is None.
    """
    from scipy.stats import false_discovery_control

    every_p = np.concatenate([of_layer.p for of_layer in statistics.values()]) if statistics else np.zeros(0)
    every_q = false_discovery_control(every_p) if every_p.size else every_p
    records, start = [], 0
    for layer, found in statistics.items():
        q = every_q[start : start + len(found.p)]
        start += len(found.p)
        by_d = np.argsort(-found.d, kind="stable")  # NaN comes last
        on = [i for i in by_d if found.d[i] >= rule.min_abs_d][: rule.n_on]
        off = [i for i in np.argsort(found.d, kind="stable") if found.d[i] <= -rule.min_abs_d][: rule.n_off]
        for kind, chosen in ((ON, on), (OFF, off)):
            records += [_record(layer, found, i, q[i], kind, labels[layer]) for i in chosen]
    return records


def _record(
    layer: int, found: LayerStatistics, i: int, q: float, kind: str, labels: Mapping[int, str]
) -> dict[str, Any]:
    feature, partial = int(found.features[i]), float(found.rho_given_n_genes[i])
    return {
        "layer": layer,
        "idx": feature,
        "d": float(found.d[i]),
        "kind": kind,
        "freq": float(found.freq[i]),
        "spearman_rho": float(found.rho[i]),
        "q": float(q),
        "rho_given_n_genes": None if np.isnan(partial) else partial,
        "label": labels[feature],
    }
