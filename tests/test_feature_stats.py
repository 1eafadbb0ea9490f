"""Catalog counts, baselines and spliced losses against loops and plain equations."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from cellcircuits.activations import collect_rows, draw_rows, row_stops, stream
from cellcircuits.cells import Cell
from cellcircuits.errors import UserError
from cellcircuits.feature_stats import (
    GeneFeatureCounts,
    ReconstructionError,
    build_catalog,
    fit_baseline,
    gene_tokens,
    loss_report,
    mask_positions,
    masked_gene_loss,
    splice,
)
from cellcircuits.geneformer import encoder_blocks
from cellcircuits.vocabulary import GeneVocabulary
from conftest import random_model, random_sae

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vocabulary():
    token_of = {f"ENSG{number:011d}": number + 4 for number in range(60)}
    ensembl_of = {f"GENE{number}": f"ENSG{number:011d}" for number in range(59)}  # the last has no symbol
    return GeneVocabulary(token_of, dict.fromkeys(token_of, 1.0), ensembl_of, 0, 1, 2, 3, 64, ())


@pytest.fixture(scope="module")
def cells():
    rng = np.random.default_rng(0)
    made = []
    for row in range(9):
        genes = rng.choice(np.arange(4, 64), rng.integers(12, 30), replace=False)
        tokens = np.concatenate([[2], genes, [3]]).astype(np.int64)
        tokens.flags.writeable = False
        made.append(Cell(f"c{row}", row, tokens, np.arange(1, len(tokens) - 1)))
    return made


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def sae():
    return random_sae(1, 24, 40, 4)


def plain_stream(model, cell, layer):
    """Residual stream at gene positions, from the model's own list of hidden states."""
    with torch.no_grad():
        states = model.bert(torch.tensor(cell.tokens)[None], output_hidden_states=True).hidden_states
    return states[layer + 1][0, 1:-1]


def test_stream_gives_gene_positions_of_the_block_outputs(model, cells):
    for number, cell, streams in stream(model, cells, [1, 4], "test"):
        assert cell is cells[number]
        for layer in (1, 4):
            torch.testing.assert_close(streams[layer], plain_stream(model, cell, layer))
    assert not torch.is_inference_mode_enabled()


def test_collected_rows_are_the_drawn_ones(model, cells):
    offsets = draw_rows([len(cell.gene_positions) for cell in cells], 50, seed=0)
    offsets[3] = offsets[3][:0]
    rows = {layer: np.full((sum(map(len, offsets)), 24), np.nan, np.float32) for layer in (0, 5)}
    assert list(collect_rows(model, cells, offsets, rows)) == list(range(1, 10))
    for layer in (0, 5):
        expected = torch.cat(
            [plain_stream(model, cell, layer)[torch.tensor(part)] for cell, part in zip(cells, offsets, strict=True)]
        )
        np.testing.assert_allclose(rows[layer], expected.numpy(), atol=1e-5)
        assert rows[layer].dtype == np.float32


def test_a_model_that_gives_nan_is_refused(cells):
    broken = random_model()
    encoder_blocks(broken)[2].output.LayerNorm.bias.fill_(math.nan)
    rows = {2: np.empty((3 * len(cells), 24), np.float32)}
    with pytest.raises(UserError, match=r"cell c0: NaN .* layer 2"):
        list(collect_rows(broken, cells, [np.arange(3)] * len(cells), rows))


def test_collecting_goes_on_with_any_cell(model, cells):
    offsets = draw_rows([len(cell.gene_positions) for cell in cells], 50, seed=0)
    whole = {2: np.empty((50, 24), np.float32)}
    list(collect_rows(model, cells, offsets, whole))
    rest = {2: np.full((50, 24), 7, np.float32)}
    assert list(collect_rows(model, cells, offsets, rest, first=4)) == [5, 6, 7, 8, 9]
    n_before = row_stops(offsets)[4]
    assert (rest[2][:n_before] == 7).all() and np.array_equal(rest[2][n_before:], whole[2][n_before:])


@pytest.fixture(scope="module")
def counted(model, cells, sae):
    counts = GeneFeatureCounts.empty(gene_tokens(cells)[0], sae.n_features)
    for _, cell, streams in stream(model, cells, [2], "test"):
        values, indices = sae.top_k(streams[2])
        counts.add(cell.tokens[cell.gene_positions], values.numpy(), indices.numpy())
    return counts


def test_catalog_counts_equal_a_loop_over_positions(model, cells, sae, counted, vocabulary):
    firings: dict[tuple[int, int], list[float]] = {}
    n_seen: dict[int, int] = {}
    for cell in cells:
        latents = sae.encode(plain_stream(model, cell, 2))
        for token, row in zip(cell.tokens[1:-1].tolist(), latents, strict=True):
            n_seen[token] = n_seen.get(token, 0) + 1
            for feature in torch.nonzero(row > 0).flatten().tolist():
                firings.setdefault((feature, token), []).append(row[feature].item())
    n_positions = sum(n_seen.values())
    catalog = build_catalog(counted, vocabulary, min_firings=2, n_top_genes=6)
    for index, feature in enumerate(catalog["features"]):
        of_feature = {token: values for (number, token), values in firings.items() if number == index}
        all_values = [value for values in of_feature.values() for value in values]
        assert feature["feature_idx"] == index and feature["fire_count"] == len(all_values)
        assert feature["activation_freq"] == len(all_values) / n_positions
        assert feature["mean_activation"] == pytest.approx(sum(all_values) / n_positions, rel=1e-5)
        assert feature["is_dead"] == (not all_values) and feature["n_unique_genes"] == len(of_feature)
        scores = {token: sum(values) / n_seen[token] for token, values in of_feature.items() if len(values) >= 2}
        best = sorted(scores, key=lambda token: -scores[token])[:6]
        assert [gene["gene_id"] for gene in feature["top_genes"]] == best
        for gene in feature["top_genes"]:
            values = of_feature[gene["gene_id"]]
            assert gene["fire_count"] == len(values)
            assert gene["score"] == pytest.approx(scores[gene["gene_id"]], rel=1e-5)
            assert gene["mean_activation"] == pytest.approx(np.mean(values), rel=1e-5)
            assert gene["ensembl_id"] == f"ENSG{gene['gene_id'] - 4:011d}"
            named = gene["gene_id"] != 63
            assert gene["gene_name"] == (f"GENE{gene['gene_id'] - 4}" if named else gene["ensembl_id"])
    summary = catalog["summary"]
    assert summary["n_alive"] + summary["n_dead"] == 40 and summary["n_positions"] == n_positions


def test_a_token_twice_in_a_cell_counts_twice():
    counts = GeneFeatureCounts.empty(np.array([4, 9]), 3)
    counts.add(np.array([9, 9]), np.array([[1.0, 0.0], [2.0, 5.0]]), np.array([[0, 1], [0, 2]]))
    assert counts.n_seen.tolist() == [0, 2]
    assert counts.sums[1].tolist() == [3.0, 0.0, 5.0] and counts.firings[1].tolist() == [2, 0, 1]


def test_one_lucky_firing_does_not_make_a_top_gene(vocabulary):
    counts = GeneFeatureCounts.empty(np.array([4, 5]), 1)
    for _ in range(10):
        counts.add(np.array([4, 5]), np.array([[0.5], [0.0]]), np.zeros((2, 1), int))
    counts.add(np.array([5]), np.array([[100.0]]), np.zeros((1, 1), int))
    feature = build_catalog(counts, vocabulary, min_firings=5, n_top_genes=20)["features"][0]
    assert [gene["gene_name"] for gene in feature["top_genes"]] == ["GENE0"] and feature["n_unique_genes"] == 2


def test_baseline_equals_the_singular_value_decomposition():
    rows = np.random.default_rng(0).standard_normal((500, 6)).astype(np.float32) * [5, 4, 3, 2, 1, 0.5]
    rows = rows.astype(np.float32) + 10
    mean = rows.mean(axis=0)
    baseline = fit_baseline(rows, mean, 2, CPU)
    _, singular, axes = np.linalg.svd(rows - mean, full_matrices=False)
    np.testing.assert_allclose(np.abs(baseline.components.T @ axes[:2].T), np.eye(2), atol=1e-3)
    assert baseline.participation_ratio == pytest.approx((singular**2).sum() ** 2 / (singular**4).sum(), rel=1e-4)


def test_reconstruction_error_over_cells(model, cells, sae):
    rows = np.concatenate([plain_stream(model, cell, 2).numpy() for cell in cells])
    baseline = fit_baseline(rows, sae.input_mean.numpy(), 4, CPU)
    error = ReconstructionError()
    for cell in cells:
        error.add(plain_stream(model, cell, 2), sae, baseline)
    report = error.report()
    centred = rows - sae.input_mean.numpy()
    rebuilt = sae.reconstruct(torch.from_numpy(rows)).numpy()
    assert report["fvu"] == pytest.approx(((rows - rebuilt) ** 2).sum() / (centred**2).sum(), rel=1e-4)
    outside = centred - centred @ baseline.components @ baseline.components.T
    assert report["pca_fvu"] == pytest.approx((outside**2).sum() / (centred**2).sum(), rel=1e-4)
    assert report["l0"] <= 4 and report["n_held_out_positions"] == len(rows)
    assert ReconstructionError().report()["fvu"] is None


def test_masked_loss_of_every_edit_equals_a_plain_hook(model, cells, sae):
    rng = np.random.default_rng(0)
    masks = [mask_positions(cell, 0.15, rng) for cell in cells]
    assert all(
        len(mask) == max(1, round(0.15 * len(cell.gene_positions))) for mask, cell in zip(masks, cells, strict=True)
    )
    placed = {"original": None, **{name: (2, edit) for name, edit in splice(sae).items()}}
    losses = {
        name: [masked_gene_loss(model, cell, mask, 1, edit) for cell, mask in zip(cells, masks, strict=True)]
        for name, edit in placed.items()
    }

    def replaced(output, new):
        residual = output[0] if isinstance(output, tuple) else output
        changed = residual.clone()
        changed[0, 1:-1] = new(residual[0, 1:-1])
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    plain = {
        "original": lambda x: x,
        "spliced": lambda x: sae.decode(sae.encode(x)) + sae.input_mean,
        "mean_ablated": lambda x: sae.input_mean.repeat(len(x), 1),
        "zero_ablated": lambda x: x * 0,
    }
    for name, new in plain.items():
        handle = encoder_blocks(model)[2].register_forward_hook(lambda _m, _i, output, new=new: replaced(output, new))
        for cell, mask, loss in zip(cells, masks, losses[name], strict=True):
            tokens = torch.tensor(cell.tokens)
            truth = tokens[mask].clone()
            tokens[mask] = 1
            with torch.no_grad():
                terms = cross_entropy(model(tokens[None]).logits[0, mask], truth, reduction="none")
            assert loss == pytest.approx(terms.sum().item(), rel=1e-5)
        handle.remove()


def test_loss_recovered_is_never_nan():
    report = loss_report({"original": 1.0, "spliced": 1.5, "mean_ablated": 3.0, "zero_ablated": 1.0})
    assert report["loss_recovered_from_mean_ablated"] == 0.75
    assert report["loss_recovered_from_zero_ablated"] is None
