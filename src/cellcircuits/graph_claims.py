"""The claims about the graph of single ablations: density, coverage, hubs, layers, specificity."""

import numpy as np

from cellcircuits.claim import FAILS, HOLDS, OPEN, Claim, Finding, against, not_measured, resampled
from cellcircuits.collected import BY_LAYER, SELECTIVE, SPECIFICITY, TRACE
from cellcircuits.kept_features import traced_features
from cellcircuits.kept_results import Document, Results
from cellcircuits.wording import count, decimal, p_value, percent, with_interval

MAX_CHANCE_SHARE = 0.1
MAX_RATIO = 2.0  # less than twice as many edges is no difference in kind
MIN_FADE = 0.1
MIN_RHO = 0.3
MAX_P = 0.05
MIN_TAIL_P = 0.1  # Clauset, Shalizi and Newman, SIAM Review 51, 661 (2009): below, a power law is ruled out
CONTROLS = {
    "random": "random directions",
    "random_covariance": "random directions with the stream's covariance",
    "other_feature": "directions of other features",
    "shuffled_positions": "the same direction elsewhere",
}


def _dense(results: Results) -> Finding:
    summary = results.document(TRACE, "exhaustive_summary.json")
    calibration = results.document(TRACE, "calibration.json")
    n_edges, n_calibrated = summary.number("total_edges"), calibration.number("n_edges_calibrated")
    rule = calibration.part("published_rule")
    share, (low, high) = rule.maybe("fdr"), rule.interval("fdr")
    kept = f", {count(n_calibrated)} ({percent(n_calibrated / n_edges)}) calibrated" if n_edges else ""
    ours = (
        f"{count(n_edges)} edges of {count(summary.number('n_features_traced'))} features, "
        f"{with_interval(share, low, high, percent)} expected by chance{kept}"
    )
    verdict = {HOLDS: FAILS, FAILS: HOLDS, OPEN: OPEN}[against(low, high, MAX_CHANCE_SHARE)]
    reason = "too few edges or cells for the share that chance gives" if verdict == OPEN else ""
    return Finding(ours, verdict, share, low, high, reason)


def _targets(document: Document, layer: int) -> list[int] | None:
    """Target layers of the trace of a source layer; None where that layer was not traced."""
    of_layer = [source for source in document.parts("sources") if source.get("source_layer") == layer]
    return [int(target.number("target_layer")) for target in of_layer[0].parts("layers")] if of_layer else None


def _coverage(results: Results) -> Finding:
    layer = int(results.document(TRACE, "exhaustive_summary.json").number("source_layer"))
    summary = results.document(SELECTIVE, "selective_summary.json")
    chosen = [f.number("n_edges") for f in summary.parts("features") if f.get("layer") == layer]
    degrees = [feature.degree for feature in traced_features(results)]
    targets = [_targets(results.document(name, BY_LAYER), layer) for name in (TRACE, SELECTIVE)]
    if not chosen or not degrees or not sum(chosen):
        return Finding("no comparison", OPEN, reason=f"the selective trace has no edge from layer {layer}")
    total = f"{count(sum(degrees))} edges of all {count(len(degrees))} features, {count(sum(chosen))} of {len(chosen)}"
    total += f" chosen ones ({decimal(sum(degrees) / sum(chosen), 1)} times as many)"
    if targets[0] != targets[1]:
        return Finding(total, OPEN, reason="the two traces read different target layers")
    found = resampled([degrees, chosen], lambda x: x[0].mean(axis=-1) / np.maximum(x[1].mean(axis=-1), 1e-12))
    ours = f"{total}; edges per feature, all over chosen: {with_interval(*found)}"
    verdict = HOLDS if found[1] > 1 else FAILS if found[2] < MAX_RATIO else OPEN
    reasons = {OPEN: f"the interval contains 1 and {MAX_RATIO}", FAILS: "more features were traced, no other kind"}
    return Finding(ours, verdict, *found, reasons.get(verdict, ""))


def _tail(results: Results) -> Finding:
    tail = results.document(TRACE, "graph_statistics.json").part("tail")
    if tail.get("result") is None:
        return Finding("no tail was fitted", OPEN, reason=tail.text("reason"))
    law = tail.part("result", "power_law")
    p, alpha = law.maybe("p"), law.number("alpha")
    low, high = (law.maybe("alpha_interval", i) for i in (0, 1))
    better = [a.text("name").replace("_", " ") for a in tail.parts("result", "alternatives") if a.get("favoured")]
    ours = (
        f"alpha {with_interval(alpha, low, high)} from degree {count(law.number('x_min'))} on "
        f"({percent(law.number('share_of_features'))} of the features), " + ("no p" if p is None else p_value(p))
    )
    if p is None or p < MIN_TAIL_P:
        return Finding(ours, OPEN if p is None else FAILS, alpha, low, high, "" if p else "the fit has no p")
    favoured = [a.get("favoured") for a in tail.parts("result", "alternatives")]
    if favoured and all(name == "power_law" for name in favoured):
        return Finding(ours, HOLDS, alpha, low, high)
    against_it = f"compatible with the tail, but not better than {len(favoured) - favoured.count('power_law')} of "
    against_it += f"{len(favoured)} other forms" + (f" ({', '.join(better)} preferred)" if better else "")
    return Finding(ours, OPEN, alpha, low, high, against_it)


def _annotation(results: Results) -> Finding:
    annotation = results.document(TRACE, "graph_statistics.json").part("annotation")
    top = annotation.get("result", "top", "top_20", default=None) if annotation.get("result") else None
    if not isinstance(top, dict) or not top.get("result"):
        return Finding("not computed", OPEN, reason="too few annotated features for a comparison")
    found = annotation.part("result", "top", "top_20", "result")
    share, (low, high) = found.number("annotated_share"), (found.maybe("annotated_share_interval", i) for i in (0, 1))
    p, expected = found.maybe("matched", "p"), found.maybe("matched", "expected_share")
    ours = f"{with_interval(share, low, high, percent)} of the top 20 annotated"
    if p is None or expected is None:
        return Finding(ours, OPEN, share, low, high, "no feature of the same frequency to compare with")
    observed = found.number("matched", "observed_share")
    ours += f"; {percent(observed)} where {percent(expected)} are expected, {p_value(p)}"
    if p < MAX_P:
        return Finding(ours, HOLDS if observed < expected else FAILS, share, low, high)
    n = f"{count(annotation.number('n_annotated'))} of {count(annotation.number('n'))} features are annotated"
    return Finding(ours, OPEN, share, low, high, f"no difference from features that fire as often; {n}")


def _frequency(results: Results) -> Finding:
    drivers = results.document(TRACE, "graph_statistics.json").part("drivers")
    if drivers.get("result") is None or drivers.get("result", "rank_correlations", "activation_freq", default=0) == 0:
        return Finding("not computed", OPEN, reason=drivers.get("reason", default="no activation frequency is known"))
    spearman = drivers.part("result", "rank_correlations", "activation_freq", "spearman")
    rho, (low, high) = spearman.maybe("rho"), (spearman.maybe("interval", i) for i in (0, 1))
    alone = drivers.maybe("result", "model", "terms", "activation_freq", "deviance_explained_alone")
    ours = f"degree with activation frequency: rank correlation {with_interval(rho, low, high)}"
    ours += f"; frequency alone explains {percent(alone)} of the deviance" if alone is not None else ""
    verdict = {HOLDS: FAILS, FAILS: HOLDS, OPEN: OPEN}[against(low, high, MIN_RHO)]
    return Finding(ours, verdict, rho, low, high, "" if verdict != OPEN else f"the interval contains {MIN_RHO}")


def _attenuation(results: Results) -> Finding:
    source = results.document(TRACE, BY_LAYER).parts("sources")[0]
    name = "last_over_first"
    value, (low, high) = source.maybe(name), source.interval(name)
    layers = source.parts("layers")
    shares = ", ".join(f"L{of.get('target_layer')} {count(of.number('n_edges'))}" for of in layers)
    if value is None:
        return Finding(f"edges to {shares}", OPEN, reason=source.text("reason"))
    ours = f"edges to {shares}; last over first layer {with_interval(value, low, high)}"
    if low is None or high is None:
        return Finding(ours, OPEN, value, reason="the ratio has no interval")
    verdict = HOLDS if high < 1 else FAILS if low > 1 - MIN_FADE else OPEN
    return Finding(
        ours, verdict, value, low, high, "" if verdict != OPEN else f"the interval contains 1 and {1 - MIN_FADE}"
    )


def _specific(results: Results) -> Finding:
    document = results.maybe(SPECIFICITY, "specificity.json")
    if document is None:
        return not_measured("specificity.json", "specificity_controls.py")
    controls = {key: document.part("controls", key) for key in CONTROLS if document.get("controls", key, default=None)}
    known = {
        key: of for key, of in controls.items() if None not in (of.maybe("edge_ratio"), *of.interval("edge_ratio"))
    }
    if not known:
        return Finding("no control has a ratio", OPEN, reason="too few features with edges")
    ratios = {key: (of.number("edge_ratio"), *of.interval("edge_ratio")) for key, of in known.items()}
    ours = "edges of the feature over those of " + "; ".join(
        f"{CONTROLS[key]}: {with_interval(*ratio)}" for key, ratio in ratios.items()
    )
    hardest = min(known, key=lambda key: known[key].number("edge_ratio_low"))
    strength = known[hardest].maybe("effect_norm_ratio")
    if strength is not None:
        strengths = (strength, *known[hardest].interval("effect_norm_ratio"))
        ours += f"; its mean effects over those of {CONTROLS[hardest]}: {with_interval(*strengths)}"
    shared, expected = (known[hardest].maybe(f"jaccard_{name}") for name in ("mean", "expected"))
    if shared is not None and expected is not None:
        ours += f"; targets shared with {CONTROLS[hardest]}: Jaccard {decimal(shared)}, {decimal(expected)} by chance"
    low, high = known[hardest].number("edge_ratio_low"), known[hardest].number("edge_ratio_high")
    verdict = HOLDS if low > 1 else FAILS if high < MAX_RATIO else OPEN
    return Finding(ours, verdict, *ratios[hardest], f"the hardest control: {CONTROLS[hardest]}")


CLAIMS = (
    Claim(
        "Dense",
        "dense graph",
        "Removing one feature changes many later features: the graph is dense",
        "{n_edges:,} edges, {edges_mean:.0f} per feature",
        "experiment 1",
        "effects with their signs flipped cell by cell; the interval resamples the cells",
        f"holds where at most {percent(MAX_CHANCE_SHARE)} of the edges are expected by chance, whole interval",
        _dense,
    ),
    Claim(
        "Coverage",
        "iceberg",
        "Selective tracing shows the tip of an iceberg: more edges than its fewer features explain",
        "{n_edges:,} against {selective_edges:,} edges, {iceberg_ratio:.0f} times as many; the latter cut at "
        "{selective_cut} per feature and layer",
        "experiment 1, and selective tracing of the same source layer, cells and target layers",
        "as many edges per feature as a chosen one has; the interval resamples the features",
        f"holds where a feature has more edges than a chosen one, interval above 1; fails below {MAX_RATIO}",
        _coverage,
    ),
    Claim(
        "Tail",
        "scale-free degrees",
        "Degrees have a heavy, scale-free tail",
        "called scale-free-like; withdrawn in the revision (alpha {revision_tail_alpha} on {revision_tail_n} features)",
        "experiment 1, analyse_graph.py",
        "data drawn from the fitted power law, and other forms fitted to the same tail",
        f"holds where p is above {MIN_TAIL_P} and every other form is worse; fails where p is below",
        _tail,
    ),
    Claim(
        "Annotation",
        "hubs lack annotation",
        "Hubs lack annotation more than other features",
        "{top_20_unannotated} of the top 20 unannotated, as {unannotated_share:.0%} of all are",
        "experiment 1, annotations, analyse_graph.py",
        "features that fire as often",
        f"holds where fewer of the top 20 are annotated than of features that fire as often, p below {MAX_P}",
        _annotation,
    ),
    Claim(
        "Biology",
        "hubs for biology",
        "Hubs are hubs for their biology and not for how often they fire",
        "hubs read as biology; the revision finds rank correlation {revision_frequency_rho} with activation frequency",
        "experiment 1, activation frequencies, analyse_graph.py",
        "activation frequency alone",
        f"fails where the rank correlation of degree with frequency is above {MIN_RHO}, whole interval",
        _frequency,
    ),
    Claim(
        "Attenuation",
        "effects fade over layers",
        "Effects fade over layers",
        "edges to L6, L11, L17: {edges_to_layer_6:,}, {edges_to_layer_11:,}, {edges_to_layer_17:,}",
        "experiment 1",
        "as many edges to the last as to the first target layer; the interval resamples the source features",
        f"holds where the last layer has fewer edges than the first, interval below 1; fails above {1 - MIN_FADE}",
        _attenuation,
    ),
    Claim(
        "Specific",
        "edges specific to the feature",
        "Edges are of the feature, not of any push of that size",
        "{revision_control_null_edges} edges per feature for random directions of the same size, drawn anew at every "
        "position ({revision_sign_flip_null_edges} with signs flipped)",
        "experiment 1, specificity_controls.py",
        "edits of the same size along one fixed direction per feature",
        f"holds where the feature has more edges than every control, the hardest above 1; fails below {MAX_RATIO}",
        _specific,
    ),
)
