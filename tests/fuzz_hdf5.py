"""Mutators for .h5ad files: every kind of storage, then one structural change or damaged bytes."""

import shutil
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import h5py
import numpy as np
from scipy import sparse

from cell_fixtures import GENES, random_counts, write_cells
from fuzz_bytes import EXTREMES, mutate_bytes, mutate_near

# what HDF5 begins its trees, tables of names, heaps and lists of attributes with; and headers of objects by their form
_SIGNS = (
    rb"TREE|SNOD|HEAP|GCOL|OHDR|OCHK|FRHP|FHDB|FHIB|BTHD|BTLF|\x89HDF|\x01\x00[\x01-\x14]\x00[\x01-\x04]\x00\x00\x00"
)


def write_seeds(folder: Path) -> list[Path]:
    """Sound files to start from."""
    counts, raw = random_counts(), (sparse.csr_matrix(random_counts()), GENES)
    obs = {"gene": ["non-targeting"] * 30, "depth": np.arange(30.0), "even": np.arange(30) % 2 == 0}
    seeds = [
        write_cells(folder / "dense.h5ad", counts, GENES, obs),
        write_cells(folder / "csr.h5ad", sparse.csr_matrix(counts), GENES, obs, var={"symbol": GENES}),
        write_cells(folder / "csc.h5ad", sparse.csc_matrix(counts), GENES, obs, layers={"counts": counts}),
        write_cells(folder / "raw.h5ad", np.log1p(counts), GENES, obs, raw=raw),
    ]
    legacy = folder / "legacy.h5ad"
    shutil.copy(seeds[1], legacy)
    with h5py.File(legacy, "r+") as file:
        group = file["obs"].create_group("__categories")
        group["line"] = np.array([b"K562", b"RPE1"])
        file["obs/line"] = (np.arange(30) % 2).astype("i1")
        file["obs/line"].attrs["categories"] = group["line"].ref
        file["obs"].attrs["column-order"] = np.array(
            [*file["obs"].attrs["column-order"], "line"], dtype=h5py.string_dtype()
        )
        values = file["X/data"][:]
        del file["X/data"]
        file.create_dataset("X/data", data=values, chunks=(16,), compression="gzip", shuffle=True)
    modern = folder / "modern.h5ad"  # groups and attributes in the form that HDF5 gave them later
    with h5py.File(seeds[1]) as old, h5py.File(modern, "w", libver="latest") as new:
        for part in old:
            old.copy(part, new)
        for group in ("obs", "var"):
            new[group].attrs["note"] = "x" * 70_000
    return [*seeds, legacy, modern]


def mutate_h5ad(path: Path, rng: Random) -> None:
    """Change the file at `path` in place."""
    way = rng.random()
    if way < 0.6:
        with h5py.File(path, "r+") as file:
            for _ in range(rng.choice((1, 1, 2, 3))):
                with suppress(Exception):  # HDF5 and NumPy refuse some combinations
                    _change(file, rng)
    if way > 0.55:
        content = path.read_bytes()
        changed = mutate_near(content, _SIGNS, 96, rng) if rng.random() < 0.8 else mutate_bytes(content, rng)
        path.write_bytes(changed)


def _change(file: h5py.File, rng: Random) -> None:
    names: list[str] = []
    file.visit(names.append)
    wanted = [n for n in names if n.split("/")[0] in ("X", "obs", "var", "raw", "layers")]
    name = rng.choice(wanted or names)
    if getattr(file[name], "size", None) and file[name].size > 10**6:  # made so before, and too much to change
        return
    changes = (_attribute, _other_dataset, _huge, _link, _elsewhere, _values, _remove, _bomb, _filter)
    rng.choice(changes)(file, name, rng)


def _attribute(file: h5py.File, name: str, rng: Random) -> None:
    item = file[name]
    if not len(item.attrs):
        item = file[name.split("/")[0]]
    key = rng.choice([*item.attrs, "encoding-type", "shape", "column-order", "_index", "categories", "ordered"])
    item.attrs[key] = rng.choice(
        (
            "dataframe", "categorical", "csr_matrix", "csc_matrix", "nullable-integer", "nullable-string-array",
            "array", "", "../..", "/", "X", b"\xff\xfe", 3, -1, 1 << 62, np.nan, np.array([1 << 40, 1 << 40]),
            np.array([30, 12]), np.array([-1, 12]), np.array([30]), np.array(["gene",
            "gene"], dtype=h5py.string_dtype()),
            np.array(["absent"], dtype=h5py.string_dtype()), np.zeros((2, 2)), h5py.Empty("f4"), item.ref, file.ref,
        )
    )  # fmt: skip


def _other_dataset(file: h5py.File, name: str, rng: Random) -> None:
    old = file[name]
    if not isinstance(old, h5py.Dataset):
        return
    attributes, shape = dict(old.attrs), old.shape
    del file[name]
    text = h5py.string_dtype()
    choices: list[Any] = [
        lambda: np.zeros(shape, rng.choice(("i1", "u8", "f2", ">i4", "?", "c8", "f4", "S4"))),
        lambda: np.full(shape, "x" * rng.choice((1, 10_000)), dtype=object).astype(text),
        lambda: np.array([b"\xff\xfe"] * max(1, shape[0] if shape else 1)),
        lambda: np.zeros((*shape, 2)), lambda: np.zeros(()), lambda: np.zeros(0), lambda: np.arange(7),
        lambda: np.array([file.ref] * 30, dtype=h5py.ref_dtype), lambda: np.zeros(30, [("a", "i4"), ("b", "f8")]),
        lambda: np.full(shape, rng.choice((np.nan, np.inf, -1.0, 0.5, 1e300))), lambda: h5py.Empty("f8"),
    ]  # fmt: skip
    file[name] = rng.choice(choices)()
    for key, value in attributes.items():
        file[name].attrs[key] = value


def _huge(file: h5py.File, name: str, rng: Random) -> None:
    """A dataset that claims very much and stores nothing."""
    old = file[name]
    if not isinstance(old, h5py.Dataset):
        return
    attributes, dtype, n_axes = dict(old.attrs), old.dtype, max(1, len(old.shape or ()))
    del file[name]
    shape = tuple(rng.choice((10**6, 10**9, 10**12, 1 << 62)) if axis == 0 else 12 for axis in range(n_axes))
    chunks = rng.choice((None, (1 << rng.choice((4, 16, 24)), *[12] * (n_axes - 1))))
    file.create_dataset(name, shape, dtype, chunks=chunks, maxshape=(None, *shape[1:]) if chunks else None)
    for key, value in attributes.items():
        file[name].attrs[key] = value


def _link(file: h5py.File, name: str, rng: Random) -> None:
    del file[name]
    file[name] = rng.choice(
        (
            h5py.ExternalLink("/etc/passwd", "/"), h5py.ExternalLink("dense.h5ad", name), h5py.SoftLink(name),
            h5py.SoftLink("/"), h5py.SoftLink("/nowhere"), h5py.SoftLink("/obs/../../x"), h5py.SoftLink("/obs"),
            file["/"], file["obs"], np.dtype("f4"),
        )
    )  # fmt: skip


def _elsewhere(file: h5py.File, name: str, rng: Random) -> None:
    """Data that lie in another file."""
    old = file[name]
    if not isinstance(old, h5py.Dataset):
        return
    attributes, shape, dtype = dict(old.attrs), old.shape, old.dtype
    if dtype.kind == "O":
        dtype = np.dtype("S20")
    del file[name]
    if rng.random() < 0.5:
        file.create_dataset(name, shape, dtype, external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])
    else:
        layout = h5py.VirtualLayout(shape, dtype)
        layout[...] = h5py.VirtualSource("dense.h5ad", "X", shape)
        file.create_virtual_dataset(name, layout)
    for key, value in attributes.items():
        file[name].attrs[key] = value
    if rng.random() < 0.3 and "line" in file["obs"]:  # reached by a reference only
        file["obs/line"].attrs["categories"] = file[name].ref
        del file[name]


def _values(file: h5py.File, name: str, rng: Random) -> None:
    item = file[name]
    if isinstance(item, h5py.Dataset) and item.shape and item.dtype.kind in "iuf":
        place = tuple(rng.randrange(n) for n in item.shape)
        limits = np.iinfo(item.dtype) if item.dtype.kind in "iu" else np.finfo(item.dtype)
        item[place] = rng.choice((limits.max, limits.min, 0, 1, rng.choice(EXTREMES) % (1 << 15)))


def _remove(file: h5py.File, name: str, rng: Random) -> None:
    if rng.random() < 0.3:
        file.move(name, rng.choice(("x", "obs/x", "layers/counts", "raw/X", "X")))
    else:
        del file[name]


def _bomb(file: h5py.File, name: str, rng: Random) -> None:
    """Much from little: packed zeros, or one long text that many cells share."""
    old = file[name]
    if not isinstance(old, h5py.Dataset) or len(old.shape) != 1:
        return
    attributes = dict(old.attrs)
    del file[name]
    if rng.random() < 0.5:
        file.create_dataset(name, (rng.choice((10**7, 4 * 10**8)),), "f8", chunks=(1 << 20,), compression="gzip")
        file[name][: 1 << 20] = 0.0
    else:
        file.create_dataset(name, data=["y" * 10**6] * 30, dtype=h5py.string_dtype(), chunks=(30,), compression="gzip")
    for key, value in attributes.items():
        file[name].attrs[key] = value


def _filter(file: h5py.File, name: str, rng: Random) -> None:
    """A filter that only a plug-in could undo."""
    old = file[name]
    if not isinstance(old, h5py.Dataset) or not old.shape or old.dtype.kind == "O":
        return
    attributes, values = dict(old.attrs), old[()]
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk(old.shape)
    plist.set_filter(rng.choice((32001, 32015, 7, 400)), h5py.h5z.FLAG_OPTIONAL, (1,))
    del file[name]
    space = h5py.h5s.create_simple(values.shape)
    kind = h5py.h5t.py_create(values.dtype)
    made = h5py.h5d.create(file.id, name.encode(), kind, space, dcpl=plist)
    made.write(h5py.h5s.ALL, h5py.h5s.ALL, values)
    for key, value in attributes.items():
        file[name].attrs[key] = value
