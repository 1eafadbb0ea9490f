"""The output folder's records, summary, manifest and lock, against values worked out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from cellcircuits.errors import UserError
from cellcircuits.jsonio import write_atomically, write_json
from cellcircuits.results import exclusive, feature_path, feature_record, repair_record, report_lines, summarise

FACTS = {
    "source_layer": 5, "feature_idx": 7, "label": "Cell cycle", "activation_freq": 0.25, "n_cells_active": 3,
    "n_cells_measured": 4, "elapsed_seconds": 1.5, "fingerprint": "f",
}  # fmt: skip


def traced(*degrees: int, n_cells_active: int = 1) -> list[dict[str, Any]]:
    """Features 0, 1, ... with these numbers of edges."""
    return [
        {"feature_idx": i, "label": f"term {i}", "n_cells_active": n_cells_active, "n_edges": degree}
        for i, degree in enumerate(degrees)
    ]


class TestSummarise:
    def test_an_odd_number_of_features(self):
        assert summarise(5, traced(5, 0, 1)) == {
            "source_layer": 5,
            "n_features_traced": 3,
            "total_edges": 6,
            "mean_edges_per_feature": 2.0,
            "median_edges_per_feature": 1.0,
            "max_edges": 5,
            "n_zero_edge_features": 1,
            "top_20_hubs": [
                {"feature_idx": 0, "label": "term 0", "total_edges": 5, "n_cells_active": 1},
                {"feature_idx": 2, "label": "term 2", "total_edges": 1, "n_cells_active": 1},
                {"feature_idx": 1, "label": "term 1", "total_edges": 0, "n_cells_active": 1},
            ],
        }

    def test_an_even_number_of_features_takes_the_middle_of_the_two(self):
        summary = summarise(0, traced(8, 1, 4, 1))
        assert (summary["mean_edges_per_feature"], summary["median_edges_per_feature"]) == (3.5, 2.5)

    def test_nothing_traced(self):
        summary = summarise(0, [])
        assert summary.pop("top_20_hubs") == [] and set(summary.values()) == {0}

    def test_hubs_tie_by_ascending_index_and_end_at_twenty(self):
        features = traced(*[3] * 12, 9, *[3] * 12)
        hubs = summarise(0, features[::-1])["top_20_hubs"]
        assert [hub["feature_idx"] for hub in hubs] == [12, *range(12), *range(13, 20)]


def test_report_counts_each_bin_from_its_lower_edge_to_below_the_next():
    degrees = (0, 0, 0, 1, 9, 10, 49, 50, 99, 100, 499, 500, 999, 1000, 4999, 5000, 9999, 10_000, 70_000, 80_000)
    features = [*traced(*degrees, n_cells_active=2), *traced(0, 1, n_cells_active=0)]
    lines = list(report_lines(summarise(5, features), features, {17: 4, 6: 9, 11: 0}))
    assert lines[0] == "Layer 5: 22 features traced, 183315 edges"
    assert "mean 8332.50, median 99.5, max 80000; 4 features without an edge" in lines[1]
    assert lines[2:6] == [
        "  features active in none of the cells: 2",
        "  edges to layer 6: 9",
        "  edges to layer 11: 0",
        "  edges to layer 17: 4",
    ]
    assert [line.split(": ") for line in (line.strip() for line in lines[7:16])] == [
        ["0", "4"], ["1-9", "3"], ["10-49", "2"], ["50-99", "2"], ["100-499", "2"], ["500-999", "2"],
        ["1000-4999", "2"], ["5000-9999", "2"], ["10000+", "3"],
    ]  # fmt: skip
    assert lines[17].split() == ["L5/F19", "80000", "2", "term", "19"] and len(lines) == 17 + 20


def test_report_calls_a_hub_by_its_name():
    features = traced(2, 1)
    features[0] |= {"label": "unannotated", "name": "(TP53, MYC)"}
    lines = list(report_lines(summarise(5, features), features, {}))
    assert lines[3] == "  degree histogram (edges: features)"
    assert lines[-3:] == [
        "  hubs (edges, active cells, label or top genes)",
        "         L5/F0       2     1  (TP53, MYC)",
        "         L5/F1       1     1  term 1",
    ]


@pytest.mark.parametrize("feature, name", [(7, "feature_0007.json"), (12345, "feature_12345.json")])
def test_where_a_record_lies(tmp_path: Path, feature: int, name: str):
    assert feature_path(tmp_path, feature) == tmp_path / name


class TestFeatureRecord:
    def test_all_fields(self):
        record = feature_record(FACTS, {11: [(4, -2.0, 1.0)], 6: [(1, 0.5, 0.75), (3, -1.0, 0.8)], 17: []})
        assert record == {
            **FACTS,
            "total_significant_edges": 3,
            "downstream_edges": {
                "6": {
                    "n_significant": 2,
                    "top_effects": [
                        {"target": 3, "d": -1.0, "consistency": 0.8},
                        {"target": 1, "d": 0.5, "consistency": 0.75},
                    ],
                    "mean_abs_d": 0.75,
                },
                "11": {
                    "n_significant": 1,
                    "top_effects": [{"target": 4, "d": -2.0, "consistency": 1.0}],
                    "mean_abs_d": 2.0,
                },
            },
            "schema_version": 1,
        }

    def test_fifty_strongest_of_sixty_with_the_mean_over_all(self):
        ties = [(target, 1.0 if target % 2 else -1.0, 1.0) for target in range(58)]
        of_layer = feature_record(FACTS, {6: [*ties, (58, -8.0, 1.0), (59, 4.0, 1.0)]})["downstream_edges"]["6"]
        assert [effect["target"] for effect in of_layer["top_effects"]] == [58, 59, *range(48)]
        assert (of_layer["n_significant"], of_layer["mean_abs_d"]) == (60, 70 / 60)


class TestRepairRecord:
    """Whether a file was there that was damaged or told other effects."""

    RECORD = feature_record(FACTS, {6: [(1, 0.5, 0.75)]})

    @pytest.mark.parametrize(
        "there, repaired",
        [
            (None, False),
            ('{"label": "Cell cy', True),
            ("[]", True),
            (json.dumps(RECORD | {"label": "old name"}), False),
            (json.dumps(RECORD | {"activation_freq": 0.5, "elapsed_seconds": 9.0}), False),
            (json.dumps(RECORD | {"n_cells_active": 2}), True),
            (json.dumps(RECORD | {"fingerprint": "of another run"}), True),
            (json.dumps(RECORD | {"more": 1}), True),
        ],
    )
    def test_what_it_returns(self, tmp_path: Path, there: str | None, repaired: bool):
        path = tmp_path / "feature_0007.json"
        if there is not None:
            path.write_text(there)
        assert repair_record(path, self.RECORD) is repaired
        assert json.loads(path.read_text()) == self.RECORD

    def test_the_same_record_is_not_written_again(self, tmp_path: Path):
        path = tmp_path / "feature_0007.json"
        path.write_text(json.dumps(self.RECORD))
        assert repair_record(path, self.RECORD) is False
        assert path.read_text() == json.dumps(self.RECORD)  # not indented, as `write_json` would have it


class TestExclusive:
    def test_a_second_run_is_refused_and_touches_nothing(self, tmp_path: Path):
        with exclusive(tmp_path):
            half_written = tmp_path / ".edges.parquet.17.tmp"
            half_written.write_text("of the first run")
            with pytest.raises(UserError, match="another run is at work"), exclusive(tmp_path):
                pytest.fail("let in")
            assert half_written.exists()
        with exclusive(tmp_path):
            assert not half_written.exists()

    def test_only_half_written_files_are_removed(self, tmp_path: Path):
        names = ("manifest.json", ".keep", "notes.tmp", "blocks/block_00000.partial.npz", ".notes.tmp", ".a.json.1.tmp")
        stale = (
            ".manifest.json.1.tmp",
            ".progress.json.1.tmp",
            ".exhaustive_summary.json.1.tmp",
            ".feature_0007.json.12.tmp",
            ".edges.parquet.1.tmp",
            ".features.parquet.1.tmp",
            ".exhaustive_tracing.png.1.tmp",
            "blocks/.block_00000.parquet.1.tmp",
            "blocks/.block_00016.partial.npz.1.tmp",
            "blocks/.block_00016.parquet.1.0a1b2c3d.tmp",
            ".layers_summary.json.12.00000000.tmp",
            "blocks/.clock.x_1abc9z.tmp",
        )
        (tmp_path / "blocks").mkdir()
        for name in (*names, *stale):
            (tmp_path / name).write_text("")
        with exclusive(tmp_path):
            assert {name for name in (*names, *stale) if (tmp_path / name).exists()} == set(names)

    def test_a_lock_file_of_someone_else_keeps_its_content(self, tmp_path: Path):
        (tmp_path / ".lock").write_text("mine")
        with exclusive(tmp_path):
            pass
        assert (tmp_path / ".lock").read_text() == "mine"

    def test_a_failed_run_gives_the_folder_back(self, tmp_path: Path):
        with pytest.raises(ZeroDivisionError), exclusive(tmp_path / "new"):
            raise ZeroDivisionError
        with exclusive(tmp_path / "new"):
            pass

    def test_a_path_that_is_a_file_is_refused(self, tmp_path: Path):
        (tmp_path / "out").write_text("mine")
        with pytest.raises(UserError, match="cannot be written"), exclusive(tmp_path / "out"):
            pytest.fail("let in")


class TestWriteJson:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_what_is_not_finite_is_refused_and_the_old_file_stays(self, tmp_path: Path, value: float):
        path = tmp_path / "a.json"
        write_json(path, {"d": 1.0})
        with pytest.raises(ValueError):
            write_json(path, {"d": [value]})
        assert json.loads(path.read_text()) == {"d": 1.0} and list(tmp_path.iterdir()) == [path]

    def test_a_failure_halfway_leaves_the_old_file(self, tmp_path: Path):
        path = tmp_path / "a.json"
        path.write_text("old")

        def fail(stream):
            stream.write(b"half")
            stream.flush()
            raise OSError(28, "No space left on device")

        with pytest.raises(UserError, match="No space left"):
            write_atomically(path, fail)
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
