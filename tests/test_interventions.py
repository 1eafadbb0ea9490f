"""The edit of the residual stream, against two dense decodes."""

import pytest
import torch

import reference
from cellcircuits.geneformer import edited, residuals
from cellcircuits.interventions import remove_features, scale_features
from conftest import random_model, random_sae
from sae_model import TopKSAE

GENES = torch.arange(1, 8)  # of nine positions


def stream(seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 9, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def wide_sae(seed: int = 0) -> TopKSAE:
    return random_sae(seed, 12, 30, 5).double()


def frequent(sae: TopKSAE, residual: torch.Tensor, n: int) -> list[int]:
    """The features that are active at the most gene positions."""
    latents = sae.encode(residual[:, GENES])
    return (latents > 0).sum(dim=(0, 1)).topk(n).indices.tolist()


def test_coefficient_1_is_a_no_op() -> None:
    residual, sae = stream(), wide_sae()
    assert torch.equal(scale_features(sae, GENES, frequent(sae, residual, 3), 1.0)(residual), residual)


def test_no_feature_is_a_no_op() -> None:
    residual, sae = stream(), wide_sae()
    assert torch.equal(scale_features(sae, GENES, [], 0.0)(residual), residual)


@pytest.mark.parametrize("coefficient", [0.0, 2.0, 5.0, -1.0])
@pytest.mark.parametrize("n_features", [1, 3])
def test_equals_two_decodes(coefficient: float, n_features: int) -> None:
    residual, sae = stream(), wide_sae()
    features = frequent(sae, residual, n_features)
    expected = reference.scaling(sae, GENES.tolist(), features, coefficient)(residual[0])
    found = scale_features(sae, GENES, features, coefficient)(residual)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(found, residual[0])


def test_removing_is_coefficient_0() -> None:
    residual, sae = stream(), wide_sae()
    features = frequent(sae, residual, 2)
    removed = remove_features(sae, GENES, features)(residual)
    assert torch.equal(removed, scale_features(sae, GENES, features, 0.0)(residual))


def test_moves_by_the_latent_along_the_decoder_direction() -> None:
    residual, sae = stream(), wide_sae()
    [feature] = frequent(sae, residual, 1)
    moved = remove_features(sae, GENES, [feature])(residual) - residual
    expected = -sae.encode(residual[:, GENES])[..., [feature]] * sae.W_dec.weight[:, feature]
    torch.testing.assert_close(moved[:, GENES], expected, rtol=0, atol=1e-12)


def test_order_of_features_is_irrelevant() -> None:
    residual, sae = stream(), wide_sae()
    features = frequent(sae, residual, 4)
    one = scale_features(sae, GENES, features, 0.0)(residual)
    other = scale_features(sae, GENES, features[::-1], 0.0)(residual)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_features_of_one_layer_share_one_encoding() -> None:
    """Together is not one after the other: the second edit would read a stream that the first has changed."""
    residual, sae = stream(), wide_sae()
    first, second = frequent(sae, residual, 2)
    together = remove_features(sae, GENES, [first, second])(residual)
    alone = [remove_features(sae, GENES, [feature])(residual) - residual for feature in (first, second)]
    torch.testing.assert_close(together, residual + alone[0] + alone[1], rtol=0, atol=1e-12)


def test_other_positions_stay() -> None:
    residual, sae = stream(), wide_sae()
    sae.W_enc.bias[4] = 50.0  # active everywhere
    removed = remove_features(sae, GENES, [4])(residual)
    assert torch.equal(removed[:, [0, 8]], residual[:, [0, 8]])
    assert (removed[:, GENES] != residual[:, GENES]).any(dim=-1).all()


def test_positions_where_the_feature_is_not_active_stay() -> None:
    residual, sae = stream(), wide_sae()
    [feature] = frequent(sae, residual, 1)
    is_active = sae.encode(residual)[0, :, feature] > 0
    removed = remove_features(sae, GENES, [feature])(residual)
    assert torch.equal(removed[0, ~is_active], residual[0, ~is_active])


def test_the_input_is_not_altered() -> None:
    residual, sae = stream(), wide_sae()
    before = residual.clone()
    remove_features(sae, GENES, frequent(sae, residual, 2))(residual)
    assert torch.equal(residual, before)


def test_batches_are_edited_one_by_one() -> None:
    residual, sae = stream(batch=3), wide_sae()
    edit = remove_features(sae, GENES, frequent(sae, residual, 2))
    for i in range(3):
        torch.testing.assert_close(edit(residual)[i], edit(residual[i : i + 1])[0], rtol=0, atol=1e-12)


def test_layers_compose_by_re_encoding() -> None:
    """A later layer is encoded as the earlier ablation left it."""
    model = random_model(2, n_layers=4).double()
    saes = {layer: random_sae(layer, 24, 20, 6).double() for layer in (0, 2)}
    tokens, genes = [2, 9, 30, 12, 41, 17, 3], torch.arange(1, 6)
    streams = reference.streams_of(model, tokens)
    latents = {layer: reference.dense_encode(sae, streams[layer])[0][genes] for layer, sae in saes.items()}
    features = {layer: int((of_layer > 0).sum(dim=0).argmax()) for layer, of_layer in latents.items()}
    expected = reference.streams_of(
        model, tokens, {layer: reference.scaling(saes[layer], genes.tolist(), [features[layer]]) for layer in saes}
    )
    with edited(model, {layer: remove_features(saes[layer], genes, [features[layer]]) for layer in saes}):
        found = residuals(model, torch.tensor([tokens]), [0, 1, 2, 3])
    for layer, of_layer in found.items():
        torch.testing.assert_close(of_layer[0], expected[layer], rtol=0, atol=1e-10)
    with edited(model, {2: remove_features(saes[2], genes, [features[2]])}):
        alone = residuals(model, torch.tensor([tokens]), [3])
    assert not torch.allclose(alone[3], found[3])
