"""Experiment 2: remove two or three SAE features alone and together, and compare what they change.

    python src/higher_order_ablation.py --data-root sae_data --data-path cells.h5ad \
        --pair-dir results/runs/pairwise_ablation

Writes into the output folder: triplet_L0_F1_x_L5_F2_x_L11_F3.json per triplet (pair_... with --order 2),
summary.json, additivity.json (do effects add?), manifest.json, progress.json, effects/ with --save-effects and partial/
while it runs. Running the same command again goes on where it stopped.
"""

import argparse
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellcircuits import cli, cli_check, combination_results, manifest, results
from cellcircuits.catalog import UNANNOTATED
from cellcircuits.cells import CellSelection
from cellcircuits.combination_stats import AdditivitySettings
from cellcircuits.combinations import (
    RANDOM,
    SAME,
    TRIPLET_LAYERS,
    Combination,
    choose_triplets,
    read_combinations,
    read_pair_summary,
)
from cellcircuits.errors import UserError
from cellcircuits.input_counts import inputs_entry, left_out_lines
from cellcircuits.jsonio import write_json
from cellcircuits.selection import FEATURES_PER_LAYER, choose_pairs, read_selective_summary
from cellcircuits.stats import EdgeRule
from cellcircuits.trace_flags import add_edge_flags, add_sae_run_flag, add_sign_flip_flags, sample_size

if TYPE_CHECKING:
    from cellcircuits.inputs import LayerSAE, ModelAndCells

log = logging.getLogger(__name__)
EXPERIMENT = "higher_order_ablation"
DEFAULT_OUT_DIRS = {2: Path("results/runs/pairwise_ablation"), 3: Path("results/runs/higher_order_ablation")}
GO_ON = "everything finished is kept; run the same command again to go on."


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Remove pairs or triplets of SAE features of a Geneformer alone and together, and compare the "
        "joint effect with the sum of the single ones, and with what exactly additive effects would give.",
        epilog="""examples, with the demo's inputs:
  python src/selective_feature_tracing.py --model demo/model --data-root demo --data-path demo/cells.h5ad \\
      --cells all --n-cells 20 --out-dir results/try_selective
  python src/higher_order_ablation.py --order 2 --selective-dir results/try_selective --model demo/model \\
      --data-root demo --data-path demo/cells.h5ad --cells all --n-cells 20 --out-dir results/try_pairs
  python src/higher_order_ablation.py --pair-dir results/try_pairs --model demo/model \\
      --data-root demo --data-path demo/cells.h5ad --cells all --n-cells 20 --out-dir results/try_triplets""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cli.add_model_flags(parser)
    add_sae_run_flag(parser)
    cli.add_cell_flags(parser, CellSelection(n_cells=200))
    _add_choice_flags(parser.add_argument_group("which combinations"))
    group = parser.add_argument_group("what to measure")
    group.add_argument("--target-layer", type=int, default=17, help="layer to read (default: %(default)s)")
    group.add_argument(
        "--save-effects",
        action="store_true",
        help="keep per-cell effects in effects/, averaged over each condition's own positions and over those of the "
        "whole combination",
    )
    add_edge_flags(group)
    add_sign_flip_flags(group, AdditivitySettings.n_draws, "interactions of a combination")
    group.add_argument(
        "--out-dir",
        type=Path,
        default=cli.from_environment("SAE_OUT_DIR"),
        metavar="FOLDER",
        help=f"where results go (environment: SAE_OUT_DIR; default: {DEFAULT_OUT_DIRS[3]}, with --order 2 "
        f"{DEFAULT_OUT_DIRS[2]})",
    )
    cli.add_mix_versions_flag(group)
    cli_check.add_check_flag(group, "ablate")
    group.add_argument("--analysis-only", action="store_true", help="summarise what the folder holds, run nothing")
    return parser


def _add_choice_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--order", type=int, choices=(2, 3), default=3, help="features per combination (default: %(default)s)"
    )
    group.add_argument(
        "--pair-dir",
        type=Path,
        default=cli.from_environment("SAE_PAIR_DIR"),
        metavar="FOLDER",
        help="folder of a pairwise ablation (--order 2), whose summary.json triplets are chosen from "
        "(environment: SAE_PAIR_DIR)",
    )
    group.add_argument(
        "--n-triplets",
        type=cli.natural,
        default=10,
        help="triplets to choose there, two of them kept for cross-pathway ones (default: %(default)s)",
    )
    group.add_argument(
        "--n-random-triplets",
        type=sample_size,
        default=None,
        metavar="N",
        help="random triplets, each with features of the same layers that fire as often and weigh as much as those of "
        "a chosen same-pathway one; needs the catalogs of the layers (default: one for each; none with --triplets)",
    )
    group.add_argument(
        "--disjoint", action="store_true", help="choose combinations of which no two share a feature (not with a list)"
    )
    group.add_argument(
        "--triplet-layers",
        type=cli.layer_list,
        default=TRIPLET_LAYERS,
        metavar="A,B,C",
        help="one feature of each of these layers makes a triplet (default: 0,5,11)",
    )
    group.add_argument(
        "--triplets",
        type=Path,
        default=None,
        metavar="FILE",
        help="your own triplets instead: lines such as 0:2061,5:4349,11:854 (layer:feature), or JSON",
    )
    group.add_argument(
        "--selective-dir",
        type=Path,
        default=cli.from_environment("SAE_SELECTIVE_DIR"),
        metavar="FOLDER",
        help="with --order 2: folder of selective_feature_tracing.py, whose features make pairs "
        "(environment: SAE_SELECTIVE_DIR)",
    )
    group.add_argument(
        "--pairs",
        type=Path,
        default=None,
        metavar="FILE",
        help="with --order 2: your own pairs instead, as in --triplets",
    )
    group.add_argument(
        "--features-per-layer",
        type=cli.natural,
        default=FEATURES_PER_LAYER,
        help="features of each pathway and layer, those with most edges, that make pairs (default: %(default)s)",
    )
    group.add_argument(
        "--pairing-seed",
        type=int,
        default=0,
        help="seed of the draw of random pairs or triplets (default: %(default)s)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    args = cli_check.parse(build_parser(), argv)
    args.out_dir = args.out_dir or DEFAULT_OUT_DIRS[args.order]
    return cli.run_script(lambda: report(args.out_dir) if cli_check.wants_report(args) else run(args), GO_ON)


def run(args: argparse.Namespace) -> int:
    """Choose the combinations, measure those that are not measured yet, summarise."""
    started = time.perf_counter()
    data_root = cli.require_path(args.data_root, "--data-root", "SAE_DATA_ROOT", folder=True)
    cli.require_path(args.data_path, "--data-path", "SAE_DATA_PATH", folder=False)
    chosen, config = choose(args)

    # torch and transformers take seconds to import: only once the cheap checks are done
    from cellcircuits.combination_run import CombinationRun
    from cellcircuits.inputs import open_cells, open_model, open_saes
    from cellcircuits.joint import JointBench

    loaded = open_model(args)
    ablated = sorted({feature.layer for combination in chosen for feature in combination.features})
    check_target(loaded.model.config.num_hidden_layers, ablated, args.target_layer)
    layers = open_saes(data_root, [*ablated, args.target_layer], args.sae_run, loaded)
    chosen += random_controls(args, chosen, layers)
    chosen = [with_labels(combination, layers) for combination in chosen]
    opened = open_cells(args, loaded)
    if len(opened.cells.cells) < 2:
        log.warning("Note: with fewer than two cells no effect has a size, so every ratio is 1.")
    saes = {layer: opened_sae.sae for layer, opened_sae in layers.items()}
    bench = JointBench(loaded.model, saes, ablated, args.target_layer)
    rule = EdgeRule(args.min_abs_d, args.min_consistency)
    tests = AdditivitySettings(seed=args.calibration_seed, n_draws=args.sign_flips)
    settings = run_settings(args, opened, layers, rule) | {"additivity": tests.record()}
    if not (args.triplets or args.pairs):
        flag, folder = ("--pair-dir", args.pair_dir) if args.order == 3 else ("--selective-dir", args.selective_dir)
        manifest.require_same_origin(flag, [folder, *sorted(folder.glob("layer*"))], settings)
    provenance = {**opened.provenance(), "saes": {n: str(x.files.checkpoint) for n, x in layers.items()}, **config}
    if "pairing_seed" in config:
        provenance["seeds"]["pairing"] = config["pairing_seed"]
    fingerprint = manifest.settings_fingerprint(settings)
    run_ = CombinationRun(
        args.out_dir, bench, opened.cells.cells, rule, fingerprint, args.save_effects, args.batch_size, tests
    )
    if args.check:
        from cellcircuits.combination_plan import check_combinations
        from cellcircuits.plan_report import Plan, Seconds, show

        goes_on = manifest.check_folder(args.out_dir, settings, provenance, mix_versions=args.mix_versions)
        opening = Seconds.exactly(time.perf_counter() - started)
        plan = Plan(opened, layers, args.out_dir, settings["precision"], opening)
        return show(check_combinations(plan, run_, chosen, goes_on=goes_on), args.command)
    with results.exclusive(args.out_dir):
        manifest.claim_folder(args.out_dir, settings, provenance, mix_versions=args.mix_versions)
        run_.measure(chosen)
        report(args.out_dir, [combination.name for combination in chosen])
    print(f"Results: {args.out_dir} ({time.perf_counter() - started:.0f} s)")
    return 0


def choose(args: argparse.Namespace) -> tuple[list[Combination], dict[str, Any]]:
    """The combinations to measure, and how they were chosen, for the record.

    Raises:
        UserError: no source of combinations was named, or none results.
    """
    if args.order == 3 and (args.pairs or len(args.triplet_layers) != 3):
        raise UserError("--pairs goes with --order 2." if args.pairs else "--triplet-layers: name three layers.")
    if args.pairing_seed < 0:
        raise UserError(f"--pairing-seed is {args.pairing_seed}, but must be at least 0.")
    if args.order == 2 and (args.triplets or args.n_random_triplets):
        raise UserError(f"{'--triplets' if args.triplets else '--n-random-triplets'} goes with --order 3, the default.")
    listed = args.triplets if args.order == 3 else args.pairs
    if listed and args.disjoint:
        raise UserError(f"--disjoint goes without a list: mend {listed} itself so that no two share a feature.")
    if listed:
        seed = {"pairing_seed": args.pairing_seed} if args.n_random_triplets else {}
        return read_combinations(listed, args.order), {"chosen_from": str(listed), **seed}
    if args.order == 3:
        if args.pair_dir is None:
            raise UserError(
                "--pair-dir is missing: name the folder of a pairwise ablation with --pair-dir or in the environment "
                "variable SAE_PAIR_DIR (make one with --order 2), or your own triplets with --triplets FILE."
            )
        path = args.pair_dir / "summary.json"
        chosen, notes = choose_triplets(
            read_pair_summary(path), args.n_triplets, args.triplet_layers, disjoint=args.disjoint
        )
    else:
        if args.selective_dir is None:
            raise UserError(
                "--selective-dir is missing: name the folder of selective_feature_tracing.py with --selective-dir or "
                "in the environment variable SAE_SELECTIVE_DIR, or your own pairs with --pairs FILE."
            )
        path = args.selective_dir / "selective_summary.json"
        summary = read_selective_summary(path)
        chosen, notes = choose_pairs(
            summary, args.target_layer, args.pairing_seed, args.features_per_layer, disjoint=args.disjoint
        )
    for note in notes:
        log.warning("Note: %s", note)
    log.info("%d combinations chosen from %s", len(chosen), path)
    return chosen, {"chosen_from": str(path), "disjoint": args.disjoint, "pairing_seed": args.pairing_seed}


def check_target(n_layers: int, ablated: Sequence[int], target: int) -> None:
    """Check that the target is a layer of the model, after every ablated one.

    Raises:
        UserError: it is not.
    """
    if not 0 <= target < n_layers:
        raise UserError(f"--target-layer {target}: this model has {n_layers} blocks, 0 to {n_layers - 1}.")
    if ablated[-1] >= target:
        raise UserError(
            f"--target-layer {target}: a combination removes a feature of layer {ablated[-1]}, which is not before it; "
            "choose a later target or other features (--triplet-layers, --triplets, --pairs)."
        )


def random_controls(
    args: argparse.Namespace, chosen: Sequence[Combination], layers: Mapping[int, "LayerSAE"]
) -> list[Combination]:
    """Random triplets matched to the chosen same-pathway ones or, where a list names no pathways, to all of them.

    Raises:
        UserError: they are asked for, and a layer has no catalog.
    """
    from cellcircuits.inputs import control_candidates
    from cellcircuits.triplet_controls import random_triplets

    distinct = {combination.name: combination for combination in chosen}.values()  # one of two pathways is there twice
    same = [combination for combination in distinct if combination.kind == SAME]
    wanted = (0 if args.triplets else len(same)) if args.n_random_triplets is None else args.n_random_triplets
    if args.order == 2 or not wanted:
        return []
    ablated = {feature.layer for combination in chosen for feature in combination.features}
    bare = [layers[layer].files.catalog for layer in sorted(ablated) if layers[layer].catalog is None]
    if bare and args.n_random_triplets is None:
        log.warning("Note: no random triplets, since %s is missing.", bare[0])
        return []
    if bare:
        raise UserError(
            f"--n-random-triplets: {bare[0]} is missing; make it with prepare_inputs.py --existing-saes, or ask for 0."
        )
    catalogs = {layer: control_candidates(layer, layers[layer]) for layer in ablated}
    sources = same or [combination for combination in distinct if combination.kind != RANDOM]
    controls, notes = random_triplets(sources, chosen, catalogs, wanted, args.pairing_seed)
    for note in notes:
        log.warning("Note: %s", note)
    return controls


def with_labels(combination: Combination, layers: Mapping[int, "LayerSAE"]) -> Combination:
    """The combination with the labels of the SAEs' catalogs where it brings none.

    Raises:
        UserError: the SAE of a layer does not have the feature.
    """
    features = []
    for feature in combination.features:
        layer_sae = layers[feature.layer]
        if feature.index >= layer_sae.sae.n_features:
            raise UserError(
                f"{combination.name}: layer {feature.layer} has no feature {feature.index}, its SAE "
                f"({layer_sae.files.checkpoint}) has features 0 to {layer_sae.sae.n_features - 1}; choose combinations "
                "made with these SAEs."
            )
        known = (layer_sae.catalog or {}).get(feature.index)
        has_label = feature.label != UNANNOTATED or known is None
        features.append(feature if has_label else replace(feature, label=known.label))
    return replace(combination, features=tuple(features))


def run_settings(
    args: argparse.Namespace, opened: "ModelAndCells", layers: Mapping[int, "LayerSAE"], rule: EdgeRule
) -> dict[str, Any]:
    """Everything that determines the numbers of a combination; which ones are asked for does not, but their layers."""
    from cellcircuits import sae_store

    return {
        "experiment": EXPERIMENT,
        "order": args.order,
        "target_layer": args.target_layer,
        "model": opened.loaded.fingerprint,
        "saes": {str(layer): sae_store.fingerprint(layer_sae.files) for layer, layer_sae in layers.items()},
        "n_cells": len(opened.cells.cells),
        "cells": opened.cells.fingerprint(),
        "tokenization": args.tokenization,
        "min_abs_d": rule.min_abs_d,
        "min_consistency": rule.min_consistency,
        "precision": str(opened.loaded.model.dtype).removeprefix("torch."),
    }


def report(out_dir: Path, first: Sequence[str] = ()) -> int:
    """Summarise what the folder holds: `summary.json`, `additivity.json`, the terminal; returns the exit status.

    Args:
        out_dir: the folder of a run.
        first: names of the combinations in the order wanted; those of an earlier summary follow.

    Raises:
        UserError: the folder holds no run of this experiment.
    """
    content = manifest.open_folder(out_dir, EXPERIMENT)
    settings = content["settings"]
    order, named = settings["order"], ("order", "target_layer", "n_cells", "min_abs_d", "min_consistency")
    if order not in DEFAULT_OUT_DIRS or any(key not in settings for key in named):
        raise UserError(f"{out_dir / manifest.MANIFEST}: damaged; restore it or choose another --out-dir.")
    tests = settings.get("additivity")
    if not isinstance(tests, dict) or type(tests.get("seed")) is not int:
        raise UserError(
            f"{out_dir / manifest.MANIFEST}: does not say how additivity is tested, as a folder of an earlier version; "
            "measure again into another --out-dir, or restore the file."
        )
    from cellcircuits.additivity_summary import additivity_lines, additivity_summary  # scipy takes a second

    earlier = [*first, *(name for name in combination_results.names_in_summary(out_dir, order) if name not in first)]
    records = combination_results.read_records(out_dir, order, manifest.settings_fingerprint(settings), earlier)
    summary = combination_results.summarise(order, records, {key: settings[key] for key in named})
    summary |= inputs_entry(content.get("provenance"))
    write_json(out_dir / "summary.json", summary)
    additivity = additivity_summary(order, records, settings)
    write_json(out_dir / "additivity.json", additivity)
    lines = [*combination_results.report_lines(order, summary), *additivity_lines(additivity), *left_out_lines(summary)]
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    cli.leave(main())
