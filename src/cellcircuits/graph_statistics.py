"""All statistics of a graph's degrees in one table, the tests corrected together, and the report in words."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from scipy.stats import false_discovery_control

from cellcircuits.annotation_centrality import annotation_statistics
from cellcircuits.degree_model import drivers
from cellcircuits.degree_summary import degree_summary
from cellcircuits.degree_table import DegreeTable
from cellcircuits.degree_tail import tail_statistics, whole_distribution

SCHEMA_VERSION = 1
LIBRARIES = ("numpy", "scipy", "statsmodels", "igraph")
DEFINITIONS = {
    "degree": "edges out of a source feature; intervals are 95% percentiles over resamples of the features",
    "gini": "0 where all degrees are equal, near 1 where one feature has every edge",
    "tail.p": "share (+ 1) of data sets drawn from the fitted power law, each fitted anew with its own x_min, whose "
    "Kolmogorov-Smirnov distance reaches the observed one; below 0.1 a power law is rejected, above it is compatible, "
    "which is not evidence for it",
    "tail.alternatives": "fitted to the same tail; statistic is Vuong's z, above 0 in favour of the power law, or, for "
    "the power law with a cut-off, twice the gain in log-likelihood, whose p allows for the limit at no cut-off",
    "distribution": "all degrees of at least 1; zeros are counted apart; a lower AIC is nearer",
    "drivers.rank_correlations": "Spearman; given the others: Pearson correlation of what a linear fit on the ranks of "
    "the others leaves of the ranks",
    "drivers.model": "degree on natural splines of the log10 predictors, 3 degrees of freedom each; deviance "
    "explained is 1 - deviance / deviance of the constant model; added last: beside all other predictors",
    "annotation.top.fisher": "two-sided exact test of the top features against all others, conditional odds ratio",
    "annotation.top.matched": "expected is the share among other features within the caliper of log10 frequency, no "
    "feature twice; p by draws among features of the same frequency, never 0; top features without a match are out",
    "annotation.logistic_model": "annotated on natural splines of log10 frequency and log(1 + degree); "
    "likelihood-ratio tests of each beside the other",
    "annotation.auc_of_degree": "chance that an annotated feature has more edges than an unannotated one; DeLong",
    "tests": "one family; p_holm bounds the chance of any false claim, q_bh the expected share of false ones",
}


@dataclass(frozen=True)
class GraphSettings:
    """What the numbers depend on beside the tables.

    Attributes:
        seed: of every draw.
        p_precision: of the tail's goodness-of-fit p.
        n_bootstrap: resamples for the interval of alpha and x_min.
        caliper: how far the log10 frequency of a match may lie.
    """

    seed: int = 0
    p_precision: float = 0.01
    n_bootstrap: int = 200
    caliper: float = 0.1


def graph_statistics(table: DegreeTable, settings: GraphSettings) -> dict[str, Any]:
    """Compute every statistic; what these data cannot say is null beside a `reason`."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "of": table.title,
        "settings": asdict(settings),
        "software": {name: version(name) for name in LIBRARIES},
        "features": {"n": len(table.features), **table.notes},
        "degree": degree_summary(table.degrees, settings.seed),
        "tail": tail_statistics(table.degrees, settings.p_precision, settings.n_bootstrap, settings.seed),
        "distribution": whole_distribution(table.degrees),
        "drivers": drivers(table),
        "annotation": annotation_statistics(table, settings.caliper, settings.seed),
    }
    return {**content, "tests": family_of_tests(content), "definitions": DEFINITIONS}


def family_of_tests(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every test of what drives degree and of annotation, with Holm's p and Benjamini-Hochberg's q over all."""
    from statsmodels.stats.multitest import multipletests

    found = [(name, p) for name, p in _named_tests(content) if p is not None]
    if not found:
        return []
    p_values = [p for _, p in found]
    holm = multipletests(p_values, method="holm")[1].tolist()
    q_values = false_discovery_control(p_values).tolist()
    rows = zip(found, holm, q_values, strict=True)
    return [{"test": name, "p": p, "p_holm": p_holm, "q_bh": q} for (name, p), p_holm, q in rows]


def _named_tests(content: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    result = content["drivers"]["result"] or {}
    for name, term in result.get("model", {}).get("terms", {}).items():
        yield f"drivers.{name}.added_last", term["added_last"]["p"]
    result = content["annotation"]["result"]
    if result is None:
        return
    for name, top in result["top"].items():
        if top["result"]:
            yield f"annotation.{name}.fisher", top["result"]["fisher"]["p"]
            yield f"annotation.{name}.matched", top["result"]["matched"]["p"]
    model = result["logistic_model"]["result"] or {}
    for name in ("frequency_given_degree", "degree_given_frequency"):
        if name in model:
            yield f"annotation.logistic_model.{name}", model[name]["p"]
    yield "annotation.auc_of_degree", result["auc_of_degree"]["p"]


def report_lines(content: Mapping[str, Any]) -> Iterator[str]:
    """The results as text for the terminal, line by line."""
    degree = content["degree"]
    gini = "undefined" if degree["gini"] is None else f"{degree['gini']:.2f}"
    yield (
        f"{content['of']}: {degree['n']:,} features, mean degree {degree['mean']:.1f}, median {degree['median']:g}, "
        f"max {degree['max']:,}, {degree['n_zero']} without an edge, Gini {gini}"
    )
    for name in ("tail", "distribution"):
        part = content[name]
        verdict = part["result"]["verdict"] if part["result"] else f"The {name} was not fitted: {part['reason']}."
        yield f"  {verdict}"
    yield from _driver_lines(content["drivers"])
    yield from _annotation_lines(content["annotation"])
    family = content["tests"]
    kept = [entry["test"] for entry in family if entry["p_holm"] < 0.05]
    if family:
        named = f": {', '.join(kept)}" if kept else ""
        yield f"  Of {len(family)} tests, {len(kept)} hold after Holm's correction{named}"


def _driver_lines(part: Mapping[str, Any]) -> Iterator[str]:
    if part["result"] is None:
        yield f"  What drives degree: not computed, {part['reason']}."
        return
    terms = part["result"]["model"].get("terms", {})
    for name, correlation in part["result"]["rank_correlations"].items():
        rho = correlation["spearman"]["rho"]
        line = f"  Degree with {name}: " + ("no correlation is defined" if rho is None else f"Spearman {rho:.2f}")
        if name in terms:
            term = terms[name]
            line += f", explains {100 * term['deviance_explained_alone']:.0f}% of the deviance alone"
            if len(terms) > 1:
                line += f" and {100 * term['deviance_explained_added_last']:.1f}% beside the others"
        yield line
    if "reason" in part["result"]["model"]:
        yield f"  Model of degree: not computed, {part['result']['model']['reason']}."


def _annotation_lines(part: Mapping[str, Any]) -> Iterator[str]:
    result = part["result"]
    if result is None:
        yield f"  Annotation against degree: not computed, {part['reason']}."
        return
    yield f"  Annotated: {part['n_annotated']:,} of {part['n']:,} ({100 * result['annotated_share']:.0f}%)"
    for top in result["top"].values():
        if top["result"] is None:
            continue
        fisher, matched = top["result"]["fisher"], top["result"]["matched"]
        line = f"    the {top['k']} of highest degree: {100 * top['result']['annotated_share']:.0f}%"
        line += f", Fisher p {fisher['p']:.2g}"
        if matched["p"] is None:
            line += f"; no frequency-matched comparison, {matched['reason']}"
        else:
            line += f"; {matched['n_matched']} matched in frequency: {100 * matched['observed_share']:.0f}% against "
            line += f"{100 * matched['expected_share']:.0f}% expected, p {matched['p']:.2g}"
        yield line
    model = result["logistic_model"]
    if model["result"]:
        p = model["result"]["degree_given_frequency"]["p"]
        yield "    degree beside frequency in one logistic model: " + ("not testable" if p is None else f"p {p:.2g}")
    else:
        yield f"    no logistic model, {model['reason']}"
