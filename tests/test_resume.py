"""What a later start of the tracing script may go on from, and what stops a run."""

import json
import shutil
from pathlib import Path

import anndata
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import BertForMaskedLM

from cellcircuits import graph_store
from cellcircuits.effects import Bench
from cellcircuits.manifest import open_folder, settings_fingerprint
from cellcircuits.sae_store import find_sae
from cellcircuits.tracing import BlockEffects
from conftest import Study, random_model
from test_tracing_script import refusal, trace, without_times

N_CELLS, N_TARGETS = 12, 120
BLOCK = tuple(feature for feature in range(16) if feature != 3)  # feature 3 fires too rarely


@pytest.fixture(scope="module")
def one_block(study_template: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run over the first block that no test may change."""
    out_dir = tmp_path_factory.mktemp("one_block")
    assert trace(study_template, out_dir, "--end-idx", "16") == 0
    return out_dir


@pytest.fixture
def out_dir(one_block: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(one_block, tmp_path / "out")


class TestPartialWork:
    """A partial of the right size that says 1 everywhere takes the place of the first block's shard."""

    @pytest.fixture
    def trace_again(self, study_template: Study, out_dir: Path):
        def run(**changed):
            """Trace the block, with a partial whose arrays are replaced by `changed`, or left out where None."""
            shape = (len(BLOCK), N_CELLS)
            arrays = {
                "features": np.array(BLOCK),
                "effects": np.ones((shape[0] * shape[1], N_TARGETS)),
                "measured": np.ones(shape, dtype=bool),
                "seconds": np.ones(len(BLOCK)),
                "n_positions": np.ones((len(BLOCK), 12), np.int64),
                "removed_norm": np.ones((len(BLOCK), 12)),
                "fingerprint": np.array(settings_fingerprint(open_folder(out_dir)["settings"])),
            } | changed
            shard = graph_store.shard_path(out_dir, 0)
            shard.unlink()
            partial = shard.with_suffix(".partial.npz")
            np.savez(partial, **{name: array for name, array in arrays.items() if array is not None})
            assert trace(study_template, out_dir, "--end-idx", "16") == 0
            assert not partial.exists()
            return without_times(out_dir)

        return run

    def test_of_this_run_it_is_used(self, trace_again, out_dir: Path):
        trace_again()
        assert json.loads((out_dir / "feature_0000.json").read_text())["total_significant_edges"] == N_TARGETS

    def test_of_another_run_it_is_not(self, trace_again, one_block: Path, caplog: pytest.LogCaptureFixture):
        assert trace_again(fingerprint=np.array("f" * 64)) == without_times(one_block)
        assert "block_00000.partial.npz is of another run" in caplog.text

    def test_of_other_features_it_is_not(self, trace_again, one_block: Path, caplog: pytest.LogCaptureFixture):
        assert trace_again(features=np.array(BLOCK) + 1) == without_times(one_block)
        assert "of other features" in caplog.text

    def test_damaged_it_leaves_nothing_behind(self, trace_again, one_block: Path, caplog: pytest.LogCaptureFixture):
        assert trace_again(seconds=None) == without_times(one_block)
        assert "block_00000.partial.npz is damaged" in caplog.text


def test_a_partial_comes_back_as_it_was_saved_or_not_at_all(tmp_path: Path):
    saved = BlockEffects.empty((1, 2), 3, 4)
    saved.effects[:, :2], saved.measured[:, :2], saved.seconds[:], saved.n_cells_done = 1.0, True, 2.0, 2
    saved.effects[:, 2] = 9.0  # a cell that is not finished
    saved.save(tmp_path / "a.npz", "f")
    for features, fingerprint, used in (((1, 2), "f", 1), ((1, 2), "g", 0), ((1, 3), "f", 0), ((2, 1), "f", 0)):
        block = BlockEffects.empty(features, 3, 4)
        block.restore(tmp_path / "a.npz", fingerprint)
        assert block.n_cells_done == 2 * used
        assert (block.effects.sum(), block.measured.sum(), block.seconds.sum()) == (16 * used, 4 * used, 4 * used)


class TestOtherSettingsAreRefused:
    """The one setting that differs is named, and the folder stays as it is."""

    @pytest.fixture
    def refuse(self, study_template: Study, one_block: Path, capsys: pytest.CaptureFixture[str]):
        def check(field: str, *flags: str) -> None:
            before = without_times(one_block)
            sentence = refusal(capsys, trace(study_template, one_block, *flags))
            assert f"({field} is " in sentence and sentence.count(" there and ") == 1, sentence
            assert without_times(one_block) == before

        return check

    def test_another_model(self, refuse, study_template: Study, tmp_path: Path):
        random_model(1).save_pretrained(tmp_path / "other")
        refuse("model", "--model", str(tmp_path / "other"), "--dicts", str(study_template.model / "geneformer"))

    @pytest.mark.parametrize("change", ["a gene's counts", "the cells' names"])
    def test_other_cells(self, refuse, study_template: Study, tmp_path: Path, change: str):
        cells = anndata.read_h5ad(study_template.cells)
        if change == "a gene's counts":  # the same genes, in another order
            counts = cells.X.toarray()
            counts[:, 5] *= 40
            cells.X = counts
        else:  # names of the same length
            cells.obs_names = [name.upper() for name in cells.obs_names]
        cells.write_h5ad(tmp_path / "other.h5ad")
        refuse("cells", "--data-path", str(tmp_path / "other.h5ad"))

    def test_another_seed(self, refuse):
        refuse("cells", "--seed", "1")

    def test_another_edge_rule(self, refuse):
        refuse("min_consistency", "--min-consistency", "0.8")
        refuse("min_abs_d", "--min-abs-d", "0.6")

    def test_another_size_of_blocks(self, refuse, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(graph_store, "BLOCK_SIZE", 8)
        refuse("block_size")


def test_labels_may_change_between_runs(study: Study, tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture):
    out_dir = tmp_path / "out"
    assert trace(study, out_dir, "--end-idx", "16") == 0
    before, edges = without_times(out_dir), (out_dir / "edges.parquet").read_bytes()
    folder = next((study.data_root / "sae_models").glob("layer01_*"))
    labels = {"0": [{"ontology": "GO_BP", "term": "Translation"}]}
    (folder / "feature_annotations.json").write_text(json.dumps({"feature_annotations": labels}))
    monkeypatch.setattr(Bench, "effects", lambda *_: pytest.fail("traced again"))
    caplog.clear()
    assert trace(study, out_dir, "--end-idx", "16") == 0
    after = without_times(out_dir)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"feature_0000.json", "features.parquet", "exhaustive_summary.json"}
    assert after["feature_0000.json"] == before["feature_0000.json"] | {"label": "Translation"}
    assert pq.read_table(out_dir / "features.parquet")["label"][0].as_py() == "Translation"
    assert (out_dir / "edges.parquet").read_bytes() == edges
    assert "damaged" not in caplog.text


class TestNotFinite:
    """NaN or infinite values end the run in one sentence, and the block they are in is not written."""

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_effects(self, study_template: Study, out_dir: Path, capsys, monkeypatch, value: float):
        real = Bench.effects

        def broken(self, clean, features):
            effects = real(self, clean, features)
            effects[[feature == 20 for feature in features], 7] = value
            return effects

        monkeypatch.setattr(Bench, "effects", broken)
        sentence = refusal(capsys, trace(study_template, out_dir, "--end-idx", "32"))
        assert "cell cell" in sentence and "NaN or infinite values in the effect of an ablation" in sentence
        assert [path.name for path in (out_dir / "blocks").iterdir()] == ["block_00000.parquet"]
        assert {path.name for path in out_dir.glob("feature_*.json")} == {f"feature_{i:04d}.json" for i in BLOCK}
        monkeypatch.undo()
        assert trace(study_template, out_dir, "--end-idx", "32") == 0
        assert (out_dir / "blocks" / "block_00016.parquet").exists()

    @pytest.mark.parametrize(
        "layer, words",
        [(0, "NaN or infinite values in the residual stream at layer 1, first at"), (3, "layer 4, first at")],
    )
    def test_a_broken_model(self, study_template: Study, tmp_path: Path, capsys, layer: int, words: str):
        model = BertForMaskedLM.from_pretrained(study_template.model)
        with torch.no_grad():
            model.bert.encoder.layer[layer].output.dense.weight[0] = 3e38  # finite, but its products are not
        model.save_pretrained(tmp_path / "broken")
        flags = ("--model", str(tmp_path / "broken"), "--dicts", str(study_template.model / "geneformer"))
        assert words in refusal(capsys, trace(study_template, tmp_path / "out", *flags))
        assert not list((tmp_path / "out").glob("feature_*.json")) and not (tmp_path / "out" / "blocks").exists()


def test_a_catalog_that_lost_a_traced_feature_is_one_sentence(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out_dir = tmp_path / "out"
    assert trace(study, out_dir, "--end-idx", "16") == 0
    path = find_sae(study.data_root, 1).catalog
    catalog = json.loads(path.read_text())
    catalog["features"] = [entry for entry in catalog["features"] if entry["feature_idx"] != 5]
    path.write_text(json.dumps(catalog))
    assert "feature 5" in refusal(capsys, trace(study, out_dir, "--end-idx", "16"))


def test_no_flipped_bit_of_a_shard_counts(study_template: Study, tmp_path: Path) -> None:
    """Checksums: a damaged shard is either read as it was written or not at all."""
    assert trace(study_template, tmp_path, "--end-idx", "16") == 0
    path = graph_store.shard_path(tmp_path, 0)
    content = path.read_bytes()
    fingerprint = settings_fingerprint(open_folder(tmp_path)["settings"])
    whole = graph_store.read_shard(path, fingerprint)
    rng = np.random.default_rng(0)
    for position in rng.choice(8 * len(content), 400, replace=False):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        found = graph_store.read_shard(path, fingerprint)
        assert found is None or (found.facts == whole.facts and found.edges.equals(whole.edges))
