"""Make what the experiments read: from any Geneformer and any .h5ad to SAEs, feature catalogs and labels.

    python src/prepare_inputs.py --model demo/model --data-path demo/cells.h5ad --cells all \
        --data-root prepared --layers 0,5 --k 8 --gmt GO_BP=demo/gene_sets/go_bp.gmt

Writes, per layer, <data root>/sae_models/layer05_x4_k32/ with sae_final.pt, activation_mean.npy,
feature_catalog.json, feature_annotations.json (with --gmt) and results.json (settings, held-out quality).
Started again after a stop, it goes on: what is done of unfinished layers lies in sae_models/unfinished/ meanwhile.
"""

import argparse
import hashlib
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellcircuits import cli, cli_check
from cellcircuits.cells import CellSelection
from cellcircuits.errors import UserError
from cellcircuits.gene_sets import GmtFile, read_gmt

if TYPE_CHECKING:
    from cellcircuits.activations import CellSplit
    from cellcircuits.gene_sets import TermTable
    from cellcircuits.inputs import ModelAndCells
    from cellcircuits.preparation_settings import Preparation, PreparationSettings

log = logging.getLogger(__name__)
GO_ON = "finished layers are kept, and all but the last minutes of the others; run the same command again to go on."
EPILOG = """example, with the demo's model and cells:
  python src/prepare_inputs.py --model demo/model --data-path demo/cells.h5ad --cells all \\
      --split-column split --held-out-value held_out --data-root prepared --layers 0,5,6,11,17 --k 8 \\
      --gmt GO_BP=demo/gene_sets/go_bp.gmt

How much is enough: an SAE of d_model 1152 with expansion 4 wants about a million rows (500 full cells) and an
accelerator; the demo's size takes about 20 seconds per layer on two cores. Look at the table at the end: FVU well
under PCA FVU, alive near 1, and labelled well above by chance."""


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults after every flag that does not state its own, description and epilog as written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        stated = action.default in (None, []) or "default:" in (action.help or "")
        return action.help if stated else super()._get_help_string(action)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 0")
    return int(text)


def _gene_set_file(text: str) -> tuple[str, str]:
    ontology, equals, path = text.partition("=")
    if not (ontology and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form ONTOLOGY=FILE, such as GO_BP=go_bp.gmt")
    return ontology, path


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="prepare_inputs.py",
        description="Train TopK SAEs on the residual streams of a Geneformer, catalog their features, label them.",
        epilog=EPILOG,
        formatter_class=_Help,
    )
    cli.add_model_flags(parser)
    cli.add_mix_versions_flag(parser)
    cli_check.add_check_flag(parser, "make")
    cli.add_cell_flags(parser, CellSelection(n_cells=2000))
    _add_training_flags(parser.add_argument_group("SAEs"))
    _add_split_flags(parser.add_argument_group("held-out cells"))
    _add_catalog_flags(parser.add_argument_group("catalog and labels"))
    return parser


def _add_training_flags(group: Any) -> None:
    add = group.add_argument
    add("--layers", type=cli.layer_list, default="0,5,6,11,17",
        help="blocks whose output gets an SAE, counted from 0; all that an experiment will read")  # fmt: skip
    add("--existing-saes", action="store_true",
        help="train nothing: make catalog and (with --gmt) labels of the SAEs that --data-root holds")  # fmt: skip
    add("--relabel", action="store_true",
        help="with --existing-saes and --gmt, replace the labels that are there")  # fmt: skip
    add("--sae-run", default=None, metavar="NAME",
        help="with --existing-saes, which of several SAEs of a layer to take, e.g. x4_k32")  # fmt: skip
    add("--expansion", type=cli.natural, default=4, help="features per dimension of the residual stream")
    add("--k", type=cli.natural, default=32, help="features active at a position")
    add("--epochs", type=cli.natural, default=10, help="times that every training row is seen")
    add("--lr", type=cli.positive, default=None,
        help="peak learning rate (default: 4e-4 / sqrt(features / 16384), which is 7.5e-4 for 4,608)")  # fmt: skip
    add("--batch-size", type=cli.natural, default=512, help="rows per step")
    add("--train-rows", type=cli.natural, default=1_000_000,
        help="gene positions to train on, drawn from all training cells; all where there are fewer")  # fmt: skip
    add("--mask-share", type=cli.fraction, default=0.0, metavar="SHARE",
        help="share of the genes of the training cells that show the mask token. The experiments never mask; with a "
        "few percent the SAE also stands in for the stream where the model predicts a masked gene")  # fmt: skip
    add("--sae-seed", type=_whole, default=42,
        help="seed of everything but the draw of cells: split, rows, weights, masks, random gene lists")  # fmt: skip
    add("--max-memory-gb", type=cli.positive, default=8.0,
        help="memory for rows and counts, and disk for them in --data-root until their layers are finished; what "
        "does not fit together is done in turn")  # fmt: skip


def _add_split_flags(group: Any) -> None:
    add = group.add_argument
    add("--held-out", type=cli.fraction, default=0.1, metavar="SHARE",
        help="share of the cells kept from training; quality is measured on them")  # fmt: skip
    add("--split-column", default=None, metavar="COLUMN",
        help="take the split from this obs column instead of drawing it")  # fmt: skip
    add("--held-out-value", default="held_out", metavar="VALUE", help="value of --split-column that holds a cell out")
    add("--loss-cells", type=_whole, default=20,
        help="held-out cells for the masked-gene loss with the reconstruction spliced in; 0 leaves it out")  # fmt: skip


def _add_catalog_flags(group: Any) -> None:
    add = group.add_argument
    add("--min-firings", type=cli.natural, default=5, help="firings from which on a gene can be a top gene")
    add("--top-genes", type=cli.natural, default=20, help="top genes listed and tested per feature")
    add("--gmt", type=_gene_set_file, action="append", default=[], metavar="ONTOLOGY=FILE",
        help="gene sets to label features with, such as GO_BP=go_bp.gmt; repeatable; GO_BP, KEGG and Reactome are "
        "the names that the experiments prefer")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit status."""
    args = cli_check.parse(build_parser(), argv)
    return cli.run_script(lambda: _run(args), GO_ON)


def _run(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    if args.data_root is None:
        raise UserError("--data-root is missing: name the folder to write to, or set SAE_DATA_ROOT.")
    cli.require_path(args.data_path, "--data-path", "SAE_DATA_PATH", folder=False)
    if args.relabel and not (args.existing_saes and args.gmt):
        raise UserError("--relabel: goes with --existing-saes and --gmt, from which the new labels are made.")
    gmt_files = [read_gmt(Path(path), ontology) for ontology, path in args.gmt]
    if not args.check:
        _make_folder(args.data_root)

    # torch and transformers take seconds to import: only once the cheap checks are done
    from cellcircuits.inputs import open_cells, open_model
    from cellcircuits.preparation import complete_existing, prepare, table_lines
    from cellcircuits.preparation_settings import Preparation

    settings = _settings(args)
    loaded = open_model(args)
    _check_sizes(args, loaded.model.config.num_hidden_layers, loaded.model.config.hidden_size)
    inputs = open_cells(args, loaded)
    split = _split(args, inputs)
    record = _record(args, inputs, split, gmt_files)
    terms = _terms(args, inputs, gmt_files)
    work = Preparation(args.data_root, inputs, split, settings, terms, record, args.mix_versions)
    if args.check:
        return _check(args, work, time.perf_counter() - started)
    print("\n".join(complete_existing(work, args.sae_run) if args.existing_saes else table_lines(prepare(work))))
    return 0


def _make_folder(data_root: Path) -> None:
    try:
        data_root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--data-root {data_root}: cannot be made a folder ({error.strerror}).") from None


def _check(args: argparse.Namespace, work: "Preparation", opening_seconds: float) -> int:
    """Say what the run would do; returns the exit status."""
    from cellcircuits.inputs import open_saes
    from cellcircuits.plan_report import Plan, Seconds, show
    from cellcircuits.preparation_plan import check_preparation, task_of, task_of_existing

    layers = open_saes(args.data_root, args.layers, args.sae_run, work.inputs.loaded) if args.existing_saes else {}
    task = task_of_existing(work, layers) if args.existing_saes else task_of(work)
    precision = str(work.inputs.loaded.model.dtype).removeprefix("torch.")
    plan = Plan(work.inputs, layers, args.data_root, precision, Seconds.exactly(opening_seconds))
    return show(check_preparation(plan, work, task), args.command)


def _settings(args: argparse.Namespace) -> "PreparationSettings":
    from cellcircuits.annotation import AnnotationSettings
    from cellcircuits.preparation_settings import PreparationSettings
    from cellcircuits.sae_training import TrainingSettings

    return PreparationSettings(
        layers=args.layers,
        training=TrainingSettings(
            expansion=args.expansion, k=args.k, epochs=args.epochs, lr=args.lr, batch_size=args.batch_size,
            seed=args.sae_seed,
        ),
        annotation=AnnotationSettings(seed=args.sae_seed),
        train_rows=args.train_rows,
        mask_share=args.mask_share,
        min_firings=args.min_firings,
        n_top_genes=args.top_genes,
        n_loss_cells=args.loss_cells,
        max_memory_gb=args.max_memory_gb,
        relabel=args.relabel,
    )  # fmt: skip


def _check_sizes(args: argparse.Namespace, n_layers: int, d_model: int) -> None:
    if max(args.layers) >= n_layers:
        raise UserError(f"--layers {max(args.layers)}: this model has {n_layers} blocks, 0 to {n_layers - 1}.")
    if args.k >= d_model and not args.existing_saes:
        raise UserError(f"--k {args.k}: must be smaller than the width of the residual stream, {d_model}.")


def _split(args: argparse.Namespace, inputs: "ModelAndCells") -> "CellSplit":
    from cellcircuits.activations import CellSplit, split_at_random, split_by_column

    cells = inputs.cells.cells
    if args.existing_saes:
        return CellSplit(train=cells, held_out=())
    if args.split_column:
        return split_by_column(cells, args.data_path, args.split_column, args.held_out_value)
    return split_at_random(cells, args.held_out, args.sae_seed)


def _terms(args: argparse.Namespace, inputs: "ModelAndCells", gmt_files: list[GmtFile]) -> "TermTable | None":
    """The terms over the genes that can be listed: those at enough positions to fire often enough."""
    from cellcircuits.feature_stats import gene_tokens
    from cellcircuits.gene_sets import build_term_table, resolve, tokens_by_name

    if not gmt_files:
        return None
    token_of_name = tokens_by_name(inputs.vocabulary.token_of, inputs.vocabulary.ensembl_of)
    tokens, n_positions = gene_tokens(inputs.cells.cells)
    gene_sets = [gene_set for gmt in gmt_files for gene_set in resolve(gmt, token_of_name)]
    table = build_term_table(gene_sets, tokens[n_positions >= args.min_firings].tolist())
    log.info("Gene sets: %d terms kept over a universe of %d genes", len(table.terms), len(table.universe))
    return table


def _record(
    args: argparse.Namespace, inputs: "ModelAndCells", split: "CellSplit", gmt_files: list[GmtFile]
) -> dict[str, Any]:
    """What determines the numbers beyond the settings: hashes of model, dictionaries, cells, split, gene sets."""
    from cellcircuits.loading import file_sha256

    held_out = hashlib.sha256("\n".join(str(cell.row) for cell in split.held_out).encode()).hexdigest()
    return {
        "model": inputs.loaded.fingerprint,
        "dictionaries": [file_sha256(path) for path in inputs.vocabulary.files],
        "cells": inputs.cells.fingerprint(),
        "held_out": f"{args.split_column}={args.held_out_value}" if args.split_column else args.held_out,
        "held_out_rows": held_out,
        "gene_sets": [f"{gmt.ontology}={file_sha256(gmt.path)}" for gmt in gmt_files],
    }


if __name__ == "__main__":
    cli.leave(main())
