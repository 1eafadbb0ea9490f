"""Reading tensors that come from strangers: nothing of theirs is ever run."""

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cellcircuits.errors import UserError

_PLAIN = (str, int, float, bool, type(None), torch.Tensor)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a `torch.save` dict that holds tensors and plain values only, on the CPU.

    Raises:
        UserError: no such file, damaged, not a dict, or it carries anything else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: refused, it is damaged or holds objects other than tensors and plain values, which could "
            "run code; save it again as a dict of tensors and numbers."
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a readable PyTorch checkpoint ({reason}); copy it again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a dict with `model_state_dict`.")
    _require_plain(path, content)
    return content


def _require_plain(path: Path, content: Any) -> None:
    if isinstance(content, dict):
        for key, value in content.items():
            _require_plain(path, key)
            _require_plain(path, value)
    elif isinstance(content, list | tuple):
        for value in content:
            _require_plain(path, value)
    elif not isinstance(content, _PLAIN):
        raise UserError(f"{path}: refused, it carries a {type(content).__name__}; only tensors and plain values may.")


def load_vector(path: Path, length: int) -> np.ndarray:
    """Load one finite float32 vector of `length` values from an `.npy` file.

    Raises:
        UserError: no such file, not an array, of another shape, or not finite.
    """
    array = open_array(path)
    if array.shape != (length,):
        raise UserError(f"{path}: has shape {array.shape}, expected ({length},), the width of the SAE beside it.")
    with np.errstate(over="ignore"):  # what overflows is refused as infinite below
        vector = np.array(array, dtype=np.float32)
    if not np.isfinite(vector).all():
        raise UserError(f"{path}: holds NaN or infinite values; make it again.")
    return vector


def open_array(path: Path) -> np.ndarray:
    """Memory-map an `.npy` file of numbers.

    Raises:
        UserError: no such file, or not an array of numbers.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: not a readable .npy array ({error}).") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise UserError(f"{path}: does not hold an array of numbers.")
    return array


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
