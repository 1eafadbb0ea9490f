"""Trace the best annotated SAE features of some layers: the pool that pairs and triplets are chosen from.

    python src/selective_feature_tracing.py --data-root sae_data --data-path cells.h5ad --n-cells 200

Writes into the output folder: layer00/, layer05/, ... (each a trace of that layer, as exhaustive_feature_tracing.py
makes them), chosen_features.json and selective_summary.json (the features with terms, pathways and numbers of
edges). Running the same command again goes on where it stopped.
"""

import argparse
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellcircuits import cli, cli_check, manifest, results
from cellcircuits.best_annotated import N_FEATURES, AnnotatedFeature, best_annotated
from cellcircuits.cells import CellSelection
from cellcircuits.errors import UserError
from cellcircuits.input_counts import left_out_lines
from cellcircuits.jsonio import read_json, write_json
from cellcircuits.pathways import PATHWAYS, Pathway, as_json, read_pathways
from cellcircuits.stats import EdgeRule
from cellcircuits.trace_flags import (
    add_edge_flags,
    add_precision_flag,
    add_sae_run_flag,
    add_save_effects_flag,
    catalog_command,
)
from cellcircuits.trace_folder import TraceFolder, make_tables
from cellcircuits.trace_layers import LayerWork, trace_in_order

if TYPE_CHECKING:
    from cellcircuits.inputs import LayerSAE

log = logging.getLogger(__name__)
DEFAULT_OUT_DIR = Path("results/runs/selective_tracing")
CHOICE, SUMMARY = "chosen_features.json", "selective_summary.json"
GO_ON = "everything finished is kept; run the same command again to go on."
NO_PATHWAY = "(none)"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Ablate the best annotated SAE features of some layers of a Geneformer, record their edges to "
        "later layers and file them under pathways.",
        epilog="""example, with the demo's inputs:
  python src/selective_feature_tracing.py --model demo/model --data-root demo --data-path demo/cells.h5ad \\
      --cells all --n-cells 10 --n-features 5 --out-dir results/five_per_layer""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cli.add_model_flags(parser)
    add_sae_run_flag(parser)
    cli.add_cell_flags(parser, CellSelection(n_cells=200))
    group = parser.add_argument_group("what to trace")
    group.add_argument(
        "--source-layers",
        type=cli.layer_list,
        default=(0, 5, 11),
        metavar="A,B,C",
        help="layers to ablate in, one at a time (default: 0,5,11)",
    )
    group.add_argument(
        "--downstream-layers",
        type=cli.layer_list,
        default=None,
        metavar="A,B,C",
        help="layers to read; a source layer takes those after it (default: every later layer with an SAE)",
    )
    group.add_argument(
        "--n-features",
        type=cli.natural,
        default=N_FEATURES,
        help="best annotated features to trace per source layer (default: %(default)s)",
    )
    group.add_argument(
        "--pathways",
        type=Path,
        default=None,
        metavar="FILE",
        help='your own keywords instead of the study\'s: JSON {"name": ["keyword", ...]}, or with {"any": [...], '
        '"none": [...]} for each name; the first name that fits a term wins',
    )
    add_edge_flags(group)
    add_precision_flag(group)
    add_save_effects_flag(group)
    cli.add_out_dir_flag(group, "where results go", DEFAULT_OUT_DIR)
    cli.add_mix_versions_flag(group)
    cli_check.add_check_flag(group, "trace")
    group.add_argument("--analysis-only", action="store_true", help="summarise what the folder holds, trace nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    args = cli_check.parse(build_parser(), argv)
    return cli.run_script(lambda: report(args.out_dir) if cli_check.wants_report(args) else run(args), GO_ON)


def run(args: argparse.Namespace) -> int:
    """Open the inputs once, choose the features, trace what is not traced yet, summarise."""
    started = time.perf_counter()
    data_root = cli.require_path(args.data_root, "--data-root", "SAE_DATA_ROOT", folder=True)
    cli.require_path(args.data_path, "--data-path", "SAE_DATA_PATH", folder=False)
    pathways = read_pathways(args.pathways) if args.pathways else PATHWAYS

    # torch and transformers take seconds to import: only once the cheap checks are done
    from cellcircuits.inputs import open_cells, open_model, open_saes
    from cellcircuits.sae_store import layers_there

    loaded = open_model(args)
    targets = target_layers(args, loaded.model.config.num_hidden_layers, layers_there(data_root))
    wanted = sorted({*args.source_layers, *(layer for of_source in targets.values() for layer in of_source)})
    layers = open_saes(data_root, wanted, args.sae_run, loaded)
    chosen = {source: choose(layers[source], source, pathways, args) for source in args.source_layers}
    opened = open_cells(args, loaded)
    rule = EdgeRule(args.min_abs_d, args.min_consistency)
    if len(opened.cells.cells) < 2:
        log.warning("Note: with fewer than two cells no effect has a size, so no edge can be called.")
    folders = {}
    for source, later in targets.items():
        of_folder = {layer: layers[layer] for layer in (source, *later)}
        folders[source] = TraceFolder(
            layer_folder(args.out_dir, source), source, of_folder, opened, rule, args.tokenization, args.precision,
            mix_versions=args.mix_versions, save_effects=args.save_effects,
        )  # fmt: skip
    features = {source: sorted(x.index for x in of_layer) for source, of_layer in chosen.items()}
    if args.check:
        from cellcircuits.plan_report import show
        from cellcircuits.trace_plan import check_traces

        seconds = time.perf_counter() - started
        return show(
            check_traces(args.out_dir, list(folders.values()), features, args.batch_size, seconds), args.command
        )
    with ExitStack() as locks:
        for out_dir in (args.out_dir, *(folder.out_dir for folder in folders.values())):
            locks.enter_context(results.shared(out_dir))
        # every folder is claimed before the choice is written: a refused run leaves the kept choice as it was
        fingerprints = {source: folder.claim() for source, folder in folders.items()}
        write_choice(args.out_dir, chosen, targets, fingerprints, pathways)
        works = [LayerWork(folder, features[source], fingerprints[source]) for source, folder in folders.items()]
        trace_in_order(works, args.batch_size)
        report(args.out_dir)
    print(f"Results: {args.out_dir} ({time.perf_counter() - started:.0f} s)")
    return 0


def layer_folder(out_dir: Path, layer: int) -> Path:
    """Where the trace of one source layer lies."""
    return out_dir / f"layer{layer:02d}"


def target_layers(args: argparse.Namespace, n_layers: int, with_sae: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """The layers to read for each source layer.

    Args:
        args: flags of the run.
        n_layers: blocks of the model.
        with_sae: layers that the data root holds an SAE of.

    Raises:
        UserError: a layer that the model lacks, or a source layer with nothing to read after it.
    """
    asked = args.downstream_layers
    for flag, layers in (("--source-layers", args.source_layers), ("--downstream-layers", asked or ())):
        if layers and layers[-1] >= n_layers:
            raise UserError(f"{flag} {layers[-1]}: this model has {n_layers} blocks, 0 to {n_layers - 1}.")
    pool = [layer for layer in with_sae if layer < n_layers] if asked is None else asked
    targets = {source: tuple(layer for layer in pool if layer > source) for source in args.source_layers}
    for source, later in targets.items():
        if not later:
            there = ", ".join(map(str, pool)) or "none"
            what = "layers with an SAE" if asked is None else "--downstream-layers"
            raise UserError(f"--source-layers {source}: none of the {what} ({there}) lies after it; leave it out.")
    return targets


def choose(
    source: "LayerSAE", layer: int, pathways: Sequence[Pathway], args: argparse.Namespace
) -> list[AnnotatedFeature]:
    """The best annotated features of one source layer.

    Raises:
        UserError: it has no catalog, no annotations, or no feature that counts.
    """
    if source.catalog is None:
        command = catalog_command(args, build_parser().parse_args([]), layer)
        raise UserError(f"{source.files.catalog}: no such file; make it with: {command}")
    chosen = best_annotated(layer, source.catalog, source.files.annotations, pathways, args.n_features)
    if len(chosen) < args.n_features:
        log.warning("Note: layer %d has only %d features with a term to choose from.", layer, len(chosen))
    return chosen


def write_choice(
    out_dir: Path,
    chosen: Mapping[int, Sequence[AnnotatedFeature]],
    targets: Mapping[int, Sequence[int]],
    fingerprints: Mapping[int, str],
    pathways: Sequence[Pathway],
) -> None:
    """Keep which features were chosen, for which trace folders, so that the summary can be made from the folder."""
    features = [asdict(feature) for of_layer in chosen.values() for feature in of_layer]
    content = {
        "schema_version": results.SCHEMA_VERSION,
        "source_layers": list(targets),
        "downstream_layers": {str(source): list(later) for source, later in targets.items()},
        "fingerprints": {str(source): fingerprint for source, fingerprint in fingerprints.items()},
        "pathways": as_json(pathways),
        "features": [{("idx" if key == "index" else key): x for key, x in one.items()} for one in features],
    }
    write_json(out_dir / CHOICE, content)


def summarise(out_dir: Path) -> tuple[str, int]:
    """Make the tables of every layer and `selective_summary.json` from what the folder holds.

    Returns:
        The summary as text, and how many chosen features are not traced yet (they are not in it).

    Raises:
        UserError: the folder holds no selective trace, or one of its layers was traced anew with other settings.
    """
    path = out_dir / CHOICE
    if not path.is_file():
        raise UserError(f"{out_dir}: holds no selective trace (no {CHOICE}); run without --analysis-only first.")
    choice = read_json(path)
    try:
        traced, of_run = _traced(out_dir, choice["fingerprints"])
        features = [
            {key: value for key, value in feature.items() if key != "p_value"}
            | {key: traced[feature["layer"], feature["idx"]][key] for key in ("n_edges", "n_cells_active")}
            for feature in choice["features"]
            if (feature["layer"], feature["idx"]) in traced
        ]
        summary = {
            "n_features": len(features),
            "n_best_terms_significant": sum(feature["best_term_significant"] for feature in features),
            **of_run,
            **{key: choice[key] for key in ("source_layers", "downstream_layers", "pathways")},
            "features": features,
        }
        text = "\n".join([*report_lines(summary), *left_out_lines(summary)])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); run the same trace again.") from None
    write_json(out_dir / SUMMARY, summary)
    return text, len(choice["features"]) - len(features)


def _traced(
    out_dir: Path, fingerprints: Mapping[str, str]
) -> tuple[dict[tuple[int, int], dict[str, Any]], dict[str, Any]]:
    """Facts of every traced feature by (layer, feature), and what a summary says of the cells."""
    traced, of_run = {}, {"n_cells": 0}
    for layer, fingerprint in fingerprints.items():
        folder = layer_folder(out_dir, int(layer))
        settings = manifest.open_folder(folder)["settings"]
        if manifest.settings_fingerprint(settings) != fingerprint:
            raise UserError(f"{folder}: was traced with other settings than the rest; choose another --out-dir.")
        summary, features, _ = make_tables(folder)
        of_run = {"n_cells": settings["n_cells"], **{key: summary[key] for key in ("inputs",) if key in summary}}
        traced |= {(int(layer), facts["feature_idx"]): facts for facts in features}
    return traced, of_run


def report(out_dir: Path) -> int:
    """Make and print the summary; returns the exit status."""
    text, n_missing = summarise(out_dir)
    print(text)
    if n_missing:
        print(f"{n_missing} chosen features are not traced yet; run the same command without --analysis-only.")
    return 0


def report_lines(summary: Mapping[str, Any]) -> Iterable[str]:
    """The summary as text for the terminal, line by line."""
    features, layers = summary["features"], summary["source_layers"]
    yield f"{summary['n_features']} features traced in {summary['n_cells']} cells; features by pathway and layer:"
    yield f"  {'':<12}" + "".join(f"{f'L{layer}':>7}" for layer in layers)
    there = {feature["pathway"] for feature in features}
    for pathway in [*(name for name in summary["pathways"] if name in there), None]:
        counts = [sum(f["pathway"] == pathway and f["layer"] == layer for f in features) for layer in layers]
        yield f"  {pathway or NO_PATHWAY:<12}" + "".join(f"{count:>7}" for count in counts)
    yield "  features of a pathway, most edges first (edges, active cells, best term; * significant)"
    order = {name: rank for rank, name in enumerate(summary["pathways"])}
    filed = [feature for feature in features if feature["pathway"] is not None]
    for f in sorted(filed, key=lambda f: (order.get(f["pathway"], len(order)), f["layer"], -f["n_edges"], f["idx"])):
        name, star = f"L{f['layer']}/F{f['idx']}", "*" if f["best_term_significant"] else " "
        yield f"  {f['pathway']:<12}{name:>9} {f['n_edges']:>6} {f['n_cells_active']:>5}  {star} {f['best_term']}"
    yield (
        f"  best terms that are significant: {summary['n_best_terms_significant']} of {summary['n_features']}; the "
        "others only name what a feature is nearest to"
    )


if __name__ == "__main__":
    cli.leave(main())
