"""The scanpy part: the published recipe, its sizes on small data, cells that nothing connects."""

import logging
import warnings

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.stats import spearmanr

from cellcircuits.errors import UserError
from cellcircuits.pseudotime import GraphSizes, diffusion_pseudotime, neighbour_graph, umap_pseudotime


def cells_along_a_line(n_cells: int = 90, n_genes: int = 120, seed: int = 0) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Counts of cells whose genes rise and fall one after the other, and where each cell stands."""
    rng = np.random.default_rng(seed)
    place = rng.uniform(0, 1, n_cells)
    peak = np.linspace(-0.2, 1.2, n_genes)
    mean = 0.5 + 25 * np.exp(-((place[:, None] - peak) ** 2) / 0.05)
    return sparse.csr_matrix(rng.poisson(mean).astype(np.float64)), place


def two_islands() -> sparse.csr_matrix:
    """Forty cells with the first genes, thirty with the others, none in between."""
    rng = np.random.default_rng(0)
    mean = np.zeros((70, 80))
    mean[:40, :40], mean[40:, 40:] = 8.0, 8.0
    return sparse.csr_matrix(rng.poisson(mean * rng.uniform(0.5, 1.5, mean.shape)).astype(np.float64))


@pytest.fixture(scope="module")
def line():
    counts, place = cells_along_a_line()
    return counts, place, neighbour_graph(counts)


@pytest.mark.parametrize("n_genes", [40, 2000])
def test_equals_the_recipe_written_out(line, n_genes):
    counts = line[0]
    graph = neighbour_graph(counts, GraphSizes(n_genes=n_genes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import scanpy as sc
        from anndata import AnnData

        adata = AnnData(counts.astype(np.float32))
        sc.pp.normalize_total(adata, target_sum=1e4)
        sc.pp.log1p(adata)
        sc.pp.highly_variable_genes(adata, n_top_genes=min(n_genes, 120), flavor="seurat")
        n_variable = int(adata.var.highly_variable.sum())
        sc.pp.pca(adata, n_comps=min(50, n_variable - 1))
        sc.pp.neighbors(adata, n_neighbors=15, n_pcs=min(30, n_variable - 1))
        sc.tl.diffmap(adata, n_comps=10)
        adata.uns["iroot"] = 7
        sc.tl.dpt(adata)
    expected = adata.obs["dpt_pseudotime"].to_numpy()
    np.testing.assert_allclose(diffusion_pseudotime(graph, 7), expected, rtol=1e-5, atol=1e-7)


def test_orders_cells_along_a_line(line):
    _, place, graph = line
    root = int(np.argmin(place))
    times = diffusion_pseudotime(graph, root)
    assert times.dtype == np.float64
    assert times[root] == 0
    assert times.max() == 1
    assert spearmanr(times, place).statistic > 0.95


def test_each_root_gets_its_own_times_from_one_graph(line):
    _, place, graph = line
    first, last = int(np.argmin(place)), int(np.argmax(place))
    assert spearmanr(diffusion_pseudotime(graph, first), diffusion_pseudotime(graph, last)).statistic < -0.9
    assert diffusion_pseudotime(graph, first)[first] == 0


def test_cells_on_another_island_are_infinitely_far():
    times = diffusion_pseudotime(neighbour_graph(two_islands()), 3)
    assert np.isfinite(times[:40]).all()
    assert np.isinf(times[40:]).all()


def test_umap_axis_goes_from_0_to_1(line):
    axis = umap_pseudotime(line[2])
    assert axis.shape == (90,)
    assert (axis.min(), axis.max()) == (0, 1)


def test_the_counts_are_left_alone(line):
    counts, _ = cells_along_a_line(30)
    before = counts.copy()
    neighbour_graph(counts)
    assert (counts != before).nnz == 0


def test_torch_keeps_its_threads():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        graph = neighbour_graph(cells_along_a_line(30)[0])
        assert torch.get_num_threads() == 3
        diffusion_pseudotime(graph, 0)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


class TestSizes:
    def test_published_where_the_data_allow(self):
        assert GraphSizes().fitted(500, 20_000) == GraphSizes(2000, 50, 30, 15, 10)

    def test_cut_to_small_data_and_said(self, caplog):
        with caplog.at_level(logging.INFO):
            times = diffusion_pseudotime(neighbour_graph(cells_along_a_line(8, 30)[0]), 0)
        assert np.isfinite(times).all()
        assert "the pseudotime of 8 cells takes n_genes" in caplog.text
        assert "n_neighbors 7 instead of 15" in caplog.text

    def test_what_is_not_cut_is_not_said(self, caplog):
        with caplog.at_level(logging.INFO):
            neighbour_graph(cells_along_a_line(40)[0], GraphSizes(30, 10, 5, 15, 10))
        assert "the pseudotime of" not in caplog.text

    @pytest.mark.parametrize("n_cells", [5, 6, 12, 16])
    def test_small_data_work(self, n_cells):
        assert np.isfinite(diffusion_pseudotime(neighbour_graph(cells_along_a_line(n_cells, 12)[0]), 0)).all()

    @pytest.mark.parametrize(("n_cells", "n_genes"), [(4, 30), (30, 3)])
    def test_too_little_to_order(self, n_cells, n_genes):
        with pytest.raises(UserError, match=f"{n_cells} cells with {n_genes} expressed genes are too few"):
            neighbour_graph(cells_along_a_line(n_cells, n_genes)[0])
