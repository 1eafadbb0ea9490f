"""What the flags of the tracing script do: edge rule, cells, features, layers; and features.parquet."""

import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import exhaustive_feature_tracing as script
import higher_order_ablation
from cellcircuits import cli
from cellcircuits.catalog import FeatureInfo
from cellcircuits.errors import UserError
from cellcircuits.geneformer import LoadedModel, load_model
from cellcircuits.inputs import open_cells
from conftest import Study, write_study
from test_tracing_script import refusal, trace


def parsed(*flags: str):
    return script.build_parser().parse_args(flags)


def edges_of(out_dir: Path) -> pd.DataFrame:
    return pq.read_table(out_dir / "edges.parquet").to_pandas()


@pytest.fixture(scope="module")
def all_moved(study_template: Study, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """Every target that some feature of the first block moves at all, as `edges.parquet` rows."""
    out_dir = tmp_path_factory.mktemp("all_moved")
    assert trace(study_template, out_dir, "--end-idx", "16", "--min-abs-d", "0", "--min-consistency", "0") == 0
    return edges_of(out_dir)


class TestEdgeRule:
    def test_both_thresholds_filter_strictly(self, study_template: Study, tmp_path: Path, all_moved: pd.DataFrame):
        flags = ("--end-idx", "16", "--min-abs-d", "0.8", "--min-consistency", "0.75")
        assert trace(study_template, tmp_path, *flags) == 0
        n_majority = (all_moved.consistency * all_moved.n_cells).round()
        strong, consistent = all_moved.cohens_d.abs() > 0.8, 4 * n_majority > 3 * all_moved.n_cells
        assert (strong & ~consistent).any() and (~strong & consistent).any()
        assert (strong & (4 * n_majority == 3 * all_moved.n_cells)).any()  # exactly at the threshold
        self.assert_edges(tmp_path, all_moved[strong & consistent])

    def test_defaults_are_the_study_s(self, study_template: Study, tmp_path: Path, all_moved: pd.DataFrame):
        assert trace(study_template, tmp_path, "--end-idx", "16") == 0
        n_majority = (all_moved.consistency * all_moved.n_cells).round()
        is_edge = (all_moved.cohens_d.abs() > 0.5 + 1e-9) & (10 * n_majority > 7 * all_moved.n_cells)
        self.assert_edges(tmp_path, all_moved[is_edge])

    def assert_edges(self, out_dir: Path, expected: pd.DataFrame):
        found, expected = (
            x.drop(columns="is_calibrated") for x in (edges_of(out_dir), expected.reset_index(drop=True))
        )
        pd.testing.assert_frame_equal(found, expected)  # which edges are calibrated depends on the thresholds too


@pytest.fixture(scope="module")
def loaded(study_template: Study) -> LoadedModel:
    return load_model(str(study_template.model))


@pytest.fixture(scope="module")
def lines(study_template: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study's cells with a cell line each and a quarter of the genes under unknown names."""
    cells = anndata.read_h5ad(study_template.cells)
    cells.obs["cell_line"] = ["k562" if i % 3 else "rpe1" for i in range(cells.n_obs)]
    cells.var_names = [name if i % 4 else f"unknown{i}" for i, name in enumerate(cells.var_names)]
    path = tmp_path_factory.mktemp("lines") / "lines.h5ad"
    cells.write_h5ad(path)
    return path


class TestCells:
    @pytest.fixture
    def names(self, study_template: Study, loaded: LoadedModel):
        """Names of the cells that the study's flags and more draw."""

        def drawn(*flags: str) -> list[str]:
            args = parsed(*study_template.flags(Path("unused")), *flags)
            return [cell.name for cell in open_cells(args, loaded).cells.cells]

        return drawn

    def test_cell_line_filters(self, names, lines: Path):
        rpe1 = names("--data-path", str(lines), "--cell-line", "rpe1")
        assert rpe1 == ["cell0", "cell3", "cell6", "cell9", "cell12"]
        assert names("--data-path", str(lines), "--obs-filter", "cell_line=rpe1") == rpe1
        assert len(names("--data-path", str(lines))) == 12

    def test_an_unknown_cell_line_names_those_there(self, names, lines: Path):
        with pytest.raises(UserError, match=r"hela.*k562"):
            names("--data-path", str(lines), "--cell-line", "hela")

    @pytest.mark.parametrize("seed", [42, 0, 7])
    def test_seed_is_that_of_the_published_draw(self, names, seed: int):
        rows = np.sort(np.random.RandomState(seed).choice(14, 6, replace=False))
        assert names("--n-cells", "6", "--seed", str(seed)) == [f"cell{row}" for row in rows]

    def test_default_seed_is_the_study_s(self, names):
        assert (
            names("--n-cells", "6") == names("--n-cells", "6", "--seed", "42") != names("--n-cells", "6", "--seed", "0")
        )

    @pytest.mark.parametrize("flag, low, high", [("--min-mapped", "0.5", "0.99"), ("--min-median-tokens", "5", "55")])
    def test_almost_empty_cells_are_refused(
        self, study_template: Study, tmp_path: Path, names, lines: Path, capsys, flag: str, low: str, high: str
    ):
        assert len(names("--data-path", str(lines), flag, low)) == 12
        status = trace(study_template, tmp_path / "out", "--data-path", str(lines), flag, high)
        assert f"({flag})" in refusal(capsys, status)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("n_cells, pool", [("50", 2000), ("2000", 2000), ("2001", 2001), ("5000", 5000)])
    def test_more_cells_than_the_pool_widen_it(self, n_cells: str, pool: int):
        selection = cli.selection_from(parsed("--n-cells", n_cells))
        assert (selection.n_cells, selection.pool) == (int(n_cells), pool)

    def test_every_flag_arrives(self):
        selection = cli.selection_from(
            parsed("--cells", "all", "--control-column", "guide", "--control-values", "a, b", "--seed", "3",
                   "--counts", "raw", "--gene-column", "symbol", "--tokenization", "geneformer", "--max-tokens", "99",
                   "--min-mapped", "0.25", "--min-median-tokens", "7", "--obs-filter", "x=1", "--obs-filter", "x=2")
        )  # fmt: skip
        assert (selection.cells, selection.control_column, selection.control_values) == ("all", "guide", ("a", "b"))
        assert (selection.counts, selection.gene_column, selection.tokenization) == ("raw", "symbol", "geneformer")
        assert (selection.seed, selection.max_tokens, selection.min_mapped) == (3, 99, 0.25)
        assert (selection.min_median_tokens, selection.obs_filters) == (7, (("x", "1"), ("x", "2")))


CATALOG = {
    i: FeatureInfo(i, freq, "unannotated", ()) for i, freq in enumerate((0.1, 0.001, 0.000999, 0.2, 0.0, 1.0, 0.3))
}


class TestChosenFeatures:
    """Frequencies 0.001 and more are traced, from --start-idx to below --end-idx."""

    @pytest.mark.parametrize(
        "flags, expected",
        [
            ((), [0, 1, 3, 5, 6]),
            (("--start-idx", "1"), [1, 3, 5, 6]),
            (("--start-idx", "2", "--end-idx", "5"), [3]),
            (("--start-idx", "3", "--end-idx", "6"), [3, 5]),
            (("--end-idx", "100"), [0, 1, 3, 5, 6]),
            (("--features", "6,2,2,4"), [2, 4, 6]),
            (("--features", "6,2,4", "--start-idx", "4", "--end-idx", "6"), [4]),
        ],
    )
    def test_chosen(self, flags: tuple[str, ...], expected: list[int]):
        assert script.chosen_features(parsed(*flags), CATALOG, 5) == expected

    @pytest.mark.parametrize(
        "flags", [("--end-idx", "0"), ("--start-idx", "7"), ("--start-idx", "4", "--end-idx", "5")]
    )
    def test_nothing_left_is_refused(self, flags: tuple[str, ...]):
        with pytest.raises(UserError, match="no feature to trace"):
            script.chosen_features(parsed(*flags), CATALOG, 5)


class TestLayers:
    @pytest.mark.parametrize("text", ["17,6,11", "6,11,17,6", " 11, 06,17 ,"])
    def test_lists_are_sorted_and_distinct(self, text: str):
        assert parsed("--downstream-layers", text).downstream_layers == (6, 11, 17)

    @pytest.mark.parametrize("text", ["", ",", "6;11", "-1", "6.0", "six"])
    def test_what_is_no_list_is_refused(self, text: str, capsys: pytest.CaptureFixture[str]):
        with pytest.raises(SystemExit, match="2"):
            parsed(f"--downstream-layers={text}")
        assert "is not a list of layers such as 6,11,17" in capsys.readouterr().err

    def test_another_order_is_the_same_run(self, study_template: Study, tmp_path: Path):
        assert trace(study_template, tmp_path, "--features", "1") == 0
        before = (tmp_path / "manifest.json").read_bytes()
        assert trace(study_template, tmp_path, "--features", "1", "--downstream-layers", "5,4,2,4") == 0
        assert (tmp_path / "manifest.json").read_bytes() == before


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six features traced, where layer 4 has no catalog."""
    root = tmp_path_factory.mktemp("no_catalog")
    study = write_study(root)
    next((root / "sae_models").glob("layer04_*/feature_catalog.json")).unlink()
    assert trace(study, root / "out", "--features", "0,2,5,14,17,33") == 0
    return root / "out"


@pytest.fixture(scope="module")
def features(out_dir: Path) -> pd.DataFrame:
    return pq.read_table(out_dir / "features.parquet").to_pandas()


class TestFeaturesTable:
    def test_traced_features_agree_with_their_files(self, out_dir: Path, features: pd.DataFrame):
        records = [json.loads(path.read_text()) for path in sorted(out_dir.glob("feature_*.json"))]
        traced = features[features.is_traced]
        assert [(r["source_layer"], r["feature_idx"], r["n_cells_active"], r["total_significant_edges"])
                for r in records] == list(zip(traced.layer, traced.feature, traced.n_cells_active, traced.n_edges,
                                              strict=True))  # fmt: skip
        assert list(traced.feature) == [0, 2, 5, 14, 17, 33]
        assert min(traced.n_cells_active) < 12 and set(traced.n_edges) != {0}
        assert features[~features.is_traced][["n_cells_active", "n_edges"]].isna().all(axis=None)

    def test_a_layer_without_a_catalog_has_all_its_features(self, features: pd.DataFrame):
        assert features.groupby("layer").feature.apply(list).to_dict() == {n: list(range(40)) for n in (1, 2, 4, 5)}
        unknown = features.layer == 4
        assert features[unknown].activation_freq.isna().all() and features[~unknown].activation_freq.notna().all()
        assert set(features[unknown].label) == {"unannotated"}
        assert {tuple(genes) for genes in features[unknown].top_genes} == {()}


@pytest.mark.parametrize("parser", [script.build_parser, higher_order_ablation.build_parser])
def test_more_sign_flips_than_memory_holds_are_refused(parser, capsys: pytest.CaptureFixture[str]):
    assert parser().parse_args(["--sign-flips", "1000000"]).sign_flips == 1_000_000
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args(["--sign-flips", "100000000000"])
    assert "argument --sign-flips: '100000000000' is more than 1,000,000" in capsys.readouterr().err
