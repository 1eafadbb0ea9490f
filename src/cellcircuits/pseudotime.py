"""Diffusion pseudotime of a few hundred cells, with scanpy: counts in, one number per cell out.

Nothing here knows files, cell types or the model. scanpy's default random states are kept, so that the
numbers are those that anybody else gets.
"""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from cellcircuits.errors import UserError

if TYPE_CHECKING:
    from anndata import AnnData

log = logging.getLogger(__name__)
TARGET_SUM = 1e4
MIN_CELLS = 5
SCANPY_SEED = 0  # scanpy's default random_state, for PCA, the diffusion map and UMAP alike


@dataclass(frozen=True)
class GraphSizes:
    """Sizes of the neighbour graph and of the diffusion map on it; the defaults are the published ones."""

    n_genes: int = 2000
    n_components: int = 50
    n_components_used: int = 30
    n_neighbors: int = 15
    n_diffusion: int = 10

    def fitted(self, n_cells: int, n_genes: int) -> "GraphSizes":
        """The same, made small enough for this many cells and genes.

        Raises:
            UserError: too few cells or genes for a graph.
        """
        if n_cells < MIN_CELLS or n_genes < MIN_CELLS:
            raise UserError(
                f"{n_cells} cells with {n_genes} expressed genes are too few for a pseudotime, which needs "
                f"{MIN_CELLS} of each; take more cells (--n-cells)."
            )
        genes = min(self.n_genes, n_genes)
        components = min(self.n_components, n_cells - 1, genes - 1)
        return GraphSizes(
            n_genes=genes,
            n_components=components,
            n_components_used=min(self.n_components_used, components),
            n_neighbors=min(self.n_neighbors, n_cells - 1),
            n_diffusion=min(self.n_diffusion, n_cells - 2),
        )


@contextmanager
def _scanpy_at_work() -> Iterator[None]:
    """Inside the `with`, warnings of scanpy and what it imports go to the log's debug level, nowhere else.

    The number of torch's threads is as before afterwards: numba, at its first parallel function, sets that of
    OpenMP for the whole process.
    """
    torch = sys.modules.get("torch")
    n_threads = torch.get_num_threads() if torch else None
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        if torch:
            torch.set_num_threads(n_threads)
    for warning in caught:
        log.debug("scanpy: %s: %s", warning.category.__name__, warning.message)


def neighbour_graph(counts: sp.csr_matrix, sizes: GraphSizes | None = None) -> "AnnData":
    """Log-normalize, choose variable genes, and connect each cell with its nearest in PCA space.

    Args:
        counts: (n_cells, n_columns) raw counts.
        sizes: of the steps; None takes the published ones. Both are cut to what the data allow.

    Raises:
        UserError: too few cells or genes.
    """
    expressed = counts.getnnz(axis=0) > 0
    wanted = sizes or GraphSizes()
    fitted = wanted.fitted(counts.shape[0], int(expressed.sum()))
    sizes_of = zip(asdict(wanted).items(), asdict(fitted).values(), strict=True)
    cut = [f"{name} {now} instead of {before}" for (name, before), now in sizes_of if now != before]
    if cut:
        log.info("Note: the pseudotime of %d cells takes %s.", counts.shape[0], ", ".join(cut))
    with _scanpy_at_work():
        import scanpy as sc
        from anndata import AnnData

        adata = AnnData(counts.astype(np.float32))
        sc.pp.normalize_total(adata, target_sum=TARGET_SUM)
        sc.pp.log1p(adata)
        sc.pp.highly_variable_genes(adata, n_top_genes=fitted.n_genes, flavor="seurat")
        n_components = min(fitted.n_components, int(adata.var["highly_variable"].sum()) - 1)
        sc.pp.pca(adata, n_comps=n_components, random_state=SCANPY_SEED)
        sc.pp.neighbors(
            adata,
            n_neighbors=fitted.n_neighbors,
            n_pcs=min(fitted.n_components_used, n_components),
            random_state=SCANPY_SEED,
        )
    adata.uns["n_diffusion"] = fitted.n_diffusion
    return adata


def diffusion_pseudotime(graph: "AnnData", root: int) -> NDArray[np.float64]:
    """Diffusion pseudotime from one cell.

    Args:
        graph: from `neighbour_graph`.
        root: number of the cell where time is 0.

    Returns:
        (n_cells,) from 0 to 1; infinite where no path leads from the root.

    Source: Haghverdi et al. (2016), "Diffusion pseudotime robustly reconstructs lineage branching".
    """
    n_diffusion = graph.uns["n_diffusion"]
    with _scanpy_at_work():
        import scanpy as sc

        if "X_diffmap" not in graph.obsm:
            sc.tl.diffmap(graph, n_comps=n_diffusion, random_state=SCANPY_SEED)
        graph.uns["iroot"] = root
        sc.tl.dpt(graph, n_dcs=n_diffusion)
    return graph.obs["dpt_pseudotime"].to_numpy(dtype=np.float64)


def umap_pseudotime(graph: "AnnData") -> NDArray[np.float64]:
    """The first UMAP axis scaled to 0..1, (n_cells,): an order without a root and without a direction.

    Args:
        graph: from `neighbour_graph`.
    """
    with _scanpy_at_work():
        import scanpy as sc

        sc.tl.umap(graph, random_state=SCANPY_SEED)
    axis = graph.obsm["X_umap"][:, 0].astype(np.float64)
    return (axis - axis.min()) / (axis.max() - axis.min())
