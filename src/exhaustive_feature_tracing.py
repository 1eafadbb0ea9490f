"""Experiment 1: ablate every active SAE feature of one layer and record what changes downstream.

    python src/exhaustive_feature_tracing.py --data-root sae_data --data-path cells.h5ad --n-cells 20

Writes into the output folder: feature_0042.json per source feature, edges.parquet (all significant edges),
features.parquet (labels, frequencies, degrees), calibration.json, exhaustive_summary.json, manifest.json,
progress.json, blocks/ (what a later start resumes from) and effects/ with --save-effects. Running the same command
again goes on where it stopped.

With several source layers (--source-layer 0,5,11 or all) each has such a folder, layer_00/, layer_05/, ..., and
layers_summary.json has one entry per layer.

With --same-position it measures another, cheaper quantity, which same_position.py defines; same_position_check.json
then says how well that stands for the total effect.
"""

import argparse
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cellcircuits import cli, cli_check, results
from cellcircuits.catalog import MIN_ACTIVATION_FREQ, FeatureInfo
from cellcircuits.cells import CellSelection
from cellcircuits.edge_fdr import calibration_lines
from cellcircuits.errors import UserError
from cellcircuits.input_counts import left_out_lines
from cellcircuits.jsonio import read_json
from cellcircuits.same_position_record import check_line
from cellcircuits.stats import EdgeRule
from cellcircuits.trace_flags import (
    add_calibration_flags,
    add_edge_flags,
    add_precision_flag,
    add_sae_run_flag,
    add_same_position_flags,
    add_save_effects_flag,
    calibration_settings,
    catalog_command,
    listed_features,
    n_checked,
    source_layers,
)
from cellcircuits.trace_folder import CALIBRATION, TraceFolder, make_tables
from cellcircuits.trace_layers import (
    holds_layers,
    layer_folder,
    layer_folders,
    layers_report_lines,
    require_no_layers,
    require_parent,
    require_same_run,
    summarise_layers,
    trace_layers,
    trace_one_layer,
)

if TYPE_CHECKING:
    from cellcircuits.inputs import LayerSAE

log = logging.getLogger(__name__)
GO_ON = "everything finished is kept; run the same command again to go on."


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Ablate every active SAE feature of a layer of a Geneformer, or of several layers, and record the "
        "edges to later layers.",
        epilog="""example, with the demo's inputs:
  python src/exhaustive_feature_tracing.py --model demo/model --data-root demo --data-path demo/cells.h5ad \\
      --cells all --n-cells 20 --features 114,207 --out-dir results/two_features""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cli.add_model_flags(parser)
    add_sae_run_flag(parser)
    cli.add_cell_flags(parser, CellSelection())
    group = parser.add_argument_group("what to trace")
    group.add_argument(
        "--source-layer",
        type=source_layers,
        default=(5,),
        metavar="LAYER",
        help="layer to ablate in; a list such as 0,5,11, or all (every one with an SAE, a catalog and a layer to read "
        "after it), traces several, one at a time, each into its own folder layer_05/ below --out-dir (default: 5)",
    )
    group.add_argument(
        "--downstream-layers",
        type=cli.layer_list,
        default=(6, 11, 17),
        metavar="A,B,C",
        help="layers to read; of several source layers each takes those after it (default: 6,11,17)",
    )
    group.add_argument(
        "--all-downstream", action="store_true", help="read every layer after the source; each needs an SAE"
    )
    group.add_argument("--start-idx", type=int, default=0, help="first feature index (default: 0)")
    group.add_argument("--end-idx", type=int, default=None, help="one past the last feature index (default: all)")
    group.add_argument(
        "--features",
        default=None,
        metavar="LIST_OR_FILE",
        help="only these features of each source layer, e.g. 898,1762, or a file with one index per line",
    )
    add_edge_flags(group)
    add_calibration_flags(group)
    add_precision_flag(group)
    add_same_position_flags(group)
    add_save_effects_flag(group)
    cli.add_out_dir_flag(group, "where results go")
    cli.add_mix_versions_flag(group)
    cli_check.add_check_flag(group, "trace")
    group.add_argument("--analysis-only", action="store_true", help="summarise what the folder holds, trace nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    args = cli_check.parse(build_parser(), argv)
    return cli.run_script(lambda: report(args.out_dir) if cli_check.wants_report(args) else run(args), GO_ON)


def run(args: argparse.Namespace) -> int:
    """Open the inputs, trace what is not traced yet, summarise."""
    started = time.perf_counter()
    data_root = cli.require_path(args.data_root, "--data-root", "SAE_DATA_ROOT", folder=True)
    cli.require_path(args.data_path, "--data-path", "SAE_DATA_PATH", folder=False)
    n_both_ways = n_checked(args)

    # torch and transformers take seconds to import: only once the cheap checks are done
    from cellcircuits.inputs import open_cells, open_model, open_saes

    loaded = open_model(args)
    targets = target_layers(args, data_root, loaded.model.config.num_hidden_layers)
    wanted = sorted({*targets, *(layer for later in targets.values() for layer in later)})
    layers = open_saes(data_root, wanted, args.sae_run, loaded)
    features = {
        source: chosen_features(args, require_catalog(layers[source], args, source), source) for source in targets
    }
    opened = open_cells(args, loaded)
    rule = EdgeRule(args.min_abs_d, args.min_consistency)
    if len(opened.cells.cells) < 2:
        log.warning("Note: with fewer than two cells no effect has a size, so no edge can be called.")

    def folder(out_dir: Path, source: int) -> TraceFolder:
        saes = {layer: layers[layer] for layer in (source, *targets[source])}
        return TraceFolder(
            out_dir, source, saes, opened, rule, args.tokenization, args.precision, args.same_position, n_both_ways,
            args.mix_versions, calibration_settings(args), args.save_effects,
        )  # fmt: skip

    if several_layers(args):
        folders = [folder(layer_folder(args.out_dir, source), source) for source in targets]
    else:
        folders = [folder(args.out_dir, *targets)]
    if args.check:
        return check(args, folders, features, time.perf_counter() - started)
    if several_layers(args):
        trace_layers(args.out_dir, folders, features, args.batch_size)
    else:
        trace_one_layer(*folders, features[folders[0].source_layer], args.batch_size)
    report(args.out_dir)
    print(f"Results: {args.out_dir} ({time.perf_counter() - started:.0f} s)")
    return 0


def check(
    args: argparse.Namespace, folders: Sequence[TraceFolder], features: Mapping[int, Sequence[int]], seconds: float
) -> int:
    """Say what the run would do; `seconds` is what opening its inputs took; returns the exit status."""
    from cellcircuits.plan_report import show
    from cellcircuits.trace_plan import check_traces

    if several_layers(args):
        require_parent(args.out_dir)
        require_same_run(layer_folders(args.out_dir).values(), folders[0].settings())
    else:
        require_no_layers(args.out_dir)
    return show(check_traces(args.out_dir, folders, features, args.batch_size, seconds), args.command)


def several_layers(args: argparse.Namespace) -> bool:
    """Whether the flags ask for one folder per source layer."""
    return args.source_layer is None or len(args.source_layer) > 1


def target_layers(args: argparse.Namespace, data_root: Path, n_layers: int) -> dict[int, tuple[int, ...]]:
    """The layers to read for each source layer, both ascending.

    Raises:
        UserError: see `every_source_layer` and `check_layers`.
    """
    from cellcircuits.inputs import check_layers, every_source_layer

    asked = tuple(range(n_layers)) if args.all_downstream else args.downstream_layers
    sources = args.source_layer or every_source_layer(data_root, args.sae_run, n_layers, min(asked[-1], n_layers - 1))
    pool = tuple(layer for layer in asked if layer > sources[0]) if args.all_downstream else asked
    check_layers(n_layers, sources, pool)
    return {source: tuple(layer for layer in pool if layer > source) for source in sources}


def require_catalog(source: "LayerSAE", args: argparse.Namespace, layer: int) -> dict[int, FeatureInfo]:
    """The source layer's catalog.

    Raises:
        UserError: there is none; names the command that makes it.
    """
    if source.catalog is None:
        command = catalog_command(args, build_parser().parse_args([]), layer)
        raise UserError(f"{source.files.catalog}: no such file; make it with: {command}")
    return source.catalog


def chosen_features(args: argparse.Namespace, catalog: dict[int, FeatureInfo], layer: int) -> list[int]:
    """Features of one source layer to trace, ascending: those asked for, or every one that fires often enough.

    Raises:
        UserError: the request is unreadable or names a feature that the catalog lacks, or nothing is left.
    """
    end = max(catalog, default=-1) + 1 if args.end_idx is None else args.end_idx
    if args.features is None:
        wanted = [i for i, info in catalog.items() if (info.activation_freq or 0.0) >= MIN_ACTIVATION_FREQ]
    else:
        wanted = listed_features(args.features)
        unknown = [feature for feature in wanted if feature not in catalog]
        if unknown:
            raise UserError(f"--features: the catalog of layer {layer} has no feature {unknown[0]}.")
    features = [feature for feature in wanted if args.start_idx <= feature < end]
    if not features:
        raise UserError(
            f"no feature to trace: the catalog of layer {layer} has none with activation_freq >= "
            f"{MIN_ACTIVATION_FREQ} and {args.start_idx} <= index < {end}; widen --start-idx and --end-idx."
        )
    return features


def report(out_dir: Path) -> int:
    """Make the tables from what the folder holds and print the summary; returns the exit status."""
    if holds_layers(out_dir):
        summary = summarise_layers(out_dir)
        lines = [*layers_report_lines(summary)]
        checks = {f"layer {layer}: ": check_line(folder) for layer, folder in layer_folders(out_dir).items()}
    else:
        summary, features, per_layer = make_tables(out_dir)
        lines = [*results.report_lines(summary, features, per_layer)]
        lines += calibration_lines(read_json(out_dir / CALIBRATION))
        checks = {"": check_line(out_dir)}
    lines += (f"  {name}{line}" for name, line in checks.items() if line)
    print("\n".join([*lines, *left_out_lines(summary)]))
    return 0


if __name__ == "__main__":
    cli.leave(main())
