"""Loading, editing and reading a Geneformer."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForMaskedLM, BertModel, GPT2Config

from cellcircuits.errors import UserError
from cellcircuits.geneformer import (
    captured,
    edited,
    encoder_blocks,
    fingerprint,
    load_model,
    masked_logits,
    n_positions,
    residuals,
)
from conftest import random_model

TOKENS = torch.tensor([[2, 9, 30, 12, 41, 3], [2, 8, 7, 33, 60, 3]])


class Rewrapped(nn.Module):
    """A block whose output is a tuple or a bare tensor, whatever the installed transformers returns."""

    def __init__(self, block: nn.Module, as_tuple: bool) -> None:
        super().__init__()
        self.block, self.as_tuple = block, as_tuple

    def forward(self, *args: object, **kwargs: object) -> object:
        output = self.block(*args, **kwargs)
        stream = output[0] if isinstance(output, tuple) else output
        return (stream, "attention weights") if self.as_tuple else stream


class RewrappedEncoder(nn.Module):
    """Stands in for the encoder, and takes either kind of block output."""

    def __init__(self, encoder: nn.Module, as_tuple: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Rewrapped(block, as_tuple) for block in encoder.layer)

    def forward(self, stream: Tensor, *_args: object, **_kwargs: object) -> tuple[Tensor]:
        for block in self.layer:
            output = block(stream)
            stream = output[0] if isinstance(output, tuple) else output
        return (stream,)


def hidden_states(model: BertForMaskedLM, tokens: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return model(input_ids=tokens, output_hidden_states=True).hidden_states


def n_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


class TestResiduals:
    def test_are_the_hidden_states_of_a_plain_forward(self) -> None:
        model = random_model(n_layers=4)
        plain = hidden_states(model, TOKENS)
        for layer, stream in residuals(model, TOKENS, [0, 1, 2]).items():
            assert torch.equal(stream, plain[layer + 1])
        # the last one too: a model in post-layer-norm form has no norm after it
        assert torch.equal(residuals(model, TOKENS, [3])[3], plain[4])

    def test_stop_after_the_last_layer_asked_for(self) -> None:
        model, ran = random_model(n_layers=4), []
        for layer, block in enumerate(encoder_blocks(model)):
            block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        residuals(model, TOKENS, [2, 0])
        assert ran == [0, 1, 2]

    def test_leave_a_model_that_still_gives_hidden_states(self) -> None:
        """Ending a forward pass early must not upset the bookkeeping of transformers."""
        model = random_model(n_layers=3)
        before, logits = hidden_states(model, TOKENS), masked_logits(model, TOKENS)
        n_before = n_hooks(model)  # transformers 5 leaves its own on the first call
        residuals(model, TOKENS, [0])
        after = hidden_states(model, TOKENS)
        assert len(after) == len(before) == 4
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        assert torch.equal(masked_logits(model, TOKENS), logits)
        assert n_hooks(model) == n_before


class TestEdits:
    def test_are_visible_downstream_and_not_upstream(self) -> None:
        model = random_model(n_layers=4)
        clean, logits = residuals(model, TOKENS, range(4)), masked_logits(model, TOKENS)
        with edited(model, {1: lambda x: x + 1.0}):
            changed, changed_logits = residuals(model, TOKENS, range(4)), masked_logits(model, TOKENS)
        assert torch.equal(changed[0], clean[0])
        assert torch.equal(changed[1], clean[1] + 1.0)
        assert not torch.allclose(changed[2], clean[2])
        assert not torch.allclose(changed[3], clean[3])
        assert not torch.allclose(changed_logits, logits)
        assert torch.equal(masked_logits(model, TOKENS), logits)

    def test_replace_the_stream_that_the_next_block_reads(self) -> None:
        model = random_model(n_layers=3)
        other = residuals(model, TOKENS.flip(1), range(3))
        with edited(model, {0: lambda _: other[0]}):
            assert torch.equal(residuals(model, TOKENS, [2])[2], other[2])

    def test_of_several_layers_compose_in_order_of_depth(self) -> None:
        model, seen = random_model(n_layers=4), {}

        def note(layer: int):
            def edit(x: Tensor) -> Tensor:
                seen[layer] = x.clone()
                return x + layer

            return edit

        with edited(model, {2: note(2), 1: note(1)}):
            residuals(model, TOKENS, [3])
        assert list(seen) == [1, 2]
        with edited(model, {1: lambda x: x + 1}):
            assert torch.equal(residuals(model, TOKENS, [2])[2], seen[2])

    def test_hooks_are_gone_after_the_with(self) -> None:
        model = random_model(n_layers=3)
        before = n_hooks(model)
        with edited(model, {0: lambda x: x, 2: lambda x: x}):
            assert n_hooks(model) == before + 2
        assert n_hooks(model) == before

    def test_hooks_are_gone_after_an_exception(self) -> None:
        model = random_model(n_layers=3)
        before, logits = n_hooks(model), masked_logits(model, TOKENS)
        with pytest.raises(RuntimeError, match="inside"), edited(model, {0: lambda x: x + 1}):
            raise RuntimeError("inside")
        assert n_hooks(model) == before

        def fail(_: Tensor) -> Tensor:
            raise RuntimeError("in an edit")

        with pytest.raises(RuntimeError, match="in an edit"), edited(model, {0: lambda x: x + 1, 1: fail}):
            residuals(model, TOKENS, [2])
        assert n_hooks(model) == before
        with pytest.raises(IndexError), edited(model, {0: lambda x: x + 1, 99: lambda x: x}):
            pass
        assert n_hooks(model) == before
        assert torch.equal(masked_logits(model, TOKENS), logits)

    @pytest.mark.parametrize("as_tuple", [True, False])
    def test_blocks_may_return_a_tuple_or_a_tensor(self, as_tuple: bool) -> None:
        model = random_model(n_layers=4)
        clean = residuals(model, TOKENS, range(4))
        with edited(model, {1: lambda x: x + 1.0}):
            changed = residuals(model, TOKENS, range(4))
        model.bert.encoder = RewrappedEncoder(model.bert.encoder, as_tuple)
        for layer, stream in residuals(model, TOKENS, range(4)).items():
            torch.testing.assert_close(stream, clean[layer], rtol=1e-5, atol=1e-5)
        with edited(model, {1: lambda x: x + 1.0}), captured(model, [1]) as streams:
            again = residuals(model, TOKENS, range(4))
        for layer, stream in again.items():
            torch.testing.assert_close(stream, changed[layer], rtol=1e-5, atol=1e-5)
        assert torch.equal(streams[1], again[1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random_model(n_layers=2).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


class TestLoading:
    def test_gives_the_model_back(self, folder: Path) -> None:
        loaded, original = load_model(str(folder)), random_model(n_layers=2)
        assert torch.equal(masked_logits(loaded.model, TOKENS), masked_logits(original, TOKENS))
        assert not loaded.model.training
        assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
        assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
        assert n_positions(loaded.model) == 48
        assert loaded.folder == folder
        assert loaded.fingerprint == fingerprint(original)

    def test_from_a_subfolder(self, folder: Path) -> None:
        random_model(5, n_layers=3).save_pretrained(folder / "small")
        loaded = load_model(str(folder), "small")
        assert loaded.model.config.num_hidden_layers == 3
        assert (loaded.source, loaded.subfolder, loaded.folder) == (str(folder), "small", folder)
        assert loaded.fingerprint == fingerprint(random_model(5, n_layers=3))

    def test_half_precision_weights_become_float32(self, folder: Path) -> None:
        random_model(n_layers=2).half().save_pretrained(folder)
        assert load_model(str(folder)).model.dtype == torch.float32

    def test_does_not_change_what_transformers_prints_later(self, folder: Path) -> None:
        from transformers.utils import logging as transformers_logging

        before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
        load_model(str(folder))
        assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before

    def test_no_such_folder(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="nothing"):
            load_model(str(tmp_path / "nothing"))

    def test_no_config(self, folder: Path) -> None:
        (folder / "config.json").unlink()
        with pytest.raises(UserError, match=r"config\.json"):
            load_model(str(folder))
        with pytest.raises(UserError, match=r"other: no config\.json"):
            load_model(str(folder), "other")

    def test_damaged_config(self, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        with pytest.raises(UserError, match="model"):
            load_model(str(folder))

    def test_another_architecture(self, folder: Path) -> None:
        GPT2Config(n_layer=2, n_embd=8, n_head=2).save_pretrained(folder)
        with pytest.raises(UserError, match="gpt2"):
            load_model(str(folder))

    @pytest.mark.parametrize("fields", [{"position_embedding_type": "relative_key"}, {"is_decoder": True}])
    def test_a_form_that_the_engine_does_not_compute(self, folder: Path, fields: dict) -> None:
        change_config(folder, **fields)
        with pytest.raises(UserError, match=next(iter(fields))):
            load_model(str(folder))

    def test_no_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        with pytest.raises(UserError, match="cannot be loaded"):
            load_model(str(folder))

    def test_damaged_weights(self, folder: Path) -> None:
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
        with pytest.raises(UserError, match="cannot be loaded"):
            load_model(str(folder))

    def test_weights_of_the_encoder_only(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        BertModel(random_model(n_layers=2).config).save_pretrained(folder)
        with pytest.raises(UserError, match=r"weights lack or misfit cls\.predictions"):
            load_model(str(folder))

    def test_fewer_blocks_than_the_config_says(self, folder: Path) -> None:
        change_config(folder, num_hidden_layers=3)
        with pytest.raises(UserError, match="weights lack or misfit"):
            load_model(str(folder))

    def test_weights_of_another_width(self, folder: Path) -> None:
        change_config(folder, hidden_size=12)
        with pytest.raises(UserError, match="model"):
            load_model(str(folder))


class TestFingerprint:
    def test_is_of_the_weights_not_of_the_place(self, folder: Path, tmp_path: Path) -> None:
        (folder).rename(tmp_path / "elsewhere")
        assert load_model(str(tmp_path / "elsewhere")).fingerprint == fingerprint(random_model(n_layers=2))

    def test_does_not_change_by_use(self) -> None:
        model = random_model(n_layers=2)
        before = fingerprint(model)
        with edited(model, {0: lambda x: x + 1}):
            residuals(model, TOKENS, [1])
            assert fingerprint(model) == before
        assert fingerprint(model) == before

    @pytest.mark.parametrize("name", ["bert.encoder.layer.1.output.dense.weight", "cls.predictions.bias"])
    def test_changes_with_one_weight(self, name: str) -> None:
        model = random_model(n_layers=2)
        before = fingerprint(model)
        model.state_dict()[name].view(-1)[0] += 1e-3
        assert fingerprint(model) != before

    @pytest.mark.parametrize(
        ("field", "value"), [("num_attention_heads", 2), ("hidden_act", "gelu"), ("layer_norm_eps", 1e-5)]
    )
    def test_changes_with_a_setting_of_the_forward_pass(self, field: str, value: object) -> None:
        model = random_model(n_layers=2)
        before = fingerprint(model)
        setattr(model.config, field, value)
        assert fingerprint(model) != before
