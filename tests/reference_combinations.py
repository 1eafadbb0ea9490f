"""The slow and obvious implementation of section 8 of the specification, to test joint ablations against.

Every condition is a full hooked forward pass of one cell that re-encodes each ablated layer as it arrives;
every position of the target is encoded; the statistics are loops over targets. Nothing here comes from the
package but the weights of an SAE.
"""

from dataclasses import dataclass
from itertools import combinations
from statistics import median

import numpy as np

import reference

LETTERS = "ABC"
Features = tuple[tuple[int, int], ...]  # (layer, index) of A, B and perhaps C


def conditions_of(order):
    """A, B, AB for two features; A, B, C, AB, AC, BC, ABC for three."""
    letters = LETTERS[:order]
    return ["".join(chosen) for size in range(1, order + 1) for chosen in combinations(letters, size)]


@dataclass(frozen=True)
class CellChanges:
    """What one cell says: change of every latent at every position per condition, clean-active positions per letter."""

    changes: dict  # condition -> (n_pos, n_features) float64
    active: dict  # letter -> ascending gene positions where that feature is active in the clean pass

    def positions(self, condition):
        """The union of the clean-active positions of the condition's features."""
        return sorted({position for letter in condition for position in self.active[letter]})

    def averaged(self, condition, positions):
        rows = [self.changes[condition][position] for position in positions]
        return sum(rows) / len(rows)


def cell_changes(model, saes, cell, features, target):
    """One clean pass and one full hooked pass per condition."""
    clean = reference.streams_of(model, cell.tokens)
    before, _ = reference.dense_encode(saes[target], clean[target])
    active, changes = {}, {}
    for letter, (layer, index) in zip(LETTERS, features, strict=False):
        chosen = reference.dense_encode(saes[layer], clean[layer])[1]
        active[letter] = [int(position) for position in cell.gene_positions if chosen[position, index]]
    for condition in conditions_of(len(features)):
        by_layer = {}
        for letter in condition:
            layer, index = features[LETTERS.index(letter)]
            by_layer.setdefault(layer, []).append(index)
        edits = {
            layer: reference.scaling(saes[layer], cell.gene_positions, indices) for layer, indices in by_layer.items()
        }
        ablated = reference.streams_of(model, cell.tokens, edits)
        after, _ = reference.dense_encode(saes[target], ablated[target])
        changes[condition] = after.double().numpy() - before.double().numpy()
    return CellChanges(changes, active)


@dataclass(frozen=True)
class Effects:
    """Per condition, effect vectors of the cells that count: (n_counted, n_features) float64.

    `published` averages over the union of the condition's own features, `surrogate` is what exactly additive
    effects would have given there (joint conditions only), `union` averages over all features of the
    combination, whatever the condition. `cells[condition]` and `union_cells` say which cells count.
    """

    published: dict
    surrogate: dict
    cells: dict
    union: dict
    union_cells: list


def effects_of(per_cell, order, n_features):
    """Average the changes of all cells, each of a cell `CellChanges`, in the three ways."""
    everything = LETTERS[:order]
    published, surrogate, counted, union = {}, {}, {}, {}
    union_cells = [i for i, cell in enumerate(per_cell) if cell.positions(everything)]
    for condition in conditions_of(order):
        counted[condition] = [i for i, cell in enumerate(per_cell) if cell.positions(condition)]
        rows, sums, wide = [], [], []
        for i in counted[condition]:
            cell = per_cell[i]
            positions = cell.positions(condition)
            rows.append(cell.averaged(condition, positions))
            sums.append(sum(cell.averaged(letter, positions) for letter in condition))
        for i in union_cells:
            wide.append(per_cell[i].averaged(condition, per_cell[i].positions(everything)))
        published[condition] = _stacked(rows, n_features)
        union[condition] = _stacked(wide, n_features)
        if len(condition) > 1:
            surrogate[condition] = _stacked(sums, n_features)
    return Effects(published, surrogate, counted, union, union_cells)


def _stacked(rows, n_features):
    return np.stack(rows) if rows else np.zeros((0, n_features))


def measure(model, saes, cells, features, target):
    """Effects of a list of two or three features [(layer, index)] on the latents of `target`."""
    per_cell = [cell_changes(model, saes, cell, features, target) for cell in cells]
    return effects_of(per_cell, len(features), saes[target].n_features)


@dataclass(frozen=True)
class PerTarget:
    """Numbers of every target of the target layer, and which of them are significant in any condition."""

    d: dict  # condition -> list of n_features
    consistency: dict
    significant: dict  # condition -> list of bool
    targets: list


def per_target(published, order):
    d, consistency, significant = {}, {}, {}
    for condition in conditions_of(order):
        columns = list(published[condition].T)
        d[condition] = [reference.cohens_d(column) for column in columns]
        consistency[condition] = [reference.consistency_of(column) for column in columns]
        significant[condition] = [reference.is_edge(column) for column in columns]
    n_features = len(next(iter(d.values())))
    targets = [j for j in range(n_features) if any(of_condition[j] for of_condition in significant.values())]
    return PerTarget(d, consistency, significant, targets)


def ratio(joint, parts):
    """|joint| / sum of |parts|, 1.0 where the sum is at most 0.01."""
    total = sum(abs(part) for part in parts)
    return abs(joint) / total if total > 0.01 else 1.0


def ratios_on_targets(joint_d, numbers, condition):
    """Ratio of every target, `joint_d` being the d of the real joint condition or of its surrogate."""
    return [ratio(joint_d[j], [numbers.d[letter][j] for letter in condition]) for j in numbers.targets]


def interactions_of_pair(numbers):
    """|d_AB| - |d_A| - |d_B| of every target."""
    size = {condition: [abs(x) for x in of_one] for condition, of_one in numbers.d.items()}
    return [size["AB"][j] - size["A"][j] - size["B"][j] for j in numbers.targets]


def interactions_of_triplet(numbers):
    """|d_ABC| - |d_AB| - |d_AC| - |d_BC| + |d_A| + |d_B| + |d_C| of every target."""
    size = {condition: [abs(x) for x in of_one] for condition, of_one in numbers.d.items()}
    return [
        size["ABC"][j] - (size["AB"][j] + size["AC"][j] + size["BC"][j]) + (size["A"][j] + size["B"][j] + size["C"][j])
        for j in numbers.targets
    ]


def median_or(values, default):
    return float(median(values)) if values else default


def classes(ratios):
    """Numbers of subadditive, additive and superadditive targets."""
    sub = sum(1 for value in ratios if value < 0.8)
    above = sum(1 for value in ratios if value > 1.2)
    return sub, len(ratios) - sub - above, above


def numbers_of_triplet(published):
    """All the measured numbers of a triplet's JSON file."""
    numbers = per_target(published, 3)
    threeway = ratios_on_targets(numbers.d["ABC"], numbers, "ABC")
    sub, additive, above = classes(threeway)
    marginal = [abs(numbers.d["ABC"][j]) - abs(numbers.d["AB"][j]) for j in numbers.targets]
    return common_numbers(published, numbers) | {
        "pairwise_ratios": {
            pair: median_or(ratios_on_targets(numbers.d[pair], numbers, pair), 1.0) for pair in ("AB", "AC", "BC")
        },
        "threeway_ratio": median_or(threeway, 1.0),
        "n_subadditive_3way": sub,
        "n_additive_3way": additive,
        "n_superadditive_3way": above,
        "higher_order_interaction_median": median_or(interactions_of_triplet(numbers), 0.0),
        "marginal_C_given_AB_median": median_or(marginal, 0.0),
    }


def numbers_of_pair(published):
    """All the measured numbers of a pair's JSON file."""
    numbers = per_target(published, 2)
    ratios = ratios_on_targets(numbers.d["AB"], numbers, "AB")
    sub, additive, above = classes(ratios)
    return common_numbers(published, numbers) | {
        "ratio_median": median_or(ratios, 1.0),
        "n_subadditive": sub,
        "n_additive": additive,
        "n_superadditive": above,
        "interaction_median": median_or(interactions_of_pair(numbers), 0.0),
    }


def common_numbers(published, numbers):
    """What files of pairs and of triplets share."""
    return {
        "n_active": {condition: len(rows) for condition, rows in published.items()},
        "n_significant": {condition: sum(of_one) for condition, of_one in numbers.significant.items()}
        | {"any": len(numbers.targets)},
        "mean_abs_d": {c: sum(abs(x) for x in of_one) / len(of_one) for c, of_one in numbers.d.items()},
    }


def surrogate_ratios(effects, order):
    """Ratio of every target that exactly additive effects of the same cells would give, per joint condition."""
    numbers = per_target(effects.published, order)
    found = {}
    for condition, rows in effects.surrogate.items():
        joint_d = [reference.cohens_d(column) for column in rows.T]
        found[condition] = ratios_on_targets(joint_d, numbers, condition)
    return found


def mean_interactions(union):
    """Interaction of the mean effects per joint condition, (n_features,), on one fixed set of cells and positions."""
    mean = {condition: rows.mean(axis=0) for condition, rows in union.items()}
    found = {}
    for condition in mean:
        if len(condition) == 2:
            found[condition] = mean[condition] - mean[condition[0]] - mean[condition[1]]
        if len(condition) == 3:
            a, b, c = condition
            pairs = mean[a + b] + mean[a + c] + mean[b + c]
            found[condition] = mean[condition] - pairs + (mean[a] + mean[b] + mean[c])
    return found


def additivity_of_means(union, targets):
    """Lengths over `targets`, as shares of that of the sum of the mean single effects, per joint condition."""

    def length(values):
        return sum(float(value) ** 2 for value in values) ** 0.5

    mean = {condition: rows.mean(axis=0)[targets] for condition, rows in union.items()}
    interactions = mean_interactions(union)
    found = {}
    for condition in mean:
        if len(condition) > 1:
            summed = sum(mean[letter] for letter in condition)
            found[condition] = {
                "norm_ratio": length(mean[condition]) / length(summed),
                "relative_deviation": length(mean[condition] - summed) / length(summed),
                "relative_interaction": length(interactions[condition][targets]) / length(summed),
            }
    return found


@dataclass(frozen=True)
class Answer:
    """All that is to be known of one combination."""

    features: Features
    effects: Effects
    per_target: PerTarget

    @property
    def numbers(self):
        """The measured numbers of the JSON file."""
        numbers_of = numbers_of_pair if len(self.features) == 2 else numbers_of_triplet
        return numbers_of(self.effects.published)

    @property
    def numbers_if_additive(self):
        """What the file says about exactly additive effects, and whether the means add; with one target at least."""
        order, targets = len(self.features), self.per_target.targets
        ratios = surrogate_ratios(self.effects, order)
        sub, additive, above = classes(ratios[LETTERS[:order]])
        suffix = "_if_additive" if order == 2 else "_3way_if_additive"
        numbers = {f"n_subadditive{suffix}": sub, f"n_additive{suffix}": additive, f"n_superadditive{suffix}": above}
        numbers["additivity_of_means"] = additivity_of_means(self.effects.union, targets)
        surrogate = dict(self.per_target.d)
        for condition, rows in self.effects.surrogate.items():
            surrogate[condition] = [reference.cohens_d(column) for column in rows.T]
        if_additive = PerTarget(surrogate, {}, {}, targets)
        if order == 2:
            return numbers | {
                "ratio_median_if_additive": median_or(ratios["AB"], 1.0),
                "interaction_median_if_additive": median_or(interactions_of_pair(if_additive), 0.0),
            }
        pairs = {pair: median_or(ratios[pair], 1.0) for pair in ("AB", "AC", "BC")}
        threeway = median_or(ratios["ABC"], 1.0)
        marginal = [abs(surrogate["ABC"][j]) - abs(surrogate["AB"][j]) for j in targets]
        return numbers | {
            "pairwise_ratios_if_additive": pairs,
            "threeway_ratio_if_additive": threeway,
            "higher_order_interaction_median_if_additive": median_or(interactions_of_triplet(if_additive), 0.0),
            "marginal_C_given_AB_median_if_additive": median_or(marginal, 0.0),
        }


def answer(model, saes, cells, features, target):
    """Measure one combination and do its statistics."""
    effects = measure(model, saes, cells, features, target)
    return Answer(features, effects, per_target(effects.published, len(features)))
