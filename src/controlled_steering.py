"""Does amplifying a rising feature move early cells towards late ones more than other edits of the same size do?

    python src/controlled_steering.py --data-root sae_data --data-path immune.h5ad --traj-dir results/trajectory

Features are chosen in one half of the cells and steered in early cells of the other. Writes into the output folder:
declaration.json (what is tested, before anything is measured), controlled_F25_L0.json per feature, steering_tests.json,
switch_features.json, first_half.npz, probe.npz, manifest.json, progress.json and partial/ while it runs. Running the
same command again goes on where it stopped.
"""

import argparse
import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellcircuits import cli, cli_check, controlled_results, manifest, results
from cellcircuits.errors import UserError
from cellcircuits.input_counts import inputs_entry, left_out_lines
from cellcircuits.jsonio import read_json, write_json
from cellcircuits.panel import PanelFeature, read_panel
from cellcircuits.trace_flags import add_sae_run_flag
from cellcircuits.trajectory_flags import add_trajectory_flags, name_list, trajectory_selection

if TYPE_CHECKING:
    from cellcircuits.controlled_design import Study

log = logging.getLogger(__name__)
EXPERIMENT = "controlled_steering"
DEFAULT_OUT_DIR = Path("results/controlled_steering")
GO_ON = "everything finished is kept; run the same command again to go on."


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Steer features in early cells that were not used to choose them, beside controls of the same "
        "size, and test what that does to a state signature, to marker genes and to a maturity probe.",
        epilog="""example, monocyte to macrophage in the demo's cells:
  python src/controlled_steering.py --model demo/model --data-root demo --data-path demo/cells.h5ad \\
      --cell-type-column marker_group --cell-types 'monocyte;macrophage_like' --tissues all --n-cells 240 \\
      --root-cell-type monocyte --root-markers S100A8,VCAN --disconnected drop --markers demo/markers.json \\
      --probe-labels monocyte macrophage_like --n-on 4 --n-off 4 --n-steered 20 --draws 2 --out-dir results/try""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cli.add_model_flags(parser)
    add_sae_run_flag(parser)
    add_trajectory_flags(parser)
    _add_steering_flags(parser.add_argument_group("what to steer"))
    _add_readout_flags(parser.add_argument_group("readouts"))
    group = parser.add_argument_group("the run")
    group.add_argument(
        "--batch-size", type=cli.natural, default=None, help="steered passes per batch (default: what memory allows)"
    )
    cli.add_out_dir_flag(group, "where results go", DEFAULT_OUT_DIR)
    cli.add_mix_versions_flag(group)
    cli_check.add_check_flag(group, "steer")
    group.add_argument("--analysis-only", action="store_true", help="test what the folder holds, steer nothing")
    return parser


def number_list(text: str) -> tuple[float, ...]:
    """Parse `0.1,1.0` into distinct finite numbers, ascending; `none` into no number.

    Raises:
        argparse.ArgumentTypeError: something else.
    """
    if text.strip() == "none":
        return ()
    try:
        numbers = sorted({float(part) + 0.0 for part in text.split(",") if part.strip()})
    except ValueError:
        numbers = []
    if not numbers or not all(abs(number) < float("inf") for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of finite numbers such as 0.1,1.0, or none")
    return tuple(numbers)


def _add_steering_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--layers", type=cli.layer_list, default=(0, 5, 11, 17), metavar="A,B,C", help="layers (default: 0,5,11,17)")
    add(
        "--panel",
        type=Path,
        default=None,
        metavar="FILE",
        help="features to steer, a JSON list of {layer, idx, d, label}; d > 0 is ON, d < 0 is OFF (default: chosen in "
        "the first half of the cells)",
    )
    add("--n-on", type=cli.natural, default=12, help="most ON features per layer (default: %(default)s)")
    add("--n-off", type=cli.natural, default=8, help="most OFF features per layer (default: %(default)s)")
    add(
        "--doses",
        type=number_list,
        default=(0.1, 1.0),
        metavar="A,B",
        help="length of every edit, as a share of the mean length of the residual stream at its layer, or none "
        "(default: 0.1,1.0)",
    )
    add(
        "--alphas",
        type=number_list,
        default=(),
        metavar="A,B",
        help="more doses: the length that multiplying the latent by alpha adds on average where the feature is active",
    )
    add(
        "--draws", type=cli.natural, default=5, help="controls of each kind per feature and dose (default: %(default)s)"
    )
    add("--n-steered", type=cli.natural, default=50, help="most early cells to steer in (default: %(default)s)")
    add(
        "--donor-column",
        default=None,
        metavar="COLUMN",
        help="obs column of donors or batches, which go to one half as a whole (default: halves within cell types)",
    )


def _add_readout_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--markers",
        type=Path,
        default=None,
        metavar="FILE",
        help='marker genes, JSON {"early": [...], "late": [...]} (default: the study\'s progenitor and terminal ones)',
    )
    add(
        "--probe-data-path",
        type=Path,
        default=None,
        metavar="H5AD",
        help="cells to train the probe on (default: other cells of --data-path, which the run does not take)",
    )
    add("--probe-cells", type=cli.natural, default=500, help="most cells to train it on (default: %(default)s)")
    add(
        "--probe-filter",
        type=cli.column_filter,
        action="append",
        default=[],
        metavar="COLUMN=VALUE",
        help="keep only probe cells with this obs value; repeatable (default: --obs-filter)",
    )
    add(
        "--probe-labels",
        type=name_list,
        nargs=2,
        default=None,
        metavar=("EARLY", "LATE"),
        help="cell types that are early and late for the probe, names separated by ';' (default: the outer thirds of "
        "the probe cells' own pseudotime)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    args = cli_check.parse(build_parser(), argv)
    return cli.run_script(lambda: report(args.out_dir) if cli_check.wants_report(args) else run(args), GO_ON)


def run(args: argparse.Namespace) -> int:
    """Open the inputs, choose, declare, steer what is not steered yet, test."""
    started = time.perf_counter()
    panel = validate(args)

    # torch and transformers take seconds to import: only once the cheap checks are done
    from cellcircuits.controlled_design import declare, open_study
    from cellcircuits.controlled_run import ControlledSteerer
    from cellcircuits.displacements import DisplacementBench

    study = open_study(args, panel)
    settings, comes_from = run_settings(args, study), study.provenance()
    if args.check:
        from cellcircuits.controlled_plan import check_controlled
        from cellcircuits.plan_report import Plan, Seconds, show

        goes_on = manifest.check_folder(args.out_dir, settings, comes_from, mix_versions=args.mix_versions)
        fingerprint = manifest.settings_fingerprint(settings) if goes_on else None
        opening = Seconds.exactly(time.perf_counter() - started)
        plan = Plan(study.opened, study.layers, args.out_dir, settings["precision"], opening)
        return show(check_controlled(plan, study, args, fingerprint), args.command)
    with results.exclusive(args.out_dir):
        fingerprint = manifest.claim_folder(args.out_dir, settings, comes_from, mix_versions=args.mix_versions)
        design = declare(args, study, settings["primary"], fingerprint)
        bench = DisplacementBench(
            study.opened.loaded.model, {layer: study.layers[layer].sae for layer in design.layers}
        )
        steered = [study.opened.cells.cells[i] for i in study.halves.steered]
        ControlledSteerer(args.out_dir, bench, steered, design, fingerprint, args.batch_size).steer()
        report(args.out_dir)
    print(f"Results: {args.out_dir} ({time.perf_counter() - started:.0f} s)")
    return 0


def validate(args: argparse.Namespace) -> tuple[PanelFeature, ...] | None:
    """Check what needs no model; returns the panel, None where it is to be chosen.

    Raises:
        UserError: a file or folder is missing or damaged, or no dose is asked for.
    """
    cli.require_path(args.data_root, "--data-root", "SAE_DATA_ROOT", folder=True)
    cli.require_path(args.data_path, "--data-path", "SAE_IMMUNE_H5AD", folder=False)
    if args.probe_data_path is not None:
        cli.require_path(args.probe_data_path, "--probe-data-path", "", folder=False)
    if not args.doses and not args.alphas:
        raise UserError("--doses none: no dose is left; name some with --doses or --alphas.")
    if 0.0 in args.doses or 1.0 in args.alphas:
        raise UserError("a dose of 0 (--doses) or an alpha of 1 (--alphas) changes nothing; leave it out.")
    trajectory_selection(args)
    return None if args.panel is None else read_panel(args.panel)


def run_settings(args: argparse.Namespace, study: "Study") -> dict[str, Any]:
    """Everything that determines the numbers, and the test that the run is about."""
    from cellcircuits.steering_tests import primary_definition

    doses = study.doses(args)
    panel = None if study.panel is None else [[f.layer, f.index, f.switch_d] for f in study.panel]
    return {
        "experiment": EXPERIMENT,
        "model": study.opened.loaded.fingerprint,
        "saes": {str(layer): opened_sae.fingerprint for layer, opened_sae in study.layers.items()},
        "n_cells": len(study.opened.cells.cells),
        "cells": study.opened.cells.fingerprint(),
        "tokenization": args.tokenization,
        "halves": study.halves.sides(len(study.opened.cells.cells)),
        "n_steered_cells": len(study.halves.steered),
        "panel": study.rule.text() if panel is None else hashlib.sha256(json.dumps(panel).encode()).hexdigest(),
        "doses": [asdict(dose) for dose in doses],
        "draws": args.draws,
        "seed": args.seed,
        "markers": {"early": list(study.markers.early), "late": list(study.markers.late)},
        "probe": study.probe_cells.fingerprint(),
        "probe_by_donor": study.probe_cells.donors is not None,
        "primary": primary_definition(asdict(study.largest_dose(args))),
        "precision": str(study.opened.loaded.model.dtype).removeprefix("torch."),
    }


def report(out_dir: Path) -> int:
    """Test what the folder holds, in `steering_tests.json` and on the terminal; returns the exit status.

    Raises:
        UserError: the folder holds no run of this experiment, or something in it is damaged.
    """
    from cellcircuits.steering_tests import run_tests

    content = manifest.open_folder(out_dir, EXPERIMENT)
    settings = content["settings"]
    fingerprint = manifest.settings_fingerprint(settings)
    declaration = read_declaration(out_dir, fingerprint)
    records = controlled_results.read_records(out_dir, fingerprint)
    try:
        tests = run_tests(records, declaration, settings["seed"]) | inputs_entry(content.get("provenance"))
        lines = [*controlled_results.report_lines(tests), *left_out_lines(tests)]
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise UserError(
            f"{out_dir}: {controlled_results.DECLARATION_FILE} or a record is damaged ({error}); remove it, and run "
            "the same command without --analysis-only."
        ) from None
    write_json(out_dir / controlled_results.TESTS_FILE, tests | {"schema_version": results.SCHEMA_VERSION})
    print("\n".join(lines))
    return 0


def read_declaration(out_dir: Path, fingerprint: str) -> Mapping[str, Any]:
    """What the run declared before it measured.

    Raises:
        UserError: there is none, or it is damaged or of another run.
    """
    path = out_dir / controlled_results.DECLARATION_FILE
    declaration = read_json(path) if path.exists() else None
    if not isinstance(declaration, dict) or declaration.get("fingerprint") != fingerprint:
        raise UserError(f"{path}: is missing, damaged or of another run; run the same command without --analysis-only.")
    return declaration


if __name__ == "__main__":
    cli.leave(main())
