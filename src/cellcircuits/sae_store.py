"""Find and load the SAEs of a data root, in both layouts in use, and write the first.

- `sae_models/layer05_x4_k32/sae_final.pt` with `activation_mean.npy`, `feature_catalog.json` and
  `feature_annotations.json` beside it: the one we write;
- `sae_models/sae_layer5.pt` (or `sae_layer05.pt`) with `feature_catalog_layer5.json` beside it; its mean is
  taken once from `layer_5_activations.npy` in the data root and cached.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cellcircuits.errors import UserError
from cellcircuits.jsonio import write_atomically
from cellcircuits.loading import file_sha256, load_checkpoint, load_vector, open_array
from cellcircuits.pickle_check import shown
from sae_model import STATE_KEYS, TopKSAE

log = logging.getLogger(__name__)
MEAN_CHUNK_ROWS = 65_536
FLAT = "flat"
_LAYER = re.compile(r"layer(\d+)")


class MissingSAEError(UserError):
    """The data root has no SAE of a layer."""


@dataclass(frozen=True)
class SAEFiles:
    """Where the parts of one layer's SAE lie; `catalog` and `annotations` may not exist."""

    layer: int
    checkpoint: Path
    mean: Path
    catalog: Path
    annotations: Path
    activations: tuple[Path, ...] = ()


def run_folder(data_root: Path, layer: int, expansion: int, k: int) -> Path:
    """Folder of one SAE in the layout that we write."""
    return data_root / "sae_models" / f"layer{layer:02d}_x{expansion}_k{k}"


def find_sae(data_root: Path, layer: int, run_name: str | None = None) -> SAEFiles:
    """Locate the SAE of `layer`.

    Args:
        data_root: the folder that holds `sae_models/`.
        layer: block index.
        run_name: `x4_k32` to choose among several folders of the layer, `flat` for the flat file.

    Raises:
        MissingSAEError: there is none.
        UserError: there are several and no `run_name`.
    """
    root = data_root / "sae_models"
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; --data-root (SAE_DATA_ROOT) must hold sae_models/.")
    numbers = dict.fromkeys((f"{layer:02d}", str(layer)))
    folders = [f for n in numbers for f in sorted(root.glob(f"layer{n}_{run_name or '*'}")) if f.is_dir()]
    folders = [folder for folder in folders if (folder / "sae_final.pt").is_file()]
    flat = [number for number in numbers if (root / f"sae_layer{number}.pt").is_file() and run_name in (None, FLAT)]
    names = [folder.name for folder in folders] + [f"sae_layer{number}.pt" for number in flat]
    if len(names) > 1:
        raise UserError(
            f"{root}: several SAEs of layer {layer} ({', '.join(names)}); choose one with --sae-run: the end of a "
            f"folder's name, e.g. x4_k32, or `{FLAT}` for the file."
        )
    if folders:
        folder = folders[0]
        return SAEFiles(
            layer,
            folder / "sae_final.pt",
            folder / "activation_mean.npy",
            folder / "feature_catalog.json",
            folder / "feature_annotations.json",
        )
    if flat:
        return _flat_files(data_root, layer, flat[0])
    raise MissingSAEError(
        f"{root}: no SAE of layer {layer}{f' named {run_name} (--sae-run)' if run_name else ''}, neither "
        f"layer{layer:02d}_x*_k*/sae_final.pt nor sae_layer{layer}.pt (found: {_found(root)})."
    )


def _found(root: Path) -> str:
    return ", ".join(sorted(path.name for path in root.iterdir() if "layer" in path.name)) or "nothing"


def layers_there(data_root: Path) -> list[int]:
    """Layers of which the data root holds an SAE, ascending."""
    names = [path.parent.name for path in data_root.glob("sae_models/layer*_*/sae_final.pt")]
    names += [path.stem for path in data_root.glob("sae_models/sae_layer*.pt")]
    return sorted({int(match[1]) for match in map(_LAYER.search, names) if match})


def _flat_files(data_root: Path, layer: int, number: str) -> SAEFiles:
    root = data_root / "sae_models"
    numbers = dict.fromkeys((number, str(layer), f"{layer:02d}"))

    def beside(stem: str, suffix: str) -> Path:
        paths = [root / f"{stem}_layer{n}{suffix}" for n in numbers]
        return next((path for path in paths if path.is_file()), paths[0])

    return SAEFiles(
        layer,
        root / f"sae_layer{number}.pt",
        beside("activation_mean", ".npy"),
        beside("feature_catalog", ".json"),
        beside("feature_annotations", ".json"),
        tuple(data_root / f"layer_{n}_activations.npy" for n in numbers),
    )


def open_sae(files: SAEFiles) -> TopKSAE:
    """Load one SAE with its mean, unaltered, on the CPU.

    Raises:
        UserError: a part is missing, damaged, of the wrong shape or not finite.
    """
    content = load_checkpoint(files.checkpoint)
    state, sizes = _checked_state(files.checkpoint, content)
    sae = TopKSAE(*sizes)
    sae.load_state_dict(state)
    sae.input_mean.copy_(torch.from_numpy(_mean(files, sae.d_model)))
    return sae.eval().requires_grad_(False)


def fingerprint(files: SAEFiles) -> dict[str, str]:
    """SHA-256 of the files of the SAE that determine numbers."""
    return {"checkpoint": file_sha256(files.checkpoint), "mean": file_sha256(files.mean)}


def save_sae(sae: TopKSAE, folder: Path) -> None:
    """Write `sae_final.pt` and `activation_mean.npy` into `folder`."""
    state = {key: value.detach().cpu() for key, value in sae.state_dict().items()}
    content = {"model_state_dict": state, "d_model": sae.d_model, "n_features": sae.n_features, "k": sae.k}
    write_atomically(folder / "activation_mean.npy", lambda f: np.save(f, sae.input_mean.cpu().numpy()))
    write_atomically(folder / "sae_final.pt", lambda stream: torch.save(content, stream))


def _checked_state(path: Path, content: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], tuple[int, int, int]]:
    missing = [key for key in ("model_state_dict", "d_model", "n_features", "k") if key not in content]
    if missing:
        raise UserError(f"{path}: lacks `{missing[0]}`; a checkpoint holds model_state_dict, d_model, n_features, k.")
    state = content["model_state_dict"]
    if not isinstance(state, dict) or set(state) != set(STATE_KEYS):
        raise UserError(f"{path}: model_state_dict must hold exactly {', '.join(STATE_KEYS)}.")
    sizes = (content["d_model"], content["n_features"], content["k"])
    if not all(type(size) is int and size > 0 for size in sizes) or sizes[2] > sizes[1]:
        named = ", ".join(map(shown, sizes))
        raise UserError(f"{path}: d_model, n_features, k = {named} are not possible sizes.")
    d_model, n_features, _ = sizes
    shapes = ((n_features, d_model), (n_features,), (d_model, n_features), (d_model,))
    for key, shape in zip(STATE_KEYS, shapes, strict=True):
        tensor = state[key]
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or not tensor.is_floating_point() or tuple(tensor.shape) != shape:
            raise UserError(f"{path}: {key} must be a plain float tensor of shape {shape}.")
        if not torch.isfinite(tensor.float()).all():
            raise UserError(f"{path}: {key} holds NaN or infinite values; train the SAE again.")
    return {key: tensor.float() for key, tensor in state.items()}, sizes


def _mean(files: SAEFiles, d_model: int) -> np.ndarray:
    if files.mean.is_file() or not files.activations:
        return load_vector(files.mean, d_model)
    source = next((path for path in files.activations if path.is_file()), None)
    if source is None:
        raise UserError(
            f"{files.mean}: no such file, and no {files.activations[0].name} in {files.activations[0].parent} to take "
            "the mean from; put one of them there."
        )
    mean = _streamed_mean(source, d_model)
    try:
        write_atomically(files.mean, lambda stream: np.save(stream, mean))
    except UserError as error:
        log.warning("The mean of %s is not cached: %s", source.name, error)
    return mean


def _streamed_mean(path: Path, d_model: int) -> np.ndarray:
    rows = open_array(path)
    if rows.ndim != 2 or rows.shape[1] != d_model or not len(rows):
        raise UserError(f"{path}: has shape {rows.shape}, expected (positions, {d_model}), the SAE's width.")
    total = np.zeros(d_model)
    for start in range(0, len(rows), MEAN_CHUNK_ROWS):
        total += rows[start : start + MEAN_CHUNK_ROWS].sum(axis=0, dtype=np.float64)
    mean = (total / len(rows)).astype(np.float32)
    if not np.isfinite(mean).all():
        raise UserError(f"{path}: holds NaN or infinite activations; extract them again.")
    return mean
