"""Training of TopK SAEs, and the sampling of the rows it trains on."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cellcircuits import preparation_state, sae_training
from cellcircuits.activations import draw_rows, layer_groups, split_at_random, split_by
from cellcircuits.cells import Cell
from cellcircuits.errors import UserError
from cellcircuits.feature_stats import fit_baseline
from cellcircuits.sae_store import find_sae, open_sae, save_sae
from cellcircuits.sae_training import TrainingSettings, _aux_loss, _start, fold_scaling, mean_and_rms, train_sae
from sae_model import TopKSAE

CPU = torch.device("cpu")
QUICK = TrainingSettings(expansion=4, k=3, epochs=8, batch_size=128, lr=3e-3)


def sparse_rows(n_rows=6000, d_model=16, seed=0):
    """Sums of three of 40 directions, off centre and on a scale of its own."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((40, d_model))
    latents = np.zeros((n_rows, 40))
    for _ in range(3):
        latents[np.arange(n_rows), rng.integers(0, 40, n_rows)] += rng.exponential(1.0, n_rows)
    return (7.0 * latents @ directions + rng.standard_normal(d_model) * 30).astype(np.float32)


def fvu(rows, rebuilt, mean):
    return float(((rows - rebuilt) ** 2).sum() / ((rows - mean) ** 2).sum())


@pytest.fixture(scope="module")
def trained():
    rows = sparse_rows()
    return rows, *train_sae(rows[:5000], QUICK, CPU)


def test_decoder_directions_keep_unit_norm(trained):
    _, sae, _ = trained
    assert torch.allclose(sae.decoder_directions.norm(dim=1), torch.ones(sae.n_features), atol=1e-5)


def test_held_out_rows_are_rebuilt_better_than_by_pca_and_features_live(trained):
    rows, sae, record = trained
    held_out, mean = rows[5000:], sae.input_mean.numpy()
    components = fit_baseline(rows[:5000], mean, 3, CPU).components
    pca = mean + (held_out - mean) @ components @ components.T
    rebuilt = sae.reconstruct(torch.from_numpy(held_out)).numpy()
    assert fvu(held_out, rebuilt, mean) < 0.7 * fvu(held_out, pca, mean)
    values, indices = sae.top_k(torch.from_numpy(held_out))
    assert len(np.unique(indices[values > 0])) > 0.9 * sae.n_features
    assert record["n_steps"] == 8 * (5000 // 128) and record["log"][-1]["fvu"] < 0.5


def test_input_mean_is_the_float64_mean_of_the_rows(trained):
    rows, sae, _ = trained
    np.testing.assert_array_equal(sae.input_mean.numpy(), rows[:5000].astype(np.float64).mean(0).astype(np.float32))


def test_same_seed_same_sae_other_seed_another():
    rows = sparse_rows(600)
    settings = TrainingSettings(expansion=2, k=2, epochs=1, batch_size=64)
    first, again = (train_sae(rows, settings, CPU)[0].W_enc.weight for _ in range(2))
    other = train_sae(rows, TrainingSettings(expansion=2, k=2, epochs=1, batch_size=64, seed=1), CPU)[0].W_enc.weight
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_folding_the_scale_back_changes_nothing():
    torch.manual_seed(0)
    scaled = TopKSAE(8, 32, 4)
    mean, rms = np.arange(8, dtype=np.float32), 3.7
    folded = fold_scaling(scaled, mean, rms)
    residual = torch.randn(50, 8) * 5
    x = (residual - torch.from_numpy(mean)) / rms
    assert torch.allclose(folded.encode(residual), scaled.encode(x) * rms, atol=1e-5)
    assert torch.allclose(
        folded.reconstruct(residual), scaled.decode(scaled.encode(x)) * rms + folded.input_mean, atol=1e-4
    )
    assert torch.equal(folded.W_dec.weight, scaled.W_dec.weight)


def test_checkpoint_gives_the_same_sae_back(trained, tmp_path):
    rows, sae, _ = trained
    save_sae(sae, tmp_path / "sae_models" / "layer02_x4_k3")
    reloaded = open_sae(find_sae(tmp_path, 2))
    x = torch.from_numpy(rows[:20])
    assert torch.equal(reloaded.encode(x), sae.encode(x)) and torch.equal(reloaded.reconstruct(x), sae.reconstruct(x))


def test_aux_loss_sees_dead_features_only():
    generator = torch.Generator().manual_seed(0)
    run = _start((1000, 8), TrainingSettings(expansion=2, k=2), generator, CPU)
    pre, error = torch.randn(30, 16, generator=generator), torch.randn(30, 8, generator=generator)
    dead = torch.zeros(16, dtype=torch.bool)
    assert _aux_loss(run, pre, error, dead) == 0
    dead[[3, 9]] = True
    latents = pre.relu() * dead
    expected = ((error - latents @ run.sae.decoder_directions) ** 2).sum() / (error**2).sum()
    assert _aux_loss(run, pre, error, dead).item() == pytest.approx(expected.item(), rel=1e-5)


def test_rate_warms_up_and_decays_to_nothing():
    settings = TrainingSettings(warmup=0.1, decay_from=0.5)
    assert [settings.rate_factor(x) for x in (0.0, 0.05, 0.1, 0.5, 0.75, 1.0)] == [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]
    assert settings.learning_rate(1 << 14) == 4e-4 and TrainingSettings(lr=0.1).learning_rate(4) == 0.1


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (np.ones((50, 4), np.float32), TrainingSettings(k=2), "does not vary"),
        (np.ones((1, 4), np.float32), TrainingSettings(k=2), "cannot train"),
        (sparse_rows(100), TrainingSettings(k=99), "cannot train"),
        (sparse_rows(500), TrainingSettings(k=2, lr=1e38, batch_size=16), "diverged"),
    ],
)
def test_hopeless_trainings_are_user_errors(rows, settings, message):
    with pytest.raises(UserError, match=message):
        train_sae(rows, settings, CPU)


@pytest.mark.parametrize("n_steps", [1, 7, 15, 16, 40])
def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path, monkeypatch, n_steps):
    settings = replace(QUICK, epochs=3, lr=0.03, dead_after=0.02)  # 15 steps each; some features are dead now and then
    rows = sparse_rows(2000)
    whole, record = train_sae(rows, settings, CPU)
    assert max(entry["n_dead"] for entry in record["log"]) > 0
    monkeypatch.setattr(preparation_state, "SAVE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(sae_training, "_step", stop_after(n_steps, sae_training._step))
    with pytest.raises(KeyboardInterrupt):
        train_sae(rows, settings, CPU, "SAE", kept_in(tmp_path))
    monkeypatch.undo()
    resumed, again = train_sae(rows, settings, CPU, "SAE", kept_in(tmp_path))
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key])
    del record["elapsed_seconds"], again["elapsed_seconds"]
    assert record == again


def stop_after(n, real):
    numbers = itertools.count()

    def step(*args):
        if next(numbers) == n:
            raise KeyboardInterrupt
        return real(*args)

    return step


def kept_in(folder):
    return preparation_state.open_unfinished(folder, "layer", {"layer": 1}, {}, mix_versions=False)


def test_fewer_rows_than_a_batch_still_train():
    _, record = train_sae(sparse_rows(40), TrainingSettings(k=2, epochs=2), CPU)
    assert record["n_steps"] == 2


def test_rms_is_that_of_the_centred_rows():
    rows = sparse_rows(300)
    mean, rms = mean_and_rms(rows)
    assert rms == pytest.approx(math.sqrt(((rows.astype(np.float64) - mean) ** 2).mean()))


@pytest.mark.parametrize("n_rows", [1, 17, 59, 60, 1000])
def test_rows_are_drawn_exactly_and_without_replacement(n_rows):
    n_gene = [10, 0, 25, 1, 24]
    offsets = draw_rows(n_gene, n_rows, seed=3)
    assert sum(map(len, offsets)) == min(n_rows, 60)
    for part, n in zip(offsets, n_gene, strict=True):
        assert len(set(part.tolist())) == len(part) and all(0 <= offset < n for offset in part)
        assert (np.diff(part) > 0).all()


def test_every_position_is_as_likely():
    counts = np.zeros(12)
    for seed in range(3000):
        first, second = draw_rows([4, 8], 3, seed)
        counts[first] += 1
        counts[4 + second] += 1
    assert abs(counts / 3000 - 0.25).max() < 0.04


def cells(n):
    return [Cell(f"c{row}", row, np.arange(3), np.arange(1, 3)) for row in range(n)]


def test_no_cell_is_on_both_sides():
    split = split_at_random(cells(20), 0.25, seed=0)
    train, held_out = ({cell.row for cell in part} for part in (split.train, split.held_out))
    assert len(held_out) == 5 and train | held_out == set(range(20)) and not train & held_out
    again = split_at_random(cells(20), 0.25, seed=0)
    assert {cell.row for cell in again.held_out} == held_out
    by_flag = split_by(cells(3), [True, False, True])
    assert [cell.row for cell in by_flag.held_out] == [0, 2]
    with pytest.raises(UserError, match="leaves none"):
        split_at_random(cells(2), 0.9, seed=0)


def test_layers_are_grouped_by_memory():
    assert layer_groups([0, 5, 6, 11, 17], 10, 20) == [(0, 5), (6, 11), (17,)]
    assert layer_groups([0, 5], 10, 1000) == [(0, 5)]
    with pytest.raises(UserError, match="max-memory-gb"):
        layer_groups([0], 10, 9)
