"""Steering against a slow, obvious implementation: complete logits of a full hooked pass for every alpha."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

import reference
from cellcircuits.cells import Cell
from cellcircuits.geneformer import edited, masked_logits
from cellcircuits.interventions import remove_features
from cellcircuits.panel import PanelFeature
from cellcircuits.steering import SteeringBench, SteeringRun, steered_logit_change
from steering_fixtures import SHAPES, Setup, record_of
from test_no_float64 import NoFloat64


def slow_mean_logits(model, sae, cell: Cell, layer: int, feature: int | None, alpha: float) -> np.ndarray:
    edit = None if feature is None else reference.scaling(sae, cell.gene_positions, [feature], alpha)

    def hook(_module, _arguments, output):
        if edit is None:
            return None
        stream = edit(reference.stream_of(output)[0])[None]
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    handle = model.bert.encoder.layer[layer].register_forward_hook(hook)
    try:
        with torch.no_grad():
            logits = model(input_ids=torch.as_tensor(cell.tokens)[None]).logits[0].double().numpy()
    finally:
        handle.remove()
    return sum(logits[position] for position in cell.gene_positions) / len(cell.gene_positions)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


class Slow:
    """The whole experiment for one model, one pass after the other."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self.clean = [slow_mean_logits(setup.model, None, cell, 0, None, 1.0) for cell in setup.cells]
        self.early, self.late = (np.mean([self.clean[i] for i in group], axis=0) for group in (setup.early, setup.late))

    def shift(self, z: np.ndarray, steered: np.ndarray) -> float:
        before = cosine(z, self.late) - cosine(z, self.early)
        return cosine(steered, self.late) - cosine(steered, self.early) - before

    def result(self, feature: PanelFeature, alpha: float) -> dict:
        model, sae = self.setup.model, self.setup.saes[feature.layer]
        shifts, deltas = [], []
        for i in self.setup.early:
            cell = self.setup.cells[i]
            stream = reference.streams_of(model, cell.tokens)[feature.layer]
            if not reference.dense_encode(sae, stream)[1][cell.gene_positions, feature.index].any():
                continue
            steered = slow_mean_logits(model, sae, cell, feature.layer, feature.index, alpha)
            shifts.append(self.shift(self.clean[i], steered))
            deltas.append(steered - self.clean[i])
        return {"shifts": np.array(shifts), "delta": np.mean(deltas, axis=0) if deltas else None}


def gene_list(delta: np.ndarray, gene_of: dict[int, str], sign: int) -> list[str]:
    order = sorted(range(len(delta)), key=lambda token: (-sign * delta[token], token))[:20]
    return [gene_of.get(token, f"token_{token}") for token in order]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_number_is_the_slow_one_in_float64(shape, tmp_path: Path):
    setup = Setup(shape, seed=len(shape[3]))
    steerer, slow = setup.steer(tmp_path), Slow(setup)
    n_steered = 0
    with np.load(tmp_path / "state_signatures.npz") as signatures:
        assert np.allclose(signatures["early"], slow.early, rtol=1e-10)
        assert np.allclose(signatures["late"], slow.late, rtol=1e-10)
        assert signatures["early"].dtype == np.float64
    for feature in setup.panel[::2]:
        record = record_of(tmp_path, feature)
        assert record["n_blocks_after"] == shape[0] - 1 - feature.layer
        assert record["n_early_cells"] == 4 and record["switch_d"] == 1.0
        assert list(record["alpha_results"]) == ["2.0", "5.0", "-1.0"]
        for alpha, found in record["alpha_results"].items():
            expected = slow.result(feature, float(alpha))
            shifts, delta = expected["shifts"], expected["delta"]
            assert found["n_cells_steered"] == found["n_cells_active"] == len(shifts) == len(record["steered_cells"])
            n_steered += len(shifts)
            if not len(shifts):
                continue
            assert found["state_shifts"] == pytest.approx(shifts, rel=1e-6, abs=1e-13)
            assert found["mean_state_shift"] == pytest.approx(shifts.mean(), rel=1e-6, abs=1e-13)
            assert found["median_state_shift"] == pytest.approx(np.median(shifts), rel=1e-6, abs=1e-13)
            assert found["std_state_shift"] == pytest.approx(np.std(shifts), rel=1e-6, abs=1e-13)
            assert found["frac_positive_shift"] == (shifts > 0).mean()
            assert found["mean_abs_logit_delta"] == pytest.approx(np.abs(delta).mean(), rel=1e-6, abs=1e-13)
            assert found["max_logit_delta"] == pytest.approx(delta.max(), rel=1e-6, abs=1e-13)
            assert found["min_logit_delta"] == pytest.approx(delta.min(), rel=1e-6, abs=1e-13)
            if np.abs(delta).max() > 1e-9:
                for name, sign in (("top_upregulated", 1), ("top_downregulated", -1)):
                    assert [entry["gene"] for entry in found[name]] == gene_list(delta, setup.gene_of, sign)
                    expected_deltas = np.sort(sign * delta)[::-1][:20] * sign
                    assert [e["delta"] for e in found[name]] == pytest.approx(expected_deltas, rel=1e-6, abs=1e-13)
    assert n_steered
    assert steerer.spent.n_clean_passes == len(set(setup.early) | set(setup.late))


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_is_within_a_thousandth_of_the_spread(shape, tmp_path: Path):
    setup = Setup(shape, seed=3, dtype=torch.float32)
    setup.steer(tmp_path)
    exact = Setup(shape, seed=3)
    exact.model = copy.deepcopy(setup.model).double()
    exact.saes = {layer: copy.deepcopy(sae).double() for layer, sae in setup.saes.items()}
    slow = Slow(exact)
    for feature in setup.panel[::3]:
        for alpha, found in record_of(tmp_path, feature)["alpha_results"].items():
            expected = slow.result(feature, float(alpha))
            assert found["n_cells_steered"] == len(expected["shifts"])
            if len(expected["shifts"]):
                shifts, delta = expected["shifts"], expected["delta"]
                assert np.abs(np.array(found["state_shifts"]) - shifts).max() <= 1e-3 * max(np.abs(shifts).max(), 1e-6)
                assert found["max_logit_delta"] == pytest.approx(delta.max(), abs=1e-3 * np.ptp(delta) + 1e-9)
                wanted = set(gene_list(delta, setup.gene_of, 1))
                assert len({entry["gene"] for entry in found["top_upregulated"]} & wanted) >= 19 or not delta.any()


def active_pair(setup: Setup, layer: int) -> tuple[Cell, int]:
    """A cell, and a feature that does something in it."""
    bench = SteeringBench(setup.model, setup.saes)
    latents = bench.latents(bench.clean(setup.cells[0]), layer)
    return setup.cells[0], int(latents.features[latents.values == latents.values.max()][0])


def change_of(setup: Setup, cell: Cell, layer: int, feature: int, alpha: float) -> np.ndarray:
    """The engine's change of the mean logits."""
    bench = SteeringBench(setup.model, setup.saes)
    clean = bench.clean(cell)
    (change,) = bench.mean_changes(clean, layer, bench.latents(clean, layer), [SteeringRun(feature, alpha)])
    return bench.head.weight.double().numpy() @ change


def test_the_definition_is_the_slow_one():
    setup = Setup()
    cell, feature = active_pair(setup, 1)
    clean, steered = (slow_mean_logits(setup.model, setup.saes[1], cell, 1, f, 3.0) for f in (None, feature))
    defined = steered_logit_change(SteeringBench(setup.model, setup.saes), cell, 1, feature, 3.0)
    assert np.allclose(defined, steered - clean, rtol=1e-9, atol=1e-13)
    assert np.allclose(change_of(setup, cell, 1, feature, 3.0), defined, rtol=1e-9, atol=1e-13)


def test_the_last_layer_is_a_closed_form():
    setup = Setup(SHAPES[1])
    cell, feature = active_pair(setup, 3)
    sae, model = setup.saes[3], setup.model
    stream = reference.streams_of(model, cell.tokens)[3][cell.gene_positions]
    h = reference.dense_encode(sae, stream)[0][:, feature]
    moved = stream + 4.0 * h[:, None] * sae.W_dec.weight[:, feature]
    logits = [model.cls.predictions(x[None])[0].numpy().mean(axis=0) for x in (stream, moved)]
    assert np.allclose(change_of(setup, cell, 3, feature, 5.0), logits[1] - logits[0], rtol=1e-9, atol=1e-13)


def test_no_block_runs_for_the_last_layer(monkeypatch: pytest.MonkeyPatch):
    setup = Setup(SHAPES[1])
    cell, feature = active_pair(setup, 3)
    bench = SteeringBench(setup.model, setup.saes)
    clean = bench.clean(cell)
    latents = bench.latents(clean, 3)
    monkeypatch.setattr(bench.tail, "run", lambda *_, **__: pytest.fail("a block was run"))
    assert bench.mean_changes(clean, 3, latents, [SteeringRun(feature, 2.0)]).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_alpha_1_shifts_nothing(dtype, tmp_path: Path):
    setup = Setup(dtype=dtype)
    setup.steer(tmp_path, alphas=(1.0, 2.0))
    results = [record_of(tmp_path, feature)["alpha_results"] for feature in setup.panel]
    assert sum(result["1.0"]["n_cells_steered"] for result in results) > 0
    assert all(shift == 0.0 for result in results for shift in result["1.0"]["state_shifts"])
    assert all(result["1.0"]["max_logit_delta"] == result["1.0"]["min_logit_delta"] == 0.0 for result in results)
    assert any(result["2.0"]["mean_state_shift"] for result in results)
    cell, feature = active_pair(setup, 1)
    defined = steered_logit_change(SteeringBench(setup.model, setup.saes), cell, 1, feature, 1.0)
    assert np.abs(defined).max() < (1e-12 if dtype == torch.float64 else 1e-5)


def test_alpha_0_is_ablation():
    setup = Setup()
    cell, feature = active_pair(setup, 1)
    positions, tokens = torch.from_numpy(cell.gene_positions), torch.from_numpy(cell.tokens)[None]
    with torch.no_grad(), edited(setup.model, {1: remove_features(setup.saes[1], positions, [feature])}):
        ablated = masked_logits(setup.model, tokens)[0, positions].numpy().mean(axis=0)
    clean = slow_mean_logits(setup.model, None, cell, 0, None, 1.0)
    assert np.allclose(change_of(setup, cell, 1, feature, 0.0), ablated - clean, rtol=1e-9, atol=1e-13)


def test_a_feature_active_nowhere_has_zeros_and_empty_lists(tmp_path: Path):
    setup = Setup()
    with torch.no_grad():
        setup.saes[4].W_enc.weight[7], setup.saes[4].W_enc.bias[7] = 0.0, -1e3
    setup.steer(tmp_path)
    record = record_of(tmp_path, PanelFeature(4, 7))
    assert record["steered_cells"] == [] and record["n_early_cells"] == 4
    for result in record["alpha_results"].values():
        assert [value for value in result.values() if value] == []
        assert result["top_upregulated"] == result["top_downregulated"] == []


def test_a_feature_that_is_selected_with_latent_0_moves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    setup = Setup((6, 24, 3, (1,), 12, 12))
    with torch.no_grad():
        setup.saes[1].W_enc.weight[7], setup.saes[1].W_enc.bias[7] = 0.0, -1.0
    setup.panel = [PanelFeature(1, 7)]
    monkeypatch.setattr(SteeringBench, "_through_the_tail", lambda *_: pytest.fail("a pass was run"))
    setup.steer(tmp_path)
    result = record_of(tmp_path, PanelFeature(1, 7))["alpha_results"]["5.0"]
    assert result["n_cells_steered"] == 4 and result["state_shifts"] == [0.0] * 4
    assert result["frac_positive_shift"] == 0.0 and len(result["top_upregulated"]) == 20


def test_ties_in_the_gene_lists_go_by_token(tmp_path: Path):
    setup = Setup()
    with torch.no_grad():
        setup.model.cls.predictions.decoder.weight[:] = setup.model.cls.predictions.decoder.weight[0].clone()
    setup.steer(tmp_path)
    feature = next(f for f in setup.panel if record_of(tmp_path, f)["steered_cells"])
    result = record_of(tmp_path, feature)["alpha_results"]["2.0"]
    names = [setup.gene_of.get(token, f"token_{token}") for token in range(20)]
    assert [e["gene"] for e in result["top_upregulated"]] == [e["gene"] for e in result["top_downregulated"]] == names
    assert names[:5] == ["token_0", "token_1", "token_2", "token_3", "GENE4"]


def test_one_cell_in_each_group(tmp_path: Path):
    setup = Setup(n_cells=2)
    setup.early, setup.late = np.array([1]), np.array([0])
    setup.steer(tmp_path)
    slow = Slow(setup)
    feature = next(f for f in setup.panel if record_of(tmp_path, f)["steered_cells"])
    found = record_of(tmp_path, feature)["alpha_results"]["2.0"]
    assert found["state_shifts"] == pytest.approx(slow.result(feature, 2.0)["shifts"], rel=1e-6)
    assert found["std_state_shift"] == 0.0


def test_no_float64_on_the_accelerator(tmp_path: Path):
    setup = Setup(SHAPES[1], dtype=torch.float32)
    with NoFloat64():
        setup.steer(tmp_path)
    assert any(record_of(tmp_path, feature)["steered_cells"] for feature in setup.panel)
