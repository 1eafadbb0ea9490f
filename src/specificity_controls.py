"""Is it this feature? Ablations beside pushes of the same size that remove something else.

    python src/specificity_controls.py --trace-dir results/layer5 --data-root sae_data --data-path cells.h5ad

Takes features of a trace and measures each again, together with four controls that push the stream as hard at each
position: along a random direction, along one as the stream varies, along the direction of another feature that fires
as often, and along its own at other positions (specificity.py defines them). Writes into the output folder:
specificity_0042.json per feature, specificity.json (what they say together), manifest.json, progress.json and partial/
while it runs. Running the same command again goes on where it stopped; more features may be asked for later.
"""

import argparse
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cellcircuits import cli, cli_check, manifest, results, specificity_results
from cellcircuits.cells import CellSelection
from cellcircuits.errors import UserError
from cellcircuits.input_counts import inputs_entry, left_out_lines
from cellcircuits.jsonio import write_json
from cellcircuits.trace_flags import add_sae_run_flag, listed_features, sample_size

if TYPE_CHECKING:
    from cellcircuits.specificity_inputs import Controls

DEFAULT_OUT_DIR = Path("results/specificity")
GO_ON = "everything finished is kept; run the same command again to go on."


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Measure features of a trace again, beside controls that push the residual stream as hard but "
        "remove something else. Layers, edge rule, tests and precision are those of the trace; model, SAEs and cells "
        "must be, too.",
        epilog="""example, on a trace of the demo's layer 5:
  python src/specificity_controls.py --trace-dir results/demo/exhaustive_tracing --model demo/model --data-root demo \\
      --data-path demo/cells.h5ad --cells all --obs-filter split=held_out --n-cells 20 --out-dir results/specificity""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cli.add_model_flags(parser)
    add_sae_run_flag(parser)
    cli.add_cell_flags(parser, CellSelection())
    group = parser.add_argument_group("which features, and their controls")
    group.add_argument(
        "--trace-dir",
        type=Path,
        default=cli.from_environment("SAE_TRACE_DIR"),
        metavar="FOLDER",
        help="the trace of a layer by exhaustive_feature_tracing.py (environment: SAE_TRACE_DIR)",
    )
    group.add_argument(
        "--n-features",
        type=cli.natural,
        default=50,
        metavar="N",
        help="features to draw, evenly from ten strata of their edges in the trace (default: %(default)s)",
    )
    group.add_argument(
        "--features",
        default=None,
        metavar="LIST_OR_FILE",
        help="these features instead, e.g. 898,1762, or a file with one index per line",
    )
    group.add_argument(
        "--min-active-cells",
        type=cli.natural,
        default=None,
        metavar="N",
        help="cells in which a feature must be active to be drawn (default: as many as its calibrated degree in the "
        "trace needed)",
    )
    group.add_argument(
        "--draws", type=cli.natural, default=5, metavar="N", help="of each control and feature (default: %(default)s)"
    )
    group.add_argument(
        "--control-seed", type=sample_size, default=0, help="seed of features and controls (default: %(default)s)"
    )
    group.add_argument(
        "--batch-size", type=cli.natural, default=None, help="runs at once (default: what memory allows)"
    )
    cli.add_out_dir_flag(group, "where results go", DEFAULT_OUT_DIR)
    cli.add_mix_versions_flag(group)
    cli_check.add_check_flag(group, "measure")
    group.add_argument("--analysis-only", action="store_true", help="summarise what the folder holds, measure nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    args = cli_check.parse(build_parser(), argv)
    return cli.run_script(lambda: report(args.out_dir) if cli_check.wants_report(args) else run(args), GO_ON)


def run(args: argparse.Namespace) -> int:
    """Open the inputs, measure what is not measured yet, summarise."""
    started = time.perf_counter()
    data_root = cli.require_path(args.data_root, "--data-root", "SAE_DATA_ROOT", folder=True)
    cli.require_path(args.data_path, "--data-path", "SAE_DATA_PATH", folder=False)
    trace_dir = cli.require_path(args.trace_dir, "--trace-dir", "SAE_TRACE_DIR", folder=True)
    named = None if args.features is None else listed_features(args.features)

    # torch and transformers take seconds to import: only once the cheap checks are done
    from cellcircuits import specificity_inputs as of_trace
    from cellcircuits.inputs import open_cells, open_model, open_saes
    from cellcircuits.specificity import Draws
    from cellcircuits.trace_folder import TraceFolder

    traced = of_trace.open_traced(trace_dir)
    draws = Draws(args.control_seed, traced.source_layer, args.draws)
    loaded = open_model(args)
    layers = open_saes(data_root, traced.layers, args.sae_run, loaded)
    frequencies = of_trace.frequencies_of(layers[traced.source_layer], draws)
    opened = open_cells(args, loaded)
    how = (traced.rule, args.tokenization, traced.precision)
    folder = TraceFolder(trace_dir, traced.source_layer, layers, opened, *how, calibration=traced.calibration)
    of_trace.require_same(traced, folder.settings())
    features = of_trace.choose_features(
        traced, args.n_features, named, args.min_active_cells, frequencies, args.control_seed
    )
    settings = of_trace.control_settings(folder.settings(), draws, frequencies)
    if args.check:
        from cellcircuits.plan_report import show
        from cellcircuits.specificity_plan import check_specificity

        opening = time.perf_counter() - started
        goes_on = manifest.check_folder(args.out_dir, settings, folder.provenance(), mix_versions=args.mix_versions)
        held = specificity_results.read_records(args.out_dir, manifest.settings_fingerprint(settings))
        left = [feature for feature in features if not goes_on or feature not in held]
        return show(
            check_specificity(args, of_trace.Controls(folder, draws, frequencies), features, left, opening),
            args.command,
        )
    with results.exclusive(args.out_dir):
        fingerprint = manifest.claim_folder(args.out_dir, settings, folder.provenance(), mix_versions=args.mix_versions)
        measure(args, of_trace.Controls(folder, draws, frequencies), features, fingerprint)
        report(args.out_dir)
    print(f"Results: {args.out_dir} ({time.perf_counter() - started:.0f} s)")
    return 0


def measure(args: argparse.Namespace, controls: "Controls", features: Sequence[int], fingerprint: str) -> None:
    """Measure the features that the output folder does not hold yet.

    Raises:
        UserError: see `SpecificityRun.measure`.
    """
    from cellcircuits.graph_store import read_edges
    from cellcircuits.specificity_inputs import described_features
    from cellcircuits.specificity_run import SpecificityRun
    from cellcircuits.specificity_stats import HowTested
    from cellcircuits.trace_layers import in_order

    folder, draws = controls.folder, controls.draws
    bench, clean = next(in_order([folder]))
    SpecificityRun(
        out_dir=args.out_dir,
        bench=bench,
        clean=clean,
        draws=draws,
        tests=HowTested(folder.rule, folder.calibration, folder.source_layer, bench.device),
        frequencies=controls.frequencies,
        traced=read_edges(folder.out_dir),
        described=described_features(folder),
        fingerprint=fingerprint,
        batch_size=args.batch_size,
    ).measure(features)


def report(out_dir: Path) -> int:
    """Summarise what the folder holds, in `specificity.json` and on the terminal; returns the exit status.

    Raises:
        UserError: the folder holds no run of this experiment, or something in it is damaged.
    """
    from cellcircuits.specificity_summary import summarise

    content = manifest.open_folder(out_dir, specificity_results.EXPERIMENT)
    settings = content["settings"]
    records = specificity_results.read_records(out_dir, manifest.settings_fingerprint(settings))
    try:
        summary = summarise(list(records.values()), settings)
    except (KeyError, TypeError, IndexError, ValueError, AttributeError, zlib.error) as error:
        raise UserError(
            f"{out_dir}: {manifest.MANIFEST} or a record is damaged ({error}); restore it, or remove the record and "
            "run again."
        ) from None
    write_json(out_dir / specificity_results.SUMMARY_FILE, summary | inputs_entry(content.get("provenance")))
    print("\n".join([*specificity_results.report_lines(summary), *left_out_lines(summary)]))
    return 0


if __name__ == "__main__":
    cli.leave(main())
