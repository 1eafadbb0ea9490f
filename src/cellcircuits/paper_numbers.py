"""The numbers of the paper as TeX macros, and its table of claims: pure functions of the result files."""

import re
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cellcircuits.collected import PAIRS, SELECTIVE, STEERING, STEERING_TESTS, TRACE, TRAJECTORY, TRIPLETS
from cellcircuits.jsonio import read_json
from cellcircuits.kept_results import Document, Results, all_triplets
from cellcircuits.main_figures import tables, text_hash
from cellcircuits.study_claims import judge
from cellcircuits.wording import count, decimal, p_value, percent, with_interval

MACROS, TABLE = "macros.tex", "claims_table.tex"
HEAD = "% Made by make_paper_numbers.py from the result files; do not edit.\n"
HASH_START = "\\newcommand{\\NumbersHash}{"  # of numbers, claims and figures' tables; the PDF carries it
UNKNOWN = "not defined"
DIGITS = ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")
SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "…": r"\dots{}", "\N{MINUS SIGN}": "--",
}  # fmt: skip


def tex(text: str) -> str:
    """A text as TeX prints it; what is no ASCII and has no macro here becomes `?`."""
    escaped = "".join(SPECIAL.get(char, char) for char in text)
    with_minus = re.sub(r"(?<![\w-])-(?=\d)", "$-$", escaped)
    return with_minus.encode("ascii", errors="replace").decode()


def paper_files(results: Results) -> dict[str, str]:
    """The files that the manuscript reads, by name.

    Raises:
        UserError: a result is missing or malformed.
    """
    content = judge(results)
    numbers, rows = macros(results, content), claims_table(content)
    made_from = text_hash(numbers, rows, *tables(results).values())
    return {MACROS: f"{numbers}{HASH_START}{made_from}}}\n", TABLE: rows}


def macros(results: Results, claims: Mapping[str, Any]) -> str:
    r"""`\newcommand` lines for every number of the text.

    Raises:
        UserError: a result is missing or malformed.
    """
    values = {"InputsName": results.inputs_name}
    for source in (_trace, _graph, _combinations, _steering, _origin):
        values.update(source(results))
    values.update(_published(results.published_file))
    values.update(_claims(claims))
    values["ResultsHash"] = claims["results_sha256"][:12]
    return HEAD + "".join(f"\\newcommand{{\\{name}}}{{{tex(value)}}}\n" for name, value in values.items())


def _form(value: float | None, form: Callable[[float], str] = decimal) -> str:
    return UNKNOWN if value is None else form(value)


def _trace(results: Results) -> Iterator[tuple[str, str]]:
    summary = results.document(TRACE, "exhaustive_summary.json")
    settings = results.document(TRACE, "manifest.json").part("settings")
    calibration = results.document(TRACE, "calibration.json")
    rule = calibration.part("published_rule")
    n_edges, n_calibrated = summary.number("total_edges"), calibration.number("n_edges_calibrated")
    yield "SourceLayer", count(summary.number("source_layer"))
    yield "TargetLayers", ", ".join(map(count, settings.numbers("downstream_layers")))
    yield "NCells", count(settings.number("n_cells"))
    yield "NFeatures", count(summary.number("n_features_traced"))
    yield "NEdges", count(n_edges)
    yield "MeanEdges", decimal(summary.number("mean_edges_per_feature"), 1)
    yield "MedianEdges", f"{summary.number('median_edges_per_feature'):g}"
    yield "MaxEdges", count(summary.number("max_edges"))
    yield "NWithoutEdge", count(summary.number("n_zero_edge_features"))
    yield "MinAbsD", f"{settings.number('min_abs_d'):g}"
    yield "MinConsistency", f"{settings.number('min_consistency'):g}"
    yield "NDraws", count(settings.number("calibration", "n_draws"))
    yield "MinCells", count(settings.number("calibration", "min_cells"))
    yield "NTests", count(calibration.number("n_tests"))
    yield "ChanceShare", _form(rule.maybe("fdr"), percent)
    for end, value in zip(("Low", "High"), rule.interval("fdr"), strict=True):
        yield f"ChanceShare{end}", _form(value, percent)
    yield "NEdgesBH", count(calibration.number("n_edges_bh"))
    yield "NCalibrated", count(n_calibrated)
    yield "CalibratedShare", percent(n_calibrated / n_edges) if n_edges else UNKNOWN
    yield "NHubs", count(calibration.number("n_hubs"))
    yield "NHubsKept", count(calibration.number("n_hubs_kept"))


def _graph(results: Results) -> Iterator[tuple[str, str]]:
    statistics_file = results.document(TRACE, "graph_statistics.json")
    yield "Gini", _form(statistics_file.maybe("degree", "gini"))
    law = ("tail", "result", "power_law")
    found = statistics_file.get(*law, default=None) is not None
    yield "TailAlpha", _form(statistics_file.maybe(*law, "alpha") if found else None)
    yield "TailStart", _form(statistics_file.maybe(*law, "x_min") if found else None, count)
    yield "TailP", _form(statistics_file.maybe(*law, "p") if found else None, p_value)
    frequency = ("drivers", "result", "rank_correlations", "activation_freq", "spearman")
    yield "FrequencyRho", _form(statistics_file.maybe(*frequency, "rho"))
    alone = ("drivers", "result", "model", "terms", "activation_freq", "deviance_explained_alone")
    yield "FrequencyDeviance", _form(statistics_file.maybe(*alone), percent)
    yield "NAnnotated", _form(statistics_file.maybe("annotation", "n_annotated"), count)


def _combinations(results: Results) -> Iterator[tuple[str, str]]:
    pairs = results.document(PAIRS, "summary.json")
    triplets = results.document(TRIPLETS, "summary.json")
    selective = results.document(SELECTIVE, "selective_summary.json")
    yield "NSelective", count(selective.number("n_features"))
    for name, records, key in (
        ("Pair", [*pairs.parts("per_pair_results"), *pairs.parts("control_pair_results")], "ratio_median"),
        ("Triplet", all_triplets(triplets), "threeway_ratio"),
    ):
        yield f"N{name}s", count(len(records))
        yield f"{name}Ratio", _median(records, key)
        yield f"{name}RatioAdditive", _median(records, f"{key}_if_additive")
    yield "CombinationTarget", f"{pairs.get('config', 'target_layer', default=UNKNOWN)}"


def _median(records: list[Document], key: str) -> str:
    values = [value for record in records if (value := record.maybe(key)) is not None]
    return decimal(statistics.median(values)) if values else UNKNOWN


def _steering(results: Results) -> Iterator[tuple[str, str]]:
    settings = results.document(STEERING, "manifest.json").part("settings")
    trajectory = results.document(TRAJECTORY, "trajectory_summary.json")
    yield "NTrajectoryCells", count(settings.number("n_cells"))
    yield "NEarly", count(settings.number("n_early_cells"))
    yield "NLate", count(settings.number("n_late_cells"))
    yield "Alphas", " and ".join(f"{alpha:g}" for alpha in settings.numbers("alphas"))
    yield "NSteered", count(results.document(STEERING, "summary.json").number("n_features"))
    yield "RhoGenes", _form(trajectory.maybe("confounds", "n_genes_detected", "rho"))
    yield "RhoDepth", _form(trajectory.maybe("confounds", "depth", "rho"))
    tests = results.maybe(STEERING_TESTS, "steering_tests.json")
    keys = (("primary", f"excess_{key}") for key in ("estimate", "low", "high"))
    yield "BeyondDirect", "not measured" if tests is None else with_interval(*(tests.maybe(*key) for key in keys))


def _origin(results: Results) -> Iterator[tuple[str, str]]:
    origin = results.document(TRACE, "manifest.json").parts("provenance")[-1]
    yield "ModelSource", str(origin.get("model", "source", default=UNKNOWN))
    yield "CodeHash", str(origin.get("code", default=UNKNOWN))[:12]
    yield "TorchVersion", str(origin.get("versions", "torch", default=UNKNOWN))
    yield "TransformersVersion", str(origin.get("versions", "transformers", default=UNKNOWN))


def _published(path: Path) -> Iterator[tuple[str, str]]:
    facts = Document(path, read_json(path)).part("facts")
    for name in facts.content:
        value = facts.number(name, "value")
        yield f"Pub{macro_name(name)}", published_number(value)
        if isinstance(value, float) and value <= 1:
            yield f"Pub{macro_name(name)}Percent", percent(value)


def published_number(value: float) -> str:
    """As many decimals as were published, two at least below 1 and three at most."""
    if isinstance(value, int) or (value == int(value) and abs(value) > 1):
        return count(value)
    n_decimals = len(repr(value).partition(".")[2])
    return f"{value:.{min(3 if abs(value) < 1 else 2, max(n_decimals, 2 if abs(value) <= 1 else 1))}f}"


def macro_name(name: str) -> str:
    """`positive_share_L17` as `PositiveShareLOneSeven`: names of TeX macros have letters only."""
    words = "".join(word[:1].upper() + word[1:] for word in name.split("_"))
    return re.sub(r"\d", lambda found: DIGITS[int(found.group())], words)


def _claims(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "NClaims", count(content["n_claims"])
    yield "NClaimsHold", count(content["n_holds"])
    yield "NClaimsFail", count(content["n_fails"])
    yield "NClaimsOpen", count(content["n_open"])
    for row in content["claims"]:
        name = f"Claim{row['name']}"
        yield name, row["claim"]
        yield f"{name}Ours", row["ours"] + (f" ({row['reason']})" if row["reason"] else "")
        estimate = with_interval(*(row[f"estimate{end}"] for end in ("", "_low", "_high")))
        yield f"{name}Estimate", row["ours"] if row["estimate"] is None else estimate
        yield f"{name}Verdict", row["verdict"]
        yield f"{name}Rule", row["rule"]


def claims_table(content: Mapping[str, Any]) -> str:
    """The rows of the table of claims."""
    rows = []
    for row in content["claims"]:
        ours = row["ours"] + (f" ({row['reason']})" if row["reason"] else "")
        cells = [tex(row["claim"]), tex(row["published"]), f"{tex(ours)}", tex(row["null"]), tex(row["verdict"])]
        rows.append(" & ".join(cells) + r" \\")
    return HEAD + "\n\\addlinespace\n".join(rows) + "\n"
