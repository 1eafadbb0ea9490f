"""Cells of a trajectory, its flags, and cell_metadata.json: used only where it is for the run's cells."""

import argparse
import json
import logging
from collections import Counter
from types import SimpleNamespace

import anndata
import numpy as np
import pytest
from scipy import sparse
from scipy.stats import spearmanr

from cell_fixtures import ensembl, vocabulary, write_cells
from cellcircuits import trajectory, trajectory_flags, trajectory_root
from cellcircuits.cells import load_cells
from cellcircuits.errors import UserError
from cellcircuits.trajectory import Trajectory

N_GENES, N_CELLS = 40, 60
GENES = [ensembl(number) for number in range(1, N_GENES + 1)]
TYPES = ("Hematopoietic stem cell", "monocyte", "CD4-positive, alpha-beta T cell", "odd one")
TISSUES = ("Bone_Marrow", "Blood", "Liver")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Cells that change along their number, of four types and three tissues in turn."""
    rng = np.random.default_rng(0)
    place = np.linspace(0, 1, N_CELLS)
    mean = 0.5 + 25 * np.exp(-((place[:, None] - np.linspace(-0.2, 1.2, N_GENES)) ** 2) / 0.05)
    obs = {
        "cell_type": [TYPES[n % 4] for n in range(N_CELLS)],
        "tissue_in_publication": [TISSUES[n % 3] for n in range(N_CELLS)],
        "donor": ["a" if n < 30 else "b" for n in range(N_CELLS)],
    }
    counts = sparse.csr_matrix(rng.poisson(mean).astype(np.float32))
    return write_cells(tmp_path_factory.mktemp("cells") / "cells.h5ad", counts, GENES, obs)


def parsed(path, *flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    trajectory_flags.add_trajectory_flags(parser)
    return parser.parse_args(["--data-path", str(path), "--min-median-tokens", "1", *flags])


def opened_cells(args):
    known = vocabulary(N_GENES)
    return SimpleNamespace(
        cells=load_cells(args.data_path, known, trajectory_flags.trajectory_selection(args), 64), vocabulary=known
    )


def opened_trajectory(path, *flags: str) -> Trajectory:
    args = parsed(path, *flags)
    return trajectory.open_trajectory(args, opened_cells(args))


def refusal(path, *flags: str) -> str:
    with pytest.raises(UserError) as caught:
        opened_trajectory(path, *flags)
    return str(caught.value)


class TestSelection:
    def rows(self, path, *flags):
        return [cell.row for cell in opened_cells(parsed(path, *flags)).cells.cells]

    def test_default_types_in_any_case_and_default_tissues(self, path):
        assert self.rows(path) == [n for n in range(N_CELLS) if n % 4 != 3 and n % 3 != 2]

    def test_all(self, path):
        assert self.rows(path, "--cell-types", "all", "--tissues", "all") == list(range(N_CELLS))

    def test_names_with_commas(self, path):
        flags = ("--cell-types", "cd4-positive, alpha-beta t cell; ODD ONE", "--tissues", "Blood")
        assert self.rows(path, *flags) == [n for n in range(N_CELLS) if n % 4 in (2, 3) and n % 3 == 1]

    def test_names_from_a_file(self, path, tmp_path):
        names = tmp_path / "types.txt"
        names.write_text("monocyte\n\nodd one\n")
        flags = ("--cell-types", str(names), "--tissues", "all")
        assert self.rows(path, *flags) == [n for n in range(N_CELLS) if n % 4 in (1, 3)]

    def test_filters_narrow_the_choice(self, path):
        flags = ("--cell-types", "monocyte", "--tissues", "all", "--obs-filter", "donor=b")
        assert self.rows(path, *flags) == [n for n in range(30, N_CELLS) if n % 4 == 1]

    @pytest.mark.parametrize("seed", [42, 7])
    def test_the_published_draw(self, path, seed):
        matched = [n for n in range(N_CELLS) if n % 4 != 3 and n % 3 != 2]
        expected = np.sort(np.random.RandomState(seed).choice(matched, 12, replace=False))
        assert self.rows(path, "--n-cells", "12", "--seed", str(seed)) == expected.tolist()

    def test_no_wanted_type(self, path):
        message = refusal(path, "--cell-types", "neuron")
        assert "cell_type" in message and "--cell-types" in message
        assert all(f"{name} (15)" in message for name in TYPES)

    def test_one_unknown_type_among_known_ones_is_said(self, path, caplog):
        self.rows(path, "--cell-types", "monocyte;neuron", "--tissues", "all")
        assert "--cell-types: no cell is 'neuron'" in caplog.text

    def test_absent_types_of_the_default_are_not(self, path, caplog):
        self.rows(path)
        assert "no cell is" not in caplog.text

    def test_no_such_columns(self, path):
        message = refusal(path, "--cell-type-column", "label")
        assert "no column 'label'; there are: cell_type, tissue_in_publication, donor" in message
        assert "--cell-type-column" in message
        message = refusal(path, "--tissue-column", "organ")
        assert "--tissue-column" in message and "--tissues all" in message

    def test_a_filter_on_the_column_of_types_is_refused(self, path):
        assert "--cell-types chooses by that column" in refusal(path, "--obs-filter", "cell_type=odd one")

    def test_no_file(self, tmp_path):
        assert "SAE_IMMUNE_H5AD" in refusal(tmp_path / "none.h5ad") or "no such file" in refusal(tmp_path / "none.h5ad")

    def test_the_environment_names_the_inputs(self, path, monkeypatch, tmp_path):
        monkeypatch.setenv("SAE_IMMUNE_H5AD", str(path))
        monkeypatch.setenv("SAE_TRAJ_DIR", str(tmp_path))
        parser = argparse.ArgumentParser()
        trajectory_flags.add_trajectory_flags(parser)
        args = parser.parse_args([])
        assert (args.data_path, args.traj_dir, args.n_cells) == (path, tmp_path, 500)

    def test_an_empty_list_is_refused(self, path, capsys):
        with pytest.raises(SystemExit):
            parsed(path, "--cell-types", " ; ")
        assert "names nothing" in capsys.readouterr().err

    def test_a_text_too_long_for_a_file_s_name(self):
        assert trajectory_flags.name_list("x" * 5000) == ("x" * 5000,)


def made(times) -> Trajectory:
    return Trajectory(np.array(times, dtype=float), ("x",) * len(times), ("",) * len(times), "a test")


class TestGroups:
    def test_outer_thirds_of_the_cells_with_a_pseudotime(self):
        rng = np.random.default_rng(0)
        times = rng.uniform(0, 1, 50)
        times[::7] = np.nan
        known = times[~np.isnan(times)]
        found = made(times)
        low, high = np.percentile(known, 33.3), np.percentile(known, 66.7)
        assert found.early.tolist() == [n for n, time in enumerate(times) if time <= low]
        assert found.late.tolist() == [n for n, time in enumerate(times) if time >= high]

    @pytest.mark.parametrize(
        ("times", "said"),
        [
            ([0.5] * 9, "both 0.5 (9 cells, 1 distinct values)"),
            ([0.0] * 7 + [0.5, 1.0], "both 0 (9 cells, 3 distinct values)"),
            ([0.0, 0.5, 1.0], "of 3 cells 1 are early and 1 late"),
            ([0.0, 0.0, 0.5, 1.0, np.nan], "of 4 cells 2 are early and 1 late"),
            ([np.nan] * 4, "none of the 4 cells has one"),
        ],
    )
    def test_ends_that_cannot_be_compared(self, times, said):
        with pytest.raises(UserError) as caught:
            made(times).check()
        assert said in str(caught.value)
        assert "--n-cells" in str(caught.value)


class TestMetadata:
    flags = ("--cell-types", "all", "--tissues", "all", "--n-cells", "20")

    @pytest.fixture
    def cells(self, path):
        return opened_cells(parsed(path, *self.flags)).cells.cells

    @pytest.fixture
    def content(self, cells):
        """What another run left about the same cells, in another order."""
        order = np.random.default_rng(0).permutation(len(cells))
        return {
            "pseudotime": [cells[n].row / 100 for n in order],
            "cell_types": [TYPES[cells[n].row % 4] for n in order],
            "tissues": [TISSUES[cells[n].row % 3] for n in order],
            "cell_ids": [cells[n].name for n in order],
            "root": "cell0",
        }

    @pytest.fixture
    def no_scanpy(self, monkeypatch):
        def refuse(*_):
            raise UserError("would compute")

        monkeypatch.setattr(trajectory, "compute_pseudotime", refuse)

    def read(self, path, folder, content, *flags) -> Trajectory:
        (folder / "cell_metadata.json").write_text(json.dumps(content))
        return opened_trajectory(path, *self.flags, "--traj-dir", str(folder), *flags)

    def refusal(self, path, folder, content, *flags) -> str:
        with pytest.raises(UserError) as caught:
            self.read(path, folder, content, *flags)
        return str(caught.value)

    def test_matched_by_ids_in_any_order(self, path, cells, content, tmp_path, no_scanpy):
        found = self.read(path, tmp_path, content)
        assert found.pseudotime.tolist() == [cell.row / 100 for cell in cells]
        assert found.cell_types == tuple(TYPES[cell.row % 4] for cell in cells)
        assert found.tissues == tuple(TISSUES[cell.row % 3] for cell in cells)
        assert (found.source, found.root) == ("cell_metadata.json (by ids)", "cell0")

    def test_other_cells_are_computed(self, path, content, tmp_path, no_scanpy, caplog):
        content["cell_ids"][3] = "somebody"
        assert self.refusal(path, tmp_path, content) == "would compute"
        assert "lists 20 cells, the run has 20, and 19 are in both" in caplog.text

    def test_fewer_cells_are_computed(self, path, content, tmp_path, no_scanpy):
        less = {name: values[1:] if isinstance(values, list) else values for name, values in content.items()}
        assert self.refusal(path, tmp_path, less) == "would compute"

    def test_another_depth_is_computed(self, path, content, tmp_path, no_scanpy, caplog):
        assert self.refusal(path, tmp_path, {**content, "downsample_to": 30}) == "would compute"
        assert "was made from 30 counts per cell, and this run takes all counts (--downsample-to)" in caplog.text

    def test_old_files_are_matched_by_number_with_a_warning(self, path, cells, content, tmp_path, no_scanpy, caplog):
        old = {"pseudotime": [cell.row / 100 for cell in cells]}
        found = self.read(path, tmp_path, old)
        assert found.pseudotime.tolist() == old["pseudotime"]
        assert found.source == "cell_metadata.json (by number of cells)"
        assert "has no cell ids" in caplog.text
        assert [record.levelno for record in caplog.records if "no cell ids" in record.message] == [logging.WARNING]

    def test_old_files_of_another_number_are_computed(self, path, content, tmp_path, no_scanpy, caplog):
        assert self.refusal(path, tmp_path, {"pseudotime": content["pseudotime"][1:]}) == "would compute"
        assert "it has no cell ids and 19 cells, and the run has 20" in caplog.text

    def test_old_files_of_cells_of_other_types_are_computed(self, path, content, tmp_path, no_scanpy, caplog):
        del content["cell_ids"]  # leaves an order that is not the run's
        assert self.refusal(path, tmp_path, content) == "would compute"
        assert "its cell types are not those of the run's cells" in caplog.text

    def test_cells_without_a_pseudotime_are_left_out(self, path, content, tmp_path, no_scanpy, caplog):
        caplog.set_level(logging.INFO)
        content["pseudotime"][2] = None
        content["pseudotime"][5] = float("nan")  # older releases wrote such tokens
        found = self.read(path, tmp_path, content)
        assert (~found.measured).sum() == 2
        assert "18 cells" in caplog.text and "2 left out" in caplog.text

    def test_infinite_pseudotime_is_refused_with_the_types(self, path, cells, content, tmp_path, no_scanpy):
        content["pseudotime"][0] = content["pseudotime"][1] = float("inf")
        message = self.refusal(path, tmp_path, content)
        assert "2 of 20 cells have an infinite pseudotime" in message
        for name, n in Counter(content["cell_types"]).items():
            assert f"{content['cell_types'][:2].count(name)} of {n} {name}" in message
        assert "--disconnected drop" in message

    def test_infinite_pseudotime_is_dropped_on_request(self, path, content, tmp_path, no_scanpy):
        content["pseudotime"][0] = float("inf")
        found = self.read(path, tmp_path, content, "--disconnected", "drop")
        assert (~found.measured).sum() == 1

    def test_lists_of_different_length(self, path, content, tmp_path, no_scanpy):
        content["tissues"].pop()
        message = self.refusal(path, tmp_path, content)
        assert "20 pseudotime, 20 cell_types, 19 tissues, 20 cell_ids" in message

    @pytest.mark.parametrize("value", ["early", True, [0.1], 10**400])
    def test_values_that_are_no_numbers(self, path, content, tmp_path, no_scanpy, value):
        content["pseudotime"][4] = value
        assert "the pseudotime of cell 4 is" in self.refusal(path, tmp_path, content)

    @pytest.mark.parametrize("depth", [[30], "30", {}])
    def test_a_depth_that_is_none_is_computed(self, path, content, tmp_path, no_scanpy, caplog, depth):
        assert self.refusal(path, tmp_path, {**content, "downsample_to": depth}) == "would compute"
        assert f"was made from {depth} counts per cell, and this run takes all counts" in caplog.text

    def test_root_flags_that_change_nothing_are_named(self, path, content, tmp_path, no_scanpy, caplog):
        assert self.read(path, tmp_path, content, "--root-tissue", "Bone_Marrow").root == "cell0"
        assert "without effect" not in caplog.text
        self.read(path, tmp_path, content, "--root-cell-type", "egg", "--root-markers", "GENE3")
        assert "has a root of its own; --root-cell-type and --root-markers: without effect" in caplog.text

    @pytest.mark.parametrize("content", [[], {"cell_types": []}, {"pseudotime": 1}])
    def test_not_a_trajectory(self, path, tmp_path, no_scanpy, content):
        assert "has no list 'pseudotime'" in self.refusal(path, tmp_path, content)

    def test_damaged_file(self, path, tmp_path, no_scanpy):
        (tmp_path / "cell_metadata.json").write_text('{"pseudotime": [0.1,')
        message = refusal(path, *self.flags, "--traj-dir", str(tmp_path))
        assert "cell_metadata.json: not valid JSON" in message

    def test_a_folder_without_the_file(self, path, tmp_path, no_scanpy, caplog):
        assert refusal(path, *self.flags, "--traj-dir", str(tmp_path)) == "would compute"
        assert "holds no cell_metadata.json" in caplog.text

    def test_no_such_folder(self, path, tmp_path):
        assert "--traj-dir" in refusal(path, *self.flags, "--traj-dir", str(tmp_path / "none"))

    def test_what_is_written_is_read_back(self, path, cells, content, tmp_path, no_scanpy):
        content["pseudotime"][2] = None
        found = self.read(path, tmp_path, content)
        written = tmp_path / "new"
        trajectory.write_metadata(written / "cell_metadata.json", found, cells, None, {"fingerprint": "f"})
        kept = json.loads((written / "cell_metadata.json").read_text())
        assert kept["pseudotime"].count(None) == 1
        assert kept["h5ad_row"] == [cell.row for cell in cells]
        assert kept["n_tokens"] == [len(cell.tokens) for cell in cells]
        assert (kept["downsample_to"], kept["schema_version"], kept["root"]) == (None, 1, "cell0")
        again = opened_trajectory(path, *self.flags, "--traj-dir", str(written))
        np.testing.assert_array_equal(again.pseudotime, found.pseudotime)


class TestComputed:
    flags = ("--cell-types", "all", "--tissues", "all")

    def test_starts_at_the_first_root_in_its_tissue(self, path):
        found = opened_trajectory(path, *self.flags)
        assert (found.root, found.source) == ("cell0", "scanpy dpt")
        assert found.pseudotime[0] == 0
        assert spearmanr(found.pseudotime, np.arange(N_CELLS)).statistic > 0.9

    @pytest.mark.parametrize(("tissue", "expected"), [("Blood", "cell4"), ("Liver", "cell8"), ("Nowhere", "cell0")])
    def test_root_tissue(self, path, tissue, expected):
        found = opened_trajectory(path, *self.flags, "--root-tissue", tissue)
        assert found.root == expected

    @pytest.mark.parametrize("name", ["GENE{}", "ENSG{:011d}", "ENSG{:011d}.3"])
    def test_root_markers(self, path, name):
        genes = ",".join(name.format(number) for number in (39, 40))  # highest in the last cells
        flags = (*self.flags, "--root-cell-type", "ODD one", "--root-tissue", "Liver", "--root-markers", genes)
        args = parsed(path, *flags)
        counts = anndata.read_h5ad(path).X.toarray()
        score = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))[:, [38, 39]].mean(axis=1)
        candidates = [n for n in range(N_CELLS) if n % 4 == 3 and n % 3 == 2]
        best = max(candidates, key=lambda n: score[n])
        assert best != candidates[0]
        assert trajectory.open_trajectory(args, opened_cells(args)).root == f"cell{best}"

    def test_unknown_marker(self, path):
        assert "'NOPE'" in refusal(path, *self.flags, "--root-markers", "GENE3,NOPE")

    def test_no_root_lists_the_types(self, path):
        message = refusal(path, *self.flags, "--root-cell-type", "egg")
        assert "no cell is of the root type 'egg'" in message
        assert all(f"{name} (15)" in message for name in TYPES)
        assert "--pseudotime-fallback umap" in message
        assert not len(trajectory_root.root_candidates(["", "egg"], ["", ""], "", ""))  # a missing type is none

    def test_umap_on_request_only(self, path, caplog):
        flags = ("--root-cell-type", "egg", "--pseudotime-fallback", "umap")
        found = opened_trajectory(path, *self.flags, *flags)
        assert (found.source, found.root) == ("umap axis 0", None)
        assert (np.nanmin(found.pseudotime), np.nanmax(found.pseudotime)) == (0, 1)
        assert "whose direction means nothing" in caplog.text

    def test_counts_are_those_of_the_tokens(self, path):
        args = parsed(path, *self.flags, "--downsample-to", "60", "--n-cells", "20")
        opened = opened_cells(args)
        matrix = trajectory_root.read_run_counts(args, opened)
        assert (np.asarray(matrix.counts.sum(axis=1)) == 60).all()
        assert matrix.counts.shape[0] == len(opened.cells.cells)
        n_tokens = [len(cell.gene_positions) for cell in opened.cells.cells]
        assert n_tokens == matrix.counts.getnnz(axis=1).tolist()


@pytest.fixture(scope="module")
def islands(tmp_path_factory):
    rng = np.random.default_rng(0)
    mean = np.zeros((70, 40))
    mean[:40, :20], mean[40:, 20:] = 8.0, 8.0
    counts = rng.poisson(mean * rng.uniform(0.5, 1.5, mean.shape)).astype(np.float32)
    obs = {
        "cell_type": ["one"] * 30 + ["both"] * 20 + ["other"] * 20,
        "tissue_in_publication": ["Blood"] * 70,
    }
    return write_cells(tmp_path_factory.mktemp("cells") / "c.h5ad", sparse.csr_matrix(counts), GENES, obs)


class TestDisconnected:
    flags = ("--cell-types", "all", "--tissues", "all", "--root-cell-type", "one")

    def test_refused_with_the_types_and_the_mends(self, islands):
        message = refusal(islands, *self.flags)
        assert "30 of 70 cells have an infinite pseudotime" in message
        assert "0 of 30 one, 10 of 20 both, 20 of 20 other" in message
        assert "--disconnected drop" in message and "--pseudotime-fallback umap" in message

    def test_dropped_on_request(self, islands):
        found = opened_trajectory(islands, *self.flags, "--disconnected", "drop")
        assert np.isnan(found.pseudotime[40:]).all()
        assert found.measured.tolist() == [True] * 40 + [False] * 30
        assert found.late.max() < 40

    def test_umap_on_request(self, islands):
        found = opened_trajectory(islands, *self.flags, "--pseudotime-fallback", "umap")
        assert found.source == "umap axis 0"
        assert found.measured.all()
