"""Open and check everything an experiment reads: model, dictionaries, cells, SAEs, catalogs."""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cellcircuits import cli, manifest, sae_store
from cellcircuits.best_annotated import best_terms
from cellcircuits.catalog import UNANNOTATED, FeatureInfo, load_catalog
from cellcircuits.cells import CellSelection, CellSet, load_cells
from cellcircuits.combinations import ComboFeature
from cellcircuits.device import choose_device, describe_device
from cellcircuits.errors import UserError
from cellcircuits.geneformer import LoadedModel, dictionary_folders, load_model, n_positions
from cellcircuits.pathways import pathway_of
from cellcircuits.triplet_controls import Candidate
from cellcircuits.vocabulary import GeneVocabulary, load_vocabulary
from sae_model import TopKSAE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelAndCells:
    """A Geneformer on its device, its gene vocabulary, and the cells to run."""

    loaded: LoadedModel
    vocabulary: GeneVocabulary
    cells: CellSet
    device: torch.device

    def provenance(self) -> dict[str, Any]:
        """Where the numbers come from, for the record."""
        return {
            "model": {
                "source": self.loaded.source,
                "subfolder": self.loaded.subfolder,
                "revision": self.loaded.revision,
            },
            "cells": self.cells.report,
            "device": describe_device(self.device),
            "seeds": self.cells.seeds(),
            **manifest.origin(),
        }


@dataclass(frozen=True)
class LayerSAE:
    """The SAE of one layer with its files and, where there is one, its catalog."""

    files: sae_store.SAEFiles
    sae: TopKSAE
    catalog: dict[int, FeatureInfo] | None

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of the files of the SAE that determine numbers."""
        return sae_store.fingerprint(self.files)

    def features(self) -> list[FeatureInfo]:
        """Every feature: the catalog's or, without one, all of the SAE's with nothing known about them."""
        if self.catalog is not None:
            return list(self.catalog.values())
        return [FeatureInfo(index, None, UNANNOTATED, ()) for index in range(self.sae.n_features)]

    def labels(self) -> dict[int, str]:
        """Label of every feature, `unannotated` where the catalog has none."""
        known = {info.index: info.label for info in self.features()}
        return {index: known.get(index, UNANNOTATED) for index in range(self.sae.n_features)}


def control_candidates(layer: int, layer_sae: LayerSAE) -> dict[int, Candidate]:
    """The features of a layer with a catalog, as matched controls are drawn from them; pathways by our own keywords.

    Raises:
        UserError: its annotations are damaged.
    """
    catalog = layer_sae.catalog or {}
    terms = best_terms(catalog, layer_sae.files.annotations)
    lengths = layer_sae.sae.decoder_directions.norm(dim=1).tolist()
    found = {}
    for index, info in catalog.items():
        frequency = info.activation_freq or 0.0
        term, significant = terms.get(index, (None, None))
        norm = info.mean_activation / frequency * lengths[index] if info.mean_activation and frequency else None
        feature = ComboFeature(layer, index, info.label, 0, term, significant)
        found[index] = Candidate(feature, frequency, norm, pathway_of(term) if term else None)
    return found


def open_model(args: argparse.Namespace) -> LoadedModel:
    """Load the model that the flags name and move it to its device.

    Raises:
        UserError: see `load_model` and `choose_device`.
    """
    device = choose_device(args.device)
    source, subfolder = cli.model_source(args)
    loaded = load_model(source, subfolder, args.model_revision)
    loaded.model.to(device)
    log.info(
        "Model %s: %d blocks, d_model %d, %d positions, on %s",
        source,
        loaded.model.config.num_hidden_layers,
        loaded.model.config.hidden_size,
        n_positions(loaded.model),
        describe_device(device),
    )
    return loaded


def open_cells(args: argparse.Namespace, loaded: LoadedModel, selection: CellSelection | None = None) -> ModelAndCells:
    """Read the dictionaries and the cells that the flags name, for a loaded model.

    Args:
        args: flags of `add_model_flags` and, without a `selection`, of `add_cell_flags`.
        loaded: the model.
        selection: which cells; None takes what the flags of `add_cell_flags` say.

    Raises:
        UserError: see `load_vocabulary` and `load_cells`.
    """
    data_path = cli.require_path(args.data_path, "--data-path", "SAE_DATA_PATH", folder=False)
    folders = [args.dicts] if args.dicts else dictionary_folders(loaded)
    vocabulary = load_vocabulary(folders, loaded.model.config.vocab_size)
    cells = load_cells(data_path, vocabulary, selection or cli.selection_from(args), n_positions(loaded.model))
    lengths, report = [len(cell.tokens) for cell in cells.cells], cells.report
    log.info(
        "Cells %s: %d of %d asked (%d rows match), median %d tokens; counts from %s, genes from %s, "
        "%.1f%% of the counts mapped",
        data_path,
        len(lengths),
        args.n_cells,
        report["n_rows_matched"],
        np.median(lengths),
        report["matrix"],
        report["gene_column"],
        100 * report["share_of_counts_mapped"],
    )
    for note in cells.report.get("notes", ()):
        log.warning("Note: %s", note)
    return ModelAndCells(loaded, vocabulary, cells, loaded.model.device)


def check_layers(n_layers: int, sources: Sequence[int], targets: Sequence[int]) -> None:
    """Check that every source has a target after it and that every target is after a source.

    Args:
        n_layers: blocks of the model.
        sources: layers to ablate in, ascending.
        targets: layers to read, ascending; a source reads those after it.

    Raises:
        UserError: with a set of layers that this model has.
    """
    first, many = sources[0], len(sources) > 1
    has = f"this model has {n_layers} blocks, 0 to {n_layers - 1}"
    for source in sources:
        try_these = "; leave it out" if many else _suggested_layers(n_layers, source)
        if source >= n_layers:
            raise UserError(f"--source-layer {source}: {has}{try_these}.")
        if source == n_layers - 1:
            raise UserError(
                f"--source-layer {source}: it is the last block, so nothing lies downstream ({has}){try_these}."
            )
    try_these = _suggested_layers(n_layers, first)
    for target in targets:
        if target >= n_layers:
            raise UserError(f"--downstream-layers {target}: {has}{try_these}.")
        if target <= first:
            which = "first source layer" if many else "source layer"
            raise UserError(f"--downstream-layers {target}: not after the {which} {first}{try_these}.")
    if sources[-1] >= targets[-1]:
        raise UserError(
            f"--source-layer {sources[-1]}: none of the layers to read ({', '.join(map(str, targets))}) comes after "
            "it; leave it out or add one to --downstream-layers."
        )


def _suggested_layers(n_layers: int, source: int) -> str:
    """The published choice (5 -> 6, 11, 17 of 18) at this depth, keeping the source where it can stay."""
    if n_layers < 2:
        return ""
    last = n_layers - 1
    flags = ""
    if source >= last:
        source = last * 5 // 17
        flags = f"--source-layer {source} "
    targets = sorted({source + 1, (source + 1 + last) // 2, last})
    return f"; try {flags}--downstream-layers {','.join(map(str, targets))}"


def every_source_layer(data_root: Path, run_name: str | None, n_layers: int, last_target: int) -> list[int]:
    """Layers that can be traced: with an SAE, a catalog and a layer to read after them; says which are left out.

    Args:
        data_root: the folder that holds `sae_models/`.
        run_name: see `find_sae`.
        n_layers: blocks of the model.
        last_target: the last layer to read.

    Raises:
        UserError: there is none, or a layer has several SAEs and no `run_name` says which.
    """
    why_not = {layer: _why_no_source(data_root, layer, run_name, last_target) for layer in range(n_layers)}
    sources = [layer for layer, reason in why_not.items() if reason is None]
    reasons = {
        reason: [layer for layer in why_not if why_not[layer] == reason] for reason in why_not.values() if reason
    }
    left_out = "; ".join(f"{reason}: {', '.join(map(str, layers))}" for reason, layers in reasons.items())
    if not sources:
        raise UserError(
            f"--source-layer all: {data_root} has no layer to trace ({left_out}); make catalogs with prepare_inputs.py "
            "--existing-saes, or change --downstream-layers."
        )
    log.info("Source layers %s; left out: %s", ", ".join(map(str, sources)), left_out or "none")
    return sources


def _why_no_source(data_root: Path, layer: int, run_name: str | None, last_target: int) -> str | None:
    if layer >= last_target:
        return "no layer to read after it"
    try:
        files = sae_store.find_sae(data_root, layer, run_name)
    except sae_store.MissingSAEError:
        return "no SAE"
    return None if files.catalog.is_file() else "no catalog"


def _find_all(data_root: Path, layers: Sequence[int], run_name: str | None) -> dict[int, sae_store.SAEFiles]:
    """Locate the SAE of every layer; one error names all that are missing."""
    files, missing, first = {}, [], None
    for layer in layers:
        try:
            files[layer] = sae_store.find_sae(data_root, layer, run_name)
        except sae_store.MissingSAEError as error:
            missing.append(layer)
            first = first or error
    if missing:
        there = ", ".join(map(str, sae_store.layers_there(data_root))) or "none"
        wanted = ",".join(map(str, missing))
        raise UserError(
            f"{first} Missing: layers {wanted}; there are: {there}. Choose among those, or train the missing ones with "
            f"prepare_inputs.py --layers {wanted} and the other flags of your SAEs."
        )
    return files


def open_saes(data_root: Path, layers: Sequence[int], run_name: str | None, loaded: LoadedModel) -> dict[int, LayerSAE]:
    """Load the SAE of each layer onto the model's device.

    Raises:
        UserError: one is missing, damaged or not of the model's width.
    """
    d_model = loaded.model.config.hidden_size
    opened = {}
    for layer, files in _find_all(data_root, layers, run_name).items():
        sae = sae_store.open_sae(files)
        if sae.d_model != d_model:
            raise UserError(
                f"{files.checkpoint}: the SAE reads a stream of width {sae.d_model}, but the model's is {d_model}; "
                "take the SAE trained on this model."
            )
        annotations = files.annotations if files.annotations.is_file() else None
        catalog = load_catalog(files.catalog, annotations, sae.n_features) if files.catalog.is_file() else None
        opened[layer] = LayerSAE(files, sae.to(loaded.model.device), catalog)
    return opened
