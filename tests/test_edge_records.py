"""From a shard's edges to the JSON records of its features, and tables that cannot be used."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cellcircuits import graph_store
from cellcircuits.catalog import UNANNOTATED, FeatureInfo
from cellcircuits.errors import UserError
from cellcircuits.graph_store import EDGE_SCHEMA, FEATURE_SCHEMA, Shard, read_shard, shard_path, write_shard
from test_graph_store import FINGERPRINT, FIRST, shard_of


def edges_of(rows: list[tuple[int, int, int, float, float]]) -> pa.Table:
    """Edges as (source, target layer, target, d, consistency)."""
    names = ("source", "target_layer", "target", "cohens_d", "consistency")
    common = {"source_layer": 5, "mean_delta": 0.25, "n_cells": 4}
    return pa.Table.from_pylist([common | dict(zip(names, row, strict=True)) for row in rows], schema=EDGE_SCHEMA)


SHARD = Shard(
    FIRST.facts, edges_of([(0, 6, 1, -1.5, 0.75), (0, 6, 3, 2.0, 1.0), (0, 11, 2, 0.75, 0.8), (9, 6, 3, 1.0, 1.0)])
)
CATALOG = {i: FeatureInfo(i, i / 100, f"term {i}", ()) for i in (0, 9, 15, 16)}


class TestRecords:
    def test_each_feature_has_its_own_edges_and_its_name_from_the_catalog(self):
        records = dict(SHARD.records(CATALOG))
        assert list(records) == [0, 9, 15]
        first, second, third = records.values()
        assert first["downstream_edges"] == {
            "6": {
                "n_significant": 2,
                "top_effects": [
                    {"target": 3, "d": 2.0, "consistency": 1.0},
                    {"target": 1, "d": -1.5, "consistency": 0.75},
                ],
                "mean_abs_d": 1.75,
            },
            "11": {
                "n_significant": 1,
                "top_effects": [{"target": 2, "d": 0.75, "consistency": 0.8}],
                "mean_abs_d": 0.75,
            },
        }
        assert [second["total_significant_edges"], third["total_significant_edges"]] == [1, 0]
        assert second["downstream_edges"]["6"]["top_effects"] == [{"target": 3, "d": 1.0, "consistency": 1.0}]
        assert third["downstream_edges"] == {}
        assert [(r["feature_idx"], r["label"], r["activation_freq"]) for r in records.values()] == [
            (0, "term 0", 0.0), (9, "term 9", 0.09), (15, "term 15", 0.15),
        ]  # fmt: skip

    def test_a_feature_that_the_catalog_no_longer_lists_is_named(self):
        records = SHARD.records({0: CATALOG[0]})
        assert next(records)[0] == 0
        with pytest.raises(UserError) as refused:
            next(records)
        assert str(refused.value) == (
            "feature 9 was traced into this folder, but the source layer's catalog no longer lists it; "
            "restore the catalog or choose another --out-dir."
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_facts_that_are_not_finite_are_not_written(tmp_path: Path, value: float):
    broken = {0: {**FIRST.facts[0], "elapsed_seconds": value}}
    with pytest.raises(ValueError):
        write_shard(tmp_path / "a.parquet", replace(FIRST, facts=broken))
    assert list(tmp_path.iterdir()) == []


def test_the_sentence_about_a_damaged_shard_says_what_becomes_of_it(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = shard_path(tmp_path, 0)
    path.parent.mkdir()
    path.write_bytes(b"PAR1")
    assert list(graph_store.all_shards(tmp_path, FINGERPRINT)) == []
    assert caplog.messages == [
        f"{path} is damaged (ArrowInvalid): its features do not count until they are traced again."
    ]
    caplog.clear()
    write_shard(path, shard_of([], {0: 1}, "of another run"))
    assert list(graph_store.all_shards(tmp_path, FINGERPRINT)) == []
    assert caplog.messages == [f"{path} belongs to a run with other settings: its features do not count."]


def test_facts_that_someone_changed_do_not_count(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """One cell more, and everything else as it was written."""
    path = shard_path(tmp_path, 0)
    write_shard(path, FIRST)
    table = pq.read_table(path)
    facts = json.loads(table.schema.metadata[b"features"])
    facts[0]["n_cells_active"] += 1
    changed = table.schema.metadata | {b"features": json.dumps(facts).encode()}
    pq.write_table(table.replace_schema_metadata(changed), path)
    assert read_shard(path, FINGERPRINT) is None
    assert "is damaged" in caplog.text


def test_no_flipped_bit_of_a_shard_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Numbers that a disk has changed would be numbers like any other, were it not for the checksums."""
    path = shard_path(tmp_path, 0)
    rng = np.random.default_rng(0)
    write_shard(path, Shard(FIRST.facts, edges_of([(0, 6, i, rng.normal(), rng.random()) for i in range(300)])))
    whole = path.read_bytes()
    expected = read_shard(path, FINGERPRINT)
    n_refused = 0
    for place in range(0, len(whole), 101):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        found = read_shard(path, FINGERPRINT)
        n_refused += found is None
        assert found is None or (found.edges.equals(expected.edges) and found.facts == expected.facts)
    assert n_refused > 50 and "is damaged" in caplog.text


def test_a_folder_s_name_is_never_taken_for_a_column(tmp_path: Path):
    out_dir = tmp_path / "seed=1"
    write_shard(shard_path(out_dir, 0), FIRST)
    assert read_shard(shard_path(out_dir, 0), FINGERPRINT).edges.equals(FIRST.edges)
    graph_store.write_edges(out_dir, FINGERPRINT)
    assert graph_store.read_edges(out_dir).equals(FIRST.edges)


class TestDegrees:
    def test_a_feature_without_a_label_is_called_by_its_genes(self, tmp_path: Path):
        catalog = [FeatureInfo(0, 0.5, UNANNOTATED, ("TP53", "MYC")), FeatureInfo(1, 0.5, "term 1", ("TP53",))]
        graph_store.write_features(tmp_path, {5: catalog})
        traced = [{"feature_idx": i, "n_cells_active": 1, "n_edges": 0} for i in (0, 1, 7)]
        named = graph_store.fill_degrees(tmp_path, 5, traced)
        assert [(facts["label"], facts["name"]) for facts in named] == [
            (UNANNOTATED, "(TP53, MYC)"), ("term 1", "term 1"), (UNANNOTATED, UNANNOTATED),
        ]  # fmt: skip
        assert [facts["feature_idx"] for facts in named] == [0, 1, 7]

    def test_features_of_other_layers_are_not_traced(self, tmp_path: Path):
        graph_store.write_features(tmp_path, {layer: [FeatureInfo(0, 0.5, "term", ())] for layer in (6, 5)})
        graph_store.fill_degrees(tmp_path, 5, [{"feature_idx": 0, "n_cells_active": 3, "n_edges": 2}])
        rows = graph_store.read_features(tmp_path).to_pylist()
        assert [(row["layer"], row["is_traced"], row["n_edges"]) for row in rows] == [(5, True, 2), (6, False, None)]


@pytest.mark.parametrize(
    "read, name, schema",
    [
        (graph_store.read_edges, "edges.parquet", EDGE_SCHEMA),
        (graph_store.read_features, "features.parquet", FEATURE_SCHEMA),
    ],
)
class TestTablesThatCannotBeUsed:
    def test_none(self, tmp_path: Path, read, name: str, schema: pa.Schema):
        with pytest.raises(UserError) as refused:
            read(tmp_path)
        assert str(refused.value) == (
            f"{tmp_path / name}: no such file; run exhaustive_feature_tracing.py into this folder first."
        )

    def test_damaged_or_of_other_columns(self, tmp_path: Path, read, name: str, schema: pa.Schema):
        pq.write_table(schema.empty_table(), tmp_path / name)
        assert read(tmp_path).schema.equals(schema)
        other = schema.empty_table().drop_columns([schema.names[-1]])
        for write in (
            lambda path: path.write_bytes(b"PAR1 and no more"),
            lambda path: pq.write_table(other, path),
        ):
            write(tmp_path / name)
            with pytest.raises(UserError) as refused:
                read(tmp_path)
            assert str(refused.value) == (
                f"{tmp_path / name}: not a readable Parquet file (ArrowInvalid); run the tracing script again, it "
                "mends it."
            )
