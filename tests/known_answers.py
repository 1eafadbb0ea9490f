"""What the demo gives: a few numbers of every experiment, so that no change of the numbers goes unseen.

    .venv/bin/python tests/known_answers.py            # compare with known_answers.json and print what differs
    .venv/bin/python tests/known_answers.py --write    # the same, then write the new answers

The scripts run as a user runs them, on the demo's model and cells, at their default seeds, one thread. A change of the
file belongs with the change of the code that explains it.
"""

import argparse
import contextlib
import importlib
import io
import json
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FILE = Path(__file__).with_name("known_answers.json")
DEMO = ROOT / "demo"
INPUTS = ["--model", str(DEMO / "model"), "--data-path", str(DEMO / "cells.h5ad"), "--device", "cpu"]
SAES = ["--data-root", str(DEMO)]
CELLS = ["--cells", "all", "--obs-filter", "split=held_out", "--n-cells", "12"]
TRAJECTORY = [
    "--cell-type-column", "marker_group", "--cell-types", "monocyte;macrophage_like", "--tissues", "all",
    "--disconnected", "drop", "--n-cells", "60",
]  # fmt: skip
FEATURES = "7,25,55,114,129,153,172,200,213,231"
COMBINATIONS = {2: ("--pairs", "0:46,11:103\n5:20,5:114\n"), 3: ("--triplets", "0:46,5:114,11:103\n")}
PANEL = [{"layer": 0, "idx": 46}, {"layer": 5, "idx": 114}, {"layer": 11, "idx": 103}, {"layer": 17, "idx": 240}]
N_EDGES = 12

# Measured between the oldest and newest versions: no difference at all. With two threads, without AVX-512 and without
# AVX: every whole number the same, state shifts within 4e-5, all else within 4e-6. A near tie may fall the other way on
# a processor that was not measured, which moves more than that.
RELATIVE = 5e-4  # of a number's size, or of these where it is next to 0
SMALLEST = {
    "mean_state_shift": 1e-6,
    "signature": 1e-6,
    "markers": 0.1,
    "probe": 0.1,
    "mean_delta": 1e-3,
    "max_logit_delta": 1e-3,
    "min_logit_delta": 1e-3,
}
OF_TRAINING = 2e-3  # where rounding grows from step to step
# of what passes a threshold: one more or less, or this share
COUNTS = ("n_edges", "n_significant", "degree", "calibration", "n_tests", "n_interactions")
COUNT_SHARE = 0.005


def compute(folder: Path) -> dict[str, Any]:
    """Run all scripts, with results in `folder`, and pick the answers."""
    sys.path[:0] = [path for path in (str(ROOT / "src"),) if path not in sys.path]
    return {
        "tracing": tracing(folder / "tracing"),
        "pairs": combinations(folder / "pairs", 2),
        "triplets": combinations(folder / "triplets", 3),
        "trajectory": trajectory(folder / "trajectory"),
        "steering": steering(folder / "steering", folder / "trajectory"),
        "specificity": specificity(folder / "specificity", folder / "tracing"),
        "controlled": controlled(folder / "controlled", folder / "trajectory"),
        "training": training(folder / "training"),
    }


def run(script: str, *flags: str) -> None:
    """Run one script of `src/` in this process.

    Raises:
        RuntimeError: it failed.
    """
    main = importlib.import_module(script).main
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = main(list(flags))
    if status:
        raise RuntimeError(f"{script} ended with {status}: {said.getvalue()[-2000:]}")


def read(path: Path) -> Any:
    """One JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def tracing(out_dir: Path) -> dict[str, Any]:
    """Edges per layer, out-degrees, and the strongest edge of each feature and layer, a dozen of them."""
    import pyarrow.parquet as pq

    flags = ["--source-layer", "5", "--features", FEATURES, "--out-dir", str(out_dir)]
    run("exhaustive_feature_tracing", *INPUTS, *SAES, *CELLS, *flags)
    edges = pq.read_table(out_dir / "edges.parquet").to_pylist()
    best: dict[tuple[int, int], dict[str, Any]] = {}
    for edge in edges:
        key = edge["target_layer"], edge["source"]
        if edge["n_cells"] >= 6 and abs(edge["mean_delta"]) > abs(best.get(key, {"mean_delta": 0.0})["mean_delta"]):
            best[key] = edge
    strongest = sorted(best.values(), key=lambda edge: -abs(edge["mean_delta"]))[:N_EDGES]
    numbers = ("mean_delta", "cohens_d", "consistency", "n_cells")
    return {
        "n_edges": {f"L{layer}": sum(edge["target_layer"] == layer for edge in edges) for layer in (6, 11, 17)},
        "degree": {f"F{i}": sum(edge["source"] == i for edge in edges) for i in map(int, FEATURES.split(","))},
        "edges": {
            f"L5/F{edge['source']} -> L{edge['target_layer']}/F{edge['target']}": {key: edge[key] for key in numbers}
            for edge in strongest
        },
        "calibration": calibration(out_dir, [edge["p_sign_flip"] for edge in edges]),
        "cells_and_genes": inputs_of(out_dir / "exhaustive_summary.json"),
    }


def calibration(out_dir: Path, p_of_edges: list[float]) -> dict[str, Any]:
    """What tests leave of the edges, what chance makes of them, and how much each feature writes."""
    import pyarrow.parquet as pq

    content = read(out_dir / "calibration.json")
    rows = [row for row in pq.read_table(out_dir / "features.parquet").to_pylist() if row["is_traced"]]
    return {
        **{name: content[name] for name in ("n_tests", "n_tests_bh", "n_edges_bh", "n_edges_calibrated")},
        "n_edges_with_p_below_0.01": sum(p < 0.01 for p in p_of_edges),
        **{name: content["published_rule"][name] for name in ("expected_null_edges", "fdr", "fdr_low", "fdr_high")},
        "ablated_norm": {f"F{row['feature']}": row["ablated_norm"] for row in rows},
    }


def inputs_of(path: Path) -> dict[str, Any]:
    """What a summary says was used and left out."""
    return read(path)["inputs"]


def combinations(out_dir: Path, order: int) -> dict[str, Any]:
    """Ratios and counts of each combination."""
    flag, listed = COMBINATIONS[order]
    out_dir.mkdir()
    path = out_dir.with_suffix(".txt")
    path.write_text(listed)
    flags = ["--order", str(order), flag, str(path), "--out-dir", str(out_dir)]
    run("higher_order_ablation", *INPUTS, *SAES, *CELLS, *flags)
    ratio = (
        ("ratio_median",) if order == 2 else ("threeway_ratio", "pairwise_ratios", "higher_order_interaction_median")
    )
    names = ("n_active", "n_significant", *ratio, "mean_abs_d")
    records = [read(path) for path in sorted(out_dir.glob("*L*_F*.json"))]
    additive = {entry["id"]: entry["conditions"] for entry in read(out_dir / "additivity.json")["combinations"]}
    tested = ("redundancy_index", "redundancy_index_low", "redundancy_index_high", "n_tests", "n_interactions")
    return {
        key_of(record): {
            **{name: record[name] for name in names},
            "norm_ratio": {name: of["norm_ratio"] for name, of in record["additivity_of_means"].items()},
            "additivity": {name: {key: of[key] for key in tested} for name, of in additive[key_of(record)].items()},
        }
        for record in records
    }


def key_of(record: dict[str, Any]) -> str:
    """The name of a pair or triplet."""
    return record.get("pair_id") or record["triplet_id"]


def trajectory(out_dir: Path) -> dict[str, Any]:
    """How pseudotime follows what it may follow, and the switch features."""
    root = ["--root-cell-type", "monocyte", "--root-markers", "S100A8,VCAN", "--follow-genes", "APOE"]
    flags = [*root, "--layers", "5,17", "--n-on", "2", "--n-off", "2", "--out-dir", str(out_dir)]
    run("trajectory_analysis", *INPUTS, *SAES, *TRAJECTORY, *flags)
    summary, panel = read(out_dir / "trajectory_summary.json"), read(out_dir / "switch_features.json")
    names = ("n_cells", "n_left_out", "n_early", "n_late", "root", "n_tested", "n_switch_features")
    return {
        **{name: summary[name] for name in names},
        "rho": {name: summary["confounds"][name]["rho"] for name in ("n_genes_detected", "depth")}
        | {"APOE": summary["followed_genes"]["APOE"]["rho"]},
        "switch_features": {
            f"{x['kind']} L{x['layer']}/F{x['idx']}": {key: x[key] for key in ("d", "spearman_rho", "freq")}
            for x in panel
        },
    }


def steering(out_dir: Path, traj_dir: Path) -> dict[str, Any]:
    """State shifts and the genes whose logits move most."""
    panel = out_dir.with_suffix(".json")
    panel.write_text(json.dumps(PANEL))
    flags = ["--traj-dir", str(traj_dir), "--panel", str(panel), "--alphas", "2,5", "--out-dir", str(out_dir)]
    run("trajectory_steering", *INPUTS, *SAES, *TRAJECTORY, *flags)
    names = ("n_cells_steered", "mean_state_shift", "frac_positive_shift", "max_logit_delta", "min_logit_delta")
    return {
        f"L{x['layer']}/F{x['feature_idx']}": {
            alpha: {
                **{name: result[name] for name in names},
                "most_raised": result["top_upregulated"][0]["gene"],
                "most_lowered": result["top_downregulated"][0]["gene"],
            }
            for alpha, result in x["alpha_results"].items()
        }
        for x in read(out_dir / "summary.json")["features"]
    }


def specificity(out_dir: Path, trace_dir: Path) -> dict[str, Any]:
    """Edges and strength of two features' ablations, and of one draw of each control."""
    flags = ["--trace-dir", str(trace_dir), "--features", "25,213", "--draws", "1", "--out-dir", str(out_dir)]
    run("specificity_controls", *INPUTS, *SAES, *CELLS, *flags)
    records = [read(path) for path in sorted(out_dir.glob("specificity_*.json"))]
    names = ("n_edges", "n_live_targets", "effect_norm")
    return {
        f"F{record['feature_idx']}": {
            "real": {name: record["real"][name] for name in names},
            **{
                control: {name: draw[name] for name in (*names, "effect_cosine", "direction_cosine")}
                for control, (draw,) in record["controls"].items()
            },
            "other": record["controls"]["other_feature"][0]["feature_idx"],
        }
        for record in records
    }


def controlled(out_dir: Path, traj_dir: Path) -> dict[str, Any]:
    """Which features are chosen, what they and their controls do to every readout, and the primary test."""
    probe = ["--probe-labels", "monocyte", "macrophage_like", "--probe-cells", "40"]
    few = ["--layers", "0,5", "--n-on", "2", "--n-off", "2", "--n-steered", "6", "--draws", "1", "--doses", "0.5"]
    markers = ["--markers", str(DEMO / "markers.json"), "--traj-dir", str(traj_dir), "--out-dir", str(out_dir)]
    run("controlled_steering", *INPUTS, *SAES, *TRAJECTORY, *probe, *few, *markers)
    tests = read(out_dir / "steering_tests.json")
    numbers = ("mean", "linear_prediction", "n")
    return {
        "primary": {key: tests["primary"][key] for key in ("estimate", "excess_estimate", "n_on", "n_off")},
        "probe": {key: tests["probe"][key] for key in ("auc", "n_early", "n_late")},
        "mean_norm": {layer: facts["mean_norm"] for layer, facts in tests["layers"].items()},
        "features": {
            f"{x['kind']} L{x['layer']}/F{x['feature_idx']}": {
                "n_cells": x["n_cells"],
                "switch_d": x["switch_d"],
                **{
                    name: {key: of[key] for key in numbers}
                    | {control: of["controls"][control]["mean"] for control in of["controls"]}
                    for name, of in x["readouts"].items()
                },
            }
            for x in tests["features"]
        },
    }


def training(data_root: Path) -> dict[str, Any]:
    """Quality of a small SAE after one epoch."""
    size = [
        "--layers",
        "5",
        "--k",
        "8",
        "--expansion",
        "2",
        "--epochs",
        "1",
        "--train-rows",
        "8000",
        "--loss-cells",
        "2",
    ]
    run("prepare_inputs", *INPUTS, "--cells", "all", "--n-cells", "60", *size, "--data-root", str(data_root))
    quality = read(data_root / "sae_models" / "layer05_x2_k8" / "results.json")["quality"]
    names = ("fvu", "pca_fvu", "alive", "loss_original", "loss_recovered_from_mean_ablated", "n_held_out_positions")
    return {name: quality[name] for name in names}


def differences(known: Any, found: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Every answer that is not the known one within its tolerance, a line each."""
    where = ".".join(path)
    if isinstance(known, dict) and isinstance(found, dict):
        for key in dict.fromkeys([*known, *found]):
            if key in known and key in found:
                yield from differences(known[key], found[key], (*path, key))
            else:
                yield f"{where}.{key}: {'gone' if key in known else 'new'}"
    elif type(known) is not type(found) or not agrees(known, found, path):
        yield f"{where}: {known} -> {found}"


def agrees(known: Any, found: Any, path: tuple[str, ...]) -> bool:
    """Whether two answers are the same within the tolerance of their kind."""
    if type(known) is int and any(name in path for name in COUNTS):
        return abs(known - found) <= max(1, COUNT_SHARE * known)
    if type(known) is not float:
        return known == found
    share = OF_TRAINING if path[0] == "training" else RELATIVE
    smallest = next((SMALLEST[name] for name in path if name in SMALLEST), 1e-2)
    return abs(known - found) <= share * max(abs(known), smallest)


def answers() -> dict[str, Any]:
    """`compute` in a folder of its own, on one thread and without the scripts' notes."""
    import torch

    torch.set_num_threads(1)
    logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        return json.loads(json.dumps(compute(Path(folder)), allow_nan=False))


def main() -> int:
    """Compare, and write where that is asked for; the exit status is 1 where something differs and is not written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="make what is found the known answers")
    write = parser.parse_args().write
    found = answers()
    known = read(FILE) if FILE.exists() else {}
    changed = list(differences(known, found))
    print("\n".join(changed) or "No answer differs by more than its tolerance.")
    if write:
        FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"Written: {FILE}")
    return 0 if write or not changed else 1


if __name__ == "__main__":
    sys.exit(main())
