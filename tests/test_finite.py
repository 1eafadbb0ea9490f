"""Numbers that are none stop a run, with the cell, the layer and the position, or the weight and its file."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cellcircuits import activations
from cellcircuits.cells import Cell
from cellcircuits.effects import Bench
from cellcircuits.errors import UserError
from cellcircuits.feature_stats import GeneFeatureCounts, masked_gene_loss
from cellcircuits.finite import MEND, require_finite
from cellcircuits.geneformer import load_model
from cellcircuits.joint import JointBench
from cellcircuits.sae_store import find_sae, open_sae
from cellcircuits.same_position import SamePositionBench
from cellcircuits.steering import SteeringBench, SteeringRun
from cellcircuits.switch_features import cell_activations
from cellcircuits.tail import Tail
from conftest import Study, random_model, random_sae, write_sae

CELL = Cell("AAAC", 7, np.array([2, 31, 41, 50, 48, 40, 3]), np.arange(1, 6))
HUGE = 3e38  # finite in float32, but no product with it is


def refused(what: str, where: str = r"\d of 7 \(token \d+\)"):
    """Inside the `with` the run must stop at `what`, a plain text, at a position that `where` matches."""
    sentence = rf"^cell AAAC: NaN or infinite values in {re.escape(what)}, first at position {where}; "
    return pytest.raises(UserError, match=rf"{sentence}(take .*, )?{re.escape(MEND)}$")


def stream(layer: int) -> str:
    return f"the residual stream at layer {layer}"


def latents(layer: int) -> str:
    return f"what the SAE of layer {layer} computes"


def broken_model(layer: int):
    """A model of finite weights whose block `layer` gives no numbers."""
    model = random_model()
    overflow(model.bert.encoder.layer[layer].output.dense)
    return model


def overflow(linear: torch.nn.Linear) -> None:
    """Finite weights whose products are infinite, of either sign: a ReLU stops one of them only."""
    linear.weight[::2], linear.weight[1::2] = HUGE, -HUGE


def saes_of(*layers: int):
    return {layer: random_sae(layer, 24, 40, 4) for layer in layers}


class TestOneCheck:
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("on_device", [True, False])
    def test_names_the_first_position(self, value: float, on_device: bool) -> None:
        values = np.ones((5, 3), dtype=np.float32)
        values[3:, 1] = value
        with refused("the stream", r"4 of 7 \(token 48\)"):
            require_finite(torch.from_numpy(values) if on_device else values, CELL, "the stream", CELL.gene_positions)

    def test_further_rows_go_through_the_positions_again(self) -> None:
        values = torch.ones(2, 5, 3)
        values[1, 2, 0] = torch.nan  # the eighth row
        with pytest.raises(UserError, match=r"position 3 of 7 \(token 50\); mend it\.$"):
            require_finite(values, CELL, "the stream", CELL.gene_positions, "mend it.")

    def test_without_positions_none_is_named(self) -> None:
        with pytest.raises(UserError, match=r"^cell AAAC: NaN or infinite values in the effect; check"):
            require_finite(np.array([[0.0, np.inf]]), CELL, "the effect")

    def test_finite_values_pass(self) -> None:
        require_finite(torch.full((2, 3), 3.4e38), CELL, "the stream")
        require_finite(np.zeros((0, 3)), CELL, "the stream", CELL.gene_positions)


@pytest.mark.parametrize("bench", [Bench, SamePositionBench])
class TestTracing:
    @pytest.mark.parametrize("broken, seen", [(0, 1), (1, 1), (2, 3), (4, 5)])
    def test_a_clean_run(self, bench, broken: int, seen: int) -> None:
        with refused(stream(seen)):
            bench(broken_model(broken), saes_of(1, 3, 5), 1).clean(CELL)

    @pytest.mark.parametrize("layer", [1, 3])
    def test_latents_of_a_clean_run(self, bench, layer: int) -> None:
        saes = saes_of(1, 3)
        overflow(saes[layer].W_enc)
        with refused(latents(layer)):
            bench(random_model(), saes, 1).clean(CELL)

    def test_latents_after_an_ablation(self, bench) -> None:
        saes = saes_of(1, 3)
        made = bench(random_model(), saes, 1)
        clean = made.clean(CELL)
        overflow(saes[3].W_enc)
        with refused(latents(3)):
            made.effects(clean, active_in(clean.source))

    def test_an_ablated_run(self, bench) -> None:
        saes = saes_of(1, 3)
        overflow(saes[1].W_dec)
        made = bench(random_model(), saes, 1)
        clean = made.clean(CELL)
        with refused(f"{stream(3)} after an ablation"):
            made.effects(clean, active_in(clean.source))

    def test_the_position_is_where_the_feature_is_active(self, bench) -> None:
        saes = saes_of(1, 2)
        model = random_model()
        for block in model.bert.encoder.layer:  # nothing is handed from one position to another
            block.attention.output.dense.weight[:] = 0
        made = bench(model, saes, 1)
        clean = made.clean(CELL)
        row = int(np.flatnonzero(clean.source.values[:, 0] > 0)[-1])
        feature = int(clean.source.features[row, 0])
        saes[1].W_dec.weight[:, feature] = HUGE
        first = clean.cell.gene_positions[next(r for r in clean.active_rows(feature) if moves(clean, feature, r))]
        with refused(f"{stream(2)} after an ablation", rf"{first} of 7 \(token {CELL.tokens[first]}\)"):
            made.effects(clean, [feature])


def active_in(found) -> list[int]:
    return np.unique(found.features).tolist()


def moves(clean, feature: int, row: int) -> bool:
    return bool(clean.source_latents(feature, np.array([row])).any())


@pytest.mark.parametrize("precision", ["tf32", "bf16", "mixed"])
class TestPrecision:
    def test_overflow_names_the_way_out(self, precision: str) -> None:
        saes = saes_of(1, 3)
        overflow(saes[1].W_dec)
        bench = Bench(random_model(), saes, 1, precision=precision)
        clean = bench.clean(CELL)
        with pytest.raises(UserError, match=f"--precision {precision} may overflow: take --precision fp32"):
            bench.effects(clean, active_in(clean.source))

    def test_a_model_in_float64_has_none_lower(self, precision: str) -> None:
        model = random_model().double()
        with pytest.raises(ValueError, match=rf"precision '{precision}' is for a model in float32, .* torch\.float64"):
            Tail(model, 1, [3], precision)


class TestJoint:
    @pytest.mark.parametrize("broken, seen", [(0, 1), (2, 3), (5, 5)])
    def test_a_clean_run(self, broken: int, seen: int) -> None:
        with refused(stream(seen)):
            JointBench(broken_model(broken), saes_of(1, 3, 5), [1, 3], 5).clean(CELL)

    @pytest.mark.parametrize("layer", [1, 3, 5])
    def test_latents_of_a_clean_run(self, layer: int) -> None:
        saes = saes_of(1, 3, 5)
        overflow(saes[layer].W_enc)
        with refused(latents(layer)):
            JointBench(random_model(), saes, [1, 3], 5).clean(CELL)

    @pytest.mark.parametrize("layer", [1, 3, 5])
    def test_an_ablated_run(self, layer: int) -> None:
        saes = saes_of(1, 3, 5)
        bench = JointBench(random_model(), saes, [1, 3], 5)
        clean = bench.clean(CELL)
        row = int(np.flatnonzero(clean.latents[1].values[:, 0])[0])
        pair = [(source, int(clean.latents[source].features[row, 0])) for source in (1, 3)]
        overflow(saes[layer].W_enc if layer == 5 else saes[layer].W_dec)
        with refused(latents(5) if layer == 5 else f"{stream(5)} after an ablation"):
            bench.effects(clean, pair)


class TestSteering:
    @pytest.mark.parametrize("broken, seen", [(0, 1), (2, 3), (4, 5)])
    def test_a_clean_pass(self, broken: int, seen: int) -> None:
        with refused(stream(seen)):
            SteeringBench(broken_model(broken), saes_of(1, 3)).clean(CELL)

    def test_the_head(self) -> None:
        model = random_model()
        overflow(model.cls.predictions.transform.dense)
        with refused("the transform of the language-model head"):
            SteeringBench(model, saes_of(1)).clean(CELL)

    @pytest.mark.parametrize("layer", [1, 5])
    def test_latents(self, layer: int) -> None:
        saes = saes_of(1, 5)
        bench = SteeringBench(random_model(), saes)
        clean = bench.clean(CELL)
        overflow(saes[layer].W_enc)
        with refused(latents(layer)):
            bench.latents(clean, layer)

    @pytest.mark.parametrize("layer", [1, 5])
    def test_a_steered_pass(self, layer: int) -> None:
        bench = SteeringBench(random_model(), saes_of(1, 5))
        clean = bench.clean(CELL)
        found = bench.latents(clean, layer)
        runs = [SteeringRun(int(found.features[found.values > 0][0]), alpha) for alpha in (2.0, HUGE)]
        with refused("the residual stream at the last layer after steering") as refusal:
            bench.mean_changes(clean, layer, found, runs)
        assert "; take smaller --alphas, check the weights" in str(refusal.value)

    @pytest.mark.parametrize("layer", [1, 5])
    def test_what_the_head_makes_of_it(self, layer: int) -> None:
        model = random_model()
        bench = SteeringBench(model, saes_of(1, 5))
        clean = bench.clean(CELL)
        found = bench.latents(clean, layer)
        overflow(model.cls.predictions.transform.dense)
        runs = [SteeringRun(int(found.features[found.values > 0][0]), 2.0)]
        with pytest.raises(UserError, match="values in the transform of the language-model head after steering; take"):
            bench.mean_changes(clean, layer, found, runs)


class TestPreparationAndTrajectory:
    def test_sampled_streams(self) -> None:
        with refused(stream(3)):
            list(activations.stream(broken_model(2), [CELL], [1, 3], "sampling rows"))

    def test_activations(self) -> None:
        saes = saes_of(3)
        overflow(saes[3].W_enc)
        with refused(latents(3)):
            cell_activations(random_model(), saes, [CELL])

    def test_counted_firings(self) -> None:
        counts = GeneFeatureCounts.empty(CELL.tokens[CELL.gene_positions], 4)
        values = torch.ones(5, 2)
        values[2, 1] = torch.inf
        with refused("what an SAE computes", r"3 of 7 \(token 50\)"):
            counts.add_latents(CELL, values, torch.zeros(5, 2, dtype=torch.int64))

    def test_masked_gene_losses(self) -> None:
        model = random_model()
        overflow(model.cls.predictions.transform.dense)
        with refused("the logits of a masked gene", r"4 of 7 \(token 48\)"):
            masked_gene_loss(model, CELL, np.array([4]), 1)


class TestWeights:
    """What is not finite is found when it is loaded, also where no run would multiply it."""

    NAMES = (
        "bert.embeddings.word_embeddings.weight", "bert.embeddings.position_embeddings.weight",
        "bert.encoder.layer.5.attention.self.query.bias", "cls.predictions.bias",
    )  # fmt: skip

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_of_a_model(self, study_template: Study, tmp_path: Path, name: str, value: float) -> None:
        folder = shutil.copytree(study_template.model, tmp_path / "model")
        weights = load_file(folder / "model.safetensors")
        weights[name][-1] = value
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=rf"model\.safetensors: {name} holds NaN or infinite values"):
            load_model(str(folder))

    def test_of_a_model_in_parts(self, tmp_path: Path) -> None:
        model = random_model()
        model.bert.encoder.layer[3].output.dense.bias[0] = torch.inf
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        sentence = r"model-\d{5}-of-\d{5}\.safetensors: bert.encoder.layer.3.output.dense.bias holds NaN"
        with pytest.raises(UserError, match=sentence):
            load_model(str(tmp_path))

    @pytest.mark.parametrize("part", ["W_enc.weight", "W_enc.bias", "W_dec.weight", "W_dec.bias", "input_mean"])
    def test_of_an_sae(self, tmp_path: Path, part: str) -> None:
        sae = random_sae(0, 24, 40, 4)
        dict(sae.named_parameters() if part != "input_mean" else sae.named_buffers())[part][-1] = torch.nan
        write_sae(tmp_path, 5, sae)
        name = r"activation_mean\.npy: " if part == "input_mean" else rf"sae_final\.pt: {part} "
        with pytest.raises(UserError, match=rf"{name}holds NaN or infinite values"):
            open_sae(find_sae(tmp_path, 5))
