"""The table of features in `results/`, as figures and claims read it."""

from dataclasses import dataclass

import pyarrow.compute as pc
import pyarrow.parquet as pq

from cellcircuits.catalog import UNANNOTATED, display_name
from cellcircuits.collected import TRACE
from cellcircuits.errors import UserError
from cellcircuits.kept_results import MEND, Results

COLUMNS = ["layer", "feature", "label", "activation_freq", "is_traced", "n_edges", "top_genes"]


@dataclass(frozen=True)
class TracedFeature:
    """A traced source feature: its name for people, whether it has a label, how often it fires, its edges."""

    index: int
    name: str
    is_annotated: bool
    frequency: float | None
    degree: int


def traced_features(results: Results) -> list[TracedFeature]:
    """The traced features, most edges first.

    Raises:
        UserError: the table is missing or damaged.
    """
    path = results.folder / TRACE / "features.parquet"
    try:
        rows = pq.read_table(path, columns=COLUMNS, partitioning=None).filter(pc.field("is_traced")).to_pylist()
    except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are among these
        raise UserError(f"{path}: cannot be read as a table of features ({type(error).__name__}); {MEND}.") from None
    found = [
        TracedFeature(
            row["feature"],
            display_name(row["label"], row["top_genes"] or ()),
            row["label"] != UNANNOTATED,
            row["activation_freq"] or None,
            row["n_edges"],
        )
        for row in rows
    ]
    return sorted(found, key=lambda feature: (-feature.degree, feature.index))
