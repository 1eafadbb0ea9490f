"""Edges on disk: one Parquet shard per block of features, and the tables made from all shards.

A shard holds ALL significant edges of its features and, as file metadata, the facts of each feature; it
is whole or absent. Per-feature JSON, `edges.parquet` and the degrees in `features.parquet` are pure
functions of the shards.
"""

import hashlib
import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cellcircuits.catalog import UNANNOTATED, FeatureInfo, display_name
from cellcircuits.edge_fdr import MAX_Q, Family, PCounts, unpacked
from cellcircuits.errors import UserError
from cellcircuits.jsonio import write_atomically
from cellcircuits.results import feature_record

log = logging.getLogger(__name__)
BLOCK_SIZE = 16

EDGE_SCHEMA = pa.schema(
    {
        "source_layer": pa.int16(),
        "source": pa.int32(),
        "target_layer": pa.int16(),
        "target": pa.int32(),
        "mean_delta": pa.float64(),
        "cohens_d": pa.float64(),
        "consistency": pa.float64(),
        "n_cells": pa.int32(),
        "n_nonzero": pa.int32(),
        "consistency_nonzero": pa.float64(),
        "hedges_g": pa.float64(),
        "g_low": pa.float64(),
        "g_high": pa.float64(),
        "p_sign_flip": pa.float64(),
        "q_bh": pa.float64(),
        "q_by": pa.float64(),
        "is_calibrated": pa.bool_(),
    }
)
FAMILY_COLUMNS = ("q_bh", "q_by", "is_calibrated")  # known once every shard is: empty in shards
FEATURE_SCHEMA = pa.schema(
    {
        "layer": pa.int16(),
        "feature": pa.int32(),
        "label": pa.string(),
        "activation_freq": pa.float64(),
        "is_traced": pa.bool_(),
        "n_cells_active": pa.int32(),
        "n_positions": pa.float64(),
        "ablated_norm": pa.float64(),
        "n_edges": pa.int32(),
        "n_live_targets": pa.int32(),
        "null_edges": pa.float64(),
        "n_edges_bh": pa.int32(),
        "degree_calibrated": pa.int32(),
        "top_genes": pa.list_(pa.string()),
    }
)
_FACTS_KEY, _HASH_KEY = b"features", b"features_sha256"


@dataclass(frozen=True)
class Shard:
    """Features of one block: `facts` by feature index, `edges` with EDGE_SCHEMA sorted by source and target."""

    facts: Mapping[int, Mapping[str, Any]]
    edges: pa.Table

    def merged(self, other: "Shard") -> "Shard":
        """Both shards' features; they have none in common."""
        edges = pa.concat_tables([self.edges, other.edges])
        order = [(name, "ascending") for name in ("source", "target_layer", "target")]
        return Shard(dict(sorted({**self.facts, **other.facts}.items())), edges.sort_by(order))

    def only(self, features: Collection[int]) -> "Shard":
        """Some of its features."""
        facts = {feature: facts for feature, facts in self.facts.items() if feature in features}
        return Shard(facts, self.edges.filter(pc.field("source").isin(list(facts))))

    def records(self, catalog: Mapping[int, FeatureInfo]) -> Iterator[tuple[int, dict[str, Any]]]:
        """(feature index, its JSON record) of every feature; labels and frequencies are the catalog's.

        Raises:
            UserError: the catalog does not list a feature that was traced.
        """
        for feature, facts in self.facts.items():
            info = catalog.get(feature)
            if info is None:
                raise UserError(
                    f"feature {feature} was traced into this folder, but the source layer's catalog no longer lists "
                    "it; restore the catalog or choose another --out-dir."
                )
            named = {**facts, "label": info.label, "activation_freq": info.activation_freq}
            yield feature, feature_record(named, _edges_by_layer(self.edges, feature))


def block_of(feature: int) -> int:
    """First feature index of the block that `feature` belongs to; boundaries depend on nothing else."""
    return feature - feature % BLOCK_SIZE


def shard_path(out_dir: Path, block: int) -> Path:
    """Where the shard of the block that starts at feature `block` lies."""
    return out_dir / "blocks" / f"block_{block:05d}.parquet"


def write_shard(path: Path, shard: Shard) -> None:
    """Write a shard, whole or not at all."""
    facts = json.dumps(list(shard.facts.values()), allow_nan=False).encode()
    table = shard.edges.replace_schema_metadata({_FACTS_KEY: facts, _HASH_KEY: hashlib.sha256(facts).digest()})
    write_atomically(path, lambda stream: pq.write_table(table, stream, write_page_checksum=True))


def read_shard(path: Path, fingerprint: str) -> Shard | None:
    """Read a shard of this run; None where there is none, or it is damaged or of another run (said in the log)."""
    if not path.exists():
        return None
    try:
        table = pq.read_table(path, partitioning=None, page_checksum_verification=True)
        written = table.schema.metadata[_FACTS_KEY]
        if hashlib.sha256(written).digest() != table.schema.metadata[_HASH_KEY]:
            raise ValueError("changed facts")
        facts = {entry["feature_idx"]: entry for entry in json.loads(written)}
        edges = table.replace_schema_metadata(None)
        if not edges.schema.equals(EDGE_SCHEMA):
            raise ValueError("other columns")
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        log.warning(
            "%s is damaged (%s): its features do not count until they are traced again.", path, type(error).__name__
        )
        return None
    if any(entry.get("fingerprint") != fingerprint for entry in facts.values()):
        log.warning("%s belongs to a run with other settings: its features do not count.", path)
        return None
    return Shard(facts, edges)


def all_shards(out_dir: Path, fingerprint: str) -> Iterator[Shard]:
    """Every valid shard of the folder in ascending feature order, one at a time."""
    for path in sorted((out_dir / "blocks").glob("block_*.parquet")):
        shard = read_shard(path, fingerprint)
        if shard is not None:
            yield shard


def count_p(out_dir: Path, fingerprint: str) -> PCounts:
    """How often which p occurs among all live targets of all features of the folder."""
    counts = PCounts()
    for shard in all_shards(out_dir, fingerprint):
        for facts in shard.facts.values():
            numerators, denominator = unpacked(facts["calibration"]["p"])
            counts.add(denominator, numerators)
    return counts


def write_edges(
    out_dir: Path, fingerprint: str, family: Family | None = None
) -> tuple[list[dict[str, Any]], dict[int, int]]:
    """Make `edges.parquet` from the shards.

    Args:
        out_dir: the folder.
        fingerprint: of its settings.
        family: fills in q values and which edges are calibrated; None leaves them empty.

    Returns:
        The facts of every traced feature with `n_edges` added, and with a family `n_edges_bh` and `degree_calibrated`
        (None where it is active in too few cells), in ascending feature order; and the number of edges per target
        layer.
    """
    features: list[dict[str, Any]] = []
    per_layer: dict[int, int] = {}

    def write(stream: Any) -> None:
        with pq.ParquetWriter(stream, EDGE_SCHEMA) as writer:
            for shard in all_shards(out_dir, fingerprint):
                edges = _with_family(shard.edges, family) if family else shard.edges
                writer.write_table(edges)
                features.extend(_with_degrees(shard.facts, edges, family))
                for layer, count in _counts(edges["target_layer"]).items():
                    per_layer[layer] = per_layer.get(layer, 0) + count

    write_atomically(out_dir / "edges.parquet", write)
    return features, per_layer


def _with_degrees(
    of_shard: Mapping[int, Mapping[str, Any]], edges: pa.Table, family: Family | None
) -> Iterator[dict[str, Any]]:
    degrees = _counts(edges["source"])
    if family is None:
        yield from ({**facts, "n_edges": degrees.get(i, 0)} for i, facts in of_shard.items())
        return
    passed, calibrated = (
        _counts(edges.filter(condition)["source"])
        for condition in (pc.field("q_bh") < MAX_Q, pc.field("is_calibrated"))
    )
    for i, facts in of_shard.items():
        is_enough = facts["n_cells_active"] >= family.min_cells
        yield {
            **facts,
            "n_edges": degrees.get(i, 0),
            "n_edges_bh": passed.get(i, 0),
            "degree_calibrated": calibrated.get(i, 0) if is_enough else None,
        }


def _with_family(edges: pa.Table, family: Family) -> pa.Table:
    """The edges of a shard with what only the whole graph says about them."""
    names = ("p_sign_flip", "hedges_g", "consistency_nonzero", "n_cells")
    columns = family.columns(*(edges[name].to_numpy() for name in names))
    for name, values in zip(FAMILY_COLUMNS, columns, strict=True):
        field = EDGE_SCHEMA.field(name)
        edges = edges.set_column(EDGE_SCHEMA.get_field_index(name), field, pa.array(values, type=field.type))
    return edges


def write_features(out_dir: Path, catalogs: Mapping[int, Sequence[FeatureInfo]]) -> None:
    """Make `features.parquet`: one row per feature of the source and target layers, degrees still empty."""
    rows = [
        {
            "layer": layer,
            "feature": info.index,
            "label": info.label,
            "activation_freq": info.activation_freq,
            "is_traced": False,
            **_degrees({}),
            "top_genes": list(info.top_genes),
        }
        for layer, catalog in sorted(catalogs.items())
        for info in catalog
    ]
    _write_table(out_dir / "features.parquet", pa.Table.from_pylist(rows, schema=FEATURE_SCHEMA))


def fill_degrees(out_dir: Path, source_layer: int, features: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Enter active cells and out-degrees of every traced feature into `features.parquet`.

    Returns:
        The features with `label` and `name` (what to call one without a label) added.
    """
    traced = {(source_layer, facts["feature_idx"]): facts for facts in features}
    rows = read_features(out_dir).to_pylist()
    names = {}
    for row in rows:
        facts = traced.get((row["layer"], row["feature"]))
        row["is_traced"] = facts is not None
        row |= _degrees(facts or {})
        name = display_name(row["label"], row["top_genes"])
        names[row["layer"], row["feature"]] = {"label": row["label"], "name": name}
    _write_table(out_dir / "features.parquet", pa.Table.from_pylist(rows, schema=FEATURE_SCHEMA))
    unnamed = {"label": UNANNOTATED, "name": UNANNOTATED}
    return [{**facts, **names.get(key, unnamed)} for key, facts in traced.items()]


def _degrees(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What `features.parquet` says of a traced feature."""
    calibration = facts.get("calibration", {})
    return {
        **{name: facts.get(name) for name in ("n_cells_active", "n_positions", "ablated_norm")},
        **{name: facts.get(name) for name in ("n_edges", "n_edges_bh", "degree_calibrated")},
        **{name: calibration.get(name) for name in ("n_live_targets", "null_edges")},
    }


def read_edges(out_dir: Path) -> pa.Table:
    """Read `edges.parquet` of a trace.

    Raises:
        UserError: it is missing, damaged or of another form.
    """
    return _read_table(out_dir / "edges.parquet", EDGE_SCHEMA)


def read_features(out_dir: Path) -> pa.Table:
    """Read `features.parquet` of a trace.

    Raises:
        UserError: it is missing, damaged or of another form.
    """
    return _read_table(out_dir / "features.parquet", FEATURE_SCHEMA)


def _read_table(path: Path, schema: pa.Schema) -> pa.Table:
    try:
        table = pq.read_table(path, partitioning=None)
        if not table.schema.equals(schema):
            raise pa.ArrowInvalid("other columns")
        return table
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run exhaustive_feature_tracing.py into this folder first.") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: not a readable Parquet file ({type(error).__name__}); run the tracing script again, it mends it."
        ) from None


def _write_table(path: Path, table: pa.Table) -> None:
    write_atomically(path, lambda stream: pq.write_table(table, stream))


def _counts(column: pa.ChunkedArray) -> dict[int, int]:
    return {entry["values"]: entry["counts"] for entry in pc.value_counts(column).to_pylist()}


def _edges_by_layer(edges: pa.Table, feature: int) -> dict[int, list[tuple[int, float, float]]]:
    of_feature = edges.filter(pc.equal(edges["source"], feature))
    by_layer: dict[int, list[tuple[int, float, float]]] = {}
    columns = (of_feature[name].to_pylist() for name in ("target_layer", "target", "cohens_d", "consistency"))
    for layer, target, d, consistency in zip(*columns, strict=True):
        by_layer.setdefault(layer, []).append((target, d, consistency))
    return by_layer
