"""Properties that must hold for any input: of tokens, encodings, effects and interrupted runs."""

import io
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cellcircuits import combination_run, graph_store, trace_run, tracing
from cellcircuits.catalog import FeatureInfo
from cellcircuits.cells import Cell
from cellcircuits.clean_runs import CleanRuns
from cellcircuits.combination_run import CombinationRun
from cellcircuits.combinations import LISTED, Combination, ComboFeature
from cellcircuits.effects import Bench, TopKLatents, mean_change
from cellcircuits.joint import JointBench
from cellcircuits.stats import EdgeRule, effect_statistics
from cellcircuits.tokenizer import TOKENIZATIONS, GeneColumns, rank_tokens, wrap
from cellcircuits.trace_run import Tracer
from conftest import random_model, random_sae
from forked_runs import contents
from sae_model import TopKSAE

few = settings(max_examples=25, deadline=None)
many = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**32 - 1)


class TestTokens:
    @many
    @given(st.data(), st.sampled_from(TOKENIZATIONS))
    def test_ranked_by_value_and_then_by_column(self, data: st.DataObject, tokenization: str) -> None:
        """Descending values; equal ones as their genes come; every expressed gene once, nothing else."""
        n = data.draw(st.integers(1, 12))
        counts = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)), dtype=np.float64)
        medians = np.array(data.draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=n, max_size=n)), np.float32)
        tokens = np.array(data.draw(st.permutations(range(100, 100 + n))))
        columns = np.flatnonzero(counts)
        ranked = rank_tokens(columns, counts[columns], GeneColumns(np.arange(n), tokens, medians), tokenization)
        assert sorted(ranked) == sorted(tokens[columns])
        gene = [int(np.flatnonzero(tokens == token)[0]) for token in ranked]
        scaled = (counts / max(1.0, counts.sum())).astype(np.float32) * np.float32(1e4)
        value = (np.log1p(scaled) if tokenization == "published" else scaled) / medians
        for earlier, later in pairwise(gene):
            assert value[earlier] > value[later] or (value[earlier] == value[later] and earlier < later)

    @many
    @given(seeds, st.sampled_from(TOKENIZATIONS))
    def test_splitting_a_gene_over_columns_changes_nothing(self, seed: int, tokenization: str) -> None:
        rng = np.random.default_rng(seed)
        counts = rng.integers(0, 50, 9).astype(np.float64)
        part = np.floor(counts * rng.uniform(size=9))
        medians, tokens = rng.uniform(0.2, 3, 9).astype(np.float32), np.arange(10, 19)
        whole = GeneColumns(np.arange(9), tokens, medians)
        halves = GeneColumns(np.tile(np.arange(9), 2), tokens, medians)
        split = np.concatenate([part, counts - part])
        one, two = np.flatnonzero(counts), np.flatnonzero(split)
        expected = rank_tokens(one, counts[one], whole, tokenization).tolist()
        assert rank_tokens(two, split[two], halves, tokenization).tolist() == expected

    @many
    @given(
        st.lists(st.integers(4, 99), max_size=20, unique=True), st.integers(1, 25),
        st.sampled_from([(2, 3), (2, None), (None, 3), (None, None)]),
    )  # fmt: skip
    def test_wrapped_within_the_limit(self, genes: list[int], limit: int, special: tuple) -> None:
        tokens, positions = wrap(np.array(genes, dtype=np.int64), limit, special)
        assert tokens[positions].tolist() == genes[:limit]
        assert len(tokens) == min(len(genes), limit) + sum(token is not None for token in special)
        others = np.delete(tokens, positions).tolist()
        assert others == [token for token in special if token is not None]


def whole_number_sae(rng: np.random.Generator, d_model: int, n_features: int, k: int) -> TopKSAE:
    """Small whole numbers: float32 is exact whatever the order of the sums, and ties are common."""
    sae = TopKSAE(d_model, n_features, k).requires_grad_(False)
    for parameter in sae.parameters():
        parameter.copy_(torch.from_numpy(rng.integers(-2, 3, tuple(parameter.shape))))
    sae.input_mean.copy_(torch.from_numpy(rng.integers(-1, 2, d_model)))
    return sae.eval()


sizes = st.tuples(st.integers(1, 6), st.integers(1, 14), st.integers(1, 14)).map(lambda s: (s[0], s[1], min(s[1:])))


class TestEncoder:
    @many
    @given(seeds, sizes, st.integers(1, 7))
    def test_exactly_k_the_largest_also_among_ties(self, seed: int, size: tuple[int, int, int], n_rows: int) -> None:
        rng = np.random.default_rng(seed)
        sae, k = whole_number_sae(rng, *size), size[2]
        x = rng.integers(-3, 4, (n_rows, size[0])).astype(np.float32)
        values, features = (part.numpy() for part in sae.top_k(torch.from_numpy(x)))
        weight, offset, mean = (
            part.numpy().astype(np.float64) for part in (sae.W_enc.weight, sae.W_enc.bias, sae.input_mean)
        )
        pre = (x - mean) @ weight.T + offset  # (n_rows, n_features), exact
        assert values.shape == features.shape == (n_rows, k)
        for row in range(n_rows):
            assert len(set(features[row].tolist())) == k
            largest = np.sort(pre[row])[::-1][:k]
            assert np.sort(pre[row, features[row]])[::-1].tolist() == largest.tolist()
            assert values[row].tolist() == np.maximum(pre[row, features[row]], 0).tolist()

    @many
    @given(seeds, sizes, st.integers(2, 7))
    def test_a_row_does_not_depend_on_the_others(self, seed: int, size: tuple[int, int, int], n_rows: int) -> None:
        rng = np.random.default_rng(seed)
        sae = whole_number_sae(rng, *size)
        x = torch.from_numpy(rng.integers(-3, 4, (n_rows, size[0])).astype(np.float32))
        alone = torch.cat([sae.top_k(row[None])[0] for row in x])
        assert torch.equal(sae.top_k(x)[0], alone)
        assert torch.equal(sae.encode(x).sort(dim=-1).values, torch.stack([sae.encode(row).sort().values for row in x]))

    @many
    @given(seeds)
    def test_against_numpy_in_float64(self, seed: int) -> None:
        sae = random_sae(seed % 1000, 10, 30, 4)
        x = np.random.default_rng(seed).normal(size=(6, 10)).astype(np.float32)
        weight, offset, mean = (
            part.numpy().astype(np.float64) for part in (sae.W_enc.weight, sae.W_enc.bias, sae.input_mean)
        )
        pre = (x.astype(np.float64) - mean) @ weight.T + offset
        latents = sae.encode(torch.from_numpy(x)).numpy()
        cut = np.sort(pre, axis=1)[:, -4:-3]
        surely, surely_not = pre > cut + 1e-4, pre < cut - 1e-4  # rounding decides near ties
        np.testing.assert_allclose(latents[surely], np.maximum(pre, 0)[surely], atol=1e-5)
        assert not latents[surely_not].any()


def random_cell(rng: np.random.Generator, name: str = "cell") -> Cell:
    n_gene = int(rng.integers(2, 12))
    return Cell(name, 0, np.array([2, *rng.permutation(np.arange(4, 40))[:n_gene], 3]), np.arange(1, n_gene + 1))


MODEL = random_model(1, n_layers=4, d_model=16, n_heads=2, n_vocab=40, n_positions=16).double()
SAES = {layer: random_sae(layer, 16, 20, 3).double() for layer in (0, 2, 3)}
BENCH = Bench(MODEL, SAES, 0)
exactly = {"rtol": 0, "atol": 1e-11}


class TestEffects:
    @few
    @given(seeds, st.integers(1, 6))
    def test_a_batch_is_its_features_one_by_one_in_any_order(self, seed: int, size: int) -> None:
        rng = np.random.default_rng(seed)
        clean = BENCH.clean(random_cell(rng))
        active = rng.permutation(np.unique(clean.source.features)).tolist()
        alone = {feature: BENCH.effects(clean, [feature])[0] for feature in active}
        for start in range(0, len(active), size):
            batch = active[start : start + size]
            for feature, effect in zip(batch, BENCH.effects(clean, batch), strict=True):
                np.testing.assert_allclose(effect, alone[feature], **exactly)

    @few
    @given(seeds)
    def test_a_latent_of_zero_changes_exactly_nothing(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        silent = random_sae(0, 16, 20, 3).double()
        silent.W_enc.bias -= 100.0  # selected, and 0 after the ReLU, everywhere
        bench = Bench(MODEL, {**SAES, 0: silent}, 0)
        clean = bench.clean(random_cell(rng))
        active = np.unique(clean.source.features).tolist()
        assert len(active) >= 3 and not bench.effects(clean, active).any()

    @few
    @given(seeds)
    def test_numbering_the_target_s_features_anew_numbers_the_effects_anew(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        order = torch.from_numpy(rng.permutation(20))
        renumbered = random_sae(3, 16, 20, 3).double()
        for name in ("W_enc.weight", "W_enc.bias"):
            renumbered.get_parameter(name).copy_(SAES[3].get_parameter(name)[order])
        cell = random_cell(rng)
        one, other = (Bench(MODEL, {**SAES, 3: sae}, 0, [3]) for sae in (SAES[3], renumbered))
        clean_one, clean_other = one.clean(cell), other.clean(cell)
        active = np.unique(clean_one.source.features).tolist()
        expected = one.effects(clean_one, active)[:, order.numpy()]
        np.testing.assert_allclose(other.effects(clean_other, active), expected, **exactly)

    @many
    @given(seeds, st.integers(1, 9))
    def test_totals_are_sums_over_positions(self, seed: int, n_rows: int) -> None:
        rng = np.random.default_rng(seed)
        sae = TopKSAE(2, 8, 3)
        one, other = (
            TopKLatents(rng.normal(size=(n_rows, 3)), rng.permuted(np.tile(np.arange(8), (n_rows, 1)), axis=1)[:, :3])
            for _ in range(2)
        )
        dense_one, dense_other = np.zeros((n_rows, 8)), np.zeros((n_rows, 8))
        for latents, dense in ((one, dense_one), (other, dense_other)):
            for row in range(n_rows):
                for value, feature in zip(latents.values[row], latents.features[row], strict=True):
                    dense[row, feature] = value
        np.testing.assert_allclose(one.total(8), dense_one.sum(axis=0), **exactly)
        group = np.sort(rng.integers(0, 3, n_rows))
        by_group = np.stack([dense_one[group == g].sum(axis=0) for g in range(group[-1] + 1)])
        np.testing.assert_allclose(one.totals(group, 8), by_group, **exactly)
        np.testing.assert_allclose(mean_change(one, other, sae), (dense_other - dense_one).mean(axis=0), **exactly)

    @many
    @given(seeds, st.integers(2, 12))
    def test_edges_do_not_depend_on_the_order_of_cells(self, seed: int, n_cells: int) -> None:
        rng = np.random.default_rng(seed)
        effects = rng.normal(0.3, 1, (n_cells, 30)) * (rng.uniform(size=(n_cells, 30)) < 0.7)
        one, other = (effect_statistics(x, EdgeRule()) for x in (effects, rng.permutation(effects)))
        np.testing.assert_allclose(one.d, other.d, rtol=1e-9)
        assert one.consistency.tolist() == other.consistency.tolist()
        assert one.is_edge.tolist() == other.is_edge.tolist()


class Interruption:
    """Ctrl-C after some calls of a method."""

    def __init__(self, after: int) -> None:
        self.left = after

    def on(self, real: Callable) -> Callable:
        def counted(*args, **more):
            if self.left == 0:
                self.left -= 1
                raise KeyboardInterrupt
            self.left -= 1
            return real(*args, **more)

        return counted


@contextmanager
def own_folder() -> Iterator[Path]:
    """A new folder; hypothesis runs many examples in one of pytest's."""
    folder = Path(tempfile.mkdtemp())
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def saved_every(seconds: float) -> Iterator[None]:
    """Unfinished work is saved every so often inside the `with`."""
    with ExitStack() as stack:
        for module in (tracing, trace_run, combination_run):
            if hasattr(module, "SAVE_EVERY_SECONDS"):
                stack.enter_context(patch.object(module, "SAVE_EVERY_SECONDS", seconds))
        yield


CELLS = [random_cell(np.random.default_rng(i), f"cell{i}") for i in range(4)]
RUNS = CleanRuns(BENCH, CELLS)
CATALOG = {i: FeatureInfo(i, 0.1, "label", ()) for i in range(20)}
SAVE_EVERY = st.sampled_from([-1.0, 180.0])
# calls of the engine before Ctrl-C, and what was asked for until then
starts = st.lists(st.tuples(st.integers(0, 12), st.lists(st.integers(0, 19), min_size=1, unique=True)), max_size=3)
COMBINATIONS = [
    Combination(tuple(ComboFeature(layer, i, "label", None) for layer, i in pair), LISTED, LISTED)
    for pair in (((0, 3), (2, 5)), ((2, 9), (0, 3)))
]
JOINT = JointBench(MODEL, SAES, [0, 2], 3)


def traced(out_dir: Path, features: list[int], after: int | None = None) -> None:
    """Trace features into a folder, with Ctrl-C after some calls of the engine."""
    tracer = Tracer(out_dir, BENCH, RUNS, CATALOG, EdgeRule(), "fingerprint", 3)
    stop = Interruption(-1 if after is None else after)
    with patch.object(Bench, "effects", stop.on(Bench.effects)), suppress(KeyboardInterrupt):
        tracer.trace(sorted(features))


class Files(dict):
    """Contents of files by name; what hypothesis prints of it is short."""

    def __repr__(self) -> str:
        return f"{len(self)} files"


def table(out_dir: Path) -> Files:
    """The edges of a folder, and all else that it holds but how far the last run was."""
    graph_store.write_edges(out_dir, "fingerprint")
    return Files((name, content) for name, content in contents(out_dir).items() if name != "progress.json")


def measured(out_dir: Path, chosen: Sequence[Combination], after: int | None = None) -> None:
    """Measure combinations into a folder, with Ctrl-C after some calls of the engine."""
    stop = Interruption(-1 if after is None else after)
    with patch.object(JointBench, "effects", stop.on(JointBench.effects)), suppress(KeyboardInterrupt):
        CombinationRun(out_dir, JOINT, CELLS, EdgeRule(), "fingerprint", save_effects=True).measure(chosen)


@contextmanager
def small_blocks(seconds: float) -> Iterator[Path]:
    """A folder to trace into by blocks of eight features, saved every so often."""
    with own_folder() as out_dir, patch.object(graph_store, "BLOCK_SIZE", 8), saved_every(seconds):
        yield out_dir


@pytest.fixture(scope="module")
def all_traced() -> Iterator[Files]:
    """What an uninterrupted trace of all features leaves."""
    with small_blocks(180.0) as out_dir:
        traced(out_dir, list(range(20)))
        yield table(out_dir)


@pytest.fixture(scope="module")
def all_measured() -> Iterator[Files]:
    """What an uninterrupted run of all combinations leaves."""
    with own_folder() as out_dir:
        measured(out_dir, COMBINATIONS)
        yield Files(contents(out_dir))


class TestResume:
    @settings(max_examples=12, deadline=None)
    @given(st.lists(st.integers(0, 30), max_size=3), SAVE_EVERY)
    def test_any_interruptions_give_the_same_bytes(self, all_traced: Files, calls: list[int], seconds: float) -> None:
        with small_blocks(seconds) as out_dir:
            for after in [*calls, None]:
                traced(out_dir, list(range(20)), after)
            found = table(out_dir)
        assert [name for name in {**found, **all_traced} if found.get(name) != all_traced.get(name)] == []

    @settings(max_examples=12, deadline=None)
    @given(starts, SAVE_EVERY)
    def test_any_order_of_features_gives_the_same_edges(
        self, all_traced: Files, starts: list[tuple[int, list[int]]], seconds: float
    ) -> None:
        """Other batches round in other ways, in the last digits."""
        with small_blocks(seconds) as out_dir:
            for after, features in starts:
                traced(out_dir, features, after)
            traced(out_dir, list(range(20)))
            assert table(out_dir).keys() == all_traced.keys()
            found, expected = (
                pq.read_table(io.BytesIO(edges)).to_pydict()
                for edges in ((out_dir / "edges.parquet").read_bytes(), all_traced["edges.parquet"])
            )
        assert len(expected["source"]) > 50 and found.keys() == expected.keys()
        for name, values in expected.items():
            as_numbers = (np.array(column, dtype=float) for column in (found[name], values))  # null as NaN
            np.testing.assert_allclose(*as_numbers, rtol=1e-7, atol=1e-12, err_msg=name)

    @settings(max_examples=10, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 8), st.permutations(COMBINATIONS)), max_size=3), SAVE_EVERY)
    def test_of_combinations_too(self, all_measured: Files, starts: list[tuple], seconds: float) -> None:
        with own_folder() as out_dir, saved_every(seconds):
            for after, chosen in starts:
                measured(out_dir, chosen, after)
            measured(out_dir, COMBINATIONS)
            found = contents(out_dir)
            assert [name for name in {**found, **all_measured} if found.get(name) != all_measured.get(name)] == []
