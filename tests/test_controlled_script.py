"""controlled_steering.py from the command line to its files, its check and its mistakes."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pytest

import controlled_steering as script
import make_figures
from cellcircuits import manifest, results
from cellcircuits.cell_rows import draw_rows
from cellcircuits.controlled_design import Study as ControlledStudy
from cellcircuits.maturity_probe import kept_probe
from conftest import Study, write_study

N_CELLS, N_TAKEN = 66, 44
EARLY, LATE = [f"GENE{i}" for i in range(0, 20)], [f"GENE{i}" for i in range(20, 40)]


def write_controlled_study(root: Path) -> Study:
    """Cells with types, donors and a pseudotime for those that a run takes, and marker genes."""
    study = write_study(root, n_cells=N_CELLS)
    adata = anndata.read_h5ad(study.cells)
    adata.obs["cell_type"] = ["Monocyte" if i % 2 else "macrophage" for i in range(N_CELLS)]
    adata.obs["tissue_in_publication"] = ["Blood"] * N_CELLS
    adata.obs["donor"] = [f"d{i % 7}" for i in range(N_CELLS)]
    adata.write_h5ad(study.cells)
    for folder, rows in ((root, draw_rows(np.arange(N_CELLS), N_TAKEN, N_TAKEN, 42)), (root / "all", range(N_CELLS))):
        write_pseudotime(folder, adata, rows)
    (root / "markers.json").write_text(json.dumps({"early": EARLY, "late": [*LATE, "NONE"]}))
    return study


def write_pseudotime(folder: Path, adata: anndata.AnnData, rows) -> None:
    folder.mkdir(exist_ok=True)
    content = {
        "pseudotime": [0.3 * (row % 2) + row / 200 for row in rows],
        "cell_types": [adata.obs["cell_type"].iloc[row] for row in rows],
        "tissues": ["Blood"] * len(rows),
        "cell_ids": [str(adata.obs_names[row]) for row in rows],
    }
    (folder / "cell_metadata.json").write_text(json.dumps(content))


def flags_of(study: Study, out_dir: Path, *more: str) -> list[str]:
    return [
        "--model", str(study.model), "--data-root", str(study.data_root), "--data-path", str(study.cells),
        "--traj-dir", str(study.root), "--n-cells", str(N_TAKEN), "--min-median-tokens", "5", "--device", "cpu",
        "--layers", "1,5", "--n-on", "2", "--n-off", "2", "--draws", "2", "--doses", "0.1,0.5", "--alphas", "5",
        "--markers", str(study.root / "markers.json"), "--probe-labels", "macrophage", "monocyte",
        "--out-dir", str(out_dir), *more,
    ]  # fmt: skip


def steer(study: Study, out_dir: Path, *more: str) -> int:
    return script.main(flags_of(study, out_dir, *more))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Inputs that no test may change."""
    return write_controlled_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def finished(template: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run that no test may change."""
    out_dir = tmp_path_factory.mktemp("finished") / "run"
    assert steer(template, out_dir) == 0
    return out_dir


def summary_of(out_dir: Path) -> dict:
    return json.loads((out_dir / "steering_tests.json").read_text())


def files_in(out_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out_dir.glob("*.json") if path.name not in ("manifest.json",)}


def refusal(capsys: pytest.CaptureFixture[str], study: Study, out_dir: Path, *more: str) -> str:
    assert steer(study, out_dir, *more) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and not out_dir.exists()
    return message


def test_the_files_of_a_run(finished: Path):
    declaration = json.loads((finished / "declaration.json").read_text())
    tests = summary_of(finished)
    switches = json.loads((finished / "switch_features.json").read_text())
    assert {f"F{x['idx']}_L{x['layer']}" for x in switches} == set(tests["features_steered"])
    assert set(declaration["panel"]) == set(tests["features_steered"]) and len(switches) == 8
    assert all((finished / f"controlled_{name}.json").is_file() for name in declaration["panel"])
    settings = json.loads((finished / "manifest.json").read_text())["settings"]
    primary = settings["primary"]
    assert declaration["primary"] == primary and {key: tests["primary"][key] for key in primary} == primary
    assert primary["dose"] == {"norm": 0.5, "alpha": None}
    assert tests["layers"]["5"]["analytic"] and not tests["layers"]["1"]["analytic"]
    assert tests["markers"]["unknown_to_the_model"] == ["NONE"] and len(tests["markers"]["early"]) == 20
    assert [f["dose"]["alpha"] for f in tests["features"][:3]] == [None, None, 5.0]
    probe = kept_probe(finished / "probe.npz", manifest.settings_fingerprint(settings))
    assert probe.facts() == {key: tests["probe"][key] for key in probe.facts()}
    assert not (finished / "partial").exists()


def test_no_cell_is_used_twice(template: Study, finished: Path):
    """First half, steered cells and probe cells have nothing in common; the first half has its own thirds."""
    halves = summary_of(finished)["halves"]
    content = json.loads((template.root / "cell_metadata.json").read_text())
    probe = set(np.load(finished / "probe.npz")["cell_ids"].tolist())
    steered = set(json.loads(next(finished.glob("controlled_*.json")).read_text())["steered_cells"])
    assert not probe & set(content["cell_ids"]) and len(probe) == N_CELLS - N_TAKEN
    assert steered <= set(content["cell_ids"]) and len(steered) == halves["n_steered"] == halves["n_second_early"]
    assert halves["n_first"] + halves["n_second"] == N_TAKEN
    first = np.load(finished / "first_half.npz")
    assert len(first["transformed"]) == halves["n_first"]


def test_a_second_start_changes_nothing_and_a_lost_file_comes_back(template: Study, finished: Path, tmp_path: Path):
    out_dir = tmp_path / "run"
    shutil.copytree(finished, out_dir)
    before = files_in(out_dir)
    assert steer(template, out_dir) == 0
    assert files_in(out_dir) == before
    for name in ("first_half.npz", "probe.npz", "declaration.json", "switch_features.json", "steering_tests.json"):
        (out_dir / name).unlink()
    next(out_dir.glob("controlled_*.json")).unlink()
    assert steer(template, out_dir) == 0
    assert files_in(out_dir) == before


def test_analysis_only_makes_the_tests_again(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out_dir = tmp_path / "run"
    shutil.copytree(finished, out_dir)
    (out_dir / "steering_tests.json").unlink()
    assert script.main(["--analysis-only", "--out-dir", str(out_dir)]) == 0
    assert files_in(out_dir) == files_in(finished)
    assert "primary: probe log-odds" in capsys.readouterr().out
    (out_dir / "declaration.json").write_text("{}")
    assert script.main(["--analysis-only", "--out-dir", str(out_dir)]) == 2
    assert "declaration.json: is missing, damaged or of another run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage",
    [lambda dose: dose["feature"].update(probe="x"), lambda dose: dose["feature"].update(probe=["a"] * 99),
     lambda dose: dose["feature"].update(markers=[1.0]), lambda dose: dose.update(controls=[]),
     lambda dose: dose["controls"]["random_direction"][0].pop("signature")],
)  # fmt: skip
def test_a_damaged_record_is_said_not_counted_and_made_again(
    damage, template: Study, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    out_dir = tmp_path / "run"
    shutil.copytree(finished, out_dir)
    path = sorted(out_dir.glob("controlled_*.json"))[0]
    content = json.loads(path.read_text())
    damage(content["doses"][1])
    path.write_text(json.dumps(content))
    assert script.main(["--analysis-only", "--out-dir", str(out_dir)]) == 0
    assert f"{path} is damaged" in caplog.text and summary_of(out_dir)["n_features"] == 7
    assert steer(template, out_dir) == 0
    assert files_in(out_dir) == files_in(finished)


@pytest.mark.parametrize("key", ["primary", "doses", "layers", "halves"])
def test_a_damaged_declaration_is_said_in_words(key: str, finished: Path, tmp_path: Path, capsys):
    out_dir = tmp_path / "run"
    shutil.copytree(finished, out_dir)
    path = out_dir / "declaration.json"
    content = json.loads(path.read_text())
    del content[key]
    path.write_text(json.dumps(content))
    assert script.main(["--analysis-only", "--out-dir", str(out_dir)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and "declaration.json or a record is damaged" in line
    path.unlink()
    assert script.main(["--analysis-only", "--out-dir", str(out_dir)]) == 2
    assert "declaration.json: is missing" in capsys.readouterr().err


def test_the_figure(finished: Path, tmp_path: Path):
    out_dir = tmp_path / "run"
    shutil.copytree(finished, out_dir)
    assert make_figures.main(["--out-dir", str(out_dir)]) == 0
    assert (out_dir / "controlled_steering.png").stat().st_size > 10_000
    (out_dir / "steering_tests.json").write_text('{"primary": 1}')
    assert make_figures.main(["--out-dir", str(out_dir)]) == 2


def test_check_says_what_would_run_and_writes_nothing(
    template: Study, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from cellcircuits import probe

    monkeypatch.setattr(probe, "PROBE_SECONDS", 0.2)
    assert steer(template, tmp_path / "run", "--check") == 0
    said = capsys.readouterr().out
    assert "at most 8 to steer, of layers 1, 5; 0 are there" in said and "21 per feature: 3 doses" in said
    assert "steered passes" in said and "Nothing was run or written." in said
    assert not (tmp_path / "run").exists()
    shutil.copytree(finished, tmp_path / "run")
    next((tmp_path / "run").glob("controlled_*_L1.json")).unlink()
    before = files_in(tmp_path / "run")
    assert steer(template, tmp_path / "run", "--check") == 0
    said = capsys.readouterr().out
    assert "at most 4 to steer, of layers 1; " in said and "clean passes of the first half" not in said
    assert files_in(tmp_path / "run") == before


def test_a_panel_of_ones_own_is_not_called_chosen_here(template: Study, tmp_path: Path):
    panel = [{"layer": 1, "idx": 0, "d": 1.0}, {"layer": 2, "idx": 4, "d": -2.0}, {"layer": 4, "idx": 3}]
    (tmp_path / "mine.json").write_text(json.dumps(panel))
    out_dir = tmp_path / "run"
    assert steer(template, out_dir, "--panel", str(tmp_path / "mine.json"), "--alphas", "none") == 0
    tests = summary_of(out_dir)
    assert "mine.json, not chosen here" in tests["halves"]["features"]
    assert [f["kind"] for f in tests["features"]] == ["ON", "ON", "OFF", "OFF", None, None]
    assert tests["primary"]["p"] is None and tests["primary"]["reason"]
    assert not (out_dir / "switch_features.json").exists()


def test_donors_are_parted_as_a_whole(template: Study, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    out_dir = tmp_path / "run"
    assert (
        steer(template, out_dir, "--donor-column", "donor", "--n-steered", "3", "--doses", "0.5", "--alphas", "none")
        == 0
    )
    assert "only 3 cells are steered, and a feature counts in a contrast from 5 on" in caplog.text
    donor = anndata.read_h5ad(template.cells).obs["donor"]
    record = json.loads(next(out_dir.glob("controlled_*.json")).read_text())
    tests = summary_of(out_dir)
    assert len(record["steered_cells"]) == 3 and "whole donors of donor" in tests["halves"]["parted"]
    assert len({donor[name] for name in record["steered_cells"]}) >= 1
    assert tests["probe"]["auc"] is not None


def test_mistakes(template: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, root = tmp_path / "run", tmp_path

    def said(*more: str) -> str:
        return refusal(capsys, template, out, *more)

    assert "no dose is left" in said("--doses", "none", "--alphas", "none")
    assert "changes nothing" in said("--doses", "0,0.1")
    assert "changes nothing" in said("--alphas", "1,2")
    assert "--layers 9: this model has 6 blocks" in said("--layers", "1,9")
    assert "--probe-data-path" in said("--probe-data-path", str(root / "none.h5ad"))
    assert "obs has no column 'nobody'" in said("--donor-column", "nobody")
    assert "of one donor" in said("--donor-column", "tissue_in_publication")
    assert "named as early and as late" in said("--probe-labels", "monocyte", "Monocyte")
    (root / "markers.json").write_text('{"early": ["GENE1"], "late": ["NOBODY"]}')
    sentence = said("--markers", str(root / "markers.json"))
    assert "none of the late markers" in sentence and sentence.endswith("(--markers).")
    all_cells = ("--n-cells", str(N_CELLS), "--traj-dir", str(template.root / "all"))
    assert "none is left for the probe" in said(*all_cells)
    for check in ((), ("--check",)):  # before anything is run
        sentence = said("--probe-labels", "monocite", "macrophage", *check)
        assert "has 0 early and" in sentence and "their types: " in sentence and "Monocyte (" in sentence
        assert "the probe has" in said("--probe-cells", "4", *check)
    sentence = said("--probe-filter", "nobody=1")
    assert sentence.startswith("error: cells for the probe: ") and "--probe-filter" in sentence


def test_a_mistyped_label_beside_a_right_one_is_said(template: Study, tmp_path: Path, caplog):
    assert steer(template, tmp_path / "run", "--probe-labels", "macrophage;monocite", "monocyte", "--check") == 0
    assert "no probe cell is of type monocite" in caplog.text


@pytest.mark.parametrize(
    ("doses", "primary"),
    [((-0.5, 0.1, 0.5), {"norm": 0.5, "alpha": None}), ((-0.5, 0.1), {"norm": -0.5, "alpha": None}),
     ((), {"norm": None, "alpha": 3.0})],
)  # fmt: skip
def test_of_two_doses_as_large_the_primary_test_takes_the_one_above(doses, primary):
    args = SimpleNamespace(doses=doses, alphas=(-1.0, 3.0))
    assert asdict(ControlledStudy.largest_dose(None, args)) == primary


def test_probe_cells_are_others_whatever_the_file_calls_or_counts_them(template: Study, tmp_path: Path):
    """A copy of the file with other genes has other tokens, and the same cells by name."""
    adata = anndata.read_h5ad(template.cells)
    adata[:, 5:].copy().write_h5ad(tmp_path / "copy.h5ad")
    assert steer(template, tmp_path / "run", "--probe-data-path", str(tmp_path / "copy.h5ad")) == 0
    content = json.loads((template.root / "cell_metadata.json").read_text())
    probe = set(np.load(tmp_path / "run" / "probe.npz")["cell_ids"].tolist())
    assert probe and not probe & set(content["cell_ids"])


def test_another_run_s_folder_is_refused(template: Study, finished: Path, tmp_path: Path, capsys):
    out_dir = tmp_path / "run"
    shutil.copytree(finished, out_dir)
    assert steer(template, out_dir, "--draws", "3") == 2
    assert "draws is 2 there and 3 here" in capsys.readouterr().err
    (out_dir / "manifest.json").unlink()
    assert steer(template, out_dir) == 2
    assert "without a manifest.json" in capsys.readouterr().err


def test_names_of_half_written_files_are_known():
    for name in (
        "controlled_F25_L0.json", "steering_tests.json", "declaration.json", "first_half.npz", "probe.npz",
        "controlled_steering.png", "switch_features.json",
    ):  # fmt: skip
        assert results.HALF_WRITTEN.fullmatch(f".{name}.123.0a1b2c3d.tmp")
