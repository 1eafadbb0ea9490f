"""Experiment 3: steer SAE features in early cells of a trajectory and see whether the model's state moves towards late.

    python src/trajectory_steering.py --data-root sae_data --data-path immune.h5ad --traj-dir results/runs/trajectory

Writes into the output folder: steering_F25_L0.json per feature of the panel, state_signatures.npz, summary.json,
manifest.json, progress.json and partial/ while it runs. Running the same command again goes on where it stopped;
a larger panel adds its features.
"""

import argparse
import hashlib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellcircuits import cli, cli_check, manifest, results, steering_results
from cellcircuits.catalog import UNANNOTATED
from cellcircuits.input_counts import inputs_entry, left_out_lines
from cellcircuits.jsonio import write_json
from cellcircuits.panel import PUBLISHED_PANEL, PanelFeature, check_indices, check_layers, read_panel
from cellcircuits.trace_flags import add_sae_run_flag
from cellcircuits.trajectory_flags import add_trajectory_flags, trajectory_selection

if TYPE_CHECKING:
    from cellcircuits.inputs import LayerSAE, ModelAndCells
    from cellcircuits.trajectory import Trajectory
    from cellcircuits.vocabulary import GeneVocabulary

log = logging.getLogger(__name__)
EXPERIMENT = "trajectory_steering"
DEFAULT_OUT_DIR = Path("results/runs/trajectory_steering")
GO_ON = "everything finished is kept; run the same command again to go on."


def alpha_list(text: str) -> tuple[float, ...]:
    """Parse `2.0,5.0` into distinct finite numbers, in their order.

    Raises:
        argparse.ArgumentTypeError: something else.
    """
    try:
        # + 0.0 makes -0 the 0 that it is
        alphas = tuple(dict.fromkeys(float(part) + 0.0 for part in text.split(",") if part.strip()))
    except ValueError:
        alphas = ()
    if not alphas or not all(map(math.isfinite, alphas)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of finite numbers such as 2.0,5.0")
    return alphas


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Steer SAE features of a Geneformer in the early cells of a trajectory, and measure how far the "
        "model's mean logits move towards those of the late cells.",
        epilog="""example, on the demo's trajectory:
  python src/trajectory_steering.py --model demo/model --data-root demo --data-path demo/cells.h5ad \\
      --cell-type-column marker_group --cell-types 'monocyte;macrophage_like' --tissues all \\
      --traj-dir results/demo/trajectory --panel results/demo/trajectory/switch_features.json --out-dir results/try""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cli.add_model_flags(parser)
    add_sae_run_flag(parser)
    add_trajectory_flags(parser)
    group = parser.add_argument_group("what to steer")
    group.add_argument(
        "--panel",
        type=Path,
        default=None,
        metavar="FILE",
        help="features to steer: a JSON list of {layer, idx, d, label}, such as the switch_features.json of "
        "trajectory_analysis.py (default: the 14 of the study, for Geneformer V2-316M)",
    )
    group.add_argument(
        "--alphas",
        type=alpha_list,
        default=(2.0, 5.0),
        metavar="A,B",
        help="steering coefficients: 1 changes nothing, 0 ablates; write --alphas=-1,2 where the first is negative "
        "(default: 2.0,5.0)",
    )
    group.add_argument(
        "--batch-size", type=cli.natural, default=None, help="steered passes per batch (default: what memory allows)"
    )
    cli.add_out_dir_flag(group, "where results go", DEFAULT_OUT_DIR)
    cli.add_mix_versions_flag(group)
    cli_check.add_check_flag(group, "steer")
    group.add_argument("--analysis-only", action="store_true", help="summarise what the folder holds, steer nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    args = cli_check.parse(build_parser(), argv)
    return cli.run_script(lambda: report(args.out_dir) if cli_check.wants_report(args) else run(args), GO_ON)


def run(args: argparse.Namespace) -> int:
    """Open the inputs, steer what is not steered yet, summarise."""
    started = time.perf_counter()
    data_root = cli.require_path(args.data_root, "--data-root", "SAE_DATA_ROOT", folder=True)
    cli.require_path(args.data_path, "--data-path", "SAE_IMMUNE_H5AD", folder=False)
    panel = PUBLISHED_PANEL if args.panel is None else read_panel(args.panel)

    # torch and transformers take seconds to import: only once the cheap checks are done
    from cellcircuits import sae_store
    from cellcircuits.inputs import open_cells, open_model, open_saes
    from cellcircuits.steering import SteeringBench
    from cellcircuits.steering_run import Steerer
    from cellcircuits.trajectory import open_trajectory, provenance

    loaded = open_model(args)
    check_layers(panel, loaded.model.config.num_hidden_layers, args.panel)
    layers = open_saes(data_root, sorted({feature.layer for feature in panel}), args.sae_run, loaded)
    check_indices(panel, {layer: opened_sae.sae.n_features for layer, opened_sae in layers.items()}, args.panel)
    panel = with_labels(panel, layers)
    opened = open_cells(args, loaded, trajectory_selection(args))
    trajectory = open_trajectory(args, opened)
    settings = run_settings(args, opened, trajectory)
    saes = {layer: sae_store.fingerprint(opened_sae.files) for layer, opened_sae in layers.items()}
    if args.panel is not None:
        of_run = {"model": settings["model"], "saes": {str(layer): sae for layer, sae in saes.items()}}
        manifest.require_same_origin("--panel", [args.panel.parent], of_run)
    comes_from = provenance(opened, trajectory, layers)
    steerer = Steerer(
        out_dir=args.out_dir,
        bench=SteeringBench(loaded.model, {layer: opened_sae.sae for layer, opened_sae in layers.items()}),
        cells=opened.cells.cells,
        early=trajectory.early,
        late=trajectory.late,
        alphas=args.alphas,
        gene_of=symbol_of_token(opened.vocabulary),
        saes=saes,
        fingerprint=manifest.settings_fingerprint(settings),
        batch_size=args.batch_size,
    )
    if args.check:
        from cellcircuits.plan_report import Plan, Seconds, show
        from cellcircuits.steering_plan import check_steering

        goes_on = manifest.check_folder(args.out_dir, settings, comes_from, mix_versions=args.mix_versions)
        opening = Seconds.exactly(time.perf_counter() - started)
        plan = Plan(opened, layers, args.out_dir, settings["precision"], opening)
        return show(check_steering(plan, steerer, panel, goes_on=goes_on), args.command)
    with results.exclusive(args.out_dir):
        manifest.claim_folder(args.out_dir, settings, comes_from, mix_versions=args.mix_versions)
        steerer.steer(panel)
        report(args.out_dir, [feature.name for feature in panel])
    print(f"Results: {args.out_dir} ({time.perf_counter() - started:.0f} s)")
    return 0


def with_labels(panel: Sequence[PanelFeature], layers: Mapping[int, "LayerSAE"]) -> list[PanelFeature]:
    """The panel with the labels of the SAEs' catalogs where it brings none."""
    labelled = []
    for feature in panel:
        known = (layers[feature.layer].catalog or {}).get(feature.index)
        label = feature.label if feature.label is not None else known.label if known else UNANNOTATED
        labelled.append(replace(feature, label=label))
    return labelled


def symbol_of_token(vocabulary: "GeneVocabulary") -> dict[int, str]:
    """{token: symbol} of the genes that have one in the name dictionary; the last one where a gene has several."""
    symbols = {ensembl: symbol for symbol, ensembl in vocabulary.ensembl_of.items()}
    return {token: symbols[ensembl] for ensembl, token in vocabulary.token_of.items() if ensembl in symbols}


def run_settings(args: argparse.Namespace, opened: "ModelAndCells", trajectory: "Trajectory") -> dict[str, Any]:
    """Everything that determines the numbers of a feature, but for its SAE, which its record names.

    Which features are asked for does not; nor does a pseudotime that parts the cells in the same way.
    """
    import numpy as np

    sides = np.zeros(len(opened.cells.cells), dtype=np.int8)
    sides[trajectory.early] += 1
    sides[trajectory.late] += 2
    return {
        "experiment": EXPERIMENT,
        "model": opened.loaded.fingerprint,
        "n_cells": len(opened.cells.cells),
        "cells": opened.cells.fingerprint(),
        "tokenization": args.tokenization,
        "n_early_cells": len(trajectory.early),
        "n_late_cells": len(trajectory.late),
        "early_and_late_cells": hashlib.sha256(sides.tobytes()).hexdigest(),
        "alphas": sorted(args.alphas),
        "precision": str(opened.loaded.model.dtype).removeprefix("torch."),
    }


def report(out_dir: Path, first: Sequence[str] = ()) -> int:
    """Summarise what the folder holds, in `summary.json` and on the terminal; returns the exit status.

    Args:
        out_dir: the folder of a run.
        first: names of the features in the order wanted; those of an earlier summary follow.

    Raises:
        UserError: the folder holds no run of this experiment.
    """
    content = manifest.open_folder(out_dir, EXPERIMENT)
    settings = content["settings"]
    order = dict.fromkeys([*first, *steering_results.names_in_summary(out_dir)])
    records = steering_results.read_records(out_dir, manifest.settings_fingerprint(settings), list(order))
    summary = steering_results.summarise(records) | inputs_entry(content.get("provenance"))
    write_json(out_dir / steering_results.SUMMARY_FILE, summary)
    print("\n".join([*steering_results.report_lines(summary, settings), *left_out_lines(summary)]))
    return 0


if __name__ == "__main__":
    cli.leave(main())
