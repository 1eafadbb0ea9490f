"""What is done of layers that are not finished: kept on disk, so that a kill costs minutes.

One folder per layer, `<data root>/sae_models/unfinished/<name>/`: `work.json` says which work it is (settings, and
every software that took part), the arrays of each phase lie beside it. A finished layer has none.
"""

import json
import logging
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from cellcircuits.errors import UserError
from cellcircuits.jsonio import read_json, write_atomically, write_json
from cellcircuits.manifest import origin_differences, setting_differences, settings_fingerprint
from cellcircuits.steering_state import read_arrays

log = logging.getLogger(__name__)
SCHEMA_VERSION = 1
SAVE_EVERY_SECONDS = 180.0
AT_END = 1 / 6
WORK = "work.json"
PARTS = ("rows_*.npz", "training.npz", "trained.npz", "counts.npz", "losses.npz")
HALF_WRITTEN = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.tmp")


class SaveClock:
    """How long the work since the last save has taken.

    What took moments is not worth gigabytes on a disk: at the end of a phase only more than half a minute is kept.
    """

    def __init__(self) -> None:
        """Start now."""
        self._last = time.monotonic()

    def due(self, *, at_end: bool = False) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._last >= SAVE_EVERY_SECONDS * (AT_END if at_end else 1.0)

    def saved(self) -> None:
        """Begin anew."""
        self._last = time.monotonic()


class Unfinished:
    """The folder of one layer's unfinished work; nothing is written before the first `write`."""

    def __init__(self, folder: Path, record: Mapping[str, Any], *, kept: bool, changed: bool) -> None:
        """Bind a folder; see `open_unfinished`.

        Args:
            folder: where the work is kept.
            record: the content of `work.json` from now on.
            kept: whether the folder holds work of these settings.
            changed: whether its `work.json` says something else than `record`.
        """
        self.folder, self.record = folder, record
        self._kept, self._changed = kept, changed

    def read(self, name: str, like: Mapping[str, np.ndarray | None]) -> dict[str, np.ndarray] | None:
        """What `write` kept under a name; None where there is nothing usable, which is said if something is there.

        Args:
            name: of the file.
            like: arrays of the shape and type of those to expect; text of any length; None takes any shape and type.
        """
        arrays = read_arrays(self.folder / name) if self._kept else None
        if arrays is None:
            return None
        found = arrays.pop("fingerprint", np.array(""))
        if str(found) != self.record["fingerprint"] or not _is_like(arrays, like):
            log.warning("%s is of other work: it is not used.", self.folder / name)
            return None
        return arrays

    def write(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep arrays under a name, whole or not at all.

        Raises:
            UserError: the folder cannot be written, or the disk is full.
        """
        if not self._kept:
            self.clear()  # what nobody can tell the origin of
        if self._changed:
            write_json(self.folder / WORK, self.record)
        self._kept, self._changed = True, False
        content = {"fingerprint": np.array(self.record["fingerprint"]), **arrays}
        write_atomically(self.folder / name, lambda stream: np.savez(stream, **content))

    def remove(self, *patterns: str) -> None:
        """Remove parts that are not needed any more."""
        _remove(self.folder, patterns)

    def clear(self) -> None:
        """Remove everything; see `clear_unfinished`."""
        clear_unfinished(self.folder)

    def n_bytes(self) -> int:
        """What the kept work takes on the disk."""
        return sum(path.stat().st_size for path in self.folder.glob("*") if path.is_file())


def unfinished_folder(data_root: Path, name: str) -> Path:
    """Where unfinished work on the layer of that name is kept."""
    return data_root / "sae_models" / "unfinished" / name


def clear_unfinished(folder: Path) -> None:
    """Remove all that is kept of a layer's work, and the folders in which nothing else is."""
    remove_half_written(folder)
    _remove(folder, (*PARTS, WORK))
    for emptied in (folder, folder.parent):
        with suppress(OSError):
            emptied.rmdir()


def _remove(folder: Path, patterns: Iterable[str]) -> None:
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        with suppress(OSError):
            path.unlink()


def open_unfinished(
    data_root: Path, name: str, settings: Mapping[str, Any], provenance: Mapping[str, Any], *, mix_versions: bool
) -> Unfinished:
    """Find what is kept of one layer's work. Writes nothing.

    Args:
        data_root: the folder that holds `sae_models/`.
        name: of the layer's folder.
        settings: everything that determines the numbers, as plain JSON values.
        provenance: where they come from, with `manifest.origin()` in it.
        mix_versions: go on also where other software has worked.

    Raises:
        UserError: work of other settings or by other software is kept there.
    """
    folder = unfinished_folder(data_root, name)
    record = json.loads(json.dumps({
        "schema_version": SCHEMA_VERSION, "settings": settings, "fingerprint": settings_fingerprint(settings),
        "provenance": [provenance],
    }, allow_nan=False))  # fmt: skip
    kept = _kept_record(folder)
    if kept is None:
        return Unfinished(folder, record, kept=False, changed=True)
    mend = f"or, to start anew, remove {folder}."
    differences = list(setting_differences(kept["settings"], record["settings"]))
    if differences:
        raise UserError(
            f"{folder}: holds unfinished work with other settings ({'; '.join(differences)}); repeat those settings "
            f"to go on, choose another --data-root, {mend}"
        )
    [current], earlier = record["provenance"], kept["provenance"]
    others = [origin_differences(origin, current) for origin in earlier]
    if others and all(others) and not mix_versions:
        raise UserError(
            f"{folder}: holds unfinished work by other software ({'; '.join(others[-1])}), which may change the "
            f"numbers; add --mix-versions to go on all the same, which results.json then records, {mend}"
        )
    record["provenance"] = earlier if current in earlier else [*earlier, current]
    return Unfinished(folder, record, kept=True, changed=record != kept)


def _kept_record(folder: Path) -> dict[str, Any] | None:
    """What `work.json` says; None, which is said if parts lie there, where it says nothing."""
    path = folder / WORK
    if not any(found for pattern in (WORK, *PARTS) for found in folder.glob(pattern)):
        return None
    try:
        kept = read_json(path)
        json.dumps(kept, allow_nan=False)  # it will be written again
        well_formed = isinstance(kept["settings"], dict) and isinstance(kept["provenance"], list)
        if (
            kept["schema_version"] == SCHEMA_VERSION
            and well_formed
            and all(type(x) is dict for x in kept["provenance"])
        ):
            return kept
        reason = "is of another version"
    except (UserError, KeyError, TypeError, ValueError):
        reason = "is gone or damaged"
    log.warning("%s %s: the unfinished work beside it is not used.", path, reason)
    return None


def remove_half_written(folder: Path, names: Iterable[str] = ("",)) -> None:
    """Remove what a killed run left of files that it was writing.

    Args:
        folder: where.
        names: of the files; "" means any.
    """
    for path in (path for name in names for path in folder.glob(f".{name}*.tmp")):
        if HALF_WRITTEN.fullmatch(path.name):  # the folder may hold hidden files of others
            with suppress(OSError):
                path.unlink()


def _is_like(arrays: Mapping[str, np.ndarray], like: Mapping[str, np.ndarray | None]) -> bool:
    def matches(array: np.ndarray, expected: np.ndarray | None) -> bool:
        if expected is None or (expected.dtype.kind == "U" == array.dtype.kind):
            return True
        return (array.shape, array.dtype) == (expected.shape, expected.dtype)

    return set(arrays) == set(like) and all(matches(arrays[name], like[name]) for name in like)
