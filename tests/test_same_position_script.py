"""exhaustive_feature_tracing.py --same-position end to end: numbers, folders that never mix, and the check's file."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import exhaustive_feature_tracing as script
import look_up_feature
import make_figures
from cellcircuits import manifest, results, same_position, same_position_check
from cellcircuits.cells import CellSelection, load_cells
from cellcircuits.claims import claimed
from cellcircuits.effects import Bench
from cellcircuits.errors import UserError
from cellcircuits.geneformer import load_model
from cellcircuits.graph_store import shard_path
from cellcircuits.sae_store import find_sae, open_sae
from cellcircuits.same_position import SamePositionBench, same_position_effect
from cellcircuits.same_position_check import run_check, sample_features
from cellcircuits.same_position_record import NAME
from cellcircuits.stats import EdgeRule, effect_statistics
from cellcircuits.trace_run import Tracer
from cellcircuits.vocabulary import load_vocabulary
from conftest import Study
from test_tracing_script import refusal, trace, without_times

SAME = ("--same-position", "--same-position-check", "4", "--end-idx", "20")
TIMES = ("seconds_per_pair_total_effect", "seconds_per_pair_same_position")


@pytest.fixture(scope="module")
def finished(study_template: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run that no test may change."""
    out_dir = tmp_path_factory.mktemp("finished")
    assert trace(study_template, out_dir, *SAME) == 0
    return out_dir


@pytest.fixture(scope="module")
def total(study_template: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same features by total effects."""
    out_dir = tmp_path_factory.mktemp("total")
    assert trace(study_template, out_dir, "--end-idx", "20") == 0
    return out_dir


@pytest.fixture(scope="module")
def cells(study_template: Study) -> list:
    """The cells that the study's flags draw."""
    vocabulary = load_vocabulary([study_template.model], 64)
    return load_cells(study_template.cells, vocabulary, CellSelection("all", n_cells=12, min_median_tokens=5), 48).cells


@pytest.fixture(scope="module")
def benches(study_template: Study) -> tuple[Bench, SamePositionBench]:
    """Benches of the study, for total and for same-position effects."""
    model = load_model(str(study_template.model)).model
    saes = {layer: open_sae(find_sae(study_template.data_root, layer)) for layer in (1, 2, 4, 5)}
    return Bench(model, saes, 1), SamePositionBench(model, saes, 1)


def results_of(out_dir: Path) -> dict[str, object]:
    """Every result file, its times left out."""
    files = without_times(out_dir)
    for name in files:
        if name.endswith(NAME):
            files[name] = {key: value for key, value in files[name].items() if key not in TIMES}
    return files


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Features of every check that was made."""
    made: list[list[int]] = []

    def counted(total, same, cells, features, rule, kept):
        made.append(list(features))
        return run_check(total, same, cells, features, rule, kept)

    monkeypatch.setattr(same_position_check, "run_check", counted)
    return made


class TestNumbers:
    def test_edges_are_those_of_the_definition(self, finished: Path, benches, cells):
        _, bench = benches
        rows = pq.read_table(finished / "edges.parquet").to_pylist()
        n_edges = 0
        for feature in (0, 7, 14, 19):
            per_cell = [effects for cell in cells if (effects := same_position_effect(bench, cell, feature))]
            assert read(finished / f"feature_{feature:04d}.json")["n_cells_active"] == len(per_cell)
            for target in bench.targets:
                of_target = np.array([effects[target] for effects in per_cell]).reshape(-1, 40)
                expected = effect_statistics(of_target, EdgeRule())
                found = {r["target"]: r for r in rows if (r["source"], r["target_layer"]) == (feature, target)}
                near = set(np.flatnonzero(np.abs(np.abs(expected.d) - 0.5) < 1e-3))
                assert found.keys() - near == set(np.flatnonzero(expected.is_edge)) - near
                n_edges += len(found)
                for j, row in found.items():
                    assert row["mean_delta"] == pytest.approx(expected.mean[j], abs=1e-4)
                    assert row["cohens_d"] == pytest.approx(expected.d[j], abs=1e-3 * (1 + abs(expected.d[j])))
        assert n_edges > 50

    def test_right_after_the_source_they_are_total_effects_and_later_not(self, finished: Path, total: Path):
        here, there = (pq.read_table(at / "edges.parquet").to_pandas() for at in (finished, total))
        names = ["source", "target", "n_cells"]
        first, last = ([of[of.target_layer == layer].reset_index() for of in (here, there)] for layer in (2, 5))
        assert first[0][names].equals(first[1][names])
        assert np.allclose(first[0].cohens_d, first[1].cohens_d, rtol=1e-3)
        assert not last[0][names].equals(last[1][names])

    def test_the_engine_is_compared_with_its_own_definition(
        self, study_template: Study, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
    ):
        def another(bench: Bench, cell, feature: int):
            return {layer: effects + 1 for layer, effects in same_position_effect(bench, cell, feature).items()}

        monkeypatch.setattr(same_position, "same_position_effect", another)
        assert "disagree" in refusal(capsys, trace(study_template, tmp_path, *SAME))


class TestWhatItIsCalled:
    def test_settings_and_summary(self, finished: Path, total: Path):
        assert read(finished / "manifest.json")["settings"]["quantity"] == "same_position"
        assert read(finished / "exhaustive_summary.json")["quantity"] == "same_position"
        assert "quantity" not in read(total / "manifest.json")["settings"]  # so that older folders go on
        assert "quantity" not in read(total / "exhaustive_summary.json")

    def test_terminal_and_figure_and_look_up(self, finished: Path, total: Path, tmp_path: Path, capsys, monkeypatch):
        titles = []
        monkeypatch.setattr(make_figures.Figure, "suptitle", lambda _, text: titles.append(text))
        for folder, is_said in ((finished, True), (total, False)):
            copy = shutil.copytree(folder, tmp_path / folder.name)
            capsys.readouterr()
            assert script.main(["--analysis-only", "--out-dir", str(copy)]) == 0
            assert ("edges (same-position effects)" in capsys.readouterr().out) == is_said
            assert make_figures.main(["--out-dir", str(copy)]) == 0
            assert ("same-position effects" in titles[-1]) == is_said
            capsys.readouterr()
            assert look_up_feature.main(["1", "--out-dir", str(copy)]) == 0
            assert ("(same-position effects)" in capsys.readouterr().out.splitlines()[0]) == is_said

    def test_help_says_what_it_is(self, capsys: pytest.CaptureFixture[str]):
        with pytest.raises(SystemExit, match="0"):
            script.main(["--help"])
        text = " ".join(capsys.readouterr().out.split())
        for words in ("every other position stays clean", "another quantity", "hundredth", "(default: 16)"):
            assert words in text


class TestNeverMixed:
    @pytest.mark.parametrize("flags, words", [(SAME, 'null there and "same_position"'), (("--end-idx", "20"), "null")])
    def test_in_either_direction(self, study_template: Study, finished: Path, total: Path, capsys, flags, words: str):
        folder = total if flags == SAME else finished
        before = without_times(folder)
        sentence = refusal(capsys, trace(study_template, folder, *flags))
        assert "quantity is" in sentence and words in sentence and "--out-dir" in sentence
        assert without_times(folder) == before

    def test_layers_of_one_parent(self, study_template: Study, tmp_path: Path, capsys):
        flags = ("--source-layer", "1,2", "--features", "1")
        assert trace(study_template, tmp_path, *flags) == 0
        sentence = refusal(capsys, trace(study_template, tmp_path, *flags, "--same-position"))
        assert 'quantity is null there and "same_position" here' in sentence

    @pytest.mark.parametrize("mode", ["tf32", "bf16", "mixed"])
    def test_other_precisions_are_refused(self, study_template: Study, tmp_path: Path, capsys, mode: str):
        sentence = refusal(capsys, trace(study_template, tmp_path / "out", *SAME, "--precision", mode))
        assert f"--precision {mode}" in sentence and "--same-position" in sentence
        assert not (tmp_path / "out").exists()

    def test_a_check_without_the_flag_is_refused(self, study_template: Study, tmp_path: Path, capsys):
        sentence = refusal(capsys, trace(study_template, tmp_path / "out", "--same-position-check", "4"))
        assert "--same-position-check" in sentence and not (tmp_path / "out").exists()

    @pytest.mark.parametrize("text", ["-1", "1.5", "some"])
    def test_a_number_of_features_that_is_none(self, text: str, capsys: pytest.CaptureFixture[str]):
        with pytest.raises(SystemExit, match="2"):
            script.main(["--same-position", f"--same-position-check={text}"])
        assert "not a non-negative integer" in capsys.readouterr().err


class TestCheck:
    def test_content(self, finished: Path, benches, cells):
        total, same = benches
        record = read(finished / NAME)
        kept = read(finished / "manifest.json")
        assert record["fingerprint"] == read(finished / "feature_0001.json")["fingerprint"]
        assert record["features"] == sample_features([i for i in range(20) if i != 3], 4)
        assert record["n_cells"] == kept["settings"]["n_cells"] == 12
        expected = run_check(total, same, [total.clean(cell) for cell in cells], record["features"], EdgeRule())
        for key in expected.keys() - set(TIMES):
            assert record[key] == expected[key], key
        assert 0.9 < record["overall"]["spearman_mean"] < 1
        assert list(finished.glob("*.claim.*")) == []

    def test_it_is_made_once(self, study_template: Study, finished: Path, tmp_path: Path, checks: list):
        out_dir = shutil.copytree(finished, tmp_path / "out")
        before = results_of(out_dir)
        assert trace(study_template, out_dir, *SAME) == 0
        assert checks == [] and results_of(out_dir) == before
        (out_dir / NAME).write_text("{}")
        assert trace(study_template, out_dir, *SAME) == 0
        assert len(checks) == 1 and results_of(out_dir) == before
        assert trace(study_template, out_dir, *SAME, "--same-position-check", "2") == 0
        assert len(checks[1]) == 2 and read(out_dir / NAME)["features"] == checks[1]

    def test_a_run_of_a_few_features_keeps_the_sample_of_all(
        self, study_template: Study, finished: Path, tmp_path: Path, checks: list
    ):
        out_dir = shutil.copytree(finished, tmp_path / "out")
        before = results_of(out_dir)
        assert trace(study_template, out_dir, *SAME, "--features", "5") == 0
        assert checks == [] and {**results_of(out_dir), "progress.json": None} == {**before, "progress.json": None}

    def test_none_is_made_where_none_is_asked_for(self, study_template: Study, tmp_path: Path, checks: list, capsys):
        assert trace(study_template, tmp_path, *SAME, "--same-position-check", "0") == 0
        assert checks == [] and not (tmp_path / NAME).exists()
        assert "were not compared with total effects" in capsys.readouterr().out

    def test_what_it_costs_is_said_before(self, study_template: Study, tmp_path: Path, caplog, monkeypatch):
        monkeypatch.setattr(same_position_check, "run_check", lambda *_: pytest.fail(caplog.text))
        caplog.set_level("INFO")
        with pytest.raises(pytest.fail.Exception, match="4 x 12 = 48 ablated runs"):
            trace(study_template, tmp_path, *SAME)

    def test_ctrl_c_loses_nothing_else(
        self, study_template: Study, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        def interrupted(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(same_position_check, "run_check", interrupted)
        assert trace(study_template, tmp_path, *SAME) == 130
        expected = results_of(finished)
        assert results_of(tmp_path) == {name: content for name, content in expected.items() if name != NAME}
        monkeypatch.undo()
        monkeypatch.setattr(Tracer, "trace_one", lambda *_: pytest.fail("traced again"))
        assert trace(study_template, tmp_path, *SAME) == 0
        assert results_of(tmp_path) == expected

    @pytest.mark.parametrize("n_calls, kept", [(5, ["total_00000"]), (11, ["same_00000", "total_00000"])])
    def test_an_interrupted_check_goes_on(
        self, study_template: Study, finished: Path, tmp_path: Path, monkeypatch, n_calls: int, kept: list[str]
    ):
        """Told to stop in the first or the second of its two measurements, each of 12 cells."""
        out_dir = shutil.copytree(finished, tmp_path / "out")
        (out_dir / NAME).unlink()
        calls, limit, real = [], [0], {bench: bench.effects for bench in (Bench, SamePositionBench)}

        def counted(self, clean, features):
            calls.append(type(self))
            if len(calls) == limit[0]:
                raise KeyboardInterrupt
            return real[type(self)](self, clean, features)

        monkeypatch.setattr(Tracer, "check_engine", lambda *_: None)
        for bench in real:
            monkeypatch.setattr(bench, "effects", counted)
        assert trace(study_template, shutil.copytree(out_dir, tmp_path / "in one go"), *SAME) == 0
        in_full, limit[0] = len(calls), n_calls
        calls.clear()
        assert trace(study_template, out_dir, *SAME) == 130
        names = [path.name for path in sorted((out_dir / "partial").iterdir())]
        assert names == [f"same_position_check_{name}.npz" for name in kept]
        limit[0] = 0
        calls.clear()
        assert trace(study_template, out_dir, *SAME) == 0
        assert results_of(out_dir) == results_of(finished) and not (out_dir / "partial").exists()
        assert len(calls) == in_full - (n_calls - 1)  # each cell is one batch

    def test_a_half_written_record_is_removed_and_a_whole_one_is_a_result(self, finished: Path, tmp_path: Path):
        half_written = tmp_path / f".{NAME}.17.0a1b2c3d.tmp"
        half_written.write_text("of a killed run")
        with results.shared(tmp_path):
            assert not half_written.exists()
        shutil.copy(finished / NAME, tmp_path)
        with pytest.raises(UserError, match=NAME):
            manifest.claim_folder(tmp_path, {}, {})

    def test_another_process_at_it(self, study_template: Study, finished: Path, tmp_path: Path, checks: list, caplog):
        caplog.set_level("INFO")
        out_dir = shutil.copytree(finished, tmp_path / "out")
        (out_dir / NAME).unlink()
        with claimed(out_dir / NAME):
            assert trace(study_template, out_dir, *SAME) == 0
        assert checks == [] and "Another process is at work on" in caplog.text

    def test_while_another_process_traces(self, study_template: Study, finished: Path, tmp_path: Path, checks: list):
        out_dir = shutil.copytree(finished, tmp_path / "out")
        (out_dir / NAME).unlink()
        path = shard_path(out_dir, 16)
        path.unlink()
        with claimed(path):
            assert trace(study_template, out_dir, *SAME) == 0
        assert checks == []
        assert trace(study_template, out_dir, *SAME) == 0
        assert len(checks) == 1 and results_of(out_dir) == results_of(finished)


class TestAnalysisOnly:
    def line(self, out_dir: Path, capsys) -> str:
        capsys.readouterr()
        assert script.main(["--analysis-only", "--out-dir", str(out_dir)]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "total effects" in line]
        return line

    def test_the_figures(self, finished: Path, tmp_path: Path, capsys):
        out_dir = shutil.copytree(finished, tmp_path / "out")
        overall = read(finished / NAME)["overall"]
        line = self.line(out_dir, capsys)
        for name in ("spearman_mean", "spearman_d", "edge_jaccard"):
            assert f"{overall[name]:.2f}" in line
        assert "4 features" in line and f"{overall['n_edges_total_effect']} by total effects" in line

    def test_undefined_figures(self, finished: Path, tmp_path: Path, capsys):
        out_dir = shutil.copytree(finished, tmp_path / "out")
        record = read(finished / NAME)
        record["overall"] |= {"spearman_mean": None, "edge_jaccard": None}
        (out_dir / NAME).write_text(json.dumps(record))
        assert self.line(out_dir, capsys).count("undefined") == 2

    @pytest.mark.parametrize("damage", ["", "[]", "{}", '{"fingerprint": "of another run"}'])
    def test_a_damaged_record(self, finished: Path, tmp_path: Path, capsys, caplog, damage: str):
        out_dir = shutil.copytree(finished, tmp_path / "out")
        (out_dir / NAME).write_text(damage)
        assert "were not compared" in self.line(out_dir, capsys)
        assert f"{NAME} is damaged or of another run" in caplog.text

    def test_total_effects_have_no_such_line(self, total: Path, tmp_path: Path, capsys):
        out_dir = shutil.copytree(total, tmp_path / "out")
        assert script.main(["--analysis-only", "--out-dir", str(out_dir)]) == 0
        assert "total effects" not in capsys.readouterr().out


def test_several_layers(study_template: Study, finished: Path, tmp_path: Path, capsys, checks: list):
    flags = (*SAME, "--source-layer", "1,2")
    assert trace(study_template, tmp_path, *flags) == 0
    out = capsys.readouterr().out
    assert "edges (same-position effects)" in out
    assert all(f"layer {layer}: against total effects, 4 features" in out for layer in (1, 2))
    assert read(tmp_path / "layers_summary.json")["quantity"] == "same_position"
    first = tmp_path / "layer_01"
    assert read(first / "exhaustive_summary.json") == read(finished / "exhaustive_summary.json")
    assert without_times(first)["edges.parquet"] == without_times(finished)["edges.parquet"]
    assert len(checks) == 2 and (tmp_path / "layer_02" / NAME).is_file()
    before = without_times(tmp_path)
    assert trace(study_template, tmp_path, *flags) == 0
    assert len(checks) == 2 and without_times(tmp_path) == before
