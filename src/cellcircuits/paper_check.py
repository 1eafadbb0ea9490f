"""Whether claims, figures' tables and the paper's numbers are those that the result files give."""

import csv
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cellcircuits.jsonio import read_json
from cellcircuits.kept_results import PUBLISHED, Results
from cellcircuits.main_figures import FIGURES, tables, text_hash
from cellcircuits.paper_numbers import HASH_START, MACROS, TABLE, paper_files
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
    if not claims.is_file() or not _same(read_json(claims), json.loads(json.dumps(content))):
        yield f"{claims}: is not what the results give"
    made = paper_files(results)
    numbers, _, kept_hash = (_text(paper / MACROS) or "").partition(HASH_START)
    # the hash is of the tables that lie there, whose last digits are another machine's
    texts = {
        results.folder / "claims.md": (_text(results.folder / "claims.md"), markdown(content)),
        results.folder / PUBLISHED.name: (_text(results.folder / PUBLISHED.name), _text(results.published_file) or ""),
        paper / MACROS: (numbers or None, made[MACROS].partition(HASH_START)[0]),
        paper / TABLE: (_text(paper / TABLE), made[TABLE]),
    }
    for path, (kept, text) in texts.items():
        if kept != text:
            yield f"{path}: is not what the results give ({_first_difference(kept, text)})"
    if readme is not None:
        shown = (_text(readme) or "").partition(START)[2].partition(END)[0].strip("\n")
        if shown != table(content):
            yield f"{readme}: its table of claims is not what the results give"
    drawn = [_text(paper / "figures" / f"{name}.csv") or "" for name in FIGURES]
    made_from = text_hash(numbers, _text(paper / TABLE) or "", *drawn)
    if not kept_hash.startswith(f"{made_from}}}") or made_from.encode() not in _bytes(paper / PDF):
        yield f"{paper / PDF}: is missing, or was not made from {MACROS}, {TABLE} and the figures that lie there"
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
        return _close(float(kept), float(made))
    except ValueError:
        return False


def _same(kept: Any, made: Any) -> bool:
    """Whether two JSON contents are the same, numbers within the tolerance."""
    if type(kept) is float and type(made) is float:
        return _close(kept, made)
    if isinstance(kept, dict) and isinstance(made, dict):
        return list(kept) == list(made) and all(map(_same, kept.values(), made.values()))
    if isinstance(kept, list) and isinstance(made, list):
        return len(kept) == len(made) and all(map(_same, kept, made))
    return kept == made


def _close(kept: float, made: float) -> bool:
    return math.isclose(kept, made, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
