"""Combinations of features to ablate together: what one is, how to read them, which triplets pairs suggest.

Standard library only. How pairs are chosen from a selective trace is in `selection.py`.
"""

import codecs
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from cellcircuits.catalog import UNANNOTATED
from cellcircuits.errors import UserError, printable
from cellcircuits.files import read_bounded
from cellcircuits.jsonio import parse_json, read_json

SAME, CROSS, RANDOM, LISTED = "same_pathway", "cross_pathway", "random", "listed"
KINDS = (SAME, CROSS, RANDOM, LISTED)
KIND_KEYS = ("type", "kind", "pair_type", "triplet_type")
LETTERS = "ABC"
SUMMARY_LISTS = ("per_pair_results", "per_triplet_results")
TRIPLET_LAYERS = (0, 5, 11)
MOST_PER_PATHWAY = 3
MAX_LIST_BYTES = 1 << 26
MAX_CANDIDATES = 1_000_000
MOST_DIGITS = 100  # of a number in a list; Python refuses to read one of thousands
# one pathway per layer, earliest layer first
CROSS_TRIPLETS = (("ddr", "mitosis", "mitosis"), ("signaling", "mitosis", "vesicle"))

Pools = dict[str, dict[int, list["ComboFeature"]]]  # pathway -> layer -> features


@dataclass(frozen=True)
class ComboFeature:
    """One ablated feature.

    Attributes:
        layer: where it is removed.
        index: its number in that layer's SAE.
        label: its significant label.
        n_edges: out-degree in a trace, 0 where unknown.
        best_term: the term that its pathway comes from, None where unknown.
        best_term_significant: whether that term is significant, None where unknown.
    """

    layer: int
    index: int
    label: str = UNANNOTATED
    n_edges: int = 0
    best_term: str | None = None
    best_term_significant: bool | None = None

    @property
    def name(self) -> str:
        """As in file names: `L5_F2061`."""
        return f"L{self.layer}_F{self.index}"


@dataclass(frozen=True)
class Combination:
    """Features to ablate together, in the order A, B, C; `kind` is one of `KINDS`."""

    features: tuple[ComboFeature, ...]
    pathway: str
    kind: str

    @property
    def name(self) -> str:
        """As in file names: `L0_F1_x_L5_F2_x_L11_F3`."""
        return "_x_".join(feature.name for feature in self.features)

    @property
    def n_edges(self) -> int:
        """Summed out-degree of the features."""
        return sum(feature.n_edges for feature in self.features)


def read_combinations(path: Path, order: int) -> list[Combination]:
    """Read a user's list of combinations.

    JSON: a list, or a summary with `per_pair_results` or `per_triplet_results`, of entries with `features` or
    with `feature_A`, `feature_B` and so on; a feature is `{"layer", "idx"}` with `label` and `n_edges` as it
    likes, or `[layer, idx]` or `[layer, idx, label]`. Text: one combination a line, `0:2061,5:4349,11:854`,
    comments after `#`.

    Args:
        path: the file.
        order: features per combination.

    Raises:
        UserError: missing, empty or of another form; names the entry or the line.
    """
    found: list[Combination] = []
    named: dict[frozenset[str], str] = {}
    for where, entry in _entries(path):
        combination = _combination(entry, where)
        names = [feature.name for feature in combination.features]
        if len(names) != order:
            raise UserError(f"{where}: has {len(names)} features, but each combination must have {order}; mend it.")
        if len(set(names)) != order:
            raise UserError(f"{where}: names a feature twice ({combination.name}); name {order} different ones.")
        if frozenset(names) in named:
            raise UserError(f"{where}: the same features as {named[frozenset(names)]}; remove one of the two.")
        named[frozenset(names)] = where.removeprefix(f"{path}: ")
        found.append(combination)
    if not found:
        raise UserError(f"{path}: lists no combination; give lines such as {_example(order)}.")
    return found


def read_pair_summary(path: Path) -> list[Combination]:
    """Read `per_pair_results` of a pairwise ablation's summary, in file order.

    Returns:
        One combination of two features per entry; its kind is the entry's `pair_type`, whatever that says.

    Raises:
        UserError: the file is missing or damaged, or an entry lacks a key.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; make it with higher_order_ablation.py --order 2, or name the triplets yourself "
            "with --triplets FILE."
        )
    content = read_json(path)
    entries = content.get("per_pair_results") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise UserError(f"{path}: has no list `per_pair_results`, so it is not the summary of a pairwise ablation.")
    pairs = []
    for number, entry in enumerate(entries, start=1):
        where = f"{path}: per_pair_results entry {number}"
        if not isinstance(entry, dict):
            raise UserError(f"{where}: is {_short(entry)}, expected a table with feature_A and feature_B.")
        features = tuple(_pair_feature(entry, key, where) for key in ("feature_A", "feature_B"))
        pathway, kind = (_text(entry.get(key), f"{where}: `{key}`") for key in ("pathway", "pair_type"))
        pairs.append(Combination(features, pathway, kind))
    return pairs


def choose_triplets(
    pairs: Sequence[Combination],
    n_triplets: int,
    layers: tuple[int, int, int] = TRIPLET_LAYERS,
    *,
    disjoint: bool = False,
) -> tuple[list[Combination], list[str]]:
    """Choose triplets from measured pairs by the published rule.

    Within a pathway every combination of a feature per layer is a candidate; those with most edges come
    first, at most three of a pathway, until `n_triplets` - 2 are taken; then two fixed cross-pathway triplets
    are appended where their features exist, and the list is cut to `n_triplets`.

    Args:
        pairs: as `read_pair_summary` gives them; their order decides ties and which feature is a pathway's first.
        n_triplets: most triplets to choose.
        layers: three ascending layers, one feature of a triplet from each.
        disjoint: skip triplets that share a feature with one already chosen; a cross-pathway one then takes the first
            feature of each list that is still free.

    Returns:
        The triplets, and notes on what could not be built.

    Raises:
        UserError: there is none at all; says which pathway lacks which layer.
    """
    pools = _pools(pairs)
    n_candidates = sum(math.prod(len(pool.get(layer, ())) for layer in layers) for pool in pools.values())
    if n_candidates > MAX_CANDIDATES:
        raise UserError(
            f"the pair summary gives {n_candidates:,} triplets to choose from; name some with --triplets FILE."
        )
    by_edges = sorted(_candidates(pools, layers), key=lambda triplet: -triplet.n_edges)  # stable
    used: set[str] | None = set() if disjoint else None
    same = list(islice(_at_most_per_pathway(by_edges, used), max(n_triplets - 2, 0)))
    chosen = [*same, *_cross_triplets(pools, layers, used)][:n_triplets]
    notes = _lacks(pools, layers)
    if not chosen:
        why = "; ".join(notes) or "it holds no pair within a pathway"
        if by_edges:
            why = f"{n_triplets} leaves room for cross-pathway ones only, and none can be built"
        raise UserError(
            f"--n-triplets {n_triplets} with layers {_commas(layers)}: the pair summary gives no triplet ({why}); "
            "measure pairs at these layers, ask for other ones or for more, or name triplets with --triplets FILE."
        )
    if len(chosen) < n_triplets:
        notes.append(f"{len(chosen)} triplets of {n_triplets} asked: the pairs give no more")
    names = [triplet.name for triplet in chosen]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    notes += [f"{name} is chosen for two pathways; it is measured once, under the second" for name in twice]
    return chosen, notes


def _pools(pairs: Sequence[Combination]) -> Pools:
    """Distinct features per pathway and layer in the order of the pairs; the first mention of a feature counts."""
    pools: Pools = {}
    known: set[tuple[str, int, int]] = set()
    for pair in (pair for pair in pairs if pair.kind != CROSS):
        of_pathway = pools.setdefault(pair.pathway, {})
        for feature in pair.features:
            pool = of_pathway.setdefault(feature.layer, [])
            if (key := (pair.pathway, feature.layer, feature.index)) not in known:
                pool.append(feature)
            known.add(key)
    return pools


def _candidates(pools: Pools, layers: Sequence[int]) -> Iterator[Combination]:
    """Every triplet within a pathway; the first layer's feature changes slowest."""
    for pathway, pool in pools.items():
        for features in product(*(pool.get(layer, []) for layer in layers)):
            yield Combination(features, pathway, SAME)


def _at_most_per_pathway(triplets: Sequence[Combination], used: set[str] | None) -> Iterator[Combination]:
    """At most three of a pathway; with a set of `used` features only those without any, which are added to it."""
    taken: dict[str, int] = {}
    for triplet in triplets:
        if taken.get(triplet.pathway, 0) < MOST_PER_PATHWAY and take_unused(triplet, used):
            taken[triplet.pathway] = taken.get(triplet.pathway, 0) + 1
            yield triplet


def take_unused(combination: Combination, used: set[str] | None) -> bool:
    """Whether none of the features is in `used`, which then gets them; with None any combination will do."""
    names = {feature.name for feature in combination.features}
    if used is None:
        return True
    if used & names:
        return False
    used |= names
    return True


def _cross_triplets(pools: Pools, layers: Sequence[int], used: set[str] | None) -> Iterator[Combination]:
    for pathways in CROSS_TRIPLETS:
        lists = (pools.get(pathway, {}).get(layer, []) for pathway, layer in zip(pathways, layers, strict=True))
        firsts = [[feature for feature in pool if feature.name not in (used or ())][:1] for pool in lists]
        if all(firsts):
            triplet = Combination(tuple(feature for [feature] in firsts), "_x_".join(pathways), CROSS)
            take_unused(triplet, used)
            yield triplet


def _lacks(pools: Pools, layers: Sequence[int]) -> list[str]:
    """Which pathway gives no triplet because it has no feature at a layer."""
    missing = {pathway: [layer for layer in layers if not pool.get(layer)] for pathway, pool in pools.items()}
    return [
        f"pathway {pathway} has no feature at layer {_commas(gaps)}, so it gives no triplet"
        for pathway, gaps in missing.items()
        if gaps
    ]


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, entry as JSON has it) of each combination in a file."""
    raw = read_bounded(path, MAX_LIST_BYTES, "a list of combinations").removeprefix(codecs.BOM_UTF8)
    if raw.lstrip()[:1] in (b"[", b"{"):
        return _json_entries(path, raw)
    try:
        return _line_entries(path, raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not a text file; give JSON or lines such as {_example(2)}.") from None


def _json_entries(path: Path, raw: bytes) -> Iterator[tuple[str, Any]]:
    content = parse_json(raw, path)
    if isinstance(content, dict):
        lists = [content[key] for key in SUMMARY_LISTS if isinstance(content.get(key), list)]
        if not lists:
            raise UserError(f"{path}: expected a list of combinations, or a summary with {' or '.join(SUMMARY_LISTS)}.")
        content = lists[0]
    for number, entry in enumerate(content, start=1):
        yield f"{path}: entry {number}", entry


def _line_entries(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].replace(",", " ").split()
        if not words:
            continue
        where = f"{path}: line {number}"
        features = []
        for word in words:
            layer, _, index = word.partition(":")
            if not (layer.isdecimal() and index.isdecimal() and len(word) < MOST_DIGITS):
                raise UserError(f"{where}: {word[:60]!r} is not LAYER:INDEX; write lines such as {_example(2)}.")
            features.append([int(layer), int(index)])
        yield where, {"features": features}


def _combination(entry: Any, where: str) -> Combination:
    if not isinstance(entry, dict):
        raise UserError(
            f"{where}: is {_short(entry)}, expected a table with `features` or with feature_A and feature_B."
        )
    features = entry.get("features")
    if features is None:
        features = [entry[key] for key in (f"feature_{letter}" for letter in ascii_uppercase) if key in entry]
    if not isinstance(features, list) or not features:
        raise UserError(f"{where}: names no feature; give a list `features`, or feature_A and feature_B.")
    kind = next((entry[key] for key in KIND_KEYS if key in entry), LISTED)
    if kind not in KINDS:
        raise UserError(f"{where}: its type is {_short(kind)}; give one of {', '.join(KINDS)}, or leave it out.")
    pathway = _text(entry.get("pathway", LISTED), f"{where}: `pathway`")
    return Combination(tuple(_feature(feature, where) for feature in features), pathway, kind)


def _feature(entry: Any, where: str) -> ComboFeature:
    """A feature as a table or as `[layer, idx]` or `[layer, idx, label]`, where the label may itself be a table."""
    if isinstance(entry, list) and len(entry) in (2, 3):
        about = entry[2] if len(entry) == 3 else {}
        entry = {**(about if isinstance(about, dict) else {"label": about}), "layer": entry[0], "idx": entry[1]}
    if not isinstance(entry, dict):
        raise UserError(f"{where}: {_short(entry)} is no feature; write {{'layer': 0, 'idx': 2061}} or [0, 2061].")
    return ComboFeature(
        _count_of(entry.get("layer"), f"{where}: `layer` of a feature"),
        _count_of(entry.get("idx"), f"{where}: `idx` of a feature"),
        _text(entry.get("label") or UNANNOTATED, f"{where}: `label` of a feature"),
        _count_of(entry.get("n_edges", 0), f"{where}: `n_edges` of a feature"),
        *best_term_of(entry),
    )


def best_term_of(entry: Mapping[str, Any]) -> tuple[str | None, bool | None]:
    """The best term of a feature's entry and whether it is significant; None for what it does not say."""
    term, significant = entry.get("best_term"), entry.get("best_term_significant")
    term = " ".join(term.split()) if isinstance(term, str) else None
    return term, significant if term and isinstance(significant, bool) else None


def _pair_feature(entry: Mapping[str, Any], key: str, where: str) -> ComboFeature:
    feature = entry.get(key)
    if not isinstance(feature, dict):
        raise UserError(f"{where}: `{key}` is {_short(feature)}, expected a table with layer, idx, label and n_edges.")
    if "label" not in feature:
        raise UserError(f"{where}: `{key}` has no `label`; give one, such as {UNANNOTATED}.")
    return _feature(feature, f"{where}: `{key}`")


def _count_of(value: Any, what: str) -> int:
    if type(value) is not int or value < 0:
        raise UserError(f"{what} is {_short(value)}, expected an integer of at least 0.")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{what} is {_short(value)}, expected a text.")
    return printable(" ".join(value.split()))


def _commas(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def _example(order: int) -> str:
    return ",".join(["0:2061", "5:4349", "11:854"][:order])


def _short(value: Any) -> str:
    text = "missing" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
