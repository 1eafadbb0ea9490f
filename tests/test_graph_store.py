"""Shards and the tables made from them, on a few edges written by hand."""

import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cellcircuits import graph_store
from cellcircuits.catalog import FeatureInfo
from cellcircuits.graph_store import EDGE_SCHEMA, Shard, block_of, read_shard, shard_path, write_shard

FINGERPRINT = "of this run"


def shard_of(edges: list[tuple[int, int, int]], active: dict[int, int], fingerprint: str = FINGERPRINT) -> Shard:
    """Edges as (source, target layer, target); features with their numbers of active cells."""
    rows = [
        {"source_layer": 5, "source": source, "target_layer": layer, "target": target, "mean_delta": 0.25,
         "cohens_d": -1.5, "consistency": 0.75, "n_cells": active[source]}
        for source, layer, target in edges
    ]  # fmt: skip
    facts = {
        feature: {"source_layer": 5, "feature_idx": feature, "n_cells_active": n, "n_cells_measured": 4,
                  "elapsed_seconds": 0.5, "fingerprint": fingerprint}
        for feature, n in active.items()
    }  # fmt: skip
    return Shard(facts, pa.Table.from_pylist(rows, schema=EDGE_SCHEMA))


FIRST = shard_of([(0, 6, 1), (0, 6, 3), (0, 11, 2), (9, 6, 3)], {0: 4, 9: 2, 15: 0})
SECOND = shard_of([(16, 11, 7)], {16: 3})


def test_blocks_begin_at_multiples_of_sixteen(tmp_path: Path):
    assert [block_of(feature) for feature in (0, 15, 16, 17, 31, 32, 4607)] == [0, 0, 16, 16, 16, 32, 4592]
    assert shard_path(tmp_path, 32) == tmp_path / "blocks" / "block_00032.parquet"


def test_a_shard_comes_back_as_it_was_written(tmp_path: Path):
    write_shard(tmp_path / "a.parquet", FIRST)
    back = read_shard(tmp_path / "a.parquet", FINGERPRINT)
    assert back is not None and back.facts == FIRST.facts and back.edges.equals(FIRST.edges)
    assert read_shard(tmp_path / "none.parquet", FINGERPRINT) is None


def test_merged_shards_are_sorted_by_source_layer_and_target():
    late = shard_of([(3, 11, 0), (3, 6, 5)], {3: 2})
    merged = FIRST.merged(late)
    keys = list(zip(*(merged.edges[name].to_pylist() for name in ("source", "target_layer", "target")), strict=True))
    assert keys == [(0, 6, 1), (0, 6, 3), (0, 11, 2), (3, 6, 5), (3, 11, 0), (9, 6, 3)]
    assert list(merged.facts) == [0, 3, 9, 15]


@pytest.mark.parametrize("change", ["more columns", "fewer columns", "another type", "no facts"])
def test_a_shard_of_another_form_does_not_count(tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture):
    edges = FIRST.edges
    other = {
        "more columns": edges.append_column("p_value", pa.array([0.5] * len(edges))),
        "fewer columns": edges.drop_columns(["n_cells"]),
        "another type": edges.cast(pa.schema([field.with_type(pa.float32()) if field.name == "cohens_d" else field
                                              for field in EDGE_SCHEMA])),
        "no facts": edges,
    }[change]  # fmt: skip
    path = shard_path(tmp_path, 0)
    write_shard(path, Shard(FIRST.facts, other))
    if change == "no facts":
        pq.write_table(edges, path)
    assert read_shard(path, FINGERPRINT) is None
    assert graph_store.write_edges(tmp_path, FINGERPRINT) == ([], {})
    assert path.name in caplog.text


def test_a_shard_of_another_run_does_not_count(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    foreign = shard_of([(40, 6, 1)], {40: 4}, "of another run")
    write_shard(shard_path(tmp_path, 0), FIRST)
    write_shard(shard_path(tmp_path, 32), foreign)
    write_shard(shard_path(tmp_path, 16), SECOND.merged(foreign))  # one feature of another run is enough
    assert [list(shard.facts) for shard in graph_store.all_shards(tmp_path, FINGERPRINT)] == [[0, 9, 15]]
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    graph_store.write_edges(tmp_path, FINGERPRINT)
    assert graph_store.read_edges(tmp_path).equals(FIRST.edges)


def test_tables_hold_what_the_shards_say(tmp_path: Path):
    for block, shard in ((16, SECOND), (0, FIRST)):
        write_shard(shard_path(tmp_path, block), shard)
    catalog = [FeatureInfo(i, 0.5, f"term {i}", ("TP53",)) for i in (0, 7, 9, 15, 16)]
    graph_store.write_features(tmp_path, {6: [FeatureInfo(9, None, "unannotated", ())], 5: catalog})
    before = graph_store.read_features(tmp_path).to_pylist()
    assert [(row["is_traced"], row["n_cells_active"], row["n_edges"]) for row in before] == [(False, None, None)] * 6
    traced, per_layer = graph_store.write_edges(tmp_path, FINGERPRINT)
    assert [(facts["feature_idx"], facts["n_edges"]) for facts in traced] == [(0, 3), (9, 1), (15, 0), (16, 1)]
    assert per_layer == {6: 3, 11: 2}
    assert graph_store.read_edges(tmp_path).equals(pa.concat_tables([FIRST.edges, SECOND.edges]))
    named = graph_store.fill_degrees(tmp_path, 5, traced)
    assert [facts["label"] for facts in named] == ["term 0", "term 9", "term 15", "term 16"]
    rows = graph_store.read_features(tmp_path).to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        (5, 0, "term 0", 0.5, True, 4, None, None, 3, None, None, None, None, ["TP53"]),
        (5, 7, "term 7", 0.5, False, None, None, None, None, None, None, None, None, ["TP53"]),
        (5, 9, "term 9", 0.5, True, 2, None, None, 1, None, None, None, None, ["TP53"]),
        (5, 15, "term 15", 0.5, True, 0, None, None, 0, None, None, None, None, ["TP53"]),
        (5, 16, "term 16", 0.5, True, 3, None, None, 1, None, None, None, None, ["TP53"]),
        (6, 9, "unannotated", None, False, None, None, None, None, None, None, None, None, []),
    ]
