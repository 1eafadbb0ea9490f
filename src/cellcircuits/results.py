"""The output folder as a run sees it: locks, per-feature records, summary. Standard library only.

Whose folder it is says `manifest.py`.
"""

import fcntl
import logging
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from cellcircuits.errors import UserError, cannot_write
from cellcircuits.jsonio import read_json, write_json

log = logging.getLogger(__name__)
SCHEMA_VERSION = 1
N_TOP_EFFECTS = 50
N_HUBS = 20
DEGREE_BINS = (0, 1, 10, 50, 100, 500, 1000, 5000, 10000)
_FEATURE = r"L\d+_F\d+"
_COMBINATION = rf"{_FEATURE}(_x_{_FEATURE})+"
OUR_FILES = {
    "json": (
        "manifest", "progress", "(exhaustive_|selective_|trajectory_|layers_)?summary", "switch_features",
        "same_position_check", "calibration", "graph_statistics", "additivity", "declaration", "steering_tests",
        "cell_metadata", "chosen_features", r"feature_\d+", r"specificity(_\d+)?", rf"(pair|triplet)_{_COMBINATION}",
        r"(steering|controlled)_F\d+_L\d+", "edges_by_layer", "claims",
    ),
    "parquet": ("edges", "features", r"block_\d+"),
    "png": (
        "exhaustive_tracing", "higher_order_ablation", "trajectory_steering", "graph_statistics", "calibration",
        "specificity", "controlled_steering", r"figure\d+_\w+",
    ),
    "(pdf|csv)": (r"figure\d+_\w+",),
    "(md|tex)": ("README", "claims", "claims_table", "macros"),
    "npz": (
        r"block_\d+\.partial", r"effects_\d+", r"specificity_\d+", "state_signatures", "sae_activations", "first_half",
        "probe", "unfinished", r"rows_\d+", r"same_position_check_\w+", _COMBINATION,
    ),
}  # fmt: skip
_ANY_OF_OURS = "|".join(f"({'|'.join(names)})[.]{kind}" for kind, names in OUR_FILES.items())
HALF_WRITTEN = re.compile(rf"\.({_ANY_OF_OURS})\.\d+(\.[0-9a-f]{{8}})?\.tmp|\.clock\.\w+\.tmp")
SUBFOLDERS = ("blocks", "partial", "effects")
SAME_POSITION = "same_position"  # the `quantity` of settings and summaries; without one it is the total effect
NOT_EFFECTS = ("label", "activation_freq", "elapsed_seconds")


@contextmanager
def exclusive(out_dir: Path, flag: str = "--out-dir") -> Iterator[None]:
    """Inside the `with`, no other run works in `out_dir`; what a killed run left half-written is removed.

    Args:
        out_dir: the folder.
        flag: what names it on the command line.

    Raises:
        UserError: another run is at work there, or the folder cannot be written.
    """
    with _lock_file(out_dir, ".lock") as lock:
        _take_lock(out_dir, lock, fcntl.LOCK_EX, flag)
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
        raise cannot_write(out_dir, error) from None
    with lock:
        yield lock


def _take_lock(out_dir: Path, lock: IO[str], kind: int, flag: str = "--out-dir") -> None:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{out_dir}: another run is at work there; wait for it or choose another {flag}.") from None
    except OSError as error:  # a file system without locks
        alone = "no other run" if kind == fcntl.LOCK_EX else "no run of another experiment"
        log.warning("%s cannot be locked (%s); let %s work in it.", out_dir, error.strerror, alone)


def _remove_half_written(out_dir: Path) -> None:
    for path in (p for folder in (".", *SUBFOLDERS) for p in (out_dir / folder).glob(".*.tmp")):
        if HALF_WRITTEN.fullmatch(path.name):  # the folder may hold hidden files of others
            with suppress(OSError):  # it harms nobody where it cannot be removed
                path.unlink()


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
