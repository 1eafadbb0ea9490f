"""From a model and cells to SAEs, catalogs and labels: what `prepare_inputs.py` does layer by layer.

Layers are worked on in groups that fit in memory, each group with two passes over the cells: one samples the
training rows, one counts the catalog and judges the SAEs on held-out cells. `results.json` is written last
and marks a layer as finished.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cellcircuits.activations import (
    FLOAT32_BYTES,
    CellSplit,
    collect_rows,
    draw_rows,
    layer_groups,
    stream,
)
from cellcircuits.annotation import AnnotationSettings, annotate_catalog
from cellcircuits.cells import Cell
from cellcircuits.errors import UserError
from cellcircuits.feature_stats import (
    GeneFeatureCounts,
    ReconstructionError,
    StreamBaseline,
    build_catalog,
    catalog_bytes,
    fit_baseline,
    gene_tokens,
    loss_report,
    mask_positions,
    masked_gene_losses,
    splice,
)
from cellcircuits.gene_sets import TermTable
from cellcircuits.inputs import ModelAndCells, open_saes
from cellcircuits.jsonio import read_json, write_json
from cellcircuits.results import setting_differences, settings_fingerprint
from cellcircuits.sae_store import SAEFiles, run_folder, save_sae
from cellcircuits.sae_training import TrainingSettings, train_sae
from sae_model import TopKSAE

log = logging.getLogger(__name__)
SCHEMA_VERSION = 1
RESULTS = "results.json"
LAYER_FILES = ("sae_final.pt", "activation_mean.npy", "feature_catalog.json", "feature_annotations.json")
MASKED_SHARE = 0.15

QUALITY_DEFINITIONS = {
    "fvu": "|x - x^|^2 / |x - mean|^2 over the gene positions of the held-out cells; mean of the training rows",
    "pca_fvu": "the same for the projection on the k first principal components of the training rows",
    "l0": "latents > 0 per position",
    "alive": "share of features that fire at least once in the used cells",
    "traceable": "share of features with activation_freq of at least 0.001",
    "participation_ratio": "effective dimensions of the training rows: (sum of eigenvalues)^2 / sum of squares",
    "loss": "mean cross-entropy (nats) at masked gene positions of held-out cells, the stream of the layer replaced "
    "at all gene positions, masked ones too: by the reconstruction (spliced), the training mean, or zero",
    "loss_recovered": "(ablated - spliced) / (ablated - original); null where the ablation does no damage",
}


@dataclass(frozen=True)
class PreparationSettings:
    """What to make, beyond which model and cells."""

    layers: tuple[int, ...]
    training: TrainingSettings = field(default_factory=TrainingSettings)
    annotation: AnnotationSettings = field(default_factory=AnnotationSettings)
    train_rows: int = 1_000_000
    mask_share: float = 0.0
    min_firings: int = 5
    n_top_genes: int = 20
    n_loss_cells: int = 20
    max_memory_gb: float = 8.0
    relabel: bool = False


@dataclass(frozen=True)
class Preparation:
    """Everything one run works with.

    `record` holds the settings that determine the numbers of every layer, `terms` is None without gene sets.
    """

    data_root: Path
    inputs: ModelAndCells
    split: CellSplit
    settings: PreparationSettings
    terms: TermTable | None
    record: Mapping[str, Any]

    def folder(self, layer: int) -> Path:
        """Where the files of a layer go."""
        return run_folder(self.data_root, layer, self.settings.training.expansion, self.settings.training.k)

    def layer_record(self, layer: int) -> dict[str, Any]:
        """The settings that determine the numbers of one layer, as flat JSON values."""
        settings = self.settings
        return {
            **self.record,
            "layer": layer,
            **asdict(settings.training),
            "train_rows": settings.train_rows,
            "mask_share": settings.mask_share,
            "min_firings": settings.min_firings,
            "top_genes": settings.n_top_genes,
            "loss_cells": settings.n_loss_cells,
            "alpha": settings.annotation.alpha,
        }


def prepare(work: Preparation) -> list[dict[str, Any]]:
    """Make every layer that is not finished yet.

    Returns:
        The content of `results.json` of every asked layer, in order.

    Raises:
        UserError: a folder holds something made with other settings, or by someone else.
    """
    finished = {layer: kept for layer in work.settings.layers if (kept := _finished(work, layer)) is not None}
    pending = [layer for layer in work.settings.layers if layer not in finished]
    for layer in finished:
        log.info("Layer %d: finished before with these settings, kept", layer)
    if pending:
        for group in _groups(work, pending):
            finished |= _prepare_group(work, group)
    return [finished[layer] for layer in work.settings.layers]


def _finished(work: Preparation, layer: int) -> dict[str, Any] | None:
    """The results of a layer that is done with these very settings; None where it is to be made."""
    folder = work.folder(layer)
    path = folder / RESULTS
    if not path.exists():
        found = next((name for name in LAYER_FILES if (folder / name).exists()), None)
        if found:
            raise UserError(
                f"{folder}: holds a {found} that this script did not make (no {RESULTS}); choose another --data-root."
            )
        return None
    kept = read_json(path)
    if not isinstance(kept, dict) or not isinstance(kept.get("settings"), dict):
        raise UserError(f"{path}: was not written by this script; choose another --data-root.")
    if not kept.get("finished"):
        return None
    differences = list(setting_differences(kept["settings"], json.loads(json.dumps(work.layer_record(layer)))))
    if differences:
        raise UserError(
            f"{folder}: was made with other settings ({'; '.join(differences)}); choose another --data-root, "
            "or repeat those settings to keep it."
        )
    wanted = LAYER_FILES if work.terms is not None else LAYER_FILES[:-1]
    gone = [name for name in wanted if not (folder / name).is_file()]
    if gone:
        log.warning("%s: %s is gone; the layer is made again.", folder, gone[0])
        return None
    return kept


def _groups(work: Preparation, layers: Sequence[int]) -> list[tuple[int, ...]]:
    n_available = sum(len(cell.gene_positions) for cell in work.split.train)
    n_rows = min(work.settings.train_rows, n_available)
    d_model = work.inputs.loaded.model.config.hidden_size
    n_genes = len(gene_tokens(work.inputs.cells.cells)[0])
    needed = max(n_rows * d_model * FLOAT32_BYTES, catalog_bytes(n_genes, work.settings.training.expansion * d_model))
    groups = layer_groups(layers, needed, int(work.settings.max_memory_gb * 2**30))
    log.info(
        "Training rows: %d of %d gene positions in %d cells; %d held-out cells; %d layers in %d group(s)",
        n_rows, n_available, len(work.split.train), len(work.split.held_out), len(layers), len(groups),
    )  # fmt: skip
    return groups


def _prepare_group(work: Preparation, layers: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Train, count, judge and write one group of layers."""
    started = time.monotonic()
    saes, baselines, trainings = _train_group(work, layers)
    counts, errors = _count_group(work, saes, baselines)
    losses = _losses_of_group(work, saes)
    results = {}
    for layer in layers:
        catalog = _catalog(work, layer, counts[layer], work.settings.training.k)
        quality = {
            **errors[layer].report(),
            "alive": catalog["summary"]["n_alive"] / catalog["summary"]["n_features"],
            "traceable": catalog["summary"]["n_traceable"] / catalog["summary"]["n_features"],
            "participation_ratio": baselines[layer].participation_ratio,
            **losses[layer],
            "definitions": QUALITY_DEFINITIONS,
        }
        parts = {"quality": quality, "training": trainings[layer]}
        results[layer] = _write_layer(work, layer, saes[layer], catalog, parts)
    log.info("Layers %s: %.0f s", ", ".join(map(str, layers)), time.monotonic() - started)
    return results


def _train_group(
    work: Preparation, layers: Sequence[int]
) -> tuple[dict[int, TopKSAE], dict[int, StreamBaseline], dict[int, dict[str, Any]]]:
    model, settings = work.inputs.loaded.model, work.settings
    train = _with_masks(work)
    offsets = draw_rows([len(cell.gene_positions) for cell in train], settings.train_rows, settings.training.seed)
    rows = collect_rows(model, train, offsets, layers)
    saes, baselines, trainings = {}, {}, {}
    for layer in layers:
        of_layer = rows.pop(layer)
        started = time.monotonic()
        saes[layer], trainings[layer] = train_sae(of_layer, settings.training, model.device, f"layer {layer}")
        mean = saes[layer].input_mean.cpu().numpy()
        baselines[layer] = fit_baseline(of_layer, mean, settings.training.k, model.device)
        trainings[layer]["elapsed_seconds"] = time.monotonic() - started
    return saes, baselines, trainings


def _with_masks(work: Preparation) -> Sequence[Cell]:
    """The training cells, a share of whose genes shows the mask token.

    Raises:
        UserError: masks are asked for and the dictionary has no mask token.
    """
    share, mask_token = work.settings.mask_share, work.inputs.vocabulary.mask
    if not share:
        return work.split.train
    if mask_token is None:
        raise UserError(f"--mask-share {share}: the model's dictionary has no <mask>; leave the flag out.")
    rng = np.random.default_rng(work.settings.training.seed)
    masked_cells = []
    for cell in work.split.train:
        tokens = cell.tokens.copy()
        tokens[mask_positions(cell, share, rng)] = mask_token
        masked_cells.append(replace(cell, tokens=tokens))
    return masked_cells


def _count_group(
    work: Preparation, saes: Mapping[int, TopKSAE], baselines: Mapping[int, StreamBaseline]
) -> tuple[dict[int, GeneFeatureCounts], dict[int, ReconstructionError]]:
    """One pass over all cells: firings of every gene, and errors where the cell is held out."""
    cells = work.inputs.cells.cells
    tokens = gene_tokens(cells)[0]
    held_out = {cell.row for cell in work.split.held_out}
    counts = {layer: GeneFeatureCounts.empty(tokens, sae.n_features) for layer, sae in saes.items()}
    errors = {layer: ReconstructionError() for layer in saes}
    for _, cell, streams in stream(work.inputs.loaded.model, cells, list(saes), "counting firings"):
        for layer, residual in streams.items():
            counts[layer].add_latents(cell, *saes[layer].top_k(residual))
            if cell.row in held_out:
                errors[layer].add(residual, saes[layer], baselines[layer])
    return counts, errors


def _losses_of_group(work: Preparation, saes: Mapping[int, TopKSAE]) -> dict[int, dict[str, Any]]:
    """Masked-gene losses of every layer on the first held-out cells; the untouched model is run once."""
    mask_token = work.inputs.vocabulary.mask
    cells = work.split.held_out[: work.settings.n_loss_cells]
    if mask_token is None or not cells:
        reason = "the dictionary has no <mask>" if mask_token is None else "--loss-cells 0"
        log.info("Masked-gene loss is not measured: %s", reason)
        return {layer: {"loss_skipped": reason} for layer in saes}
    rng = np.random.default_rng(work.settings.training.seed)
    masks = [mask_positions(cell, MASKED_SHARE, rng) for cell in cells]
    edit_of: dict[Any, Any] = {"original": None}
    for layer, sae in saes.items():
        edit_of |= {(layer, name): (layer, edit) for name, edit in splice(sae).items()}
    losses = masked_gene_losses(work.inputs.loaded.model, (cells, masks), mask_token, edit_of)
    reports = {}
    for layer in saes:
        of_layer = {name: losses[layer, name] for name in splice(saes[layer])}
        report = loss_report({"original": losses["original"], **of_layer})
        reports[layer] = {**report, "n_loss_cells": len(cells), "n_masked": sum(len(mask) for mask in masks)}
    return reports


def complete_existing(work: Preparation, run_name: str | None) -> list[str]:
    """Make the missing catalogs and labels of SAEs that others made; what is there stays as it is.

    Args:
        work: as for `prepare`; its training settings and its split are not used.
        run_name: which SAE of a layer to take when there are several.

    Returns:
        One line of text per layer.

    Raises:
        UserError: an SAE is missing or does not fit the model, or labels lie there without their catalog.
    """
    layers = open_saes(work.data_root, work.settings.layers, run_name, work.inputs.loaded)
    missing = [layer for layer, opened in layers.items() if not opened.files.catalog.exists()]
    for layer in missing:
        if layers[layer].files.annotations.exists():
            raise UserError(f"{layers[layer].files.annotations}: are labels without their catalog; move them away.")
    tokens = gene_tokens(work.inputs.cells.cells)[0]
    largest = max((catalog_bytes(len(tokens), layers[layer].sae.n_features) for layer in missing), default=1)
    for group in layer_groups(missing, largest, int(work.settings.max_memory_gb * 2**30)) if missing else ():
        saes = {layer: layers[layer].sae for layer in group}
        counts = {layer: GeneFeatureCounts.empty(tokens, sae.n_features) for layer, sae in saes.items()}
        for _, cell, streams in stream(work.inputs.loaded.model, work.inputs.cells.cells, group, "counting firings"):
            for layer, residual in streams.items():
                counts[layer].add_latents(cell, *saes[layer].top_k(residual))
        for layer, sae in saes.items():
            write_json(layers[layer].files.catalog, _catalog(work, layer, counts[layer], sae.k))
    return [_label_existing(work, layer, opened.files) for layer, opened in layers.items()]


def _label_existing(work: Preparation, layer: int, files: SAEFiles) -> str:
    """Write the labels of a layer with a catalog where there are gene sets and no labels yet; says what is there."""
    is_labelled = files.annotations.exists()
    if work.terms is None or (is_labelled and not work.settings.relabel):
        kept = "labels were there and are kept (--relabel makes them anew)"
        return f"layer {layer}: {kept if is_labelled else f'{files.catalog}; no labels (no --gmt)'}"
    try:
        summary = _write_labels(work, read_json(files.catalog), files.annotations)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{files.catalog}: its top_genes lack what labels are made from ({error}); move the catalog away, "
            "and it is made again."
        ) from None
    rates = f"{summary['rate']:.3f} labelled, {summary['null_rate']:.3f} by chance" if summary else ""
    return f"layer {layer}: {files.annotations}; {rates}"


def _catalog(work: Preparation, layer: int, counts: GeneFeatureCounts, k: int) -> dict[str, Any]:
    catalog = build_catalog(counts, work.inputs.vocabulary, work.settings.min_firings, work.settings.n_top_genes)
    return {**catalog, "summary": {"layer": layer, "k": k, **catalog["summary"]}}


def _write_labels(work: Preparation, catalog: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    """Write the labels where there are gene sets; returns their summary."""
    if work.terms is None:
        return None
    annotations = annotate_catalog(catalog, work.terms, work.settings.annotation)
    write_json(path, annotations)
    return {key: value for key, value in annotations["summary"].items() if key != "definitions"}


def _write_layer(
    work: Preparation, layer: int, sae: TopKSAE, catalog: Mapping[str, Any], parts: Mapping[str, Any]
) -> dict[str, Any]:
    folder, record = work.folder(layer), work.layer_record(layer)
    results: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "finished": False,
        "layer": layer,
        "settings": record,
        "fingerprint": settings_fingerprint(record),
    }
    write_json(folder / RESULTS, results)  # from here on the folder is known as ours
    save_sae(sae, folder)
    write_json(folder / "feature_catalog.json", catalog)
    summary = _write_labels(work, catalog, folder / "feature_annotations.json")
    if summary:
        results["annotation"] = summary
    results |= {"finished": True, **parts, "provenance": work.inputs.provenance()}
    write_json(folder / RESULTS, results)
    return results


def table_lines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The quality of every layer as text, a line each, under a heading."""
    columns = {
        "FVU": ("quality", "fvu"), "PCA FVU": ("quality", "pca_fvu"), "ratio": ("quality", "fvu_over_pca"),
        "alive": ("quality", "alive"), "recovered": ("quality", "loss_recovered_from_mean_ablated"),
        "dims": ("quality", "participation_ratio"), "labelled": ("annotation", "rate"),
        "by chance": ("annotation", "null_rate"),
    }  # fmt: skip
    lines = ["layer  " + "".join(f"{name:>10}" for name in columns)]
    for result in results:
        values = [result.get(part, {}).get(key) for part, key in columns.values()]
        cells = [f"{value:>10.3f}" if value is not None else f"{'-':>10}" for value in values]
        lines.append(f"{result['layer']:>5}  {''.join(cells)}")
    return lines
