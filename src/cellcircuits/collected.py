"""What is kept of the experiments' folders: summaries and tables, each saying which inputs it is of.

The folders that experiments work in hold thousands of files and serve to resume; `results/` holds what figures, claims
and the paper are made from.
"""

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cellcircuits.attenuation import edges_by_layer
from cellcircuits.errors import UserError
from cellcircuits.jsonio import discard, read_json, write_atomically, write_json
from cellcircuits.manifest import MANIFEST
from cellcircuits.results import exclusive

INPUTS_KEY = "inputs_name"  # first in every file, so that nobody takes a demo's numbers for a Geneformer's
BY_LAYER = "edges_by_layer.json"
TRACE, SELECTIVE = "exhaustive_tracing", "selective_tracing"
PAIRS, TRIPLETS = "pairwise_ablation", "higher_order_ablation"
TRAJECTORY, STEERING = "trajectory", "trajectory_steering"
SPECIFICITY, STEERING_TESTS = "specificity", "controlled_steering"
NEEDED = {
    TRACE: (MANIFEST, "exhaustive_summary.json", "features.parquet", "calibration.json", "graph_statistics.json"),
    SELECTIVE: ("selective_summary.json",),
    PAIRS: (MANIFEST, "summary.json"),
    TRIPLETS: (MANIFEST, "summary.json"),
    TRAJECTORY: (MANIFEST, "trajectory_summary.json"),
    STEERING: (MANIFEST, "summary.json", "state_signatures.npz"),
}
# of analyses that may not have been run, and records of a number that differs
ALSO = {
    PAIRS: ("additivity.json",),
    TRIPLETS: ("additivity.json", "triplet_*.json"),
    STEERING: ("steering_F*_L*.json",),
    SPECIFICITY: (MANIFEST, "specificity.json"),
    STEERING_TESTS: (MANIFEST, "steering_tests.json"),
}
KEPT_NAMES = (*{name for names in (*NEEDED.values(), *ALSO.values()) for name in names}, BY_LAYER)


def collect(runs: Path, out_dir: Path, inputs_name: str) -> list[Path]:
    """Copy what is kept of the experiments below `runs` into `out_dir`, and remove what an earlier copy left there.

    Args:
        runs: holds the experiments' folders under the names of `NEEDED`.
        out_dir: where to write.
        inputs_name: what the inputs are called, in every file.

    Returns:
        The files written, relative to `out_dir`.

    Raises:
        UserError: an experiment's file is missing or damaged, or `out_dir` holds a run of its own.
    """
    found = planned(runs, out_dir)
    with ExitStack() as locks:
        for name in sorted({Path(), *(path.parent for path in found)}):
            locks.enter_context(exclusive(out_dir / name))
        for name, source in found.items():
            _copy(source, out_dir / name, inputs_name)
        for name, folders in _traces(runs).items():
            content = [edges_by_layer(folder) for folder in folders]
            write_json(out_dir / name / BY_LAYER, {INPUTS_KEY: inputs_name, "sources": content})
            found[Path(name, BY_LAYER)] = runs / name
        for stale in kept_files(out_dir):
            if stale not in found:
                discard(out_dir / stale)
    return sorted(found)


def planned(runs: Path, out_dir: Path) -> dict[Path, Path]:
    """What `collect` copies: path in the results, file of an experiment.

    Raises:
        UserError: an experiment's file is missing, or `out_dir` holds a run of its own.
    """
    found = dict(_sources(runs))
    _require_no_run(out_dir, found)
    return found


def _traces(runs: Path) -> dict[str, list[Path]]:
    return {TRACE: [runs / TRACE], SELECTIVE: sorted((runs / SELECTIVE).glob("layer*"))}


def _sources(runs: Path) -> Iterable[tuple[Path, Path]]:
    """(path in the results, file to copy) of all that is kept."""
    for folder, names in NEEDED.items():
        for name in names:
            if not (runs / folder / name).is_file():
                raise UserError(f"{runs / folder / name}: no such file; run the experiment of that folder first.")
            yield Path(folder, name), runs / folder / name
    patterns = [(folder, name) for folder, names in ALSO.items() for name in names]
    for folder, pattern in [*patterns, (SELECTIVE, f"layer*/{MANIFEST}")]:
        for path in sorted((runs / folder).glob(pattern)):
            yield path.relative_to(runs), path


def _require_no_run(out_dir: Path, found: Iterable[Path]) -> None:
    for name in found:
        path = out_dir / name
        if path.name == MANIFEST and path.is_file() and INPUTS_KEY not in _object(path):
            raise UserError(f"{path.parent}: holds a run of its own; choose another --out-dir, or move the run away.")


def content_hash(out_dir: Path) -> str:
    """SHA-256 over names and bytes of all kept files: any number that changes changes it."""
    digest = hashlib.sha256()
    for name in sorted(set(kept_files(out_dir))):
        content = (out_dir / name).read_bytes()
        digest.update(f"{name.as_posix()} {len(content)} ".encode())
        digest.update(content)
    return digest.hexdigest()


def kept_files(out_dir: Path) -> Iterable[Path]:
    """Files of a folder of results that `collect` wrote, by their names; relative to the folder."""
    for folder in {*NEEDED, *ALSO}:
        for pattern in (*KEPT_NAMES, f"layer*/{MANIFEST}"):
            yield from (path.relative_to(out_dir) for path in (out_dir / folder).glob(pattern))


def _copy(source: Path, target: Path, inputs_name: str) -> None:
    if source.suffix == ".json":
        write_json(target, {INPUTS_KEY: inputs_name, **_object(source)})
    elif source.suffix == ".parquet":
        table = _opened(source, lambda path: pq.read_table(path, partitioning=None))
        noted = table.replace_schema_metadata({**(table.schema.metadata or {}), INPUTS_KEY.encode(): inputs_name})
        write_atomically(target, lambda stream: pq.write_table(noted, stream, write_page_checksum=True))
    else:
        arrays = _opened(source, _arrays)
        write_atomically(target, lambda stream: np.savez(stream, **arrays, inputs_name=np.array(inputs_name)))


def _arrays(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def _opened(path: Path, read: Any) -> Any:
    try:
        return read(path)
    except (pa.ArrowException, OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}); make it again with --analysis-only.") from None


def _object(path: Path) -> Mapping[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a JSON object; make it again with --analysis-only.")
    return content


def size_note(out_dir: Path, names: Iterable[Path]) -> str:
    """How many files there are, and how large they are together."""
    sizes = [(out_dir / name).stat().st_size for name in names]
    return f"{len(sizes)} files, {sum(sizes) / 1e6:.1f} MB"


def readme(inputs_name: str, names: Iterable[Path]) -> str:
    """The text of `README.md` of a folder of results."""
    folders = sorted({name.parts[0] for name in names})
    listed = "\n".join(f"- `{folder}/`" for folder in folders)
    return (
        f"# Results: {inputs_name}\n\nWritten by `make all`; do not edit. All numbers here are those of the inputs "
        f"called *{inputs_name}*, and every file says so (`{INPUTS_KEY}`). Each folder's `manifest.json` says "
        "which model, cells, SAEs, settings, code and machine they come from; `claims.md` is what they say about the "
        f"study's claims.\n\n{listed}\n\nThe experiments' own folders, which runs resume from, and whatever else runs "
        "write here, are ignored by git.\n"
    )


def text_file(path: Path, text: str) -> None:
    """Write a text, whole or not at all."""
    write_atomically(path, lambda stream: stream.write(text.encode("utf-8")))
