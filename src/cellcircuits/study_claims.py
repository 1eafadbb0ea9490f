"""The study's claims, each against its null, as a pure function of the result files; and the same in plain words."""

from collections.abc import Mapping, Sequence
from typing import Any

from cellcircuits import combination_claims, graph_claims, steering_claims
from cellcircuits.claim import FAILS, HOLDS, OPEN, Claim
from cellcircuits.collected import TRACE, content_hash
from cellcircuits.kept_results import Results
from cellcircuits.wording import count, percent, with_interval

SCHEMA_VERSION = 1
CLAIMS: tuple[Claim, ...] = (*graph_claims.CLAIMS, *combination_claims.CLAIMS, *steering_claims.CLAIMS)
START, END = "<!-- claims: made by check_claims.py -->", "<!-- end of claims -->"


def judge(results: Results) -> dict[str, Any]:
    """Every claim with its verdict, for JSON.

    Raises:
        UserError: a result is missing or malformed; names file and field.
    """
    rows = [claim.judged(results) for claim in CLAIMS]
    return {
        "inputs_name": results.inputs_name,
        "schema_version": SCHEMA_VERSION,
        "results_sha256": content_hash(results.folder),
        "n_claims": len(rows),
        "n_holds": sum(row["verdict"] == HOLDS for row in rows),
        "n_fails": sum(row["verdict"] == FAILS for row in rows),
        "n_open": sum(row["verdict"] == OPEN for row in rows),
        "lines": six_lines(results, rows),
        "claims": rows,
    }


def six_lines(results: Results, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a biologist should take away: how many edges survive, and which claims hold."""
    summary = results.document(TRACE, "exhaustive_summary.json")
    calibration = results.document(TRACE, "calibration.json")
    n_edges, n_calibrated = summary.number("total_edges"), calibration.number("n_edges_calibrated")
    n_hubs, n_kept = calibration.number("n_hubs"), calibration.number("n_hubs_kept")
    rule = calibration.part("published_rule")
    chance = with_interval(rule.maybe("fdr"), *rule.interval("fdr"), percent)
    survive = f" ({percent(n_calibrated / n_edges)})" if n_edges else ""
    by_verdict = {verdict: [row for row in rows if row["verdict"] == verdict] for verdict in (HOLDS, FAILS, OPEN)}
    names = {verdict: "; ".join(row["short"] for row in of) or "none" for verdict, of in by_verdict.items()}
    n_features, layer = count(summary.number("n_features_traced")), summary.get("source_layer")
    return [
        f"{results.inputs_name}: removing each of {n_features} features of layer {layer} gives {count(n_edges)} edges "
        f"by the study's rule; expected by chance: {chance}.",
        f"{count(n_calibrated)} edges{survive} survive a test of their own, corrected over all tests; of the "
        f"{count(n_hubs)} features with most edges {count(n_kept)} stay among them.",
        f"{len(by_verdict[HOLDS])} of {len(rows)} claims hold: {names[HOLDS]}.",
        f"{len(by_verdict[FAILS])} do not hold: {names[FAILS]}.",
        f"{len(by_verdict[OPEN])} cannot be said here: {names[OPEN]}.",
        f"These are verdicts on the {results.inputs_name} by the rules in claims.json, not on other inputs.",
    ]


def table(content: Mapping[str, Any]) -> str:
    """The claims as a Markdown table."""
    lines = [
        f"| claim | published | {content['inputs_name']} | held against | verdict |",
        "|---|---|---|---|---|",
    ]
    for row in content["claims"]:
        ours = row["ours"] + (f" ({row['reason']})" if row["reason"] else "")
        cells = (row["claim"], row["published"], ours, row["null"], f"**{row['verdict']}**")
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines)


def markdown(content: Mapping[str, Any]) -> str:
    """The claims as a Markdown file."""
    lines = "\n".join(f"{i}. {line}" for i, line in enumerate(content["lines"], 1))
    return f"# The study's claims: {content['inputs_name']}\n\n{lines}\n\n{table(content)}\n"
