"""specificity_controls.py end to end on small inputs: numbers, files, resume, and a user's mistakes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import exhaustive_feature_tracing
import make_figures
import specificity_controls as script
from cellcircuits import plan_report, probe, tracing
from cellcircuits.edge_fdr import unpacked
from cellcircuits.effects import Bench
from cellcircuits.specificity import CONTROLS
from conftest import Study, random_sae, write_sae
from test_check import check, work
from test_tracing_script import refusal, without_times

SUMMARY_KEYS = {
    "edges_mean", "calibrated_mean", "edge_ratio", "edge_ratio_low", "edge_ratio_high", "jaccard_mean", "jaccard_low",
    "jaccard_high", "jaccard_expected", "effect_cosine_mean", "wilcoxon_p", "wilcoxon_q", "n_features", "reason",
}  # fmt: skip
Q = ("wilcoxon_q", "wilcoxon_q_published")  # missing where their p is
N_ROWS = 1 + 4 * 2


def flags(study: Study, trace_dir: Path, out_dir: Path, *more: str) -> list[str]:
    return [
        "--trace-dir", str(trace_dir), "--model", str(study.model), "--data-root", str(study.data_root),
        "--data-path", str(study.cells), "--cells", "all", "--n-cells", "12", "--min-median-tokens", "5",
        "--device", "cpu", "--out-dir", str(out_dir), "--draws", "2", "--min-active-cells", "2", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def traced(study_template: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trace of a few features, which no test may change."""
    out_dir = tmp_path_factory.mktemp("trace")
    how = ["--end-idx", "9", "--sign-flips", "400", "--min-active-cells", "2"]
    assert exhaustive_feature_tracing.main([*study_template.flags(out_dir), *how]) == 0
    return out_dir


@pytest.fixture(scope="module")
def finished(study_template: Study, traced: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its controls, undisturbed, which no test may change."""
    out_dir = tmp_path_factory.mktemp("finished")
    assert script.main(flags(study_template, traced, out_dir)) == 0
    return out_dir


def records(out_dir: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(out_dir.glob("specificity_*.json"))]


def summary(out_dir: Path) -> dict:
    return json.loads((out_dir / "specificity.json").read_text())


def test_the_ablations_are_those_of_the_trace(traced: Path, finished: Path):
    """All its features are measured, so that the family of tests is the same, too."""
    features = pq.read_table(traced / "features.parquet").to_pylist()
    edges = pq.read_table(traced / "edges.parquet").to_pandas()
    rows = [row for row in features if row["is_traced"] and row["n_cells_active"] >= 2]
    of_run = summary(finished)["features"]
    assert [row["feature_idx"] for row in of_run] == [row["feature"] for row in rows] and len(rows) > 2
    for row, mine, record in zip(rows, of_run, records(finished), strict=True):
        assert mine["n_edges"] == row["n_edges"] and mine["n_edges_calibrated"] == row["degree_calibrated"]
        assert record["real"]["n_live_targets"] == row["n_live_targets"]
        assert record["n_edges_not_as_traced"] == 0 and record["n_cells_active"] == row["n_cells_active"]
        assert (record["label"], record["activation_freq"]) == (row["label"], row["activation_freq"])
        of_feature = edges[edges.source == row["feature"]]
        columns = 40 * of_feature.target_layer.map({2: 0, 4: 1, 5: 2}) + of_feature.target
        assert unpacked(record["real"]["tests"]["edges"])[0].tolist() == sorted(columns)


def test_files_have_the_agreed_form(finished: Path):
    found = summary(finished)
    assert found["n_draws"] == 2 and found["source_layer"] == 1 and found["n_features"] == len(records(finished))
    assert list(found["controls"]) == list(CONTROLS)
    for name, control in found["controls"].items():
        assert control.keys() >= SUMMARY_KEYS
        rows = [row["controls"][name] for row in found["features"]]
        assert control["edges_mean"] == pytest.approx(np.mean([row["edges_mean"] for row in rows]))
        assert control["edge_ratio"] == pytest.approx(found["real"]["edges_mean"] / control["edges_mean"])
        own = [row["n_edges"] > row["controls"][name]["edges_mean"] for row in found["features"]]
        assert control["n_features_more_edges"] == sum(own)
        assert control["jaccard_low"] <= control["jaccard_mean"] <= control["jaccard_high"]
    others = [draw["feature_idx"] for record in records(finished) for draw in record["controls"]["other_feature"]]
    assert len(set(others[:2])) == 2 and not {record["feature_idx"] for record in records(finished)} & {3}
    assert json.loads((finished / "progress.json").read_text()) == {
        "n_features": found["n_features"],
        "n_features_done": found["n_features"],
    }
    assert not list(finished.rglob("*.npz")) and not list(finished.rglob("*.tmp"))


def test_the_report_says_it_in_words(finished: Path, capsys: pytest.CaptureFixture[str]):
    before = without_times(finished)
    assert script.main(["--out-dir", str(finished), "--analysis-only"]) == 0
    printed = capsys.readouterr().out
    assert (
        f"Layer 1: {len(records(finished))} features, each removed" in printed and "two different features" in printed
    )
    assert without_times(finished) == before


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_features_give_numbers_or_reasons(n: int, finished: Path, tmp_path: Path, capsys):
    """Strict JSON, and every missing value beside its reason; the figure says what there is."""
    out_dir = shutil.copytree(finished, tmp_path / "out")
    for path in sorted(out_dir.glob("specificity_*.json"))[n:]:
        path.unlink()
    assert script.main(["--out-dir", str(out_dir), "--analysis-only"]) == 0
    assert f"Layer 1: {n} features" in capsys.readouterr().out
    found = summary(out_dir)
    real = {key: value for key, value in found["real"].items() if key != "between_features"}
    assert (real["edges_mean"] is None) == (real["reason"] is not None) == (n == 0)
    for content in (*found["controls"].values(), found["specific"], found["real"]["between_features"]):
        missing = [key for key, value in content.items() if value is None and key not in ("reason", *Q)]
        assert all(key in (content["reason"] or "") for key in missing)
        assert bool(missing) == (content["reason"] is not None) and (missing or n > 1)
    if n:
        assert make_figures.main(["--out-dir", str(out_dir)]) == 0
    else:
        assert "holds no measured feature" in refusal(capsys, make_figures.main(["--out-dir", str(out_dir)]))


@pytest.mark.parametrize("setting", ["calibration", "draws", "controls", "seed"])
def test_a_damaged_manifest_is_said(setting: str, finished: Path, tmp_path: Path, capsys):
    out_dir = shutil.copytree(finished, tmp_path / "out")
    content = json.loads((out_dir / "manifest.json").read_text())
    del content["settings"][setting]
    (out_dir / "manifest.json").write_text(json.dumps(content))
    sentence = refusal(capsys, script.main(["--out-dir", str(out_dir), "--analysis-only"]))
    assert "manifest" in sentence


class Stop:
    """Interrupts the engine at its n-th call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
        self.left, real = n, Bench.push_effects

        def push_effects(bench, *args):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return real(bench, *args)

        monkeypatch.setattr(Bench, "push_effects", push_effects)


@pytest.mark.parametrize("n", [2, 16, 25])
def test_stopped_and_started_again_it_writes_the_same_bytes(
    n: int, study_template: Study, traced: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out_dir, words = tmp_path / "out", flags(study_template, traced, tmp_path / "out")
    with monkeypatch.context() as patch:
        Stop(patch, n)
        assert script.main(words) == 130
    kept = list(out_dir.glob("partial/specificity_*.npz"))
    assert len(kept) == 1 and not (out_dir / "specificity.json").exists()
    calls, real = [], tracing.trace_block
    monkeypatch.setattr(tracing, "trace_block", lambda *a, **b: calls.append(a[2].n_cells_done) or real(*a, **b))
    assert script.main(words) == 0
    assert calls[0] > 0 or n == 2
    assert without_times(out_dir) == without_times(finished)


def close(a, b) -> bool:
    """Equal, but for the last digits of numbers."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == pytest.approx(b, rel=1e-4, abs=1e-6) if isinstance(a, float) and isinstance(b, float) else a == b


def test_numbers_depend_neither_on_the_batch_nor_on_what_else_is_measured(
    study_template: Study, traced: Path, finished: Path, tmp_path: Path
):
    words = flags(study_template, traced, tmp_path / "out", "--batch-size", "2")
    first, *_, last = [record["feature_idx"] for record in records(finished)]
    assert script.main([*words, "--features", f"{last},{first}"]) == 0
    assert [record["feature_idx"] for record in records(tmp_path / "out")] == [first, last]
    assert script.main(words) == 0  # the others follow
    for mine, expected in zip(records(tmp_path / "out"), records(finished), strict=True):
        del mine["elapsed_seconds"], expected["elapsed_seconds"]
        assert close(mine, expected)
    assert close(summary(tmp_path / "out"), summary(finished))


def test_a_damaged_record_is_made_again(study_template: Study, traced: Path, finished: Path, tmp_path: Path, caplog):
    out_dir = shutil.copytree(finished, tmp_path / "out")
    (out_dir / "specificity_0002.json").write_text('{"feature_idx": 2')
    assert script.main(flags(study_template, traced, out_dir)) == 0
    assert "specificity_0002.json is damaged" in caplog.text
    assert without_times(out_dir) == without_times(finished)


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [("p", "numerators", "!!!"), ("p", "numerators", "aGVsbG8="), ("p", "denominator", 0), ("live", "numerators", "eA"),
     ("", "n_edges", "x"), ("", "effect_norm", "x")],
)  # fmt: skip
def test_a_record_with_other_values_is_said_in_words(where, key, value, finished: Path, tmp_path: Path, capsys):
    out_dir = shutil.copytree(finished, tmp_path / "out")
    path = out_dir / "specificity_0002.json"
    content = json.loads(path.read_text())
    (content["real"]["tests"][where] if where else content["real"])[key] = value
    path.write_text(json.dumps(content))
    sentence = refusal(capsys, script.main(["--out-dir", str(out_dir), "--analysis-only"]))
    assert "a record is damaged" in sentence and "remove the record and run again" in sentence


def test_a_run_of_other_settings_is_refused(study_template: Study, traced: Path, finished: Path, capsys):
    for words, said in (
        (["--draws", "3"], "draws is 2 there and 3 here"),
        (["--control-seed", "1"], "seed is 0 there"),
    ):
        assert said in refusal(capsys, script.main(flags(study_template, traced, finished, *words)))


class TestTheTraceMustBeOfTheseInputs:
    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--n-cells", "11"], "n_cells is 12 there and 11 here"),
            (["--tokenization", "geneformer"], "tokenization is "),
            (["--features", "30"], "has no trace of feature 30"),
            (["--features", "no"], "neither a list"),
            (["--min-active-cells", "13"], "no traced feature"),
            (["--draws", "60"], "ask for fewer draws"),
            (["--trace-dir", "/nowhere"], "no such folder"),
        ],
    )
    def test_flags(self, words, said, study_template: Study, traced: Path, tmp_path: Path, capsys):
        status = script.main([*flags(study_template, traced, tmp_path / "out"), *words])
        assert said in refusal(capsys, status) and not (tmp_path / "out").exists()

    def test_another_sae(self, study: Study, traced: Path, tmp_path: Path, capsys):
        write_sae(study.data_root, 4, random_sae(77, 24, 40, 4))
        sentence = refusal(capsys, script.main(flags(study, traced, tmp_path / "out")))
        assert "saes.4" in sentence and "give the flags of that run" in sentence

    def test_no_catalog(self, study: Study, traced: Path, tmp_path: Path, capsys):
        next(study.data_root.glob("sae_models/layer01*/feature_catalog.json")).unlink()
        assert "feature_catalog.json" in refusal(capsys, script.main(flags(study, traced, tmp_path / "out")))

    def test_another_kind_of_folder(self, study_template: Study, traced: Path, finished: Path, tmp_path: Path, capsys):
        out_dir = tmp_path / "out"
        sentence = refusal(capsys, script.main(flags(study_template, tmp_path, out_dir)))
        assert "holds no run" in sentence and sentence.endswith("fix --trace-dir.")
        assert "another experiment" in refusal(capsys, script.main(flags(study_template, finished, out_dir)))
        assert "other settings" in refusal(capsys, script.main(flags(study_template, traced, traced)))
        shutil.copytree(traced, tmp_path / "layers" / "layer_01")
        sentence = refusal(capsys, script.main(flags(study_template, tmp_path / "layers", out_dir)))
        assert "several layers" in sentence

    @pytest.mark.parametrize(
        ("setting", "value", "said"),
        [
            ("quantity", "same_position", "same-position effects"),
            ("downstream_layers", [], "which layers were read"),
            ("min_abs_d", None, "how edges are called"),
        ],
    )
    def test_another_trace(self, setting, value, said, study_template: Study, traced: Path, tmp_path: Path, capsys):
        trace_dir = shutil.copytree(traced, tmp_path / "trace")
        path = trace_dir / "manifest.json"
        content = json.loads(path.read_text())
        content["settings"][setting] = value
        path.write_text(json.dumps(content))
        status = script.main(flags(study_template, trace_dir, tmp_path / "out"))
        assert said in refusal(capsys, status)

    def test_edges_of_something_else(self, study_template: Study, traced: Path, tmp_path: Path, capsys):
        trace_dir = shutil.copytree(traced, tmp_path / "trace")
        edges = pq.read_table(trace_dir / "edges.parquet")
        shifted = (edges["target"].to_numpy() + 1) % 40
        index = edges.schema.get_field_index("target")
        moved = edges.set_column(index, edges.schema.field("target"), [shifted.astype(np.int32)])
        pq.write_table(moved, trace_dir / "edges.parquet")
        status = script.main(flags(study_template, trace_dir, tmp_path / "out"))
        assert "of them others; the trace is of other inputs" in refusal(capsys, status)
        assert not records(tmp_path / "out")


def test_check_counts_what_the_run_then_does(
    study_template: Study,
    traced: Path,
    finished: Path,
    tmp_path: Path,
    capsys,
    monkeypatch,
):
    plans, real = [], plan_report.show
    monkeypatch.setattr(probe, "PROBE_SECONDS", 1e6)
    monkeypatch.setattr(plan_report, "show", lambda plan, command: plans.append(plan) or real(plan, command))
    words = flags(study_template, traced, tmp_path / "out")
    check(script.main, words, tmp_path)
    (plan,) = plans
    n, n_pairs = len(records(finished)), sum(record["n_cells_active"] for record in records(finished))
    assert work(plan, "ablated passes").n == N_ROWS * n_pairs and work(plan, "clean passes").n == 12
    printed = capsys.readouterr().out
    assert f"{n} of layer 1, to layers 2, 4, 5; 0 are there" in printed and f"{N_ROWS} per feature and cell" in printed
    size = sum(path.stat().st_size for path in finished.rglob("*"))
    assert plan.disk.at_least / 3 < size < 3 * plan.disk.at_most
    check(script.main, flags(study_template, traced, finished), finished)
    assert f"{n} are there" in capsys.readouterr().out and plans[1].works == []


def test_the_figure(finished: Path, tmp_path: Path, capsys):
    out_dir = shutil.copytree(finished, tmp_path / "out")
    assert make_figures.main(["--out-dir", str(out_dir)]) == 0
    assert (out_dir / "specificity.png").stat().st_size > 10_000
    (out_dir / "specificity.json").write_text("{}")
    assert "--analysis-only" in refusal(capsys, make_figures.main(["--out-dir", str(out_dir)]))
