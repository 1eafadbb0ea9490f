"""What the tests of additivity find where the truth is known: simulated combinations, a printed table.

    python benchmarks/simulated_combinations.py [--quick]

The effects are drawn, everything after them is the experiment's own code. `quick` repeats less, which is what the tests
run.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import false_discovery_control

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from cellcircuits.additivity import combination_additivity
from cellcircuits.additivity_summary import class_test, fractions
from cellcircuits.combination_stats import (
    AdditivitySettings,
    CombinationEffects,
    combination_statistics,
    conditions,
)
from cellcircuits.edge_fdr import MAX_Q, unpacked
from cellcircuits.joint import ROUNDING
from cellcircuits.redundancy import redundancy
from cellcircuits.stats import EdgeRule

N_CELLS = (8, 10, 20, 50)
EPSILON = float(np.finfo(np.float32).eps)
SETTINGS = AdditivitySettings(n_resamples=1_000, n_refined=20_000)
Joint = Callable[[NDArray[np.float64], tuple[int, ...]], NDArray[np.float64]]  # single effects, members -> joint ones


def combination(singles: NDArray[np.float64], joint: Joint, noise: float, rng: np.random.Generator):
    """Effects of a combination as float32 passes would give them, and the bound on their rounding.

    Args:
        singles: (n_cells, order, n_targets) exact effects.
        joint: what several do together.
        noise: spread over cells that every condition has of its own.
        rng: draws noise, clean latents and rounding errors.
    """
    n_cells, order, n_targets = singles.shape
    subsets = conditions(order)
    exact = np.stack([joint(singles, members) for members in subsets], axis=1)
    exact += noise * rng.standard_normal(exact.shape)
    clean = rng.uniform(5.0, 20.0, (n_cells, 1, n_targets))
    # the same sign in every cell: the worst that rounding can do to a sign-flip test
    systematic = 1 + 2 * EPSILON * rng.standard_normal((1, len(subsets), n_targets))
    measured = ((clean + exact) * systematic).astype(np.float32).astype(np.float64) - clean.astype(np.float32)
    additive = np.stack([measured[:, list(members)].sum(axis=1) for members in subsets], axis=1)
    size = np.maximum(clean[:, 0], (clean + exact).max(axis=1))
    present = np.ones((n_cells, len(subsets)), dtype=bool)
    return CombinationEffects(present, measured, measured, additive), ROUNDING * EPSILON * size


def adds(singles: NDArray[np.float64], members: tuple[int, ...]) -> NDArray[np.float64]:
    """Effects that add exactly."""
    return singles[:, list(members)].sum(axis=1)


def largest(singles: NDArray[np.float64], members: tuple[int, ...]) -> NDArray[np.float64]:
    """Full redundancy: together no more than the larger one."""
    return singles[:, list(members)].max(axis=1)


def tested(effects: CombinationEffects, rounding: NDArray[np.float64], order: int, number: int) -> dict[str, Any]:
    """The part of the record that the tests fill."""
    features = [(layer, number) for layer in range(order)]
    return combination_additivity(effects, rounding, features, SETTINGS, torch.device("cpu"))


def called(answer: dict[str, Any], condition: str) -> NDArray[np.bool_]:
    """Which live targets have an interaction, over the tests of one combination and condition."""
    return false_discovery_control(np.divide(*fractions(answer["conditions"][condition]))) < MAX_Q


def row(what: str, n_cells: int, found: float, expected: str, is_right: bool) -> dict[str, Any]:
    """One line of the table."""
    return {"what": what, "n_cells": n_cells, "found": float(found), "expected": expected, "is_right": bool(is_right)}


def rate_row(what: str, n_cells: int, found: float, nominal: float, allowance: float) -> dict[str, Any]:
    """A line for a rate that must not exceed its nominal one by more than the simulation's own sampling error."""
    limit = nominal + allowance
    return row(what, n_cells, found, f"{nominal:.2f}; sampling error allows up to {limit:.3f}", found <= limit)


def sampling_error(rate: float, repeats: int) -> float:
    """What a share of `repeats` draws exceeds its expected one by in 1 of 200 simulations."""
    return 2.6 * float(np.sqrt(rate * (1 - rate) / repeats))


def additive_rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Exactly additive, independent, same-sign, equal effects."""
    rng = np.random.default_rng(1)
    for order, expected in ((2, 0.70), (3, 0.57)):
        singles = rng.normal(0.8, 1.0, (100, order, 200 if quick else 2000))
        effects, rounding = combination(singles, adds, 0.0, rng)
        name = "AB" if order == 2 else "ABC"
        ratio = combination_statistics(effects, order, EdgeRule())[{2: "ratio_median", 3: "threeway_ratio"}[order]]
        answer = tested(effects, rounding, order, 0)
        of_all = answer["conditions"][name]
        label = f"{order} additive effects:"
        near = abs(ratio - expected) < 0.02
        yield row(f"{label} published ratio", 100, ratio, f"{expected:.2f} within 0.02", near)
        index, low, high = (of_all[f"redundancy_index{end}"] for end in ("", "_low", "_high"))
        is_zero = abs(index) < 1e-5 and low - 1e-5 <= 0 <= high + 1e-5
        yield row(f"{label} redundancy index", 100, index, "0 within 0.00001", is_zero)
        n_called = sum(called(answer, condition).sum() for condition in answer["conditions"])
        yield row(f"{label} interactions called", 100, n_called, "0", n_called == 0)
        blind = tested(effects, np.zeros_like(rounding), order, 0)
        n_blind = called(blind, name).mean()
        yield row(f"{label} share called if rounding counted", 100, n_blind, "above 0.5", n_blind > 0.5)


def planted_rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Power for interactions of one standard deviation in a tenth of the targets, and the index of full redundancy."""
    rng, n_targets, repeats = np.random.default_rng(2), 300, 2 if quick else 20
    planted = np.arange(n_targets) < n_targets // 10

    def together(singles: NDArray[np.float64], members: tuple[int, ...]) -> NDArray[np.float64]:
        moves = rng.normal(1.0, 0.7, (len(singles), n_targets)) * planted  # noise of AB, A and B makes sd 1
        return adds(singles, members) + (moves if len(members) == 2 else 0.0)

    for n_cells, least in ((20, 0.8), (50, 0.99)):
        power, false, above = [], [], []
        for number in range(repeats):
            singles = rng.normal(0.5, 0.5, (n_cells, 2, n_targets)) * ~planted
            answer = tested(*combination(singles, together, 0.4, rng), 2, number)
            found = called(answer, "AB")
            power.append(found[planted].mean())
            false.append(found[~planted].sum() / max(1, found.sum()))
            direction, _ = unpacked(answer["conditions"]["AB"]["direction"])
            above.append((direction[planted & found] == 1).mean())
        yield row(
            "AND (only both move it): power", n_cells, np.mean(power), f"at least {least}", np.mean(power) >= least
        )
        allowance = 2.6 * 0.04 / np.sqrt(repeats)  # the share scatters by 0.04 from one to the next
        yield rate_row("AND: false discoveries", n_cells, np.mean(false), 0.05, allowance)
        yield row("AND: called synergy", n_cells, np.mean(above), "above 0.99", np.mean(above) > 0.99)
        singles = rng.normal(1.0, 0.5, (n_cells, 2, n_targets))
        answer = tested(*combination(singles, largest, 0.2, rng), 2, 0)
        index, low = (answer["conditions"]["AB"][key] for key in ("redundancy_index", "redundancy_index_low"))
        true = 1 - (1 + 0.5 / np.sqrt(np.pi)) / 2  # the mean of the larger of two normal effects
        is_near = abs(index - true) < 0.05 and low > 0
        yield row("joint = larger single: index", n_cells, index, f"{true:.2f} within 0.05", is_near)
        share = called(answer, "AB").mean()
        yield row("joint = larger single: power", n_cells, share, "above 0.99", share > 0.99)


def noise_rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Nothing but noise, shared between targets in part: how often anything is called."""
    rng, repeats = np.random.default_rng(3), 200 if quick else 1000
    for n_cells in N_CELLS:
        n_any = 0
        for number in range(repeats):
            shared = rng.standard_normal((n_cells, 3, 1)) * rng.standard_normal((1, 1, 50))
            values = shared + rng.standard_t(3, (n_cells, 3, 50))  # long tails
            present = np.ones((n_cells, 3), dtype=bool)
            effects = CombinationEffects(present, values, values, values)
            n_any += called(tested(effects, np.zeros((n_cells, 50)), 2, number), "AB").any()
        found, allowance = n_any / repeats, sampling_error(0.05, repeats)
        yield rate_row("noise only: false discovery rate", n_cells, found, 0.05, allowance)


def coverage_rows(quick: bool) -> Iterator[dict[str, Any]]:
    """How often the interval of the index holds the true one, of effects that vary over cells and are noisy."""
    repeats, true = 60 if quick else 1000, 0.3
    for n_cells in N_CELLS:
        rng, n_held, plug_in, index = np.random.default_rng(4), 0, [], []
        for _ in range(repeats):
            means = rng.normal(0, 0.5, (2, 300)) * (rng.random((2, 300)) < 0.3)
            singles = means * rng.gamma(4, 0.25, (n_cells, 2, 1)) + 0.5 * rng.standard_normal((n_cells, 2, 300))
            summed = singles.sum(axis=1)
            lost = rng.normal(true, 0.2, (n_cells, 1))
            found = redundancy((1 - lost) * summed + 0.5 * rng.standard_normal(summed.shape), summed, 1000, rng)
            if found["redundancy_index_low"] is None:
                n_held += 1  # an interval without ends holds everything
                continue
            n_held += found["redundancy_index_low"] <= true <= found["redundancy_index_high"]
            plug_in.append(found["redundancy_index_plug_in"])
            index.append(found["redundancy_index"])
        covered, limit = n_held / repeats, 0.94 - sampling_error(0.95, repeats)
        expected = f"0.95; 0.01 for the bootstrap and sampling error allow down to {limit:.3f}"
        yield row("index 0.30: coverage of its interval", n_cells, covered, expected, covered >= limit)
        is_near = abs(np.mean(index) - true) < 0.03
        yield row("index 0.30: mean of the index", n_cells, np.mean(index), "0.30 within 0.03", is_near)
        less = np.mean(plug_in)
        yield row("index 0.30: mean from norms of means", n_cells, less, "below the index", less < np.mean(index))


def class_rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Two classes whose index has one skewed distribution: how often the class effect has p < 0.05."""
    repeats = 60 if quick else 2000
    for n_first, n_second in ((4, 4), (8, 8), (5, 20)):
        rng, n_small = np.random.default_rng(5), 0
        for _ in range(repeats):
            first, second = (rng.lognormal(0, 1, n) - 1 for n in (n_first, n_second))
            n_small += class_test(first, second, rng)[1] < 0.05
        label = f"class effect, {n_first} against {n_second}: p < 0.05 where there is none"
        yield rate_row(label, n_first + n_second, n_small / repeats, 0.05, sampling_error(0.05, repeats))


def rows(quick: bool) -> list[dict[str, Any]]:
    """The table: `what`, `n_cells` (of a class effect the combinations), `found`, `expected`, `is_right`."""
    parts = (additive_rows, planted_rows, noise_rows, coverage_rows, class_rows)
    return [line for part in parts for line in part(quick)]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 where something is not as expected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="repeat less: half a minute")
    found = rows(parser.parse_args(argv).quick)
    for line in found:
        mark = "" if line["is_right"] else "  <-- not as expected"
        print(f"{line['what']:<62} n {line['n_cells']:>3}  {line['found']:>8.3f}  ({line['expected']}){mark}")
    return 0 if all(line["is_right"] for line in found) else 1


if __name__ == "__main__":
    sys.exit(main())
