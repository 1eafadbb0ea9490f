"""Whether claims, figures' tables and the paper's numbers are those that the result files give."""

import csv
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from cellcircuits.jsonio import read_json
from cellcircuits.kept_results import Results
from cellcircuits.main_figures import FIGURES, tables, text_hash
from cellcircuits.paper_numbers import MACROS, paper_files
from cellcircuits.study_claims import END, START, judge, markdown, table

RELATIVE, ABSOLUTE = 1e-6, 1e-12
MAX_SHOWN = 3
PDF = "manuscript.pdf"


def differences(results: Results, paper: Path, readme: Path | None) -> Iterator[str]:
    """Each file that is not what the results give, in words.

    Args:
        results: the result files.
        paper: folder of the paper.
        readme: a file with the table of claims between its marks; None leaves that out.

    Raises:
        UserError: a result is missing or malformed.
    """
    content = judge(results)
    claims = results.folder / "claims.json"
    if not claims.is_file() or read_json(claims) != json.loads(json.dumps(content)):
        yield f"{claims}: is not what the results give"
    texts = {results.folder / "claims.md": markdown(content)}
    texts |= {paper / name: text for name, text in paper_files(results).items()}
    for path, text in texts.items():
        if _text(path) != text:
            yield f"{path}: is not what the results give ({_first_difference(_text(path), text)})"
    if readme is not None:
        shown = (_text(readme) or "").partition(START)[2].partition(END)[0].strip("\n")
        if shown != table(content):
            yield f"{readme}: its table of claims is not what the results give"
    made_from = re.findall(r"NumbersHash\}\{(\w+)", _text(paper / MACROS) or "")
    if not made_from or made_from[-1].encode() not in _bytes(paper / PDF):
        yield f"{paper / PDF}: is missing, or was not made from {MACROS}"
    yield from _figure_differences(results, paper / "figures")


def _figure_differences(results: Results, folder: Path) -> Iterator[str]:
    for name, text in tables(results).items():
        path = folder / name
        found = list(_table_differences(_text(path), text))
        if found:
            yield f"{path}: {'; '.join(found[:MAX_SHOWN])}"
    for name in FIGURES:
        made_from = text_hash(_text(folder / f"{name}.csv") or "")
        for suffix in (".pdf", ".png"):
            if made_from.encode() not in _bytes(folder / f"{name}{suffix}"):
                yield f"{folder / name}{suffix}: is missing, or was not drawn from {name}.csv"


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _first_difference(kept: str | None, made: str) -> str:
    if kept is None:
        return "missing or unreadable"
    there, here = kept.splitlines(), made.splitlines()
    line = next((i for i, (a, b) in enumerate(zip(there, here, strict=False)) if a != b), min(len(there), len(here)))
    return f"first in line {line + 1}"


def _table_differences(kept: str | None, made: str) -> Iterator[str]:
    """Cells that differ: numbers beyond the tolerance of another machine's rounding, texts at all."""
    if kept is None:
        yield "missing or unreadable"
        return
    there, here = (list(csv.reader(io.StringIO(text))) for text in (kept, made))
    if len(there) != len(here):
        yield f"has {len(there)} lines where the results give {len(here)}"
        return
    for number, (of_kept, of_made) in enumerate(zip(there, here, strict=True), 1):
        if len(of_kept) != len(of_made) or not all(map(_agree, of_kept, of_made)):
            yield f"line {number} differs"


def _agree(kept: str, made: str) -> bool:
    if kept == made:
        return True
    try:
        return math.isclose(float(kept), float(made), rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    except ValueError:
        return False
