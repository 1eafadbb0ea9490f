"""The main figures of a folder of results: PDF, PNG and a table of what is drawn, for each."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from matplotlib.figure import Figure

from cellcircuits.collected import text_file
from cellcircuits.figures import controls, genes, hubs, overview, redundancy, steering, summary
from cellcircuits.figures.style import Point, as_csv, styled
from cellcircuits.jsonio import write_atomically
from cellcircuits.kept_results import Results
from cellcircuits.results import exclusive

# each module has `points(results) -> list[Point]` and `draw(points, inputs_name) -> Figure`
FIGURES: dict[str, ModuleType] = {
    "figure1_overview": overview,
    "figure2_hubs": hubs,
    "figure3_redundancy": redundancy,
    "figure4_steering": steering,
    "figure5_genes": genes,
    "figure6_summary": summary,
    "figure7_controls": controls,
}


def draw_all(results: Results, out_dir: Path, on_figure: Callable[[str], None] = lambda name: None) -> None:
    """Draw every figure into `out_dir`; a file is replaced whole or not at all.

    Args:
        results: what to draw.
        out_dir: created where missing.
        on_figure: called with the name of each figure once its files are there.

    Raises:
        UserError: a result is missing or malformed, or the folder cannot be written.
    """
    inputs_name = results.inputs_name
    points_of = {name: module.points(results) for name, module in FIGURES.items()}  # what is missing stops it here
    with exclusive(out_dir):
        for name, points in points_of.items():
            table = as_csv(points, inputs_name)
            figure = figure_of(name, points, inputs_name)
            with styled():
                _save(figure, out_dir / name, text_hash(table))
            text_file(out_dir / f"{name}.csv", table)
            on_figure(name)


def text_hash(*texts: str) -> str:
    """What a picture or a PDF carries of the tables that it was made from."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:24]


def tables(results: Results) -> dict[str, str]:
    """The table of every figure, by file name.

    Raises:
        UserError: a result is missing or malformed.
    """
    inputs_name = results.inputs_name
    return {f"{name}.csv": as_csv(module.points(results), inputs_name) for name, module in FIGURES.items()}


def figure_of(name: str, points: Sequence[Point], inputs_name: str) -> Figure:
    """One figure, in our style, laid out."""
    with styled():
        figure = FIGURES[name].draw(points, inputs_name)
        figure.draw_without_rendering()  # a second layout, when saved, knows how wide the labels of the first became
        return figure


def _save(figure: Figure, path: Path, made_from: str) -> None:
    pdf, png = path.with_suffix(".pdf"), path.with_suffix(".png")
    # without a date the bytes are the same every time
    facts = {"CreationDate": None, "Keywords": made_from}
    write_atomically(pdf, lambda stream: figure.savefig(stream, format="pdf", metadata=facts))
    write_atomically(png, lambda stream: figure.savefig(stream, format="png", metadata={"Description": made_from}))
