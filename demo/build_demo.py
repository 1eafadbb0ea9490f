"""Rebuild everything in `demo/` from public packages.

    python demo/build_demo.py

Writes into demo/: cells.h5ad, model/ (config.json, model.safetensors, geneformer/*.pkl), gene_sets/go_bp.gmt,
sae_models/ and quality.json (what each step measured). Downloads one Python package with pip and two Debian
packages with apt-get into demo/.cache/ unless --sources has them.
"""

import argparse
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEMO = Path(__file__).resolve().parent
SOURCE = DEMO.parent / "src"
sys.path.insert(0, str(SOURCE))

from cellcircuits.errors import UserError  # noqa: E402  (src/ has to be on the path first)
from cellcircuits.jsonio import read_json, write_json  # noqa: E402

log = logging.getLogger("build_demo")

SAE_FLAGS = (
    "--cells", "all", "--split-column", "split", "--held-out-value", "held_out",
    "--layers", "0,5,6,11,17", "--k", "8", "--mask-share", "0.05",
)  # fmt: skip

DESCRIPTION = """Rebuild the demo inputs: cells, gene dictionaries, gene sets, a small masked gene model, its SAEs.

steps, in order:
  cells         559 cells of the Python package celltypist -> cells.h5ad                        (10 s)
  dictionaries  tokens, medians and names of the genes, from the train cells -> model/geneformer/  (1 s)
  gene_sets     Gene Ontology biological process, from two Debian packages -> gene_sets/go_bp.gmt (10 s)
  model         train the masked gene model on the train cells -> model/                      (6 min)
  quality       measure it on the held-out cells                                              (1 min)
  saes          SAEs, feature catalogs and labels of five layers -> sae_models/
  map           trace all active layer-5 features in 20 held-out cells, beside a sign-flip null"""

EPILOG = """examples:
  python demo/build_demo.py                              everything
  python demo/build_demo.py --steps quality              measure the model that is there
  python demo/build_demo.py --sources ~/packages         without a network: the folder holds
                                                         celltypist-1.7.1-*.whl, r-bioc-org.hs.eg.db_*.deb and
                                                         r-bioc-go.db_*.deb (or org.Hs.eg.sqlite and GO.sqlite)
  python demo/build_demo.py --out-dir /tmp/demo          leave the committed files alone

A later step needs the files of the earlier ones, from this run or a previous one."""


@dataclass(frozen=True)
class Layout:
    """Where the demo's files lie, and where their sources are."""

    folder: Path
    cache: Path
    given: Path | None

    @property
    def cells(self) -> Path:
        """The cells."""
        return self.folder / "cells.h5ad"

    @property
    def model(self) -> Path:
        """Folder of the model; its dictionaries lie in `geneformer/` below."""
        return self.folder / "model"

    @property
    def gene_sets(self) -> Path:
        """The gene sets."""
        return self.folder / "gene_sets" / "go_bp.gmt"

    @property
    def quality(self) -> Path:
        """What the steps measured."""
        return self.folder / "quality.json"


def make_cells(layout: Layout) -> dict[str, Any]:
    """Step `cells`."""
    import demo_data

    return demo_data.build_cells(demo_data.fetch_sources(layout.cache, layout.given), layout.cells)


def make_dictionaries(layout: Layout) -> dict[str, Any]:
    """Step `dictionaries`."""
    import demo_data

    _require(layout.cells, "cells")
    return demo_data.build_dictionaries(layout.cells, layout.model / "geneformer")


def make_gene_sets(layout: Layout) -> dict[str, Any]:
    """Step `gene_sets`."""
    import demo_data

    tokens = layout.model / "geneformer" / "token_dictionary_demo.pkl"
    _require(layout.cells, "cells")
    _require(tokens, "dictionaries")
    sources = demo_data.fetch_sources(layout.cache, layout.given)
    return demo_data.build_gene_sets(sources, layout.cells, tokens, layout.gene_sets)


def make_model(layout: Layout) -> dict[str, Any]:
    """Step `model`."""
    import train_model

    _require(layout.cells, "cells")
    return train_model.train(train_model.TrainSettings(), layout.cells, _vocabulary(layout), layout.model)


def measure_model(layout: Layout) -> dict[str, Any]:
    """Step `quality`."""
    import model_quality
    import train_model
    from cellcircuits.geneformer import load_model

    _require(layout.cells, "cells")
    _require(layout.model / "model.safetensors", "model")
    vocabulary = _vocabulary(layout)
    train, held_out = (train_model.split_of(layout.cells, vocabulary, split) for split in ("train", "held_out"))
    measured = model_quality.measure(load_model(str(layout.model)).model, train, held_out, vocabulary.mask)
    log.info("%s", model_quality.report(measured))
    return measured


def make_saes(layout: Layout) -> dict[str, Any]:
    """Step `saes`: what a user would run on their own model."""
    _require(layout.model / "model.safetensors", "model")
    _require(layout.gene_sets, "gene_sets")
    # made beside the old ones, which the script would refuse to replace; relative paths, since they are recorded
    fresh = layout.folder / ".fresh"
    shutil.rmtree(fresh, ignore_errors=True)
    parts = {"--model": layout.model, "--data-path": layout.cells, "--data-root": fresh}
    where = [word for flag, path in parts.items() for word in (flag, os.path.relpath(path, layout.folder.parent))]
    gmt = os.path.relpath(layout.gene_sets, layout.folder.parent)
    command = [sys.executable, str(SOURCE / "prepare_inputs.py"), *where, *SAE_FLAGS, "--gmt", f"GO_BP={gmt}"]
    if subprocess.run(command, cwd=layout.folder.parent, check=False).returncode != 0:
        raise UserError("src/prepare_inputs.py failed; its message stands above. Mend that, then: --steps saes")
    shutil.rmtree(layout.folder / "sae_models", ignore_errors=True)
    (fresh / "sae_models").replace(layout.folder / "sae_models")
    shutil.rmtree(fresh)
    results = [read_json(path) for path in sorted((layout.folder / "sae_models").glob("*/results.json"))]
    return {
        f"L{result['layer']}": {key: value for key, value in result["quality"].items() if key != "definitions"}
        | {"labelled": result["annotation"]["rate"], "labelled_by_chance": result["annotation"]["null_rate"]}
        for result in results
    }


def measure_map(layout: Layout) -> dict[str, Any]:
    """Step `map`: trace the demo and compare its edges with those of sign-flipped effects."""
    import demo_map

    _require(layout.folder / "sae_models", "saes")
    return demo_map.measure_map(layout.folder)


STEPS: dict[str, Callable[[Layout], dict[str, Any]]] = {
    "cells": make_cells,
    "dictionaries": make_dictionaries,
    "gene_sets": make_gene_sets,
    "model": make_model,
    "quality": measure_model,
    "saes": make_saes,
    "map": measure_map,
}


def _require(path: Path, step: str) -> None:
    if not path.exists():
        raise UserError(f"{path} is missing; run the step `{step}` first (--steps {step})")


def _vocabulary(layout: Layout) -> Any:
    from cellcircuits.vocabulary import load_vocabulary
    from demo_data import count_tokens

    folder = layout.model / "geneformer"
    _require(folder / "token_dictionary_demo.pkl", "dictionaries")
    return load_vocabulary([folder], count_tokens(folder))


def _step_list(text: str) -> list[str]:
    asked = [step.strip() for step in text.split(",") if step.strip()]
    unknown = [step for step in asked if step not in STEPS]
    if unknown or not asked:
        raise argparse.ArgumentTypeError(
            f"unknown step {', '.join(unknown) or '(none)'}; choose from {', '.join(STEPS)}"
        )
    return [step for step in STEPS if step in asked]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="build_demo.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=_step_list, default=list(STEPS), metavar="STEP,...", help="steps to do (default: all)")
    add("--sources", type=Path, metavar="FOLDER", help="folder that holds the packages (default: download them)")
    add("--out-dir", type=Path, default=DEMO, metavar="FOLDER", help="where to write (default: the folder demo/)")
    add("--cache", type=Path, default=DEMO / ".cache", metavar="FOLDER",
        help="where downloads and unpacked packages are kept, 480 MB (default: demo/.cache)")  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit status."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    layout = Layout(args.out_dir.resolve(), args.cache.resolve(), args.sources.resolve() if args.sources else None)
    try:
        if layout.given is not None and not layout.given.is_dir():
            raise UserError(f"--sources {layout.given}: no such folder")
        for step in args.steps:
            log.info("== %s", step)
            measured = STEPS[step](layout)
            known = read_json(layout.quality) if layout.quality.exists() else {}
            known[step] = measured
            write_json(layout.quality, {name: known[name] for name in STEPS if name in known})
            if step != "quality":
                _show(measured)
    except UserError as error:
        sys.stderr.write(f"build_demo.py: {error}\n")
        return 2
    log.info("done; measured figures are in %s", layout.quality)
    return 0


def _show(measured: dict[str, Any]) -> None:
    for name, value in measured.items():
        log.info("  %-34s %s", name, value)


if __name__ == "__main__":
    sys.exit(main())
