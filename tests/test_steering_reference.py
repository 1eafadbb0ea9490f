"""Steering against the slow and obvious implementation in `reference_steering.py`: the files of a run, key by key."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertForMaskedLM

import reference
import reference_steering as slow
from cellcircuits.cells import Cell
from cellcircuits.panel import PanelFeature
from cellcircuits.state_shift import alpha_result
from cellcircuits.steering import SteeringBench, steered_logit_change
from cellcircuits.steering_run import Steerer
from cellcircuits.trajectory import Trajectory
from conftest import random_model, random_sae
from sae_model import TopKSAE
from test_engine import random_cells

ALPHAS = (2.0, 5.0, 0.0, 1.0, -1.5)
LENGTHS = (14, 9, 5, 17, 6, 12, 8, 11, 4, 10, 13, 7)
N_VOCAB = 64
TIE = 1e-4  # pre-activations this close may change places in float32
GENE_OF = {token: f"GENE{token}" for token in range(4, N_VOCAB) if token % 7}


@dataclass(frozen=True)
class Case:
    """One random study; the panel has one feature per entry of `layers`, active in about 2/3 of the cells."""

    seed: int
    layers: tuple[int, ...]
    n_layers: int
    d_model: int = 24
    n_heads: int = 3
    k: int = 3
    lengths: tuple[int, ...] = LENGTHS
    specials: bool = True

    def model(self, dtype: torch.dtype = torch.float64) -> BertForMaskedLM:
        model = random_model(self.seed, n_layers=self.n_layers, d_model=self.d_model, n_heads=self.n_heads)
        return model.to(dtype)

    def saes(self, dtype: torch.dtype = torch.float64) -> dict[int, TopKSAE]:
        """SAEs of different n_features and k per layer."""
        return {
            layer: random_sae(70 * self.seed + layer, self.d_model, 26 + 2 * layer, self.k + layer % 2).to(dtype)
            for layer in sorted({*self.layers})
        }

    def cells(self) -> list[Cell]:
        return random_cells(self.seed, self.lengths, self.specials)

    def pseudotime(self) -> np.ndarray:
        """In no order, with ties, and NaN where a cell is left out."""
        pseudotime = np.random.default_rng(self.seed).permutation(len(self.lengths)) / 10
        pseudotime[[1, 4]] = pseudotime[2], np.nan
        return pseudotime

    def panel(self) -> tuple[PanelFeature, ...]:
        model, saes, cells = self.model(), self.saes(), self.cells()
        panel: list[PanelFeature] = []
        for layer in self.layers:
            share = np.mean([active_anywhere(model, saes[layer], cell, layer) for cell in cells], axis=0)
            order = np.argsort(abs(share - 2 / 3), kind="stable").tolist()
            taken = [feature.index for feature in panel if feature.layer == layer]
            index = next(j for j in order if j not in taken)
            panel.append(PanelFeature(layer, index, 0.5 + layer, f"label {layer}"))
        return tuple(panel)


def active_anywhere(model: BertForMaskedLM, sae: TopKSAE, cell: Cell, layer: int) -> np.ndarray:
    chosen = reference.dense_encode(sae, reference.streams_of(model, cell.tokens)[layer])[1]
    return chosen[cell.gene_positions].any(dim=0).numpy()


CASES = {
    "every_depth": Case(1, (0, 2, 2, 4), 5),
    "last_layer_only": Case(2, (3, 3), 4, d_model=16, n_heads=2, k=2),
    "out_of_order": Case(3, (3, 0, 5, 3), 7, d_model=16, n_heads=4, specials=False),
    "before_the_last": Case(4, (6, 6), 8, d_model=12, n_heads=1),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def slow_records(
    case: Case, model: BertForMaskedLM, saes: dict[int, TopKSAE], panel: Sequence[PanelFeature], alphas: Sequence[float]
) -> list[dict[str, Any]]:
    entries = [{"layer": f.layer, "idx": f.index, "d": f.switch_d, "label": f.label} for f in panel]
    return [
        slow.steering_json(model, saes, case.cells(), case.pseudotime(), entry, alphas, GENE_OF) for entry in entries
    ]


@cache
def slow_case(case: Case) -> list[dict[str, Any]]:
    return slow_records(case, case.model(), case.saes(), case.panel(), ALPHAS)


def fast_records(
    out_dir: Path,
    case: Case,
    panel: Sequence[PanelFeature],
    model: BertForMaskedLM,
    saes: dict[int, TopKSAE],
    **settings: Any,
) -> list[dict[str, Any]]:
    """What a run writes, read back."""
    trajectory = Trajectory(case.pseudotime(), (), (), "test")
    arguments = {"alphas": ALPHAS, "batch_size": None} | settings
    out_dir.mkdir(exist_ok=True)
    Steerer(
        out_dir=out_dir, bench=SteeringBench(model, saes), cells=case.cells(), early=trajectory.early,
        late=trajectory.late, gene_of=GENE_OF, saes={layer: {"sha256": str(layer)} for layer in saes},
        fingerprint="of the test", **arguments,
    ).steer(panel)  # fmt: skip
    return [json.loads((out_dir / f"steering_{feature.name}.json").read_text()) for feature in panel]


def assert_record(found: Any, expected: Any, relative: float, where: str = "") -> None:
    """The keys of `expected`: texts and integers exactly, in lists in order, floats within `relative` of their size."""
    if isinstance(expected, dict):
        assert set(expected) <= set(found), where
        for key, value in expected.items():
            assert_record(found[key], value, relative, f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            assert_record(found[i], value, relative, f"{where}/{i}")
    elif isinstance(expected, float):
        assert math.isclose(found, expected, rel_tol=relative, abs_tol=1e-13), (where, found, expected)
    else:
        assert found == expected, where


class TestRandomModels:
    def test_there_is_something_to_compare(self, case: Case) -> None:
        """Features active in some early cells and not in others, shifts far above rounding."""
        trajectory = Trajectory(case.pseudotime(), (), (), "test")
        early, late = slow.groups_of(case.pseudotime())
        assert trajectory.early.tolist() == early
        assert trajectory.late.tolist() == late
        assert len(early) >= 4
        records = slow_case(case)
        n_steered = [record["alpha_results"]["2.0"]["n_cells_steered"] for record in records]
        assert min(n_steered) >= 1
        assert any(n < len(early) for n in n_steered)
        assert {record["alpha_results"]["1.0"]["max_logit_delta"] for record in records} == {0.0}
        assert all(record["alpha_results"]["5.0"]["max_logit_delta"] > 1e-3 for record in records)
        assert all(abs(record["alpha_results"]["2.0"]["mean_state_shift"]) > 1e-6 for record in records)

    def test_float64(self, case: Case, tmp_path: Path) -> None:
        found = fast_records(tmp_path, case, case.panel(), case.model(), case.saes())
        for ours, theirs in zip(found, slow_case(case), strict=True):
            assert_record(ours, theirs, 1e-6)
        early, late = slow.groups_of(case.pseudotime())
        with np.load(tmp_path / "state_signatures.npz") as signatures:
            for name, group in (("early", early), ("late", late)):
                expected = slow.signature(case.model(), [case.cells()[i] for i in group])
                assert signatures[name].dtype == np.float64
                np.testing.assert_allclose(signatures[name], expected, rtol=1e-10, atol=1e-12)

    def test_float32(self, case: Case, tmp_path: Path) -> None:
        """Shifts and logit changes within 1e-3 of their spread; a near tie of the TopK may decide otherwise."""
        found = fast_records(tmp_path, case, case.panel(), case.model(torch.float32), case.saes(torch.float32))
        if not all(assert_shifts(case, *pair) for pair in zip(found, slow_case(case), strict=True)):
            return
        for ours, theirs in zip(found, slow_case(case), strict=True):
            for alpha, expected in theirs["alpha_results"].items():
                assert_numbers_within_spread(ours["alpha_results"][alpha], expected)

    @pytest.mark.parametrize("batch_size", [1, 2, 3])
    def test_batches_do_not_matter(self, batch_size: int, tmp_path: Path) -> None:
        case = CASES["every_depth"]
        found = fast_records(tmp_path, case, case.panel(), case.model(), case.saes(), batch_size=batch_size)
        for ours, theirs in zip(found, slow_case(case), strict=True):
            assert_record(ours, theirs, 1e-6)

    def test_hooked_definition(self, case: Case) -> None:
        model, saes = case.model(), case.saes()
        bench = SteeringBench(model, saes)
        for cell in case.cells()[:3]:
            clean = slow.mean_logits(model, cell)
            for feature in case.panel():
                for alpha in (0.0, 3.0):
                    steered = slow.steered_logits(model, saes[feature.layer], cell, feature.layer, feature.index, alpha)
                    found = steered_logit_change(bench, cell, feature.layer, feature.index, alpha)
                    np.testing.assert_allclose(found, steered - clean, rtol=0, atol=1e-11)


def assert_shifts(case: Case, ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Shifts of every cell within 1e-3 of their spread; False where a near tie decided a cell otherwise."""
    n_off = 0
    for alpha, expected in theirs["alpha_results"].items():
        shifts, wanted = np.array(ours["alpha_results"][alpha]["state_shifts"]), np.array(expected["state_shifts"])
        if len(shifts) != len(wanted):
            n_off += 1
            continue
        if alpha == "1.0":
            assert not shifts.any()
        spread = max(wanted.std(), abs(wanted).max())
        n_off += int((abs(shifts - wanted) > 1e-3 * spread + 1e-9).sum())
    if n_off:
        early, _ = slow.groups_of(case.pseudotime())
        assert min(smallest_gap(case, case.cells()[i], theirs) for i in early) < TIE
    return n_off == 0


def smallest_gap(case: Case, cell: Cell, record: dict[str, Any]) -> float:
    """Smallest distance between the last latent selected and the next where the record's feature is steered."""
    sae = case.saes()[record["layer"]]
    stream = reference.streams_of(case.model(), cell.tokens)[record["layer"]]
    sizes = sae.pre_activations(stream).topk(sae.k + 1, dim=-1).values
    return float((sizes[:, -2] - sizes[:, -1]).min())


def assert_numbers_within_spread(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    n, spread = expected["n_cells_steered"], max(map(abs, expected["state_shifts"]), default=0.0)
    assert ours["n_cells_steered"] == ours["n_cells_active"] == n
    for key in ("mean_state_shift", "median_state_shift", "std_state_shift"):
        assert abs(ours[key] - expected[key]) <= 1e-3 * spread + 1e-9
    n_unclear = sum(1 for shift in expected["state_shifts"] if abs(shift) <= 1e-3 * spread)
    assert abs(ours["frac_positive_shift"] - expected["frac_positive_shift"]) * n <= n_unclear + 1e-9
    largest = max(abs(expected["max_logit_delta"]), abs(expected["min_logit_delta"]))
    for key in ("mean_abs_logit_delta", "max_logit_delta", "min_logit_delta"):
        assert abs(ours[key] - expected[key]) <= 1e-3 * largest + 1e-9
    for key in ("top_upregulated", "top_downregulated"):
        assert_same_genes(ours[key], expected[key], 1e-3 * largest)


def assert_same_genes(ours: list[dict[str, Any]], expected: list[dict[str, Any]], noise: float) -> None:
    """The same list, but genes whose deltas are within the noise of each other may change places."""
    assert len(ours) == len(expected)
    for mine, theirs in zip(ours, expected, strict=True):
        assert abs(mine["delta"] - theirs["delta"]) <= noise
    wanted = {gene["gene"]: gene["delta"] for gene in expected}
    for mine in ours:
        assert abs(mine["delta"] - wanted.get(mine["gene"], expected[-1]["delta"])) <= noise


class TestEdgesOfTheDefinition:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_alpha_1_shifts_nothing(self, dtype: torch.dtype, tmp_path: Path) -> None:
        """Exactly, and the lists of equal changes go by token."""
        case = CASES["every_depth"]
        records = fast_records(tmp_path, case, case.panel(), case.model(dtype), case.saes(dtype), alphas=(1.0,))
        for record in records:
            result = record["alpha_results"]["1.0"]
            assert result["n_cells_steered"] > 0
            assert not any(result["state_shifts"])
            by_token = [{"gene": GENE_OF.get(token, f"token_{token}"), "delta": 0.0} for token in range(20)]
            assert result["top_upregulated"] == result["top_downregulated"] == by_token
            assert result["frac_positive_shift"] == result["mean_abs_logit_delta"] == 0.0

    def test_alpha_0_is_ablation(self) -> None:
        case = CASES["every_depth"]
        model, saes, cell = case.model(), case.saes(), case.cells()[0]
        bench = SteeringBench(model, saes)
        for layer, sae in saes.items():
            feature = int(np.flatnonzero(active_anywhere(model, sae, cell, layer))[0])
            removed = slow.mean_logits(model, cell, {layer: reference.scaling(sae, cell.gene_positions, [feature])})
            found = steered_logit_change(bench, cell, layer, feature, 0.0)
            np.testing.assert_allclose(found, removed - slow.mean_logits(model, cell), rtol=0, atol=1e-12)
            assert abs(found).max() > 1e-6

    def test_last_layer_is_a_closed_form(self, tmp_path: Path) -> None:
        """The head on clean stream + (alpha - 1) h W_dec, without a model in between."""
        case = CASES["last_layer_only"]
        model, saes, cells, layer = case.model(), case.saes(), case.cells(), 3
        early, late = slow.groups_of(case.pseudotime())
        signatures = [slow.signature(model, [cells[i] for i in group]) for group in (early, late)]
        records = fast_records(tmp_path, case, case.panel(), model, saes)
        assert [record["n_blocks_after"] for record in records] == [0, 0]
        for record in records:
            expected = []
            for cell in (cells[i] for i in early):
                stream = reference.streams_of(model, cell.tokens)[layer][cell.gene_positions]
                latents, chosen = reference.dense_encode(saes[layer], stream)
                if not chosen[:, record["feature_idx"]].any():
                    continue
                h, direction = latents[:, [record["feature_idx"]]], saes[layer].W_dec.weight[:, record["feature_idx"]]
                clean, steered = (
                    model.cls(stream + coefficient * h * direction).mean(0).numpy() for coefficient in (0.0, 4.0)
                )
                expected.append(slow.state_shift(clean, steered, *signatures))
            np.testing.assert_allclose(record["alpha_results"]["5.0"]["state_shifts"], expected, rtol=1e-6, atol=1e-13)

    def test_active_nowhere(self, tmp_path: Path) -> None:
        case, feature = CASES["every_depth"], PanelFeature(2, 7, 1.0, "silent")
        model, saes = case.model(), case.saes()
        saes[2].W_enc.bias[7] = -50.0
        [found] = fast_records(tmp_path, case, [feature], model, saes)
        [expected] = slow_records(case, model, saes, [feature], ALPHAS)
        assert_record(found, expected, 0.0)
        assert found["alpha_results"]["5.0"]["n_cells_steered"] == 0
        assert found["alpha_results"]["5.0"]["top_upregulated"] == []

    @pytest.mark.parametrize("layer", [2, 4])
    def test_selected_but_zero(self, layer: int, tmp_path: Path) -> None:
        """Among the k, but made 0 by the ReLU: steered, and nothing changes."""
        case, feature = CASES["every_depth"], PanelFeature(layer, 5, 1.0, "zero")
        model, saes = case.model(torch.float32), case.saes(torch.float32)
        saes[layer].W_enc.bias[:] = -60.0
        saes[layer].W_enc.bias[[5, 6, 7]] = -50.0
        [found] = fast_records(tmp_path, case, [feature], model, saes)
        for result in found["alpha_results"].values():
            assert result["n_cells_steered"] == found["n_early_cells"]
            assert not any(result["state_shifts"])
            assert result["mean_abs_logit_delta"] == 0.0

    def test_one_early_cell(self, tmp_path: Path) -> None:
        """A single steered cell has a spread of 0."""
        case = replace(CASES["every_depth"], lengths=(16, 12, 9, 14, 11, 13))
        model, saes = case.model(), case.saes()
        pseudotime = case.pseudotime()
        early, _ = slow.groups_of(pseudotime)
        cell = case.cells()[early[0]]
        active = [active_anywhere(model, saes[2], case.cells()[i], 2) for i in early]
        lone = active[0] & ~np.any(active[1:], axis=0)
        panel = [PanelFeature(2, int(np.flatnonzero(lone)[0]), None, "lone")]
        [found] = fast_records(tmp_path, case, panel, model, saes)
        [expected] = slow_records(case, model, saes, panel, ALPHAS)
        assert_record(found, expected, 1e-6)
        assert found["steered_cells"] == [cell.name]
        assert found["alpha_results"]["2.0"]["std_state_shift"] == 0.0

    @pytest.mark.parametrize("n_vocab", [12, 30, 200])
    def test_gene_lists_of_any_vocabulary(self, n_vocab: int) -> None:
        """20 at each end whatever their sign, fewer where the vocabulary is smaller; ties by token."""
        rng = np.random.default_rng(n_vocab)
        changes = np.round(rng.normal(size=(3, n_vocab)), 1)
        shifts = rng.normal(size=3)
        expected = slow.alpha_result(shifts.tolist(), list(changes), GENE_OF)
        found = alpha_result(shifts, sum(changes) / 3, GENE_OF)
        assert_record(found, expected, 1e-12)
        assert len(found["top_upregulated"]) == min(20, n_vocab)
