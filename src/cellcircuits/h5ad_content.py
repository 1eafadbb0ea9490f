"""What an .h5ad file holds, read with h5py: tables whole, matrices only at the wanted rows.

Runs in the process of `h5ad_child`, and trusts the file in nothing: content that lies in another file is never
opened, no HDF5 plug-in is used, and what a dataset claims to hold is held against what is stored before it is read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cellcircuits.errors import UserError
from cellcircuits.h5ad_frames import text_array

BYTES_PER_VALUE = 16  # of a sparse matrix while it is read: a float64 and an index
# deflate's best is 1032 to 1; chunks that were never written take no place at all, so a small file can claim anything
MAX_UNPACKED_PER_STORED = 1100
FREE_BYTES = 1 << 24
# deflate, shuffle, checksum, szip, n-bit and scale-offset come with HDF5, lzf (32000) with h5py
_KNOWN_FILTERS = (1, 2, 3, 4, 5, 6, 32000)
_MASKED = {"nullable-integer", "nullable-boolean", "nullable-string-array"}


@dataclass
class Table:
    """A table on its way to the run: `fields` describe its columns and say which of `arrays` they are in."""

    fields: dict[str, Any] = field(default_factory=dict)
    arrays: list[np.ndarray] = field(default_factory=list)

    def add(self, array: np.ndarray) -> int:
        """Number of a new array."""
        self.arrays.append(array)
        return len(self.arrays) - 1


@dataclass(frozen=True)
class Block:
    """Some rows of a matrix: value, row within the block and column of every stored entry; all (n_entries,)."""

    n_rows: int
    values: np.ndarray
    rows: np.ndarray
    columns: np.ndarray


class StoredCells:
    """One open .h5ad file."""

    def __init__(self, path: Path, room: int) -> None:
        """Open the file and check that it holds cells and nothing from elsewhere.

        Args:
            path: the file.
            room: most bytes that one array may take.

        Raises:
            UserError: no HDF5, no cells, or content that lies in another file.
        """
        self.path, self._room = path, room
        try:
            self._file = h5py.File(path, "r")
        except OSError as error:
            raise UserError(
                f"{path}: is not a readable HDF5 file ({error}); give an .h5ad file, and fetch it "
                "again if it is truncated."
            ) from None
        with _reading(path, "the list of contents"):
            outside = _links_outside(self._file)
            if outside:
                raise UserError(
                    f"{path}: {outside} points to another file, which is never followed; write the data "
                    "into the file itself."
                )
            for part in ("obs", "var"):
                if part not in self._file:
                    raise UserError(f"{path}: has no {part}; it is not an AnnData (.h5ad) file.")
            self.matrices = self._find_matrices()
        if not self.matrices:
            raise UserError(f"{path}: has no X, raw or layers, so there are no counts to read.")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _find_matrices(self) -> tuple[str, ...]:
        layers = self._file["layers"] if isinstance(self._file.get("layers"), h5py.Group) else {}
        by_name = sorted(layers, key=lambda name: "count" not in name.lower())
        names = ["X", "raw", *(f"layer:{name}" for name in by_name)]
        return tuple(name for name in names if _is_matrix(self._file.get(_key(name))))

    def table(self, key: str) -> Table:
        """Read `obs`, `var` or `raw/var`.

        Raises:
            UserError: damaged, or no table.
        """
        with _reading(self.path, key):
            group = self._file[key]
            if not isinstance(group, h5py.Group) or _text(group.attrs.get("encoding-type", "")) != "dataframe":
                raise UserError(f"{self.path}: {key} is not a table; the file is damaged or not an AnnData file.")
            table = Table()
            names = [_text(name) for name in group.attrs["column-order"]]
            if len(set(names)) != len(names):
                raise ValueError("two columns have one name")
            index = _text(group.attrs["_index"])
            table.fields = {
                "index": self._column(group[index], table),
                "index_name": None if index == "_index" else index,
                "columns": [[name, self._column(group[name], table)] for name in names],
            }
        return table

    def _column(self, item: Any, table: Table) -> dict[str, Any]:
        """Add a column to the table; categories are stored in three ways, two of them by older AnnData."""
        kind = _text(item.attrs.get("encoding-type", ""))
        if isinstance(item, h5py.Group) and kind == "categorical":
            return self._categorical(item["codes"], item["categories"], item.attrs.get("ordered", False), table)
        if isinstance(item, h5py.Dataset) and "categories" in item.attrs:
            # a reference may lead into a group that no link names, where links to other files would not be seen
            categories = self._inside(item.parent[item.attrs["categories"]])
            return self._categorical(item, categories, categories.attrs.get("ordered", False), table)
        return self._plain_column(item, kind, table)

    def _categorical(self, codes: Any, categories: Any, ordered: Any, table: Table) -> dict[str, Any]:
        return {
            "kind": "categorical",
            "codes": table.add(self._numbers(codes)),
            "categories": self._plain_column(categories, _text(categories.attrs.get("encoding-type", "")), table),
            "ordered": bool(ordered),
        }

    def _plain_column(self, item: Any, kind: str, table: Table) -> dict[str, Any]:
        if isinstance(item, h5py.Group) and kind in _MASKED:
            values = self._plain_column(item["values"], "", table)
            return {**values, "missing": table.add(self._numbers(item["mask"]).astype(bool))}
        stored = self._whole(item)
        if h5py.check_string_dtype(stored.dtype) is None:
            return {"kind": "numbers", "array": table.add(self._numbers(item))}
        return {"kind": "text", "array": table.add(text_array(stored.asstr()[()]))}

    def _numbers(self, item: Any) -> np.ndarray:
        """A one-dimensional dataset of numbers, in the machine's byte order."""
        stored = self._whole(item)
        if stored.dtype.kind not in "biuf":
            raise ValueError(f"{stored.name} holds neither numbers nor text (type {stored.dtype})")
        values = stored[()]
        return values.astype(_native(stored.dtype), copy=False)

    def _whole(self, item: Any) -> h5py.Dataset:
        """The item, if it is a list of values that may be read as a whole."""
        stored = self._inside(item)
        if len(stored.shape or ()) != 1:
            raise ValueError(f"{stored.name} is no list of values (shape {stored.shape})")
        self._require_stored(stored)
        self._require_room(stored.size * max(stored.dtype.itemsize, 1), stored.name)
        return stored

    def _inside(self, item: Any) -> h5py.Dataset:
        """The item, if it is a dataset whose values lie in this file and need no plug-in."""
        if not isinstance(item, h5py.Dataset):
            raise ValueError(f"{getattr(item, 'name', item)!s:.80} is no dataset")
        if item.external or item.is_virtual:  # a reference leads to objects that no link names
            raise ValueError(f"{item.name} points to another file, which is never followed")
        filters = item.id.get_create_plist()
        for number in range(filters.get_nfilters()):
            code, *_, name = filters.get_filter(number)
            if code not in _KNOWN_FILTERS:
                raise ValueError(
                    f"{item.name} is compressed by a plug-in (HDF5 filter {code}, {_text(name)!r:.40}), which is never "
                    "loaded: write it with gzip"
                )
        return item

    def _require_stored(self, stored: h5py.Dataset) -> None:
        claimed, kept = stored.size * stored.dtype.itemsize, stored.id.get_storage_size()
        if claimed > FREE_BYTES + MAX_UNPACKED_PER_STORED * kept:
            raise ValueError(f"{stored.name} claims {stored.size} values, but holds {kept} bytes")

    def _require_room(self, n_bytes: int, name: str) -> None:
        if n_bytes > self._room:
            raise ValueError(f"{name} needs {n_bytes / 2**30:.1f} GiB of memory, too much for a file of this size")

    def blocks(self, matrix: str, rows: np.ndarray, shape: tuple[int, int], block_bytes: int) -> Iterator[Block]:
        """Read the wanted rows of one matrix, block after block.

        Args:
            matrix: one of `matrices`.
            rows: (n_cells,) ascending row numbers.
            shape: rows and columns the matrix must have, those of its tables.
            block_bytes: memory of one block.

        Raises:
            UserError: damaged, not numeric, or its shape does not belong to the tables.
        """
        with _reading(self.path, matrix):
            stored = self._file[_key(matrix)]
            dense = isinstance(stored, h5py.Dataset)
            found_shape = tuple(int(n) for n in (stored.shape if dense else _sparse_shape(stored)))
            dtype = self._inside(stored if dense else stored["data"]).dtype
        if found_shape != tuple(shape):
            raise UserError(
                f"{self.path}: {matrix} has shape {found_shape}, but its tables describe "
                f"{shape[0]} cells and {shape[1]} genes; the file is damaged."
            )
        if dtype.kind not in "biuf":
            raise UserError(f"{self.path}: {matrix} holds no numbers (type {dtype}).")
        with _reading(self.path, matrix):
            if dense:
                yield from self._dense_blocks(stored, rows, block_bytes)
            elif _sparse_kind(stored) == "csr":
                yield from self._csr_blocks(stored, rows, found_shape, block_bytes)
            else:
                yield self._csc_block(stored, rows, found_shape, block_bytes)

    def _dense_blocks(self, stored: h5py.Dataset, rows: np.ndarray, block_bytes: int) -> Iterator[Block]:
        row_bytes = max(1, stored.shape[1] * 8)
        self._require_room(row_bytes, stored.name)
        n_rows = max(1, block_bytes // row_bytes)
        for first in range(0, len(rows), n_rows):
            values = stored[rows[first : first + n_rows]].astype(np.float64)
            places = np.nonzero(values)
            yield Block(len(values), values[places], *places)

    def _csr_blocks(
        self, stored: h5py.Group, rows: np.ndarray, shape: tuple[int, int], block_bytes: int
    ) -> Iterator[Block]:
        values, indices, starts = self._sparse_parts(stored, shape[0], shape[1])
        n_stored = np.diff(starts)
        largest = max(1, int(n_stored[rows].max(initial=0)))
        self._require_room(largest * BYTES_PER_VALUE, values.name)
        n_rows = max(1, block_bytes // (largest * BYTES_PER_VALUE))
        for first in range(0, len(rows), n_rows):
            part = rows[first : first + n_rows]
            runs = np.split(part, np.flatnonzero(np.diff(part) != 1) + 1)  # neighbouring rows are read at once
            spans = [slice(int(starts[run[0]]), int(starts[run[-1] + 1])) for run in runs]
            columns = np.concatenate([indices[span] for span in spans])
            _check_indices(columns, shape[1])
            yield Block(
                len(part),
                np.concatenate([values[span] for span in spans]).astype(np.float64),
                np.repeat(np.arange(len(part)), n_stored[part]),
                columns,
            )

    def _csc_block(self, stored: h5py.Group, rows: np.ndarray, shape: tuple[int, int], block_bytes: int) -> Block:
        """Rows of a matrix stored by column: columns are read in groups, and the wanted rows kept of each."""
        values, indices, starts = self._sparse_parts(stored, shape[1], shape[0])
        place = np.full(shape[0], -1, dtype=np.int64)  # of a row of the file in the block, -1 for one not wanted
        place[rows] = np.arange(len(rows))
        kept: list[tuple[np.ndarray, ...]] = [(np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64))]
        first = 0
        while first < shape[1]:
            budget = starts[first] + block_bytes // BYTES_PER_VALUE
            last = max(first + 1, int(np.searchsorted(starts, budget, side="right")) - 1)
            span = slice(int(starts[first]), int(starts[last]))
            self._require_room((span.stop - span.start) * BYTES_PER_VALUE, values.name)
            rows_there = indices[span]
            _check_indices(rows_there, shape[0])
            wanted = place[rows_there] >= 0
            columns = np.repeat(np.arange(first, last), np.diff(starts[first : last + 1]))
            kept.append((values[span][wanted].astype(np.float64), place[rows_there[wanted]], columns[wanted]))
            first = last
        return Block(len(rows), *(np.concatenate(part) for part in zip(*kept, strict=True)))

    def _sparse_parts(
        self, stored: h5py.Group, n_major: int, n_minor: int
    ) -> tuple[h5py.Dataset, h5py.Dataset, np.ndarray]:
        """Values, indices and where each row (or column) starts: (n_major + 1,)."""
        parts = [self._inside(stored[name]) for name in ("data", "indices")]
        starts = self._numbers(stored["indptr"])
        for part in parts:
            if len(part.shape or ()) != 1:
                raise ValueError(f"{part.name} is no list of values (shape {part.shape})")
            self._require_stored(part)
        if starts.dtype.kind not in "iu" or parts[1].dtype.kind not in "iu":
            raise ValueError("the positions of its values are no integers")
        if len(starts) != n_major + 1:
            raise ValueError(f"{len(starts)} row starts for {n_major} rows")
        starts = starts.astype(np.int64)
        if (np.diff(starts) < 0).any() or starts[0] < 0:
            raise ValueError("row starts are not ascending")
        if starts[-1] > min(part.shape[0] for part in parts):
            raise ValueError("row starts lie behind the stored values")
        if n_minor == 0 and starts[-1] > starts[0]:
            raise ValueError("an index lies outside the matrix")
        return (*parts, starts)


def _key(matrix: str) -> str:
    if matrix == "raw":
        return "raw/X"
    return "layers/" + matrix.removeprefix("layer:") if matrix.startswith("layer:") else matrix


def _text(value: Any) -> str:
    text = value.decode() if isinstance(value, bytes) else str(value)
    text.encode()  # h5py makes lone surrogates of what is no UTF-8
    return text


def _native(dtype: np.dtype) -> np.dtype:
    # longer floats than float64 have no form that all machines share
    return np.dtype(np.float64) if dtype.kind == "f" and dtype.itemsize > 8 else dtype.newbyteorder("=")


def _sparse_kind(group: h5py.Group) -> str:
    kind = group.attrs.get("encoding-type", group.attrs.get("h5sparse_format", ""))
    return _text(kind).removesuffix("_matrix")


def _sparse_shape(group: h5py.Group) -> np.ndarray:
    shape = np.asarray(group.attrs["shape"] if "shape" in group.attrs else group.attrs["h5sparse_shape"])
    if shape.shape != (2,) or shape.dtype.kind not in "iu":
        raise ValueError("its shape is not two integers")
    return shape


def _is_matrix(item: Any) -> bool:
    if isinstance(item, h5py.Dataset):
        return len(item.shape or ()) == 2
    return isinstance(item, h5py.Group) and _sparse_kind(item) in ("csr", "csc")


def _check_indices(indices: np.ndarray, bound: int) -> None:
    if indices.size and not 0 <= indices.min() <= indices.max() < bound:
        raise ValueError("an index lies outside the matrix")


def _links_outside(file: h5py.File) -> str | None:
    """Name of the first object whose content lies in another file, None where there is none."""

    def outside(name: str, link: Any) -> str | None:
        if isinstance(link, h5py.ExternalLink):
            return name
        item = file.get(name) if isinstance(link, h5py.HardLink) else None
        stored_outside = isinstance(item, h5py.Dataset) and (item.external or item.is_virtual)
        return name if stored_outside else None

    return file.visititems_links(outside)


@contextmanager
def _reading(path: Path, part: str) -> Iterator[None]:
    """Turn what h5py raises on damaged content into one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # h5py raises almost anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path}: {part} cannot be read ({reason:.300}); the file is damaged, truncated or not an AnnData (.h5ad) "
            "file."
        ) from error
