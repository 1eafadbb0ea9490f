"""The figure of calibration.json shows its numbers, also where there are few or none."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import make_figures
from cellcircuits.calibration_figures import calibration_figure
from cellcircuits.edge_fdr import CalibrationSettings, PCounts, graph_calibration
from cellcircuits.stats import EdgeRule
from conftest import Study
from test_tracing_script import refusal, trace


@pytest.fixture(scope="module")
def finished(study_template: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace that no test may change."""
    out_dir = tmp_path_factory.mktemp("finished")
    assert trace(study_template, out_dir, "--sign-flips", "200") == 0
    return out_dir


def figure_of(out_dir: Path):
    return dict((path.name, figure) for path, figure in make_figures.figures_of(out_dir))["calibration.png"]


def test_every_panel_shows_what_the_files_say(finished: Path):
    content = json.loads((finished / "calibration.json").read_text())
    left, middle, right = figure_of(finished).axes
    lines = {line.get_label(): line for line in left.get_lines()}
    rows = [row for row in content["sweep"] if row["min_consistency"] == 0.7]
    for label, key in (("observed", "edges"), ("expected by chance", "expected_null_edges")):
        drawn = lines[f"{label}, sign consistency > 0.7"]
        assert drawn.get_xdata().tolist() == [row["min_abs_d"] for row in rows]
        np.testing.assert_array_equal(drawn.get_ydata(), [row[key] or np.nan for row in rows])
    assert left.get_yscale() == "log"
    assert f"FDR {rows[1]['fdr']:.1%}" in {text.get_text() for text in left.texts}
    strata = content["published_rule_by_degree"]
    (dots,) = (line for line in middle.get_lines() if line.get_label() == "by degree, 95% interval")
    assert dots.get_ydata().tolist() == [stratum["fdr"] for stratum in strata]
    spans = [collection.get_segments()[0][:, 1].tolist() for collection in middle.collections]
    assert spans == [[stratum["fdr_low"], stratum["fdr_high"]] for stratum in strata]
    traced = [row for row in pq.read_table(finished / "features.parquet").to_pylist() if row["is_traced"]]
    kept, few = (collection.get_offsets().tolist() for collection in right.collections)
    assert kept == [[r["n_edges"], r["degree_calibrated"]] for r in traced if r["degree_calibrated"] is not None]
    assert [x for x, _ in few] == [row["n_edges"] for row in traced if row["degree_calibrated"] is None]
    assert max(y for _, y in few) < 0 and "fewer than 8 cells" in right.get_legend().get_texts()[-1].get_text()
    identity = next(line for line in right.get_lines() if line.get_label() == "all edges kept")
    assert list(identity.get_xdata()) == list(identity.get_ydata())


def test_both_pictures_are_drawn(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out_dir = Path(shutil.copytree(finished, tmp_path / "out"))
    assert make_figures.main(["--out-dir", str(out_dir), "--check"]) == 0
    assert f"3 panels to write as {out_dir / 'calibration.png'}" in capsys.readouterr().out
    assert make_figures.main(["--out-dir", str(out_dir)]) == 0
    said = capsys.readouterr().out
    for name in ("calibration.png", "exhaustive_tracing.png"):
        assert (out_dir / name).read_bytes().startswith(b"\x89PNG") and f"Figure: {out_dir / name}" in said


@pytest.mark.parametrize(
    "flags", [["--features", "4"], ["--n-cells", "1", "--end-idx", "4"]], ids=["no edge", "one cell"]
)
def test_where_there_is_nothing_to_draw_it_says_so(study_template: Study, tmp_path: Path, flags: list[str]):
    assert trace(study_template, tmp_path, *flags) == 0
    left, middle, right = figure_of(tmp_path).axes
    said = [text.get_text() for axes in (left, middle) for text in axes.texts]
    assert said[-1] == "no feature has an edge" and len(right.collections) >= 1
    assert make_figures.main(["--out-dir", str(tmp_path)]) == 0


def test_an_empty_trace():
    content = graph_calibration([], PCounts().q_values(), CalibrationSettings())
    figure = calibration_figure("Layer 5", content, EdgeRule(), np.zeros(0), np.zeros(0))
    assert [axes.texts[0].get_text() for axes in figure.axes] == [
        "no edge at any threshold", "no feature has an edge", "no feature was traced",
    ]  # fmt: skip


@pytest.mark.parametrize("damage", ["no file", "no table", "other rows", "text for a number"])
def test_a_damaged_file_is_one_sentence(finished: Path, tmp_path: Path, damage: str, capsys):
    out_dir = Path(shutil.copytree(finished, tmp_path / "out"))
    path = out_dir / "calibration.json"
    content = json.loads(path.read_text())
    if damage == "no table":
        del content["sweep"]
    elif damage == "other rows":
        content["sweep"] = [{"edges": 3}]
    elif damage == "text for a number":
        content["published_rule"]["fdr"] = "much"
    path.write_text(json.dumps(content))
    if damage == "no file":
        path.unlink()
    assert str(path) in refusal(capsys, make_figures.main(["--out-dir", str(out_dir)]))
    assert not (out_dir / "exhaustive_tracing.png").exists()
