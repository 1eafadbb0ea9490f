"""Equal depth: counts drawn from each cell without replacement."""

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from cell_fixtures import GENES, load, random_counts, refusal, slow_tokens, tokens_of, vocabulary, write_cells
from cellcircuits.cells import CellSelection
from cellcircuits.counts import CountMatrix, downsampled
from cellcircuits.errors import UserError
from prepare_inputs import build_parser


def draw(counts: np.ndarray, kept: list[int], depth: int, seed: int = 42) -> np.ndarray:
    """Dense counts after drawing; rows in the file are ten times the position."""
    matrix = CountMatrix("X", sparse.csr_matrix(counts), pd.DataFrame(index=range(counts.shape[1])))
    drawn = downsampled(matrix, np.array(kept), 10 * np.array(kept), depth, seed)
    assert drawn.counts.data.all()  # no stored zeros: the number stored is the number of detected genes
    return drawn.counts.toarray()


class TestDraw:
    counts = np.random.default_rng(0).poisson(3.0, (8, 40)).astype(np.float64)

    def test_every_cell_has_the_depth_and_no_count_is_made_up(self):
        drawn = draw(self.counts, list(range(8)), 60)
        assert (drawn.sum(axis=1) == 60).all()
        assert (drawn <= self.counts).all()
        assert (drawn == np.round(drawn)).all()

    def test_company_and_order_do_not_matter(self):
        every = draw(self.counts, list(range(8)), 60)
        assert (draw(self.counts, [5, 2], 60) == every[[5, 2]]).all()

    def test_seed_and_row_matter(self):
        same = np.tile(self.counts[:1], (2, 1))
        first, second = draw(same, [0, 1], 60)
        assert (first != second).any()
        assert (draw(same, [0], 60, seed=1)[0] != first).any()

    def test_drawing_all_counts_changes_nothing(self):
        depth = int(self.counts[3].sum())
        assert (draw(self.counts, [3], depth)[0] == self.counts[3]).all()

    def test_each_count_has_an_equal_chance(self):
        counts = np.array([[100.0, 50.0, 0.0, 10.0]])
        drawn = np.mean([draw(counts, [0], 40, seed)[0] for seed in range(2000)], axis=0)
        expected = 40 * counts[0] / 160
        sd = np.sqrt(expected * (1 - counts[0] / 160) * 120 / 159 / 2000)  # of a hypergeometric mean
        assert (np.abs(drawn - expected) <= 4 * sd).all()

    def test_too_many_counts_for_the_generator(self):
        with pytest.raises(UserError, match="row 0 has 2000000001 counts"):
            draw(np.array([[2e9, 1.0]]), [0], 5)

    def test_the_counts_read_are_left_alone(self):
        counts = sparse.csr_matrix(self.counts)
        downsampled(CountMatrix("X", counts, pd.DataFrame()), np.arange(8), np.arange(8), 60, 0)
        assert (counts.toarray() == self.counts).all()


class TestCells:
    @pytest.fixture
    def counts(self):
        counts = random_counts()
        counts[:20] *= 4
        return counts

    @pytest.fixture
    def path(self, tmp_path, counts):
        return write_cells(tmp_path / "cells.h5ad", sparse.csr_matrix(counts), GENES)

    def test_tokens_are_those_of_the_drawn_counts(self, path, counts):
        cells = load(path, n_cells=30, downsample_to=40)
        kept = np.flatnonzero(counts.sum(axis=1) >= 40)
        assert [cell.row for cell in cells.cells] == kept.tolist()
        matrix = CountMatrix("X", sparse.csr_matrix(counts.astype(float)), pd.DataFrame())
        drawn = downsampled(matrix, kept, kept, 40, 42).counts.toarray()
        known = vocabulary()
        expected = [[2, *slow_tokens(row, GENES, known, "published"), 3] for row in drawn]
        assert tokens_of(cells) == expected

    def test_shallow_cells_are_dropped_and_listed(self, path, counts):
        report = load(path, n_cells=30, downsample_to=40).report
        shallow = np.flatnonzero(counts.sum(axis=1) < 40)
        assert len(shallow) > 2
        assert [cell["row"] for cell in report["dropped_cells"]] == shallow.tolist()
        row = shallow[0]
        assert report["dropped_cells"][0] == {
            "name": f"cell{row}", "row": int(row), "reason": f"has {counts[row].sum():.0f} counts, fewer than 40"
        }  # fmt: skip
        assert (report["n_rows_selected"], report["n_cells"]) == (30, 30 - len(shallow))
        assert report["selection"]["downsample_to"] == 40

    def test_another_depth_is_another_set_of_cells(self, path):
        prints = {load(path, n_cells=30, downsample_to=depth).fingerprint() for depth in (None, 30, 40)}
        assert len(prints) == 3

    def test_without_the_flag_the_record_is_as_before(self, path):
        assert "downsample_to" not in load(path).report["selection"]

    def test_no_cell_is_deep_enough(self, path, counts):
        message = refusal(path, n_cells=30, downsample_to=5000)
        assert "none of the 30 selected cells has 5000 counts (--downsample-to)" in message
        assert f"the deepest has {counts.sum(axis=1).max():.0f}" in message

    def test_a_depth_of_nothing_is_refused(self):
        with pytest.raises(UserError, match="--downsample-to is 0"):
            CellSelection(downsample_to=0)

    def test_the_flag_reaches_the_selection(self):
        from cellcircuits.cli import selection_from

        assert selection_from(build_parser().parse_args(["--downsample-to", "1500"])).downsample_to == 1500
        assert selection_from(build_parser().parse_args([])).downsample_to is None
