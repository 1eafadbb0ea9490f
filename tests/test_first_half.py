"""What the first half says: against plain loops over full passes; kept, resumed, never of another run."""

from pathlib import Path

import numpy as np
import pytest
import torch

import reference
import reference_steering
from cellcircuits import first_half
from cellcircuits.first_half import clean_means
from cellcircuits.geneformer import head_parts
from cellcircuits.state_shift import LogitMap
from controlled_fixtures import Setup
from steering_fixtures import SHAPES


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_facts_are_those_of_full_passes(shape, tmp_path: Path):
    setup = Setup(shape, 2)
    means = clean_means(setup.model, setup.saes, setup.cells, tmp_path, "run")
    early, late = np.array([0, 3]), np.array([1, 4])
    head = head_parts(setup.model)
    signatures = means.signatures((early, late), LogitMap(head.weight.numpy(), head.bias.numpy()))
    for found, group in ((signatures.early, early), (signatures.late, late)):
        assert found == pytest.approx(reference_steering.signature(setup.model, [setup.cells[i] for i in group]))
    for layer, sae in setup.saes.items():
        lengths, counts, sums, in_cells, n_early = [], 0, 0, [], 0
        positive = np.zeros(sae.n_features)
        for number, cell in enumerate(setup.cells):
            stream = reference.streams_of(setup.model, cell.tokens)[layer][cell.gene_positions]
            latents = reference.dense_encode(sae, stream)[0].numpy()
            lengths += [float(torch.sqrt((row * row).sum())) for row in stream]
            counts, sums = counts + (latents > 0).sum(axis=0), sums + latents.sum(axis=0)
            if number in early:
                in_cells.append((latents > 0).any(axis=0))
                positive += (latents > 0).sum(axis=0)
                n_early += len(stream)
        facts = means.layer_facts(layer, early)
        assert facts.mean_norm == pytest.approx(np.mean(lengths))
        assert facts.frequency == pytest.approx(positive / n_early)
        assert facts.share_of_cells == pytest.approx(np.mean(in_cells, axis=0))
        assert facts.mean_latent == pytest.approx(sums / np.maximum(counts, 1), rel=1e-5)


def test_what_is_kept_is_read_again_and_a_stop_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    setup, real = Setup(), first_half._count
    whole = clean_means(setup.model, setup.saes, setup.cells, tmp_path / "whole", "run")
    calls = []

    def stopping(*args):
        calls.append(args)
        if len(calls) > 5:  # in the third of five cells, of two layers each
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(first_half, "_count", stopping)
    with pytest.raises(KeyboardInterrupt):
        clean_means(setup.model, setup.saes, setup.cells, tmp_path / "stopped", "run")
    assert not (tmp_path / "stopped" / "first_half.npz").exists()
    calls.clear()
    monkeypatch.setattr(first_half, "_count", lambda *args: calls.append(args) or real(*args))
    again = clean_means(setup.model, setup.saes, setup.cells, tmp_path / "stopped", "run")
    assert len(calls) == 2 * 3
    for folder in ("whole", "stopped"):
        assert not list((tmp_path / folder).glob("partial/*"))
    assert (tmp_path / "whole" / "first_half.npz").read_bytes() == (
        tmp_path / "stopped" / "first_half.npz"
    ).read_bytes()
    assert np.array_equal(again.transformed, whole.transformed)
    calls.clear()
    clean_means(setup.model, setup.saes, setup.cells, tmp_path / "whole", "run")
    assert not calls
    clean_means(setup.model, setup.saes, setup.cells, tmp_path / "whole", "another run")
    assert len(calls) == 2 * 5
