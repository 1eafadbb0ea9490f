"""A small folder of kept results in the real formats, with planted answers to every claim."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cellcircuits.kept_results import PUBLISHED, Results

NAME = "planted model"
N_FEATURES, N_CHOSEN = 60, 12
LAYERS = (2, 4, 5)
ALPHAS = ("2.0", "5.0")


def write(root: Path, name: str, content: Any) -> None:
    """Write one JSON file below `root`, as collect_results.py writes it."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"inputs_name": NAME, **content}, indent=2))


def change(root: Path, name: str, *keys: str | int, to: Any) -> None:
    """Change one value of a file."""
    content = json.loads((root / name).read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    (root / name).write_text(json.dumps(content, indent=2))


def with_interval(name: str, value: float, half: float) -> dict[str, float]:
    """A value with the ends of its interval."""
    return {name: value, f"{name}_low": value - half, f"{name}_high": value + half}


def write_results(root: Path) -> Results:
    """All files that figures, claims and numbers read."""
    rng = np.random.default_rng(3)
    degrees = np.sort(rng.poisson(30, N_FEATURES))[::-1]
    _write_trace(root, degrees)
    _write_graph(root)
    _write_combinations(root, rng)
    _write_steering(root, rng)
    _write_controls(root)
    (root / PUBLISHED.name).write_bytes(PUBLISHED.read_bytes())
    return Results(root, PUBLISHED)


def _write_controls(root: Path) -> None:
    controls = ("random", "random_covariance", "other_feature", "shuffled_positions")
    ratios = {
        name: {**with_interval("edge_ratio", 3.0 + i, 0.5), **with_interval("effect_norm_ratio", 2.0 + i, 0.3),
               "jaccard_mean": 0.2, "jaccard_low": 0.15, "jaccard_high": 0.25, "jaccard_expected": 0.1}
        for i, name in enumerate(controls)
    }  # fmt: skip
    write(root, "specificity/specificity.json", {"controls": ratios})
    contrasts = [
        {"layer": layer, "dose": {"norm": norm, "alpha": None}, "readout": readout, "control": control,
         "contrast": contrast, "estimate": size * value * norm, "low": size * (value * norm - 0.3),
         "high": size * (value * norm + 0.3), "p": 0.01, "n_on": 12, "n_off": 9,
         **with_interval("excess_estimate", size * value * norm / 2, 0.2 * size)}
        for layer in ("0", "all") for norm in (0.1, 1.0) for control in ("random_feature", "frequency_matched")
        for readout, size in (("signature", 1e-4), ("markers", 0.1), ("probe", 1.0))
        for contrast, value in (("ON_minus_OFF", 0.5), ("ON", 0.3), ("OFF", -0.2))
    ]  # fmt: skip
    for row in contrasts:
        row["excess_low"], row["excess_high"] = (row.pop(f"excess_estimate_{end}") for end in ("low", "high"))
    primary = contrasts.pop(-3)  # of probe, frequency_matched and the larger norm over all layers
    write(root, "controlled_steering/steering_tests.json", {
        "primary": {**primary, "name": "rising minus falling"}, "contrasts": contrasts,
    })  # fmt: skip


def _write_trace(root: Path, degrees: np.ndarray) -> None:
    table = {
        "layer": [1] * N_FEATURES,
        "feature": list(range(N_FEATURES)),
        "label": ["Cell cycle" if i % 5 == 0 else "unannotated" for i in range(N_FEATURES)],
        "activation_freq": np.linspace(0.2, 0.01, N_FEATURES),
        "is_traced": [True] * N_FEATURES,
        "n_edges": degrees.astype(np.int32),
        "top_genes": [[f"GENE{i}", "TP53"] for i in range(N_FEATURES)],
    }
    folder = root / "exhaustive_tracing"
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), folder / "features.parquet")
    total = int(degrees.sum())
    write(root, "exhaustive_tracing/exhaustive_summary.json", {
        "source_layer": 1, "n_features_traced": N_FEATURES, "total_edges": total,
        "mean_edges_per_feature": float(degrees.mean()), "median_edges_per_feature": float(np.median(degrees)),
        "max_edges": int(degrees.max()), "n_zero_edge_features": 0,
    })  # fmt: skip
    write(root, "exhaustive_tracing/calibration.json", {
        "n_tests": 5000, "n_edges": total, "n_edges_bh": total - 100, "n_edges_calibrated": total - 200, "n_hubs": 20,
        "n_hubs_kept": 19, "published_rule": {
            "observed_edges": total, "expected_null_edges": 0.04 * total, **with_interval("fdr", 0.04, 0.01)
        },
        "published_rule_by_degree": [
            {"min_degree": 10 * i, "max_degree": 10 * i + 9, **with_interval("fdr", 0.06 - 0.01 * i, 0.01)}
            for i in range(4)
        ],
        "sweep": [
            {"min_abs_d": d, "min_consistency": level, "edges": n, "expected_null_edges": share * n, "fdr": share}
            for level in (0.6, 0.7) for d, n, share in ((0.3, 6000, 0.3), (0.5, total, 0.04), (1.0, 200, 0.0))
        ],
    })  # fmt: skip
    settings = {"downstream_layers": list(LAYERS), "n_cells": 20, "min_abs_d": 0.5, "min_consistency": 0.7,
                "calibration": {"n_draws": 10000, "min_cells": 8}}  # fmt: skip
    origin = {"model": {"source": "planted"}, "code": "c0de" * 16, "versions": {"torch": "2", "transformers": "5"}}
    write(root, "exhaustive_tracing/manifest.json", {"settings": settings, "provenance": [origin]})
    chosen = degrees[:N_CHOSEN]
    write(root, "selective_tracing/selective_summary.json", {
        "n_features": N_CHOSEN, "features": [{"layer": 1, "idx": i, "n_edges": int(d)} for i, d in enumerate(chosen)],
    })  # fmt: skip
    for name, mean in (("exhaustive_tracing", total / N_FEATURES), ("selective_tracing", float(chosen.mean()))):
        layers = [
            {"target_layer": layer, "n_edges": 600 - 150 * i, "n_calibrated": 500 - 150 * i, "abs_d_median": 0.8,
             **with_interval("edges_mean", mean / (2 + i), 1.0)}
            for i, layer in enumerate(LAYERS)
        ]  # fmt: skip
        source = {"source_layer": 1, "n_features": N_FEATURES, "layers": layers}
        write(root, f"{name}/edges_by_layer.json", {"sources": [source | with_interval("last_over_first", 0.5, 0.1)]})


def _write_graph(root: Path) -> None:
    law = {"alpha": 2.5, "alpha_interval": [2.3, 2.7], "x_min": 20, "share_of_features": 0.5, "p": 0.4}
    spearman = {"rho": 0.05, "interval": [-0.1, 0.2]}
    curve = {"activation_freq": [0.01, 0.05, 0.2], "mean": [20, 30, 40], "low": [15, 25, 30], "high": [25, 35, 50]}
    matched = {"p": 0.01, "observed_share": 0.1, "expected_share": 0.4, "expected_range": [0.2, 0.6]}
    top = {"annotated_share": 0.1, "annotated_share_interval": [0.02, 0.3], "matched": matched}
    deciles = [{"annotated_share": 0.2, "interval": [0.1, 0.4], "expected_share_by_frequency": 0.25}] * 10
    write(root, "exhaustive_tracing/graph_statistics.json", {
        "degree": {"gini": 0.3},
        "tail": {"result": {"power_law": law, "alternatives": [{"name": "lognormal", "favoured": "power_law"}]}},
        "drivers": {"result": {
            "rank_correlations": {"activation_freq": {"spearman": spearman}},
            "model": {"terms": {"activation_freq": {"deviance_explained_alone": 0.02}}, "frequency_curve": curve},
        }},
        "annotation": {"n": N_FEATURES, "n_annotated": 12,
                       "result": {"deciles": deciles, "top": {"top_20": {"result": top}}}},
    })  # fmt: skip


def _write_combinations(root: Path, rng: np.random.Generator) -> None:
    kinds = ["same_pathway"] * 8 + ["cross_pathway"] * 8 + ["random"] * 8
    pairs = [
        {"pair_id": f"P{i}", "ratio_median": 0.6 + 0.005 * i, "ratio_median_if_additive": 0.7}
        for i in range(len(kinds))
    ]  # fmt: skip
    write(root, "pairwise_ablation/summary.json", {
        "per_pair_results": pairs[:16], "control_pair_results": pairs[16:], "config": {"target_layer": 5},
    })  # fmt: skip
    triplets = [{"triplet_id": f"T{i}", "threeway_ratio": 0.45, "threeway_ratio_if_additive": 0.57} for i in range(6)]
    listed = {"per_triplet_results": triplets[:4], "control_triplet_results": triplets[4:]}
    write(root, "higher_order_ablation/summary.json", listed)
    family = {"n_tests": 20000, "n_interactions": 900, "n_synergy": 0}
    of_kind = {"same_pathway": 0.4, "cross_pathway": 0.2, "random": 0.2}
    for folder, names, order in (("pairwise_ablation", kinds, 2), ("higher_order_ablation", kinds[:6], 3)):
        rows = []
        for i, kind in enumerate(names):
            index = of_kind[kind] + 0.02 * float(rng.normal()) + 0.2 * (order == 3)
            inside = {pair: {"redundancy_index": of_kind[kind]} for pair in ("AB", "AC", "BC")}
            ratios = {"published_ratio": 0.6, "published_ratio_if_additive": 0.7}
            conditions = {"conditions": inside} if order == 3 else {}
            rows.append({"id": f"{order}-{i}", "kind": kind, **with_interval("redundancy_index", index, 0.05), **ratios,
                         **conditions})  # fmt: skip
        write(root, f"{folder}/additivity.json", {
            "order": order, "family": family, "combinations": rows, "class_effect": {"p": 0.02},
        })  # fmt: skip


def _write_steering(root: Path, rng: np.random.Generator) -> None:
    features = []
    for layer in (0, 2, 5):
        for i in range(4):
            share = {0: 0.9, 2: 0.4, 5: 1.0}[layer]
            results = {
                alpha: {"n_cells_steered": 20, "frac_positive_shift": share - 0.05 * i if layer < 5 else share,
                        "mean_state_shift": 1e-4 * float(alpha) * (1 + i), "std_state_shift": 1e-4}
                for alpha in ALPHAS
            }  # fmt: skip
            features.append({"feature_idx": i, "layer": layer, "label": "label $x$", "switch_d": 0.8 if i else -0.8,
                             "alpha_results": results, "n_blocks_after": 5 - layer})  # fmt: skip
    write(root, "trajectory_steering/summary.json", {"n_features": len(features), "features": features})
    for feature in features:
        genes = {
            key: [{"gene": f"GENE{j}", "delta": sign * (1 - 0.1 * j)} for j in range(10)]
            for key, sign in (("top_upregulated", 1), ("top_downregulated", -1))
        }  # fmt: skip
        record = {"alpha_results": {alpha: genes for alpha in ALPHAS}}
        write(root, f"trajectory_steering/steering_F{feature['feature_idx']}_L{feature['layer']}.json", record)
    write(root, "trajectory_steering/manifest.json", {
        "settings": {"n_cells": 60, "n_early_cells": 20, "n_late_cells": 20, "alphas": [2.0, 5.0]},
    })  # fmt: skip
    confounds = {"n_genes_detected": {"rho": 0.4}, "depth": {"rho": 0.3}}
    write(root, "trajectory/trajectory_summary.json", {"confounds": confounds})
