"""Messages between a run and the process that reads its .h5ad file: a JSON header, then plain arrays.

Nothing is unpickled, and the receiver knows every size before it takes memory.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np

MAX_HEADER_BYTES = 1 << 26
_PREFIX = struct.Struct(">Q")
_KINDS = "biuf"


def send(stream: IO[bytes], fields: Mapping[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
    """Write one message: fields that JSON can hold, and one-dimensional arrays of numbers."""
    listed = [(array.dtype.str, len(array)) for array in arrays]
    header = json.dumps({"fields": fields, "arrays": listed}).encode("ascii")
    stream.write(_PREFIX.pack(len(header)) + header)
    for array in arrays:
        stream.write(np.ascontiguousarray(array).data)
    stream.flush()


def receive(stream: IO[bytes], max_bytes: int) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Read one message.

    Args:
        stream: where `send` wrote it.
        max_bytes: most bytes that its arrays may have together.

    Raises:
        EOFError: the sender ended before or within the message.
        ValueError: no message of this form, or a larger one.
    """
    (n_header,) = _PREFIX.unpack(_exactly(stream, _PREFIX.size))
    if n_header > MAX_HEADER_BYTES:
        raise ValueError("a message with too long a header")
    fields, dtypes, sizes = _parsed(_exactly(stream, n_header))
    if any(dtype.kind not in _KINDS for dtype in dtypes) or min(sizes, default=0) < 0 or sum(sizes) > max_bytes:
        raise ValueError("a message with too large an array, or one that holds no numbers")
    return fields, [np.frombuffer(_exactly(stream, size), dtype) for dtype, size in zip(dtypes, sizes, strict=True)]


def _parsed(header: bytearray) -> tuple[dict[str, Any], list[np.dtype], list[int]]:
    """The fields of a header; type and bytes of each array."""
    try:
        content = json.loads(header)
        dtypes = [np.dtype(name) for name, _ in content["arrays"]]
        return (
            dict(content["fields"]),
            dtypes,
            [dtype.itemsize * int(n) for dtype, (_, n) in zip(dtypes, content["arrays"], strict=True)],
        )
    except (KeyError, TypeError, AttributeError, RecursionError, OverflowError, SyntaxError) as error:
        raise ValueError(f"a message of another form ({type(error).__name__})") from None


def text_array(values: Sequence[str]) -> np.ndarray:
    """Texts as an array of bytes, which `texts_of` undoes."""
    return np.frombuffer(json.dumps(list(values)).encode("ascii"), np.uint8)


def texts_of(array: np.ndarray) -> list[str]:
    """The texts of a `text_array`."""
    return json.loads(array.tobytes())


def _exactly(stream: IO[bytes], n_bytes: int) -> bytearray:
    content = bytearray(n_bytes)
    if stream.readinto(content) != n_bytes:  # type: ignore[attr-defined]  # a buffered stream fills it or has ended
        raise EOFError
    return content
