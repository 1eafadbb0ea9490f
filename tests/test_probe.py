"""What `--check` computes with: operations against PyTorch's own counter, rates, the order of what is timed, texts."""

import sys

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cellcircuits import cli_check, sae_training
from cellcircuits.cells import Cell
from cellcircuits.combination_plan import tree_size
from cellcircuits.effects import Bench, ablation_effect
from cellcircuits.flops import ModelShape, block_flops, same_position_flops, tail_flops, training_step_flops
from cellcircuits.joint import JointBench
from cellcircuits.plan_report import in_bytes, in_flops, in_time
from cellcircuits.probe import Probe, Rate, Seconds, by_length, spread
from conftest import random_model, random_sae

SOURCE, TARGETS = 1, (2, 4, 5)


@pytest.fixture
def model():
    model = random_model()
    model.set_attn_implementation("eager")  # whose two products the counter sees
    return model


@pytest.fixture
def cell() -> Cell:
    tokens = np.concatenate([[2], np.random.default_rng(0).permutation(np.arange(4, 64))[:20], [3]])
    return Cell("cell", 0, tokens, np.arange(1, 21))


def bench_of(model) -> Bench:
    return Bench(model, {layer: random_sae(layer, 24, 40, 4) for layer in (SOURCE, *TARGETS)}, SOURCE, TARGETS)


class TestFlops:
    def test_the_slow_definition(self, model, cell: Cell):
        """Two hooked passes up to the last target, the source encoded twice, and the targets at the active rows."""
        bench, n_pos, shape = bench_of(model), len(cell.tokens), ModelShape.of(model.config)
        clean = bench.clean(cell)
        feature = int(clean.source.features[0, 0])
        n_rows = len(clean.active_rows(feature))
        # the counter knows the products of attention, not every fused kernel
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            ablation_effect(bench, cell, feature)
        encoded = 2 * len(cell.gene_positions) + 2 * len(TARGETS) * n_rows
        written = 2 * len(cell.gene_positions) * shape.d_model  # by the one feature that is taken away
        expected = 2 * (max(TARGETS) + 1) * block_flops(shape, n_pos) + encoded * shape.encoding(40) + written
        assert counter.get_total_flops() == expected

    def test_the_tail_leaves_out_the_first_blocks_and_rows_of_the_last(self, model):
        shape, n_pos = ModelShape.of(model.config), 22
        whole = tail_flops(shape, 4, n_pos, n_pos)
        assert whole == 4 * block_flops(shape, n_pos)
        per_row = block_flops(shape, n_pos, 3) - block_flops(shape, n_pos, 2)
        assert tail_flops(shape, 4, n_pos, np.array([1, 2])).tolist() == [whole - 21 * per_row, whole - 20 * per_row]

    def test_same_position_passes_grow_with_their_rows_alone(self, model):
        shape = ModelShape.of(model.config)
        one = same_position_flops(shape, 4, 22, 1)
        assert one == 4 * (shape.key_value() + shape.row(23))
        assert 2 * one < same_position_flops(shape, 4, 22, 2) < 2.1 * one

    def test_a_training_step(self):
        settings = sae_training.TrainingSettings(expansion=4, k=3, batch_size=16)
        generator = torch.Generator().manual_seed(0)
        run = sae_training._start((100, 24), settings, generator, torch.device("cpu"))
        with FlopCounterMode(display=False) as counter:
            sae_training._step(run, torch.randn(16, 24, generator=generator), 1e-3, 1 / 32)
        assert counter.get_total_flops() == training_step_flops(ModelShape(24, 96, 64), 96, 16)


class TestTrees:
    @pytest.mark.parametrize(
        ("features", "active", "expected"),
        [
            ([(0, 1), (5, 2), (11, 3)], [True, True, True], (5 + 3 * 6 + 7 * 6, 7)),
            ([(0, 1), (5, 2), (11, 3)], [False, True, False], (12, 1)),
            ([(5, 1), (5, 2)], [True, True], (3 * 12, 3)),
            ([(5, 1), (5, 2)], [False, False], (0, 0)),
        ],
    )
    def test_by_hand(self, features, active, expected):
        assert tree_size(features, active, 17) == expected

    def test_as_the_bench_counts_them(self, cell: Cell):
        model = random_model()
        bench = JointBench(model, {layer: random_sae(layer, 24, 40, 4) for layer in (1, 2, 4, 5)}, (1, 2, 4), 5)
        path = bench.clean(cell)
        features = [(layer, int(path.latents[layer].features[0, 0])) for layer in (1, 2, 4)]
        active = [bool(path.active(feature).any()) for feature in features]
        assert bench.effects(path, features).n_block_runs == tree_size(features, active, 5)[0]


class TestRates:
    def test_the_mean_over_operations_and_its_error(self):
        rate = Rate()
        rate.add(10, 1.0)
        rate.add(30, 3.0)
        assert rate.seconds(80) == Seconds(8.0, 8.0 / 1.25, 8.0 * 1.25)
        rate.add(40, 2.0)
        assert rate.seconds(80).best == pytest.approx(6.0)
        residuals = np.array([1.0, 3.0, 2.0]) - np.array([10, 30, 40]) * 6 / 80
        width = 1.25 + 2 * np.sqrt((residuals**2).sum() * 3 / 2) / 6
        assert rate.seconds(80).high == pytest.approx(6 * width) and rate.seconds(80).low == pytest.approx(6 / width)

    def test_a_single_unit_says_little(self):
        assert Rate([(1.0, 2.0)]).seconds(2) == Seconds(4.0, 4.0 / 2.25, 4.0 * 2.25)

    def test_no_unit_says_nothing(self):
        with pytest.raises(ValueError):
            Rate().seconds(1)

    def test_sums(self):
        assert Seconds(1, 0.5, 2) + Seconds(2, 1, 3).times(2) == Seconds(5, 2.5, 8)

    def test_a_clock_draws_no_bar_and_lets_errors_through(self, capsys):
        clock = Probe(torch.device("cpu"), 5.0)
        seconds, result = clock.timed(lambda: print("a bar", file=sys.stderr) or 3)
        assert result == 3 and 0 < seconds < 1 and capsys.readouterr().err == ""
        with pytest.raises(RuntimeError):
            clock.timed(lambda: (_ for _ in ()).throw(RuntimeError))
        assert 0 < clock.share(0.1).left < 0.6 and Probe(torch.device("cpu"), 0.0).left == 0


class TestOrder:
    @pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 100])
    def test_everything_comes_once(self, n: int):
        assert sorted(spread(n)) == list(range(n))

    def test_the_first_ones_are_spread(self):
        assert spread(100)[:3] == [50, 25, 75]
        assert by_length([5, 1, 3])[0] == 2  # the middling one


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (in_time(0.01), "under 0.1 s"), (in_time(3.14), "3.1 s"), (in_time(90), "90 s"), (in_time(3600), "60 min"),
        (in_time(4 * 3600), "4.0 h"), (in_time(60 * 3600), "2.5 days"), (in_bytes(5000), "5 KB"),
        (in_bytes(2**20), "1.0 MB"),
        (in_bytes(3 * 2**30), "3.0 GB"), (in_bytes(2**41), "2.0 TB"), (in_flops(5e5), "0.5 MFLOP"),
        (in_flops(76.5e15), "76.5 PFLOP"),
    ],
)  # fmt: skip
def test_texts(text: str, expected: str):
    assert text == expected


def test_the_command_that_starts_the_run(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["src/script.py", "--cells", "all", "--check", "--out-dir", "a b"])
    assert cli_check.start_command(None).split(maxsplit=1)[1] == "src/script.py --cells all --out-dir 'a b'"
    assert cli_check.start_command(["--chec", "-x"]).split(maxsplit=1)[1] == "src/script.py -x"
