"""Effects kept beside the edges: read back they give the run's edges and tests, and nothing claims to have them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.sparse
import torch
from scipy.stats import false_discovery_control

import exhaustive_feature_tracing as script
import reference
import selective_feature_tracing
from cellcircuits import plan_report, probe, results, trace_effects
from cellcircuits.calibration import Calibrator, hedges_g
from cellcircuits.claims import claimed
from cellcircuits.edge_fdr import CalibrationSettings
from cellcircuits.effects import Bench
from cellcircuits.errors import UserError
from cellcircuits.graph_store import shard_path
from cellcircuits.stats import EdgeRule, effect_statistics
from cellcircuits.trace_effects import BYTES_PER_EFFECT, LEAST_BYTES_PER_EFFECT, held_features, read_effects
from cellcircuits.trace_run import Tracer
from conftest import Study
from table_bench import CELLS, FINGERPRINT, N_ACTIVE, RULE, TABLE, TableBench, defined, expected_shard
from test_selective_tracing import annotate
from test_selective_tracing import flags as selective_flags
from test_tracing_script import opened, refusal, trace

TARGETS = (2, 4, 5)
HOW = ("--sign-flips", "500", "--batch-size", "1")  # batches of other features may differ in the last bit
SOME = ("--end-idx", "20", *HOW)
NAMES = [run.cell.name for run in CELLS]


@pytest.fixture(scope="module")
def finished(study_template: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with effects that no test may change."""
    out_dir = tmp_path_factory.mktemp("finished")
    assert trace(study_template, out_dir, *SOME, "--save-effects") == 0
    return out_dir


def kept_bytes(out_dir: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out_dir)): path.read_bytes() for path in out_dir.rglob("effects_*.npz")}


def tables(out_dir: Path) -> list[bytes]:
    return [(out_dir / name).read_bytes() for name in ("edges.parquet", "features.parquet", "calibration.json")]


def test_scipy_reads_the_file_and_every_row_is_the_reference_s(study_template: Study, finished: Path):
    model, saes, cells = opened(study_template)
    path = finished / "effects" / "effects_00000.npz"
    matrix = scipy.sparse.load_npz(path)
    assert matrix.dtype == np.float32 and matrix.shape[1] == sum(saes[layer].n_features for layer in TARGETS)
    with np.load(path, allow_pickle=False) as kept:
        source, cell, layers, targets = (kept[name] for name in ("source", "cell", "target_layer", "target"))
        assert kept["cell_names"].tolist() == [cell.name for cell in cells]
        assert kept["features"].tolist() == [feature for feature in range(16) if feature != 3]
    assert list(zip(source, cell, strict=True)) == sorted(set(zip(source, cell, strict=True)))
    assert (matrix.data != 0).all() and len(source) == matrix.shape[0] > 20
    for row in range(0, len(source), 7):
        expected = reference.cell_effect(model, saes, cells[cell[row]], [(1, int(source[row]))], TARGETS)
        expected = [expected[layer][target] for layer, target in zip(layers, targets, strict=True)]
        np.testing.assert_allclose(matrix[[row]].toarray()[0], expected, atol=1e-4)


def test_what_is_read_back_gives_the_run_s_edges_and_tests(finished: Path):
    rule, settings = EdgeRule(), CalibrationSettings(n_draws=500)
    edges = pq.read_table(finished / "edges.parquet").to_pandas()
    features = pq.read_table(finished / "features.parquet").to_pandas()
    features = features[features.is_traced].set_index("feature")
    cell_names = np.load(finished / "effects" / "effects_00000.npz")["cell_names"]
    calibrator = Calibrator(rule, settings, len(cell_names), 1, torch.device("cpu"))
    found, every_p, n_edges = [], [], 0
    for one in read_effects(finished):
        effects = one.effects.toarray().astype(np.float64)
        measured = np.isin(cell_names, one.cells)
        tested = calibrator.calibrate(one.feature, effects, measured)
        measured_again, row = effect_statistics(effects, rule), features.loc[one.feature]
        columns = np.flatnonzero(measured_again.is_edge)
        g = hedges_g(effects[:, columns])
        at = np.searchsorted(tested.columns, columns)
        every_p.append(tested.p)
        found.append(one.feature)
        of_feature = edges[edges.source == one.feature]
        n_edges += len(of_feature)
        assert of_feature.target_layer.tolist() == one.target_layer[columns].tolist()
        assert of_feature.target.tolist() == one.target[columns].tolist()
        assert of_feature.p_sign_flip.tolist() == tested.p[at].tolist()
        assert (row.n_cells_active, row.n_edges) == (len(one.cells), len(columns))
        assert row.n_live_targets == len(tested.columns) and row.null_edges == tested.counts["null_edges"]
        for name, values in (("cohens_d", measured_again.d[columns]), ("hedges_g", g[0]), ("g_low", g[1])):
            there = of_feature[name].to_numpy(dtype=np.float64)
            np.testing.assert_allclose(there, values, rtol=1e-4)
    assert found == features.index.tolist() and n_edges == len(edges) > 20
    p = np.concatenate(every_p)
    content = json.loads((finished / "calibration.json").read_text())
    assert content["n_tests"] == len(p)
    assert content["n_tests_bh"] == np.count_nonzero(false_discovery_control(p) < 0.05)
    assert content["n_tests_by"] == np.count_nonzero(false_discovery_control(p, method="by") < 0.05)


def test_a_run_that_grows_or_is_interrupted_keeps_the_same_bytes(
    study_template: Study, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert trace(study_template, tmp_path, "--features", "5,9", *HOW, "--save-effects") == 0
    real, calls = Bench.effects, []

    def interrupted(self, clean, features):
        calls.append(features)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(self, clean, features)

    monkeypatch.setattr(Bench, "effects", interrupted)
    assert trace(study_template, tmp_path, *SOME, "--save-effects") == 130
    monkeypatch.setattr(Bench, "effects", real)
    assert trace(study_template, tmp_path, *SOME, "--save-effects") == 0
    assert tables(tmp_path) == tables(finished)
    assert kept_bytes(tmp_path) == kept_bytes(finished)


class TestAFolderTracedWithout:
    @pytest.fixture
    def without(self, study_template: Study, tmp_path: Path) -> Path:
        assert trace(study_template, tmp_path, *SOME) == 0
        return tmp_path

    def test_does_not_claim_to_have_effects(self, without: Path):
        assert not (without / "effects").exists()
        with pytest.raises(UserError, match=r"lacks the effects of 15 traced features \(such as 0\); run the tracing"):
            next(read_effects(without))

    def test_is_traced_again_where_they_are_asked_for_with_the_same_numbers(
        self, study_template: Study, finished: Path, without: Path
    ):
        before = {path: path.read_bytes() for path in without.rglob("*.parquet")}
        assert trace(study_template, without, *SOME, "--save-effects") == 0
        assert kept_bytes(without) == kept_bytes(finished)
        assert {path: path.read_bytes() for path in without.rglob("*.parquet")} == before

    def test_holds_old_and_new_features_of_one_block(self, study_template: Study, finished: Path, tmp_path: Path):
        assert trace(study_template, tmp_path, "--features", "5,9", *HOW) == 0
        assert trace(study_template, tmp_path, *SOME, "--save-effects") == 0
        assert kept_bytes(tmp_path) == kept_bytes(finished)
        assert tables(tmp_path) == tables(finished)

    def test_a_run_without_leaves_those_that_are_there(self, study_template: Study, finished: Path, tmp_path: Path):
        out_dir = Path(shutil.copytree(finished, tmp_path / "out"))
        assert trace(study_template, out_dir, "--end-idx", "24", *HOW) == 0
        assert kept_bytes(out_dir) == kept_bytes(finished)
        with pytest.raises(UserError, match=r"lacks the effects of 4 traced features \(such as 20\)"):
            list(read_effects(out_dir))


@pytest.mark.parametrize("damage", ["half of it", "of another run", "nothing", "other arrays"])
def test_damaged_effects_do_not_count_and_are_made_again(
    study_template: Study, finished: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
):
    out_dir = Path(shutil.copytree(finished, tmp_path / "out"))
    path = out_dir / "effects" / "effects_00000.npz"
    whole = path.read_bytes()
    if damage == "other arrays":
        np.savez(path, notes=np.zeros(3))
    elif damage == "of another run":
        with np.load(path) as kept:
            arrays = {**kept, "fingerprint": np.array("f" * 64)}
        np.savez(path, **arrays)
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "half of it" else b"")
    with pytest.raises(UserError, match="lacks the effects of 15 traced features"):
        list(read_effects(out_dir))
    assert f"{path} " in caplog.text and "do not count" in caplog.text
    assert trace(study_template, out_dir, *SOME, "--save-effects") == 0
    assert path.read_bytes() == whole and kept_bytes(out_dir) == kept_bytes(finished)


class TestSeveralProcesses:
    @pytest.fixture
    def tracer(self, tmp_path: Path):
        def make(before=lambda row, features: None) -> Tracer:
            bench = TableBench(before)
            return Tracer(tmp_path, bench, CELLS, {}, RULE, FINGERPRINT, definition=defined, effects_of=NAMES)

        return make

    @pytest.fixture(autouse=True)
    def without_records(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Tracer, "write_records", lambda *_: None)

    def require_effects(self, tmp_path: Path, block: int, features: list[int]) -> None:
        path = trace_effects.effects_path(tmp_path, block)
        assert held_features(path, FINGERPRINT) == set(features)
        matrix = scipy.sparse.load_npz(path).toarray()
        with np.load(path) as kept:
            pairs = list(zip(kept["source"].tolist(), kept["cell"].tolist(), strict=True))
        assert pairs == [(f, i) for f in features for i in np.flatnonzero(N_ACTIVE[f])]
        assert np.array_equal(matrix, [TABLE[f, i].astype(np.float32) for f, i in pairs])

    def test_blocks_of_others_are_left_to_them(self, tracer, tmp_path: Path):
        with claimed(shard_path(tmp_path, 0)):
            assert tracer().trace([3, 7, 17]) is False
        assert not trace_effects.effects_path(tmp_path, 0).exists()
        self.require_effects(tmp_path, 16, [17])
        assert tracer().trace([3, 7, 17]) is True
        self.require_effects(tmp_path, 0, [3, 7])  # 7 is active nowhere: it has no row, and counts

    def test_who_was_suspended_and_lost_its_claim_writes_neither(self, tracer, tmp_path: Path):
        def overruled(row: int, features) -> None:
            if row == 4:
                (tmp_path / "blocks" / "block_00000.claim.7").write_text("{}")

        assert tracer(overruled).trace([3]) is False
        assert not shard_path(tmp_path, 0).exists() and not trace_effects.effects_path(tmp_path, 0).exists()

    def test_edges_that_another_one_wrote_without_effects_stay(self, tracer, tmp_path: Path):
        plain = Tracer(tmp_path, TableBench(), CELLS, {}, RULE, FINGERPRINT, definition=defined)
        assert plain.trace([3]) is True
        ours = tracer()
        assert ours.trace([3, 4]) is True
        self.require_effects(tmp_path, 0, [3, 4])
        assert expected_shard(tmp_path, 0, [3, 4])
        again = tracer()
        assert again.trace([3, 4]) is True and not again.bench.calls


def test_several_layers_and_selective_tracing(study: Study, tmp_path: Path):
    layers = ("--source-layer", "1,2", "--downstream-layers", "4,5", "--end-idx", "6", "--sign-flips", "100")
    assert trace(study, tmp_path / "layers", *layers, "--save-effects") == 0
    annotate(study)
    flags = [*selective_flags(study, tmp_path / "selective"), "--save-effects"]
    assert selective_feature_tracing.main(flags) == 0
    folders = [*(tmp_path / "layers").glob("layer_*"), *(tmp_path / "selective").glob("layer0*")]
    assert len(folders) >= 4
    for folder in folders:
        traced = [x for x in pq.read_table(folder / "features.parquet").to_pylist() if x["is_traced"]]
        assert [(one.feature, len(one.cells)) for one in read_effects(folder)] == [
            (row["feature"], row["n_cells_active"]) for row in traced
        ]


def test_a_check_counts_their_disk(study_template: Study, finished: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(probe, "PROBE_SECONDS", 1e6)
    plans, real = [], plan_report.show
    monkeypatch.setattr(plan_report, "show", lambda plan, command: plans.append(plan) or real(plan, command))
    for flags in (SOME, (*SOME, "--save-effects")):
        assert script.main([*study_template.flags(tmp_path / "new"), *flags, "--check"]) == 0
    without, with_effects = (plan.disk for plan in plans)
    n_kept = sum(scipy.sparse.load_npz(path).nnz for path in (finished / "effects").iterdir())
    n_most = sum(np.prod(scipy.sparse.load_npz(path).shape) for path in (finished / "effects").iterdir())
    assert 0.5 < (with_effects.about - without.about) / (BYTES_PER_EFFECT * n_kept) < 2
    assert with_effects.at_most - without.at_most == pytest.approx(BYTES_PER_EFFECT * n_most)
    assert 0 < with_effects.at_least - without.at_least < 2 * LEAST_BYTES_PER_EFFECT * n_kept
    assert not (tmp_path / "new").exists()
    out_dir = Path(shutil.copytree(finished, tmp_path / "out"))
    (out_dir / "effects" / "effects_00016.npz").unlink()
    capsys.readouterr()
    for flags, said in ((SOME, "19 are there"), ((*SOME, "--save-effects"), "15 are there")):
        assert script.main([*study_template.flags(out_dir), *flags, "--check"]) == 0
        assert said in capsys.readouterr().out


def test_half_written_ones_are_known():
    assert results.HALF_WRITTEN.fullmatch(".effects_00016.npz.12.0a1b2c3d.tmp")


def test_a_folder_of_something_else_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(UserError, match="holds no run"):
        next(read_effects(tmp_path))
    assert refusal(capsys, script.main(["--out-dir", str(tmp_path), "--analysis-only"]))
