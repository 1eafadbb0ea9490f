"""The claims about amplifying features along a trajectory."""

import statistics
from collections.abc import Sequence
from itertools import pairwise

from cellcircuits.claim import FAILS, HOLDS, OPEN, Claim, Finding, against, not_measured, proportion_interval
from cellcircuits.collected import STEERING, STEERING_TESTS
from cellcircuits.kept_results import Document, Results
from cellcircuits.wording import count, decimal, fixed, p_value, percent, with_interval

MAX_P = 0.05
MIN_FEATURES = 3
FILE, SCRIPT = "steering_tests.json", "controlled_steering.py"


def steered_features(results: Results) -> list[Document]:
    """The steered features that were active in at least one early cell."""
    features = results.document(STEERING, "summary.json").parts("features")
    return [feature for feature in features if largest_dose(feature) is not None]


def largest_dose(feature: Document) -> Document | None:
    """The result of the largest alpha at which any cell was steered."""
    alphas = feature.ascending("alpha_results")
    steered = [alpha for alpha in alphas if feature.number("alpha_results", alpha, "n_cells_steered")]
    return feature.part("alpha_results", steered[-1]) if steered else None


def positive_share(feature: Document) -> float:
    """Share of the steered cells that shift towards late, at the largest alpha."""
    result = largest_dose(feature)
    return 0.0 if result is None else result.within(0, 1, "frac_positive_shift")


def _last_layer(results: Results) -> Finding:
    features = [feature for feature in steered_features(results) if feature.number("n_blocks_after") == 0]
    if not features:
        return Finding("no feature of the last layer was steered", OPEN, reason="the panel has none that was active")
    late = [positive_share(feature) > 0.5 for feature in features]
    extreme = sum(positive_share(feature) in (0.0, 1.0) for feature in features)
    n_late, n = sum(late), len(late)
    share, (low, high) = n_late / n, proportion_interval(n_late, n)
    off = [moved for feature, moved in zip(features, late, strict=True) if (feature.maybe("switch_d") or 0) < 0]
    ours = f"{n_late} of {n} features move most cells towards late ({sum(off)} of {len(off)} that fall along the "
    ours += f"trajectory); {extreme} of {n} move all cells one way"
    if n_late < n:
        return Finding(ours, FAILS, share, low, high, "the feature's direction decides, not the layer")
    return Finding(ours, OPEN, share, low, high, "no block lies between steering and readout: cells are no evidence")


def _layers(results: Results) -> Finding:
    from scipy.stats import kruskal

    rising = [
        feature
        for feature in steered_features(results)
        if feature.number("n_blocks_after") and (feature.maybe("switch_d") or 0) > 0
    ]
    shares: dict[int, list[float]] = {}
    for feature in rising:
        shares.setdefault(int(feature.number("layer")), []).append(positive_share(feature))
    ours = ", ".join(f"L{layer} {decimal(statistics.fmean(of))}" for layer, of in sorted(shares.items()))
    ours = f"cells moved towards late, mean over features that rise: {ours}" if ours else "no such feature"
    if len(shares) < 2 or min(map(len, shares.values())) < MIN_FEATURES:
        return Finding(ours, OPEN, reason=f"fewer than {MIN_FEATURES} features in a layer")
    values = [value for of in shares.values() for value in of]
    if len(set(values)) == 1:
        return Finding(ours, FAILS, 0.0, reason="no feature differs from another")
    statistic, p = kruskal(*shares.values())
    ours += f"; Kruskal-Wallis {p_value(p)} over {len(values)} features"
    if p < MAX_P:
        return Finding(ours, HOLDS, float(statistic))
    return Finding(ours, OPEN, float(statistic), reason="no difference between layers is seen with so few features")


def _direction(results: Results) -> Finding:
    document = results.maybe(STEERING_TESTS, FILE)
    if document is None:
        return not_measured(f"{STEERING_TESTS}/{FILE}", SCRIPT)
    primary = document.part("primary")
    estimate, (low, high), p = (
        primary.maybe("estimate"),
        (primary.maybe(k) for k in ("low", "high")),
        primary.maybe("p"),
    )
    if estimate is None or p is None:
        return Finding("not tested", OPEN, reason=primary.get("reason", default=None) or "no primary contrast")
    ours = f"{primary.text('name').replace('_', ' ')}: {with_interval(estimate, low, high, fixed)}, {p_value(p)}, "
    ours += f"{count(primary.number('n_on'))} rising and {count(primary.number('n_off'))} falling features"
    beyond = primary.maybe("excess_estimate")
    if beyond is not None:
        ends = (primary.maybe(f"excess_{k}") for k in ("low", "high"))
        ours += f"; beyond what the edit itself adds to the last stream: {with_interval(beyond, *ends, fixed)}"
    verdict = against(low, high, 0.0)
    if verdict == HOLDS and p >= MAX_P:
        verdict = OPEN
    return Finding(ours, verdict, estimate, low, high, "" if verdict != OPEN else "no difference from the controls")


def _dose(results: Results) -> Finding:
    growing = [grows for feature in steered_features(results) if (grows := _grows(feature)) is not None]
    if not growing:
        return Finding("not tested", OPEN, reason="no feature before the last layer was steered at two alphas")
    n_of, n = sum(growing), len(growing)
    low, high = proportion_interval(n_of, n)
    ours = f"the mean shift is larger at every larger alpha for {n_of} of {n} features"
    verdict = against(low, high, 0.5)
    return Finding(f"{ours} ({percent(low)} to {percent(high)})", verdict, n_of / n, low, high)


def _grows(feature: Document) -> bool | None:
    """Whether |mean shift| grows with every alpha; None where that is trivial or not measured."""
    if not feature.number("n_blocks_after"):
        return None
    shifts: Sequence[float] = [
        abs(feature.number("alpha_results", alpha, "mean_state_shift"))
        for alpha in feature.ascending("alpha_results")
        if feature.number("alpha_results", alpha, "n_cells_steered") and float(alpha) > 1
    ]
    return all(a < b for a, b in pairwise(shifts)) if len(shifts) > 1 else None


CLAIMS = (
    Claim(
        "LastLayer",
        "last layer drives maturation",
        "Every feature of the last layer drives cells towards the late state",
        "share of cells {positive_share_L17:.2f} for {n_steered_L17} of {n_steered_L17} features of L17; the revision "
        "finds {revision_positive_share_L17:.2f}",
        "experiment 3",
        "features that fall along the trajectory; the closed form of the last layer",
        "fails where any of its features moves most cells away; cannot hold from cells, which repeat one number",
        _last_layer,
    ),
    Claim(
        "Layers",
        "layer decides direction",
        "The layer decides the direction of steering",
        "share of cells moved towards late, L0, L5, L11, L17: {positive_share_L0:.2f}, {positive_share_L5:.2f}, "
        "{positive_share_L11:.2f}, {positive_share_L17:.2f}",
        "experiment 3",
        "no difference between layers, features as the unit, the last layer left out",
        f"holds where layers differ, p below {MAX_P}",
        _layers,
    ),
    Claim(
        "Direction",
        "rising features move cells on",
        "Features that rise along the trajectory move early cells towards late ones",
        "{steering_n_features} switch features, without controls",
        "controlled_steering.py",
        "features of the same frequency moved by the same norm; other cells than those they were chosen on",
        f"holds where the one declared contrast lies above 0, p below {MAX_P}",
        _direction,
    ),
    Claim(
        "Dose",
        "dose response",
        "Steering grows with its dose",
        "{revision_dose_monotone} of {revision_dose_tested} feature and readout pairs in the revision; untested before",
        "experiment 3 at two alphas or more",
        "as often as not; the last layer, where it is trivial, is left out",
        "holds where more than half of the features grow, interval above one half",
        _dose,
    ),
)
