"""Random triplets to hold same-pathway ones against: the same layers, features that fire as often and weigh as much.

Each feature of a triplet is replaced by one of its layer, drawn among those nearest in activation frequency and ablated
norm (its mean latent where it fires, times the length of its decoder direction). No feature is used twice, none of a
chosen combination at all, and no two of one control are known to belong to one pathway. NumPy only.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cellcircuits.catalog import MIN_ACTIVATION_FREQ
from cellcircuits.combinations import RANDOM, Combination, ComboFeature
from cellcircuits.selection import N_NEAREST, RANDOM_PATHWAY


@dataclass(frozen=True)
class Candidate:
    """A feature of a catalog; `pathway` None where unknown, `ablated_norm` None where the catalog has no latents."""

    feature: ComboFeature
    activation_freq: float
    ablated_norm: float | None
    pathway: str | None

    def distance(self, other: "Candidate") -> float:
        """Difference in log frequency, plus that in log norm where both are known."""
        pairs = [(self.activation_freq, other.activation_freq)]
        if self.ablated_norm and other.ablated_norm:
            pairs.append((self.ablated_norm, other.ablated_norm))
        return sum(abs(math.log(a / b)) for a, b in pairs)


Catalogs = Mapping[int, Mapping[int, Candidate]]  # layer -> index -> candidate


def random_triplets(
    sources: Sequence[Combination], chosen: Iterable[Combination], catalogs: Catalogs, n_wanted: int, seed: int
) -> tuple[list[Combination], list[str]]:
    """Draw controls for triplets, several rounds over them where more are wanted.

    Args:
        sources: the triplets to replace feature by feature.
        chosen: all combinations whose features are not to be used.
        catalogs: the features of the layers.
        n_wanted: how many to draw.
        seed: of the draws, with the triplet's features and the round; a draw depends on earlier ones only in what
            they have used up.

    Returns:
        The controls, and notes on those that cannot be drawn.
    """
    used = {feature.name for combination in chosen for feature in combination.features}
    controls: list[Combination] = []
    for number in range(n_wanted if sources else 0):
        source = sources[number % len(sources)]
        of_features = [number for f in source.features for number in (f.layer, f.index)]
        rng = np.random.default_rng(np.random.SeedSequence([seed, number // len(sources), *of_features]))
        control = _control(source, catalogs, used, rng)
        if control is not None:
            used |= {feature.name for feature in control.features}
            controls.append(control)
    notes = []
    if len(controls) < n_wanted:
        notes.append(
            f"{len(controls)} random triplets of {n_wanted} wanted: the catalogs have no more features that no other "
            "combination uses and that share no pathway"
        )
    return controls, notes


def _control(source: Combination, catalogs: Catalogs, used: set[str], rng: np.random.Generator) -> Combination | None:
    taken: list[Candidate] = []
    for feature in source.features:
        of_layer = catalogs.get(feature.layer, {})
        model = of_layer.get(feature.index)
        if model is None or not model.activation_freq:
            return None
        pathways = {candidate.pathway for candidate in taken} - {None}
        free = [
            candidate
            for candidate in of_layer.values()
            if candidate.feature.name not in used
            and candidate not in taken
            and candidate.activation_freq >= MIN_ACTIVATION_FREQ
            and candidate.pathway not in pathways
        ]
        near = sorted(free, key=lambda candidate: (candidate.distance(model), candidate.feature.index))[:N_NEAREST]
        if not near:
            return None
        taken.append(near[rng.integers(len(near))])
    return Combination(tuple(candidate.feature for candidate in taken), RANDOM_PATHWAY, RANDOM)
