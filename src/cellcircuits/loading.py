"""Reading tensors that come from strangers: nothing of theirs is ever run."""

import hashlib
import os
import re
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from cellcircuits.errors import UserError
from cellcircuits.files import require_plain_file
from cellcircuits.pickle_check import CHECKPOINT, require_harmless

MAX_PICKLE_BYTES = 1 << 22
MAX_LIST_BYTES = 1 << 22  # of the names of the parts of an archive: fifty thousand tensors
_ZIP = b"PK\x03\x04"
# the end of a zip archive: signature, bytes and start of its list of parts, bytes of a comment
_END = struct.Struct("<4s8xIIH")
_LARGE_END = struct.Struct("<4sQ28xQQ4s4xQ4x")  # of a large one: its own size too, and then where it starts
_LOCATOR, _LOCATOR_BYTES = b"PK\6\7", 20
_COPY = "copy it again, or save it again with torch.save"
_TENSOR_GLOBALS = re.compile(
    r"torch\._utils _rebuild_(tensor_v2|parameter)|collections OrderedDict|torch Size"
    r"|torch (Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"
    r"|torch (b?float|u?int)\d+|torch bool"
)
_PLAIN = (str, int, float, bool, type(None), torch.Tensor)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a `torch.save` dict that holds tensors and plain values only, on the CPU.

    Raises:
        UserError: no such file, damaged, not a dict, or it carries anything else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    require_sound_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make torch raise almost anything
        raise UserError(f"{path}: not a readable PyTorch checkpoint ({_first_line(error)}); copy it again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a dict with `model_state_dict`.")
    _require_plain(path, content)
    return content


def require_sound_archive(path: Path) -> None:
    """Check what a file of `torch.save` claims before torch reads it.

    Its storages must lie in it uncompressed, so that they take the memory that the file has; its pickle may ask for
    tensors and plain values only, and must stand for about as much as it writes down.

    Raises:
        UserError: damaged, refused, or written before PyTorch 1.6.
    """
    try:
        require_plain_file(path)
        with path.open("rb") as stream:
            if stream.read(len(_ZIP)) != _ZIP:
                raise UserError(
                    f"{path}: not a readable PyTorch checkpoint; copy it, or save it with PyTorch 1.6 or newer."
                )
            if not _ends_with_its_directory(stream):
                raise UserError(
                    f"{path}: not a readable PyTorch checkpoint (it does not end with a list of its parts); {_COPY}."
                )
            with zipfile.ZipFile(stream) as archive:
                pickled = _pickle_of(path, archive)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    except Exception as error:  # damaged bytes make zipfile raise almost anything
        raise UserError(f"{path}: not a readable PyTorch checkpoint ({_first_line(error)}); copy it again.") from None
    names = require_harmless(pickled, str(path), CHECKPOINT)
    foreign = sorted(name for name in names if not _TENSOR_GLOBALS.fullmatch(name))
    if foreign:
        raise UserError(
            f"{path}: refused, it is damaged or holds objects other than tensors and plain values, which could "
            f"run code ({foreign[0]:.80}); save it again as a dict of tensors and numbers."
        )


def _ends_with_its_directory(stream: IO[bytes]) -> bool:
    """Whether an archive's list of parts is of an admitted size and where all readers look for it.

    Some readers take a list from elsewhere, and so another one than was checked.
    """
    size = stream.seek(0, os.SEEK_END)
    if size < _END.size:
        return False
    stream.seek(end := size - _END.size)
    sign, n_bytes, start, n_comment = _END.unpack(stream.read())
    stream.seek(large := max(end - _LARGE_END.size, 0))
    tail = stream.read(end - large)
    if len(tail) == _LARGE_END.size and tail[-_LOCATOR_BYTES:].startswith(_LOCATOR):  # as torch.save writes it
        large_sign, n_record, n_bytes, start, _, record_at = _LARGE_END.unpack(tail)
        if (large_sign, n_record, record_at) != (b"PK\6\6", _LARGE_END.size - _LOCATOR_BYTES - 12, large):
            return False
        end = large
    return sign == b"PK\5\6" and n_comment == 0 and start + n_bytes == end and n_bytes <= MAX_LIST_BYTES


def _pickle_of(path: Path, archive: zipfile.ZipFile) -> bytes:
    entries = archive.infolist()
    names = [entry.filename.lower() for entry in entries]  # torch takes a part by its name in any case
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or sum(entry.file_size for entry in entries) > path.stat().st_size or len(set(names)) < len(names):
        raise UserError(f"{path}: refused, its parts are packed or lie over each other; save it again with torch.save.")
    pickles = [entry for entry, name in zip(entries, names, strict=True) if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
        raise UserError(f"{path}: not a readable PyTorch checkpoint (no data.pkl, or too large a one); copy it again.")
    return archive.read(pickles[0])


def _require_plain(path: Path, content: Any) -> None:
    """Refuse anything but containers, plain values and tensors whose values are all there."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            waiting += value
        elif not isinstance(value, _PLAIN):
            raise UserError(f"{path}: refused, it carries a {type(value).__name__}; only tensors and plain values may.")
        elif isinstance(value, torch.Tensor):
            _require_stored(path, value)


def _require_stored(path: Path, tensor: torch.Tensor) -> None:
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise UserError(f"{path}: refused, it carries a tensor that is not a plain one.")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        # strides of 0 let one number stand for any number of them
        raise UserError(f"{path}: refused, a tensor of shape {tuple(tensor.shape)} has fewer values than that.")


def _first_line(error: Exception) -> str:
    return f"{(str(error).splitlines() or [type(error).__name__])[0]:.200}"


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
        require_plain_file(path)
        array = np.lib.format.open_memmap(path, mode="r")  # np.load would also take archives and pickles
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except UserError:
        raise
    except Exception as error:  # a damaged header makes NumPy's parser raise almost anything
        raise UserError(f"{path}: not a readable .npy array ({_first_line(error)}).") from None
    if array.nbytes > path.stat().st_size:
        raise UserError(f"{path}: not a readable .npy array (it claims more values than it holds).")
    if array.dtype.kind not in "fiu":
        raise UserError(f"{path}: does not hold an array of numbers.")
    return array


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        require_plain_file(path)
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
