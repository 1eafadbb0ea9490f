"""Several source layers in one run of exhaustive_feature_tracing.py: the same edges as one run each, in less work."""

import fcntl
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import exhaustive_feature_tracing as script
import look_up_feature
import make_figures
from cellcircuits import graph_store, precision, trace_flags
from cellcircuits.cells import Cell
from cellcircuits.effects import Bench
from cellcircuits.errors import UserError
from cellcircuits.inputs import check_layers
from cellcircuits.trace_run import Tracer
from conftest import Study, random_sae, write_sae
from test_tracing_script import refusal, trace, without_times

SOURCES = (1, 2, 4)
LIST = ("--source-layer", "1,2,4", "--end-idx", "12")


@pytest.fixture(scope="module")
def finished(study_template: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run over three layers that no test may change."""
    out_dir = tmp_path_factory.mktemp("finished")
    assert trace(study_template, out_dir, *LIST) == 0
    return out_dir


@pytest.fixture
def clean_cells(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Source layer and cell of every clean pass."""
    real, passes = Bench.clean, []

    def counted(self: Bench, cell: Cell):
        passes.append((self.source_layer, cell.name))
        return real(self, cell)

    monkeypatch.setattr(Bench, "clean", counted)
    return passes


def summary_of(out_dir: Path) -> dict:
    return json.loads((out_dir / "layers_summary.json").read_text())


@pytest.mark.parametrize("source", SOURCES)
def test_a_layer_s_folder_is_what_a_run_of_its_own_gives(
    study_template: Study, finished: Path, tmp_path: Path, source: int
):
    targets = ",".join(str(layer) for layer in (2, 4, 5) if layer > source)
    flags = ("--source-layer", str(source), "--downstream-layers", targets, "--end-idx", "12")
    assert trace(study_template, tmp_path, *flags) == 0
    folder = finished / f"layer_{source:02d}"
    found, alone = without_times(folder), without_times(tmp_path)
    assert found.keys() == alone.keys() and found["manifest.json"] == alone["manifest.json"]
    assert found["features.parquet"] == alone["features.parquet"]
    here, there = (pq.read_table(at / "edges.parquet").to_pandas() for at in (folder, tmp_path))
    names = ["source_layer", "source", "target_layer", "target", "n_cells"]
    assert len(here) > 20 and here[names].equals(there[names])
    assert np.allclose(here.cohens_d, there.cohens_d, rtol=1e-3)
    assert trace(study_template, folder, *flags) == 0  # and such a run goes on there


def test_one_clean_pass_per_cell(study_template: Study, tmp_path: Path, clean_cells: list):
    assert trace(study_template, tmp_path, *LIST) == 0
    assert {layer for layer, _ in clean_cells} == {1}
    assert len(clean_cells) == len(set(clean_cells)) == 12


def test_a_finished_layer_costs_nothing(study_template: Study, tmp_path: Path, clean_cells: list):
    assert trace(study_template, tmp_path, "--source-layer", "1,2", "--end-idx", "4") == 0
    before = without_times(tmp_path)
    assert len(clean_cells) == 12
    clean_cells.clear()
    assert trace(study_template, tmp_path, "--source-layer", "1,2", "--end-idx", "4") == 0
    assert not clean_cells and without_times(tmp_path) == before
    assert trace(study_template, tmp_path, "--source-layer", "1,2,4", "--end-idx", "4") == 0
    assert len(clean_cells) == 12
    after = without_times(tmp_path)
    assert {name: after[name] for name in before if name != "layers_summary.json"} == {
        name: content for name, content in before.items() if name != "layers_summary.json"
    }
    assert [of_layer["source_layer"] for of_layer in summary_of(tmp_path)["layers"]] == [1, 2, 4]


def test_interrupted_in_the_second_layer_and_gone_on(
    study_template: Study, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_cells: list
):
    real, calls = Bench.effects, []

    def interrupted(self, clean, features):
        calls.append(self.source_layer)
        if calls.count(2) == 6:
            raise KeyboardInterrupt
        return real(self, clean, features)

    monkeypatch.setattr(Bench, "effects", interrupted)
    assert trace(study_template, tmp_path, *LIST) == 130
    assert list((tmp_path / "layer_02" / "blocks").glob("*.partial.npz"))
    assert not (tmp_path / "layers_summary.json").exists()
    first_layer = without_times(tmp_path / "layer_01")
    assert first_layer == without_times(finished / "layer_01")
    clean_cells.clear()
    monkeypatch.setattr(Bench, "effects", real)
    assert trace(study_template, tmp_path, *LIST) == 0
    assert without_times(tmp_path / "layer_01") == first_layer
    assert len(clean_cells) == 12
    assert without_times(tmp_path) == without_times(finished)


def test_the_summary(finished: Path):
    layers = summary_of(finished)["layers"]
    assert [of_layer["source_layer"] for of_layer in layers] == list(SOURCES)
    for of_layer in layers:
        folder = finished / f"layer_{of_layer['source_layer']:02d}"
        edges = pq.read_table(folder / "edges.parquet").to_pandas()
        own = json.loads((folder / "exhaustive_summary.json").read_text())
        assert of_layer["n_features_traced"] == own["n_features_traced"] == 11
        assert of_layer["total_edges"] == len(edges)
        assert of_layer["edges_per_target_layer"] == {
            str(layer): int((edges.target_layer == layer).sum())
            for layer in (2, 4, 5)
            if layer > of_layer["source_layer"]
        }
        assert of_layer["top_3_hubs"] == own["top_20_hubs"][:3]


def test_analysis_only_summarises_every_layer(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out_dir = shutil.copytree(finished, tmp_path / "out")
    before = without_times(out_dir)
    (out_dir / "layers_summary.json").unlink()
    capsys.readouterr()
    assert script.main(["--analysis-only", "--out-dir", str(out_dir)]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "3 source layers: 33 features traced" in rows["3"]
    for of_layer in summary_of(out_dir)["layers"]:
        words = rows[str(of_layer["source_layer"])].split()
        assert words[1:3] == ["11", str(of_layer["total_edges"])]
        assert f"F{of_layer['top_3_hubs'][0]['feature_idx']}" in words
    assert without_times(out_dir) == before


def test_tables_and_summary_are_made_by_one_process_at_a_time(finished: Path, tmp_path: Path, monkeypatch):
    out_dir = shutil.copytree(finished, tmp_path / "out")
    real, held = graph_store.write_edges, []

    def write_edges(folder: Path, *how):
        for at in (folder, out_dir):
            with (at / ".moment.lock").open("a+") as lock, pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held.append(at)
        return real(folder, *how)

    monkeypatch.setattr(graph_store, "write_edges", write_edges)
    assert script.main(["--analysis-only", "--out-dir", str(out_dir)]) == 0
    assert len(held) == 6


def test_there_is_no_figure_of_all_layers(finished: Path, capsys: pytest.CaptureFixture[str]):
    assert "draw its layer folders" in refusal(capsys, make_figures.main(["--out-dir", str(finished)]))
    assert "several layers" in refusal(capsys, look_up_feature.main(["1", "--out-dir", str(finished)]))


def test_figure_and_look_up_work_on_a_layer_s_folder(finished: Path, tmp_path: Path, capsys):
    folder = shutil.copytree(finished / "layer_02", tmp_path / "copy")
    assert make_figures.main(["--out-dir", str(folder)]) == 0
    assert look_up_feature.main(["1", "--out-dir", str(folder)]) == 0
    assert "L2/F1 " in capsys.readouterr().out


class TestWhichLayers:
    def test_all_takes_what_can_be_traced_and_says_what_not(self, study: Study, tmp_path: Path, caplog):
        next((study.data_root / "sae_models").glob("layer02_*/feature_catalog.json")).unlink()
        caplog.set_level(logging.INFO)
        out_dir = tmp_path / "out"
        assert trace(study, out_dir, "--source-layer", "all", "--features", "1,2") == 0
        assert sorted(path.name for path in out_dir.glob("layer_*")) == ["layer_01", "layer_04"]
        assert "Source layers 1, 4; left out: no SAE: 0, 3; no catalog: 2; no layer to read after it: 5" in caplog.text

    def test_all_is_a_parent_even_of_a_single_layer(self, study_template: Study, tmp_path: Path):
        flags = ("--source-layer", "all", "--downstream-layers", "2", "--features", "1")
        assert trace(study_template, tmp_path, *flags) == 0
        assert list(without_times(tmp_path / "layer_01")) and not (tmp_path / "manifest.json").exists()

    def test_all_with_nothing_to_trace(self, study: Study, tmp_path: Path, capsys):
        for path in (study.data_root / "sae_models").glob("*/feature_catalog.json"):
            path.unlink()
        sentence = refusal(capsys, trace(study, tmp_path / "out", "--source-layer", "all"))
        assert "no catalog: 1, 2, 4;" in sentence and "prepare_inputs.py --existing-saes" in sentence

    def test_all_downstream(self, study: Study, tmp_path: Path, capsys):
        flags = ("--source-layer", "1,2", "--all-downstream", "--features", "14")
        assert "no SAE of layer 3" in refusal(capsys, trace(study, tmp_path / "out", *flags))
        write_sae(study.data_root, 3, random_sae(3, 24, 32, 2))
        assert trace(study, tmp_path / "out", *flags) == 0
        targets = {
            of["source_layer"]: list(of["edges_per_target_layer"]) for of in summary_of(tmp_path / "out")["layers"]
        }
        assert targets == {1: ["2", "3", "4", "5"], 2: ["3", "4", "5"]}

    @pytest.mark.parametrize("text, expected", [("5", (5,)), ("11,0,5", (0, 5, 11)), ("3,3", (3,)), ("all", None)])
    def test_flag(self, text: str, expected: tuple[int, ...] | None):
        args = script.build_parser().parse_args(["--source-layer", text])
        assert args.source_layer == expected
        assert script.several_layers(args) == (expected is None or len(expected) > 1)

    @pytest.mark.parametrize("text", ["", "-1", "1-4", "every"])
    def test_flag_that_is_no_layer(self, text: str, capsys: pytest.CaptureFixture[str]):
        with pytest.raises(SystemExit, match="2"):
            script.build_parser().parse_args([f"--source-layer={text}"])
        assert "--source-layer" in capsys.readouterr().err


@pytest.mark.parametrize("n_layers", [1, 2, 4])
@pytest.mark.parametrize("sources", [(0,), (1,), (3,), (0, 1), (1, 2), (0, 1, 3)])
@pytest.mark.parametrize("targets", [(1,), (1, 2), (2, 3), (3,), (3, 4)])
def test_layers_are_checked(n_layers: int, sources: tuple[int, ...], targets: tuple[int, ...]):
    """Every source and target is a block, every source has a target after it, every target is after a source."""
    fits = (
        max(*sources, *targets) < n_layers
        and all(any(target > source for target in targets) for source in sources)
        and all(any(target > source for source in sources) for target in targets)
    )
    if fits:
        check_layers(n_layers, sources, targets)
    else:
        with pytest.raises(UserError, match=r"^--(source-layer|downstream-layers) \d+: .*\.$"):
            check_layers(n_layers, sources, targets)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--source-layer", "1,5"], ["--source-layer 5", "last block", "leave it out"]),
        (["--source-layer", "1,6"], ["--source-layer 6", "6 blocks"]),
        (["--source-layer", "2,4"], ["--downstream-layers 2", "first source layer 2", "try --downstream-layers 3,4,5"]),
        (["--source-layer", "1,4", "--downstream-layers", "2,4"], ["--source-layer 4", "(2, 4)", "leave it out"]),
        (["--source-layer", "1,3"], ["no SAE of layer 3"]),
        (["--source-layer", "all", "--downstream-layers", "6,11"], ["--downstream-layers 6", "6 blocks"]),
        (["--source-layer", "1,2", "--features", "1,400"], ["layer 1 has no feature 400"]),
    ],
)
def test_a_mistake_gives_one_sentence_and_no_results(
    study_template: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: list[str]
):
    sentence = refusal(capsys, trace(study_template, tmp_path / "out", *flags))
    assert all(word in sentence for word in words), sentence
    assert not (tmp_path / "out").exists()


def test_a_layer_of_the_list_without_a_catalog(study: Study, tmp_path: Path, capsys):
    next((study.data_root / "sae_models").glob("layer02_*/feature_catalog.json")).unlink()
    sentence = refusal(capsys, trace(study, tmp_path / "out", "--source-layer", "1,2"))
    assert "layer02" in sentence and "--existing-saes --layers 2" in sentence and not (tmp_path / "out").exists()


class TestPrecision:
    def test_the_modes_are_the_engine_s(self):
        assert trace_flags.PRECISIONS == precision.PRECISIONS

    def test_it_is_named_among_the_settings(self, study_template: Study, finished: Path, tmp_path: Path, capsys):
        settings = json.loads((finished / "layer_01" / "manifest.json").read_text())["settings"]
        assert settings["precision"] == "float32"
        sentence = refusal(capsys, trace(study_template, finished, *LIST, "--precision", "tf32"))
        assert 'precision is "float32" there and "tf32" here' in sentence

    @pytest.mark.parametrize(("mode", "n_passes"), [("mixed", 12), ("tf32", 24)])
    def test_rounded_clean_runs_are_not_carried_on(
        self, study_template: Study, tmp_path: Path, clean_cells: list, monkeypatch, mode: str, n_passes: int
    ):
        """A layer's folder is that of a run of its own in that precision, too."""
        monkeypatch.setattr(Tracer, "check_engine", lambda *_: None)  # which makes a float32 run of a cell
        flags = ("--features", "1,2,5,6", "--precision", mode)
        assert trace(study_template, tmp_path / "both", "--source-layer", "1,2", *flags) == 0
        assert len(clean_cells) == n_passes
        alone = ("--source-layer", "2", "--downstream-layers", "4,5", *flags)
        assert trace(study_template, tmp_path / "alone", *alone) == 0
        folders = (tmp_path / "both" / "layer_02", tmp_path / "alone")
        settings = [json.loads((at / "manifest.json").read_text())["settings"] for at in folders]
        assert settings[0] == settings[1] and settings[0]["precision"] == mode
        here, there = (pq.read_table(at / "edges.parquet").to_pandas() for at in folders)
        names = ["source", "target_layer", "target", "n_cells"]
        assert len(here) and here[names].equals(there[names])
        assert np.allclose(here.cohens_d, there.cohens_d, rtol=1e-3)


class TestFoldersOfAnotherKind:
    """What is there stays as it is."""

    @pytest.fixture
    def refuse(self, study_template: Study, capsys: pytest.CaptureFixture[str]):
        def check(out_dir: Path, *flags: str) -> str:
            before = without_times(out_dir)
            sentence = refusal(capsys, trace(study_template, out_dir, *flags))
            after = without_times(out_dir)
            assert {name: after[name] for name in after if not name.endswith(".lock")} == {
                name: before[name] for name in before if not name.endswith(".lock")
            }
            return sentence

        return check

    def test_a_single_layer_among_layer_folders(self, refuse, finished: Path):
        assert "layer_01, ..." in refuse(finished, "--features", "1")

    def test_layer_folders_in_that_of_a_single_layer(self, refuse, study_template: Study, tmp_path: Path):
        assert trace(study_template, tmp_path, "--features", "1") == 0
        sentence = refuse(tmp_path, *LIST)
        assert "manifest.json" in sentence and "--out-dir" in sentence

    @pytest.mark.parametrize("name", ["chosen_features.json", "edges.parquet", "feature_0001.json"])
    def test_layer_folders_beside_other_results(self, refuse, tmp_path: Path, name: str):
        (tmp_path / name).write_text("{}")
        assert name in refuse(tmp_path, *LIST)

    def test_layers_of_other_settings(self, refuse, finished: Path):
        assert "n_cells is 12 there and 5 here" in refuse(finished, "--source-layer", "1,2", "--n-cells", "5")

    def test_other_targets_begin_no_new_layer(self, refuse, finished: Path, tmp_path: Path):
        out_dir = shutil.copytree(finished, tmp_path / "out")
        shutil.rmtree(out_dir / "layer_01")
        sentence = refuse(out_dir, "--source-layer", "1,2", "--downstream-layers", "2,5")
        assert "layer_02: holds a run" in sentence and "downstream_layers" in sentence

    def test_a_layer_traced_with_other_settings_is_not_summarised(self, finished: Path, tmp_path: Path, capsys):
        out_dir = shutil.copytree(finished, tmp_path / "out")
        path = out_dir / "layer_04" / "manifest.json"
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps(manifest | {"settings": manifest["settings"] | {"min_abs_d": 0.9}}))
        sentence = refusal(capsys, script.main(["--analysis-only", "--out-dir", str(out_dir)]))
        assert "layer_04" in sentence and "min_abs_d is 0.9 there and 0.5 here" in sentence
