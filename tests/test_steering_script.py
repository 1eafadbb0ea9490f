"""trajectory_steering.py end to end on small inputs: numbers, files, resume, and a user's mistakes."""

import json
import shutil
from pathlib import Path

import anndata
import numpy as np
import pytest

import reference_steering
import trajectory_steering as script
from cellcircuits import steering_run
from cellcircuits.cells import CellSelection, load_cells
from cellcircuits.geneformer import load_model
from cellcircuits.sae_store import find_sae, open_sae
from cellcircuits.steering import SteeringBench
from cellcircuits.vocabulary import load_vocabulary
from conftest import Study, random_sae, write_sae, write_study
from test_tracing_script import refusal

PANEL = [
    {"layer": 1, "idx": 0, "d": 1.25, "label": "Chromatin"},
    {"layer": 5, "idx": 6, "d": -0.5, "label": "unannotated"},
    {"layer": 4, "idx": 10},
    {"layer": 4, "idx": 17, "d": 0.75, "label": "Mitosis"},  # active in no early cell
]
ALPHA_KEYS = {
    "n_cells_steered", "n_cells_active", "mean_state_shift", "median_state_shift", "std_state_shift",
    "frac_positive_shift", "top_upregulated", "top_downregulated", "mean_abs_logit_delta", "max_logit_delta",
    "min_logit_delta",
}  # fmt: skip
RECORD_KEYS = {"feature_idx", "layer", "label", "switch_d", "n_early_cells", "alpha_results"}


def write_trajectory_study(root: Path) -> Study:
    """A study with types and tissues of its cells, a cell_metadata.json and a panel."""
    study = write_study(root)
    adata = anndata.read_h5ad(study.cells)
    n_cells = adata.n_obs
    adata.obs["cell_type"] = ["Monocyte" if i % 2 else "macrophage" for i in range(n_cells)]
    adata.obs["tissue_in_publication"] = ["Blood"] * n_cells
    adata.write_h5ad(study.cells)
    metadata = {
        "pseudotime": [i / n_cells for i in range(n_cells - 1)] + [None],
        "cell_types": list(adata.obs["cell_type"]),
        "tissues": ["Blood"] * n_cells,
        "cell_ids": list(adata.obs_names),
    }
    write_metadata(study, metadata)
    (root / "panel.json").write_text(json.dumps(PANEL))
    return study


def write_metadata(study: Study, metadata: dict) -> None:
    (study.root / "cell_metadata.json").write_text(json.dumps(metadata))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Inputs that no test may change."""
    return write_trajectory_study(tmp_path_factory.mktemp("study"))


@pytest.fixture
def own(tmp_path: Path, template: Study) -> Study:
    """Inputs of this test's own."""
    root = tmp_path / "study"
    shutil.copytree(template.root, root)
    return Study(root, root / "model", root, root / "cells.h5ad")


def steer(study: Study, out_dir: Path, *flags: str) -> int:
    return script.main([
        "--model", str(study.model), "--data-root", str(study.data_root), "--data-path", str(study.cells),
        "--traj-dir", str(study.root), "--panel", str(study.root / "panel.json"), "--min-median-tokens", "5",
        "--device", "cpu", "--out-dir", str(out_dir), *flags,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def finished(template: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run that no test may change."""
    out_dir = tmp_path_factory.mktemp("finished")
    assert steer(template, out_dir) == 0
    return out_dir


def files_in(out_dir: Path) -> dict[str, object]:
    """Every JSON file; where a run was made is left out of the manifest."""
    contents = {path.name: json.loads(path.read_text()) for path in out_dir.glob("*.json")}
    contents.get("manifest.json", {}).pop("provenance", None)
    return contents


def record_of(out_dir: Path, entry: dict) -> dict:
    return json.loads((out_dir / f"steering_F{entry['idx']}_L{entry['layer']}.json").read_text())


def test_every_number_is_the_reference_s(template: Study, finished: Path):
    model = load_model(str(template.model)).model
    vocabulary = load_vocabulary([template.model], model.config.vocab_size)
    cells = load_cells(template.cells, vocabulary, CellSelection(cells="all", n_cells=500, min_median_tokens=5), 48)
    pseudotime = [*(i / 14 for i in range(13)), float("nan")]
    groups = reference_steering.groups_of(pseudotime)
    gene_of = {
        token: f"GENE{gene.removeprefix('ENSG').lstrip('0') or 0}" for gene, token in vocabulary.token_of.items()
    }
    n_steered = 0
    for entry in PANEL:
        saes = {entry["layer"]: open_sae(find_sae(template.data_root, entry["layer"]))}
        feature = (entry["layer"], entry["idx"])
        slow = reference_steering.steer(model, saes, cells.cells, groups, feature, [2.0, 5.0])
        record = record_of(finished, entry)
        assert record["n_early_cells"] == len(groups[0]) == 4
        for alpha, (shifts, changes) in slow.items():
            expected = reference_steering.alpha_result(shifts, changes, gene_of)
            found = record["alpha_results"][str(alpha)]
            assert found["n_cells_steered"] == expected["n_cells_steered"] == found["n_cells_active"]
            n_steered += len(shifts)
            for key in ("mean_state_shift", "median_state_shift", "std_state_shift"):
                assert found[key] == pytest.approx(expected[key], abs=1e-3 * max(map(abs, shifts), default=0) + 1e-9)
            for key in ("mean_abs_logit_delta", "max_logit_delta", "min_logit_delta"):
                assert found[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-6)
            for key in ("top_upregulated", "top_downregulated"):
                deltas = [entry["delta"] for entry in expected[key]]
                assert [entry["delta"] for entry in found[key]] == pytest.approx(deltas, rel=1e-3, abs=1e-5)
                assert len({e["gene"] for e in found[key]} & {e["gene"] for e in expected[key]}) >= len(deltas) - 1
    assert n_steered > 10


def test_files_have_the_published_form(finished: Path):
    published = {entry["idx"]: record_of(finished, entry) for entry in PANEL}
    assert all(RECORD_KEYS <= record.keys() for record in published.values())
    assert list(published[17])[: len(RECORD_KEYS)] == [
        "feature_idx", "layer", "label", "switch_d", "n_early_cells", "alpha_results",
    ]  # fmt: skip
    for entry in PANEL:
        record = record_of(finished, entry)
        assert (record["layer"], record["feature_idx"], record["switch_d"]) == (
            entry["layer"], entry["idx"], entry.get("d"),
        )  # fmt: skip
        assert record["label"] == entry.get("label", "unannotated")
        assert record["schema_version"] == 1 and record["fingerprint"]
        assert record["n_blocks_after"] == 5 - entry["layer"]
        assert list(record["alpha_results"]) == ["2.0", "5.0"]
        for result in record["alpha_results"].values():
            assert ALPHA_KEYS <= result.keys()
            assert len(result["state_shifts"]) == result["n_cells_steered"]
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["n_features"] == 4
    assert [(f["layer"], f["feature_idx"]) for f in summary["features"]] == [(1, 0), (5, 6), (4, 10), (4, 17)]
    assert summary["features"][0].keys() >= {"feature_idx", "layer", "label", "switch_d", "alpha_results"}
    assert summary["features"][0]["alpha_results"]["2.0"].keys() == ALPHA_KEYS
    with np.load(finished / "state_signatures.npz") as signatures:
        assert signatures["early"].shape == signatures["late"].shape == (64,)
        assert signatures["late"].dtype == np.float64
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["settings"]["alphas"] == [2.0, 5.0] and manifest["settings"]["n_late_cells"] == 4
    assert manifest["provenance"][0]["pseudotime"]["n_cells_without"] == 1
    assert json.loads((finished / "progress.json").read_text()) == {
        "n_features": 4, "n_features_done": 4, "n_early_cells": 4, "n_early_cells_done": 4,
    }  # fmt: skip


def test_a_label_comes_from_the_catalog_where_the_panel_has_none(own: Study, tmp_path: Path):
    (own.root / "panel.json").write_text('[{"layer": 1, "idx": 0}]')
    assert steer(own, tmp_path) == 0
    assert record_of(tmp_path, {"layer": 1, "idx": 0})["label"] == "Cell cycle"


def test_the_report_says_what_was_steered(template: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert steer(template, tmp_path) == 0
    printed = capsys.readouterr().out
    assert "4 features steered in the 4 early of 14 cells (4 late)" in printed
    assert "Mitosis" in printed and "L5/F6: of the last layer" in printed
    assert "note: L4/F17: active in none" in printed


def test_running_again_changes_nothing(
    template: Study, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert steer(template, tmp_path) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(SteeringBench, "clean", lambda *_: pytest.fail("a cell was run"))
    assert steer(template, tmp_path) == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert files_in(tmp_path) == files_in(finished)


def test_killed_in_the_middle_goes_on_and_gives_the_same_files(
    template: Study, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(steering_run, "SAVE_EVERY_SECONDS", -1.0)
    real, calls = SteeringBench.clean, []

    def clean(self, cell):
        calls.append(cell.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, cell)

    monkeypatch.setattr(SteeringBench, "clean", clean)
    assert steer(template, tmp_path) == 130
    assert "run the same command again" in capsys.readouterr().err
    progress = json.loads((tmp_path / "progress.json").read_text())
    assert progress["n_features_done"] == 0 and progress["n_early_cells_done"] == 2
    assert steer(template, tmp_path) == 0
    assert calls[3:] == [f"cell{i}" for i in (2, 3, 9, 10, 11, 12)]
    assert files_in(tmp_path) == files_in(finished)


def test_a_panel_may_grow_and_shrink(own: Study, finished: Path, tmp_path: Path):
    out_dir = tmp_path / "out"
    (own.root / "panel.json").write_text(json.dumps(PANEL[2:]))
    assert steer(own, out_dir) == 0
    (own.root / "panel.json").write_text(json.dumps(PANEL))
    assert steer(own, out_dir) == 0
    found, expected = files_in(out_dir), files_in(finished)
    assert found.keys() == expected.keys() and found["manifest.json"] == expected["manifest.json"]
    order = [(f["layer"], f["feature_idx"]) for f in found["summary.json"]["features"]]
    assert order == [(1, 0), (5, 6), (4, 10), (4, 17)]
    (own.root / "panel.json").write_text(json.dumps(PANEL[3:]))
    assert steer(own, out_dir) == 0
    order = [(f["layer"], f["feature_idx"]) for f in files_in(out_dir)["summary.json"]["features"]]
    assert order == [(4, 17), (1, 0), (5, 6), (4, 10)]


def test_the_order_of_alphas_is_no_setting(template: Study, finished: Path, tmp_path: Path):
    assert steer(template, tmp_path, "--alphas", "5,2.0,5") == 0
    found, expected = (record_of(folder, PANEL[0]) for folder in (tmp_path, finished))
    assert list(found["alpha_results"]) == ["5.0", "2.0"]
    assert found["fingerprint"] == expected["fingerprint"]


@pytest.mark.parametrize(
    "flags, field",
    [
        (["--alphas", "2.0"], "alphas"),
        (["--n-cells", "11"], "n_cells"),
        (["--max-tokens", "20"], "cells"),
        (["--tokenization", "geneformer"], "tokenization"),
    ],
)
def test_other_settings_are_refused_by_name(
    own: Study, finished: Path, capsys: pytest.CaptureFixture[str], flags: list[str], field: str
):
    before = files_in(finished)
    if flags[0] == "--n-cells":
        metadata = json.loads((own.root / "cell_metadata.json").read_text())
        # the draw of 11 of the 14 cells, which the metadata must be for
        rows = np.sort(np.random.RandomState(42).choice(14, 11, replace=False))
        write_metadata(own, {key: [values[i] for i in rows] for key, values in metadata.items()})
    assert field in refusal(capsys, steer(own, finished, *flags))
    assert files_in(finished) == before


def test_other_groups_are_refused_and_the_same_ones_are_not(
    own: Study, finished: Path, capsys: pytest.CaptureFixture[str]
):
    metadata = json.loads((own.root / "cell_metadata.json").read_text())
    times = metadata["pseudotime"][:-1]
    write_metadata(own, metadata | {"pseudotime": [*(time**2 for time in times), None]})
    assert steer(own, finished) == 0
    capsys.readouterr()
    first, second = np.argsort(times)[[-1, len(times) // 2]]
    changed = [*times]
    changed[first], changed[second] = times[second], times[first]  # the same early cells, other late ones
    for others in (reversed(times), changed):
        write_metadata(own, metadata | {"pseudotime": [*others, None]})
        assert "early_and_late_cells" in refusal(capsys, steer(own, finished))


def test_another_sae_is_refused_by_name(own: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out_dir = tmp_path / "out"
    assert steer(own, out_dir) == 0
    write_sae(own.data_root, 4, random_sae(99, 24, 40, 4))
    sentence = refusal(capsys, steer(own, out_dir))
    assert "_L4" in sentence and "saes.4.checkpoint" in sentence


def test_a_panel_made_with_other_saes_is_refused(own: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A feature's number means another feature there; a panel without a manifest beside it is taken as it is."""
    assert steer(own, tmp_path / "out") == 0
    saes = {"1": {"checkpoint": "another", "mean": "another"}, "9": {"checkpoint": "not used here"}}
    model = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]["model"]
    settings = {"experiment": "trajectory_analysis", "layers": [1], "model": model, "saes": saes}
    (own.root / "manifest.json").write_text(json.dumps({"settings": settings}))
    sentence = refusal(capsys, steer(own, tmp_path / "out"))
    assert "--panel" in sentence and "saes.1.checkpoint" in sentence and "saes.9" not in sentence


def test_analysis_only_summarises_what_is_there(
    template: Study, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert "manifest.json" in refusal(capsys, script.main(["--analysis-only", "--out-dir", str(tmp_path / "none")]))
    out_dir = tmp_path / "out"
    shutil.copytree(finished, out_dir)
    (out_dir / "steering_F6_L5.json").write_text("{")
    monkeypatch.setattr("cellcircuits.inputs.open_model", lambda *_: pytest.fail("the model was loaded"))
    assert script.main(["--analysis-only", "--out-dir", str(out_dir)]) == 0
    captured = capsys.readouterr()
    assert "3 features steered" in captured.out
    summary = json.loads((out_dir / "summary.json").read_text())
    assert [(f["layer"], f["feature_idx"]) for f in summary["features"]] == [(1, 0), (4, 10), (4, 17)]
    (out_dir / "summary.json").write_text("[1]")
    assert script.main(["--analysis-only", "--out-dir", str(out_dir)]) == 0
    manifest = json.loads((out_dir / "manifest.json").read_text())
    manifest["settings"] |= {"experiment": "exhaustive_feature_tracing", "source_layer": 1}
    (out_dir / "manifest.json").write_text(json.dumps(manifest))
    assert "another experiment" in refusal(capsys, script.main(["--analysis-only", "--out-dir", str(out_dir)]))


@pytest.mark.parametrize("alphas", ["two", "2,nan", "inf", "", ",", "2;5", "1e999"])
def test_alphas_must_be_finite_numbers(alphas: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        script.main(["--alphas", alphas])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "--alphas" in error and "finite numbers such as 2.0,5.0" in error


def test_alphas_are_distinct_and_may_be_negative():
    assert script.alpha_list("5, 2,5.0,-0,0,-1.5,") == (5.0, 2.0, 0.0, -1.5)
    assert str(script.alpha_list("-0.0")[0]) == "0.0"
    assert script.build_parser().parse_args(["--alphas=-1,2"]).alphas == (-1.0, 2.0)


@pytest.mark.parametrize(
    "panel, words",
    [
        (None, ["panel.json", "no such file"]),
        ([], ["panel.json", "at least one"]),
        ([{"layer": 1, "idx": 40}], ["F40_L1", "0 to 39"]),
        ([{"layer": 6, "idx": 1}], ["F1_L6", "6 blocks"]),
        ([{"layer": 3, "idx": 1}], ["no SAE of layer 3"]),
        ([{"layer": 1, "idx": 1}, {"layer": 1, "idx": 1}], ["twice"]),
    ],
)
def test_a_panel_that_does_not_fit_is_one_sentence(
    own: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str], panel: object, words: list[str]
):
    path = own.root / "panel.json"
    path.unlink() if panel is None else path.write_text(json.dumps(panel))
    sentence = refusal(capsys, steer(own, tmp_path / "out"))
    assert all(word in sentence for word in words), sentence
    assert not (tmp_path / "out").exists()


def test_the_default_panel_needs_its_own_saes(template: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    flags = ["--model", str(template.model), "--data-root", str(template.data_root), "--data-path", str(template.cells)]
    sentence = refusal(capsys, script.main([*flags, "--out-dir", str(tmp_path / "out"), "--device", "cpu"]))
    assert (
        "V2-316M" in sentence and "4,608" in sentence and "--panel" in sentence and "switch_features.json" in sentence
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--data-path", "absent.h5ad"], ["absent.h5ad"]),
        (["--data-root", "absent"], ["absent"]),
        (["--cell-types", "b cell"], ["Monocyte", "macrophage"]),
        (["--cell-type-column", "kind"], ["kind"]),
        (["--min-median-tokens", "1000"], ["1000"]),
    ],
)
def test_a_mistake_gives_one_sentence_and_no_results(
    template: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: list[str]
):
    sentence = refusal(capsys, steer(template, tmp_path / "out", *flags))
    assert all(word in sentence for word in words), sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "pseudotime",
    [[0.5] * 14, [0.0, *[1.0] * 13], [float("inf"), *range(13)], [None] * 14],
    ids=["equal", "one early cell", "infinite", "none"],
)
def test_a_pseudotime_without_two_ends_is_refused(
    own: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str], pseudotime: list
):
    metadata = json.loads((own.root / "cell_metadata.json").read_text())
    write_metadata(own, metadata | {"pseudotime": pseudotime})
    refusal(capsys, steer(own, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_missing_flags_are_named_with_their_variable(
    template: Study, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    for variable in ("SAE_DATA_ROOT", "SAE_IMMUNE_H5AD"):
        monkeypatch.delenv(variable, raising=False)
    assert "SAE_DATA_ROOT" in refusal(capsys, script.main([]))
    assert "SAE_IMMUNE_H5AD" in refusal(capsys, script.main(["--data-root", str(template.root)]))
