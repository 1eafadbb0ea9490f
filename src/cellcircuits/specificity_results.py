"""Records of specificity controls on disk, and what is said about them on the terminal. Standard library only."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cellcircuits.errors import UserError
from cellcircuits.jsonio import read_json

log = logging.getLogger(__name__)
EXPERIMENT = "specificity_controls"
SUMMARY_FILE = "specificity.json"
NEEDED = ("feature_idx", "label", "activation_freq", "n_cells_active", "real", "controls", "specific", "fingerprint")
NEEDED_PER_CONDITION = ("n_cells", "n_edges", "effect_norm", "tests")
TITLES = {
    "random": "random direction",
    "random_covariance": "random, as the stream varies",
    "other_feature": "another feature",
    "shuffled_positions": "other positions",
}
DEFINITIONS = {
    "ablation": "-h_f * W_dec[:, f] at the gene positions where f is active; effects are the mean change of target "
    "latents over the pushed positions, edges by the published rule",
    "controls": "the same sizes |h_f| * ||W_dec[:, f]|| position by position, one direction per draw for all cells: "
    "random: isotropic; random_covariance: Gaussian with the covariance of the stream at the cells' gene positions; "
    "other_feature: minus the decoder direction of one of the features nearest in log activation frequency, another "
    "in each draw; shuffled_positions: the same direction and sizes at random gene positions where f is not active "
    "(as many of the sizes as fit; a cell without such a position is not measured), measured there",
    "means": "over the draws of a feature, then over features; intervals are 95%, by resampling features",
    "edge_ratio": "edges of the ablations over the mean edges of the control, both summed over features, so that hubs "
    "weigh most; n_features_more_edges counts the features that have more edges than under the control",
    "effect_norm_ratio": "norm of the mean effects, in latent units, of the ablations over that of the control, both "
    "summed over features; unlike d, which divides by the spread over cells, it tells a strong effect from a weak one",
    "calibrated": "edges with q_bh < 0.05, |Hedges' g| and consistency over the cells where the target changes above "
    "the rule's thresholds, in features with enough active cells; q over all live targets of all features of one draw, "
    "and of the ablations of the same features",
    "jaccard": "targets that are edges of both over those of either; jaccard_expected is its mean for random sets of "
    "the same sizes among the targets live in one or the other; features without an edge in either are left out",
    "between_features": "the same overlap between the ablations of different features of the sample",
    "specific_share": "share of the ablation's edges that no draw of any control has; specific_share_expected is what "
    "random sets of the controls' sizes would leave",
    "wilcoxon": "two-sided rank-sum test stratified by feature (van Elteren), exact: is the ablation one draw more of "
    "the control? wilcoxon_p of calibrated edges, wilcoxon_p_published of published ones; q by Benjamini-Hochberg over "
    "the controls",
}


def record_path(out_dir: Path, feature: int) -> Path:
    """`specificity_0042.json` of one source feature."""
    return out_dir / f"specificity_{feature:04d}.json"


def read_records(out_dir: Path, fingerprint: str) -> dict[int, dict[str, Any]]:
    """The records of a folder by ascending feature; those damaged or of another run are said and left out."""
    found = {}
    for path in out_dir.glob("specificity_*.json"):
        record = _read_record(path, fingerprint)
        if record is None:
            log.warning("%s is damaged, of another run or under another name: it is not counted.", path)
        else:
            found[record["feature_idx"]] = record
    return dict(sorted(found.items()))


def _read_record(path: Path, fingerprint: str) -> dict[str, Any] | None:
    try:
        content = read_json(path)
        conditions = [content["real"], *(draw for draws in content["controls"].values() for draw in draws)]
        is_whole = (
            all(key in content for key in NEEDED)
            and all(key in condition for condition in conditions for key in NEEDED_PER_CONDITION)
            and content["fingerprint"] == fingerprint
            and path.name == record_path(path.parent, content["feature_idx"]).name
        )
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return None
    return content if is_whole else None


def report_lines(summary: Mapping[str, Any]) -> Iterable[str]:
    """The summary as text for the terminal, line by line."""
    n, n_draws, real = summary["n_features"], summary["n_draws"], summary["real"]
    yield f"Layer {summary['source_layer']}: {n} features, each removed, and replaced by other pushes of the same size"
    if not n:
        return
    yield (
        f"  removing a feature makes {real['edges_mean']:.1f} edges on average, {real['calibrated_mean']:.1f} of them "
        "calibrated"
    )
    yield (
        f"  {f'instead ({n_draws} draws)':<30} {'edges':>7} {'calibrated':>10} {'p':>8}  {'edges, own / this':<20} "
        f"{'effects':>7} {'same targets':>12} {'by chance':>9}"
    )
    for name, control in summary["controls"].items():
        yield (
            f"  {TITLES[name]:<30} {control['edges_mean']:>7.1f} {control['calibrated_mean']:>10.1f} "
            f"{_p(control['wilcoxon_q']):>8}  {_with_interval(control, 'edge_ratio'):<20} "
            f"{_ratio(control['effect_norm_ratio']):>7} {_share(control['jaccard_mean']):>12} "
            f"{_share(control['jaccard_expected']):>9}"
        )
    between, specific = real["between_features"], summary["specific"]
    yield (
        f"  {'two different features':<30} {'':>58} {_share(between['jaccard_mean']):>12} "
        f"{_share(between['jaccard_expected']):>9}"
    )
    yield (
        f"  {_share(specific['share_mean'])} of a feature's edges come with none of these pushes; random targets in "
        f"their place would leave {_share(specific['share_expected'])}"
    )
    yield "  p: calibrated edges, corrected; effects: their norm, own / this; same targets: overlap (Jaccard) of edges"


def _with_interval(content: Mapping[str, Any], name: str) -> str:
    value, low, high = (content[key] for key in (name, f"{name}_low", f"{name}_high"))
    if value is None:
        return "-"
    return f"{value:.2f}" if low is None or high is None else f"{value:.2f} ({low:.2f} to {high:.2f})"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"
