"""Which pairs to measure: features of one pathway, and two kinds of controls for them.

Works on the summary of a selective trace (`selective_feature_tracing.py`). How triplets follow from measured
pairs is in `combinations.py`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice, product
from pathlib import Path
from typing import Any

import numpy as np

from cellcircuits.combinations import CROSS, RANDOM, SAME, Combination, ComboFeature, best_term_of, take_unused
from cellcircuits.errors import UserError, printable
from cellcircuits.jsonio import read_json

FEATURES_PER_LAYER = 3
N_NEAREST = 5  # a control pair is drawn among this many of the nearest ones
RANDOM_PATHWAY = "random"


@dataclass(frozen=True)
class TracedFeature:
    """A feature of a selective trace: what it is, its pathway or None, the share of positions where it fires."""

    feature: ComboFeature
    pathway: str | None
    activation_freq: float


def read_selective_summary(path: Path) -> dict[str, Any]:
    """Read and check `selective_summary.json`.

    Raises:
        UserError: the file is missing, damaged or of another form.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; make it with selective_feature_tracing.py, or name the pairs yourself with "
            "--pairs FILE."
        )
    content = read_json(path)
    _traced_features(content, str(path))
    return content


def choose_pairs(
    summary: Mapping[str, Any],
    target_layer: int,
    seed: int,
    features_per_layer: int = FEATURES_PER_LAYER,
    *,
    disjoint: bool = False,
) -> tuple[list[Combination], list[str]]:
    """Choose pairs of traced features on different layers, before the target layer.

    `same_pathway`: every such pair among the features of a pathway that have most edges, three per layer.
    `cross_pathway`: as many pairs of those features from two pathways, drawn at random.
    `random`: one control per same-pathway pair, at the same two layers, among features of no chosen pair whose
    activation frequencies are nearest (sum of the two differences in log frequency); drawn among the nearest few,
    never two features of one pathway. A feature without a pathway may still belong to one that its term hides.

    Args:
        summary: `selective_summary.json`.
        target_layer: layer to be read.
        seed: of both draws.
        features_per_layer: features with most edges to keep per pathway and layer.
        disjoint: no two pairs share a feature; cross-pathway pairs then come from what the same-pathway ones leave of
            all traced features.

    Returns:
        The pairs: same-pathway ones first, pathways in the order of their table and the strongest pair of each
        first, then cross-pathway, then random ones; and notes on what there is less of than wanted.

    Raises:
        UserError: the summary is of another form, or no pathway has features at two layers.
    """
    traced = [x for x in _traced_features(summary, "selective_summary.json") if x.feature.layer < target_layer]
    kept = _strongest(traced, _pathway_order(summary, traced), features_per_layer)
    same = [pair for pathway, features in kept.items() for pair in _within(pathway, features)]
    if not same:
        raise UserError(_no_pair(kept, target_layer))
    rng = np.random.default_rng(seed)
    used: set[str] | None = set() if disjoint else None
    same = [pair for pair in same if take_unused(pair, used)]
    crossing = kept if used is None else _strongest(traced, list(kept), len(traced))
    cross = _drawn(list(_between(crossing)), len(same), rng, used)
    # also those of a pathway kept at one layer only: they are in no pair within it, but may be in drawn ones
    chosen = {feature.name for features in kept.values() for feature in features} if used is None else used
    random = _matched_controls(same, traced, [x for x in traced if x.feature.name not in chosen], rng, used)
    notes = [
        f"{len(found)} {kind} pairs for {len(same)} same-pathway ones: the trace has no more; a larger --n-features of "
        "selective_feature_tracing.py gives more"
        for kind, found in ((CROSS, cross), (RANDOM, random))
        if len(found) < len(same)
    ]
    return [*same, *cross, *random], notes


def _strongest(
    traced: Sequence[TracedFeature], pathways: Sequence[str], features_per_layer: int
) -> dict[str, list[ComboFeature]]:
    """The features with most edges per pathway and layer, by layer, then by descending edges and index."""
    kept: dict[str, list[ComboFeature]] = {}
    for pathway in pathways:
        by_layer: dict[int, list[ComboFeature]] = {}
        for x in traced:
            if x.pathway == pathway:
                by_layer.setdefault(x.feature.layer, []).append(x.feature)
        ranked = {layer: sorted(of, key=lambda f: (-f.n_edges, f.index)) for layer, of in sorted(by_layer.items())}
        kept[pathway] = [feature for of_layer in ranked.values() for feature in of_layer[:features_per_layer]]
    return kept


def _within(pathway: str, features: Sequence[ComboFeature]) -> list[Combination]:
    """Pairs across layers, the earlier layer first, by descending edges."""
    pairs = [Combination(pair, pathway, SAME) for pair in combinations(features, 2) if pair[0].layer < pair[1].layer]
    return sorted(pairs, key=lambda pair: -pair.n_edges)


def _between(kept: Mapping[str, Sequence[ComboFeature]]) -> Iterator[Combination]:
    """Every pair of features of two pathways and two layers, the earlier layer first."""
    for first, second in combinations(kept, 2):
        for a, b in product(kept[first], kept[second]):
            if a.layer < b.layer:
                yield Combination((a, b), f"{first}_x_{second}", CROSS)
            elif b.layer < a.layer:
                yield Combination((b, a), f"{second}_x_{first}", CROSS)


def _drawn(
    pairs: Sequence[Combination], wanted: int, rng: np.random.Generator, used: set[str] | None
) -> list[Combination]:
    """At most `wanted` of the pairs, in their order; with a set of `used` features none of these, and none twice."""
    if used is not None:
        ordered = (pairs[i] for i in rng.permutation(len(pairs)))
        return list(islice((pair for pair in ordered if take_unused(pair, used)), wanted))
    chosen = rng.choice(len(pairs), min(wanted, len(pairs)), replace=False) if pairs else []
    return [pairs[i] for i in sorted(chosen)]


def _matched_controls(
    same: Sequence[Combination],
    traced: Sequence[TracedFeature],
    free: Sequence[TracedFeature],
    rng: np.random.Generator,
    used: set[str] | None,
) -> list[Combination]:
    """One pair of free features per same-pathway pair, matched in layer and frequency, each pair used once.

    With a set of `used` features each feature is used once.
    """
    log_frequency = {x.feature.name: math.log(x.activation_freq) for x in traced}
    known: set[str] = set()
    controls = []
    for pair in same:
        near = []
        for x, y in product(*([x for x in free if x.feature.layer == f.layer] for f in pair.features)):
            candidate = Combination((x.feature, y.feature), RANDOM_PATHWAY, RANDOM)
            if candidate.name in known or (x.pathway is not None and x.pathway == y.pathway):
                continue
            if used and not used.isdisjoint(feature.name for feature in candidate.features):
                continue
            matches = zip(pair.features, candidate.features, strict=True)
            near.append((sum(abs(log_frequency[f.name] - log_frequency[g.name]) for f, g in matches), candidate))
        near.sort(key=lambda one: (one[0], [(f.layer, f.index) for f in one[1].features]))
        if near:
            _, control = near[rng.integers(min(N_NEAREST, len(near)))]
            known.add(control.name)
            take_unused(control, used)
            controls.append(control)
    return controls


def _pathway_order(summary: Mapping[str, Any], traced: Sequence[TracedFeature]) -> list[str]:
    """Pathways of the features: those of the summary's table in its order, then others as they come."""
    present = dict.fromkeys(x.pathway for x in traced if x.pathway is not None)
    table = summary.get("pathways")
    first = [name for name in table if name in present] if isinstance(table, dict) else []
    return list(dict.fromkeys([*first, *present]))


def _no_pair(kept: Mapping[str, Sequence[ComboFeature]], target_layer: int) -> str:
    there = "; ".join(
        f"{pathway} at layer {', '.join(str(layer) for layer in sorted({f.layer for f in features}))}"
        for pathway, features in kept.items()
    )
    return (
        f"the selective trace gives no pair: no pathway has features at two layers before {target_layer} (there are: "
        f"{there or 'none'}); trace more features (--n-features) or layers (--source-layers) with "
        "selective_feature_tracing.py, bring your own keywords there (--pathways), or name pairs with --pairs FILE."
    )


def _traced_features(summary: Any, where: str) -> list[TracedFeature]:
    """Every feature of a selective summary.

    Raises:
        UserError: it is of another form.
    """
    entries = summary.get("features") if isinstance(summary, Mapping) else None
    if not isinstance(entries, list):
        raise UserError(f"{where}: has no list `features`, so it is not the summary of a selective trace.")
    return [_traced_feature(entry, f"{where}: feature entry {i}") for i, entry in enumerate(entries, start=1)]


def _traced_feature(entry: Any, where: str) -> TracedFeature:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: is no table; make the summary again with selective_feature_tracing.py.")

    def checked(key: str, is_right: bool, expected: str) -> Any:
        if not is_right:
            raise UserError(f"{where}: `{key}` is {entry.get(key)!r:.60}, expected {expected}.")
        return entry.get(key)

    def count(key: str) -> int:
        value = entry.get(key)
        return checked(key, type(value) is int and value >= 0, "an integer of at least 0")

    label, pathway, frequency = entry.get("label"), entry.get("pathway"), entry.get("activation_freq")
    checked("label", isinstance(label, str), "a text")
    checked("pathway", pathway is None or isinstance(pathway, str), "a text or null")
    is_share = isinstance(frequency, int | float) and 0 < frequency <= 1
    checked("activation_freq", is_share, "a number above 0 and at most 1")
    feature = ComboFeature(count("layer"), count("idx"), printable(label), count("n_edges"), *best_term_of(entry))
    return TracedFeature(feature, pathway, float(frequency))
