"""Records of controlled steering: one JSON file per feature, with every cell's values. Standard library only."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from cellcircuits.errors import UserError
from cellcircuits.jsonio import read_json, write_json
from cellcircuits.results import SCHEMA_VERSION

log = logging.getLogger(__name__)
TESTS_FILE = "steering_tests.json"
DECLARATION_FILE = "declaration.json"
NEEDED = ("feature_idx", "layer", "kind", "analytic", "steered_cells", "doses", "fingerprint")
NEEDED_PER_DOSE = {"dose", "feature", "controls"}
CELL_TYPES = {int, float, type(None)}


class Named(Protocol):
    """Whatever has the name of a feature, `F25_L0`."""

    @property
    def name(self) -> str:
        """`F25_L0`."""


def record_path(out_dir: Path, feature: Named) -> Path:
    """`controlled_F25_L0.json`."""
    return out_dir / f"controlled_{feature.name}.json"


def write_record(out_dir: Path, feature: Named, content: Mapping[str, Any], fingerprint: str) -> None:
    """Write a feature's record, whole or not at all."""
    extra = {"schema_version": SCHEMA_VERSION, "fingerprint": fingerprint}
    write_json(record_path(out_dir, feature), {**content, **extra})


def record_name(record: Mapping[str, Any]) -> str:
    """`F25_L0`."""
    return f"F{record['feature_idx']}_L{record['layer']}"


def read_records(out_dir: Path, fingerprint: str) -> list[dict[str, Any]]:
    """All whole records of the run with this fingerprint, by layer and feature; says which files are not."""
    found = [r for path in out_dir.glob("controlled_*.json") if (r := _read(path, fingerprint)) is not None]
    return sorted(found, key=lambda r: (r["layer"], r["feature_idx"]))


def _read(path: Path, fingerprint: str) -> dict[str, Any] | None:
    try:
        content = read_json(path)
    except UserError:
        content = None
    if not _is_whole(content, path.name) or content["fingerprint"] != fingerprint:
        log.warning("%s is damaged or of another run: it is not counted.", path)
        return None
    return content


def _is_whole(content: Any, name: str) -> bool:
    if not isinstance(content, dict) or any(key not in content for key in NEEDED):
        return False
    if name != f"controlled_{record_name(content)}.json" or not isinstance(content["doses"], list):
        return False
    try:
        return all(_is_whole_dose(dose, len(content["steered_cells"])) for dose in content["doses"])
    except (TypeError, AttributeError):
        return False


def _is_whole_dose(dose: Mapping[str, Any], n_cells: int) -> bool:
    """Whether the feature and every control have the same lists, with a number or None for every cell."""
    if not dose.keys() >= NEEDED_PER_DOSE:
        return False
    names = dose["feature"].keys()
    edits = [dose["feature"], *(draw for of_kind in dose["controls"].values() for draw in of_kind)]
    return all(_is_column(edit.get(name), n_cells) for edit in edits for name in names)


def _is_column(values: Any, n_cells: int) -> bool:
    return isinstance(values, list) and len(values) == n_cells and {type(value) for value in values} <= CELL_TYPES


def report_lines(tests: Mapping[str, Any]) -> list[str]:
    """The tests as text for the terminal, about ten lines."""
    primary, probe, halves = tests["primary"], tests["probe"], tests["halves"]
    lines = [
        f"{tests['n_features']} features steered in {halves['n_steered']} early cells of the second half "
        f"({halves['n_first']} cells in the first, {halves['n_second']} in the second)",
        f"  features: {halves['features']}; {tests['n_draws']} controls of each kind, of the same size",
        f"  probe: AUC {_number(probe['auc'])} ({_number(probe['auc_low'])} to {_number(probe['auc_high'])}) in "
        f"{probe['n_cells']} cells: {probe['cells']}",
        f"  primary: {primary['definition']}",
        f"    {_estimate(primary)}; {primary['n_on']} ON and {primary['n_off']} OFF features{_excess(primary)}",
    ]
    lines += [f"  {line}" for line in _contrast_lines(tests)]
    family = tests["family"]
    lines.append(f"  {family['n_tests']} secondary tests, {family['n_below']} with q < {family['level']:g}")
    analytic = [layer for layer, facts in tests["layers"].items() if facts["analytic"]]
    if analytic:
        lines.append(
            f"  layer {', '.join(analytic)}: closed form, no block lies between steering and readout; in no test over "
            "cells and not in the primary one"
        )
    return lines


def _contrast_lines(tests: Mapping[str, Any]) -> list[str]:
    """One line per readout: ON and OFF features against matched ones, where the primary test looks."""
    lines = []
    for readout in ("signature", "markers", "probe"):
        found = {
            c["contrast"]: c
            for c in tests["contrasts"]
            if c["layer"] == "all" and c["readout"] == readout and c["control"] == "frequency_matched"
            and c["dose"] == tests["primary"]["dose"]
        }  # fmt: skip
        parts = [f"{kind} {_estimate(found[kind])}" for kind in ("ON", "OFF") if kind in found]
        if parts:
            lines.append(f"{readout}, less matched features: {'; '.join(parts)}")
    return lines


def _estimate(test: Mapping[str, Any]) -> str:
    if test["estimate"] is None or test["p"] is None:
        return f"no test ({test['reason']})"
    q = f", q {test['q']:.2g}" if test.get("q") is not None else ""
    return f"{test['estimate']:+.2e} ({test['low']:+.1e} to {test['high']:+.1e}), p {test['p']:.2g}{q}"


def _excess(test: Mapping[str, Any]) -> str:
    if test["excess_low"] is None:
        return ""
    return (
        f"; beyond the direct path {test['excess_estimate']:+.2e} ({test['excess_low']:+.1e} to "
        f"{test['excess_high']:+.1e})"
    )


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"
