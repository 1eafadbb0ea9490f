"""exhaustive_feature_tracing.py end to end on small inputs: numbers, files, resume, and a user's mistakes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import exhaustive_feature_tracing as script
import look_up_feature
import make_figures
import reference
from cellcircuits import tracing
from cellcircuits.cells import CellSelection, load_cells
from cellcircuits.effects import Bench
from cellcircuits.geneformer import load_model
from cellcircuits.sae_store import find_sae, open_sae
from cellcircuits.vocabulary import load_vocabulary
from conftest import Study, random_sae, write_sae

SCRIPT = Path(script.__file__)
FEATURE_KEYS = {
    "source_layer", "feature_idx", "label", "activation_freq", "n_cells_active", "n_cells_measured",
    "total_significant_edges", "downstream_edges", "elapsed_seconds",
}  # fmt: skip
SUMMARY_KEYS = {
    "source_layer", "n_features_traced", "total_edges", "mean_edges_per_feature", "median_edges_per_feature",
    "max_edges", "n_zero_edge_features", "top_20_hubs",
}  # fmt: skip


def trace(study: Study, out_dir: Path, *flags: str) -> int:
    return script.main([*study.flags(out_dir), *flags])


def without_times(out_dir: Path) -> dict[str, object]:
    """Every result file, its times left out; Parquet tables as rows."""
    files: dict[str, object] = {}
    for path in sorted(out_dir.rglob("*")):
        name = str(path.relative_to(out_dir))
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            content.pop("elapsed_seconds", None)
            content.pop("provenance", None)
            files[name] = content
        elif path.name in ("edges.parquet", "features.parquet"):
            files[name] = path.read_bytes()
        elif path.suffix == ".parquet":
            files[name] = pq.read_table(path).to_pylist()
        elif path.is_file():
            files[name] = None
    return files


def refusal(capsys: pytest.CaptureFixture[str], status: int) -> str:
    """The one sentence a refused run printed."""
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and "Traceback" not in error, error
    return lines[0]


@pytest.fixture(scope="module")
def finished(study_template: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run that no test may change."""
    out_dir = tmp_path_factory.mktemp("finished")
    assert trace(study_template, out_dir) == 0
    return out_dir


def opened(study: Study):
    """Model, SAEs and cells of the study."""
    model = load_model(str(study.model)).model
    saes = {layer: open_sae(find_sae(study.data_root, layer)) for layer in (1, 2, 4, 5)}
    vocabulary = load_vocabulary([study.model], model.config.vocab_size)
    selection = CellSelection(cells="all", n_cells=12, min_median_tokens=5)
    return model, saes, load_cells(study.cells, vocabulary, selection, 48).cells


def test_positions_and_dose_are_the_reference_s(study_template: Study, finished: Path):
    """What each ablation takes from the stream, position by position, from dense encodes of the whole stream."""
    model, saes, cells = opened(study_template)
    sae = saes[1]
    found = pq.read_table(finished / "features.parquet").to_pylist()
    of_cell = []
    for cell in cells:
        stream = reference.streams_of(model, cell.tokens)[1]
        latents, chosen = reference.dense_encode(sae, stream)
        of_cell.append((latents[cell.gene_positions].double().numpy(), chosen[cell.gene_positions].numpy()))
    seen = set()
    for row in (row for row in found if row["is_traced"]):
        feature = row["feature"]
        norm = float(np.linalg.norm(sae.W_dec.weight[:, feature].double().numpy()))
        active = [(latents[:, feature], chosen[:, feature]) for latents, chosen in of_cell if chosen[:, feature].any()]
        n_positions = [int(chosen.sum()) for _, chosen in active]
        doses = [
            np.mean([abs(h) * norm for h, c in zip(latents, chosen, strict=True) if c]) for latents, chosen in active
        ]
        assert row["n_cells_active"] == len(active)
        if active:
            assert row["n_positions"] == pytest.approx(np.mean(n_positions), rel=1e-12)
            assert row["ablated_norm"] == pytest.approx(np.mean(doses), rel=1e-4)
            seen |= {*n_positions}
        else:
            assert row["n_positions"] is row["ablated_norm"] is None
    assert len(seen) > 2
    untraced = [row for row in found if not row["is_traced"]]
    assert untraced and all(row["n_positions"] is row["ablated_norm"] is None for row in untraced)


def test_every_edge_is_the_reference_s(study_template: Study, finished: Path):
    model, saes, cells = opened(study_template)
    rows = pq.read_table(finished / "edges.parquet").to_pylist()
    traced = sorted({row["source"] for row in rows})
    for feature in traced[::5]:
        n_active, measured = reference.trace(model, saes, cells, [(1, feature)], [2, 4, 5])
        record = json.loads((finished / f"feature_{feature:04d}.json").read_text())
        assert record["n_cells_active"] == n_active
        for target, expected in measured.items():
            found = [row for row in rows if row["source"] == feature and row["target_layer"] == target]
            near = {j for j, d in enumerate(expected.d) if abs(abs(d) - 0.5) < 1e-3}
            assert {row["target"] for row in found} - near == set(np.flatnonzero(expected.edges)) - near
            for row in found:
                j = row["target"]
                assert row["cohens_d"] == pytest.approx(expected.d[j], abs=1e-3 * (1 + abs(expected.d[j])))
                assert row["mean_delta"] == pytest.approx(expected.effects[:, j].mean(), abs=1e-4)
                assert row["consistency"] == pytest.approx(expected.consistency[j])
                assert row["n_cells"] == n_active


def test_files_have_the_published_form(finished: Path):
    summary = json.loads((finished / "exhaustive_summary.json").read_text())
    assert SUMMARY_KEYS <= summary.keys()
    assert {
        hub.keys() >= {"feature_idx", "label", "total_edges", "n_cells_active"} for hub in summary["top_20_hubs"]
    } == {True}
    paths = sorted(finished.glob("feature_*.json"))
    records = [json.loads(path.read_text()) for path in paths]
    assert all(FEATURE_KEYS <= record.keys() for record in records)
    assert [path.name for path in paths][:4] == [f"feature_{i:04d}.json" for i in (0, 1, 2, 4)]  # 3 fires too rarely
    assert summary["n_features_traced"] == len(records) == 39
    assert summary["total_edges"] == sum(record["total_significant_edges"] for record in records)
    assert records[0]["label"] == "Cell cycle" and records[1]["label"] == "unannotated"


def test_tables_and_json_agree(finished: Path):
    edges = pq.read_table(finished / "edges.parquet").to_pandas()
    features = pq.read_table(finished / "features.parquet").to_pandas()
    for path in finished.glob("feature_*.json"):
        record = json.loads(path.read_text())
        mine = edges[edges.source == record["feature_idx"]]
        assert len(mine) == record["total_significant_edges"]
        assert set(record["downstream_edges"]) == {str(layer) for layer in mine.target_layer}
        for layer, of_layer in record["downstream_edges"].items():
            table = mine[mine.target_layer == int(layer)]
            assert of_layer["n_significant"] == len(table)
            assert of_layer["mean_abs_d"] == pytest.approx(table.cohens_d.abs().mean())
            strongest = table.cohens_d.abs().sort_values(ascending=False)[:50]
            assert [abs(effect["d"]) for effect in of_layer["top_effects"]] == list(strongest)
    joined = edges.merge(features, left_on=["target_layer", "target"], right_on=["layer", "feature"])
    assert len(joined) == len(edges)
    traced = features[features.is_traced]
    assert traced.n_edges.sum() == len(edges) and set(traced.layer) == {1}


def test_running_again_changes_nothing(study_template: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert trace(study_template, tmp_path) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(Bench, "effects", lambda *_: pytest.fail("traced again"))
    assert trace(study_template, tmp_path) == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_parts_add_up_to_the_whole(study_template: Study, finished: Path, tmp_path: Path):
    listed = tmp_path / "wanted.txt"
    listed.write_text("30\n9, 17\n")
    out_dir = tmp_path / "out"
    assert trace(study_template, out_dir, "--features", str(listed), "--batch-size", "1") == 0
    assert sorted(path.name for path in out_dir.glob("feature_*")) == [
        f"feature_{i:04d}.json" for i in (9, 17, 30)
    ]  # fmt: skip
    assert trace(study_template, out_dir, "--end-idx", "20") == 0
    assert trace(study_template, out_dir, "--start-idx", "20") == 0
    parts, whole = (pq.read_table(folder / "edges.parquet").to_pandas() for folder in (out_dir, finished))
    names = ["source", "target_layer", "target", "n_cells"]
    assert parts[names].equals(whole[names])
    assert np.allclose(parts.cohens_d, whole.cohens_d, rtol=1e-3)


@pytest.mark.parametrize("damage", ["json", "shard", "edges", "features"])
def test_a_damaged_file_is_made_again_and_said(
    study_template: Study, finished: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
):
    assert trace(study_template, tmp_path) == 0
    name = {"json": "feature_0007.json", "shard": "blocks/block_00016.parquet", "edges": "edges.parquet"}
    path = tmp_path / name.get(damage, "features.parquet")
    path.write_bytes(path.read_bytes()[:100])
    caplog.clear()
    assert trace(study_template, tmp_path) == 0
    assert without_times(tmp_path) == without_times(finished)
    if damage in ("json", "shard"):
        assert path.name in caplog.text


def test_killed_in_the_middle_of_a_block_goes_on_from_the_saved_cells(
    study_template: Study, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tracing, "SAVE_EVERY_SECONDS", -1.0)
    real, calls = Bench.effects, []

    def interrupted(self, clean, features):
        calls.append(clean.cell.row)
        if len(calls) == 18:
            raise KeyboardInterrupt
        return real(self, clean, features)

    monkeypatch.setattr(Bench, "effects", interrupted)
    assert trace(study_template, tmp_path) == 130
    (partial,) = (tmp_path / "blocks").glob("*.partial.npz")
    with np.load(partial) as kept:
        n_kept = kept["measured"].shape[1]
    assert n_kept > 0
    first_cells = []

    def recorded(self, clean, features):
        first_cells.append(clean.cell.row)
        return real(self, clean, features)

    monkeypatch.setattr(Bench, "effects", recorded)
    assert trace(study_template, tmp_path) == 0
    # the engine's self-check runs one cell before
    assert sorted(set(first_cells))[n_kept] in first_cells[:2]
    assert without_times(tmp_path) == without_times(finished)


@pytest.mark.parametrize("content", [b"", b"PK garbage", None])
def test_damaged_partial_work_is_ignored(study_template: Study, finished: Path, tmp_path: Path, content: bytes | None):
    assert trace(study_template, tmp_path) == 0
    partial = tmp_path / "blocks" / "block_00016.partial.npz"
    partial.with_name("block_00016.parquet").unlink()
    if content is None:
        np.savez(partial, features=np.arange(3), effects=np.ones((3, 2, 120)), measured=np.ones((3, 2), dtype=bool),
                 seconds=np.ones(3), fingerprint=np.array("of another run"))  # fmt: skip
    else:
        partial.write_bytes(content)
    assert trace(study_template, tmp_path) == 0
    assert without_times(tmp_path) == without_times(finished)


def test_kill_9_and_a_rerun_give_the_same_files(study_template: Study, finished: Path, tmp_path: Path):
    out_dir = tmp_path / "out"
    command = [sys.executable, str(SCRIPT), *study_template.flags(out_dir)]
    # another number of threads would round differently
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(out_dir.glob("blocks/*.parquet")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert trace(study_template, out_dir) == 0
    found, expected = without_times(out_dir), without_times(finished)
    assert {name for name in found if not name.endswith(".tmp")} == set(expected)
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    "flags, field",
    [
        (["--n-cells", "11"], "n_cells"),
        (["--downstream-layers", "2,5"], "downstream_layers"),
        (["--min-abs-d", "0.8"], "min_abs_d"),
        (["--tokenization", "geneformer"], "tokenization"),
        (["--max-tokens", "20"], "cells"),
    ],
)
def test_other_settings_are_refused_by_name(
    study_template: Study, finished: Path, capsys: pytest.CaptureFixture[str], flags: list[str], field: str
):
    before = without_times(finished)
    assert field in refusal(capsys, trace(study_template, finished, *flags))
    assert without_times(finished) == before


def test_another_sae_is_refused_by_name(study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out_dir = tmp_path / "out"
    assert trace(study, out_dir, "--features", "1") == 0
    write_sae(study.data_root, 2, random_sae(99, 24, 40, 4))
    assert "saes.2.checkpoint" in refusal(capsys, trace(study, out_dir))


def test_analysis_only_summarises_what_is_there(
    study_template: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert "manifest.json" in refusal(capsys, script.main(["--analysis-only", "--out-dir", str(tmp_path / "none")]))
    assert trace(study_template, tmp_path, "--end-idx", "16") == 0
    before = without_times(tmp_path)
    capsys.readouterr()
    assert script.main(["--analysis-only", "--out-dir", str(tmp_path)]) == 0
    assert "15 features traced" in capsys.readouterr().out
    assert without_times(tmp_path) == before


def test_all_downstream_reads_every_later_layer(study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    refused = refusal(capsys, trace(study, tmp_path, "--all-downstream", "--features", "14"))
    assert "layer 3" in refused and "prepare_inputs.py --layers 3 " in refused and "there are: 1, 2, 4, 5" in refused
    write_sae(study.data_root, 3, random_sae(3, 24, 32, 2))
    assert trace(study, tmp_path, "--all-downstream", "--features", "14") == 0
    assert set(json.loads((tmp_path / "feature_0014.json").read_text())["downstream_edges"]) == {"2", "3", "4", "5"}


def test_the_flat_layout_gives_the_same_edges(study: Study, finished: Path, tmp_path: Path):
    root = study.data_root / "sae_models"
    for layer in (1, 2, 4, 5):
        folder = next(root.glob(f"layer{layer:02d}_*"))
        (folder / "sae_final.pt").rename(root / f"sae_layer{layer}.pt")
        (folder / "feature_catalog.json").rename(root / f"feature_catalog_layer{layer}.json")
        mean = np.load(folder / "activation_mean.npy")
        np.save(study.data_root / f"layer_{layer}_activations.npy", np.stack([mean - 1, mean + 1]))
        (folder / "activation_mean.npy").unlink()
    assert trace(study, tmp_path) == 0
    assert sorted(path.name for path in root.glob("activation_mean_layer*")) == [
        f"activation_mean_layer{layer}.npy" for layer in (1, 2, 4, 5)
    ]
    found, expected = (pq.read_table(folder / "edges.parquet").to_pandas() for folder in (tmp_path, finished))
    near = expected.cohens_d.abs().between(0.499, 0.501).sum()
    keys = ["source", "target_layer", "target"]
    assert len(found[keys].merge(expected[keys])) >= max(len(found), len(expected)) - near


def test_figure_and_look_up(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in finished.glob("e*.*"):
        (copy / path.name).write_bytes(path.read_bytes())
    for name in ("features.parquet", "manifest.json", "calibration.json"):
        (copy / name).write_bytes((finished / name).read_bytes())
    assert make_figures.main(["--out-dir", str(copy)]) == 0
    for name in ("exhaustive_tracing.png", "calibration.png"):
        assert (copy / name).read_bytes()[:4] == b"\x89PNG"
    edge = pq.read_table(finished / "edges.parquet").to_pylist()[0]
    assert look_up_feature.main([str(edge["source"]), "--out-dir", str(copy), "--n-edges", "100"]) == 0
    assert f"L{edge['target_layer']}/F{edge['target']} " in capsys.readouterr().out
    assert look_up_feature.main([str(edge["target"]), "--layer", "2", "--out-dir", str(copy)]) == 0
    assert "from layer 1" in capsys.readouterr().out
    assert "no feature 400" in refusal(capsys, look_up_feature.main(["400", "--out-dir", str(copy)]))
    assert "no such file" in refusal(capsys, look_up_feature.main(["1", "--out-dir", str(tmp_path)]))


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--source-layer", "5"], ["last block", "--source-layer 1 --downstream-layers 2,3,5"]),
        (["--source-layer", "6"], ["6 blocks"]),
        (["--downstream-layers", "2,6,11"], ["--downstream-layers 6", "try --downstream-layers 2,3,5"]),
        (["--downstream-layers", "1,2"], ["not after the source layer 1"]),
        (["--downstream-layers", "3"], ["no SAE of layer 3"]),
        (["--features", "1,400"], ["no feature 400"]),
        (["--features", "nonsense"], ["nonsense"]),
        (["--start-idx", "3", "--end-idx", "4"], ["no feature to trace"]),
        (["--data-path", "absent.h5ad"], ["absent.h5ad"]),
        (["--data-root", "absent"], ["absent"]),
        (["--model", "absent/model/folder"], ["absent/model/folder"]),
        (["--dicts", "absent"], ["absent", "--dicts"]),
        (["--cells", "controls", "--control-column", "guide"], ["guide", "--cells all"]),
        (["--obs-filter", "cell_line=k562"], ["cell_line"]),
        (["--counts", "layer:none"], ["none"]),
        (["--gene-column", "none"], ["none"]),
        (["--device", "cuda"], ["--device cuda"]),
    ],
)
def test_a_mistake_gives_one_sentence_and_no_results(
    study_template: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: list[str]
):
    if flags == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("a CUDA device is there")
    out_dir = tmp_path / "out"
    sentence = refusal(capsys, trace(study_template, out_dir, *flags))
    assert all(word in sentence for word in words), sentence
    assert not out_dir.exists()


def test_broken_inputs_give_one_sentence(study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = next((study.data_root / "sae_models").glob("layer01_*"))
    write_sae(study.data_root, 2, random_sae(0, 16, 40, 4)).rename(folder.parent / "layer02_other")
    write_sae(study.data_root, 4, random_sae(0, 16, 40, 4)).rename(folder.parent / "layer04_other")
    with_two = refusal(capsys, trace(study, tmp_path))
    assert "--sae-run" in with_two
    assert "width 16" in refusal(capsys, trace(study, tmp_path, "--sae-run", "other", "--source-layer", "2",
                                               "--downstream-layers", "4"))  # fmt: skip
    (folder / "feature_catalog.json").unlink()
    sentence = refusal(capsys, trace(study, tmp_path, "--sae-run", "x1_k4"))
    assert "prepare_inputs.py" in sentence and "--existing-saes --layers 1" in sentence
    study.cells.write_bytes(b"this is no HDF5 file")
    (folder / "feature_catalog.json").write_text('{"features": [{"feature_idx": 0, "activation_freq": 0.5}]}')
    assert str(study.cells) in refusal(capsys, trace(study, tmp_path, "--sae-run", "x1_k4"))
    (folder / "feature_catalog.json").write_text('{"features": [{"feature_idx": 40, "activation_freq": 0.5}]}')
    assert "feature 40" in refusal(capsys, trace(study, tmp_path, "--sae-run", "x1_k4"))
    assert list(tmp_path.iterdir()) == [study.root]


def test_missing_flags_are_named_with_their_variable(capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.delenv("SAE_DATA_ROOT", raising=False)
    sentence = refusal(capsys, script.main([]))
    assert "--data-root" in sentence and "SAE_DATA_ROOT" in sentence


def test_environment_variables_stand_in_for_flags(study_template: Study, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("SAE_DATA_ROOT", str(study_template.data_root))
    monkeypatch.setenv("SAE_DATA_PATH", str(study_template.cells))
    monkeypatch.setenv("SAE_OUT_DIR", str(tmp_path))
    args = script.build_parser().parse_args([])
    assert (args.data_root, args.data_path, args.out_dir) == (study_template.data_root, study_template.cells, tmp_path)


def test_an_engine_that_disagrees_with_a_full_pass_is_refused(
    study_template: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    real = Bench.effects
    monkeypatch.setattr(Bench, "effects", lambda *args: real(*args) * 1.1 + 0.1)
    assert "disagree" in refusal(capsys, trace(study_template, tmp_path))


def test_partial_work_is_saved_well_within_ten_minutes():
    assert tracing.SAVE_EVERY_SECONDS <= 300


@pytest.mark.parametrize(
    "change",
    [
        lambda settings: settings.pop("calibration"),
        lambda settings: settings.pop("min_abs_d"),
        lambda settings: settings.update(calibration=[]),
        lambda settings: settings.update(calibration={"sead": 0}),
    ],
    ids=["an earlier version's", "no threshold", "no mapping", "an unknown key"],
)
def test_a_folder_whose_manifest_says_too_little_is_refused(finished: Path, tmp_path: Path, capsys, change):
    out_dir = shutil.copytree(finished, tmp_path / "out")
    content = json.loads((out_dir / "manifest.json").read_text())
    change(content["settings"])
    (out_dir / "manifest.json").write_text(json.dumps(content))
    said = refusal(capsys, script.main(["--analysis-only", "--out-dir", str(out_dir)]))
    assert "manifest.json: does not say how edges are called and tested" in said
    assert (out_dir / "edges.parquet").read_bytes() == (finished / "edges.parquet").read_bytes()
