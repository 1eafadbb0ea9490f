"""The matrix of raw counts in an .h5ad file: which one is taken, and what is refused."""

import h5py
import numpy as np
import pytest
from scipy import sparse

from cell_fixtures import (
    GENES,
    load,
    random_counts,
    refusal,
    tokens_of,
    write_cells,
)


def test_auto_takes_raw_when_x_is_normalized(tmp_path):
    counts = random_counts()
    expected = tokens_of(load(write_cells(tmp_path / "a.h5ad", counts, GENES)))
    scaled = np.log1p(counts[:, :6] * 1.7)
    path = write_cells(tmp_path / "b.h5ad", scaled, GENES[:6], raw=(sparse.csr_matrix(counts), GENES))
    cells = load(path)
    assert cells.report["matrix"] == "raw"
    assert tokens_of(cells) == expected
    assert tokens_of(load(path, counts="raw")) == expected


def test_auto_prefers_x_then_raw_then_layers_named_like_counts(tmp_path):
    counts = random_counts()
    layers = {"binary": (counts > 0).astype(np.float32), "raw_counts": counts}
    path = write_cells(tmp_path / "a.h5ad", np.log1p(counts), GENES, layers=layers)
    assert load(path).report["matrix"] == "layer:raw_counts"
    assert load(path, counts="layer:binary").report["matrix"] == "layer:binary"
    path = write_cells(tmp_path / "b.h5ad", counts, GENES, layers=layers, raw=(counts, GENES))
    assert load(path).report["matrix"] == "X"


def test_auto_looks_at_selected_rows_only(tmp_path):
    counts = random_counts()
    counts[20:] += 0.5
    path = write_cells(tmp_path / "a.h5ad", counts, GENES, {"gene": np.array(["non-targeting"] * len(counts))})
    assert len(load(path, cells="controls", n_cells=20).cells) == 20
    assert "(cell cell20, gene ENSG00000000001)" in refusal(path, cells="controls", n_cells=21)


@pytest.mark.parametrize(
    "value, words",
    [
        (np.nan, "NaN"),
        (np.inf, "an infinite value (inf)"),
        (-2, "a negative value (-2)"),
        (0.5, "a value that is no integer (0.5)"),
    ],
)
@pytest.mark.parametrize("storage", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_bad_values_are_named(tmp_path, value, words, storage):
    counts = random_counts()
    bad = counts.copy()
    bad[4, 7] = value
    bad[5, 2] = -9  # later, not the one to name
    path = write_cells(tmp_path / "a.h5ad", storage(bad), GENES)
    message = refusal(path, counts="X")
    assert f"X holds {words} (cell cell4, gene {GENES[7]})" in message
    assert "no other matrix" in message
    assert f"no matrix holds raw counts of the selected cells: X holds {words}" in refusal(path)
    path = write_cells(tmp_path / "b.h5ad", storage(bad), GENES, raw=(counts, GENES))
    assert "--counts raw holds integers" in refusal(path, counts="X")


def test_auto_says_what_is_wrong_with_each_matrix(tmp_path):
    counts = random_counts()
    path = write_cells(tmp_path / "a.h5ad", counts - 5, GENES, layers={"log": np.log1p(counts), "zero": 0 * counts})
    message = refusal(path)
    assert "X holds a negative value" in message and "layer:log holds a value that is no integer" in message
    assert "layer:zero is 0 everywhere" in message


def test_refusals_about_matrices(tmp_path):
    path = write_cells(tmp_path / "a.h5ad", random_counts(), GENES)
    assert "has no raw (--counts); there are X." in refusal(path, counts="raw")
    assert "has no layer:counts (--counts)" in refusal(path, counts="layer:counts")
    with h5py.File(path, "r+") as file:
        del file["X"]
    assert "has no X, raw or layers" in refusal(path)


# Files


def test_refusals_about_files(tmp_path):
    assert "no such file" in refusal(tmp_path / "none.h5ad")
    text = tmp_path / "text.h5ad"
    text.write_text("no cells here")
    assert "not a readable HDF5 file" in refusal(text)
    other = tmp_path / "other.h5ad"
    with h5py.File(other, "w") as file:
        file["X"] = np.ones((2, 2))
    assert "has no obs; it is not an AnnData" in refusal(other)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("storage", [np.asarray, sparse.csr_matrix])
def test_truncated_file_is_one_sentence(tmp_path, share, storage):
    path = write_cells(tmp_path / "a.h5ad", storage(random_counts(300)), GENES)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert str(path) in refusal(path)


@pytest.mark.parametrize("damage", [("X/indices", 99), ("X/indices", -3), ("X/indptr", 10**6), ("X/indptr", -5)])
@pytest.mark.parametrize("storage", [sparse.csr_matrix, sparse.csc_matrix])
def test_damaged_sparse_matrix_is_refused(tmp_path, damage, storage):
    path = write_cells(tmp_path / "a.h5ad", storage(random_counts()), GENES)
    part, value = damage
    with h5py.File(path, "r+") as file:
        file[part][5] = value
    assert "damaged" in refusal(path)


def test_shape_that_does_not_fit_the_tables(tmp_path):
    path = write_cells(tmp_path / "a.h5ad", random_counts(), GENES)
    with h5py.File(path, "r+") as file:
        del file["X"]
        file["X"] = random_counts(29)
    assert "shape (29, 12), but its tables describe 30 cells and 12 genes" in refusal(path)


def test_links_out_of_the_file_are_not_followed(tmp_path):
    target = write_cells(tmp_path / "target.h5ad", random_counts(), GENES)
    for name, link in (
        ("link", h5py.ExternalLink(target.name, "X")),
        ("abroad", h5py.ExternalLink("/etc", "X")),
    ):
        path = write_cells(tmp_path / f"{name}.h5ad", random_counts(), GENES)
        with h5py.File(path, "r+") as file:
            del file["X"]
            file["X"] = link
        assert "X points to another file, which is never followed" in refusal(path)
    path = write_cells(tmp_path / "virtual.h5ad", random_counts(), GENES)
    layout = h5py.VirtualLayout(shape=(30, 12), dtype="f4")
    layout[:] = h5py.VirtualSource(str(target), "X", shape=(30, 12))
    with h5py.File(path, "r+") as file:
        del file["X"]
        file.create_virtual_dataset("X", layout)
    assert "X points to another file" in refusal(path)
    path = write_cells(tmp_path / "storage.h5ad", random_counts(), GENES)
    with h5py.File(path, "r+") as file:
        del file["X"]
        file.create_dataset("X", (30, 12), "f4", external=[(str(target), 0, h5py.h5f.UNLIMITED)])
    assert "X points to another file" in refusal(path)
