"""Controls of an ablation: directions and sizes, the engine against full passes, and networks with known answers."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import reference
from cellcircuits.cells import Cell
from cellcircuits.edge_fdr import CalibrationSettings
from cellcircuits.effects import Bench, CleanCell
from cellcircuits.errors import UserError
from cellcircuits.specificity import (
    CONTROLS,
    COVARIANCE,
    OTHER,
    RANDOM,
    SHUFFLED,
    ControlledFeature,
    Draws,
    covariance_directions,
    feature_directions,
    matched_features,
    random_directions,
    sample_by_degree,
)
from cellcircuits.specificity_stats import HowTested, Outcome, likeness, outcome_of, specific_edges
from cellcircuits.stats import EdgeRule
from cellcircuits.tracing import BlockEffects, trace_block
from conftest import random_model, random_sae
from sae_model import TopKSAE
from test_engine import Setup

CPU = torch.device("cpu")
RULE = EdgeRule()
SETUPS = {
    "right_after_and_far": Setup(1, 1, (2, 3), (18, 25, 12)),
    "last_layer_only": Setup(3, 1, (4,), (15, 15), n_layers=5, d_model=32, n_heads=4, n_features=20, k=2),
    "no_special_tokens": Setup(4, 0, (2, 4), (10, 24), False, 5, 16, 1, 48, 6),
    "gelu": Setup(5, 2, (3,), (12, 19), True, 4, 16, 2, 24, 3, activation="gelu"),
}


def double_bench(setup: Setup) -> Bench:
    """In float64, where no near tie decides."""
    return Bench(setup.model().double(), {n: sae.double() for n, sae in setup.saes().items()}, setup.source)


def controlled_feature(bench: Bench, clean: list[CleanCell], feature: int, draws: Draws) -> ControlledFeature:
    sae = bench.saes[bench.source_layer]
    frequencies = {i: 0.01 * (1 + i) for i in range(sae.n_features)}
    of_covariance = covariance_directions(draws, [feature], clean)[feature]
    decoder = sae.decoder_directions.detach().numpy().astype(np.float64)
    directions = feature_directions(draws, feature, of_covariance, frequencies, decoder)
    return ControlledFeature(bench, feature, draws, directions)


def source_latents(bench: Bench, cell: Cell, feature: int) -> tuple[torch.Tensor, np.ndarray]:
    """The latents of a feature at every gene position by a full pass, and where it is active."""
    stream = reference.streams_of(bench.model, cell.tokens)[bench.source_layer]
    latents, chosen = reference.dense_encode(bench.saes[bench.source_layer], stream)
    at_genes = torch.as_tensor(cell.gene_positions)
    return latents[at_genes, feature], np.flatnonzero(chosen[at_genes, feature].numpy())


@pytest.fixture(scope="module", params=SETUPS)
def study(request: pytest.FixtureRequest):
    """A bench, clean cells, and the controls of two features."""
    setup = SETUPS[request.param]
    bench = double_bench(setup)
    clean = [bench.clean(cell) for cell in setup.cells()]
    draws = Draws(seed=3, source_layer=setup.source, n=2)
    active = [f for f in range(bench.saes[setup.source].n_features) if any(len(c.active_rows(f)) for c in clean)]
    return bench, clean, [controlled_feature(bench, clean, feature, draws) for feature in active[:2]]


def test_every_condition_is_a_full_pass_with_that_edit(study):
    bench, cleans, controlled = study
    for of_feature in controlled:
        own = bench.saes[bench.source_layer].W_dec.weight[:, of_feature.feature]
        for clean in (c for c in cleans if len(c.active_rows(of_feature.feature))):
            conditions = [i for i in range(len(of_feature.conditions)) if len(of_feature.rows(clean, i))]
            found = of_feature.effects(clean, conditions)  # as one batch
            latents, active = source_latents(bench, clean.cell, of_feature.feature)
            for i, effects in zip(conditions, found, strict=True):
                push, name = of_feature.push(clean, i), of_feature.conditions[i]
                if name is None:
                    steps = -latents[active, None] * own
                elif name[0] == SHUFFLED:  # which sizes go where is random
                    steps = torch.from_numpy(push.sizes)[:, None] * own
                else:
                    steps = -latents[active, None] * own.norm() * push.direction
                rows = push.rows if name and name[0] == SHUFFLED else active
                positions = clean.cell.gene_positions[rows]

                def edit(residual, positions=positions, steps=steps):
                    edited = residual.clone()
                    for position, step in zip(positions, steps, strict=True):
                        edited[position] += step
                    return edited

                before = reference.streams_of(bench.model, clean.cell.tokens)
                after = reference.streams_of(bench.model, clean.cell.tokens, {bench.source_layer: edit})
                for layer, columns in bench.columns.items():
                    sae = bench.saes[layer]
                    change = (reference.dense_encode(sae, x[layer])[0] for x in (after, before))
                    expected = torch.sub(*change)[positions].mean(0).numpy()
                    np.testing.assert_allclose(effects[columns], expected, atol=1e-9)


def test_sizes_match_position_by_position_and_a_direction_is_the_same_in_all_cells(study):
    bench, cleans, controlled = study
    for of_feature in controlled:
        norm = float(bench.saes[bench.source_layer].W_dec.weight[:, of_feature.feature].norm())
        for i, name in enumerate(of_feature.conditions):
            pushes = [of_feature.push(c, i) for c in cleans if len(c.active_rows(of_feature.feature))]
            assert all(torch.equal(push.direction, pushes[0].direction) for push in pushes)
            for push, clean in zip(pushes, (c for c in cleans if len(c.active_rows(of_feature.feature))), strict=True):
                latents, active = source_latents(bench, clean.cell, of_feature.feature)
                steps = push.sizes[:, None] * push.direction.numpy()
                sizes, expected = np.linalg.norm(steps, axis=1), np.abs(latents.numpy()[active]) * norm
                if name and name[0] == SHUFFLED:
                    assert not set(push.rows) & set(active) and (np.diff(push.rows) > 0).all()
                    n_free = len(clean.cell.gene_positions) - len(active)
                    assert len(push.rows) == min(len(active), n_free) == len(of_feature.rows(clean, i))
                    assert all(np.isclose(size, expected).any() for size in sizes)
                    if n_free >= len(active):
                        np.testing.assert_allclose(np.sort(sizes), np.sort(expected))
                else:
                    assert push.rows.tolist() == active.tolist()
                    np.testing.assert_allclose(sizes, expected)


def test_draws_differ_and_do_not_depend_on_order_or_company(study):
    bench, cleans, (first, *_) = study
    again = controlled_feature(bench, cleans, first.feature, first.draws)
    directed = [i for i, name in enumerate(first.conditions) if name and name[0] != SHUFFLED]
    clean = next(c for c in cleans if len(c.active_rows(first.feature)))
    vectors = [first.push(clean, i).direction for i in directed]
    assert all(torch.equal(again.push(clean, i).direction, v) for i, v in zip(directed, vectors, strict=True))
    assert len({tuple(v.tolist()) for v in vectors}) == len(directed)
    both = covariance_directions(first.draws, [first.feature, 10**6], cleans)[first.feature]
    assert np.array_equal(both, covariance_directions(first.draws, [first.feature], cleans)[first.feature])
    more = replace(first.draws, n=3)
    assert np.array_equal(random_directions(more, 5, 7)[:2], random_directions(first.draws, 5, 7))


def test_where_every_position_is_active_shuffling_has_nowhere_to_go():
    setup = Setup(1, 1, (2,), (18, 9))
    bench = double_bench(setup)
    bench.saes[1].W_enc.bias[4] = 1e3
    cleans = [bench.clean(cell) for cell in setup.cells()]
    controlled = controlled_feature(bench, cleans, 4, Draws(0, 1, 2))
    block = BlockEffects.empty(range(9), 2, bench.n_targets)
    trace_block(controlled, cleans, block)
    assert block.measured[:7].all() and not block.measured[7:].any()


def test_without_a_latent_nothing_moves_under_any_condition():
    setup = Setup(1, 1, (2,), (18,))
    bench = double_bench(setup)
    bench.saes[1].W_enc.bias[:] = -1e3  # k are still selected
    clean = bench.clean(setup.cells()[0])
    feature = int(clean.source.features[0, 0])
    controlled = controlled_feature(bench, [clean], feature, Draws(0, 1, 2))
    conditions = [i for i in range(9) if len(controlled.rows(clean, i))]
    assert not controlled.effects(clean, conditions).any()


def cell_of(streams: np.ndarray, row: int, gene_positions: np.ndarray) -> SimpleNamespace:
    return SimpleNamespace(
        cell=Cell("c", row, np.zeros(len(streams), int), gene_positions), residual=torch.from_numpy(streams)
    )


def test_random_covariance_has_the_covariance_of_the_stream():
    """Whitened by it, the directions are isotropic; the special positions do not count."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(5, 5)) * np.array([10, 3, 1, 0.5, 0.1])[:, None]
    streams = [rng.normal(size=(n, 5)) @ mixing + 7 for n in (40, 30)]
    for stream in streams:
        stream[0] = 1e6
    cleans = [cell_of(stream, row, np.arange(1, len(stream))) for row, stream in enumerate(streams)]
    drawn = covariance_directions(Draws(0, 5, 4000), [1], cleans)[1]
    assert np.allclose(np.linalg.norm(drawn, axis=1), 1)
    covariance = np.cov(np.concatenate([stream[1:] for stream in streams]).T)
    whitened = drawn @ np.linalg.inv(np.linalg.cholesky(covariance)).T
    whitened /= np.linalg.norm(whitened, axis=1, keepdims=True)
    np.testing.assert_allclose(5 * whitened.T @ whitened / len(whitened), np.eye(5), atol=0.12)
    np.testing.assert_allclose(whitened.mean(0), 0, atol=0.05)
    isotropic = random_directions(Draws(0, 5, 4000), 1, 5)
    np.testing.assert_allclose(5 * isotropic.T @ isotropic / len(isotropic), np.eye(5), atol=0.12)


def test_a_stream_that_does_not_vary_has_no_direction():
    with pytest.raises(UserError, match="does not vary"):
        covariance_directions(Draws(0, 5, 2), [1], [cell_of(np.zeros((4, 3)), 0, np.arange(4))])


def test_matched_features_are_the_nearest_in_log_frequency():
    rng = np.random.default_rng(0)
    frequencies = {
        int(i): float(f) for i, f in zip(rng.permutation(40), rng.choice([0.001, 0.003, 0.01, 0.2], 40), strict=True)
    }
    for feature in (0, 7, 39):
        found = matched_features(feature, frequencies, 6)
        assert len(set(found)) == 6 and feature not in found
        distance = {i: abs(np.log(f) - np.log(frequencies[feature])) for i, f in frequencies.items() if i != feature}
        assert max(distance[i] for i in found) <= min(distance[i] for i in distance if i not in found) + 1e-12
        assert found == matched_features(feature, dict(sorted(frequencies.items())), 6)


def test_a_sample_has_all_degrees_and_grows_without_changing():
    features, degrees = np.arange(1000, 1237), np.random.default_rng(0).integers(0, 50, 237)
    strata = np.array_split(features[np.lexsort((features, degrees))], 10)
    small, large = (sample_by_degree(features, degrees, n, 1) for n in (23, 60))
    for drawn, n in ((small, 23), (large, 60)):
        assert len(set(drawn)) == n and drawn == sorted(drawn)
        assert {len(set(drawn) & set(stratum)) for stratum in strata} <= {n // 10, n // 10 + 1}
    assert set(small) < set(large) and small != sample_by_degree(features, degrees, 23, 2)
    shuffled = np.random.default_rng(1).permutation(237)
    assert sample_by_degree(features[shuffled], degrees[shuffled], 23, 1) == small
    assert sample_by_degree(features, degrees, 500, 1) == features.tolist()
    assert sample_by_degree(features[:4], degrees[:4], 3, 1) == sample_by_degree(features[:4], degrees[:4], 3, 1)


class TestToys:
    """The stream passes through unchanged, so that what reads it says what a push does."""

    D, N_CELLS, FEATURE = 48, 14, 2

    def study(self, target: TopKSAE):
        model = random_model(0, n_layers=2, d_model=self.D, n_heads=2).double()
        for block in model.bert.encoder.layer:
            for dense in (block.attention.output.dense, block.output.dense):
                dense.weight.zero_()
                dense.bias.zero_()
            block.attention.output.LayerNorm = block.output.LayerNorm = nn.Identity()
        source = random_sae(1, self.D, 40, 4).double()
        source.W_dec.weight /= source.W_dec.weight.norm(dim=0)
        source.W_enc.weight[self.FEATURE] = source.W_dec.weight[:, self.FEATURE]
        source.input_mean.zero_()
        source.W_enc.bias[self.FEATURE] = 0.0
        self.read_direction = source.W_dec.weight[:, self.FEATURE].clone()
        bench = Bench(model, {0: source, 1: target.double()}, 0)
        rng = np.random.default_rng(0)
        cells = []
        for row in range(self.N_CELLS):
            tokens = rng.choice(np.arange(4, 64), 20, replace=False)
            cells.append(Cell(f"cell{row}", row, tokens, np.arange(20)))
        return bench, cells

    def conditions(self, bench: Bench, cells: list[Cell]) -> dict[str, list[Outcome]]:
        cleans = [bench.clean(cell) for cell in cells]
        controlled = controlled_feature(bench, cleans, self.FEATURE, Draws(0, 0, 5))
        block = BlockEffects.empty(range(21), len(cells), bench.n_targets)
        trace_block(controlled, cleans, block)
        tests = HowTested(RULE, CalibrationSettings(n_draws=500), 0, CPU)
        found: dict[str, list[Outcome]] = {}
        for name, effects, measured in zip(controlled.conditions, block.effects, block.measured, strict=True):
            found.setdefault(name[0] if name else "real", []).append(outcome_of(effects[measured], 1, tests))
        return found

    def test_targets_that_wait_for_the_loss_of_one_direction_share_none(self):
        """They appear once the feature's part of the stream is gone: no push along other directions takes it away."""
        target = TopKSAE(self.D, 16, 16).requires_grad_(False)
        bench, cells = self.study(target)
        target.W_enc.weight[:] = 0.0
        target.W_enc.weight[:8] = -self.read_direction * torch.linspace(1, 2, 8, dtype=torch.float64)[:, None]
        cleans = [bench.clean(cell) for cell in cells]
        lowest = min(c.source_latents(2, c.active_rows(2)).min() for c in cleans if len(c.active_rows(2)))
        target.W_enc.bias[:8], target.W_enc.bias[8:] = 0.3 * float(lowest), 1.0
        found = self.conditions(bench, cells)
        real = found["real"][0]
        assert real.edges.tolist() == list(range(8))
        for control in (RANDOM, COVARIANCE, OTHER):
            for draw in found[control]:
                assert not len(draw.edges) and likeness(real, draw)["jaccard"] == 0.0
        for draw in found[SHUFFLED]:  # the direction is theirs, wherever it is taken away
            assert draw.edges.tolist() == list(range(8))
            assert likeness(real, draw)["jaccard"] == likeness(real, draw)["jaccard_expected"] == 1.0
        apart = specific_edges(real, {name: found[name] for name in CONTROLS[:3]})
        assert apart == {"n_edges": 8, "share": 1.0, "share_expected": 1.0, "reason": None}
        assert specific_edges(real, found)["share"] == 0.0

    def test_targets_that_answer_to_any_push_are_shared(self):
        """Read linearly, any direction moves them in proportion to its size: d forgets how much, and so which one."""
        target = random_sae(9, self.D, 16, 16)
        bench, cells = self.study(target)
        target.W_enc.weight[8:] = 0.0
        target.W_enc.bias[:] = 100.0
        found = self.conditions(bench, cells)
        real = found["real"][0]
        assert real.edges.tolist() == list(range(8))
        for draw in (draw for control in CONTROLS for draw in found[control]):
            assert likeness(real, draw)["jaccard"] == 1.0
        assert specific_edges(real, found)["n_edges"] == 0
