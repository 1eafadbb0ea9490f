"""Several source layers in one run: one folder each below a parent, one clean pass per cell for all of them."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellcircuits import manifest, results
from cellcircuits.errors import UserError
from cellcircuits.jsonio import write_json
from cellcircuits.same_position_record import keep_check
from cellcircuits.trace_folder import EXPERIMENT, TraceFolder, make_tables

if TYPE_CHECKING:
    from cellcircuits.clean_runs import CleanRuns
    from cellcircuits.effects import Bench, CleanCell

log = logging.getLogger(__name__)
SUMMARY = "layers_summary.json"
N_HUBS = 3
OF_ONE_LAYER = ("source_layer", "downstream_layers", "saes")
_LAYER_FOLDER = re.compile(r"layer_(\d{2,})")


@dataclass(frozen=True)
class LayerWork:
    """What to trace of one source layer: features, ascending, into a folder whose settings have that fingerprint."""

    folder: TraceFolder
    features: Sequence[int]
    fingerprint: str


def trace_in_order(works: Sequence[LayerWork], batch_size: int | None) -> None:
    """Trace source layers one after the other; a layer whose features are all done costs nothing.

    Args:
        works: by ascending source layer, of one model and precision; each reads those of the first one's targets that
            come after it.
        batch_size: features per batch; None lets memory decide.

    Raises:
        UserError: see `TraceFolder.trace`.
    """
    folders = [work.folder for work in works]
    for work, (bench, clean) in zip(works, in_order(folders), strict=True):
        folder = work.folder
        if len(works) > 1:
            log.info("Layer %d, to layers %s", folder.source_layer, ", ".join(map(str, folder.targets)))
        if folder.same_position:
            trace_same_position(work, bench, clean, batch_size)
        else:
            folder.trace(work.features, work.fingerprint, bench, clean, batch_size)
        if len(works) > 1:  # the tables of a finished layer do not wait for the other layers
            make_tables(folder.out_dir)


def in_order(folders: Sequence[TraceFolder]) -> Iterator[tuple["Bench", "CleanRuns"]]:
    """For each source layer its bench for total effects and the clean runs of the cells there.

    Args:
        folders: by ascending source layer, as in `trace_in_order`; each layer's runs carry on those of the one before.
    """
    # torch takes seconds to import: only where something is computed
    from cellcircuits.clean_runs import CleanRuns
    from cellcircuits.effects import Bench
    from cellcircuits.precision import FP32, MIXED
    from cellcircuits.tail import Tail

    first = folders[0]
    model, cells = first.opened.loaded.model, first.opened.cells.cells
    targets = sorted({target for folder in folders for target in folder.targets})
    tail = Tail(model, first.source_layer, targets, first.precision)
    # Source streams are float32 ones whatever the precision: a tail that rounds clean runs may not carry them on.
    carries_on = first.precision in (FP32, MIXED)
    clean = None
    for folder in folders:
        saes = {layer: x.sae for layer, x in folder.layers.items()}
        bench = Bench(model, saes, folder.source_layer, folder.targets, tail)
        clean = CleanRuns(bench, cells, before=clean if carries_on else None)
        yield bench, clean


def trace_same_position(work: LayerWork, total: "Bench", clean: "Sequence[CleanCell]", batch_size: int | None) -> None:
    """Trace one source layer by same-position effects, and compare a sample with total effects.

    Args:
        work: what to trace.
        total: the layer's bench for total effects.
        clean: clean runs of the cells, by that bench.
        batch_size: features per batch; None lets memory decide.

    Raises:
        UserError: see `TraceFolder.trace` and `same_position_record.keep_check`.
    """
    from cellcircuits.same_position import SamePositionBench
    from cellcircuits.same_position_check import Kept, run_check, sample_features

    folder = work.folder
    same = SamePositionBench(total.model, total.saes, total.source_layer, total.targets, total.tail)
    if folder.trace(work.features, work.fingerprint, same, clean, batch_size):
        _, traced, _ = make_tables(folder.out_dir)  # an interrupted check shall lose nothing else
        # of all that the folder holds: a run that asks for a few of them does not replace the sample by a poorer one
        features = sample_features([facts["feature_idx"] for facts in traced], folder.n_checked)
        kept = Kept(folder.out_dir / "partial", work.fingerprint)
        measure = partial(run_check, total, same, clean, features, folder.rule, kept)
        keep_check(folder.out_dir, work.fingerprint, features, len(clean), measure, kept.remove)


def layer_folder(out_dir: Path, layer: int) -> Path:
    """Where the trace of one of several source layers lies."""
    return out_dir / f"layer_{layer:02d}"


def layer_folders(out_dir: Path) -> dict[int, Path]:
    """The layer folders below `out_dir` that hold a run, by ascending layer."""
    found = {int(match[1]): p for p in out_dir.glob("layer_*") if (match := _LAYER_FOLDER.fullmatch(p.name))}
    return {layer: found[layer] for layer in sorted(found) if (found[layer] / manifest.MANIFEST).is_file()}


def holds_layers(out_dir: Path) -> bool:
    """Whether a folder is the parent of layer folders rather than a run itself."""
    return not (out_dir / manifest.MANIFEST).exists() and bool(layer_folders(out_dir))


def require_parent(out_dir: Path) -> None:
    """Check that layer folders may lie below `out_dir`.

    Raises:
        UserError: it holds the results of something else.
    """
    patterns = (manifest.MANIFEST, "chosen_features.json", *manifest.RESULTS)
    found = next((path for pattern in patterns for path in out_dir.glob(pattern) if path.name != SUMMARY), None)
    if found is not None:
        raise UserError(
            f"{out_dir}: holds the results of another run ({found.name}), and several source layers need a folder of "
            "their own; choose another --out-dir."
        )


def require_no_layers(out_dir: Path) -> None:
    """Check that `out_dir` may hold the results of a single source layer.

    Raises:
        UserError: it is the parent of layer folders.
    """
    there = layer_folders(out_dir)
    if there:
        raise UserError(
            f"{out_dir}: holds a folder for each of several source layers ({next(iter(there.values())).name}, ...); "
            "choose another --out-dir for a single one, or name one of those folders."
        )


def require_same_run(folders: Iterable[Path], settings: Mapping[str, Any]) -> None:
    """Check that layer folders differ in nothing but the layers.

    Args:
        folders: each holds a run.
        settings: of a folder that they are to lie beside.

    Raises:
        UserError: one was made with other settings; names them.
    """
    for folder in folders:
        kept = manifest.open_folder(folder, EXPERIMENT)["settings"]
        saes = kept["saes"] if isinstance(kept.get("saes"), dict) else {}
        saes = {layer: sae for layer, sae in saes.items() if layer in settings["saes"]}
        there = _of_all_layers(kept) | {"saes": saes}
        here = _of_all_layers(settings) | {"saes": {layer: settings["saes"][layer] for layer in saes}}
        differences = list(manifest.setting_differences(there, here))
        if differences:
            raise UserError(
                f"{folder}: was traced with other settings than the other layers ({'; '.join(differences)}); choose "
                "another --out-dir, or run with those settings."
            )


def _of_all_layers(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in OF_ONE_LAYER}


def trace_one_layer(folder: TraceFolder, features: Sequence[int], batch_size: int | None) -> None:
    """Trace a single source layer, directly into its folder.

    Args:
        folder: of the source layer.
        features: its features, ascending.
        batch_size: features per batch; None lets memory decide.

    Raises:
        UserError: the folder holds other results, or another run is at work there.
    """
    with results.shared(folder.out_dir):
        require_no_layers(folder.out_dir)
        trace_in_order([LayerWork(folder, features, folder.claim())], batch_size)


def trace_layers(
    out_dir: Path, folders: Sequence[TraceFolder], features: Mapping[int, Sequence[int]], batch_size: int | None
) -> None:
    """Trace several source layers into the layer folders of one parent.

    Args:
        out_dir: the parent.
        folders: of the source layers, ascending, each `layer_folder(out_dir, layer)`.
        features: {source layer: its features, ascending}.
        batch_size: features per batch; None lets memory decide.

    Raises:
        UserError: the parent or a layer folder holds other results, or another run is at work there.
    """
    with ExitStack() as locks:
        locks.enter_context(results.shared(out_dir))
        require_parent(out_dir)
        require_same_run(layer_folders(out_dir).values(), folders[0].settings())
        for folder in folders:
            locks.enter_context(results.shared(folder.out_dir))
        # those that hold a run first: where one refuses, no new one is begun
        order = sorted(folders, key=lambda folder: not (folder.out_dir / manifest.MANIFEST).exists())
        fingerprints = {folder.source_layer: folder.claim() for folder in order}
        trace_in_order(
            [LayerWork(x, features[x.source_layer], fingerprints[x.source_layer]) for x in folders], batch_size
        )


def summarise_layers(out_dir: Path) -> dict[str, Any]:
    """Make the tables of every layer folder, and `layers_summary.json` from them.

    Raises:
        UserError: the folders are damaged or of different runs.
    """
    with results.one_at_a_time(out_dir):
        content = _summary_of(layer_folders(out_dir))
        write_json(out_dir / SUMMARY, content)
    return content


def _summary_of(folders: Mapping[int, Path]) -> dict[str, Any]:
    settings = {layer: manifest.open_folder(path, EXPERIMENT)["settings"] for layer, path in folders.items()}
    of_first = next(iter(settings.values()))
    require_same_run(folders.values(), of_first)
    layers = []
    for layer, path in folders.items():
        summary, _, per_target = make_tables(path)
        layers.append(
            {
                "source_layer": layer,
                "n_features_traced": summary["n_features_traced"],
                "total_edges": summary["total_edges"],
                "edges_per_target_layer": {
                    str(target): per_target.get(target, 0) for target in settings[layer]["downstream_layers"]
                },
                "top_3_hubs": summary["top_20_hubs"][:N_HUBS],
            }
        )
    of_all = {key: summary[key] for key in ("quantity", "inputs") if key in summary}
    return {"schema_version": results.SCHEMA_VERSION, **of_all, "layers": layers}


def layers_report_lines(summary: Mapping[str, Any]) -> Iterable[str]:
    """The summary as text for the terminal, line by line."""
    layers = summary["layers"]
    n_features, n_edges = (sum(of_layer[key] for of_layer in layers) for key in ("n_features_traced", "total_edges"))
    yield (
        f"{len(layers)} source layers: {n_features} features traced, {n_edges} edges{results.quantity_note(summary)}"
    )
    yield f"  {'layer':>5} {'features':>8} {'edges':>9}   edges to each layer; hubs (edges)"
    for of_layer in layers:
        targets = ", ".join(f"L{layer} {count}" for layer, count in of_layer["edges_per_target_layer"].items())
        hubs = ", ".join(f"F{hub['feature_idx']} ({hub['total_edges']})" for hub in of_layer["top_3_hubs"])
        yield (
            f"  {of_layer['source_layer']:>5} {of_layer['n_features_traced']:>8} {of_layer['total_edges']:>9}   "
            f"{targets}; {hubs or 'none'}"
        )
