"""The trajectory script from the command line: files, record, refusals."""

import json
from pathlib import Path

import anndata
import numpy as np
import pytest
from scipy import sparse
from scipy.stats import spearmanr

import trajectory_analysis as script
from cellcircuits import activations, manifest, trajectory
from conftest import Study, write_study

TYPES = ("hematopoietic stem cell", "monocyte")


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    """The small study with 40 cells that change along their number, of two types in one tissue."""
    study = write_study(tmp_path_factory.mktemp("study"))
    rng = np.random.default_rng(0)
    place = np.linspace(0, 1, 40)
    mean = 0.3 + 20 * np.exp(-((place[:, None] - np.linspace(-0.2, 1.2, 60)) ** 2) / 0.05)
    cells = anndata.AnnData(sparse.csr_matrix(rng.poisson(mean).astype(np.float32)))
    cells.var_names = [f"ENSG{i:011d}" for i in range(60)]
    cells.obs_names = [f"cell{i}" for i in range(40)]
    cells.obs["cell_type"] = [TYPES[i >= 5] for i in range(40)]
    cells.obs["tissue_in_publication"] = "Blood"
    cells.write_h5ad(study.cells)
    return study


def analyse(study: Study, out_dir: Path, *flags: str) -> int:
    return script.main(
        [
            "--model", str(study.model), "--data-root", str(study.data_root), "--data-path", str(study.cells),
            "--min-median-tokens", "5", "--layers", "1,4", "--device", "cpu", "--out-dir", str(out_dir), *flags,
        ]
    )  # fmt: skip


@pytest.fixture(scope="module")
def out_dir(study, tmp_path_factory) -> Path:
    """A finished run."""
    out_dir = tmp_path_factory.mktemp("run") / "out"
    assert analyse(study, out_dir, "--follow-genes", "GENE59,ENSG00000000000") == 0
    return out_dir


def content(out_dir: Path, name: str):
    return json.loads((out_dir / name).read_text())


def refusal(capsys, study: Study, out_dir: Path, *flags: str) -> str:
    assert analyse(study, out_dir, *flags) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error[error.index("error: ") :]


class TestFiles:
    def test_metadata_say_which_cells_stand_where(self, out_dir):
        metadata = content(out_dir, "cell_metadata.json")
        assert metadata["cell_ids"] == [f"cell{i}" for i in range(40)]
        assert metadata["h5ad_row"] == list(range(40))
        assert metadata["cell_types"] == [TYPES[i >= 5] for i in range(40)]
        assert metadata["tissues"] == ["Blood"] * 40
        assert metadata["root"] == "cell0"
        assert spearmanr(metadata["pseudotime"], range(40)).statistic > 0.9

    def test_activations_carry_their_cells(self, out_dir):
        with np.load(out_dir / "sae_activations.npz", allow_pickle=False) as kept:
            assert kept["cell_ids"].tolist() == [f"cell{i}" for i in range(40)]
            assert len(kept["about"]) == 4
            for layer in (1, 4):
                mean, largest, share = (kept[f"layer_{layer}{kind}"] for kind in ("", "_max", "_frac"))
                assert mean.shape == largest.shape == share.shape == (40, 40)
                assert mean.dtype == np.float32
                assert (mean >= 0).all() and (largest >= mean).all() and (share <= 1).all()
                np.testing.assert_allclose(share.sum(axis=1), 4, rtol=1e-5)  # k of them at every position

    def test_switch_features_are_a_panel(self, out_dir):
        panel = content(out_dir, "switch_features.json")
        assert panel
        keys = {"layer", "idx", "d", "kind", "freq", "spearman_rho", "q", "rho_given_n_genes", "label"}
        assert all(set(feature) == keys for feature in panel)
        with np.load(out_dir / "sae_activations.npz") as kept:
            arrays = dict(kept)
        times = np.array(content(out_dir, "cell_metadata.json")["pseudotime"])
        for feature in panel:
            values = arrays[f"layer_{feature['layer']}"][:, feature["idx"]].astype(float)
            assert feature["spearman_rho"] == pytest.approx(spearmanr(values, times).statistic)
            assert (feature["d"] >= 0.5) if feature["kind"] == "ON" else (feature["d"] <= -0.5)
            assert feature["freq"] == np.mean(values > 0) >= 0.05
        labels = {feature["label"] for feature in panel if feature["idx"] != 0}
        assert labels == {"unannotated"}

    def test_summary(self, out_dir):
        summary, panel = content(out_dir, "trajectory_summary.json"), content(out_dir, "switch_features.json")
        assert (summary["n_cells"], summary["n_left_out"], summary["root"]) == (40, 0, "cell0")
        assert (summary["n_early"], summary["n_late"]) == (
            13,
            13,
        )  # 33.3% of the way from the 1st to the 40th is the 13.99th
        for layer in ("1", "4"):
            for kind in ("ON", "OFF"):
                n = sum(str(x["layer"]) == layer and x["kind"] == kind for x in panel)
                assert summary["n_switch_features"][layer][kind] == n
            assert 0 < summary["n_tested"][layer] <= 40
        assert summary["seeds"] == {"cells": 42, "scanpy": 0}
        assert set(summary["versions"]) >= {"torch", "transformers", "numpy", "scanpy"}
        assert "pooled SD" in summary["rule"]
        assert summary["selection"]["n_cells"] == 500

    def test_confounds_and_followed_genes(self, study, out_dir):
        summary = content(out_dir, "trajectory_summary.json")
        times = content(out_dir, "cell_metadata.json")["pseudotime"]
        counts = anndata.read_h5ad(study.cells).X.toarray()
        depth = counts.sum(axis=1)
        expected = {"n_genes_detected": (counts > 0).sum(axis=1), "depth": depth}
        for name, values in expected.items():
            assert summary["confounds"][name] == {"rho": pytest.approx(spearmanr(times, values).statistic), "n": 40}
        followed = summary["followed_genes"]
        assert list(followed) == ["GENE59", "ENSG00000000000"]
        for gene, column in (("GENE59", 59), ("ENSG00000000000", 0)):
            rho = spearmanr(times, np.log1p(1e4 * counts[:, column] / depth)).statistic
            assert followed[gene]["rho"] == pytest.approx(rho)

    def test_the_same_fingerprint_everywhere(self, out_dir):
        prints = {content(out_dir, name)["fingerprint"] for name in ("cell_metadata.json", "trajectory_summary.json")}
        assert len(prints) == 1


class TestReport:
    def test_says_what_confounds_it(self, study, tmp_path, out_dir, capsys):
        assert analyse(study, tmp_path, "--traj-dir", str(out_dir)) == 0
        text = capsys.readouterr().out
        assert "Trajectory of 40 cells (0 left out), cell_metadata.json (by ids), root cell0: 13 early, 13 late" in text
        assert "pseudotime follows detected genes with rho " in text
        assert "read switch features with that in mind" in text
        assert "ON L1/F" in text

    def test_equal_depth(self, study, tmp_path, capsys):
        assert analyse(study, tmp_path, "--downsample-to", "150") == 0
        summary = content(tmp_path, "trajectory_summary.json")
        assert summary["confounds"]["depth"]["rho"] is None
        assert summary["downsample_to"] == content(tmp_path, "cell_metadata.json")["downsample_to"] == 150
        assert "depth with rho undefined (the same in all cells)" in capsys.readouterr().out


class TestFolder:
    def test_again_gives_the_same(self, study, tmp_path):
        assert analyse(study, tmp_path) == 0
        names = ("cell_metadata.json", "switch_features.json", "trajectory_summary.json", "sae_activations.npz")
        before = {name: (tmp_path / name).read_bytes() for name in names[:3]}
        (tmp_path / names[3]).unlink()
        assert analyse(study, tmp_path) == 0
        assert {name: (tmp_path / name).read_bytes() for name in names[:3]} == before
        assert (tmp_path / names[3]).is_file()

    def test_a_folder_is_no_input_of_its_own(self, study, tmp_path, monkeypatch):
        monkeypatch.setenv("SAE_TRAJ_DIR", str(tmp_path / "run"))
        for _ in range(2):
            assert analyse(study, tmp_path / "run") == 0
            assert content(tmp_path / "run", "cell_metadata.json")["source"] == "scanpy dpt"

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (("--layers", "1"), "layers is [1, 4] there and [1] here"),
            (("--n-cells", "30"), "n_cells is 40 there and 30 here"),
            (("--root-cell-type", "monocyte"), 'pseudotime.root is "cell0" there and "cell5" here'),
            (("--downsample-to", "100"), "downsample_to is null there and 100 here"),
        ],
    )
    def test_other_settings_are_refused(self, capsys, study, out_dir, flags, said):
        kept = (out_dir / "switch_features.json").read_bytes()
        assert said in refusal(capsys, study, out_dir, *flags)
        assert (out_dir / "switch_features.json").read_bytes() == kept


class TestInterrupted:
    """Told to stop at the cells of a pass over 40, a run goes on there and ends as if nothing had been."""

    @pytest.fixture
    def cells_run(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Names of the cells that were run through the model; "stop" in it stops before that many further cells."""
        real, seen = activations.residuals, []

        def counted(model, tokens, layers):
            if seen and seen[0] == len(seen):
                raise KeyboardInterrupt
            seen.append("cell")
            return real(model, tokens, layers)

        monkeypatch.setattr(activations, "residuals", counted)
        return seen

    def test_it_goes_on_and_ends_the_same(self, study, out_dir, tmp_path, cells_run, capsys):
        flags = ("--follow-genes", "GENE59,ENSG00000000000")
        for n_cells in (13, 9):
            cells_run[:] = [n_cells + 1]
            assert analyse(study, tmp_path, *flags) == 130
            assert "run the same command again to go on" in capsys.readouterr().err
        kept = sorted(path.name for path in (tmp_path / "partial").iterdir())
        assert kept == ["rows_0000000.npz", "rows_0000013.npz"]
        assert not list(tmp_path.glob("*.npz"))  # nothing half-finished passes for a result
        cells_run[:] = [-1]
        assert analyse(study, tmp_path, *flags) == 0
        assert len(cells_run) == 1 + 40 - 13 - 9
        names = [path.name for path in sorted(out_dir.iterdir())]
        assert [path.name for path in sorted(tmp_path.iterdir())] == names
        assert {name: (tmp_path / name).read_bytes() for name in names} == {
            name: (out_dir / name).read_bytes() for name in names
        }

    def test_other_settings_do_not_go_on_there(self, study, tmp_path, cells_run, capsys):
        cells_run[:] = [3]
        assert analyse(study, tmp_path) == 130
        assert "n_cells is 40 there and 30 here" in refusal(capsys, study, tmp_path, "--n-cells", "30")

    def test_another_version_of_the_code_is_refused_unless_mixed(self, study, tmp_path, cells_run, capsys, monkeypatch):
        cells_run[:] = [3]
        assert analyse(study, tmp_path) == 130
        cells_run[:] = [-1]
        monkeypatch.setattr(manifest, "code_hash", lambda: "0" * 64)
        capsys.readouterr()
        assert "the code in src/ has changed" in refusal(capsys, study, tmp_path)
        assert analyse(study, tmp_path, "--mix-versions") == 0
        kept = content(tmp_path, "manifest.json")["provenance"]
        assert len(kept) == 2 and kept[1]["code"] == "0" * 64


class TestRefusals:
    def test_layer_out_of_the_model(self, capsys, study, tmp_path):
        assert "--layers 17: this model has 6 blocks, 0 to 5" in refusal(capsys, study, tmp_path, "--layers", "1,17")

    def test_layer_without_an_sae(self, capsys, study, tmp_path):
        assert "Missing: layers 3" in refusal(capsys, study, tmp_path, "--layers", "1,3")

    def test_no_root(self, capsys, study, tmp_path):
        message = refusal(capsys, study, tmp_path, "--root-cell-type", "egg")
        assert "monocyte (35), hematopoietic stem cell (5)" in message

    def test_too_few_cells(self, capsys, study, tmp_path):
        flags = ("--n-cells", "3", "--root-cell-type", "monocyte")
        assert "3 cells with" in refusal(capsys, study, tmp_path, *flags)

    def test_no_cells(self, capsys, study, tmp_path, monkeypatch):
        monkeypatch.delenv("SAE_IMMUNE_H5AD", raising=False)
        assert script.main(["--data-root", str(study.data_root), "--out-dir", str(tmp_path)]) == 2
        assert "--data-path is missing" in capsys.readouterr().err

    def test_genes_that_the_model_does_not_know(self, capsys, study, tmp_path):
        cells = anndata.read_h5ad(study.cells)
        cells.var_names = [name if i % 5 == 0 else f"other{i}" for i, name in enumerate(cells.var_names)]
        cells.write_h5ad(tmp_path / "other.h5ad")
        flags = ("--data-path", str(tmp_path / "other.h5ad"))
        assert "--min-mapped" in refusal(capsys, study, tmp_path / "out", *flags)
        assert not (tmp_path / "out").exists()


class TestConfounds:
    def test_rank_correlations_over_the_cells_with_a_pseudotime(self):
        rng = np.random.default_rng(0)
        time = rng.uniform(0, 1, 30)
        genes, depth = 200 + 50 * time + rng.normal(0, 10, 30), rng.integers(100, 110, 30).astype(float)
        holes = time.copy()
        holes[[3, 9]] = np.nan
        kept = [n for n in range(30) if n not in (3, 9)]
        found = trajectory.confounds(holes, genes, depth)
        for name, values in (("n_genes_detected", genes), ("depth", depth)):
            rho = pytest.approx(spearmanr(time[kept], values[kept]).statistic)
            assert found[name] == {"rho": rho, "n": 28}

    def test_equal_depth_has_none(self):
        found = trajectory.confounds(np.arange(5.0), np.arange(5.0), np.full(5, 100.0))
        assert found["depth"] == {"rho": None, "n": 5}
        assert found["n_genes_detected"]["rho"] == pytest.approx(1)
