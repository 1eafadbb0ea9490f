"""`manifest.json`: which run a folder belongs to, and where its numbers come from. Standard library only.

A folder belongs to one set of numbers. `settings` determine them and are compared on every start, and so is the
software (`code` and `versions` of the provenance) that can change them; the rest of `provenance` is for the reader.
"""

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cellcircuits.errors import UserError
from cellcircuits.jsonio import create_json, read_json, write_json
from cellcircuits.results import SCHEMA_VERSION, one_at_a_time

MANIFEST = "manifest.json"
RESULTS = (
    "feature_*.json", "pair_*.json", "triplet_*.json", "steering_*.json", "*summary.json", "cell_metadata.json",
    "switch_features.json", "same_position_check.json", "calibration.json", "specificity*.json", "additivity.json",
    "controlled_*.json", "steering_tests.json", "declaration.json", "*.parquet", "blocks", "partial", "effects",
    "state_signatures.npz", "sae_activations.npz", "first_half.npz", "probe.npz",
)  # fmt: skip
NEEDED_SETTING = {  # one that every manifest of the experiment has
    "exhaustive_feature_tracing": ("source_layer", int),
    "higher_order_ablation": ("order", int),
    "trajectory_steering": ("alphas", list),
    "trajectory_analysis": ("layers", list),
    "specificity_controls": ("draws", int),
    "controlled_steering": ("doses", list),
}
SOURCES = Path(__file__).resolve().parents[1]
PSEUDOTIME = ("scanpy", "scipy", "scikit-learn", "umap-learn")  # what it comes from; the probe is scikit-learn's too
LIBRARIES = ("torch", "transformers", "numpy", "anndata", *PSEUDOTIME, "pandas", "h5py", "pyarrow")
NUMERIC = ("torch", "transformers", "numpy")  # what computes; cells and SAEs are compared by their content
ALSO_NUMERIC = {"trajectory_analysis": PSEUDOTIME, "controlled_steering": PSEUDOTIME}


@cache
def code_hash() -> str:
    """SHA-256 over the names and bytes of every `*.py` below `src/`, as they were when first asked for."""
    digest = hashlib.sha256()
    found = {path.relative_to(SOURCES): path for path in SOURCES.rglob("*.py")}
    for name, path in sorted(found.items()):
        # hidden files are what editors and file managers leave
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            content = path.read_bytes()
            digest.update(f"{name.as_posix()} {len(content)} ".encode())
            digest.update(content)
    return digest.hexdigest()


def origin() -> dict[str, Any]:
    """What computes here: `code`, `versions` of Python and the libraries, `machine`; nothing is imported for it."""
    return {
        "code": code_hash(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in LIBRARIES},
        "machine": {"system": platform.system(), "processor": platform.machine()},
    }


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def origin_differences(
    kept: Mapping[str, Any], current: Mapping[str, Any], libraries: Sequence[str] = NUMERIC
) -> list[str]:
    """What differs between the software of two origins that can change numbers, in words.

    Args:
        kept: `origin()` of an earlier run, maybe among other keys; one without `code` is older than that record.
        current: of this run.
        libraries: whose versions count. Builds of one version, such as +cpu and +cu130, count as the same: which
            device computes does not count either.
    """
    differences = []
    if kept.get("code") != current.get("code"):
        differences.append("the code in src/ has changed" if kept.get("code") else "made before code was recorded")
    there, here = (x["versions"] if isinstance(x.get("versions"), dict) else {} for x in (kept, current))
    for name in (name for name in libraries if name in there and name in here):
        if str(there[name]).partition("+")[0] != str(here[name]).partition("+")[0]:
            differences.append(f"{name} {there[name]} -> {here[name]}")
    return differences


def claim_folder(
    out_dir: Path, settings: Mapping[str, Any], provenance: Mapping[str, Any], *, mix_versions: bool = False
) -> str:
    """Make `out_dir` this run's folder, or check that it already is.

    Args:
        out_dir: output folder, created where missing.
        settings: everything that determines the numbers, as plain JSON values.
        provenance: where they come from (`origin()`, device, files); each different one is kept.
        mix_versions: go on also where other software has worked in the folder.

    Returns:
        The fingerprint of the settings, which every result carries.

    Raises:
        UserError: the folder holds a run with other settings or by other software, or something that is no run.
    """
    path = out_dir / MANIFEST
    current, comes_from = _plain(settings), _plain(provenance)
    _require_no_strays(out_dir)
    with one_at_a_time(out_dir):
        content = {"schema_version": SCHEMA_VERSION, "settings": current, "provenance": [comes_from]}
        if not create_json(path, content):
            origins = _require_same_run(out_dir, current, comes_from, mix_versions=mix_versions)
            if comes_from not in origins:
                write_json(path, content | {"provenance": [*origins, comes_from]})
    return settings_fingerprint(current)


def check_folder(
    out_dir: Path,
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any] | None = None,
    *,
    mix_versions: bool = False,
) -> bool:
    """Whether `out_dir` holds a run that these settings go on with; False where it is new. Writes nothing.

    Args:
        out_dir: output folder.
        settings: see `claim_folder`.
        provenance: likewise; None leaves the software uncompared.
        mix_versions: likewise.

    Raises:
        UserError: `claim_folder` would refuse it.
    """
    _require_no_strays(out_dir)
    if not os.path.lexists(out_dir / MANIFEST):
        return False
    mix_versions = mix_versions or provenance is None
    _require_same_run(out_dir, _plain(settings), _plain(provenance or {}), mix_versions=mix_versions)
    return True


def _plain(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` as it will be read back."""
    return json.loads(json.dumps(content, allow_nan=False))


def _require_no_strays(out_dir: Path) -> None:
    # results before the manifest: a run that starts at the same time makes its manifest first
    found = next((found for pattern in RESULTS for found in out_dir.glob(pattern)), None)
    if found is not None and not os.path.lexists(out_dir / MANIFEST):
        raise UserError(
            f"{out_dir}: holds results ({found.name}) without a {MANIFEST}, so nobody can say what they were made "
            "from; they are left alone, choose another --out-dir."
        )


def _require_same_run(
    out_dir: Path, settings: dict[str, Any], comes_from: dict[str, Any], *, mix_versions: bool
) -> list[Any]:
    """Refuse a folder of other settings or other software; returns the provenance that it has so far."""
    kept = open_folder(out_dir)
    differences = list(setting_differences(kept["settings"], settings))
    if differences:
        raise UserError(
            f"{out_dir}: holds a run with other settings ({'; '.join(differences)}); choose another --out-dir, or "
            "run with those settings to go on there."
        )
    origins = kept["provenance"] if isinstance(kept.get("provenance"), list) else []
    libraries = (*NUMERIC, *ALSO_NUMERIC.get(str(settings.get("experiment")), ()))
    found = [origin_differences(x, comes_from, libraries) for x in origins if isinstance(x, dict)]
    # one that has worked here before adds nothing to the mixture
    if found and all(found) and not mix_versions:
        raise UserError(
            f"{out_dir}: was made by other software ({'; '.join(found[-1])}), which may change the numbers; choose "
            f"another --out-dir, or add --mix-versions to go on there, which {MANIFEST} then records."
        )
    return origins


def settings_fingerprint(settings: Mapping[str, Any]) -> str:
    """SHA-256 over the settings, independent of the order of their keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def open_folder(out_dir: Path, wanted: str | None = None, flag: str = "--out-dir") -> dict[str, Any]:
    """The manifest of a folder that already holds a run.

    Args:
        out_dir: the folder.
        wanted: the experiment that it must hold; None takes any.
        flag: what names it on the command line.

    Raises:
        UserError: there is none, it is damaged, or of another experiment.
    """
    path = out_dir / MANIFEST
    if not os.path.lexists(path):
        first = "run without --analysis-only first, or " if flag == "--out-dir" else ""
        raise UserError(f"{out_dir}: holds no run (no {MANIFEST}); {first}fix {flag}.")
    manifest = read_json(path)
    settings = manifest.get("settings") if isinstance(manifest, dict) else None
    experiment = settings.get("experiment") if isinstance(settings, dict) else None
    key, kind = NEEDED_SETTING.get(str(experiment), NEEDED_SETTING["exhaustive_feature_tracing"])
    if not isinstance(settings, dict) or type(settings.get(key)) is not kind:
        raise UserError(f"{path}: is not the manifest of an experiment; fix {flag}.")
    if wanted not in (None, experiment):
        raise UserError(f"{out_dir}: holds another experiment ({experiment}); fix {flag}.")
    return manifest


def require_same_origin(flag: str, folders: Iterable[Path], settings: Mapping[str, Any]) -> None:
    """Check that what earlier runs chose, they chose with the model and the SAEs of this run.

    Args:
        flag: the flag that names what they chose.
        folders: of the earlier runs; those without a manifest, which came from elsewhere, are not checked.
        settings: of this run.

    Raises:
        UserError: a feature's number there means another feature here.
    """
    for folder in (folder for folder in folders if (folder / MANIFEST).is_file()):
        kept = open_folder(folder)["settings"]
        saes = kept["saes"] if isinstance(kept.get("saes"), dict) else {}
        there = {"model": kept.get("model"), "saes": {n: sae for n, sae in saes.items() if n in settings["saes"]}}
        here = {"model": settings["model"], "saes": {layer: settings["saes"][layer] for layer in there["saes"]}}
        differences = list(setting_differences(there, here))
        if differences:
            raise UserError(
                f"{flag}: {folder} was made with another model or SAE ({'; '.join(differences)}), so its features are "
                "others; make it again with these."
            )


def setting_differences(kept: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    """Each setting that differs, in words; both are nested dicts of plain JSON values."""
    for key in dict.fromkeys([*kept, *current]):
        there, now = kept.get(key), current.get(key)
        if isinstance(there, dict) and isinstance(now, dict):
            yield from setting_differences(there, now, f"{prefix}{key}.")
        elif there != now:
            yield f"{prefix}{key} is {_short(there)} there and {_short(now)} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:14]}..."
