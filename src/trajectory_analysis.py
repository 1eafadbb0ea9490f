"""Order cells along a trajectory and find the SAE features that turn on or off along it.

    python src/trajectory_analysis.py --data-root sae_data --data-path immune.h5ad

Writes into the output folder: cell_metadata.json (pseudotime, types and tissues of the cells),
sae_activations.npz (activations of every feature in every cell), switch_features.json (a panel for
trajectory_steering.py, which takes the folder as --traj-dir), trajectory_summary.json and manifest.json, and
partial/ while it runs. Running the same command again goes on where it stopped.
"""

import argparse
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellcircuits import cli, cli_check, manifest, results, trajectory_flags
from cellcircuits.errors import UserError
from cellcircuits.input_counts import inputs_entry, left_out_lines
from cellcircuits.jsonio import write_atomically, write_json
from cellcircuits.trace_flags import add_sae_run_flag

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cellcircuits.inputs import LayerSAE, ModelAndCells
    from cellcircuits.switch_features import LayerStatistics, SwitchRule
    from cellcircuits.trajectory import Trajectory

log = logging.getLogger(__name__)
EXPERIMENT = "trajectory_analysis"
PARTIAL = "partial"
GO_ON = "the cells that are done are kept; run the same command again to go on."
N_SHOWN = 5


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Order cells by pseudotime and find the SAE features that switch on or off along it.",
        epilog="""example, monocyte to macrophage in the demo's cells:
  python src/trajectory_analysis.py --model demo/model --data-root demo --data-path demo/cells.h5ad \\
      --cell-type-column marker_group --cell-types 'monocyte;macrophage_like' --tissues all \\
      --root-cell-type monocyte --root-markers S100A8,VCAN --follow-genes APOE --out-dir results/demo_trajectory""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cli.add_model_flags(parser)
    add_sae_run_flag(parser)
    trajectory_flags.add_trajectory_flags(parser)
    group = parser.add_argument_group("what to find")
    group.add_argument(
        "--layers",
        type=cli.layer_list,
        default=(0, 5, 11, 17),
        metavar="A,B,C",
        help="layers whose features to test (default: 0,5,11,17)",
    )
    group.add_argument(
        "--follow-genes",
        type=trajectory_flags.gene_list,
        default=(),
        metavar="A,B",
        help="report how the expression of these genes follows pseudotime, e.g. known markers of its end",
    )
    group.add_argument("--n-on", type=cli.natural, default=12, help="most ON features per layer (default: %(default)s)")
    group.add_argument(
        "--n-off", type=cli.natural, default=8, help="most OFF features per layer (default: %(default)s)"
    )
    cli.add_out_dir_flag(group, "where results go", Path("results/runs/trajectory"))
    cli.add_mix_versions_flag(group)
    cli_check.add_check_flag(group, "analyse")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    args = cli_check.parse(build_parser(), argv)
    return cli.run_script(lambda: run(args), GO_ON)


def run(args: argparse.Namespace) -> int:
    """Open the inputs, order the cells, test the features, report."""
    started = time.perf_counter()
    data_root = cli.require_path(args.data_root, "--data-root", "SAE_DATA_ROOT", folder=True)
    selection = trajectory_flags.trajectory_selection(args)
    if args.traj_dir and args.traj_dir.resolve() == args.out_dir.resolve():
        args.traj_dir = None  # what this run writes is no input of its own

    # torch and transformers take seconds to import: only once the cheap checks are done
    from cellcircuits.inputs import open_cells, open_model, open_saes
    from cellcircuits.trajectory import open_trajectory, provenance

    loaded = open_model(args)
    n_layers = loaded.model.config.num_hidden_layers
    if args.layers[-1] >= n_layers:
        raise UserError(f"--layers {args.layers[-1]}: this model has {n_layers} blocks, 0 to {n_layers - 1}.")
    layers = open_saes(data_root, args.layers, args.sae_run, loaded)
    opened = open_cells(args, loaded, selection)
    trajectory = open_trajectory(args, opened)
    comes_from = provenance(opened, trajectory, layers)
    settings = run_settings(args, opened, layers, trajectory)
    if args.check:
        manifest.check_folder(args.out_dir, settings, comes_from, mix_versions=args.mix_versions)
        return check(args, opened, layers, trajectory, started)
    with results.exclusive(args.out_dir):
        fingerprint = manifest.claim_folder(args.out_dir, settings, comes_from, mix_versions=args.mix_versions)
        summary, panel = analyse(args, opened, layers, trajectory, fingerprint)
    print("\n".join([*report_lines(summary, panel), *left_out_lines(summary)]))
    print(f"Results: {args.out_dir} ({time.perf_counter() - started:.0f} s)")
    return 0


def check(
    args: argparse.Namespace,
    opened: "ModelAndCells",
    layers: Mapping[int, "LayerSAE"],
    trajectory: "Trajectory",
    started: float,
) -> int:
    """Say what the run that was `started` then would do; returns the exit status."""
    from cellcircuits.plan_report import Plan, Seconds, show
    from cellcircuits.trajectory_plan import check_trajectory
    from cellcircuits.trajectory_root import expression_of, read_run_counts

    matrix = read_run_counts(args, opened)
    expression_of(args.follow_genes, matrix, opened)
    opening = Seconds.exactly(time.perf_counter() - started)
    plan = Plan(opened, layers, args.out_dir, str(opened.loaded.model.dtype).removeprefix("torch."), opening)
    return show(check_trajectory(plan, trajectory, matrix.counts.getnnz(axis=1)), args.command)


def run_settings(
    args: argparse.Namespace, opened: "ModelAndCells", layers: Mapping[int, "LayerSAE"], trajectory: "Trajectory"
) -> dict[str, Any]:
    """Everything that determines the numbers; labels do not."""
    from cellcircuits import sae_store
    from cellcircuits.switch_features import SwitchRule

    return {
        "experiment": EXPERIMENT,
        "layers": list(layers),
        "model": opened.loaded.fingerprint,
        "saes": {str(layer): sae_store.fingerprint(layer_sae.files) for layer, layer_sae in layers.items()},
        "n_cells": len(opened.cells.cells),
        "cells": opened.cells.fingerprint(),
        "tokenization": args.tokenization,
        "downsample_to": args.downsample_to,
        # not the values: their last bits depend on the number of threads
        "pseudotime": {
            "source": trajectory.source,
            "root": trajectory.root,
            "metadata_sha256": trajectory.metadata_sha256,
            "disconnected": args.disconnected,
        },
        "rule": asdict(SwitchRule(n_on=args.n_on, n_off=args.n_off)),
        "precision": str(opened.loaded.model.dtype).removeprefix("torch."),
    }


def analyse(
    args: argparse.Namespace,
    opened: "ModelAndCells",
    layers: Mapping[int, "LayerSAE"],
    trajectory: "Trajectory",
    fingerprint: str,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compute and write all result files; returns the summary and the panel of switch features."""
    from cellcircuits import switch_features as switches
    from cellcircuits.kept_rows import remove_rows
    from cellcircuits.trajectory import confounds, provenance, rank_correlation, write_metadata
    from cellcircuits.trajectory_root import expression_of, read_run_counts

    cells, pseudotime = opened.cells.cells, trajectory.pseudotime
    matrix = read_run_counts(args, opened)
    n_genes, depth = matrix.counts.getnnz(axis=1), matrix.counts.sum(axis=1).A1
    followed = zip(args.follow_genes, expression_of(args.follow_genes, matrix, opened), strict=True)
    saes = {layer: opened_sae.sae for layer, opened_sae in layers.items()}
    partial = args.out_dir / PARTIAL
    activations = switches.cell_activations(opened.loaded.model, saes, cells, partial, fingerprint)
    order = switches.CellOrder(pseudotime, trajectory.early, trajectory.late, n_genes)
    rule = switches.SwitchRule(n_on=args.n_on, n_off=args.n_off)
    statistics = {
        layer: switches.layer_statistics(activations[f"layer_{layer}"], order, rule.min_freq) for layer in layers
    }
    panel = switches.switch_features(
        statistics, rule, {layer: opened_sae.labels() for layer, opened_sae in layers.items()}
    )
    summary = {
        **summarise(opened, trajectory, statistics, panel, rule),
        "confounds": confounds(pseudotime, n_genes, depth),
        "followed_genes": {gene: rank_correlation(pseudotime, values) for gene, values in followed},
        "downsample_to": args.downsample_to,
        "fingerprint": fingerprint,
        **inputs_entry([provenance(opened, trajectory, layers)]),
    }
    write_metadata(
        args.out_dir / "cell_metadata.json", trajectory, cells, args.downsample_to, {"fingerprint": fingerprint}
    )
    write_activations(args.out_dir / "sae_activations.npz", activations, [cell.name for cell in cells])
    write_json(args.out_dir / "switch_features.json", panel)
    write_json(args.out_dir / "trajectory_summary.json", summary)
    remove_rows(partial)
    return summary, panel


def write_activations(path: Path, activations: Mapping[str, "NDArray[np.float32]"], names: Sequence[str]) -> None:
    """Write the activations with the names of the cells and a word on what is what."""
    import numpy as np

    from cellcircuits.switch_features import ABOUT

    texts = {"cell_ids": np.array(names), "about": np.array(ABOUT)}
    write_atomically(path, lambda stream: np.savez_compressed(stream, **activations, **texts))


def summarise(
    opened: "ModelAndCells",
    trajectory: "Trajectory",
    statistics: Mapping[int, "LayerStatistics"],
    panel: Sequence[Mapping[str, Any]],
    rule: "SwitchRule",
) -> dict[str, Any]:
    """The content of `trajectory_summary.json`, but for the confounds."""
    from cellcircuits.pseudotime import SCANPY_SEED

    report = opened.cells.report
    n_switch = {
        str(layer): {kind: sum(x["layer"] == layer and x["kind"] == kind for x in panel) for kind in ("ON", "OFF")}
        for layer in statistics
    }
    return {
        "n_cells": len(trajectory.pseudotime),
        "n_left_out": int((~trajectory.measured).sum()),
        "n_early": len(trajectory.early),
        "n_late": len(trajectory.late),
        "root": trajectory.root,
        "source": trajectory.source,
        "n_switch_features": n_switch,
        "n_tested": {str(layer): len(found.features) for layer, found in statistics.items()},
        "rule": rule.text(),
        "selection": report["selection"],
        "n_rows_matched": report["n_rows_matched"],
        "n_cells_dropped": len(report["dropped_cells"]),
        "versions": opened.provenance()["versions"],
        "seeds": {"cells": report["selection"]["seed"], "scanpy": SCANPY_SEED},
        "schema_version": results.SCHEMA_VERSION,
    }


def report_lines(summary: Mapping[str, Any], panel: Sequence[Mapping[str, Any]]) -> list[str]:
    """The summary as text for the terminal."""
    genes, depth = (summary["confounds"][name]["rho"] for name in ("n_genes_detected", "depth"))
    lines = [
        f"Trajectory of {summary['n_cells']} cells ({summary['n_left_out']} left out), {summary['source']}, root "
        f"{summary['root'] or 'unknown'}: {summary['n_early']} early, {summary['n_late']} late",
        f"  pseudotime follows detected genes with rho {_rho(genes)}, depth with rho {_rho(depth)}: read switch "
        "features with that in mind",
        *(f"  {gene} follows pseudotime with rho {_rho(x['rho'])}" for gene, x in summary["followed_genes"].items()),
    ]
    for layer, n_switch in summary["n_switch_features"].items():
        tested = summary["n_tested"][layer]
        lines.append(f"  layer {layer}: {tested} features tested, {n_switch['ON']} ON, {n_switch['OFF']} OFF")
        for kind in ("ON", "OFF"):
            chosen = [x for x in panel if str(x["layer"]) == layer and x["kind"] == kind]
            lines += [_feature_line(x) for x in chosen[:N_SHOWN]]
    return lines


def _rho(value: float | None) -> str:
    return "undefined (the same in all cells)" if value is None else f"{value:+.2f}"


def _feature_line(x: Mapping[str, Any]) -> str:
    return (
        f"    {x['kind']:>3} L{x['layer']}/F{x['idx']:<5} d {x['d']:+.2f}  rho {_rho(x['spearman_rho'])} "
        f"(given detected genes {_rho(x['rho_given_n_genes'])})  {x['label']}"
    )


if __name__ == "__main__":
    cli.leave(main())
