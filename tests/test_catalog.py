"""Feature labels, catalogs, and the JSON they come in."""

import json
from pathlib import Path

import pytest

from cellcircuits.catalog import label_of, load_catalog, read_annotations
from cellcircuits.errors import UserError
from cellcircuits.jsonio import read_json, write_json


def entry(ontology: str, term: str) -> dict:
    return {"ontology": ontology, "term": term, "fdr": 0.01}


class TestLabels:
    @pytest.mark.parametrize(("entries", "label"), [
        ([], "unannotated"),
        ([entry("CellMarker", "a")], "a"),
        ([entry("TRRUST", "a"), entry("STRING", "b")], "a"),
        ([entry("TRRUST", "a"), entry("KEGG", "b"), entry("GO_BP", "c")], "b"),
        ([entry("GO_BP", "a"), entry("KEGG", "b")], "a"),
        ([entry("TRRUST", "a"), entry("Reactome", "b")], "b"),
        ([entry("go_bp", "a"), entry("GO_CC", "b")], "a"),
        ([{"term": "a"}], "a"),
    ])  # fmt: skip
    def test_rule(self, entries: list[dict], label: str) -> None:
        assert label_of(entries) == label

    @staticmethod
    def catalog(tmp_path: Path, **change: object) -> Path:
        path = tmp_path / "feature_catalog.json"
        genes = [{"gene_name": "TP53"}]
        features = [{"feature_idx": i, "activation_freq": i / 10, "top_genes": genes} for i in (2, 0, 1)]
        features[0] |= change
        path.write_text(json.dumps({"features": features}))
        return path

    def test_catalog(self, tmp_path: Path) -> None:
        labels = tmp_path / "feature_annotations.json"
        entries = [entry("KEGG", "Cell cycle") | {"odds_ratio": float("inf")}]
        labels.write_text(json.dumps({"feature_annotations": {"1": entries}}))
        assert "Infinity" in labels.read_text()
        catalog = load_catalog(self.catalog(tmp_path), labels, 3)
        assert list(catalog) == [0, 1, 2]
        assert [info.label for info in catalog.values()] == ["unannotated", "Cell cycle", "unannotated"]
        assert [info.activation_freq for info in catalog.values()] == [0.0, 0.1, 0.2]
        assert catalog[2].top_genes == ("TP53",)

    def test_catalog_of_another_sae(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"feature_catalog\.json.*feature 2"):
            load_catalog(self.catalog(tmp_path), None, 2)

    @pytest.mark.parametrize("change", [
        {"feature_idx": "x"}, {"feature_idx": -1}, {"feature_idx": 1}, {"activation_freq": None},
        {"activation_freq": 1.5}, {"activation_freq": float("nan")}, {"top_genes": 3},
    ])  # fmt: skip
    def test_damaged_catalog(self, tmp_path: Path, change: dict) -> None:
        with pytest.raises(UserError, match=r"feature_catalog\.json"):
            load_catalog(self.catalog(tmp_path, **change), None, 3)

    @pytest.mark.parametrize("text", [
        "", "{", "[]", "{}", '{"feature_annotations": []}', '{"feature_annotations": {"1": 3}}',
        '{"feature_annotations": {"1": [{"ontology": "KEGG"}]}}',
    ])  # fmt: skip
    def test_damaged_annotations(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "feature_annotations.json"
        path.write_text(text)
        with pytest.raises(UserError, match=r"feature_annotations\.json"):
            read_annotations(path)


class TestJson:
    def test_reading_admits_what_older_releases_wrote(self, tmp_path: Path) -> None:
        path = tmp_path / "old.json"
        path.write_text('{"a": Infinity, "b": -Infinity, "c": NaN}')
        content = read_json(path)
        assert (content["a"], content["b"]) == (float("inf"), float("-inf"))
        assert content["c"] != content["c"]

    @pytest.mark.parametrize("value", [float("inf"), float("nan")])
    def test_writing_is_strict_and_leaves_the_old_file(self, tmp_path: Path, value: float) -> None:
        path = tmp_path / "new.json"
        write_json(path, {"a": 1})
        with pytest.raises(ValueError, match="JSON"):
            write_json(path, {"a": value})
        assert read_json(path) == {"a": 1}
        assert [entry.name for entry in tmp_path.iterdir()] == ["new.json"]
