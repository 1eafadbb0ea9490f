"""`additivity.json`: interactions over the whole folder, redundancy by class, whether the class matters.

A pure function of the combinations' records. Family of the tests: every live (combination, joint condition, target).
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, false_discovery_control, permutation_test

from cellcircuits.combination_results import INDEX_KEYS, KINDS, feature_names, published_ratios
from cellcircuits.combination_stats import REDUNDANCY, SYNERGY
from cellcircuits.combinations import CROSS, LETTERS, RANDOM, SAME
from cellcircuits.edge_fdr import MAX_Q, PCounts, QValues, none_called, resolution, unpacked

CLASSES = (SAME, CROSS, RANDOM)
CONTRASTS = ((SAME, RANDOM), (SAME, CROSS), (CROSS, RANDOM))  # the first is the class effect
FEWEST = 3  # combinations of a class, to say anything about it
N_PERMUTATIONS, N_RESAMPLES = 9_999, 2_000
DEFINITIONS = {
    "effects": "change of a target's latent, averaged over the positions where any feature of the combination is "
    "active, the same cells and positions for every condition",
    "live target": "changed beyond rounding by any condition in at least one cell; the same for all conditions of a "
    "combination, and not chosen by significance",
    "interaction": "what a condition's own subsets do not explain, by inclusion and exclusion; 0 in a cell where "
    "rounding alone may have made it; its mean over the cells is tested by sign flips: all of them for up to 12 cells, "
    "else drawn ones, more of them for targets that hardly any reaches",
    "family": "every live (combination, joint condition, target) of this folder; an interaction is called at q < 0.05 "
    "(Benjamini-Hochberg), strictly at q < 0.05 (Benjamini-Yekutieli)",
    "synergy": "the interaction makes the sum of the single effects larger; redundancy: smaller",
    "redundancy_index": "1 - |expected joint effect| / |expected sum of the single ones|, norms over the live targets; "
    "0 is additive, 1 leaves nothing, negative is synergy; squares are taken between different cells, so that the "
    "spread over cells does not count as effect; 95% by resampling cells; plug_in: from the norms of the means",
    "projection": "<joint, sum> / |sum|^2; 1 is additive; unlike the index it sees a change of direction",
    "published_ratio": "|d| of the joint effect over the sum of the single |d|, median over significant targets; "
    "if_additive: the same of exactly additive effects of the same cells",
    "class_effect": "difference of the mean redundancy index, same-pathway less matched random, of combinations that "
    "share no feature, two-sided permutation test with the combination as the unit",
}


def additivity_summary(order: int, records: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `additivity.json`.

    Args:
        order: features per combination.
        records: of the combinations, in the order to list them.
        config: `n_cells`, `target_layer` and `additivity` of the run's settings.
    """
    counts = PCounts()
    for record in records:
        for condition in record["additivity"]["conditions"].values():
            numerators, condition_denominators = fractions(condition)
            for denominator in np.unique(condition_denominators).tolist():
                counts.add(denominator, numerators[condition_denominators == denominator])
    q_values = counts.q_values()
    entries = [_entry(order, record, q_values) for record in records]
    by_name = sorted(entries, key=lambda entry: entry["id"])  # numbers must not depend on the order of the list
    seed = config["additivity"]["seed"]
    contrasts = [_contrast(by_name, pair, [seed, number]) for number, pair in enumerate(CONTRASTS)]
    _add_q(contrasts)
    classes = {kind: _class(kind, by_name) for kind in CLASSES}
    return {
        "order": order,
        "n_cells": config["n_cells"],
        "target_layer": config["target_layer"],
        "settings": dict(config["additivity"]),
        "definitions": DEFINITIONS,
        "family": _family(by_name, seed) | resolution(q_values),
        "classes": classes,
        "class_effect": {
            "between": list(CONTRASTS[0]),
            **{key: contrasts[0][key] for key in ("statistic", "p", "reason")},
            f"n_{SAME}": contrasts[0]["n_first"],
            f"n_{CROSS}": classes[CROSS]["n_disjoint"],
            f"n_{RANDOM}": contrasts[0]["n_second"],
            "unit": "combination",
        },
        "contrasts": contrasts,
        "combinations": entries,
    }


def fractions(condition: Mapping[str, Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numerators and denominators of the p of a condition's live targets, (n_live,) each."""
    numerators, denominator = unpacked(condition["p"])
    refined, refined_denominator = unpacked(condition["p_refined"])
    is_refined = numerators == 0
    numerators[is_refined] = refined
    return numerators, np.where(is_refined, refined_denominator, denominator)


def _entry(order: int, record: Mapping[str, Any], q_values: QValues) -> dict[str, Any]:
    """One combination: its index, its interactions, and the same for every joint condition."""
    kind, tested = KINDS[order], record["additivity"]
    conditions = {
        name: _condition(record, name, condition, q_values) for name, condition in tested["conditions"].items()
    }
    full = conditions[LETTERS[:order]]
    counted = {
        key: sum(of_one[key] for of_one in conditions.values())
        for key in ("n_tests", "n_interactions", "n_interactions_by", "n_synergy", "n_redundancy")
    }
    return {
        "id": record[f"{kind}_id"],
        "kind": record[f"{kind}_type"],
        "pathway": record["pathway"],
        "features": feature_names(record),
        "n_cells": tested["n_cells"],
        "n_live_targets": tested["n_live_targets"],
        **{key: full[key] for key in (*INDEX_KEYS, "reason", "published_ratio", "published_ratio_if_additive")},
        **counted,
        "conditions": conditions,
    }


def _condition(record: Mapping[str, Any], name: str, condition: Mapping[str, Any], q_values: QValues) -> dict[str, Any]:
    p = np.divide(*fractions(condition))
    direction, _ = unpacked(condition["direction"])
    bh, by = q_values.of(p)
    called = bh < MAX_Q
    strong_q, _ = q_values.of(np.array([strong["p"] for strong in condition["strongest"]]))
    ratio, if_additive = published_ratios(record, name)
    return {
        **{key: condition[key] for key in (*INDEX_KEYS, "reason")},
        "n_tests": len(p),
        "n_changed": condition["n_changed"],
        "n_interactions": int(called.sum()),
        "n_interactions_by": int((by < MAX_Q).sum()),
        "n_synergy": int((called & (direction == SYNERGY)).sum()),
        "n_redundancy": int((called & (direction == REDUNDANCY)).sum()),
        "published_ratio": ratio,
        "published_ratio_if_additive": if_additive,
        "strongest": [s | {"q": float(q)} for s, q in zip(condition["strongest"], strong_q, strict=True)],
    }


def _family(entries: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Interactions over all tests, the share's interval by resampling combinations."""
    total = {
        key: sum(entry[key] for entry in entries)
        for key in ("n_tests", "n_interactions", "n_interactions_by", "n_synergy", "n_redundancy")
    }
    share = total["n_interactions"] / total["n_tests"] if total["n_tests"] else None
    found, tests = (
        np.array([entry[key] for entry in entries if entry["n_tests"]], dtype=np.float64)
        for key in ("n_interactions", "n_tests")
    )
    low = high = None
    reason = None if len(tests) >= FEWEST else f"fewer than {FEWEST} combinations with a live target"
    if reason is None and not total["n_interactions"]:
        reason = "no interaction is called, so that every resample has a share of 0"
    if reason is None:
        interval = bootstrap(
            (found, tests),
            lambda found, tests, axis: found.sum(axis=axis) / tests.sum(axis=axis),
            paired=True,
            vectorized=True,
            n_resamples=N_RESAMPLES,
            method="percentile",
            random_state=np.random.default_rng(np.random.SeedSequence([seed, len(tests)])),
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    bounds = {"share": share, "share_low": low, "share_high": high, "reason": reason}
    return {**total, **bounds}


def _class(kind: str, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    of_kind = [entry for entry in entries if entry["kind"] == kind]

    def middle(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(median(known)) if known else None

    return {
        "n_combinations": len(of_kind),
        "n_disjoint": len(disjoint(of_kind)),
        "redundancy_index_median": middle(entry["redundancy_index"] for entry in of_kind),
        "published_ratio_median": middle(entry["published_ratio"] for entry in of_kind),
        "published_ratio_if_additive_median": middle(entry["published_ratio_if_additive"] for entry in of_kind),
        "interaction_share_median": middle(
            entry["n_interactions"] / entry["n_tests"] for entry in of_kind if entry["n_tests"]
        ),
    }


def disjoint(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Combinations that share no feature, as many as a greedy choice finds, whatever the order of the list.

    Next comes the one that the fewest others left over share a feature with; among equals one of the class that has
    least so far, then the first by name.
    """
    left = {entry["id"]: entry for entry in entries}
    sharing = {
        name: {other for other in left if other != name and set(left[other]["features"]) & set(entry["features"])}
        for name, entry in left.items()
    }
    chosen: list[Mapping[str, Any]] = []
    taken = dict.fromkeys((entry["kind"] for entry in entries), 0)
    while left:
        name = min(left, key=lambda x: (len(sharing[x] & left.keys()), taken[left[x]["kind"]], x))
        chosen.append(left[name])
        taken[left[name]["kind"]] += 1
        left = {other: entry for other, entry in left.items() if other not in sharing[name] and other != name}
    return chosen


def _contrast(entries: Sequence[Mapping[str, Any]], pair: tuple[str, str], seed: Sequence[int]) -> dict[str, Any]:
    """Mean index of one class less that of another, over disjoint combinations of the two."""
    known = [entry for entry in entries if entry["kind"] in pair and entry["redundancy_index"] is not None]
    chosen = sorted(disjoint(known), key=lambda entry: entry["id"])
    first, second = (np.array([e["redundancy_index"] for e in chosen if e["kind"] == kind]) for kind in pair)
    found = {"first": pair[0], "second": pair[1], "n_first": len(first), "n_second": len(second)}
    if min(len(first), len(second)) < FEWEST:
        counted = zip((len(first), len(second)), pair, strict=True)
        there = ", ".join(f"{n} {kind}" for n, kind in counted if n < FEWEST)
        why = f"too few combinations that share no feature ({there}); at least {FEWEST} of each class are needed"
        return found | {"statistic": None, "p": None, "reason": why}
    statistic, p = class_test(first, second, np.random.default_rng(np.random.SeedSequence(seed)))
    return found | {"statistic": statistic, "p": p, "reason": None}


def class_test(
    first: NDArray[np.float64], second: NDArray[np.float64], rng: np.random.Generator
) -> tuple[float, float]:
    """Difference of the means, and its two-sided permutation p: exact where all exchanges are few enough to try."""
    result = permutation_test(
        (first, second),
        lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis),
        vectorized=True,
        n_resamples=N_PERMUTATIONS,
        alternative="two-sided",
        random_state=rng,
    )
    return float(result.statistic), float(result.pvalue)


def _add_q(contrasts: Sequence[dict[str, Any]]) -> None:
    """Benjamini-Hochberg over the contrasts that have a p."""
    known = [contrast for contrast in contrasts if contrast["p"] is not None]
    q_values = false_discovery_control([contrast["p"] for contrast in known]) if known else []
    for contrast in contrasts:
        contrast["q"] = None
    for contrast, q in zip(known, q_values, strict=True):
        contrast["q"] = float(q)


def additivity_lines(content: Mapping[str, Any]) -> Iterable[str]:
    """`additivity.json` in lines for the terminal."""
    family, effect = content["family"], content["class_effect"]
    kind = KINDS[content["order"]]
    known = [entry for entry in content["combinations"] if entry["redundancy_index"] is not None]
    yield "  do effects add, on the same cells and positions? (additivity.json)"
    if known:
        indices = [entry["redundancy_index"] for entry in known]
        redundant = sum((entry["redundancy_index_low"] or 0) > 0 for entry in known)
        synergistic = sum((entry["redundancy_index_high"] or 0) < 0 for entry in known)
        yield (
            f"    redundancy index, median of {len(known)} {kind}s: {median(indices):+.3f} ({min(indices):+.3f} to "
            f"{max(indices):+.3f}); 0 is exactly additive, 1 leaves nothing"
        )
        yield (
            f"    its 95% interval over the cells is above 0 (redundancy) for {redundant} {kind}s, below 0 (synergy) "
            f"for {synergistic}; about {0.025 * len(known):.0f} of each would be by chance"
        )
    else:
        yield f"    no {kind} has a redundancy index: {_first_reason(content)}"
    if family["share"] is not None:
        bounds = (family["share_low"], family["share_high"])
        interval = "" if None in bounds else f", {100 * bounds[0]:.2f} to {100 * bounds[1]:.2f}%"
        which = f"{family['n_redundancy']} make the sum smaller, {family['n_synergy']} larger"
        if not family["n_interactions"]:
            which = none_called(family)
        yield (
            f"    interactions at a false discovery rate of 5%: {family['n_interactions']} of {family['n_tests']} "
            f"tests ({100 * family['share']:.2f}%{interval}); {which}"
        )
    if effect["p"] is None:
        yield f"    same-pathway against matched random {kind}s: {effect['reason']}"
    else:
        yield (
            f"    same-pathway less matched random {kind}s: index {effect['statistic']:+.3f}, p {effect['p']:.2g} "
            f"({effect[f'n_{SAME}']} and {effect[f'n_{RANDOM}']} that share no feature)"
        )


def _first_reason(content: Mapping[str, Any]) -> str:
    return next((entry["reason"] for entry in content["combinations"] if entry["reason"]), "there is none")
