"""What a run took of its file of cells and what it left out, counted with the reasons, for summaries and reports.

It comes from the record that the run's manifest keeps, so that a summary made later says the same. Standard library
only.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

NO_PSEUDOTIME = "no pseudotime"
NO_TOKEN = "no token in the model's dictionary"
NO_RANK = "rank value 0 or not finite"


def inputs_entry(origins: Any, seeds: Mapping[str, int] | None = None) -> dict[str, Any]:
    """The entry `inputs` of a summary, to be merged into it; nothing where the record is damaged or older than that.

    Args:
        origins: the `provenance` of a manifest, of which the last one counts.
        seeds: what it does not name.
    """
    try:
        origin = origins[-1]
        counts = _counts(origin["cells"], origin.get("pseudotime"))
        entry = {"inputs": {**counts, "seeds": {**origin["seeds"], **(seeds or {})}}}
        json.dumps(entry, allow_nan=False)
        return entry
    except (KeyError, TypeError, IndexError, AttributeError, ValueError):
        return {}


def _counts(report: Mapping[str, Any], pseudotime: Mapping[str, Any] | None) -> dict[str, Any]:
    dropped = dict(report["n_dropped_cells"])
    n_without = pseudotime["n_cells_without"] if pseudotime else 0
    if n_without:
        dropped[NO_PSEUDOTIME] = n_without
    n_columns, n_mapped = report["n_genes_in_file"], report["n_genes_mapped"]
    return {
        "n_rows_in_file": report["n_rows_in_file"],
        "n_rows_matched": report["n_rows_matched"],
        "n_rows_selected": report["n_rows_selected"],
        "n_cells_used": report["n_cells"] - n_without,
        "dropped_cells": dropped,
        "n_cells_truncated": report["n_cells_truncated"],
        "n_gene_tokens_truncated": report["n_gene_tokens_truncated"],
        "max_gene_tokens": report["max_gene_tokens"],
        "n_gene_columns": n_columns,
        "dropped_genes": {NO_TOKEN: n_columns - n_mapped} if n_mapped < n_columns else {},
        "share_of_counts_dropped": 1 - report["share_of_counts_mapped"],
        "n_columns_summed_into_another": report["n_columns_summed_into_another"],
        "dropped_genes_of_cells": {NO_RANK: report["n_without_rank"]} if report["n_without_rank"] else {},
    }


def left_out_lines(summary: Mapping[str, Any]) -> Iterable[str]:
    """One line for the terminal where a summary's `inputs` left anything out, else none."""
    counts = summary.get("inputs")
    if not counts:
        return
    parts = []
    if counts["dropped_cells"]:
        reasons = ", ".join(f"{n} {reason}" for reason, n in counts["dropped_cells"].items())
        parts.append(f"{counts['n_cells_used']} of {counts['n_rows_selected']} cells used ({reasons})")
    if counts["n_cells_truncated"]:
        parts.append(
            f"{counts['n_cells_truncated']} cells cut to {counts['max_gene_tokens']} genes "
            f"({counts['n_gene_tokens_truncated']} gene tokens)"
        )
    for reason, n in counts["dropped_genes"].items():
        share = f"{counts['share_of_counts_dropped']:.2g} of the counts"
        parts.append(f"{n} of {counts['n_gene_columns']} gene columns ({share}): {reason}")
    if counts["n_columns_summed_into_another"]:
        parts.append(f"{counts['n_columns_summed_into_another']} gene columns summed into another of the same gene")
    parts += [f"{n} genes of cells: {reason}" for reason, n in counts["dropped_genes_of_cells"].items()]
    if parts:
        yield f"  left out: {'; '.join(parts)}"
