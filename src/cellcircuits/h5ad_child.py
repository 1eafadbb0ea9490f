"""The process that reads an .h5ad file, so that a crash of the HDF5 library costs a run one error.

It gets its limits of memory and computing time from `h5ad`, answers the requests that come on its standard input, and
ends when that closes.
"""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from cellcircuits.errors import UserError
from cellcircuits.h5ad_content import Block, StoredCells
from cellcircuits.h5ad_frames import receive, send


def main() -> None:
    """Answer requests about a file until nobody asks any more; arguments: the file, bytes of memory, seconds."""
    path, room, seconds = Path(sys.argv[-3]), int(sys.argv[-2]), int(sys.argv[-1])
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the messages
    limit(room, seconds)
    with suppress(EOFError, BrokenPipeError):
        serve(path, room, sys.stdin.buffer, replies)


def limit(room: int, seconds: int) -> None:
    """Limit what this process may take from now on; a system without such a limit is left as it is.

    Args:
        room: bytes of memory.
        seconds: of computing.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_CPU: int(used.ru_utime + used.ru_stime) + seconds}
    with suppress(OSError):  # /proc is Linux's, and only Linux keeps to this limit
        n_pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limits[resource.RLIMIT_AS] = n_pages * resource.getpagesize() + room
    for kind, value in limits.items():
        with suppress(OSError, ValueError):
            hard = resource.getrlimit(kind)[1]
            resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def serve(path: Path, room: int, requests: IO[bytes], replies: IO[bytes]) -> None:
    """Open the file, then answer requests.

    Args:
        path: the file.
        room: most bytes of memory that an array may take.
        requests: `{"ask": "table", "key"}`, `{"ask": "blocks", "matrix", "shape", "block_bytes"}` with an array of
            rows, or `{"ask": "next"}` for the next block.
        replies: gets a message for each, `{"error"}` where the file is at fault.

    Raises:
        EOFError: nobody asks any more.
    """
    try:
        stored = StoredCells(path, room)
    except UserError as error:
        send(replies, {"error": str(error)})
        return
    send(replies, {"matrices": stored.matrices})
    blocks: Iterator[Block] = iter(())
    while True:
        request, arrays = receive(requests, room)
        try:
            if request["ask"] == "table":
                table = stored.table(request["key"])
                send(replies, table.fields, table.arrays)
                continue
            if request["ask"] == "blocks":
                blocks = stored.blocks(request["matrix"], arrays[0], tuple(request["shape"]), request["block_bytes"])
            send(replies, *_message(next(blocks, None)))
        except UserError as error:
            send(replies, {"error": str(error)})


def _message(block: Block | None) -> tuple[dict[str, Any], list[np.ndarray]]:
    if block is None:
        return {"end": True}, []
    return {"n_rows": block.n_rows}, [block.values, block.rows, block.columns]
