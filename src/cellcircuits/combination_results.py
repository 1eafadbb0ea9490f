"""Records and summaries of experiment 2: pairs and triplets. Standard library only."""

import base64
import json
import logging
import statistics
import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from cellcircuits.combinations import CROSS, LETTERS, RANDOM, SAME, Combination, ComboFeature
from cellcircuits.errors import UserError
from cellcircuits.jsonio import read_json
from cellcircuits.results import SCHEMA_VERSION

log = logging.getLogger(__name__)
KINDS = {2: "pair", 3: "triplet"}
RATIO = {2: "ratio_median", 3: "threeway_ratio"}
TESTS = "additivity"  # what a record holds for additivity.json
INDEX_KEYS = (  # of every joint condition there
    *(f"{name}{end}" for name in ("redundancy_index", "projection") for end in ("", "_low", "_high")),
    "redundancy_index_plug_in",
)
MAX_TARGETS, MAX_DENOMINATOR = 1 << 24, 1 << 28


def record_path(out_dir: Path, combination: Combination) -> Path:
    """Where the record of a combination lies."""
    return out_dir / f"{KINDS[len(combination.features)]}_{combination.name}.json"


def description(combination: Combination) -> dict[str, Any]:
    """What a record says about the choice of a combination: names, labels, pathway; no numbers of its effects."""
    kind = KINDS[len(combination.features)]
    features = {f"feature_{letter}": _feature(f) for letter, f in zip(LETTERS, combination.features, strict=False)}
    return {
        f"{kind}_id": combination.name,
        **features,
        "pathway": combination.pathway,
        f"{kind}_type": combination.kind,
    }


def _feature(feature: ComboFeature) -> dict[str, Any]:
    known = {"layer": feature.layer, "idx": feature.index, "label": feature.label, "n_edges": feature.n_edges}
    if feature.best_term is not None:  # what the pathway comes from
        known |= {"best_term": feature.best_term, "best_term_significant": feature.best_term_significant}
    return known


def record(
    combination: Combination, target: int, n_cells: int, numbers: Mapping[str, Any], fingerprint: str
) -> dict[str, Any]:
    """The JSON record of one combination."""
    return {
        **description(combination),
        "target_layer": target,
        "n_cells": n_cells,
        **numbers,
        "schema_version": SCHEMA_VERSION,
        "fingerprint": fingerprint,
    }


def read_record(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """The record in `path` if it is whole and of the run with this fingerprint; says so where it is not."""
    if not path.exists():
        return None
    try:
        content = read_json(path)
        order = next(order for order, kind in KINDS.items() if path.name.startswith(f"{kind}_"))
        name = content[f"{KINDS[order]}_id"]
        is_whole = content["fingerprint"] == fingerprint and path.name == f"{KINDS[order]}_{name}.json"
        # all that the summary needs of it
        json.dumps([content, content["elapsed_seconds"] / 60], allow_nan=False)
        _row(order, content)
        _require_tests(order, content)
    except (UserError, KeyError, TypeError, ValueError, AttributeError, zlib.error):
        is_whole = False
    if not is_whole:
        log.warning("%s is damaged, of another run or under another name: it is not counted.", path)
        return None
    return content


def _require_tests(order: int, record: Mapping[str, Any]) -> None:
    """Check what `additivity_summary` needs of a record.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, zlib.error: it is damaged.
    """
    wanted = {"".join(letters) for size in range(2, order + 1) for letters in combinations(LETTERS[:order], size)}
    tested = record[TESTS]
    n_live = tested["n_live_targets"]
    if tested["conditions"].keys() != wanted or not 0 <= n_live <= MAX_TARGETS or type(tested["n_cells"]) is not int:
        raise ValueError("other conditions or numbers")
    feature_names(record)
    for name, condition in tested["conditions"].items():
        n_refined = _require_packed(condition["p"], n_live).count(0)
        _require_packed(condition["p_refined"], n_refined)
        _require_packed(condition["direction"], n_live)
        numbers = [*(condition[key] for key in INDEX_KEYS), *published_ratios(record, name)]
        if not all(number is None or isinstance(number, float) for number in numbers):
            raise ValueError("damaged numbers")
        n_changed, p = condition["n_changed"], [strong["p"] for strong in condition["strongest"]]
        if type(n_changed) is not int or not all(0 <= one <= 1 for one in p) or "reason" not in condition:
            raise ValueError("damaged tests")


def _require_packed(packed: Mapping[str, Any], n_numbers: int) -> "array[int]":
    """Check packed fractions, as `edge_fdr.packed` makes them; returns the numerators.

    Raises:
        ValueError, KeyError, TypeError, zlib.error: they are damaged, or so many they are not.
    """
    raw = zlib.decompressobj().decompress(base64.b64decode(packed["numerators"]), 4 * n_numbers + 1)
    numbers, denominator = array("i", raw), packed["denominator"]
    if type(denominator) is not int or not 0 < denominator <= MAX_DENOMINATOR or len(numbers) != n_numbers:
        raise ValueError("another denominator or number")
    if not 0 <= min(numbers, default=0) <= max(numbers, default=0) <= denominator:
        raise ValueError("no fractions")
    return numbers


def published_ratios(record: Mapping[str, Any], condition: str) -> tuple[float, float]:
    """The study's ratio of a joint condition, and what exactly additive effects give."""
    order = 3 if RATIO[3] in record else 2
    if len(condition) == order:
        return record[RATIO[order]], record[f"{RATIO[order]}_if_additive"]
    return record["pairwise_ratios"][condition], record["pairwise_ratios_if_additive"][condition]


def feature_names(record: Mapping[str, Any]) -> list[str]:
    """Names of the features of a record, A first."""
    features = (record[key] for letter in LETTERS if (key := f"feature_{letter}") in record)
    return [f"L{feature['layer']}_F{feature['idx']}" for feature in features]


def read_records(out_dir: Path, order: int, fingerprint: str, first: Sequence[str] = ()) -> list[dict[str, Any]]:
    """All records of a folder: those named in `first` in that order, then the others by name."""
    kind = KINDS[order]
    records = [read_record(path, fingerprint) for path in sorted(out_dir.glob(f"{kind}_*.json"))]
    rank = {name: i for i, name in enumerate(first)}
    found = [content for content in records if content is not None]
    return sorted(found, key=lambda content: (rank.get(content[f"{kind}_id"], len(rank)), content[f"{kind}_id"]))


def names_in_summary(out_dir: Path, order: int) -> list[str]:
    """Names of the combinations in a folder's `summary.json`, in its order; none where there is no readable one."""
    kind = KINDS[order]
    try:
        kept = read_json(out_dir / "summary.json")
        return [
            str(entry[f"{kind}_id"])
            for key in (f"per_{kind}_results", f"control_{kind}_results")
            for entry in kept.get(key, ())
        ]
    except (UserError, AttributeError, KeyError, TypeError):
        return []


def summarise(order: int, records: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> dict[str, Any]:
    """The summary of a folder of pairs or triplets.

    Random ones are listed apart, so that no choice of triplets takes their features for a pathway's.
    """
    kind = KINDS[order]
    key = RATIO[order]
    records = [{name: value for name, value in record.items() if name != TESTS} for record in records]
    name = "ratio" if order == 2 else "3way_ratio"
    groups = {group: [r for r in records if r[f"{kind}_type"] == group] for group in (SAME, CROSS, RANDOM)}
    listed = [r for r in records if r[f"{kind}_type"] != RANDOM]
    summary: dict[str, Any] = {
        f"n_{kind}s": len(listed),
        "n_same_pathway": len(groups[SAME]),
        "n_cross_pathway": len(groups[CROSS]),
    }
    for group in (SAME, CROSS, RANDOM):
        summary[f"{group}_{name}"] = _median_of(groups[group], key)
        summary[f"{group}_{name}_if_additive"] = _median_of(groups[group], f"{key}_if_additive")
        norms = [norm for r in groups[group] if (norm := norm_ratio(r, LETTERS[:order])) is not None]
        summary[f"{group}_norm_ratio"] = float(statistics.median(norms)) if norms else None
    summary["total_elapsed_min"] = sum(r["elapsed_seconds"] for r in records) / 60
    summary[f"per_{kind}_results"] = listed
    summary[f"control_{kind}_results"] = groups[RANDOM]
    return {**summary, "config": dict(config), "schema_version": SCHEMA_VERSION}


def norm_ratio(record: Mapping[str, Any], condition: str) -> float | None:
    """Size of a joint mean effect over that of the sum of the single ones; None where there is no target."""
    return record["additivity_of_means"].get(condition, {}).get("norm_ratio")


def _median_of(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    return float(statistics.median(r[key] for r in records)) if records else None


def report_lines(order: int, summary: Mapping[str, Any]) -> Iterable[str]:
    """The summary as text for the terminal, line by line."""
    kind = KINDS[order]
    records = [*summary[f"per_{kind}_results"], *summary[f"control_{kind}_results"]]
    yield f"{len(records)} {kind}s at layer {summary['config'].get('target_layer')}"
    yield "  ratio: size of the joint effect over the sum of the single ones (|Cohen's d|, median over the targets)"
    yield "  additive: the ratio that exactly additive effects of the same cells would give; compare with this, not 1"
    yield "  norm: size of the joint mean effect over that of the sum of the single ones; 1 is additive, less redundant"
    yield f"  {'ratio':>7} {'additive':>9} {'norm':>7} {'targets':>8} {'cells':>6}  {kind}"
    for r in records:
        yield _row(order, r)
    for group in (SAME, CROSS, RANDOM):
        name = "ratio" if order == 2 else "3way_ratio"
        ratio = summary.get(f"{group}_{name}")
        if ratio is not None:
            additive = summary[f"{group}_{name}_if_additive"]
            norm = summary[f"{group}_norm_ratio"]
            yield (
                f"  {group}: median ratio {ratio:.3f}, exactly additive effects would give {additive:.3f}; median norm "
                f"{'-' if norm is None else f'{norm:.3f}'}"
            )


def _row(order: int, record: Mapping[str, Any]) -> str:
    """One combination as a line of the table."""
    kind, ratio, additive = KINDS[order], record[RATIO[order]], record[f"{RATIO[order]}_if_additive"]
    n_targets, n_cells = record["n_significant"]["any"], record["n_active"][LETTERS[:order]]
    what = record[f"{kind}_id"].replace("_x_", " x ").replace("_F", "/F")
    norm = norm_ratio(record, LETTERS[:order])
    shown = "-" if norm is None else f"{norm:.3f}"
    return (
        f"  {ratio:>7.3f} {additive:>9.3f} {shown:>7} {n_targets:>8} {n_cells:>6}  {what}  "
        f"({record['pathway']}, {record[f'{kind}_type']})"
    )
