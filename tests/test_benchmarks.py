"""The benchmarks measure what they say: the published way is the definition's, floor and memory are arithmetic."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cellcircuits.cells import Cell
from cellcircuits.clean_runs import n_bytes
from cellcircuits.effects import Bench
from cellcircuits.graph_store import BLOCK_SIZE
from cellcircuits.precision import PRECISIONS
from cellcircuits.tracing import BlockEffects
from conftest import random_model, random_sae
from reference import cell_effect

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NOT_ON_A_BARE_MACHINE = ("anndata", "scanpy", "pyarrow", "pandas", "h5py", "scipy", "sklearn", "matplotlib")
SOURCE, TARGETS = 1, (2, 4, 5)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    for name in ("calibration_cost", "common", "floor", "memory", "published", "simulated_combinations", "tracing"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return import_module


@pytest.fixture
def published(load) -> ModuleType:
    return load("published")


@pytest.fixture
def tracing(load) -> ModuleType:
    return load("tracing")


def tiny_cell() -> Cell:
    tokens = np.concatenate([[2], np.random.default_rng(0).permutation(np.arange(4, 64))[:20], [3]])
    return Cell("cell", 0, tokens, np.arange(1, 21))


def tiny_saes() -> dict:
    return {layer: random_sae(layer, 24, 40, 4) for layer in (SOURCE, *TARGETS)}


class TestABareMachine:
    def test_pytorch_transformers_and_numpy_are_enough_and_both_sides_agree(self, tmp_path: Path):
        flags = [
            "--features",
            "2",
            "--published-features",
            "2",
            "--cells",
            "3",
            "--json",
            str(tmp_path / "figures.json"),
        ]
        program = (
            "import sys\n"
            f"for name in {NOT_ON_A_BARE_MACHINE!r}: sys.modules[name] = None\n"
            f"sys.path.insert(0, {str(BENCHMARKS)!r})\n"
            "import tracing\n"
            f"sys.exit(tracing.main({flags!r}))\n"
        )
        settings = os.environ | {"OMP_NUM_THREADS": "1"}
        answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=settings)
        assert answer.returncode == 0, answer.stderr
        figures = json.loads((tmp_path / "figures.json").read_text())
        assert set(figures["n_pairs"].values()) == {6}
        for edges in figures["edges"].values():
            assert edges["ours"] > 0 and edges["differ_beyond_noise_in_d"] == 0
            assert edges["largest_difference_of_effects"] < 1e-4
        assert "times as fast as published" in answer.stdout

    def test_the_cells_are_whole(self, load):
        stored_cells = load("common").stored_cells
        for shape, n_pos, vocab_size in (("paper", 2048, 20_275), ("demo", 320, 7264)):
            cells = stored_cells(shape, 21)
            assert all(len(cell.tokens) == n_pos and len(cell.gene_positions) == n_pos - 2 for cell in cells)
            assert all(len(set(cell.tokens)) == n_pos and cell.tokens.max() < vocab_size for cell in cells)
            assert len({tuple(cell.tokens) for cell in cells}) == 20
            assert (cells[20].tokens == cells[0].tokens).all()


class TestPublishedWay:
    @pytest.mark.parametrize("variant", ["as_users_get_it", "on_our_products"])
    def test_gives_the_effects_of_the_slow_reference(self, published: ModuleType, variant: str):
        model, saes, cell = random_model(), tiny_saes(), tiny_cell()
        way = getattr(published, variant)(Bench(model, saes, SOURCE))
        clean, n_compared = way.clean(cell), 0
        for feature in range(0, 40, 8):
            expected = cell_effect(model, saes, cell, [(SOURCE, feature)], TARGETS)
            if expected is not None:
                expected = np.concatenate([expected[layer] for layer in TARGETS])
                np.testing.assert_allclose(way.effect(clean, feature), expected, atol=1e-5)
                n_compared += expected.any()
        assert n_compared >= 2

    def test_attention_is_eager_or_fused_as_each_variant_says(self, published: ModuleType, monkeypatch):
        calls, fused = [], torch.nn.functional.scaled_dot_product_attention
        counted = lambda *inputs, **settings: calls.append(1) or fused(*inputs, **settings)  # noqa: E731
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
        bench = Bench(random_model(), tiny_saes(), SOURCE)
        published.as_users_get_it(bench).clean(tiny_cell())
        assert not calls
        published.on_our_products(bench).clean(tiny_cell())
        assert len(calls) == 6

    def test_every_linear_layer_is_ours_where_it_should_be_and_no_other(self, published: ModuleType):
        bench = Bench(random_model(), tiny_saes(), SOURCE)

        def n_replaced(model, saes):
            linears = [part for module in (model, *saes.values()) for part in module.modules()]
            return sum("forward" in vars(part) for part in linears if isinstance(part, torch.nn.Linear))

        ours, plain = published.on_our_products(bench), published.as_users_get_it(bench)
        assert n_replaced(ours.model, ours.saes) == 6 * 6 + 2 + 2 * 4  # blocks, head, SAEs
        assert n_replaced(plain.model, plain.saes) == n_replaced(bench.model, bench.saes) == 0


class TestFloor:
    def test_is_that_of_the_paper(self, load):
        config = load("common").paper_config()
        flops = load("floor").floor_flops(config, range(6, 18), 2048, 14)
        assert 0.93e12 < flops < 0.945e12
        assert 76e15 < 4065 * 20 * flops < 77e15

    def test_counts_whole_blocks_as_pytorch_does(self, load):
        model = load("published").with_attention(random_model(n_layers=3), "eager")
        tokens = torch.from_numpy(tiny_cell().tokens)[None]
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model.bert(input_ids=tokens)
        floor_flops = load("floor").floor_flops
        assert floor_flops(model.config, range(3), 22, n_active=22) == counter.get_total_flops()

    def test_the_last_block_needs_keys_and_values_everywhere_and_the_rest_where_measured(self, load):
        config = SimpleNamespace(hidden_size=2, intermediate_size=8)
        # keys and values of 10 positions: 2 x 10 x (2 x 2 x 2); query and output of 3, MLP of 3, attention of 3 to 10
        expected = 160 + 2 * 3 * (2 * 2 * 2) + 2 * 3 * (2 * 2 * 8) + 2 * 3 * 2 * 10 * 2
        assert load("floor").floor_flops(config, range(1), 10, 3) == expected

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_times_every_shape(self, load, monkeypatch: pytest.MonkeyPatch, precision: str):
        floor = load("floor")
        monkeypatch.setattr(floor, "MIN_SECONDS", 1e-4)
        clock = floor.GemmClock(random_model(n_layers=1), 44, precision)
        clock.measure()
        slowest, fastest = min(clock.rates().values()), max(clock.rates().values())
        assert 0 < slowest <= clock.rate() <= fastest
        assert clock.flops == {
            "query, key and value": 2 * 44 * 24 * 72,
            "attention output": 2 * 44 * 24 * 24,
            "intermediate": 2 * 44 * 24 * 96,
            "output": 2 * 44 * 96 * 24,
        }


class TestComparedEdges:
    def test_counts_what_differs_and_what_noise_explains(self, tracing: ModuleType):
        n_cells = 4
        d_wanted = np.array([0.5 + 1e-4, 0.5 - 1e-4, 2.0, 2.0, 0.1])  # Cohen's d of each target
        spread = np.array([1.0, -1.0, 1.0, 1.0])
        base = spread / spread.std(ddof=1)
        mine = (base - base.mean())[:, None] + d_wanted
        theirs = mine.copy()
        theirs[:, 0] -= 2e-4  # no edge any more, but by float noise alone
        theirs[:, 3] = -mine[:, 4]  # no edge, and no noise
        rounds = SimpleNamespace(
            effects={"ours": mine[None], "published": theirs[None]}, is_measured=np.ones((1, n_cells), dtype=bool)
        )
        found = tracing.compare_edges(rounds, "published")
        assert (found["ours"], found["theirs"]) == (3, 1)
        assert (found["differ"], found["differ_beyond_noise_in_d"]) == (2, 1)
        assert found["overlap"] == pytest.approx(1 / 3)
        assert found["largest_difference_of_d"] == pytest.approx(2.0 + 0.1)
        assert found["largest_difference_of_effects"] == pytest.approx(np.abs(mine - theirs).max() / theirs.max())

    def test_only_pairs_that_all_sides_ran_count(self, tracing: ModuleType):
        mine, theirs = np.ones((1, 3, 2)), np.ones((1, 3, 2))
        theirs[0, 2] = 0.0
        is_measured = np.array([[True, True, False]])
        rounds = SimpleNamespace(effects={"ours": mine, "published": theirs}, is_measured=is_measured)
        assert tracing.compare_edges(rounds, "published")["differ"] == 0

    def test_blocks_are_those_of_the_experiment(self, tracing: ModuleType):
        assert tracing.BLOCK_SIZE == BLOCK_SIZE


class TestCalibrationCost:
    def test_both_parts_are_measured_and_kept_effects_are_calibrated_again(self, load, tmp_path: Path):
        main = load("calibration_cost").main
        effects, first, again = (tmp_path / name for name in ("effects.npz", "first.json", "again.json"))
        few = ["--features", "2", "--cells", "3", "--rounds", "1"]
        assert main([*few, "--keep", str(effects), "--json", str(first)]) == 0
        assert main([*few, "--from", str(effects), "--json", str(again)]) == 0
        figures, later = (json.loads(path.read_text()) for path in (first, again))
        assert figures["n_pairs"] == 6 and figures["tracing_seconds"] > 0
        assert figures["percent_of_tracing"] > 0 and "percent_of_tracing" not in later
        for name in ("live_targets_per_feature", "edges_per_feature", "active_cells_per_feature"):
            assert figures[name] == later[name] and len(figures[name]) == 2


class TestTypicalFeatures:
    def test_takes_the_typical_half_with_its_spread(self, load):
        # feature f is active at f positions, 9 nowhere; the mean is 3.6, and by their ratio to it 4, 3, 5, 6 come first
        features = np.repeat(np.arange(9), np.arange(9))[:, None]
        clean = [SimpleNamespace(source=SimpleNamespace(features=features))] * 2
        typical_features = load("common").typical_features
        assert typical_features(clean, SimpleNamespace(n_features=10), 2) == [4, 6]
        assert set(typical_features(clean, SimpleNamespace(n_features=10), 4)) == {3, 4, 5, 6}
        assert set(typical_features(clean, SimpleNamespace(n_features=10), 20)) == set(range(1, 9))


class TestMemory:
    def test_what_a_cell_takes_is_what_is_computed(self, load):
        memory = load("memory")
        model, saes, cell = random_model(), tiny_saes(), tiny_cell()
        bench = Bench(model, saes, SOURCE)
        assert memory.clean_run_bytes(22, 20, saes[SOURCE], 3) == n_bytes(bench.clean(cell))
        block = BlockEffects.empty(range(BLOCK_SIZE), 1, bench.n_targets)
        measured = block.effects.nbytes + block.measured.nbytes
        assert memory.bytes_per_cell(22, saes[SOURCE], 3) == n_bytes(bench.clean(cell)) + measured

    def test_a_layer_of_the_paper_fits_in_sixteen_gigabytes(self, load):
        needs = load("memory").layer_needs(200)
        n_parameters = 20_275 * 1152 + 4098 * 1152 + 2 * 1152  # embeddings with two token types, their norm
        per_block = 4 * (1152**2 + 1152) + 2 * 1152 * 4608 + 4608 + 1152 + 4 * 1152
        head = 1152**2 + 1152 + 2 * 1152 + 20_275  # the decoder's weight is the token embedding
        assert needs["model"] == 4 * (n_parameters + 18 * per_block + head)
        assert needs["SAEs"] == 4 * 4 * (2 * 1152 * 4608 + 4608 + 1152)
        assert sum(needs.values()) < 16e9

    def test_growth_is_shown_against_the_first_point(self, load, capsys: pytest.CaptureFixture[str]):
        points = [
            {
                "n_cells": 2 * step, "n_pairs": 10 * step, "seconds": 3.0 * step, "peak_bytes": 2**30 + step * 2**20,
                "computed_bytes_per_cell": 2**20,
            }
            for step in (1, 2)
        ]  # fmt: skip
        load("memory").show_growth("cells", points)
        lines = capsys.readouterr().out.splitlines()
        assert lines[-2].split() == ["4", "20", "6.0", "2.00", "0.300", "1.00", "1"]
        assert lines[-1] == "computed: 1.0 MiB more per cell"


def test_simulated_combinations_come_out_as_theory_says(load, capsys: pytest.CaptureFixture[str]) -> None:
    """Ratios of additive effects, power, false discoveries, coverage, class effect: every row of the short table."""
    simulated = load("simulated_combinations")
    assert simulated.main(["--quick"]) == 0, capsys.readouterr().out
    found = capsys.readouterr().out
    assert found.count("noise only") == len(simulated.N_CELLS) and "published ratio" in found
    for line in found.splitlines():  # what may be found beyond a nominal rate is in the row
        assert "0.05" not in line or "sampling error allows up to" in line or "within 0.05" in line, line
