"""The main figures: what they draw, that it is drawn, and how they look on planted results.

    PYTHONPATH=src:tests python tests/test_main_figures.py

draws the images to compare with anew; look at them before they are committed.
"""

import csv
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

import make_figures
from cellcircuits import main_figures
from cellcircuits.errors import UserError
from cellcircuits.figures.style import PAGE, Point, as_csv, styled
from cellcircuits.kept_results import Results
from cellcircuits.main_figures import FIGURES, draw_all, figure_of, tables, text_hash
from results_fixtures import N_CHOSEN, N_FEATURES, NAME, change, write_results

BASELINE = Path(__file__).parent / "baseline"
DPI = 40
BLOCK = 20  # pixels: lines that another matplotlib sets a little off stay in their block
TOLERANCE = 0.4  # of the difference from an empty image; matplotlib 3.9 and 3.11 differ by up to 0.32


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return write_results(tmp_path_factory.mktemp("figures") / "results")


def drawn(name: str, results: Results) -> Figure:
    return figure_of(name, FIGURES[name].points(results), results.inputs_name)


def save_without_text(figure: Figure, path: Path) -> None:
    """Save what is drawn, laid out as with its text, which every matplotlib renders in its own way."""
    with styled():
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for text in figure.findobj(Text):
            text.set_color("none")
        figure.savefig(path, dpi=DPI)


def blocks(path: Path) -> np.ndarray:
    """Mean grey of every whole block of an image, 0 to 1."""
    grey = imread(path)[..., :3].mean(axis=-1)
    height, width = (BLOCK * (n // BLOCK) for n in grey.shape)
    return grey[:height, :width].reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK).mean(axis=(1, 3))


@pytest.mark.parametrize("name", FIGURES)
class TestEveryFigure:
    def test_it_looks_as_it_did(self, name: str, results: Results, tmp_path: Path):
        save_without_text(drawn(name, results), tmp_path / "now.png")
        now, then = blocks(tmp_path / "now.png"), blocks(BASELINE / f"{name}.png")
        assert now.shape == then.shape
        assert ((now - then) ** 2).mean() < TOLERANCE**2 * ((1 - then) ** 2).mean()

    def test_it_says_which_inputs_it_is_of_and_fits_the_page(self, name: str, results: Results):
        figure = drawn(name, results)
        assert figure.get_suptitle().startswith(f"{NAME}: ")
        assert figure.get_figwidth() == PAGE and figure.get_figheight() < 9
        assert all(axes.get_title(loc="left") for axes in figure.axes)
        assert all(axes.has_data() for axes in figure.axes)

    def test_no_text_is_cut_or_tiny(self, name: str, results: Results):
        figure = drawn(name, results)
        with styled():
            figure.draw_without_rendering()
        page = figure.bbox.padded(1)
        for axes in figure.axes:  # with all that is drawn beside them
            assert all(page.contains(*corner) for corner in axes.get_tightbbox().corners())
        assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 6

    def test_it_does_not_change_the_numbers(self, name: str, results: Results):
        points = FIGURES[name].points(results)
        figure_of(name, points, NAME)
        assert points == FIGURES[name].points(results)


class TestPoints:
    def test_overview_has_every_feature_and_layer(self, results: Results):
        points = FIGURES["figure1_overview"].points(results)
        assert sum(p.y for p in points if p.series == "histogram") == N_FEATURES
        assert {p.name for p in points if p.panel.startswith("b")} == {f"all {N_FEATURES}", f"{N_CHOSEN} chosen"}
        assert sum(p.panel.startswith("c") for p in points) == 6
        assert all(p.low <= p.y <= p.high for p in points if p.panel[0] in "bc")

    def test_hubs_are_those_with_most_edges(self, results: Results):
        points = FIGURES["figure2_hubs"].points(results)
        top = [p.y for p in points if p.panel == "b top"]
        ranked = sorted((p.y for p in points if p.panel == "a rank"), reverse=True)
        assert len(ranked) == N_FEATURES and top == ranked[:20]
        assert sum(p.series == "annotated" for p in points if p.panel == "a rank") == N_FEATURES / 5

    def test_redundancy_has_both_ratios_of_every_combination(self, results: Results):
        points = FIGURES["figure3_redundancy"].points(results)
        ratios = [p for p in points if p.panel == "a ratio"]
        for series in ("observed", "exactly additive effects, same cells"):
            assert sum(p.series == series for p in ratios) == 24 + 6
        theory = [p.y for p in ratios if p.series == "independent and equal effects"]
        assert theory == pytest.approx([2**-0.5, 3**-0.5])

    def test_controls_have_both_sides_of_every_comparison(self, results: Results):
        points = FIGURES["figure7_controls"].points(results)
        thresholds = {(p.series, p.x): p.y for p in points if p.panel == "a threshold" and p.y is not None}
        assert {d for _, d in thresholds} == {0.3, 0.5, 1.0} and len(thresholds) == 9  # of one consistency
        for d, share in ((0.3, 0.3), (0.5, 0.04), (1.0, 0.0)):
            assert thresholds["share expected by chance", d] == share
            assert thresholds["expected by chance", d] == pytest.approx(share * thresholds["observed", d])
        assert [p.y for p in points if p.series == "by edges of a feature"] == pytest.approx([0.06, 0.05, 0.04, 0.03])
        assert sum(p.series == "number of edges" for p in points) == 4
        assert {p.x for p in points if p.series == "random targets, as many"} == {0.1}
        steered = [p for p in points if p.panel.startswith("e ")]
        found = {(p.panel[12:], p.name, p.series): (p.x, p.low, p.high) for p in steered}
        assert len(found) == len(steered) == 3 * 3 * 2
        # of the larger of two doses, one of two controls, all layers and not one
        assert found["probe", "rising minus falling", "the declared contrast"] == pytest.approx((0.5, 0.2, 0.8))
        assert found["markers", "features that rise", "measured"] == pytest.approx((0.03, 0.0, 0.06))
        beyond = found["signature", "features that fall", "beyond the direct path"]
        assert beyond == pytest.approx((-1e-5, -3e-5, 1e-5))

    @pytest.mark.parametrize(
        "file, n_panels", [("specificity/specificity.json", 2), ("controlled_steering/steering_tests.json", 3)]
    )
    def test_controls_that_were_not_run_are_said(self, tmp_path: Path, file: str, n_panels: int):
        results = write_results(tmp_path)
        (tmp_path / file).unlink()
        figure = drawn("figure7_controls", results)
        said = [text.get_text() for axes in figure.axes for text in axes.texts]
        assert said.count("not measured") == n_panels

    def test_a_contrast_of_too_few_features_leaves_a_remark(self, tmp_path: Path):
        results = write_results(tmp_path)
        file = tmp_path / "controlled_steering/steering_tests.json"
        content = json.loads(file.read_text())
        for row in content["contrasts"]:
            if row["contrast"] == "OFF":
                row.update(dict.fromkeys(("estimate", "low", "high", "excess_estimate", "excess_low", "excess_high")))
        file.write_text(json.dumps(content))
        figure = drawn("figure7_controls", results)
        assert [text.get_text() for axes in figure.axes for text in axes.texts].count("too few") == 3

    def test_a_trace_without_an_edge_can_be_drawn(self, tmp_path: Path):
        results = write_results(tmp_path)
        change(tmp_path, "exhaustive_tracing/calibration.json", "published_rule_by_degree", to=[])
        change(tmp_path, "exhaustive_tracing/calibration.json", "published_rule", "fdr", to=None)
        change(tmp_path, "exhaustive_tracing/calibration.json", "sweep", to=[])
        figure = drawn("figure7_controls", results)
        said = [text.get_text() for axes in figure.axes for text in axes.texts]
        assert "no edge at any threshold" in said and "no feature has an edge" in said

    def test_the_claims_are_apart(self, results: Results):
        figure = drawn("figure6_summary", results)
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in figure.axes[2].texts if len(text.get_text()) > 1]
        assert len(boxes) > 15 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])

    def test_an_analysis_that_was_not_run_is_said(self, tmp_path: Path):
        results = write_results(tmp_path)
        for folder in ("pairwise_ablation", "higher_order_ablation"):
            (tmp_path / folder / "additivity.json").unlink()
        figure = drawn("figure3_redundancy", results)
        assert "not measured" in [text.get_text() for axes in figure.axes for text in axes.texts]

    def test_a_changed_number_changes_the_table(self, tmp_path: Path):
        results = write_results(tmp_path)
        before = tables(results)
        place = ("features", 4, "alpha_results", "2.0", "mean_state_shift")
        change(tmp_path, "trajectory_steering/summary.json", *place, to=0.5)
        changed = {name for name, text in tables(results).items() if text != before[name]}
        assert changed == {"figure4_steering.csv", "figure6_summary.csv"}  # the claim on dose changes as well

    def test_a_table_is_a_table(self):
        text = as_csv([Point("a", 's"x', "n,1", 1 / 3, None, -1.0)], NAME)
        header, row = csv.reader(text.splitlines())
        assert dict(zip(header, row, strict=True)) == {
            "inputs": NAME, "panel": "a", "series": 's"x', "name": "n,1", "x": "0.333333333", "y": "", "low": "-1",
            "high": "",
        }  # fmt: skip


class TestScript:
    def test_files_are_the_same_bytes_every_time(self, results: Results, tmp_path: Path, monkeypatch):
        names = ["figure3_redundancy", "figure5_genes"]  # all would take long
        monkeypatch.setattr(main_figures, "FIGURES", {name: FIGURES[name] for name in names})
        for folder in ("one", "two"):
            draw_all(results, tmp_path / folder)
        one, two = ({p.name: p.read_bytes() for p in (tmp_path / f).iterdir()} for f in ("one", "two"))
        assert one == two
        assert set(one) - {".lock"} == {f"{name}{suffix}" for name in names for suffix in (".pdf", ".png", ".csv")}
        for name in names:
            made_from = text_hash(one[f"{name}.csv"].decode()).encode()
            assert one[f"{name}.pdf"].startswith(b"%PDF") and made_from in one[f"{name}.pdf"]
            assert made_from in one[f"{name}.png"]

    def test_what_a_killed_run_left_is_tidied(self, results: Results, tmp_path: Path, monkeypatch):
        monkeypatch.setattr(main_figures, "FIGURES", {})
        for name in ("figure1_overview.pdf", "figure2_hubs.csv"):
            (tmp_path / f".{name}.123.0a1b2c3d.tmp").touch()
        draw_all(results, tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {".lock"}

    def test_a_check_counts_and_writes_nothing(self, results: Results, tmp_path: Path, capsys):
        out = tmp_path / "out"
        assert make_figures.main(["--results", str(results.folder), "--out-dir", str(out), "--check"]) == 0
        assert "7 figures of" in capsys.readouterr().out and not out.exists()

    @pytest.mark.parametrize(
        "file",
        [
            "exhaustive_tracing/features.parquet",
            "exhaustive_tracing/edges_by_layer.json",
            "trajectory_steering/summary.json",
        ],
    )
    def test_a_missing_input_fails_with_its_name(self, tmp_path: Path, file: str, capsys):
        write_results(tmp_path / "results")
        (tmp_path / "results" / file).unlink()
        assert make_figures.main(["--results", str(tmp_path / "results"), "--out-dir", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert Path(file).name in error and "Traceback" not in error and not (tmp_path / "out").exists()

    def test_a_malformed_input_fails_with_its_field(self, tmp_path: Path):
        results = write_results(tmp_path)
        change(tmp_path, "trajectory_steering/summary.json", "features", 3, "layer", to=None)
        with pytest.raises(UserError, match=r"summary\.json: features\[3\]\.layer"):
            FIGURES["figure4_steering"].points(results)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        planted = write_results(Path(folder))
        for figure_name in FIGURES:
            save_without_text(drawn(figure_name, planted), BASELINE / f"{figure_name}.png")
