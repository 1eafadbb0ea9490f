"""combinations.py: reading a user's list and a pair summary; which triplets follow from measured pairs."""

import json
from pathlib import Path

import numpy as np
import pytest

from cellcircuits.combinations import (
    Combination,
    ComboFeature,
    choose_triplets,
    read_combinations,
    read_pair_summary,
)
from cellcircuits.errors import UserError


def entry(pathway: str, kind: str, *features: tuple) -> dict:
    """An entry of `per_pair_results`; a feature is (layer, idx) or (layer, idx, n_edges) or (..., label)."""
    named = {}
    for letter, (layer, idx, *more) in zip("ABC", features, strict=False):
        n_edges, label = (*more, *(7, "term")[len(more) :])
        named[f"feature_{letter}"] = {"layer": layer, "idx": idx, "label": label, "n_edges": n_edges}
    return {"pathway": pathway, "pair_type": kind, **named}


def summary_file(folder: Path, entries: list[dict]) -> Path:
    path = folder / "summary.json"
    path.write_text(json.dumps({"n_pairs": len(entries), "per_pair_results": entries}))
    return path


def listed(folder: Path, text: str, name: str = "list.txt") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def indices(combinations: list[Combination]) -> list[tuple[tuple[int, int], ...]]:
    return [tuple((f.layer, f.index) for f in one.features) for one in combinations]


class TestNames:
    def test_are_the_published_files(self):
        features = (ComboFeature(0, 1450, n_edges=2813), ComboFeature(5, 4432, "x", 3267), ComboFeature(11, 3016))
        triplet = Combination(features, "metabolism", "same_pathway")
        assert triplet.name == "L0_F1450_x_L5_F4432_x_L11_F3016"
        assert triplet.n_edges == 6080
        assert Combination(features[:2], "m", "listed").name == "L0_F1450_x_L5_F4432"


class TestReadCombinations:
    def test_lines(self, tmp_path: Path):
        text = "# my own\n0:2061,5:4349,11:854\n\n 0:1 , 5:2, 11:3  # second\n0:7 5:8 5:9\n"
        found = read_combinations(listed(tmp_path, text), 3)
        assert indices(found) == [
            ((0, 2061), (5, 4349), (11, 854)),
            ((0, 1), (5, 2), (11, 3)),
            ((0, 7), (5, 8), (5, 9)),
        ]
        assert {(one.pathway, one.kind) for one in found} == {("listed", "listed")}
        assert {(f.label, f.n_edges) for one in found for f in one.features} == {("unannotated", 0)}

    @pytest.mark.parametrize("mark", ["", "\ufeff"])  # some editors put a byte order mark first
    def test_a_json_list_of_feature_lists(self, tmp_path: Path, mark: str):
        content = [
            {
                "features": [{"layer": 0, "idx": 4, "label": "A", "n_edges": 3}, {"layer": 5, "idx": 6}],
                "pathway": "rna",
            },
            {"features": [[0, 5], [5, 6, "B"]], "type": "cross_pathway"},
            {"features": [[11, 5, {"label": "C", "pathway": "ddr", "freq": 0.2}], [5, 6, None]], "type": "random"},
        ]
        path = tmp_path / "pairs.json"
        path.write_text(mark + json.dumps(content), encoding="utf-8")
        assert read_combinations(path, 2) == [
            Combination((ComboFeature(0, 4, "A", 3), ComboFeature(5, 6)), "rna", "listed"),
            Combination((ComboFeature(0, 5), ComboFeature(5, 6, "B")), "listed", "cross_pathway"),
            Combination((ComboFeature(11, 5, "C"), ComboFeature(5, 6)), "listed", "random"),
        ]

    def test_results_of_an_earlier_run(self, tmp_path: Path):
        entries = [entry("rna", "same_pathway", (0, 1), (5, 2)), entry("a_x_b", "cross_pathway", (0, 2), (5, 2))]
        expected = [
            Combination((ComboFeature(0, 1, "term", 7), ComboFeature(5, 2, "term", 7)), "rna", "same_pathway"),
            Combination((ComboFeature(0, 2, "term", 7), ComboFeature(5, 2, "term", 7)), "a_x_b", "cross_pathway"),
        ]
        assert read_combinations(summary_file(tmp_path, entries), 2) == expected
        assert read_combinations(listed(tmp_path, json.dumps(entries)), 2) == expected
        triplet = {**entry("rna", "x", (0, 1), (5, 2), (11, 3)), "triplet_type": "same_pathway"}
        del triplet["pair_type"]
        content = {"n_triplets": 1, "per_triplet_results": [triplet]}
        (found,) = read_combinations(listed(tmp_path, json.dumps(content)), 3)
        assert found.name == "L0_F1_x_L5_F2_x_L11_F3" and found.kind == "same_pathway"

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("", ["lists no combination", "0:2061,5:4349,11:854"]),
            ("# nothing\n", ["lists no combination"]),
            ("[]", ["lists no combination"]),
            ("0:1,5:2", ["line 1", "has 2 features", "must have 3"]),
            ("0:1,5:2,11:3\n0:1,5:2,6:3,11:4", ["line 2", "has 4 features"]),
            ("0:1,5:2,11:3\n\n0:1,0:1,11:3", ["line 3", "twice"]),
            ("0:1,5:2,11:3\n5:2,0:1,11:3", ["line 2", "same features as line 1"]),
            ("0:1,5:-2,11:3", ["line 1", "'5:-2'", "LAYER:INDEX"]),
            ("0:1,5:2.5,11:3", ["line 1", "'5:2.5'"]),
            ("0:1,5,11:3", ["line 1", "'5'"]),
            ("layer,idx", ["line 1", "'layer'"]),
            ("[1, 2", ["not valid JSON"]),
            ("[1]", ["entry 1", "expected a table"]),
            ('{"a": 1}', ["per_pair_results or per_triplet_results"]),
            ('[{"pathway": "rna"}]', ["entry 1", "no feature"]),
            ('[{"features": []}]', ["entry 1", "no feature"]),
            ('[{"features": [1, 2, 3]}]', ["entry 1", "1 is no feature"]),
            ('[{"features": [[0, 1], [5, -2], [11, 3]]}]', ["entry 1", "`idx`", "-2"]),
            ('[{"features": [[0, 1], [5, 2.0], [11, 3]]}]', ["entry 1", "`idx`", "2.0"]),
            ('[{"features": [[0, 1], [5, true], [11, 3]]}]', ["entry 1", "`idx`", "true"]),
            ('[{"features": [[0, 1], [5, "2"], [11, 3]]}]', ["entry 1", "`idx`"]),
            ('[{"features": [[0, 1], [5, NaN], [11, 3]]}]', ["entry 1", "`idx`"]),
            ('[{"features": [{"idx": 1}, [5, 2], [11, 3]]}]', ["entry 1", "`layer`", "missing"]),
            ('[{"features": [[0, 1], [5, 2], [11, 3, 4]]}]', ["entry 1", "`label`"]),
            ('[{"features": [[0, 1], [5, 2], [11, 3]], "type": "odd"}]', ["entry 1", "odd", "same_pathway"]),
            ('[{"features": [[0, 1], [5, 2], [11, 3]], "type": ["odd"]}]', ["entry 1", "odd", "same_pathway"]),
            ('[{"features": [[0, 1], [5, 2], [11, 3]], "pathway": 3}]', ["entry 1", "`pathway`"]),
            (f"0:1,5:{'9' * 5000},11:3", ["line 1", "LAYER:INDEX"]),
        ],
    )
    def test_mistakes_are_named(self, tmp_path: Path, text: str, words: list[str]):
        path = listed(tmp_path, text)
        with pytest.raises(UserError) as error:
            read_combinations(path, 3)
        assert all(word in str(error.value) for word in [str(path), *words]), error.value

    def test_a_fourth_feature_is_not_overlooked(self, tmp_path: Path):
        features = {f"feature_{letter}": {"layer": i, "idx": i} for i, letter in enumerate("ABCD")}
        with pytest.raises(UserError, match="has 4 features"):
            read_combinations(listed(tmp_path, json.dumps([features])), 3)

    def test_no_text_and_no_file(self, tmp_path: Path):
        binary = tmp_path / "list"
        binary.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(UserError, match="not a text file"):
            read_combinations(binary, 2)
        with pytest.raises(UserError, match="no such file"):
            read_combinations(tmp_path / "none.txt", 2)
        with pytest.raises(UserError, match="cannot be read"):
            read_combinations(tmp_path, 2)


class TestReadPairSummary:
    def test_in_file_order_with_any_type(self, tmp_path: Path):
        entries = [entry("rna", "odd_type", (5, 2, 9, "B"), (0, 1)), entry("x", "cross_pathway", (0, 1), (5, 2))]
        del entries[0]["feature_A"]["n_edges"]
        assert read_pair_summary(summary_file(tmp_path, entries)) == [
            Combination((ComboFeature(5, 2, "B", 0), ComboFeature(0, 1, "term", 7)), "rna", "odd_type"),
            Combination((ComboFeature(0, 1, "term", 7), ComboFeature(5, 2, "term", 7)), "x", "cross_pathway"),
        ]

    @pytest.mark.parametrize("key", ["pathway", "pair_type", "feature_A", "feature_B"])
    def test_a_missing_key_is_named(self, tmp_path: Path, key: str):
        entries = [entry("rna", "same_pathway", (0, 1), (5, 2)) for _ in range(2)]
        del entries[1][key]
        with pytest.raises(UserError, match=f"entry 2: `{key}` is missing"):
            read_pair_summary(summary_file(tmp_path, entries))

    @pytest.mark.parametrize("key", ["layer", "idx", "label"])
    def test_a_feature_s_missing_key_is_named(self, tmp_path: Path, key: str):
        entries = [entry("rna", "same_pathway", (0, 1), (5, 2))]
        del entries[0]["feature_B"][key]
        with pytest.raises(UserError, match=f"entry 1: `feature_B`.*`{key}`"):
            read_pair_summary(summary_file(tmp_path, entries))

    @pytest.mark.parametrize(("key", "value"), [("n_edges", -1), ("n_edges", 2.5), ("layer", "0"), ("label", 4)])
    def test_a_wrong_value_is_named(self, tmp_path: Path, key: str, value: object):
        entries = [entry("rna", "same_pathway", (0, 1), (5, 2))]
        entries[0]["feature_A"][key] = value
        with pytest.raises(UserError, match=f"`feature_A`.*`{key}`"):
            read_pair_summary(summary_file(tmp_path, entries))

    def test_other_files(self, tmp_path: Path):
        with pytest.raises(UserError, match=r"higher_order_ablation\.py --order 2.*--triplets FILE"):
            read_pair_summary(tmp_path / "summary.json")
        for text in ("[]", "{}", '{"per_pair_results": {}}'):
            with pytest.raises(UserError, match="per_pair_results"):
                read_pair_summary(listed(tmp_path, text))
        with pytest.raises(UserError, match="entry 1: is 3"):
            read_pair_summary(listed(tmp_path, '{"per_pair_results": [3]}'))


def slow_pools(content: dict) -> dict:
    """pathway -> layer -> idx -> feature; a dict keeps the first mention and its place."""
    pools: dict = {}
    for pair in content["per_pair_results"]:
        if pair["pair_type"] != "cross_pathway":
            for key in ("feature_A", "feature_B"):
                pool = pools.setdefault(pair["pathway"], {}).setdefault(pair[key]["layer"], {})
                pool.setdefault(pair[key]["idx"], pair[key])
    return pools


def slow_candidates(pools: dict, layers: tuple[int, int, int]) -> list[tuple]:
    candidates = []
    for pathway in pools:
        for a in pools[pathway].get(layers[0], {}).values():
            for b in pools[pathway].get(layers[1], {}).values():
                for c in pools[pathway].get(layers[2], {}).values():
                    candidates.append((a["n_edges"] + b["n_edges"] + c["n_edges"], pathway, [a, b, c]))
    return candidates


def slow_triplets(content: dict, n_triplets: int, layers: tuple[int, int, int]) -> list[tuple]:
    """The published rule once more, straight from the JSON, with nested loops and no shared code."""
    pools = slow_pools(content)
    left = slow_candidates(pools, layers)
    chosen: list[tuple] = []
    while left and len(chosen) < n_triplets - 2:
        best = 0
        for i in range(len(left)):  # the earliest of the largest
            if left[i][0] > left[best][0]:
                best = i
        _, pathway, abc = left.pop(best)
        if sum(one[0] == pathway for one in chosen) < 3:
            chosen.append((pathway, "same_pathway", abc))
    for names in (["ddr", "mitosis", "mitosis"], ["signaling", "mitosis", "vesicle"]):
        lists = [list(pools.get(name, {}).get(layer, {}).values()) for name, layer in zip(names, layers, strict=True)]
        if lists[0] and lists[1] and lists[2]:
            chosen.append(("_x_".join(names), "cross_pathway", [one[0] for one in lists]))
    return [
        (pathway, kind, tuple((f["layer"], f["idx"], f["label"], f["n_edges"]) for f in abc))
        for pathway, kind, abc in chosen[:n_triplets]
    ]


def random_summary(rng: np.random.Generator, layers: tuple[int, int, int]) -> dict:
    """Few features and few distinct edge counts, so that ties and repeated mentions are frequent."""
    pathways = ["ddr", "mitosis", "signaling", "vesicle", "rna", "random"][: rng.integers(1, 7)]
    entries = []
    for i in range(rng.integers(1, 50)):
        features = []
        for layer in rng.choice([*layers, 3], 2):
            features.append((int(layer), int(rng.integers(4)), int(rng.integers(3)), f"label {i}"))
        kind = str(rng.choice(["same_pathway", "same_pathway", "cross_pathway", "other"]))
        entries.append(entry(str(rng.choice(pathways)), kind, *features))
    return {"per_pair_results": entries}


class TestChooseTriplets:
    @pytest.mark.parametrize("layers", [(0, 5, 11), (1, 2, 4)])
    def test_is_the_published_rule_on_random_summaries(self, tmp_path: Path, layers: tuple[int, int, int]):
        rng = np.random.default_rng(3)
        n_none = n_cross = n_full = 0
        for _ in range(300):
            content, n_triplets = random_summary(rng, layers), int(rng.integers(1, 13))
            expected = slow_triplets(content, n_triplets, layers)
            pairs = read_pair_summary(summary_file(tmp_path, content["per_pair_results"]))
            if not expected:
                n_none += 1
                with pytest.raises(UserError):
                    choose_triplets(pairs, n_triplets, layers)
                continue
            chosen, notes = choose_triplets(pairs, n_triplets, layers)
            found = [
                (one.pathway, one.kind, tuple((f.layer, f.index, f.label, f.n_edges) for f in one.features))
                for one in chosen
            ]
            assert found == expected
            assert (len(chosen) < n_triplets) == any("give no more" in note for note in notes)
            n_cross += found[-1][1] == "cross_pathway"
            n_full += len(found) == n_triplets
        assert min(n_none, n_cross, n_full) > 20  # every way out was taken

    def test_the_published_panel(self, tmp_path: Path):
        """Features and edges of the first release; its cross-pathway triplet could not have a signaling feature."""
        vesicle = [(0, 2905, 8028), (5, 1226, 1345), (11, 3001, 1242), (11, 157, 1072), (11, 2025, 641)]
        mitosis = [(0, 1952, 1548), (5, 1762, 4703), (11, 1023, 3072), (11, 747, 2837)]
        metabolism = [(0, 3402, 5096), (0, 1450, 2813), (5, 4432, 3267), (11, 3016, 685)]
        entries = []
        for name, features in (("vesicle", vesicle), ("mitosis", mitosis), ("metabolism", metabolism)):
            entries += [
                entry(name, "same_pathway", a, b) for a in features for b in features if a[0] < b[0]
            ]  # fmt: skip
        entries.append(entry("ddr", "same_pathway", (0, 1716, 2659), (5, 1, 1)))
        chosen, notes = choose_triplets(read_pair_summary(summary_file(tmp_path, entries)), 10)
        assert len(chosen) == 8
        assert chosen[0].name == "L0_F2905_x_L5_F1226_x_L11_F3001" and chosen[0].n_edges == 10615
        assert sum(one.pathway == "vesicle" for one in chosen) == 3
        assert chosen[-1].name == "L0_F1716_x_L5_F1762_x_L11_F1023"
        assert (chosen[-1].pathway, chosen[-1].kind) == ("ddr_x_mitosis_x_mitosis", "cross_pathway")
        assert notes == [
            "pathway ddr has no feature at layer 11, so it gives no triplet",
            "8 triplets of 10 asked: the pairs give no more",
        ]

    @staticmethod
    def pairs(*names: str) -> list[Combination]:
        features = [ComboFeature(layer, 10, "x", 5) for layer in (0, 5, 11)]
        return [
            Combination((features[i], features[j]), name, "same_pathway")
            for name in names
            for i, j in ((0, 1), (0, 2), (1, 2))
        ]

    @pytest.mark.parametrize(("n_triplets", "kinds"), [(1, "c"), (2, "cc"), (3, "scc"), (4, "sscc")])
    def test_two_places_are_kept_for_cross_pathway_ones(self, n_triplets: int, kinds: str):
        chosen, _ = choose_triplets(self.pairs("ddr", "mitosis", "signaling", "vesicle"), n_triplets)
        assert "".join(one.kind[0] for one in chosen) == kinds

    @pytest.mark.parametrize("n_triplets", [1, 2])
    def test_without_cross_pathway_ones_few_are_refused(self, n_triplets: int):
        with pytest.raises(UserError, match=f"--n-triplets {n_triplets}.*room for cross-pathway ones only"):
            choose_triplets(self.pairs("rna"), n_triplets)
        assert len(choose_triplets(self.pairs("rna"), 3)[0]) == 1

    def test_a_pathway_without_a_layer_is_named(self):
        with pytest.raises(UserError, match=r"pathway rna has no feature at layer 5,11.*--triplets FILE"):
            choose_triplets([Combination((ComboFeature(0, 1), ComboFeature(3, 2)), "rna", "same_pathway")], 10)
        with pytest.raises(UserError, match="no pair within a pathway"):
            choose_triplets([Combination((ComboFeature(0, 1), ComboFeature(3, 2)), "a_x_b", "cross_pathway")], 10)

    def test_the_same_features_in_two_pathways_are_said(self):
        chosen, notes = choose_triplets(self.pairs("rna", "ddr"), 5)
        assert [one.pathway for one in chosen] == ["rna", "ddr"]
        assert any("L0_F10_x_L5_F10_x_L11_F10 is chosen for two pathways" in note for note in notes)
