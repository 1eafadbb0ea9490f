"""Which edits are made: every feature of a panel at every dose, and beside it controls of exactly the same size.

An edit moves the stream by one fixed vector, the same in all cells, at the positions where one feature is active:

    x  ->  x + norm * u,    u of length 1

random_feature: another feature of the layer, its decoder direction, at its own active positions.
frequency_matched: the same, of the features nearest in log activation frequency in early cells, so that about as many
positions are moved; none serves two features of the panel.
random_direction: a random u, at the panel feature's own positions.

Every draw has a seed of its own, made of run, layer, feature, control and draw. NumPy only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FEATURE = "feature"
RANDOM_FEATURE, FREQUENCY_MATCHED, RANDOM_DIRECTION = "random_feature", "frequency_matched", "random_direction"
CONTROLS = (RANDOM_FEATURE, FREQUENCY_MATCHED, RANDOM_DIRECTION)
MIN_CELLS_SHARE = 0.05  # of the first half's early cells in which a feature must be active to be a control


@dataclass(frozen=True)
class LayerFacts:
    """What the first half of the cells says about a layer, from clean passes at gene positions.

    Attributes:
        mean_norm: mean length of the residual stream.
        frequency: (n_features,) share of the early cells' positions where the latent is above 0.
        share_of_cells: (n_features,) share of the early cells in which it is anywhere.
        mean_latent: (n_features,) mean of the latent where it is above 0, in all cells; 0 where it nowhere is.
    """

    mean_norm: float
    frequency: NDArray[np.float64]
    share_of_cells: NDArray[np.float64]
    mean_latent: NDArray[np.float64]


@dataclass(frozen=True)
class Dose:
    """A size of edits: either a share `norm` of the mean norm of the layer's stream, or an `alpha`.

    An alpha stands for the length that multiplying the feature's latent by it adds on average where it is active; 0 of
    a feature that is so nowhere.
    """

    norm: float | None = None
    alpha: float | None = None

    def of_feature(self, facts: LayerFacts, feature: int, direction_norm: float) -> float:
        """The length of the edit as a share of the mean norm, for a feature whose decoder direction has this length."""
        if self.alpha is None:
            return float(self.norm or 0.0)
        return float((self.alpha - 1) * facts.mean_latent[feature] * direction_norm / facts.mean_norm) + 0.0


@dataclass(frozen=True)
class Edit:
    """One edit.

    Attributes:
        at: the feature at whose active positions the stream is moved.
        feature: the feature along whose decoder direction it is moved; None for a random direction.
        draw_of: seed of a random direction, None for a feature's.
        norm: length, as a share of the mean norm of the layer's stream.
    """

    at: int
    feature: int | None
    draw_of: tuple[int, ...] | None
    norm: float

    def direction(self, decoder: NDArray[np.float64]) -> NDArray[np.float64]:
        """The unit vector (d_model,) of the edit; 0 where `decoder` (n_features, d_model) has none for the feature."""
        if self.draw_of is not None:
            vector = np.random.default_rng(np.random.SeedSequence(self.draw_of)).standard_normal(decoder.shape[1])
        else:
            vector = decoder[self.feature]
        return vector / (np.linalg.norm(vector) or 1.0)


@dataclass(frozen=True)
class Controls:
    """The control features of every feature of one layer's panel: {feature: drawn ones}, the same for every dose."""

    random: Mapping[int, tuple[int, ...]]
    matched: Mapping[int, tuple[int, ...]]


def candidates(facts: LayerFacts, panel: Sequence[int], decoder: NDArray[np.float64]) -> NDArray[np.int64]:
    """Features that may be controls, ascending: not of the panel, active in enough cells, with a direction."""
    usable = (facts.share_of_cells >= MIN_CELLS_SHARE) & (facts.frequency > 0) & (np.abs(decoder).max(axis=1) > 0)
    usable[list(panel)] = False
    return np.flatnonzero(usable)


def choose_controls(
    layer: int, panel: Sequence[int], usable: NDArray[np.int64], facts: LayerFacts, draws: tuple[int, int]
) -> Controls:
    """Draw the control features of a layer.

    Args:
        layer: the layer.
        panel: its features, in any order.
        usable: from `candidates`.
        facts: of the layer.
        draws: how many of each kind per feature, and the run's seed.

    Returns:
        Up to that many each: fewer where the layer has no more.
    """
    n_draws, seed = draws
    random: dict[int, list[int]] = {feature: [] for feature in panel}
    matched: dict[int, list[int]] = {feature: [] for feature in panel}
    log_frequency, taken = np.log(np.maximum(facts.frequency, np.finfo(float).tiny)), set()
    for draw in range(n_draws):
        for feature in sorted(panel):
            left = np.setdiff1d(usable, random[feature])
            if left.size:
                chosen = _generator(seed, layer, feature, RANDOM_FEATURE, draw).integers(left.size)
                random[feature].append(int(left[chosen]))
            free = np.setdiff1d(usable, list(taken))
            if free.size:
                nearest = int(free[np.argmin(np.abs(log_frequency[free] - log_frequency[feature]))])
                matched[feature].append(nearest)
                taken.add(nearest)
    return Controls(*({feature: tuple(drawn) for feature, drawn in kind.items()} for kind in (random, matched)))


def edits_of(
    layer: int, feature: int, controls: Controls, norm: float, draws: tuple[int, int]
) -> dict[str, tuple[Edit, ...]]:
    """A feature's own edit and its controls of the same length, by kind."""
    n_draws, seed = draws
    return {
        FEATURE: (Edit(feature, feature, None, norm),),
        RANDOM_FEATURE: tuple(Edit(other, other, None, norm) for other in controls.random[feature]),
        FREQUENCY_MATCHED: tuple(Edit(other, other, None, norm) for other in controls.matched[feature]),
        RANDOM_DIRECTION: tuple(
            Edit(feature, None, _seeds(seed, layer, feature, RANDOM_DIRECTION, draw), norm) for draw in range(n_draws)
        ),
    }


def _generator(*what: int | str) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(_seeds(*what)))


def _seeds(seed: int, layer: int, feature: int, control: str, draw: int) -> tuple[int, ...]:
    return seed, layer, feature, CONTROLS.index(control), draw
