"""Records and summary of experiment 3. Standard library only."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cellcircuits.errors import UserError
from cellcircuits.jsonio import read_json
from cellcircuits.manifest import setting_differences, settings_fingerprint
from cellcircuits.panel import PanelFeature
from cellcircuits.results import SCHEMA_VERSION

log = logging.getLogger(__name__)
SUMMARY_FILE = "summary.json"
DESCRIPTION = ("feature_idx", "layer", "label", "switch_d")
NEEDED = (*DESCRIPTION, "n_early_cells", "alpha_results", "n_blocks_after", "sae", "fingerprint")
NEEDED_PER_ALPHA = ("n_cells_steered", "mean_state_shift", "std_state_shift", "frac_positive_shift", "state_shifts")


def record_path(out_dir: Path, feature: PanelFeature) -> Path:
    """`steering_F25_L0.json`."""
    return out_dir / f"steering_{feature.name}.json"


def record_fingerprint(run: str, sae: Mapping[str, str]) -> str:
    """What a record carries: the fingerprint of the run's settings and the SAE of the record's own layer.

    A panel may grow into layers that the run had no SAE for before, so SAEs are no settings of the whole run.
    """
    return settings_fingerprint({"run": run, "sae": dict(sae)})


def description(feature: PanelFeature) -> dict[str, Any]:
    """What a record says about its feature beside the numbers of its steering."""
    return dict(zip(DESCRIPTION, (feature.index, feature.layer, feature.label, feature.switch_d), strict=True))


def record(
    feature: PanelFeature, numbers: Mapping[str, Any], *, n_blocks_after: int, run: str, sae: Mapping[str, str]
) -> dict[str, Any]:
    """The JSON record of one feature.

    Args:
        feature: the feature.
        numbers: `n_early_cells`, `alpha_results` and what else was measured.
        n_blocks_after: blocks between the steered stream and the logits; 0 for the last layer.
        run: fingerprint of the run's settings.
        sae: checksums of the SAE of the feature's layer.
    """
    return {
        **description(feature),
        **numbers,
        "n_blocks_after": n_blocks_after,
        "sae": dict(sae),
        "schema_version": SCHEMA_VERSION,
        "fingerprint": record_fingerprint(run, sae),
    }


def read_record(path: Path, run: str) -> dict[str, Any] | None:
    """The record in `path` if it is whole and of the run with this fingerprint; says so where it is not."""
    if not path.exists():
        return None
    try:
        content = read_json(path)
    except UserError:
        content = None
    if not _is_whole(content, path.name) or content["fingerprint"] != record_fingerprint(run, content["sae"]):
        log.warning("%s is damaged or of another run: it is not counted.", path)
        return None
    return content


def _is_whole(content: Any, name: str) -> bool:
    if not isinstance(content, dict) or any(key not in content for key in NEEDED):
        return False
    if not isinstance(content["sae"], dict) or not isinstance(content["alpha_results"], dict):
        return False
    if name != f"steering_{name_of(content)}.json":
        return False
    per_alpha = content["alpha_results"].values()
    return all(isinstance(result, dict) and all(key in result for key in NEEDED_PER_ALPHA) for result in per_alpha)


def read_records(out_dir: Path, run: str, first: Sequence[str] = ()) -> list[dict[str, Any]]:
    """All records of a folder: features (`F25_L0`) named in `first` in that order, then the others by layer."""
    rank = {name: i for i, name in enumerate(first)}
    found = [r for path in out_dir.glob("steering_*.json") if (r := read_record(path, run)) is not None]
    return sorted(found, key=lambda r: (rank.get(name_of(r), len(rank)), r["layer"], r["feature_idx"]))


def name_of(described: Mapping[str, Any]) -> str:
    """`F25_L0`, from a record or an entry of the summary."""
    return f"F{described['feature_idx']}_L{described['layer']}"


def names_in_summary(out_dir: Path) -> list[str]:
    """Features in the order of the folder's summary; none where it is missing or damaged."""
    try:
        return [name_of(feature) for feature in read_json(out_dir / SUMMARY_FILE)["features"]]
    except (UserError, KeyError, TypeError):
        return []


def require_same_saes(
    records: Iterable[Mapping[str, Any]], saes: Mapping[int, Mapping[str, str]], out_dir: Path
) -> None:
    """Check that what a folder holds was steered with the SAEs at hand.

    Args:
        records: the folder's records.
        saes: {layer: checksums of its SAE}.
        out_dir: the folder.

    Raises:
        UserError: another SAE of a layer was used there; names the layer and the file.
    """
    for kept in records:
        layer = kept["layer"]
        differences = list(setting_differences(kept["sae"], saes[layer], f"saes.{layer}.")) if layer in saes else []
        if differences:
            raise UserError(
                f"{out_dir}: {name_of(kept)} was steered with another SAE ({'; '.join(differences)}); "
                "choose another --out-dir, or run with that SAE to go on there."
            )


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The published summary of a folder; the shifts of single cells stay in the records."""
    features = [
        {
            **{key: r[key] for key in DESCRIPTION},
            "alpha_results": {
                alpha: {key: value for key, value in result.items() if key != "state_shifts"}
                for alpha, result in r["alpha_results"].items()
            },
            "n_blocks_after": r["n_blocks_after"],
        }
        for r in records
    ]
    return {"n_features": len(features), "features": features, "schema_version": SCHEMA_VERSION}


def report_lines(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterable[str]:
    """The summary as text for the terminal, line by line."""
    features = summary["features"]
    yield (
        f"{len(features)} features steered in the {settings['n_early_cells']} early of {settings['n_cells']} cells "
        f"({settings['n_late_cells']} late)"
    )
    yield "  shift: cosine to the late minus cosine to the early state, steered - clean; > 0 is towards late"
    yield f"  {'feature':>10} {'alpha':>6} {'mean shift':>11} {'SD':>9} {'positive':>8} {'cells':>5}  label"
    for f in features:
        name = f"L{f['layer']}/F{f['feature_idx']}"
        for alpha, r in f["alpha_results"].items():
            if r["n_cells_steered"]:
                shift, sd = f"{r['mean_state_shift']:>+11.2e}", f"{r['std_state_shift']:>9.1e}"
                positive = f"{r['frac_positive_shift']:>8.0%}"
            else:
                shift, sd, positive = f"{'-':>11}", f"{'-':>9}", f"{'-':>8}"
            yield f"  {name:>10} {alpha:>6} {shift} {sd} {positive} {r['n_cells_steered']:>5}  {f['label']}"
    yield from _notes(features)


def _notes(features: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    def names(of: Iterable[Mapping[str, Any]]) -> str:
        return ", ".join(f"L{f['layer']}/F{f['feature_idx']}" for f in of)

    at_the_end = [f for f in features if f["n_blocks_after"] == 0]
    if at_the_end:
        yield (
            f"  note: {names(at_the_end)}: of the last layer; closed form, no block lies between steering and readout"
        )
    silent = [f for f in features if not any(r["n_cells_steered"] for r in f["alpha_results"].values())]
    if silent:
        yield f"  note: {names(silent)}: active in none of the early cells, so nothing was steered"
