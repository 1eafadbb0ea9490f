"""From inputs to a design: open everything, choose features in the first half, train the probe, declare the test."""

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellcircuits import controlled_results
from cellcircuits.activations import stream
from cellcircuits.controlled_inputs import Halves, ProbeCells, open_halves, open_probe_cells
from cellcircuits.controlled_run import Design, SteeredFeature
from cellcircuits.errors import UserError
from cellcircuits.first_half import CleanMeans, clean_means
from cellcircuits.geneformer import head_parts
from cellcircuits.genes import gene_id
from cellcircuits.inputs import LayerSAE, ModelAndCells, open_cells, open_model, open_saes
from cellcircuits.jsonio import write_json
from cellcircuits.manifest import require_same_origin
from cellcircuits.maturity_probe import PROBE_FILE, Probe, fit_probe, kept_probe, write_probe
from cellcircuits.panel import PanelFeature, check_indices, check_layers
from cellcircuits.state_shift import LogitMap
from cellcircuits.steering_controls import MIN_CELLS_SHARE, Dose, candidates
from cellcircuits.steering_readouts import (
    DEFINITIONS,
    MarkerPanel,
    MarkerTokens,
    StateReadouts,
    marker_tokens,
    read_markers,
)
from cellcircuits.switch_features import OFF, ON, CellOrder, SwitchRule, layer_statistics, switch_features
from cellcircuits.trajectory import Trajectory, open_trajectory, provenance
from cellcircuits.trajectory_flags import trajectory_selection
from cellcircuits.trajectory_root import read_run_counts

if TYPE_CHECKING:
    from cellcircuits.switch_features import LayerStatistics

log = logging.getLogger(__name__)
SWITCHES_FILE = "switch_features.json"
CONTROL_DEFINITIONS = {
    "random_feature": "another feature of the layer, drawn at random, along its decoder direction at its own active "
    "positions",
    "frequency_matched": "the same for the features nearest in log activation frequency in the first half's early "
    "cells, so that about as many positions are moved; none serves two features of the panel",
    "random_direction": "a random direction, the same in all cells, at the feature's own positions",
    "all": "edits of the same length as the feature's, in those of the steered cells where they move something: the "
    "mean of a control feature is over the cells in which it is active itself, and tests over cells take those with "
    "both; control features are not of the panel and "
    f"are active in at least {MIN_CELLS_SHARE:.0%} of the first half's early cells; active means a latent above 0",
}


@dataclass(frozen=True)
class Study:
    """Everything that a run reads, opened and checked; `panel` None where it is to be chosen by `rule`."""

    opened: ModelAndCells
    layers: Mapping[int, LayerSAE]
    trajectory: Trajectory
    halves: Halves
    probe_cells: ProbeCells
    markers: MarkerTokens
    panel: tuple[PanelFeature, ...] | None
    rule: SwitchRule

    def doses(self, args: argparse.Namespace) -> tuple[Dose, ...]:
        """The doses asked for: shares of the stream's norm, then alphas, both ascending."""
        return (*(Dose(norm=norm) for norm in args.doses), *(Dose(alpha=alpha) for alpha in args.alphas))

    def largest_dose(self, args: argparse.Namespace) -> Dose:
        """The dose of the primary test: the largest norm, or the largest alpha; of two as large the one above."""
        if args.doses:
            return Dose(norm=max(args.doses, key=lambda norm: (abs(norm), norm)))
        return Dose(alpha=max(args.alphas, key=lambda alpha: (abs(alpha - 1), alpha)))

    def provenance(self) -> dict[str, Any]:
        """Where the numbers come from, for the record."""
        return {
            **provenance(self.opened, self.trajectory, self.layers),
            "probe": {"cells": self.probe_cells.source, "n_cells": len(self.probe_cells.cells)},
        }


def open_study(args: argparse.Namespace, panel: tuple[PanelFeature, ...] | None) -> Study:
    """Open model, SAEs, cells, trajectory, halves, probe cells and markers.

    Raises:
        UserError: one of them is missing, damaged, or does not fit.
    """
    markers = MarkerPanel() if args.markers is None else read_markers(args.markers)
    loaded = open_model(args)
    n_layers = loaded.model.config.num_hidden_layers
    wanted = args.layers if panel is None else sorted({feature.layer for feature in panel})
    if panel is not None:
        check_layers(panel, n_layers, args.panel)
    elif args.layers[-1] >= n_layers:
        raise UserError(f"--layers {args.layers[-1]}: this model has {n_layers} blocks, 0 to {n_layers - 1}.")
    layers = open_saes(args.data_root, wanted, args.sae_run, loaded)
    if panel is not None:
        check_indices(panel, {layer: opened_sae.sae.n_features for layer, opened_sae in layers.items()}, args.panel)
        saes = {str(layer): opened_sae.fingerprint for layer, opened_sae in layers.items()}
        require_same_origin("--panel", [args.panel.parent], {"model": loaded.fingerprint, "saes": saes})
    opened = open_cells(args, loaded, trajectory_selection(args))
    vocabulary = opened.vocabulary
    if vocabulary.mask is None:
        raise UserError("the model's token dictionary has no <mask>, which marker genes need; take one that has.")

    def token_of(name: str) -> int | None:
        known = gene_id(name, vocabulary)
        return vocabulary.token_of[known[0]] if known else None

    tokens = marker_tokens(markers, token_of, "--markers" if args.markers is None else str(args.markers))
    trajectory = open_trajectory(args, opened)
    halves = open_halves(args, opened, trajectory)
    rule = SwitchRule(n_on=args.n_on, n_off=args.n_off)
    return Study(opened, layers, trajectory, halves, open_probe_cells(args, opened), tokens, panel, rule)


def declare(args: argparse.Namespace, study: Study, primary: Mapping[str, Any], fingerprint: str) -> Design:
    """Choose the features, train the probe, and write `declaration.json` before anything is steered.

    Raises:
        UserError: no feature switches, or the probe has too few cells.
    """
    cells, model = study.opened.cells.cells, study.opened.loaded.model
    saes = {layer: opened_sae.sae for layer, opened_sae in study.layers.items()}
    first = [cells[i] for i in study.halves.first]
    means = clean_means(model, saes, first, args.out_dir, fingerprint)
    head = head_parts(model)
    logit_map = LogitMap(*(part.detach().cpu().numpy().astype(np.float64) for part in (head.weight, head.bias)))
    statistics = first_half_statistics(args, study, means)
    panel, features = chosen_panel(args, study, statistics)
    probe = open_probe(args, study, fingerprint)
    order = study.halves.order
    design = Design(
        panel=panel,
        facts={layer: means.layer_facts(layer, order.early) for layer in sorted({f.layer for f in panel})},
        doses=study.doses(args),
        n_draws=args.draws,
        seed=args.seed,
        readouts=StateReadouts(logit_map, means.signatures((order.early, order.late), logit_map), probe),
        markers=study.markers,
        mask=int(study.opened.vocabulary.mask or 0),
        switch_d={layer: every_d(statistics[layer], saes[layer].n_features) for layer in statistics},
    )
    declaration = {
        "primary": dict(primary),
        "doses": [asdict(dose) for dose in design.doses],
        "n_draws": args.draws,
        "halves": study.halves.facts(features),
        "rule": study.rule.text() if study.panel is None else None,
        "probe": {**probe.facts(), "cells": study.probe_cells.source},
        "markers": marker_facts(study),
        "layers": {str(layer): layer_facts(study, design, layer) for layer in design.layers},
        "definitions": {
            **DEFINITIONS,
            "linear_prediction": "what the displacement added to the clean final stream at the same positions gives: "
            "the direct path alone, through no block",
            "excess": "measured - linear prediction",
            "dose": "an edit moves every active position along the feature's decoder direction by `norm` times the "
            "mean length of the residual stream at the layer (gene positions, clean, first half)",
            "controls": CONTROL_DEFINITIONS,
        },
        "panel": [feature.name for feature in panel],
        "fingerprint": fingerprint,
    }
    write_json(args.out_dir / controlled_results.DECLARATION_FILE, declaration)
    return design


def first_half_statistics(args: argparse.Namespace, study: Study, means: CleanMeans) -> dict[int, "LayerStatistics"]:
    """{layer: how its features change along pseudotime in the first half}."""
    order = study.halves.order
    n_genes = read_run_counts(args, study.opened).counts.getnnz(axis=1)[study.halves.first]
    cell_order = CellOrder(order.pseudotime, order.early, order.late, n_genes)
    return {
        layer: layer_statistics(means.activations[layer], cell_order, study.rule.min_freq) for layer in study.layers
    }


def chosen_panel(
    args: argparse.Namespace, study: Study, statistics: Mapping[int, "LayerStatistics"]
) -> tuple[tuple[SteeredFeature, ...], str]:
    """The features to steer and where they come from: `--panel`, or the switch features of the first half.

    Raises:
        UserError: no feature switches.
    """
    labels = {layer: opened_sae.labels() for layer, opened_sae in study.layers.items()}
    if study.panel is not None:
        given = tuple(
            SteeredFeature(
                f.layer,
                f.index,
                _kind(f.switch_d),
                f.switch_d,
                f.label if f.label is not None else labels[f.layer][f.index],
            )
            for f in study.panel
        )
        return (
            given,
            f"from {args.panel.name}, not chosen here: whether these cells were used to choose them is not known",
        )
    found = switch_features(statistics, study.rule, labels)
    if not found:
        raise UserError(
            f"no feature of layers {', '.join(map(str, study.layers))} switches in the first half "
            f"(|d| >= {study.rule.min_abs_d:g}); take more cells (--n-cells), other --layers, or bring a --panel."
        )
    write_json(args.out_dir / SWITCHES_FILE, found)
    panel = tuple(SteeredFeature(x["layer"], x["idx"], x["kind"], x["d"], x["label"]) for x in found)
    return panel, "switch features chosen in the first half"


def _kind(d: float | None) -> str | None:
    return None if not d else ON if d > 0 else OFF


def every_d(found: "LayerStatistics", n_features: int) -> NDArray[np.float64]:
    """Cohen's d of every feature of a layer, (n_features,), NaN where it was not tested."""
    d = np.full(n_features, np.nan)
    d[found.features] = found.d
    return d


def open_probe(args: argparse.Namespace, study: Study, fingerprint: str) -> Probe:
    """The probe that the folder holds, else one trained and written.

    Raises:
        UserError: too few cells of a kind.
    """
    path = args.out_dir / PROBE_FILE
    kept = kept_probe(path, fingerprint)
    if kept is not None:
        return kept
    model, cells = study.opened.loaded.model, study.probe_cells
    last = model.config.num_hidden_layers - 1
    streams = [
        residual[last].cpu().numpy().mean(axis=0, dtype=np.float64)
        for _, _, residual in stream(model, cells.cells, [last], "probe cells")
    ]
    probe = fit_probe(np.array(streams), cells.is_late, cells.donors, args.seed)
    names = [cell.name for cell in cells.cells]
    write_probe(path, probe, fingerprint, names, cells.is_late)
    return probe


def marker_facts(study: Study) -> dict[str, Any]:
    """Which marker genes are read, by name."""
    name_of = study.opened.vocabulary.symbol_of_token()
    tokens = study.markers
    return {
        "early": [name_of[token] for token in tokens.early],
        "late": [name_of[token] for token in tokens.late],
        "unknown_to_the_model": list(tokens.unknown),
        "masked": "all of a cell's at once",
    }


def layer_facts(study: Study, design: Design, layer: int) -> dict[str, Any]:
    """What the tests say about a layer."""
    last = study.opened.loaded.model.config.num_hidden_layers - 1
    decoder = study.layers[layer].sae.decoder_directions.detach().cpu().numpy()
    panel: Sequence[int] = [feature.index for feature in design.of_layer(layer)]
    return {
        "analytic": layer == last,
        "n_blocks_after": last - layer,
        "mean_norm": design.facts[layer].mean_norm,
        "n_control_candidates": len(candidates(design.facts[layer], panel, decoder)),
    }
