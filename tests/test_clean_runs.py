"""Clean runs: carried on from layer to layer they are what a full pass gives, once per cell, in bounded memory."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertForMaskedLM

from cellcircuits import clean_runs, effects
from cellcircuits.cells import Cell
from cellcircuits.clean_runs import CleanRuns, n_bytes
from cellcircuits.device import kept_on_host
from cellcircuits.effects import Bench, CleanCell, ablation_effect
from cellcircuits.errors import UserError
from cellcircuits.tail import Tail
from conftest import random_model, random_sae
from sae_model import TopKSAE
from test_engine import random_cells

LAYERS = (1, 2, 4, 5)


@pytest.fixture
def model() -> BertForMaskedLM:
    return random_model(3).double()


@pytest.fixture
def saes() -> dict[int, TopKSAE]:
    return {layer: random_sae(layer, 24, 30 + layer, 3 + layer % 2).double() for layer in (0, *LAYERS)}


@pytest.fixture
def cells() -> list[Cell]:
    return random_cells(5, (9, 30, 17, 4))


@pytest.fixture
def n_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every forward pass from the tokens on."""
    real, passes = effects.residuals, []

    def counted(*args):
        passes.append(1)
        return real(*args)

    monkeypatch.setattr(effects, "residuals", counted)
    return passes


def benches(model: BertForMaskedLM, saes: dict[int, TopKSAE], sources: Sequence[int], targets: Sequence[int]):
    """One bench per source layer, all with one tail."""
    tail = Tail(model, sources[0], targets)
    return [Bench(model, saes, source, [t for t in targets if t > source], tail) for source in sources]


def in_turn(of_layers: Sequence[Bench], cells: Sequence[Cell], **limits: float) -> list[list[CleanCell]]:
    """The runs of all cells at one source layer after the other."""
    runs, made = None, []
    for bench in of_layers:
        runs = CleanRuns(bench, cells, before=runs, **limits)
        made.append(list(runs))
    return made


def same(one: CleanCell, other: CleanCell) -> bool:
    pairs = [(one.source, other.source), *((one.targets[layer], other.targets[layer]) for layer in one.targets)]
    latents = all((a.values == b.values).all() and (a.features == b.features).all() for a, b in pairs)
    return latents and bool((one.residual == other.residual).all()) and list(one.targets) == list(other.targets)


@pytest.mark.parametrize("specials", [True, False])
@pytest.mark.parametrize(("sources", "targets"), [((1, 2, 4), (2, 4, 5)), ((0, 1, 3), (4, 5)), ((0, 4), (2, 5))])
def test_each_layer_is_what_a_full_pass_gives(model, saes, sources, targets, specials: bool):
    saes[3] = random_sae(3, 24, 31, 4).double()
    cells = random_cells(5, (9, 30, 17), specials)
    for source, made in zip(sources, in_turn(benches(model, saes, sources, targets), cells), strict=True):
        later = [target for target in targets if target > source]
        for cell, clean in zip(cells, made, strict=True):
            streams = model.bert(torch.from_numpy(cell.tokens)[None], output_hidden_states=True).hidden_states
            assert clean.cell is cell
            torch.testing.assert_close(clean.residual, streams[source + 1][0], rtol=0, atol=1e-10)
            assert list(clean.targets) == later
            for layer, latents in {source: clean.source, **clean.targets}.items():
                values, features = saes[layer].top_k(streams[layer + 1][0, cell.gene_positions])
                assert (latents.features == features.numpy()).all()
                np.testing.assert_allclose(latents.values, values.numpy(), rtol=0, atol=1e-10)


def test_effects_are_those_of_a_layer_traced_alone(model, saes, cells):
    of_layers = benches(model, saes, (1, 2, 4), (2, 4, 5))
    for bench, made in zip(of_layers, in_turn(of_layers, cells), strict=True):
        features = np.unique(made[1].source.features)[:4].tolist()
        for feature, found in zip(features, bench.effects(made[1], features), strict=True):
            for layer, expected in ablation_effect(bench, cells[1], feature).items():
                np.testing.assert_allclose(found[bench.columns[layer]], expected, rtol=0, atol=1e-10)


def test_one_pass_per_cell_and_one_stream_kept(model, saes, cells, n_passes):
    first, second, third = benches(model, saes, (1, 2, 4), (2, 4, 5))
    runs = CleanRuns(first, cells)
    assert len(runs) == 4 and not n_passes
    assert list(runs)[2] is runs[2] and len(n_passes) == 4
    later = CleanRuns(second, cells, before=runs)
    assert list(later)[3] is later[3] and len(n_passes) == 4
    assert not runs._kept and len(later._kept) == 4
    last = list(CleanRuns(third, cells, before=later))
    assert len(last) == len(n_passes) == 4


def test_a_layer_that_asked_for_some_cells_only(model, saes, cells, n_passes):
    """As after a restart in the middle of a block, and with a layer in between that was done."""
    of_layers = benches(model, saes, (1, 2, 4), (2, 4, 5))
    whole = in_turn(of_layers, cells)[2]
    n_passes.clear()
    first = CleanRuns(of_layers[0], cells)
    assert first[0] and first[3]
    second = CleanRuns(of_layers[1], cells, before=first)
    assert second[3] and second[1]
    third = CleanRuns(of_layers[2], cells, before=second)
    assert all(map(same, third, whole))
    assert len(n_passes) == 4


def test_without_the_earlier_layers_runs_the_bits_are_the_same(saes, cells):
    """A run that stopped goes on with exactly the numbers that it would have had."""
    model, saes = random_model(3), {layer: sae.float() for layer, sae in saes.items()}
    of_layers = benches(model, saes, (1, 2, 4), (2, 4, 5))
    runs = None
    for bench, whole in zip(of_layers, in_turn(of_layers, cells), strict=True):
        runs = CleanRuns(bench, cells, before=runs, max_bytes=0)
        assert all(map(same, runs, whole))


def test_memory_is_bounded_and_what_does_not_fit_runs_again(model, saes, n_passes):
    cells = random_cells(5, (20, 20, 20, 20))
    of_layers = benches(model, saes, (1, 2), (2, 4, 5))
    whole = in_turn(of_layers, cells)
    limit = 2.5 * n_bytes(whole[0][0])
    n_passes.clear()
    first = CleanRuns(of_layers[0], cells, max_bytes=limit)
    for visit in (1, 2, 3):
        assert all(map(same, first, whole[0]))
        assert len(n_passes) == 4 + 2 * (visit - 1)
        assert len(first._kept) == 2
    second = CleanRuns(of_layers[1], cells, before=first, max_bytes=limit)
    n_passes.clear()
    assert all(map(same, second, whole[1])) and all(map(same, second, whole[1]))
    assert len(n_passes) == 4 and len(second._kept) == 2 and not first._kept


def test_bytes_are_counted(model, saes, cells):
    (bench,) = benches(model, saes, (1,), (4, 5))
    clean = bench.clean(cells[1])
    n_pos, n_gene, k = 30, 28, (saes[1].k, saes[4].k, saes[5].k)
    assert n_bytes(clean) == n_pos * 24 * 8 + n_gene * sum(k) * (8 + 4)


class TestKeptOnHost:
    @pytest.mark.parametrize("shape", [(), (0, 4), (1,), (3, 5), (2, 700, 9)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32])
    def test_is_a_copy(self, shape: tuple[int, ...], dtype: torch.dtype):
        tensor = (100 * torch.randn(shape)).to(dtype)
        kept, before = kept_on_host(tensor), tensor.clone()
        assert kept.dtype == dtype and torch.equal(kept, before)
        tensor += 1
        assert torch.equal(kept, before)

    def test_of_a_view_is_its_own_size(self):
        whole = torch.arange(60.0).reshape(3, 4, 5)
        for view in (whole[1], whole.transpose(0, 2), whole[:, 1:3, ::2]):
            kept = kept_on_host(view)
            assert torch.equal(kept, view) and kept.is_contiguous()
            assert kept.untyped_storage().nbytes() == view.numel() * 4

    @pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists a process' maps")
    def test_many_do_not_use_up_the_maps_that_a_process_may_have(self):
        def n_maps() -> int:
            return len(Path("/proc/self/maps").read_text().splitlines())

        before, tensor = n_maps(), torch.randn(2000)
        kept = [kept_on_host(tensor) for _ in range(200)]
        assert n_maps() - before < 50 and torch.equal(kept[-1], tensor)


def test_a_quarter_of_the_machine_is_the_limit(model, saes, cells, monkeypatch: pytest.MonkeyPatch):
    (bench,) = benches(model, saes, (1,), (4, 5))
    size = n_bytes(bench.clean(cells[1]))
    for memory, n_kept in ((4 * size, 1), (4 * size - 4, 0)):
        monkeypatch.setattr(clean_runs, "host_memory", lambda memory=memory: memory)
        runs = CleanRuns(bench, [cells[1]])
        assert runs[0] and len(runs._kept) == n_kept


def test_a_stream_that_is_not_finite_is_one_sentence(model, saes, cells):
    first, second = benches(model, saes, (1, 4), (5,))
    runs = CleanRuns(first, cells)
    assert runs[0]
    norm = first.tail._blocks[3].parts.output_norm
    norm.bias.fill_(float("inf"))
    with pytest.raises(UserError, match=r"cell cell0: NaN or infinite values in the residual stream at layer 4, first"):
        CleanRuns(second, cells, before=runs)[0]


class TestOutOfMemory:
    @pytest.mark.parametrize(
        "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("MPS backend out of memory (20 GB)")]
    )
    def test_of_a_clean_run_is_one_sentence(self, model, saes, cells, monkeypatch: pytest.MonkeyPatch, error):
        (bench,) = benches(model, saes, (1,), (5,))

        def no_memory(_cell: Cell) -> CleanCell:
            raise error

        monkeypatch.setattr(bench, "clean", no_memory)
        with pytest.raises(UserError, match=r"cell cell2: its clean run does not fit .* --max-tokens or take --device"):
            CleanRuns(bench, cells)[2]

    def test_another_error_is_not_hidden(self, model, saes, cells, monkeypatch: pytest.MonkeyPatch):
        (bench,) = benches(model, saes, (1,), (5,))

        def broken(_cell: Cell) -> CleanCell:
            raise RuntimeError("a defect")

        monkeypatch.setattr(bench, "clean", broken)
        with pytest.raises(RuntimeError, match="a defect"):
            CleanRuns(bench, cells)[2]
