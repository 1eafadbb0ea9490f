"""The output folder as a run sees it: manifest, per-feature records, summary. Standard library only.

A folder belongs to one set of numbers. `manifest.json` keeps what determines them (`settings`, compared on
every start) and where they came from (`provenance`, kept for the reader).
"""

import fcntl
import hashlib
import json
import logging
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from cellcircuits.errors import UserError
from cellcircuits.jsonio import create_json, read_json, write_json

log = logging.getLogger(__name__)
SCHEMA_VERSION = 1
N_TOP_EFFECTS = 50
N_HUBS = 20
DEGREE_BINS = (0, 1, 10, 50, 100, 500, 1000, 5000, 10000)
MANIFEST = "manifest.json"
_FEATURE = r"L\d+_F\d+"
HALF_WRITTEN = re.compile(
    r"\.((manifest|progress|(exhaustive_|selective_|trajectory_|layers_)?summary|switch_features|same_position_check|cell_metadata|chosen_features|feature_\d+"
    rf"|(pair|triplet)_{_FEATURE}(_x_{_FEATURE})+|steering_F\d+_L\d+)\.json|(edges|features)\.parquet"
    r"|(exhaustive_tracing|higher_order_ablation|trajectory_steering)\.png|block_\d+\.(parquet|partial\.npz)"
    rf"|(state_signatures|sae_activations|unfinished|{_FEATURE}(_x_{_FEATURE})+)\.npz)\.\d+(\.[0-9a-f]{{8}})?\.tmp"
    r"|\.clock\.\w+\.tmp"
)
RESULTS = (
    "feature_*.json", "pair_*.json", "triplet_*.json", "steering_*.json", "*summary.json", "cell_metadata.json",
    "switch_features.json", "same_position_check.json", "*.parquet", "blocks", "partial", "effects",
    "state_signatures.npz", "sae_activations.npz",
)  # fmt: skip
SUBFOLDERS = ("blocks", "partial", "effects")
NEEDED_SETTING = {  # one that every manifest of the experiment has
    "exhaustive_feature_tracing": ("source_layer", int),
    "higher_order_ablation": ("order", int),
    "trajectory_steering": ("alphas", list),
    "trajectory_analysis": ("layers", list),
}
SAME_POSITION = "same_position"  # the `quantity` of settings and summaries; without one it is the total effect
NOT_EFFECTS = ("label", "activation_freq", "elapsed_seconds")


def claim_folder(out_dir: Path, settings: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    """Make `out_dir` this run's folder, or check that it already is.

    Args:
        out_dir: output folder, created where missing.
        settings: everything that determines the numbers, as plain JSON values.
        provenance: where they come from (device, versions, files); each different one is kept, none compared.

    Returns:
        The fingerprint of the settings, which every result carries.

    Raises:
        UserError: the folder holds a run with other settings, or something that is no run.
    """
    path = out_dir / MANIFEST
    current = json.loads(json.dumps(settings, allow_nan=False))
    origin = json.loads(json.dumps(provenance, allow_nan=False))
    # looked for before the manifest, which a run that starts at the same time makes before its results
    found = next((found for pattern in RESULTS for found in out_dir.glob(pattern)), None)
    if found is not None and not path.exists():
        raise UserError(
            f"{out_dir}: holds results ({found.name}) without a {MANIFEST}, so nobody can say what they were made "
            "from; they are left alone, choose another --out-dir."
        )
    with one_at_a_time(out_dir):
        if create_json(path, {"schema_version": SCHEMA_VERSION, "settings": current, "provenance": [origin]}):
            return settings_fingerprint(current)
        kept = open_folder(out_dir)
        differences = list(setting_differences(kept["settings"], current))
        if differences:
            raise UserError(
                f"{out_dir}: holds a run with other settings ({'; '.join(differences)}); choose another --out-dir, or "
                "run with those settings to go on there."
            )
        origins = kept["provenance"] if isinstance(kept.get("provenance"), list) else []
        if origin not in origins:
            content = {"schema_version": SCHEMA_VERSION, "settings": current, "provenance": [*origins, origin]}
            write_json(path, content)
    return settings_fingerprint(current)


@contextmanager
def exclusive(out_dir: Path) -> Iterator[None]:
    """Inside the `with`, no other run works in `out_dir`; what a killed run left half-written is removed.

    Raises:
        UserError: another run is at work there, or the folder cannot be written.
    """
    with _lock_file(out_dir, ".lock") as lock:
        _take_lock(out_dir, lock, fcntl.LOCK_EX)
        _remove_half_written(out_dir)
        yield


@contextmanager
def shared(out_dir: Path) -> Iterator[None]:
    """Inside the `with`, other `shared` runs may work in `out_dir` too, but no `exclusive` one.

    What killed runs left half-written is removed when nobody else is at work there.

    Raises:
        UserError: an `exclusive` run is at work there, or the folder cannot be written.
    """
    # one after the other, so that no run takes another one's short LOCK_EX for an `exclusive` run
    with _lock_file(out_dir, ".lock") as lock:
        with one_at_a_time(out_dir):
            with suppress(OSError):  # others are at work, or a file system without locks: then nothing is removed
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove_half_written(out_dir)
            # LOCK_EX ends before LOCK_SH begins: an `exclusive` run that slips in between is seen here
            _take_lock(out_dir, lock, fcntl.LOCK_SH)
        yield


@contextmanager
def one_at_a_time(out_dir: Path) -> Iterator[None]:
    """Wait until no other process is inside this `with` for the folder: for what takes moments.

    Where the file system has no locks, nothing is waited for.

    Raises:
        UserError: the folder cannot be written.
    """
    with _lock_file(out_dir, ".moment.lock") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _lock_file(out_dir: Path, name: str) -> Iterator[IO[str]]:
    """The file whose flock stands for a folder; leaving the `with` gives the lock back."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = (out_dir / name).open("a+")  # NFS wants it readable for LOCK_SH and writable for LOCK_EX
    except OSError as error:
        raise UserError(f"{out_dir}: cannot be written ({error.strerror}); choose another --out-dir.") from None
    with lock:
        yield lock


def _take_lock(out_dir: Path, lock: IO[str], kind: int) -> None:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{out_dir}: another run is at work there; wait for it or choose another --out-dir.") from None
    except OSError as error:  # a file system without locks
        alone = "no other run" if kind == fcntl.LOCK_EX else "no run of another experiment"
        log.warning("%s cannot be locked (%s); let %s work in it.", out_dir, error.strerror, alone)


def _remove_half_written(out_dir: Path) -> None:
    for path in (p for folder in (".", *SUBFOLDERS) for p in (out_dir / folder).glob(".*.tmp")):
        if HALF_WRITTEN.fullmatch(path.name):  # the folder may hold hidden files of others
            path.unlink(missing_ok=True)


def settings_fingerprint(settings: Mapping[str, Any]) -> str:
    """SHA-256 over the settings, independent of the order of their keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def open_folder(out_dir: Path, wanted: str | None = None) -> dict[str, Any]:
    """The manifest of a folder that already holds a run.

    Args:
        out_dir: the folder.
        wanted: the experiment that it must hold; None takes any.

    Raises:
        UserError: there is none, it is damaged, or of another experiment.
    """
    path = out_dir / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{out_dir}: holds no run (no {MANIFEST}); run without --analysis-only first, or fix --out-dir."
        )
    manifest = read_json(path)
    settings = manifest.get("settings") if isinstance(manifest, dict) else None
    experiment = settings.get("experiment") if isinstance(settings, dict) else None
    key, kind = NEEDED_SETTING.get(str(experiment), NEEDED_SETTING["exhaustive_feature_tracing"])
    if not isinstance(settings, dict) or type(settings.get(key)) is not kind:
        raise UserError(f"{path}: is not the manifest of an experiment; fix --out-dir.")
    if wanted not in (None, experiment):
        raise UserError(f"{out_dir}: holds another experiment ({experiment}); fix --out-dir.")
    return manifest


def feature_path(out_dir: Path, feature: int) -> Path:
    """`feature_0042.json` of one source feature."""
    return out_dir / f"feature_{feature:04d}.json"


def feature_record(facts: Mapping[str, Any], edges: Mapping[int, Sequence[tuple[int, float, float]]]) -> dict[str, Any]:
    """The published JSON record of one source feature.

    Args:
        facts: source_layer, feature_idx, label, activation_freq, n_cells_active, n_cells_measured,
            elapsed_seconds and fingerprint.
        edges: {target layer: [(target, d, consistency)]}, all significant ones, by ascending target.
    """
    downstream = {
        str(layer): {
            "n_significant": len(of_layer),
            "top_effects": [
                {"target": target, "d": d, "consistency": consistency}
                for target, d, consistency in sorted(of_layer, key=lambda edge: (-abs(edge[1]), edge[0]))[
                    :N_TOP_EFFECTS
                ]
            ],
            "mean_abs_d": statistics.fmean(abs(d) for _, d, _ in of_layer),
        }
        for layer, of_layer in sorted(edges.items())
        if of_layer
    }
    return {
        "source_layer": facts["source_layer"],
        "feature_idx": facts["feature_idx"],
        "label": facts["label"],
        "activation_freq": facts["activation_freq"],
        "n_cells_active": facts["n_cells_active"],
        "n_cells_measured": facts["n_cells_measured"],
        "total_significant_edges": sum(len(of_layer) for of_layer in edges.values()),
        "downstream_edges": downstream,
        "elapsed_seconds": facts["elapsed_seconds"],
        "schema_version": SCHEMA_VERSION,
        "fingerprint": facts["fingerprint"],
    }


def repair_record(path: Path, record: Mapping[str, Any]) -> bool:
    """Write `record` unless the file already says so.

    Returns:
        Whether a file was there and was damaged or said something else about the effects.
    """
    existed = path.exists()
    kept = None
    if existed:
        try:
            kept = read_json(path)
        except UserError:
            pass
        if kept == record:
            return False
    write_json(path, record)
    only_renamed = isinstance(kept, dict) and {**kept, **{key: record[key] for key in NOT_EFFECTS}} == record
    return existed and not only_renamed


def summarise(source_layer: int, features: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The published summary of a run.

    Args:
        source_layer: the layer traced.
        features: facts of every traced feature, each with feature_idx, label, n_cells_active and n_edges.
    """
    traced = list(features)
    degrees = [feature["n_edges"] for feature in traced]
    hubs = sorted(traced, key=lambda feature: (-feature["n_edges"], feature["feature_idx"]))[:N_HUBS]
    return {
        "source_layer": source_layer,
        "n_features_traced": len(traced),
        "total_edges": sum(degrees),
        "mean_edges_per_feature": statistics.fmean(degrees) if degrees else 0.0,
        "median_edges_per_feature": float(statistics.median(degrees)) if degrees else 0.0,
        "max_edges": max(degrees, default=0),
        "n_zero_edge_features": sum(degree == 0 for degree in degrees),
        "top_20_hubs": [
            {
                "feature_idx": hub["feature_idx"],
                "label": hub["label"],
                "total_edges": hub["n_edges"],
                "n_cells_active": hub["n_cells_active"],
            }
            for hub in hubs
        ],
    }


def quantity_note(content: Mapping[str, Any]) -> str:
    """What to add to a heading, given a summary or the settings of a run: nothing where effects are total effects."""
    return " (same-position effects)" if content.get("quantity") == SAME_POSITION else ""


def report_lines(
    summary: Mapping[str, Any], features: Sequence[Mapping[str, Any]], edges_per_layer: Mapping[int, int]
) -> Iterable[str]:
    """The summary as text for the terminal, line by line."""
    layer = summary["source_layer"]
    yield (
        f"Layer {layer}: {summary['n_features_traced']} features traced, {summary['total_edges']} edges"
        f"{quantity_note(summary)}"
    )
    yield (
        f"  edges per feature: mean {summary['mean_edges_per_feature']:.2f}, "
        f"median {summary['median_edges_per_feature']:g}, max {summary['max_edges']}; "
        f"{summary['n_zero_edge_features']} features without an edge"
    )
    yield f"  features active in none of the cells: {sum(f['n_cells_active'] == 0 for f in features)}"
    for target, count in sorted(edges_per_layer.items()):
        yield f"  edges to layer {target}: {count}"
    yield "  degree histogram (edges: features)"
    for low, high in zip(DEGREE_BINS, [*DEGREE_BINS[1:], None], strict=True):
        count = sum(low <= f["n_edges"] and (high is None or f["n_edges"] < high) for f in features)
        name = "0" if low == 0 else f"{low}+" if high is None else f"{low}-{high - 1}"
        yield f"    {name:>11}: {count}"
    names = {feature["feature_idx"]: feature.get("name", feature["label"]) for feature in features}
    yield "  hubs (edges, active cells, label or top genes)"
    for hub in summary["top_20_hubs"]:
        feature = f"L{layer}/F{hub['feature_idx']}"
        name = names[hub["feature_idx"]]
        yield f"    {feature:>10} {hub['total_edges']:>7} {hub['n_cells_active']:>5}  {name}"


def require_same_origin(flag: str, folders: Iterable[Path], settings: Mapping[str, Any]) -> None:
    """Check that what earlier runs chose, they chose with the model and the SAEs of this run.

    Args:
        flag: the flag that names what they chose.
        folders: of the earlier runs; those without a manifest, which came from elsewhere, are not checked.
        settings: of this run.

    Raises:
        UserError: a feature's number there means another feature here.
    """
    for folder in (folder for folder in folders if (folder / MANIFEST).is_file()):
        kept = open_folder(folder)["settings"]
        saes = kept["saes"] if isinstance(kept.get("saes"), dict) else {}
        there = {"model": kept.get("model"), "saes": {n: sae for n, sae in saes.items() if n in settings["saes"]}}
        here = {"model": settings["model"], "saes": {layer: settings["saes"][layer] for layer in there["saes"]}}
        differences = list(setting_differences(there, here))
        if differences:
            raise UserError(
                f"{flag}: {folder} was made with another model or SAE ({'; '.join(differences)}), so its features are "
                "others; make it again with these."
            )


def setting_differences(kept: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    """Each setting that differs, in words; both are nested dicts of plain JSON values."""
    for key in dict.fromkeys([*kept, *current]):
        there, now = kept.get(key), current.get(key)
        if isinstance(there, dict) and isinstance(now, dict):
            yield from setting_differences(there, now, f"{prefix}{key}.")
        elif there != now:
            yield f"{prefix}{key} is {_short(there)} there and {_short(now)} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:14]}..."
