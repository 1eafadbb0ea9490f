"""Does amplifying features that rise along a trajectory move cells on, more than other edits of the same size?

Numbers of records in, tests out. Over features (the unit of every claim about ON and OFF features): permutations of ON
and OFF within layers, or sign flips of one of them, and intervals from resampling features. Over cells (for one feature
at a time): sign flips and intervals from resampling cells. One contrast is primary; Benjamini-Hochberg over all others.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from cellcircuits.controlled_results import record_name
from cellcircuits.layered_difference import Layered, comparable, difference, difference_interval, difference_p
from cellcircuits.sign_flips import flips_of
from cellcircuits.steering_controls import CONTROLS, FREQUENCY_MATCHED
from cellcircuits.steering_readouts import LINEAR, N_MOVED, PROBABILITY, PROBE, READOUTS
from cellcircuits.switch_features import OFF, ON

MIN_FEATURES = 4  # of a side
MIN_CELLS = 5  # in which a feature, or a drawn control, must be steered to count in a contrast
N_RESAMPLES = 2000
N_PERMUTATIONS = 9999
LEVEL = 0.05
ALL_LAYERS = "all"
ALL_CODE = 10**6  # in seeds
DIFFERENCE = f"{ON}_minus_{OFF}"
TIE = 1e-12  # sums that differ by rounding count as equal, as a share of the sum of absolute values
ANALYTIC = "closed form: no block lies between steering and readout, so cells are no independent evidence"
Interval = tuple[float | None, float | None]


def primary_definition(dose: Mapping[str, float | None]) -> dict[str, Any]:
    """What a run declares before anything is measured: the one contrast that it is about."""
    size = f"a norm of {dose['norm']:g}" if dose["norm"] is not None else f"alpha {dose['alpha']:g}"
    return {
        "name": f"{PROBE}_{FREQUENCY_MATCHED}_{DIFFERENCE}",
        "readout": PROBE,
        "control": FREQUENCY_MATCHED,
        "contrast": DIFFERENCE,
        "layer": ALL_LAYERS,
        "dose": dict(dose),
        "definition": f"probe log-odds at {size} over all layers with a block after them: (feature - its "
        "frequency-matched controls) of ON minus that of OFF features of the same layer, each a mean over cells, "
        "layers weighted by n_on n_off / (n_on + n_off); two-sided permutation of ON and OFF within layers, interval "
        "by resampling features",
    }


def grand_mean(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over draws of the mean over cells, of (..., n_cells, n_draws) with NaN for missing; NaN where nothing is."""
    known = np.isfinite(matrix)
    n = known.sum(axis=-2)
    sums = np.where(known, matrix, 0.0).sum(axis=-2)  # (..., n_draws)
    means = np.divide(sums, n, out=np.zeros_like(sums), where=n > 0)
    n_draws = (n > 0).sum(axis=-1)
    total = means.sum(axis=-1)
    return np.divide(total, n_draws, out=np.full(np.shape(total), np.nan), where=n_draws > 0)


def cell_interval(matrix: NDArray[np.float64], seeds: Sequence[int]) -> Interval:
    """95% interval of `grand_mean` from resampling cells, of (n_cells, n_draws); None for fewer than two cells."""
    used = matrix[np.isfinite(matrix).any(axis=1)]
    if len(used) < 2:
        return None, None

    def statistic(cells: NDArray[np.int64], axis: int = -1) -> NDArray[np.float64]:
        return grand_mean(used[np.moveaxis(cells, axis, -1)])

    return _interval((np.arange(len(used)),), statistic, seeds)


def _interval(
    samples: tuple[NDArray, ...], statistic: Callable[..., NDArray[np.float64]], seeds: Sequence[int]
) -> tuple[float, float]:
    drawn = stats.bootstrap(
        samples, statistic, n_resamples=N_RESAMPLES, vectorized=True, method="percentile", random_state=_rng(seeds)
    )
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def sign_flip_p(values: NDArray[np.float64], seeds: Sequence[int]) -> float | None:
    """Two-sided p that the values are symmetric about 0; exact for up to 12 of them, None for fewer than two.

    Args:
        values: (n,) without NaN.
        seeds: of the 9,999 sign vectors that are drawn for more.
    """
    if len(values) < 2:
        return None
    flips = flips_of(len(values), N_PERMUTATIONS, _rng(seeds))
    observed = abs(values.sum()) - TIE * np.abs(values).sum()
    n_as_large = np.array((np.abs(flips.signs @ values) >= observed).sum())
    numerator, denominator = flips.fractions(n_as_large)
    return float(numerator / denominator)


def of_features(on: Layered, off: Layered, contrast: str, seeds: Sequence[int]) -> dict[str, Any]:
    """One contrast over features.

    Args:
        on: value of each ON feature, less its controls.
        off: of each OFF feature.
        contrast: `ON`, `OFF` (against 0, by sign flips) or `ON_minus_OFF` (by permutation within layers; features of
            a layer without the other kind have nothing to be compared with, and do not count).
        seeds: of permutations and resampling.

    Returns:
        estimate, low, high, p, n, n_on, n_off, reason; None with a reason for fewer than four features of a side.
    """
    asked = _asked(on, off, contrast)
    found = _estimate("", asked, seeds)
    sizes = [len(of_kind.values) for of_kind in asked]
    n_on, n_off = sizes if len(asked) == 2 else (len(on.values), len(off.values))
    counts, fewest = {"n": sum(sizes), "n_on": n_on, "n_off": n_off}, min(sizes)
    if fewest < MIN_FEATURES:
        sides = "a side, in layers with both," if len(asked) == 2 else "this kind"
        reason = (
            f"{fewest} features of {sides} and a control of theirs were steered in {MIN_CELLS} cells or more; "
            f"{MIN_FEATURES} are needed"
        )
        return {**found, "p": None, **counts, "reason": reason}
    p = _permutation_p(*asked, seeds) if len(asked) == 2 else sign_flip_p(asked[0].values, seeds)
    return {**found, "p": p, **counts, "reason": None}


def _asked(on: Layered, off: Layered, contrast: str) -> tuple[Layered, ...]:
    return comparable(on, off) if contrast == DIFFERENCE else (on if contrast == ON else off,)


def _estimate(name: str, asked: tuple[Layered, ...], seeds: Sequence[int]) -> dict[str, float | None]:
    """Mean, or difference within layers, with its interval where there are four features of a side."""
    keys = [f"{name}_{key}".lstrip("_") for key in ("estimate", "low", "high")]
    fewest = min(len(of_kind.values) for of_kind in asked)
    if not fewest:
        return dict.fromkeys(keys)
    estimate = difference(*asked) if len(asked) == 2 else float(asked[0].values.mean())
    interval: Interval = (None, None)
    if fewest >= MIN_FEATURES and len(asked) == 2:
        interval = difference_interval(*asked, N_RESAMPLES, _rng(seeds))
    elif fewest >= MIN_FEATURES:
        interval = _interval((asked[0].values,), np.mean, seeds)
    return dict(zip(keys, (estimate, *interval), strict=True))


def _difference(on: NDArray[np.float64], off: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    return on.mean(axis=axis) - off.mean(axis=axis)


def _permutation_p(on: Layered, off: Layered, seeds: Sequence[int]) -> float:
    """By SciPy within one layer, which tries all permutations where they are few; within layers by draws."""
    if len(np.unique(on.layers)) > 1:
        return difference_p(on, off, N_PERMUTATIONS, _rng(seeds))
    tested = stats.permutation_test(
        (on.values, off.values), _difference, vectorized=True, n_resamples=N_PERMUTATIONS, random_state=_rng(seeds)
    )
    return float(tested.pvalue)


def _rng(seeds: Sequence[int]) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(list(seeds)))


def run_tests(records: Sequence[Mapping[str, Any]], declaration: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Everything that `steering_tests.json` says.

    Args:
        records: of the features, in any order.
        declaration: what the run declared before it measured: `primary`, `doses`, `layers`, `probe`, `halves` ...
        seed: of permutations and resampling.
    """
    ordered = sorted(records, key=lambda r: (r["layer"], r["feature_idx"]))
    features = [_of_feature(r, number, seed) for r in ordered for number in range(len(r["doses"]))]
    values = [[less_controls(r, number) for number in range(len(r["doses"]))] for r in ordered]
    contrasts = list(_contrasts(ordered, values, declaration, seed))
    asked = declaration["primary"]
    is_primary = [
        all(c[key] == asked[key] for key in ("readout", "control", "contrast", "layer", "dose")) for c in contrasts
    ]
    found = next((c for c, this in zip(contrasts, is_primary, strict=True) if this), None)
    primary = {**asked, **(found or _nothing(asked, ordered))}
    contrasts = [c for c, this in zip(contrasts, is_primary, strict=True) if not this]
    family = _correct(contrasts, features)
    layers = {layer: {**facts, **_sides(ordered, int(layer))} for layer, facts in declaration["layers"].items()}
    stated = {
        key: value for key, value in declaration.items() if key not in ("primary", "layers", "fingerprint", "panel")
    }
    return {
        "n_features": len(ordered),
        "features_steered": [record_name(r) for r in ordered],
        "primary": primary,
        "family": family,
        "layers": layers,
        "contrasts": contrasts,
        "features": features,
        **stated,
    }


def _sides(records: Sequence[Mapping[str, Any]], layer: int) -> dict[str, int]:
    kinds = [r["kind"] for r in records if r["layer"] == layer]
    return {"n_on": kinds.count(ON), "n_off": kinds.count(OFF)}


def _nothing(asked: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    counts = {f"n_{kind.lower()}": sum(r["kind"] == kind and not r["analytic"] for r in records) for kind in (ON, OFF)}
    reason = "no feature of a layer with a block after it"
    nothing = dict.fromkeys(("estimate", "low", "high", "excess_estimate", "excess_low", "excess_high", "p"))
    return {**nothing, "n": 0, **counts, "reason": reason}


def _matrix(draws: Sequence[Mapping[str, Any]], name: str, n_cells: int) -> NDArray[np.float64]:
    """A value of several draws, (n_cells, n_draws), NaN for missing."""
    columns = [np.array([np.nan if value is None else value for value in draw[name]]) for draw in draws]
    return np.stack(columns, axis=1) if columns else np.zeros((n_cells, 0))


def less_controls(record: Mapping[str, Any], number: int) -> dict[tuple[str, str], tuple[float, float]]:
    """What a feature does more than its controls at one dose, where both were measured.

    Draws, and features, that were steered in fewer than `MIN_CELLS` cells do not count.

    Returns:
        {(readout, control): (difference of the means, difference of their excess over the linear prediction)}.
    """
    dose, n_cells, found = record["doses"][number], len(record["steered_cells"]), {}

    def means(draws: Sequence[Mapping[str, Any]], readout: str) -> NDArray[np.float64] | None:
        measured, linear = (_enough(_matrix(draws, name, n_cells)) for name in (readout, LINEAR[readout]))
        return np.array([grand_mean(measured), grand_mean(measured - linear)]) if measured.shape[1] else None

    for readout in READOUTS:
        own = means([dose["feature"]], readout)
        for control in CONTROLS:
            others = means(dose["controls"][control], readout)
            if own is not None and others is not None:
                found[readout, control] = tuple((own - others).tolist())
    return found


def _enough(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    return matrix[:, np.isfinite(matrix).sum(axis=0) >= MIN_CELLS]


def _contrasts(
    records: Sequence[Mapping[str, Any]],
    values: Sequence[Sequence[Mapping[tuple[str, str], tuple[float, float]]]],
    declaration: Mapping[str, Any],
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Every contrast over features: layer by layer, and over all layers with a block after them."""
    groups: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        groups.setdefault(str(record["layer"]), []).append(i)
    groups[ALL_LAYERS] = [i for i, record in enumerate(records) if not record["analytic"]]
    for layer, members in groups.items():
        analytic = layer != ALL_LAYERS and bool(records[members[0]]["analytic"])
        code = ALL_CODE if layer == ALL_LAYERS else int(layer)
        asked = product(enumerate(declaration["doses"]), enumerate(READOUTS), enumerate(CONTROLS))
        for (number, dose), (r, readout), (k, control) in asked:
            (on, on_excess), (off, off_excess) = (
                _of_kind(
                    records, values, [i for i in members if records[i]["kind"] == kind], (number, readout, control)
                )
                for kind in (ON, OFF)
            )
            head = {"layer": layer, "dose": dict(dose), "readout": readout, "control": control}
            for c, contrast in enumerate((DIFFERENCE, ON, OFF)):
                seeds = (seed, 1, code, number, r, k, c)
                tested = of_features(on, off, contrast, seeds)
                excess = _estimate("excess", _asked(on_excess, off_excess, contrast), (*seeds, 1))
                yield {**head, "contrast": contrast, "analytic": analytic, **tested, **excess}


def _of_kind(
    records: Sequence[Mapping[str, Any]],
    values: Sequence[Sequence[Mapping[tuple[str, str], tuple[float, float]]]],
    members: Sequence[int],
    asked: tuple[int, str, str],
) -> tuple[Layered, Layered]:
    """Differences and excesses of those members that were measured at a dose, by a readout, against a control."""
    number, *key = asked
    measured = [i for i in members if tuple(key) in values[i][number]]
    found = np.array([values[i][number][tuple(key)] for i in measured]).reshape(-1, 2)
    layers = np.array([records[i]["layer"] for i in measured], dtype=np.int64)
    return Layered(found[:, 0], layers), Layered(found[:, 1], layers)


def _of_feature(record: Mapping[str, Any], number: int, seed: int) -> dict[str, Any]:
    """One feature at one dose: every readout with its interval over cells, beside its controls."""
    dose, analytic = record["doses"][number], record["analytic"]
    moved = [n for n in dose["feature"][N_MOVED] if n is not None]
    seeds = (seed, 2, record["layer"], record["feature_idx"], number)
    readouts = {readout: _of_readout(record, number, readout, (*seeds, r)) for r, readout in enumerate(READOUTS)}
    return {
        **{key: record[key] for key in ("layer", "feature_idx", "kind", "label", "switch_d", "frequency")},
        "n_cells": len(moved),
        "mean_positions": float(np.mean(moved)) if moved else None,
        "analytic": analytic,
        "dose": dose["dose"],
        "readouts": readouts,
    }


def _of_readout(record: Mapping[str, Any], number: int, readout: str, seeds: tuple[int, ...]) -> dict[str, Any]:
    dose, n_cells = record["doses"][number], len(record["steered_cells"])
    own = _matrix([dose["feature"]], readout, n_cells)
    direct = _matrix([dose["feature"]], LINEAR[readout], n_cells)
    excess = own - direct
    measured = own[np.isfinite(own)]
    p = None if record["analytic"] else sign_flip_p(measured, (*seeds, 0))
    reason = ANALYTIC if record["analytic"] else None if len(measured) > 1 else f"steered in {len(measured)} cells"
    found = {
        "n": len(measured),
        **_with_interval("mean", own, (*seeds, 1), record["analytic"]),
        "p": p,
        "q": None,
        "linear_prediction": _number(grand_mean(direct)),
        **_with_interval("excess", excess, (*seeds, 2), record["analytic"]),
        "reason": reason,
    }
    if readout == PROBE:
        found["mean_probability"] = _number(grand_mean(_matrix([dose["feature"]], PROBABILITY, n_cells)))
    controls = {}
    for k, control in enumerate(CONTROLS):
        others = _matrix(dose["controls"][control], readout, n_cells)
        moved = _matrix(dose["controls"][control], N_MOVED, n_cells)
        tested = _of_control(own[:, 0], others, (*seeds, 3, k), record["analytic"])
        controls[control] = {**tested, "mean_positions": _number(grand_mean(moved))}
    return {**found, "controls": controls}


def _with_interval(name: str, matrix: NDArray[np.float64], seeds: Sequence[int], analytic: bool) -> dict[str, Any]:
    low, high = (None, None) if analytic else cell_interval(matrix, seeds)
    prefix = "" if name == "mean" else f"{name}_"
    return {name: _number(grand_mean(matrix)), f"{prefix}low": low, f"{prefix}high": high}


def _of_control(
    own: NDArray[np.float64], others: NDArray[np.float64], seeds: tuple[int, ...], analytic: bool
) -> dict[str, Any]:
    """A feature's controls: their mean, and a test of the feature less their mean in the same cells.

    The p speaks of these cells and these draws. `draws_as_large` counts the draws whose own mean is at least as far
    from 0 as the feature's: what another draw would give.
    """
    known = np.isfinite(others)
    n = known.sum(axis=1)
    of_cell = np.divide(np.where(known, others, 0.0).sum(axis=1), n, out=np.full(len(n), np.nan), where=n > 0)
    paired = (own - of_cell)[np.isfinite(own - of_cell)]
    means = [float(grand_mean(column[:, None])) for column in others.T if np.isfinite(column).any()]
    mean = _number(grand_mean(own[:, None]))
    p = None if analytic else sign_flip_p(paired, (*seeds, 0))
    reason = ANALYTIC if analytic else None if p is not None else f"{len(paired)} cells with both"
    return {
        **_with_interval("mean", others, (*seeds, 1), analytic),
        "p": p,
        "q": None,
        "n": len(paired),
        "n_draws": len(means),
        "draws_as_large": None if mean is None else sum(abs(other) >= abs(mean) for other in means),
        "reason": reason,
    }


def _number(value: NDArray[np.float64] | float) -> float | None:
    return None if np.isnan(value) else float(value)


def _correct(contrasts: Sequence[dict[str, Any]], features: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Fill in `q` over all tests but the primary one; returns what the family is."""
    per_feature = [
        of for f in features for readout in f["readouts"].values() for of in (readout, *readout["controls"].values())
    ]
    tested = [test for test in (*contrasts, *per_feature) if test["p"] is not None]
    for test in contrasts:
        test.setdefault("q", None)
    if tested:
        for test, q in zip(tested, stats.false_discovery_control([test["p"] for test in tested]), strict=True):
            test["q"] = float(q)
    return {
        "n_tests": len(tested),
        "n_below": sum(test["q"] < LEVEL for test in tested),
        "level": LEVEL,
        "of": "every p but the primary one: contrasts over features, and over cells each feature against 0 and against "
        "each kind of control",
    }
