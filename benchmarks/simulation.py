"""What the statistics do where the truth is known: chance, planted effects, intervals and tails, as printed tables.

    python benchmarks/simulation.py            # minutes
    python benchmarks/simulation.py --quick    # fewer draws, under a minute
    python benchmarks/simulation.py --only noise,power --json simulation.json

Every number is made by the code that tests the edges of a trace. Seeds are fixed: the same command prints the same.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from scipy.stats import t as student_t  # noqa: E402
from scipy.stats import zipf  # noqa: E402
from simulated_combinations import rows as combination_rows  # noqa: E402

from cellcircuits.calibration import Calibrator, hedges_g  # noqa: E402
from cellcircuits.degree_tail import tail_statistics, whole_distribution  # noqa: E402
from cellcircuits.edge_fdr import (  # noqa: E402
    MAX_Q,
    CalibrationSettings,
    Family,
    PCounts,
    false_discovery_rate,
    unpacked,
)
from cellcircuits.jsonio import write_json  # noqa: E402
from cellcircuits.stats import EdgeRule, effect_statistics  # noqa: E402

RULE = EdgeRule()
N_CELLS = (5, 8, 10, 20, 50)
SHARED = 0.5  # share of the variance that all targets of a cell have in common, where they depend on each other
PLANTED = 0.1  # share of targets with an effect
MIN_TESTED = 8
N_DEGREES, TAIL_P = 4000, 0.1
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Section:
    """One table: what it shows, and what makes its rows, given whether to be quick."""

    name: str
    title: str
    rows: Callable[[bool], Rows]


@dataclass(frozen=True)
class Draw:
    """How effects are drawn: `d` of the planted ones (0 for none), whether targets depend on each other."""

    n_cells: int
    d: float = 0.0
    dependent: bool = False
    n_features: int = 5
    n_targets: int = 100

    def features(self, rng: np.random.Generator) -> Iterable[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
        """Effects (n_cells, n_targets) of every feature, each target at a scale of its own, and which are planted."""
        for _ in range(self.n_features):
            noise = rng.normal(size=(self.n_cells, self.n_targets))
            if self.dependent:
                noise = np.sqrt(SHARED) * rng.normal(size=(self.n_cells, 1)) + np.sqrt(1 - SHARED) * noise
            planted = rng.random(self.n_targets) < (PLANTED if self.d else 0)
            signs = rng.choice([-1, 1], self.n_targets)
            yield (noise + np.where(planted, self.d * signs, 0)) * rng.gamma(2.0, size=self.n_targets), planted


@dataclass(frozen=True)
class Tested:
    """All tests of one family, (n_tests,) each: what is planted, p, and what each rule calls an edge."""

    planted: NDArray[np.bool_]
    p: NDArray[np.float64]
    bh: NDArray[np.bool_]
    by: NDArray[np.bool_]
    calibrated: NDArray[np.bool_]
    published: NDArray[np.bool_]
    expected_null_edges: float


def tested(draw: Draw, seed: Sequence[int], n_flips: int = CalibrationSettings.n_draws) -> Tested:
    """Draw the features of a graph and test their targets, as a trace would."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    settings = CalibrationSettings(n_draws=n_flips, n_sweep=1, n_resamples=1, n_flips_per_resample=1, min_cells=0)
    calibrator = Calibrator(RULE, settings, draw.n_cells, 0, torch.device("cpu"))
    counts, columns, facts = PCounts(), [], []
    for feature, (effects, planted) in enumerate(draw.features(rng)):
        found = calibrator.calibrate(feature, effects, np.ones(draw.n_cells, dtype=bool))
        counts.add(*reversed(unpacked(found.counts["p"])))
        is_edge = effect_statistics(effects, RULE).is_edge
        columns.append((planted, found.p, hedges_g(effects)[0], found.consistency, is_edge))
        facts.append({"n_edges": int(is_edge.sum()), "calibration": found.counts})
    planted, p, g, consistency, is_edge = (np.concatenate(x) for x in zip(*columns, strict=True))
    family = Family(counts.q_values(), RULE, 0)
    q_bh, q_by, is_calibrated = family.columns(p, g, consistency, np.full(len(p), draw.n_cells))
    null = false_discovery_rate(facts)["expected_null_edges"]
    return Tested(planted, p, q_bh < MAX_Q, q_by < MAX_Q, is_calibrated & is_edge, is_edge, null)


def noise_rows(quick: bool) -> Rows:
    """Symmetric noise: how often a family has a discovery, and how often the published rule calls an edge.

    With no effect anywhere every discovery is false, so the false discovery rate is the share of families with one.
    """
    n_families, rows = 10 if quick else 200, []
    for n_cells in N_CELLS:
        for dependent in (False, True):
            draw = Draw(n_cells, dependent=dependent)
            families = [tested(draw, (1, n_cells, dependent, i)) for i in range(n_families)]
            p = np.concatenate([of_one.p for of_one in families])
            rows.append(
                {
                    "cells": n_cells,
                    "targets": "dependent" if dependent else "independent",
                    "smallest p": float(p.min()),
                    "p < 0.05": float(np.mean(p < 0.05)),
                    "FDR, BH": float(np.mean([of_one.bh.any() for of_one in families])),
                    "FDR, BY": float(np.mean([of_one.by.any() for of_one in families])),
                    "published rule": float(np.mean([of_one.published.mean() for of_one in families])),
                    "by sign flips": float(
                        np.mean([of_one.expected_null_edges / len(of_one.p) for of_one in families])
                    ),
                    "by theory": rule_rate(n_cells, 100_000 if quick else 1_000_000),
                    "|d| alone": float(2 * student_t.sf(RULE.min_abs_d * np.sqrt(n_cells), n_cells - 1)),
                }
            )
    return rows


def rule_rate(n_cells: int, n_draws: int) -> float:
    """How often the published rule calls an edge of normal noise, by its geometry.

    Both of its parts depend on the direction of the noise alone, which is uniform: d by the angle to the line of equal
    effects, d = sqrt((n - 1) / n) / tan(angle), and the majority by the orthant. So directions are drawn.
    """
    rng = np.random.default_rng(np.random.SeedSequence([2, n_cells]))
    majority = int(np.floor(round(RULE.min_consistency * n_cells, 9)))
    directions = rng.normal(size=(n_draws, n_cells))
    cosine = directions.sum(axis=1) / np.sqrt(n_cells) / np.linalg.norm(directions, axis=1)
    d = np.sqrt((n_cells - 1) / n_cells) / np.tan(np.arccos(cosine))
    n_positive = (directions > 0).sum(axis=1)
    is_edge = (np.abs(d) > RULE.min_abs_d) & (np.maximum(n_positive, n_cells - n_positive) > majority)
    return float(is_edge.mean())


def power_rows(quick: bool) -> Rows:
    """A tenth of the targets with an effect: what is found of them, and what share of the findings is false."""
    n_families, rows = 2 if quick else 20, []
    for n_cells in [n for n in N_CELLS if n >= MIN_TESTED]:
        for d in (0.5, 0.8, 1.2, 2.0):
            draw = Draw(n_cells, d, dependent=True, n_targets=400)
            families = [tested(draw, (3, n_cells, int(10 * d), i)) for i in range(n_families)]
            planted, p = (np.concatenate([getattr(x, name) for x in families]) for name in ("planted", "p"))
            row: dict[str, Any] = {"cells": n_cells, "d": d}
            for name, key in (("BH", "bh"), ("BY", "by"), ("calibrated", "calibrated"), ("published", "published")):
                called = [getattr(of_one, key) for of_one in families]
                row[f"power, {name}"] = float(np.concatenate(called)[planted].mean())
                row[f"false, {name}"] = float(
                    np.mean([_false_share(x, y.planted) for x, y in zip(called, families, strict=True)])
                )
            null = sum(of_one.expected_null_edges for of_one in families)
            n_edges = sum(of_one.published.sum() for of_one in families)
            rows.append(row | {"false, by sign flips": float(null / max(1, n_edges)), "tests": len(p)})
    return rows


def _false_share(called: NDArray[np.bool_], planted: NDArray[np.bool_]) -> float:
    """Share of a family's discoveries that are false, 0 where there is none; its mean is the false discovery rate."""
    return (called & ~planted).sum() / max(1, called.sum())


def interval_rows(quick: bool) -> Rows:
    """How often the interval beside Hedges' g holds the true effect size, and how far g and d are off on average."""
    n_targets, rows = 2_000 if quick else 40_000, []
    for n_cells in N_CELLS:
        for d in (0.0, 0.5, 1.0, 2.0):
            rng = np.random.default_rng(np.random.SeedSequence([4, n_cells, int(10 * d)]))
            effects = rng.normal(d, 1.0, (n_cells, n_targets))
            g, low, high = hedges_g(effects)
            rows.append(
                {
                    "cells": n_cells,
                    "d": d,
                    "coverage": float(np.mean((low <= d) & (d <= high))),
                    "mean g": float(g.mean()),
                    "mean d": float(effect_statistics(effects, RULE).d.mean()),
                    "mean width": float((high - low).mean()),
                }
            )
    return rows


def tail_rows(quick: bool) -> Rows:
    """Degrees of a known distribution, drawn several times: what the fits of the tail and of the whole make of them."""
    n_draws, precision = (2, 0.1) if quick else (10, 0.05)
    forms: dict[str, tuple[float | None, Callable[[np.random.Generator], NDArray[np.int64]]]] = {
        "power law, alpha 2.5": (2.5, lambda rng: zipf.rvs(2.5, size=N_DEGREES, random_state=rng)),
        "power law, alpha 3": (3.0, lambda rng: zipf.rvs(3.0, size=N_DEGREES, random_state=rng)),
        "lognormal(5.6, 0.7)": (None, lambda rng: np.exp(rng.normal(5.6, 0.7, N_DEGREES)).round().astype(np.int64)),
    }
    rows = []
    for number, (name, (alpha, drawn)) in enumerate(forms.items()):
        laws, best = [], []
        for i in range(n_draws):
            degrees = drawn(np.random.default_rng(np.random.SeedSequence([5, number, i])))
            laws.append(tail_statistics(degrees, precision, 1, i)["result"]["power_law"])
            best.append(whole_distribution(degrees)["result"]["models"][0]["name"])
        errors = [(law["alpha"] - 1) / np.sqrt(law["n_tail"]) for law in laws]  # Clauset et al. (2009), eq. 3.2
        fitted = [law["alpha"] for law in laws]
        within = [abs(x - alpha) < 3 * error for x, error in zip(fitted, errors, strict=True)] if alpha else []
        rows.append(
            {
                "degrees": name,
                "draws": n_draws,
                "median alpha": float(np.median(fitted)),
                "median standard error": float(np.median(errors)),
                "within 3 of them": f"{sum(within)} of {n_draws}" if alpha else "-",
                "features in the tail": float(np.median([law["share_of_features"] for law in laws])),
                "tail not rejected": f"{sum(law['p'] >= TAIL_P for law in laws)} of {n_draws}",
                "best form of all degrees": ", ".join(f"{form} {best.count(form)}" for form in sorted({*best})),
            }
        )
    return rows


SECTIONS = [  # a section is a function from `quick` to rows, which may live in a module of its own
    Section("noise", "Symmetric noise, no effect anywhere (nominal 0.05)", noise_rows),
    Section("power", "A tenth of the targets planted, dependent noise: power, and share of false findings", power_rows),
    Section("intervals", "Hedges' g and its interval (nominal coverage 0.95)", interval_rows),
    Section("tails", "Degrees of 4,000 features from a known distribution", tail_rows),
    Section("combinations", "Pairs and triplets with known interactions", combination_rows),
]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer draws")
    parser.add_argument(
        "--only", default=",".join(section.name for section in SECTIONS), help="sections to run (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the tables to this file too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate, print, write."""
    parser = build_parser()
    args = parser.parse_args(argv)
    chosen, known = args.only.split(","), {section.name: section for section in SECTIONS}
    unknown = [name for name in chosen if name not in known]
    if unknown:
        parser.error(f"--only {unknown[0]}: no such section; there are {', '.join(known)}")
    tables = {}
    for name in chosen:
        tables[name] = known[name].rows(args.quick)
        print("\n".join([known[name].title, *table_lines(tables[name]), ""]), flush=True)
    if args.json:
        write_json(args.json, {"quick": args.quick, "settings": asdict(CalibrationSettings()), "tables": tables})
    return 0


def table_lines(rows: Rows) -> list[str]:
    """Rows under their names, in columns."""
    cells = [[*rows[0]], *([_shown(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  " + "  ".join(f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True)) for line in cells]


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
