"""The SAE against its plain equations; its files in both layouts, sound and damaged."""

import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import reference
from cellcircuits import sae_store
from cellcircuits.errors import UserError
from cellcircuits.sae_store import find_sae, open_sae, save_sae
from conftest import random_sae
from sae_model import TopKSAE

CANARY = "CANARY_OF_THE_TESTS"


class TestEquations:
    def test_encode(self) -> None:
        sae, x = random_sae(0, 12, 30, 4), torch.randn(2, 7, 12)
        latents = sae.encode(x)
        assert latents.shape == (2, 7, 30)
        for i in range(2):
            expected, _ = reference.dense_encode(sae, x[i])
            torch.testing.assert_close(latents[i], expected)

    def test_encode_by_hand(self) -> None:
        sae = TopKSAE(2, 3, 2).requires_grad_(False)
        sae.W_enc.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
        sae.W_enc.bias.copy_(torch.tensor([0.5, -3.0, 0.0]))
        sae.input_mean.copy_(torch.tensor([1.0, 1.0]))
        # centred (2, 1): pre-activations 2.5, -2, -3; the second is selected and made 0
        values, indices = sae.top_k(torch.tensor([3.0, 2.0]))
        assert (values.tolist(), indices.tolist()) == ([2.5, 0.0], [0, 1])
        assert sae.encode(torch.tensor([3.0, 2.0])).tolist() == [2.5, 0.0, 0.0]

    def test_decode_and_reconstruct(self) -> None:
        sae, x = random_sae(1, 12, 30, 4), torch.randn(5, 12)
        latents = sae.encode(x)
        torch.testing.assert_close(sae.decode(latents), reference.dense_decode(sae, latents))
        torch.testing.assert_close(sae.reconstruct(x), reference.dense_decode(sae, latents) + sae.input_mean)

    def test_decoder_directions_are_columns_of_the_decoder(self) -> None:
        sae = random_sae(2, 12, 30, 4)
        assert sae.decoder_directions.shape == (30, 12)
        one = torch.zeros(30)
        one[7] = 1.0
        torch.testing.assert_close(sae.decode(one) - sae.decode(torch.zeros(30)), sae.decoder_directions[7])

    @pytest.mark.parametrize("k", [1, 30])
    def test_extreme_k(self, k: int) -> None:
        sae, x = random_sae(3, 12, 30, k), torch.randn(5, 12)
        torch.testing.assert_close(sae.encode(x), reference.dense_encode(sae, x)[0])

    @pytest.mark.parametrize("k", [0, 31])
    def test_impossible_k(self, k: int) -> None:
        with pytest.raises(ValueError, match="k must be"):
            TopKSAE(12, 30, k)

    def test_the_mean_moves_with_the_sae_but_is_no_part_of_the_checkpoint(self) -> None:
        sae = random_sae(4, 12, 30, 4)
        assert set(sae.state_dict()) == {"W_enc.weight", "W_enc.bias", "W_dec.weight", "W_dec.bias"}
        assert sae.double().input_mean.dtype == torch.float64


def root_with(tmp_path: Path, *folders: str, seed: int = 0) -> Path:
    """A data root with one SAE of width 12 in each folder below sae_models/."""
    for folder in folders:
        save_sae(random_sae(seed, 12, 48, 4), tmp_path / "sae_models" / folder)
    return tmp_path


def same(one: TopKSAE, other: TopKSAE) -> bool:
    sizes = (one.d_model, one.n_features, one.k) == (other.d_model, other.n_features, other.k)
    tensors = [[*sae.state_dict().values(), sae.input_mean] for sae in (one, other)]
    return sizes and all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


class TestFolderLayout:
    def test_round_trip(self, tmp_path: Path) -> None:
        loaded = open_sae(find_sae(root_with(tmp_path, "layer05_x4_k4"), 5))
        assert same(loaded, random_sae(0, 12, 48, 4))
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())

    @pytest.mark.parametrize("name", ["layer05_x4_k32", "layer5_x4_k32", "layer05_x8_k64", "layer5_odd_name"])
    def test_names_in_use(self, tmp_path: Path, name: str) -> None:
        files = find_sae(root_with(tmp_path, name, "layer15_x4_k32", "layer50_x4_k32"), 5)
        folder = tmp_path / "sae_models" / name
        assert files.layer == 5
        assert files.checkpoint == folder / "sae_final.pt"
        assert files.mean == folder / "activation_mean.npy"
        assert files.catalog == folder / "feature_catalog.json"
        assert files.annotations == folder / "feature_annotations.json"

    def test_two_digit_layer(self, tmp_path: Path) -> None:
        root = root_with(tmp_path, "layer01_x4_k32", "layer11_x4_k32")
        assert find_sae(root, 11).checkpoint.parent.name == "layer11_x4_k32"
        assert find_sae(root, 1).checkpoint.parent.name == "layer01_x4_k32"

    @pytest.mark.parametrize("names", [("layer05_x4_k4", "layer05_x8_k4"), ("layer05_x4_k4", "layer5_x8_k4")])
    def test_two_folders_of_a_layer(self, tmp_path: Path, names: tuple[str, str]) -> None:
        root = root_with(tmp_path, *names)
        with pytest.raises(UserError, match="--sae-run") as error:
            find_sae(root, 5)
        assert all(name in str(error.value) for name in names)
        assert find_sae(root, 5, "x8_k4").checkpoint.parent.name == names[1]

    def test_a_folder_without_a_checkpoint_does_not_count(self, tmp_path: Path) -> None:
        root = root_with(tmp_path, "layer05_x4_k4")
        (root / "sae_models" / "layer05_x8_k4").mkdir()
        assert find_sae(root, 5).checkpoint.parent.name == "layer05_x4_k4"

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"sae_models.*SAE_DATA_ROOT"):
            find_sae(tmp_path, 5)
        root = root_with(tmp_path, "layer05_x4_k4")
        with pytest.raises(UserError, match="no SAE of layer 6") as error:
            find_sae(root, 6)
        assert "layer05_x4_k4" in str(error.value)
        with pytest.raises(UserError, match="no SAE of layer 5"):
            find_sae(root, 5, "x9_k9")


def flat_root(tmp_path: Path, number: str = "5", activations: str = "5") -> tuple[Path, np.ndarray]:
    """The layout of the released README; returns the root and the stored activations."""
    root, models = tmp_path, tmp_path / "sae_models"
    save_sae(random_sae(0, 12, 48, 4), models)
    (models / "activation_mean.npy").unlink()
    (models / "sae_final.pt").rename(models / f"sae_layer{number}.pt")
    (models / f"feature_catalog_layer{number}.json").write_text('{"features": []}')
    rows = (np.random.default_rng(0).normal(3.0, 1.0, (1000, 12))).astype(np.float32)
    np.save(root / f"layer_{activations}_activations.npy", rows)
    return root, rows


class TestFlatLayout:
    @pytest.mark.parametrize("number", ["5", "05"])
    @pytest.mark.parametrize("activations", ["5", "05"])
    def test_mean_comes_from_the_activations(
        self, tmp_path: Path, number: str, activations: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sae_store, "MEAN_CHUNK_ROWS", 64)
        root, rows = flat_root(tmp_path, number, activations)
        files = find_sae(root, 5)
        assert files.checkpoint == root / "sae_models" / f"sae_layer{number}.pt"
        assert files.catalog.name == f"feature_catalog_layer{number}.json"
        sae = open_sae(files)
        np.testing.assert_allclose(sae.input_mean.numpy(), rows.astype(np.float64).mean(axis=0), rtol=1e-6)
        assert torch.equal(sae.W_dec.weight, random_sae(0, 12, 48, 4).W_dec.weight)

    def test_mean_is_streamed_once_and_kept(self, tmp_path: Path) -> None:
        root, _ = flat_root(tmp_path)
        first = open_sae(find_sae(root, 5))
        (root / "layer_5_activations.npy").unlink()
        assert same(open_sae(find_sae(root, 5)), first)

    def test_half_precision_activations(self, tmp_path: Path) -> None:
        root, rows = flat_root(tmp_path)
        np.save(root / "layer_5_activations.npy", rows.astype(np.float16))
        expected = rows.astype(np.float16).astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(open_sae(find_sae(root, 5)).input_mean.numpy(), expected, rtol=1e-6)

    def test_a_folder_that_cannot_be_written_costs_the_cache_only(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        root, rows = flat_root(tmp_path)

        def refuse(path: Path, _write: Callable) -> None:
            raise UserError(f"{path}: cannot be written")

        monkeypatch.setattr(sae_store, "write_atomically", refuse)
        with caplog.at_level(logging.WARNING):
            sae = open_sae(find_sae(root, 5))
        np.testing.assert_allclose(sae.input_mean.numpy(), rows.astype(np.float64).mean(axis=0), rtol=1e-6)
        assert "not cached" in caplog.text

    def test_neither_mean_nor_activations(self, tmp_path: Path) -> None:
        root, _ = flat_root(tmp_path)
        (root / "layer_5_activations.npy").unlink()
        with pytest.raises(UserError, match=r"layer_5_activations\.npy"):
            open_sae(find_sae(root, 5))

    @pytest.mark.parametrize(("rows", "what"), [
        (np.zeros((9, 11), np.float32), "shape"), (np.zeros((0, 12), np.float32), "shape"),
        (np.full((9, 12), np.nan, np.float32), "NaN"), (np.zeros((9, 12), "S4"), "numbers"),
    ])  # fmt: skip
    def test_unusable_activations(self, tmp_path: Path, rows: np.ndarray, what: str) -> None:
        root, _ = flat_root(tmp_path)
        np.save(root / "layer_5_activations.npy", rows)
        with pytest.raises(UserError, match=what) as error:
            open_sae(find_sae(root, 5))
        assert "layer_5_activations.npy" in str(error.value)
        assert not list((root / "sae_models").glob("*mean*"))

    def test_a_folder_and_a_flat_file_must_be_chosen_between(self, tmp_path: Path) -> None:
        root, _ = flat_root(tmp_path)
        root_with(root, "layer05_x4_k4")
        with pytest.raises(UserError, match=r"layer05_x4_k4, sae_layer5\.pt.*--sae-run"):
            find_sae(root, 5)
        assert find_sae(root, 5, "x4_k4").checkpoint.name == "sae_final.pt"
        assert find_sae(root, 5, "flat").checkpoint.name == "sae_layer5.pt"


class Bomb:
    """Unpickled by an unsafe loader, it leaves a file behind."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.canary,))


def checkpoint(root: Path) -> Path:
    return root / "sae_models" / "layer05_x4_k4" / "sae_final.pt"


def rewrite(root: Path, change: Callable[[dict], object]) -> None:
    """Load the checkpoint, let `change` alter it, and store it, or what `change` returns instead."""
    content = torch.load(checkpoint(root), weights_only=True)
    torch.save(change(content) or content, checkpoint(root))


def refused(root: Path, what: str, name: str = "sae_final.pt") -> None:
    with pytest.raises(UserError, match=what) as error:
        open_sae(find_sae(root, 5))
    assert name in str(error.value)


class TestStrangersFiles:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return root_with(tmp_path, "layer05_x4_k4")

    def test_code_in_a_checkpoint_never_runs(self, root: Path, tmp_path: Path) -> None:
        canary = tmp_path / CANARY
        for content in (Bomb(canary), {"model_state_dict": Bomb(canary)}):
            torch.save(content, checkpoint(root))
            refused(root, "refused")
            assert not canary.exists()
            checkpoint(root).write_bytes(pickle.dumps(content, protocol=2))
            refused(root, "sae_final")
            assert not canary.exists()
        pickle.loads(pickle.dumps(Bomb(canary)))
        assert canary.exists(), "the bomb itself must work, or the test proves nothing"

    def test_code_in_a_mean_never_runs(self, root: Path, tmp_path: Path) -> None:
        canary = tmp_path / CANARY
        np.save(checkpoint(root).with_name("activation_mean.npy"), np.array([Bomb(canary)], dtype=object))
        refused(root, "npy", "activation_mean.npy")
        assert not canary.exists()

    @pytest.mark.parametrize("n_bytes", [0, 1, 10, 500, -100])
    def test_truncated(self, root: Path, n_bytes: int) -> None:
        checkpoint(root).write_bytes(checkpoint(root).read_bytes()[:n_bytes])
        refused(root, "checkpoint|damaged")

    def test_other_bytes(self, root: Path) -> None:
        checkpoint(root).write_bytes(b"\x80\x02not a checkpoint at all" * 50)
        refused(root, "checkpoint|damaged")
        checkpoint(root).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        refused(root, "checkpoint|damaged")

    def test_not_a_dict(self, root: Path) -> None:
        rewrite(root, lambda content: [content])
        refused(root, "expected a dict")

    @pytest.mark.parametrize("key", ["model_state_dict", "d_model", "n_features", "k"])
    def test_missing_key(self, root: Path, key: str) -> None:
        rewrite(root, lambda content: {name: value for name, value in content.items() if name != key})
        refused(root, key)

    @pytest.mark.parametrize("key", ["W_enc.weight", "W_enc.bias", "W_dec.weight", "W_dec.bias"])
    def test_weights(self, root: Path, key: str, tmp_path: Path) -> None:
        sound = checkpoint(root).read_bytes()
        changes = {
            "shape": lambda tensor: tensor.T[:-1].contiguous(),
            "NaN": lambda tensor: torch.where(tensor == tensor.flatten()[3], torch.nan, tensor),
            "infinite": lambda tensor: torch.full_like(tensor, torch.inf),
            "float tensor": lambda tensor: tensor.long(),
            "must be": lambda tensor: tensor.tolist(),
        }
        for what, change in changes.items():
            checkpoint(root).write_bytes(sound)
            if what == "shape":
                rewrite(root, lambda content: content["model_state_dict"].update({key: torch.zeros(3, 3)}))
            else:
                rewrite(root, lambda c, f=change: c["model_state_dict"].update({key: f(c["model_state_dict"][key])}))
            refused(root, what)
            refused(root, key.replace(".", r"\."))
        checkpoint(root).write_bytes(sound)
        rewrite(root, lambda content: content["model_state_dict"].pop(key).numel() * 0)
        refused(root, key.replace(".", r"\."))

    def test_transposed_decoder(self, root: Path) -> None:
        rewrite(root, lambda c: c["model_state_dict"].update({"W_dec.weight": c["model_state_dict"]["W_dec.weight"].T}))
        refused(root, r"W_dec\.weight")

    @pytest.mark.parametrize("sizes", [{"k": 0}, {"k": 49}, {"k": "4"}, {"k": 4.0}, {"d_model": -12}, {"k": True}])
    def test_impossible_sizes(self, root: Path, sizes: dict) -> None:
        rewrite(root, lambda content: content.update(sizes))
        refused(root, "sizes")

    def test_sizes_of_another_sae(self, root: Path) -> None:
        rewrite(root, lambda content: content.update(d_model=24))
        refused(root, "shape")

    def test_half_precision_weights_are_read_as_float32(self, root: Path) -> None:
        rewrite(root, lambda c: c.update(model_state_dict={n: t.half() for n, t in c["model_state_dict"].items()}))
        assert open_sae(find_sae(root, 5)).W_enc.weight.dtype == torch.float32

    @pytest.mark.parametrize(("mean", "what"), [
        (np.zeros(11, np.float32), "shape"), (np.zeros((1, 12), np.float32), "shape"),
        (np.full(12, np.nan), "NaN"), (np.full(12, "x"), "numbers"),
    ])  # fmt: skip
    def test_mean(self, root: Path, mean: np.ndarray, what: str) -> None:
        np.save(checkpoint(root).with_name("activation_mean.npy"), mean)
        refused(root, what, "activation_mean.npy")

    def test_mean_missing_or_damaged(self, root: Path) -> None:
        mean = checkpoint(root).with_name("activation_mean.npy")
        mean.write_bytes(mean.read_bytes()[:60])
        refused(root, "npy", "activation_mean.npy")
        mean.write_bytes(b"")
        refused(root, "npy", "activation_mean.npy")
        mean.unlink()
        refused(root, "no such file", "activation_mean.npy")

    def test_loading_does_not_change_the_files(self, root: Path) -> None:
        before = {path: path.read_bytes() for path in checkpoint(root).parent.iterdir()}
        open_sae(find_sae(root, 5))
        assert {path: path.read_bytes() for path in checkpoint(root).parent.iterdir()} == before


class TestFingerprint:
    def test_follows_each_file(self, tmp_path: Path) -> None:
        files = find_sae(root_with(tmp_path, "layer05_x4_k4"), 5)
        before = sae_store.fingerprint(files)
        assert set(before) == {"checkpoint", "mean"}
        np.save(files.mean, np.ones(12, np.float32))
        files.catalog.write_text("{}")
        after = sae_store.fingerprint(files)
        assert after["checkpoint"] == before["checkpoint"]
        assert after["mean"] != before["mean"]
        assert set(after) == set(before)  # a catalog names features, it does not change numbers

    def test_does_not_depend_on_the_place(self, tmp_path: Path) -> None:
        root = root_with(tmp_path / "one", "layer05_x4_k4")
        shutil.copytree(root, tmp_path / "two")
        prints = [sae_store.fingerprint(find_sae(tmp_path / name, 5)) for name in ("one", "two")]
        assert prints[0] == prints[1]
