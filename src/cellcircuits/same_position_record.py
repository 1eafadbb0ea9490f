"""`same_position_check.json` of a trace folder: made once, read for the summary. Standard library only."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cellcircuits import manifest, results
from cellcircuits.claims import claimed
from cellcircuits.errors import UserError
from cellcircuits.jsonio import read_json, write_json

log = logging.getLogger(__name__)
NAME = "same_position_check.json"
FIGURES = ("spearman_mean", "spearman_d", "edge_jaccard", "n_edges_total_effect", "n_edges_same_position")


def keep_check(
    out_dir: Path,
    fingerprint: str,
    features: Sequence[int],
    n_cells: int,
    measure: Callable[[], Mapping[str, Any]],
    tidy: Callable[[], None] = lambda: None,
) -> None:
    """Compare same-position with total effects, unless the folder holds that or another process is at it.

    Args:
        out_dir: the trace folder.
        fingerprint: of its settings.
        features: the sample to measure both ways; where it is empty there is nothing to do.
        n_cells: cells of the run.
        measure: makes the record, which costs a tail run for every cell in which a feature is active.
        tidy: called once the record is there: nothing that was kept for it is needed any more.

    Raises:
        UserError: see `same_position_check.run_check`.
    """
    if not features:
        return
    with claimed(out_dir / NAME) as claim:
        if claim is None:
            log.info("Another process is at work on %s; if it is lost, this command makes it.", out_dir / NAME)
            return
        kept = read_check(out_dir, fingerprint)
        if kept and kept["features"] == list(features):
            tidy()
            return
        log.info(
            "Measuring the total effects of %d of the features too, to say how well same-position effects stand for "
            "them: up to %d x %d = %d ablated runs. --same-position-check sets how many features.",
            *(len(features), len(features), n_cells, len(features) * n_cells),
        )
        record = {"schema_version": results.SCHEMA_VERSION, **measure(), "fingerprint": fingerprint}
        write_json(out_dir / NAME, record)
        tidy()


def read_check(out_dir: Path, fingerprint: str) -> dict[str, Any] | None:
    """The record of the folder; None where there is none, or it is damaged or of another run (said in the log)."""
    path = out_dir / NAME
    if not path.exists():
        return None
    try:
        record = read_json(path)
        if record["fingerprint"] == fingerprint and isinstance(record["features"], list):
            if all(isinstance(record["overall"][name], int | float | None) for name in FIGURES):
                return record
    except (UserError, KeyError, TypeError):
        pass
    log.warning("%s is damaged or of another run: it does not count.", path)
    return None


def check_line(out_dir: Path) -> str | None:
    """What the check found in a trace folder, as a line for the terminal; None where it holds total effects.

    Raises:
        UserError: the folder holds no run.
    """
    settings = manifest.open_folder(out_dir)["settings"]
    if settings.get("quantity") != results.SAME_POSITION:
        return None
    record = read_check(out_dir, manifest.settings_fingerprint(settings))
    if record is None:
        return "same-position effects were not compared with total effects (--same-position-check)"
    found = record["overall"]
    mean, d, jaccard = (
        "undefined" if found[name] is None else f"{found[name]:.2f}"
        for name in ("spearman_mean", "spearman_d", "edge_jaccard")
    )
    return (
        f"against total effects, {len(record['features'])} features: rank correlation of mean effects {mean}, of d "
        f"{d}; {found['n_edges_same_position']} edges, {found['n_edges_total_effect']} by total effects, overlap "
        f"{jaccard}"
    )
