"""Controls of an ablation: pushes as hard as it, at each position, that remove something else.

Removing feature f pushes the stream by -h_f * W_dec[:, f] where f is active. Each control has the same sizes
|h_f| * ||W_dec[:, f]||, position by position, and ONE direction for all cells and positions of a draw:

    random                an isotropic unit vector
    random_covariance     Gaussian with the covariance of the residual stream at the gene positions of the run's cells
    other_feature         the decoder direction of another feature that fires about as often, with the sign of a removal
    shuffled_positions    the same direction and the same multiset of sizes, at positions where f is not active, and
                          measured there; where fewer of these than of the others, as many of the sizes as fit

Draws are seeded by control, feature, draw and row of the cell: no number depends on what else is run, or when.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cellcircuits.effects import Bench, CleanCell, Push
from cellcircuits.errors import UserError

RANDOM, COVARIANCE, OTHER, SHUFFLED = CONTROLS = (
    "random", "random_covariance", "other_feature", "shuffled_positions",
)  # fmt: skip
N_STRATA = 10
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Draws:
    """How controls are drawn: `n` for each control and feature, from `seed`, for features of one source layer."""

    seed: int
    source_layer: int
    n: int

    def rng(self, control: str, feature: int, draw: int = 0, row: int = 0) -> np.random.Generator:
        """The generator of one draw, in one cell where it differs between cells."""
        key = [self.seed, self.source_layer, feature, CONTROLS.index(control), draw, row]
        return np.random.default_rng(np.random.SeedSequence(key))


def sample_by_degree(features: NDArray[np.int64], degrees: NDArray[np.int64], n: int, seed: int) -> list[int]:
    """Draw features evenly from ten strata of their degrees, or take all if there are no more than `n`.

    A larger sample of the same features contains a smaller one of the same seed.

    Args:
        features: (n_features,) to draw from.
        degrees: (n_features,) edges of each.
        n: how many to draw.
        seed: of the draw.

    Returns:
        The features drawn, ascending.
    """
    ordered = features[np.lexsort((features, degrees))]
    n = min(n, len(ordered))
    drawn = []
    for i, stratum in enumerate(np.array_split(ordered, N_STRATA)):
        shuffled = np.random.default_rng(np.random.SeedSequence([seed, i])).permutation(stratum)
        drawn += shuffled[: n // N_STRATA + (i < n % N_STRATA)].tolist()
    return sorted(drawn)


def matched_features(feature: int, frequencies: Mapping[int, float], n: int) -> list[int]:
    """The `n` other features whose log frequency is nearest to that of `feature`; ties by ascending index.

    Args:
        feature: one of those that `frequencies` holds.
        frequencies: {feature: share of positions at which it fires, above 0}.
        n: how many, fewer where there are not so many.
    """
    distances = {other: abs(np.log(f / frequencies[feature])) for other, f in frequencies.items() if other != feature}
    return sorted(distances, key=lambda other: (distances[other], other))[:n]


def unit(directions: Floats) -> Floats:
    """Directions (n, d_model) divided by their norms.

    Raises:
        UserError: one of them is 0, so that it has no direction.
    """
    norms = np.linalg.norm(directions, axis=1, keepdims=True)
    if not norms.all():
        raise UserError("a control direction is 0: the residual stream or a decoder direction does not vary.")
    return directions / norms


def random_directions(draws: Draws, feature: int, d_model: int) -> Floats:
    """Isotropic unit vectors, (n_draws, d_model)."""
    drawn = [draws.rng(RANDOM, feature, draw).standard_normal(d_model) for draw in range(draws.n)]
    return unit(np.stack(drawn))


def covariance_directions(draws: Draws, features: Sequence[int], clean: Sequence[CleanCell]) -> dict[int, Floats]:
    """Unit vectors whose direction is Gaussian with the covariance of the stream at the cells' gene positions.

        v = sum_p z_p (x_p - mean),   z_p independent and standard normal, p over all gene positions of all cells

    For given streams v is Gaussian and its covariance is sum_p (x_p - mean)(x_p - mean)^T, that of the streams but for
    a factor that normalising removes. No (d_model, d_model) matrix is factorised, or formed.

    Args:
        draws: how many, and from which seed.
        features: source features.
        clean: clean runs of all cells; each is read once.

    Returns:
        {feature: (n_draws, d_model)}.

    Raises:
        UserError: the stream does not vary.
    """
    weighted, weights = {feature: 0.0 for feature in features}, {feature: 0.0 for feature in features}
    total, n_positions = 0.0, 0
    for i in range(len(clean)):
        cell = clean[i].cell
        streams = clean[i].residual.numpy()[cell.gene_positions].astype(np.float64)  # (n_gene, d_model)
        total, n_positions = total + streams.sum(axis=0), n_positions + len(streams)
        for feature in features:
            # all draws at once: one product of a shape that depends on nothing but the cell and their number
            z = np.stack(
                [draws.rng(COVARIANCE, feature, d, cell.row).standard_normal(len(streams)) for d in range(draws.n)]
            )
            weighted[feature] = weighted[feature] + z @ streams
            weights[feature] = weights[feature] + z.sum(axis=1, keepdims=True)
    mean = total / max(1, n_positions)
    return {feature: unit(weighted[feature] - weights[feature] * mean) for feature in features}


@dataclass(frozen=True)
class Directions:
    """What the controls of one feature push along.

    `unit` {control: (n_draws, d_model) float64 unit vectors}, of the three controls that have directions of their
    own, and which features those of `other_feature` are.
    """

    unit: Mapping[str, Floats]
    others: tuple[int, ...]


def feature_directions(
    draws: Draws, feature: int, of_covariance: Floats, frequencies: Mapping[int, float], decoder: Floats
) -> Directions:
    """The directions of one feature's controls.

    Args:
        draws: how many, and from which seed.
        feature: source feature.
        of_covariance: its entry of `covariance_directions`.
        frequencies: of all features that may stand in for it, and its own; see `matched_features`.
        decoder: (n_features, d_model) decoder directions of the source layer.
    """
    others = matched_features(feature, frequencies, draws.n)
    drawn = {
        RANDOM: random_directions(draws, feature, decoder.shape[1]),
        COVARIANCE: of_covariance,
        OTHER: unit(decoder[others]),
    }
    return Directions(drawn, tuple(others))


class ControlledFeature:
    """The ablation of one feature (condition 0) and its controls, to be measured by `trace_block` like features.

    Condition 1 + i * n_draws + j is draw j of control i.
    """

    def __init__(self, bench: Bench, feature: int, draws: Draws, directions: Directions) -> None:
        """Bind the feature; its directions go to the bench's device and precision."""
        self.bench, self.feature, self.draws = bench, feature, draws
        self.n_targets = bench.n_targets
        self.conditions: tuple[tuple[str, int] | None, ...] = (
            None, *((control, draw) for control in CONTROLS for draw in range(draws.n)),
        )  # fmt: skip
        own = bench.saes[bench.source_layer].decoder_directions[feature]
        self.norm = float(np.linalg.norm(own.detach().cpu().numpy().astype(np.float64)))
        self._units = {
            control: torch.from_numpy(of_control).to(own.dtype).to(bench.device)
            for control, of_control in directions.unit.items()
        }

    def rows(self, clean: CleanCell, condition: int) -> NDArray[np.int64]:
        """Gene positions at which a condition pushes in a cell; none where it cannot be measured."""
        return self.push(clean, condition).rows

    def effects(self, clean: CleanCell, conditions: Sequence[int]) -> Floats:
        """Effects of conditions in one cell, (len(conditions), n_targets); see `Bench.push_effects`."""
        return self.bench.push_effects(clean, [self.push(clean, condition) for condition in conditions])

    def removed_norm(self, clean: CleanCell, condition: int) -> float:
        """How far a condition pushes, averaged over its positions: as far as the removal where all sizes fit."""
        push = self.push(clean, condition)
        norm = np.linalg.norm(push.direction.cpu().double().numpy())
        return float(np.abs(push.sizes, dtype=np.float64).mean() * norm)

    def batch_size(self, n_pos: int) -> int:
        """See `Bench.batch_size`."""
        return self.bench.batch_size(n_pos)

    def push(self, clean: CleanCell, condition: int) -> Push:
        """What a condition does in one cell."""
        removal = self.bench.removal(clean, self.feature)
        chosen = self.conditions[condition]
        if chosen is None:
            return removal
        control, draw = chosen
        if control == SHUFFLED:
            rng = self.draws.rng(SHUFFLED, self.feature, draw, clean.cell.row)
            return shuffled(removal, len(clean.cell.gene_positions), rng)
        sizes = (removal.sizes.astype(np.float64) * self.norm).astype(removal.sizes.dtype)
        return Push(removal.rows, sizes, self._units[control][draw])


def shuffled(push: Push, n_gene: int, rng: np.random.Generator) -> Push:
    """The same direction and sizes, in random order, at randomly chosen gene positions where there is no push."""
    free = np.setdiff1d(np.arange(n_gene), push.rows)
    n = min(len(push.rows), len(free))
    rows = np.sort(rng.choice(free, n, replace=False))
    return Push(rows, rng.permutation(push.sizes)[:n], push.direction)
