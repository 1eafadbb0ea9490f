"""Selective tracing: which features count as best annotated, and selective_feature_tracing.py end to end."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import exhaustive_feature_tracing
import selective_feature_tracing as script
from cellcircuits.best_annotated import annotation_score, best_annotated
from cellcircuits.catalog import load_catalog
from cellcircuits.effects import Bench
from cellcircuits.errors import UserError
from cellcircuits.pathways import PATHWAYS
from cellcircuits.selection import choose_pairs, read_selective_summary
from conftest import Study, write_study
from test_tracing_script import refusal

TERMS = ("DNA repair", "mitotic spindle", "mRNA splicing", "lipid transport", "olfaction")
FEATURE_KEYS = {
    "layer", "idx", "label", "best_term", "best_term_significant", "p_adjusted", "score", "pathway",
    "activation_freq", "n_edges", "n_cells_active",
}  # fmt: skip


def write_layer(folder: Path, features: dict[int, tuple[float, int]], entries: dict, labels: dict | None) -> None:
    """Catalog and annotations of one layer; `features` gives frequency and number of top genes."""
    catalog = [
        {"feature_idx": i, "activation_freq": freq, "top_genes": [{"gene_name": f"G{j}"} for j in range(n_genes)]}
        for i, (freq, n_genes) in features.items()
    ]
    folder.mkdir(exist_ok=True)
    (folder / "feature_catalog.json").write_text(json.dumps({"features": catalog}))
    content = {"feature_annotations": entries} | ({} if labels is None else {"labels": labels})
    (folder / "feature_annotations.json").write_text(json.dumps(content))


def best_of(folder: Path, n_features: int = 30):
    path = folder / "feature_annotations.json"
    return best_annotated(5, load_catalog(folder / "feature_catalog.json", path, 1000), path, PATHWAYS, n_features)


def term(ontology: str, name: str, p_adjusted: float | None = None, p_value: float | None = None) -> dict:
    given = {"p_adjusted": p_adjusted, "p_value": p_value}
    return {"ontology": ontology, "term": name} | {key: p for key, p in given.items() if p is not None}


def weak(name: str | None, p_adjusted: float | None, p_value: float | None) -> dict:
    return {
        "label": "unannotated", "ontology": "GO_BP", "p_value": p_value, "p_adjusted": p_adjusted,
        "significant": False, "best_term": name,
    }  # fmt: skip


class TestBestAnnotated:
    def test_the_score(self):
        assert annotation_score(2, 5, 1e-4) == pytest.approx(10 * 2 + 5 + 4)
        assert annotation_score(9, 1, 1.0) == 61.0  # six ontologies at most
        assert annotation_score(1, 1, 0.0) == pytest.approx(41.0)  # 30 decades at most

    def test_published_annotations_by_hand(self, tmp_path: Path):
        """No `labels` table, raw p absent, edge types without any p."""
        entries = {
            "1": [term("STRING_edges", "pairwise_enrichment"), term("KEGG", "Cell cycle", 1e-3)],
            "2": [term("GO_BP", "DNA repair", 1e-8), term("GO_BP", "chromatin", 1e-2), term("GO_BP", "lipid", 0.04)],
            "3": [term("STRING_edges", "pairwise_enrichment")],
            "4": [term("GO_BP", "rare", 1e-30)],
            "5": [term("GO_BP", "short", 1e-30)],
        }
        features = dict.fromkeys((1, 2, 3, 6), (0.01, 10)) | {4: (0.0099, 20), 5: (0.5, 9)}
        write_layer(tmp_path, features, entries, None)
        chosen = best_of(tmp_path)
        assert [x.index for x in chosen] == [1, 2, 3]  # 4 is rare, 5 has nine genes, 6 has no entry
        assert [x.score for x in chosen] == pytest.approx([20 + 2 + 3, 10 + 3 + 8, 10 + 1])
        assert [x.best_term for x in chosen] == [x.label for x in chosen]
        assert [x.best_term for x in chosen] == ["Cell cycle", "DNA repair", "pairwise_enrichment"]
        assert [x.pathway for x in chosen] == ["mitosis", "ddr", None]
        assert [x.p_adjusted for x in chosen] == [1e-3, 1e-8, None]
        assert all(x.best_term_significant and x.layer == 5 for x in chosen)

    def test_features_without_a_significant_term_follow(self, tmp_path: Path):
        entries = {"9": [term("GO_BP", "DNA repair", 0.04, 1e-6)]}
        labels = {
            "9": weak("not used", 0.5, 0.5),
            "1": weak("mRNA  splicing", 1.0, 0.02),
            "2": weak("lipid transport", 1.0, 0.01),
            "3": weak("mitotic spindle", 0.2, 0.03),
            "4": weak(None, None, None),
            "5": weak("olfaction", 1.0, 0.02),
            "6": weak("olfaction", None, None),
        }
        write_layer(tmp_path, dict.fromkeys(range(10), (0.1, 12)), entries, labels)
        chosen = best_of(tmp_path)
        assert [x.index for x in chosen] == [9, 3, 2, 1, 5, 6]
        assert [x.best_term_significant for x in chosen] == [True] + 5 * [False]
        assert [x.label for x in chosen] == ["DNA repair"] + 5 * ["unannotated"]
        assert chosen[3].best_term == "mRNA splicing"
        assert [x.pathway for x in chosen] == ["ddr", "mitosis", "metabolism", "rna", None, None]
        assert [x.score for x in chosen[1:]] == pytest.approx([-math.log10(0.2), 0, 0, 0, 0])
        assert [x.index for x in best_of(tmp_path, 2)] == [9, 3]

    def test_random_annotations_against_plain_sorting(self, tmp_path: Path):
        rng = np.random.default_rng(0)
        entries, labels, features = {}, {}, {}
        for i in range(200):
            features[i] = (float(rng.choice([0.005, 0.01, 0.3])), int(rng.choice([9, 10, 20])))
            p = [float(x) for x in rng.choice([1e-40, 1e-3, 0.01, 0.05], rng.integers(1, 4))]
            labels[str(i)] = weak(str(rng.choice(TERMS)), float(rng.choice([0.1, 1.0])), float(rng.choice([0.1, 0.2])))
            if rng.random() < 0.3:
                ontologies = rng.choice(["GO_BP", "KEGG", "TRRUST_edges"], len(p))
                entries[str(i)] = [
                    term(str(o), str(rng.choice(TERMS)), q, q / 7) for o, q in zip(ontologies, p, strict=True)
                ]
        write_layer(tmp_path, features, entries, labels)

        def key(i: int):
            found = entries.get(str(i))
            if not found:
                best = labels[str(i)]
                return math.log10(best["p_adjusted"]), best["p_value"], i
            naming = [one for one in found if one["ontology"] in ("GO_BP", "KEGG", "Reactome")] or found
            decades = -math.log10(max(min(one["p_adjusted"] for one in found), 1e-30))
            score = 10 * len({one["ontology"] for one in found}) + len(found) + decades
            return -score, naming[0]["p_value"], i

        expected = sorted((i for i, (freq, n) in features.items() if freq >= 0.01 and n >= 10), key=key)
        assert [x.index for x in best_of(tmp_path, 200)] == expected
        assert [x.index for x in best_of(tmp_path)] == expected[:30]

    @pytest.mark.parametrize(
        ("entries", "labels", "words"),
        [
            ({"1": [term("GO_BP", "x", -0.1)]}, None, ["feature 1", "`p_adjusted`", "-0.1"]),
            ({"1": [term("GO_BP", "x", 0.1, 1.5)]}, None, ["feature 1", "`p_value`", "1.5"]),
            ({"1": [term("GO_BP", "x", float("nan"))]}, None, ["feature 1", "`p_adjusted`", "nan"]),
            ({}, {"1": weak("x", "small", 0.1)}, ["feature 1", "`p_adjusted`", "small"]),
            ({}, {"1": weak(3, 0.1, 0.1)}, ["feature 1", "`best_term`"]),
            ({}, {"1": "x"}, ["`labels`", "--relabel"]),
            ({}, [], ["`labels`"]),
            ({}, None, ["no feature of layer 5 has a term", "--source-layers"]),
        ],
    )
    def test_mistakes_are_named(self, tmp_path: Path, entries: dict, labels: object, words: list[str]):
        write_layer(tmp_path, {1: (0.1, 20)}, entries, labels)
        with pytest.raises(UserError) as error:
            best_of(tmp_path)
        assert all(word in str(error.value) for word in ["feature_annotations.json", *words]), error.value

    def test_an_ontology_of_another_form_is_one_more(self, tmp_path: Path):
        entries = {"1": [term(["KEGG"], "Cell cycle", 1e-3), term("KEGG", "Cell cycle", 1e-3)]}
        write_layer(tmp_path, {1: (0.1, 10)}, entries, None)
        assert best_of(tmp_path)[0].score == pytest.approx(20 + 2 + 3)

    def test_no_annotations(self, tmp_path: Path):
        write_layer(tmp_path, {1: (0.1, 20)}, {}, None)
        (tmp_path / "feature_annotations.json").unlink()
        with pytest.raises(UserError, match=r"no such file.*--gmt"):
            best_annotated(5, {}, tmp_path / "feature_annotations.json", PATHWAYS)


def annotate(study: Study) -> None:
    """Give the SAEs of a study twenty top genes per feature and terms of four pathways, few of them significant."""
    for layer in (1, 2, 4, 5):
        (folder,) = (study.data_root / "sae_models").glob(f"layer{layer:02d}_*")
        names = {i: TERMS[(i + layer) % len(TERMS)] for i in range(40)}
        labels = {str(i): weak(name, 1.0, (1 + i) / 100) for i, name in names.items()}
        entries = {str(i): [term("GO_BP", names[i], 0.01, 0.001)] for i in (20, 31)}
        write_layer(folder, {i: (0.01 + i / 1000, 20) for i in names}, entries, labels)


@pytest.fixture(scope="module")
def annotated(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Annotated inputs that no test may change."""
    study = write_study(tmp_path_factory.mktemp("annotated") / "study")
    annotate(study)
    return study


def flags(study: Study, out_dir: Path) -> list[str]:
    return [
        "--model", str(study.model), "--data-root", str(study.data_root), "--data-path", str(study.cells),
        "--cells", "all", "--n-cells", "12", "--min-median-tokens", "5", "--source-layers", "1,2,4",
        "--n-features", "8", "--out-dir", str(out_dir), "--device", "cpu",
    ]  # fmt: skip


def trace(study: Study, out_dir: Path, *more: str) -> int:
    return script.main([*flags(study, out_dir), *more])


def files_of(out_dir: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out_dir.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(annotated: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that no test may change."""
    out_dir = tmp_path_factory.mktemp("finished")
    assert trace(annotated, out_dir) == 0
    return out_dir


def summary_of(out_dir: Path) -> dict:
    return json.loads((out_dir / "selective_summary.json").read_text())


class TestScript:
    def test_the_summary(self, finished: Path):
        summary = summary_of(finished)
        assert summary["source_layers"] == [1, 2, 4] and summary["n_cells"] == 12
        assert summary["downstream_layers"] == {"1": [2, 4, 5], "2": [4, 5], "4": [5]}
        assert list(summary["pathways"]) == [pathway.name for pathway in PATHWAYS]
        features = summary["features"]
        assert len(features) == summary["n_features"] == 24
        assert all(set(feature) == FEATURE_KEYS for feature in features)
        for layer in (1, 2, 4):
            of_layer = [feature for feature in features if feature["layer"] == layer]
            assert [feature["idx"] for feature in of_layer] == [20, 31, 0, 1, 2, 3, 4, 5]
            assert [feature["best_term"] for feature in of_layer] == [
                TERMS[(feature["idx"] + layer) % len(TERMS)] for feature in of_layer
            ]
            assert [feature["best_term_significant"] for feature in of_layer] == [True] * 2 + [False] * 6
            assert [feature["label"] == "unannotated" for feature in of_layer] == [False] * 2 + [True] * 6
        assert summary["n_best_terms_significant"] == 6

    def test_each_layer_is_what_exhaustive_tracing_gives(self, annotated: Study, finished: Path, tmp_path: Path):
        asked = ["--source-layer", "2", "--downstream-layers", "4,5", "--features", "0,1,2,3,4,5,20,31"]
        given = flags(annotated, tmp_path)
        start = given.index("--source-layers")
        given = given[:start] + given[start + 4 :]  # without --source-layers and --n-features
        assert exhaustive_feature_tracing.main([*given, *asked]) == 0
        for name in ("features.parquet", "exhaustive_summary.json"):
            assert (finished / "layer02" / name).read_bytes() == (tmp_path / name).read_bytes()
        # the clean stream comes from that of layer 1, which may round otherwise
        here, there = (pq.read_table(at / "edges.parquet").to_pandas() for at in (finished / "layer02", tmp_path))
        names = ["source_layer", "source", "target_layer", "target", "n_cells"]
        assert here[names].equals(there[names]) and np.allclose(here.cohens_d, there.cohens_d, rtol=1e-3)
        settings = [
            json.loads((at / "manifest.json").read_text())["settings"] for at in (finished / "layer02", tmp_path)
        ]
        assert settings[0] == settings[1]
        edges = pq.read_table(tmp_path / "edges.parquet").to_pandas()
        for feature in (one for one in summary_of(finished)["features"] if one["layer"] == 2):
            record = json.loads((tmp_path / f"feature_{feature['idx']:04d}.json").read_text())
            assert feature["n_edges"] == record["total_significant_edges"] == (edges.source == feature["idx"]).sum()
            assert feature["n_cells_active"] == record["n_cells_active"]
        # and that script goes on in a layer's folder
        shutil.copytree(finished / "layer02", tmp_path / "copy")
        given[given.index("--out-dir") + 1] = str(tmp_path / "copy")
        assert exhaustive_feature_tracing.main([*given, *asked]) == 0

    def test_the_terminal(self, finished: Path, capsys: pytest.CaptureFixture[str]):
        assert script.main(["--out-dir", str(finished), "--analysis-only"]) == 0
        out = capsys.readouterr().out
        assert "24 features traced in 12 cells" in out
        assert "best terms that are significant: 6 of 24" in out
        rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith("  ")}
        assert {"L1", "mitosis", "(none)"} <= rows.keys()
        filed = [feature for feature in summary_of(finished)["features"] if feature["pathway"]]
        assert sum(line.split()[1].startswith("L") and "/F" in line for line in out.splitlines() if line) == len(filed)

    def test_pairs_come_out(self, finished: Path):
        summary = read_selective_summary(finished / "selective_summary.json")
        pairs, _ = choose_pairs(summary, 5, seed=0)
        assert {pair.kind for pair in pairs} == {"same_pathway", "cross_pathway", "random"}

    def test_running_again_changes_nothing(self, annotated: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        assert trace(annotated, tmp_path) == 0
        before = files_of(tmp_path)
        monkeypatch.setattr(Bench, "effects", lambda *_: pytest.fail("traced again"))
        assert trace(annotated, tmp_path) == 0
        assert files_of(tmp_path) == before
        assert trace(annotated, tmp_path, "--n-features", "5", "--source-layers", "2,4") == 0  # a part of it
        assert summary_of(tmp_path)["n_features"] == 10

    def test_more_features_go_on(self, annotated: Study, finished: Path, tmp_path: Path):
        assert trace(annotated, tmp_path, "--n-features", "3") == 0
        assert summary_of(tmp_path)["n_features"] == 9
        assert trace(annotated, tmp_path) == 0
        assert summary_of(tmp_path) == summary_of(finished)

    def test_interrupted_and_gone_on(
        self, annotated: Study, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
    ):
        real, calls = Bench.effects, []

        def interrupted(self, clean, features):
            calls.append(self.source_layer)
            if calls.count(2) == 4:
                raise KeyboardInterrupt
            return real(self, clean, features)

        monkeypatch.setattr(Bench, "effects", interrupted)
        assert trace(annotated, tmp_path) == 130
        assert not (tmp_path / "selective_summary.json").exists()
        capsys.readouterr()
        assert script.main(["--out-dir", str(tmp_path), "--analysis-only"]) == 0
        missing = 24 - summary_of(tmp_path)["n_features"]
        assert missing >= 8 and f"{missing} chosen features are not traced yet" in capsys.readouterr().out
        monkeypatch.setattr(Bench, "effects", real)
        assert trace(annotated, tmp_path) == 0
        assert summary_of(tmp_path) == summary_of(finished)

    def test_own_pathways_and_targets(self, annotated: Study, tmp_path: Path):
        table = tmp_path / "mine.json"
        table.write_text(json.dumps({"smell": ["olfaction"]}))
        out_dir = tmp_path / "out"
        more = ("--pathways", str(table), "--source-layers", "1,2", "--downstream-layers", "2,5", "--n-features", "6")
        assert trace(annotated, out_dir, *more) == 0
        summary = summary_of(out_dir)
        assert summary["downstream_layers"] == {"1": [2, 5], "2": [5]}
        assert summary["pathways"] == {"smell": {"any": ["olfaction"], "none": []}}
        for feature in summary["features"]:
            assert feature["pathway"] == ("smell" if feature["best_term"] == "olfaction" else None)

    def test_other_settings_are_refused_and_change_nothing(
        self, annotated: Study, finished: Path, capsys: pytest.CaptureFixture[str]
    ):
        before = files_of(finished)
        error = refusal(capsys, trace(annotated, finished, "--n-cells", "5", "--n-features", "4"))
        assert "layer01" in error and "n_cells is 12 there and 5 here" in error
        assert files_of(finished) == before

    @pytest.mark.parametrize(
        ("more", "words"),
        [
            (("--source-layers", "1,9"), ["--source-layers 9", "6 blocks, 0 to 5"]),
            (("--downstream-layers", "5,9"), ["--downstream-layers 9", "6 blocks"]),
            (("--source-layers", "1,5"), ["--source-layers 5", "none of the layers with an SAE (1, 2, 4, 5)"]),
            (("--downstream-layers", "2"), ["--source-layers 2", "none of the --downstream-layers (2)"]),
            (("--source-layers", "0,3"), ["no SAE of layer 0", "Missing: layers 0,3"]),
            (("--pathways", "none.json"), ["none.json", "no such file"]),
            (("--data-root", "none"), ["--data-root none"]),
        ],
    )
    def test_mistakes_are_named(
        self, annotated: Study, tmp_path: Path, more: tuple, words: list[str], capsys: pytest.CaptureFixture[str]
    ):
        error = refusal(capsys, trace(annotated, tmp_path / "out", *more))
        assert all(word in error for word in words), error
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("file", ["feature_catalog.json", "feature_annotations.json"])
    def test_a_layer_without_catalog_or_labels(self, study: Study, file: str, capsys: pytest.CaptureFixture[str]):
        annotate(study)
        (folder,) = (study.data_root / "sae_models").glob("layer02_*")
        (folder / file).unlink()
        error = refusal(capsys, trace(study, study.root / "out"))
        assert str(folder / file) in error and "prepare_inputs.py --existing-saes" in error

    def test_analysis_of_other_folders(
        self, annotated: Study, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        error = refusal(capsys, script.main(["--out-dir", str(tmp_path), "--analysis-only"]))
        assert "holds no selective trace" in error
        assert trace(annotated, tmp_path, "--n-features", "1", "--source-layers", "4") == 0
        path = tmp_path / "chosen_features.json"
        choice = json.loads(path.read_text())
        path.write_text(json.dumps(choice | {"fingerprints": {"4": "other"}}))
        error = refusal(capsys, script.main(["--out-dir", str(tmp_path), "--analysis-only"]))
        assert "layer04" in error and "other settings" in error
        unnamed = [{key: value for key, value in one.items() if key != "pathway"} for one in choice["features"]]
        changes = ({"features": [{}]}, {"fingerprints": []}, {"pathways": None}, {"source_layers": None})
        for damaged in ({}, [], *(choice | change for change in (*changes, {"features": unnamed}))):
            path.write_text(json.dumps(damaged))
            error = refusal(capsys, script.main(["--out-dir", str(tmp_path), "--analysis-only"]))
            assert str(path) in error and "damaged" in error

    def test_help_needs_no_torch(self):
        program = (
            "import sys; sys.path.insert(0, sys.argv[1]); import selective_feature_tracing as script\n"
            "try: script.main(['--help'])\n"
            "finally: assert not {'torch', 'transformers', 'anndata', 'scanpy'} & sys.modules.keys()"
        )
        command = [sys.executable, "-c", program, str(Path(script.__file__).parent)]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        assert answer.returncode == 0 and "--source-layers" in answer.stdout, answer.stderr
