"""From a model and cells to SAEs, catalogs and labels: what `prepare_inputs.py` does layer by layer.

Layers are worked on in groups that fit in memory, each group with two passes over the cells: one samples the
training rows, one counts the catalog and judges the SAEs on held-out cells. `results.json` is written last
and marks a layer as finished; what is done of the others is kept in `sae_models/unfinished/` meanwhile.
"""

import json
import logging
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cellcircuits.activations import FLOAT32_BYTES, layer_groups
from cellcircuits.annotation import annotate_catalog
from cellcircuits.clock import recorded_seconds
from cellcircuits.errors import UserError
from cellcircuits.feature_stats import GeneFeatureCounts, build_catalog, catalog_bytes, gene_tokens
from cellcircuits.input_counts import inputs_entry, left_out_lines
from cellcircuits.inputs import LayerSAE, open_saes
from cellcircuits.jsonio import read_json, write_json
from cellcircuits.manifest import origin_differences, setting_differences, settings_fingerprint
from cellcircuits.preparation_passes import TrainedSAE, count_group, losses_of_group, train_group
from cellcircuits.preparation_settings import Preparation
from cellcircuits.preparation_state import Unfinished, clear_unfinished, remove_half_written, unfinished_folder
from cellcircuits.results import exclusive
from cellcircuits.sae_store import SAEFiles, save_sae

log = logging.getLogger(__name__)
SCHEMA_VERSION = 2
RESULTS = "results.json"
LAYER_FILES = ("sae_final.pt", "activation_mean.npy", "feature_catalog.json", "feature_annotations.json")
ROOT_FLAG = "--data-root"

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


def prepare(work: Preparation) -> list[dict[str, Any]]:
    """Make every layer that is not finished yet.

    Returns:
        The content of `results.json` of every asked layer, in order.

    Raises:
        UserError: a folder holds something made with other settings, or by someone else, or another run works there.
    """
    layers = work.settings.layers
    with exclusive(work.data_root, ROOT_FLAG):
        finished = {layer: kept for layer in layers if (kept := finished_before(work, layer)) is not None}
        states = {
            layer: work.unfinished(work.folder(layer).name, work.layer_record(layer))
            for layer in layers
            if layer not in finished
        }
        for layer, kept in finished.items():
            _say_kept(work, layer, kept)
            clear_unfinished(unfinished_folder(work.data_root, work.folder(layer).name))
        for group in _groups(work, states) if states else ():
            finished |= _prepare_group(work, {layer: states[layer] for layer in group})
    return [finished[layer] for layer in layers]


def _say_kept(work: Preparation, layer: int, kept: Mapping[str, Any]) -> None:
    origins = kept.get("provenance")
    last = origins[-1] if isinstance(origins, list) and origins else origins
    others = origin_differences(last if isinstance(last, dict) else {}, work.inputs.provenance())
    by = f" (other software made it: {'; '.join(others)})" if others else ""
    log.info("Layer %d: finished before with these settings, kept%s", layer, by)


def finished_before(work: Preparation, layer: int) -> dict[str, Any] | None:
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
    if not isinstance(kept, dict) or not isinstance(kept.get("settings"), dict) or not _can_be_shown(kept):
        raise UserError(f"{path}: was not written by this script; choose another --data-root.")
    differences = list(setting_differences(kept["settings"], json.loads(json.dumps(work.layer_record(layer)))))
    if differences:
        raise UserError(
            f"{folder}: was made with other settings ({'; '.join(differences)}); choose another --data-root, "
            "or repeat those settings to keep it."
        )
    if not kept.get("finished"):
        return None
    wanted = LAYER_FILES if work.terms is not None else LAYER_FILES[:-1]
    gone = [name for name in wanted if not (folder / name).is_file()]
    if gone:
        log.warning("%s: %s is gone; the layer is made again.", folder, gone[0])
        return None
    return kept


def _can_be_shown(results: Mapping[str, Any]) -> bool:
    try:
        table_lines([results])
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
        return False
    return True


def rows_of(work: Preparation) -> tuple[int, int]:
    """Gene positions of the training cells, and how many of them are training rows."""
    n_available = sum(len(cell.gene_positions) for cell in work.split.train)
    return n_available, min(work.settings.train_rows, n_available)


def bytes_per_layer(work: Preparation) -> int:
    """Memory that the work on one layer takes: its rows first, its counts later."""
    d_model = work.inputs.loaded.model.config.hidden_size
    n_genes = len(gene_tokens(work.inputs.cells.cells)[0])
    counts = catalog_bytes(n_genes, work.settings.training.expansion * d_model)
    return max(rows_of(work)[1] * d_model * FLOAT32_BYTES, counts)


def _groups(work: Preparation, states: Mapping[int, Unfinished]) -> list[tuple[int, ...]]:
    needed = bytes_per_layer(work)
    groups = layer_groups(list(states), needed, int(work.settings.max_memory_gb * 2**30))
    n_available, n_rows = rows_of(work)
    log.info(
        "Training rows: %d of %d gene positions in %d cells; %d held-out cells; %d layers in %d group(s)",
        n_rows, n_available, len(work.split.train), len(work.split.held_out), len(states), len(groups),
    )  # fmt: skip
    largest = max(map(len, groups))
    _require_disk(work.data_root, (largest + 1) * needed, states.values())
    return groups


def _require_disk(data_root: Path, n_bytes: int, states: Iterable[Unfinished]) -> None:
    """Check that unfinished work has room; one part more, for the file that is being replaced, is in `n_bytes`."""
    free = shutil.disk_usage(data_root).free + sum(state.n_bytes() for state in states)
    log.info("Unfinished work takes up to %.2g GiB in %s", n_bytes / 2**30, unfinished_folder(data_root, ""))
    if free < n_bytes:
        raise UserError(
            f"{data_root}: unfinished work may take {n_bytes / 2**30:.1f} GiB there, and {free / 2**30:.1f} GiB are "
            "free; free some, lower --max-memory-gb or choose another --data-root."
        )


def _prepare_group(work: Preparation, states: Mapping[int, Unfinished]) -> dict[int, dict[str, Any]]:
    """Train, count, judge and write one group of layers."""
    started = time.monotonic()
    model, cells = work.inputs.loaded.model, work.inputs.cells.cells
    for layer in states:
        remove_half_written(work.folder(layer), (*LAYER_FILES, RESULTS))
    trained = train_group(work, states)
    saes = {layer: of_layer.sae for layer, of_layer in trained.items()}
    baselines = {layer: of_layer.baseline for layer, of_layer in trained.items()}
    held_out = frozenset(cell.row for cell in work.split.held_out)
    tallies = count_group(model, cells, saes, states, baselines, held_out)
    losses = losses_of_group(work, saes, states)
    results = {}
    for layer, state in states.items():
        catalog = _catalog(work, layer, tallies[layer].counts, saes[layer].k)
        quality = {
            **tallies[layer].errors.report(),
            "alive": catalog["summary"]["n_alive"] / catalog["summary"]["n_features"],
            "traceable": catalog["summary"]["n_traceable"] / catalog["summary"]["n_features"],
            "participation_ratio": baselines[layer].participation_ratio,
            **losses[layer],
            "definitions": QUALITY_DEFINITIONS,
        }
        results[layer] = _write_layer(work, state, trained[layer], catalog, quality)
        state.clear()
    log.info("Layers %s: %.0f s", ", ".join(map(str, states)), time.monotonic() - started)
    return results


def complete_existing(work: Preparation, run_name: str | None) -> list[str]:
    """Make the missing catalogs and labels of SAEs that others made; what is there stays as it is.

    Args:
        work: as for `prepare`; its training settings and its split are not used.
        run_name: which SAE of a layer to take when there are several.

    Returns:
        One line of text per layer.

    Raises:
        UserError: an SAE is missing or does not fit the model, labels lie there without their catalog, or another
            run works there.
    """
    with exclusive(work.data_root, ROOT_FLAG):
        layers = open_saes(work.data_root, work.settings.layers, run_name, work.inputs.loaded)
        for opened in layers.values():
            for path in (opened.files.catalog, opened.files.annotations):
                remove_half_written(path.parent, [path.name])
        missing = {layer: opened for layer, opened in layers.items() if not opened.files.catalog.exists()}
        _make_catalogs(work, missing)
        return [_label_existing(work, layer, opened.files) for layer, opened in layers.items()]


def _make_catalogs(work: Preparation, missing: Mapping[int, LayerSAE]) -> None:
    for opened in missing.values():
        if opened.files.annotations.exists():
            raise UserError(f"{opened.files.annotations}: are labels without their catalog; move them away.")
    if not missing:
        return
    model, cells = work.inputs.loaded.model, work.inputs.cells.cells
    n_genes = len(gene_tokens(cells)[0])
    needed = max(catalog_bytes(n_genes, opened.sae.n_features) for opened in missing.values())
    states = {layer: _unfinished_catalog(work, opened) for layer, opened in missing.items()}
    groups = layer_groups(list(missing), needed, int(work.settings.max_memory_gb * 2**30))
    _require_disk(work.data_root, (max(map(len, groups)) + 1) * needed, states.values())
    for group in groups:
        saes = {layer: missing[layer].sae for layer in group}
        tallies = count_group(model, cells, saes, {layer: states[layer] for layer in group}, {}, frozenset())
        for layer, tally in tallies.items():
            write_json(missing[layer].files.catalog, _catalog(work, layer, tally.counts, saes[layer].k))
            states[layer].clear()


def _unfinished_catalog(work: Preparation, opened: LayerSAE) -> Unfinished:
    """What is counted so far for the catalog of an SAE, in a folder named after it."""
    checkpoint = opened.files.checkpoint
    name = checkpoint.parent.name if checkpoint.name == LAYER_FILES[0] else checkpoint.stem
    of_run = {key: work.record[key] for key in ("model", "dictionaries", "cells")}
    return work.unfinished(name, {"catalog_of": opened.fingerprint, **of_run})


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
    work: Preparation, state: Unfinished, trained: TrainedSAE, catalog: Mapping[str, Any], quality: Mapping[str, Any]
) -> dict[str, Any]:
    layer = catalog["summary"]["layer"]
    folder, record = work.folder(layer), work.layer_record(layer)
    results: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "finished": False,
        "layer": layer,
        "settings": record,
        "fingerprint": settings_fingerprint(record),
    }
    write_json(folder / RESULTS, results)  # from here on the folder is known as ours
    save_sae(trained.sae, folder)
    write_json(folder / "feature_catalog.json", catalog)
    summary = _write_labels(work, catalog, folder / "feature_annotations.json")
    if summary:
        results["annotation"] = summary
    provenance = state.record["provenance"]
    training = {**trained.record, "elapsed_seconds": recorded_seconds(trained.record["elapsed_seconds"])}
    results |= {"finished": True, "quality": quality, "training": training, "provenance": provenance}
    results |= inputs_entry(provenance, {"sae": work.settings.training.seed})
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
    return [*lines, *(line for result in results[-1:] for line in left_out_lines(result))]
