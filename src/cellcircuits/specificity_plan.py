"""What specificity controls would do and how long they would take: the part of `--check` that is theirs.

A control costs what the ablation of its feature costs, so the ablations of the features are counted and timed as those
of a trace are.
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cellcircuits.plan_report import Disk, Plan, Work, peak_host_bytes
from cellcircuits.probe import Seconds
from cellcircuits.specificity import CONTROLS
from cellcircuits.trace_plan import LayerProbe, host_bytes, pair_lines, run_probes, works

if TYPE_CHECKING:
    from cellcircuits.specificity_inputs import Controls

CONDITION_BYTES, TARGET_BYTES = 1200, 3.0  # of a record: a condition's numbers; p and number of a live target, packed
ONCE = ("clean passes", "full passes that check the engine")


def check_specificity(
    args: argparse.Namespace, controls: "Controls", features: Sequence[int], left: Sequence[int], opening: float
) -> Plan:
    """What measuring features and their controls would do.

    Args:
        args: flags of the run.
        controls: what is measured.
        features: those asked for.
        left: those of them that the output folder does not hold yet.
        opening: seconds that opening the inputs took.
    """
    folder, n_conditions = controls.folder, 1 + len(CONTROLS) * controls.draws.n
    plan = Plan(folder.opened, folder.layers, args.out_dir, folder.precision, Seconds.exactly(opening))
    layers = ", ".join(map(str, folder.targets))
    there = f"{len(features) - len(left)} are there"
    plan.to_measure += [
        ("features", f"{len(features)} of layer {folder.source_layer}, to layers {layers}; {there}"),
        ("runs", f"{n_conditions} per feature and cell: the ablation, {len(CONTROLS)} controls x {controls.draws.n}"),
    ]
    if not left:
        plan.host_bytes = peak_host_bytes()
        return plan
    probe = LayerProbe(folder, left)
    run_probes([probe], args.batch_size)
    plan.to_measure += pair_lines([probe], len(folder.opened.cells.cells))
    plan.works += [work if work.name in ONCE else _times(work, n_conditions) for work in works([probe])]
    n_targets = sum(folder.layers[layer].sae.n_features for layer in folder.targets)
    effects = 8.0 * n_conditions * n_targets * len(folder.opened.cells.cells)
    plan.host_bytes = host_bytes([probe]) + effects
    plan.smaller = lambda share: f"--n-features {max(1, int(share * len(left)))}"
    plan.disk = _disk(len(left), n_conditions, n_targets, effects)
    return plan


def _times(work: Work, n: int) -> Work:
    return Work(work.name, n * work.n, n * work.flops, work.seconds.times(n))


def _disk(n_features: int, n_conditions: int, n_targets: int, effects: float) -> Disk:
    """Records, and the effects of the feature at work."""
    at_least = float(n_features * n_conditions * CONDITION_BYTES)
    at_most = at_least + n_features * n_conditions * n_targets * TARGET_BYTES
    return Disk(at_least, (at_least + at_most) / 2, at_most + effects)
