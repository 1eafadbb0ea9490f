"""The comparison with full passes before a trace begins, and full or clean passes that do not fit in memory."""

from pathlib import Path

import numpy as np
import pytest
import torch

import higher_order_ablation
from cellcircuits import combination_run, same_position, steering_run
from cellcircuits.effects import Bench, ablation_effect
from cellcircuits.errors import UserError
from cellcircuits.joint import JointBench
from cellcircuits.precision import FP32
from cellcircuits.steering import SteeringBench
from cellcircuits.tracing import within_memory
from conftest import Study
from steering_fixtures import Setup
from test_higher_order_script import flags as combination_flags
from test_out_of_memory import ERRORS
from test_tracing_script import refusal, trace

LOW = ["tf32", "bf16", "mixed"]


def none_left(*_, **__):
    raise torch.OutOfMemoryError("none left")


class TestPrecision:
    @pytest.mark.parametrize("mode", LOW)
    def test_rounding_is_no_reason_to_refuse(
        self, study_template: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
    ):
        """A low precision may be off by more than the effects themselves."""
        real, rng = Bench.effects, np.random.default_rng(0)

        def coarse(self, clean, features):
            effects = real(self, clean, features)
            return effects if self.tail.precision == FP32 else effects + rng.normal(0, 0.1, effects.shape)

        monkeypatch.setattr(Bench, "effects", coarse)
        assert trace(study_template, tmp_path, "--features", "5,6", "--precision", mode) == 0

    @pytest.mark.parametrize("mode", [FP32, *LOW])
    def test_a_model_that_is_built_otherwise_is_refused(
        self, study_template: Study, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, mode: str
    ):
        def of_another_model(bench: Bench, cell, feature: int):
            return {layer: 1.1 * effects + 0.1 for layer, effects in ablation_effect(bench, cell, feature).items()}

        monkeypatch.setattr("cellcircuits.effects.ablation_effect", of_another_model)
        assert "disagree" in refusal(capsys, trace(study_template, tmp_path, "--precision", mode))


def test_a_full_pass_that_gives_no_numbers_does_not_pass_for_agreement(
    study_template: Study, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    def no_numbers(bench: Bench, cell, feature: int):
        return {layer: effects * np.nan for layer, effects in ablation_effect(bench, cell, feature).items()}

    monkeypatch.setattr("cellcircuits.effects.ablation_effect", no_numbers)
    assert "NaN or infinite values in the effect of an ablation" in refusal(capsys, trace(study_template, tmp_path))


class TestMemory:
    @pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
    def test_one_sentence(self, error: RuntimeError):
        with pytest.raises(UserError, match=r"^cell 3: its clean run does not fit .* lower --max-tokens .*\.$"):
            with within_memory("cell 3: its clean run"):
                raise error

    @pytest.mark.parametrize("error", [RuntimeError("a defect"), ValueError("a defect")])
    def test_another_failure_is_not_taken_for_it(self, error: Exception):
        with pytest.raises(type(error), match="a defect"), within_memory("it"):
            raise error

    @pytest.mark.parametrize("flags", [(), ("--same-position",), ("--precision", "tf32")], ids=str)
    def test_a_full_pass_of_experiment_1(
        self, study_template: Study, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
    ):
        monkeypatch.setattr("cellcircuits.effects.ablation_effect", none_left)
        monkeypatch.setattr(same_position, "same_position_effect", none_left)
        sentence = refusal(capsys, trace(study_template, tmp_path, *flags))
        assert "a full forward pass does not fit" in sentence and "--max-tokens" in sentence

    @pytest.mark.parametrize(
        "owner, name, words",
        [
            (JointBench, "clean", "its clean run does not fit"),
            (combination_run, "joint_ablation_effect", "a full forward pass does not fit"),
        ],
        ids=["clean", "full"],
    )
    def test_passes_of_experiment_2(
        self, study: Study, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, owner, name: str, words: str
    ):
        monkeypatch.setattr(owner, name, none_left)
        assert words in refusal(capsys, higher_order_ablation.main(combination_flags(study, tmp_path / "out")))

    @pytest.mark.parametrize(
        "owner, name, words",
        [
            (SteeringBench, "clean", "its clean pass does not fit"),
            (steering_run, "steered_logit_change", "a steered pass with complete logits does not fit"),
        ],
        ids=["clean", "full"],
    )
    def test_passes_of_experiment_3(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner, name: str, words):
        monkeypatch.setattr(owner, name, none_left)
        with pytest.raises(UserError, match=words):
            Setup().steer(tmp_path)

    def test_batches_of_mps_are_halved_too(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """Its error has no type of its own."""
        real, sizes = SteeringBench.mean_changes, []

        def tight(self, clean, layer, latents, runs):
            if len(runs) > 2:
                raise RuntimeError("MPS backend out of memory (allocated: 9.0 GB)")
            sizes.append(len(runs))
            return real(self, clean, layer, latents, runs)

        monkeypatch.setattr(SteeringBench, "mean_changes", tight)
        Setup().steer(tmp_path)
        assert 1 <= max(sizes) <= 2
