"""The paper's numbers: macros that TeX can read, all that the text uses, and a check that notices changes."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import check_claims
import check_paper
import make_paper_numbers
from cellcircuits.collected import content_hash, kept_files
from cellcircuits.errors import UserError
from cellcircuits.kept_results import PUBLISHED, Results
from cellcircuits.main_figures import FIGURES, tables, text_hash
from cellcircuits.paper_numbers import HASH_START, macro_name, paper_files, published_number, tex
from results_fixtures import NAME, write_results

ROOT = Path(__file__).parents[1]
MANUSCRIPT = (ROOT / "paper/manuscript.tex").read_text()
OWN = {"mainfigure"}  # macros that the manuscript defines itself
# numbers that are no results: the confidence level and thresholds that the code fixes, 1 and 0 as ideal values
ADMITTED = {"95", "0.05", "5", "1", "0", "2", "3", "17", "20"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return write_results(tmp_path_factory.mktemp("paper") / "results")


@pytest.fixture(scope="module")
def made(results: Results) -> tuple[Results, Path]:
    """Results with all that is made of them; pictures and PDF are only what the check reads of them."""
    paper = results.folder.parent / "paper"
    assert check_claims.main(["--results", str(results.folder)]) == 0
    assert make_paper_numbers.main(["--results", str(results.folder), "--out-dir", str(paper)]) == 0
    (paper / "figures").mkdir()
    for name, text in tables(results).items():
        (paper / "figures" / name).write_text(text)
        for suffix in (".pdf", ".png"):
            (paper / "figures" / name).with_suffix(suffix).write_text(f"drawn from {text_hash(text)}")
    (paper / "manuscript.pdf").write_text((paper / "macros.tex").read_text().split("NumbersHash")[1])
    return results, paper


def made_elsewhere(paper: Path, changed: dict[str, str]) -> None:
    """Let figures' tables be `changed`, and pictures and PDF be of these."""
    for name, text in changed.items():
        (paper / "figures" / name).write_text(text)
        for suffix in (".pdf", ".png"):
            (paper / "figures" / name).with_suffix(suffix).write_text(text_hash(text))
    numbers = (paper / "macros.tex").read_text().partition(HASH_START)[0]
    drawn = [(paper / "figures" / f"{name}.csv").read_text() for name in FIGURES]
    made_from = text_hash(numbers, (paper / "claims_table.tex").read_text(), *drawn)
    (paper / "macros.tex").write_text(f"{numbers}{HASH_START}{made_from}}}\n")
    (paper / "manuscript.pdf").write_text(made_from)


def check(results: Path, paper: Path) -> int:
    return check_paper.main(["--results", str(results), "--paper", str(paper)])


class TestMacros:
    def test_every_macro_is_defined_once_with_letters_only(self, results: Results):
        lines = paper_files(results)["macros.tex"].splitlines()[1:]
        names = [re.fullmatch(r"\\newcommand\{\\([A-Za-z]+)\}\{(.+)\}", line) for line in lines]
        assert all(names)
        found = [name[1] for name in names]
        assert len(set(found)) == len(found)

    def test_the_manuscript_uses_no_other(self, results: Results):
        defined = set(re.findall(r"\\newcommand\{\\([A-Za-z]+)\}", paper_files(results)["macros.tex"]))
        used = {name for name in re.findall(r"\\([A-Z][A-Za-z]+)", MANUSCRIPT)}
        assert used <= defined | OWN

    def test_the_manuscript_has_no_number_of_its_own(self):
        body = MANUSCRIPT[MANUSCRIPT.index(r"\begin{document}") :]
        body = re.sub(r"\\(cite|ref|label|mainfigure|begin|setlength)\*?(\{[^}]*\})+", "", body)
        body = re.sub(r"\\[A-Za-z]+|L\{[\d.]+cm\}", "", body)
        assert set(re.findall(r"\d+(?:\.\d+)?", body)) <= ADMITTED

    def test_every_reference_has_an_identifier_and_is_cited(self):
        entries = (ROOT / "paper/references.bib").read_text().split("\n@")
        for entry in entries:
            assert re.search(r"doi = \{10\.\d{4,}/\S+\}|arXiv:\d{4}\.\d{5}", entry), entry[:40]
        keys = {re.match(r"@?\w+\{(\w+),", entry)[1] for entry in entries}
        cited = {key for group in re.findall(r"\\cite\{([^}]*)\}", MANUSCRIPT) for key in group.split(",")}
        assert keys == cited

    def test_every_figure_stands_in_the_text(self):
        assert re.findall(r"\\mainfigure\{(\w+)\}", MANUSCRIPT) == list(FIGURES)

    @pytest.mark.parametrize(
        "text, printed",
        [
            ("5% of a_b", r"5\% of a\_b"),
            ("$x^2$", r"\$x\textasciicircum{}2\$"),
            ("caf\xe9", "caf?"),
            ("-0.1 to 3-4", "$-$0.1 to 3-4"),
        ],
    )
    def test_text_is_safe_for_tex(self, text: str, printed: str):
        assert tex(text) == printed

    def test_names_and_numbers(self):
        assert macro_name("positive_share_L17") == "PositiveShareLOneSeven"
        shown = [published_number(x) for x in (0, 1393850, 284.0, 342.8905, 0.7, 0.538, 0.70710678, 1.0, 17.7)]
        assert shown == ["0", "1,393,850", "284", "342.89", "0.70", "0.538", "0.707", "1.00", "17.7"]

    def test_the_inputs_are_named(self, results: Results):
        assert rf"\newcommand{{\InputsName}}{{{NAME}}}" in paper_files(results)["macros.tex"]


class TestCheck:
    def test_what_was_just_made_agrees(self, made: tuple[Results, Path], capsys):
        assert check(made[0].folder, made[1]) == 0
        assert "are those of the results" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "file, keys",
        [
            ("exhaustive_tracing/exhaustive_summary.json", ("total_edges",)),
            ("exhaustive_tracing/calibration.json", ("n_edges_calibrated",)),
            ("exhaustive_tracing/calibration.json", ("sweep", 1, "edges")),
            ("exhaustive_tracing/calibration.json", ("published_rule_by_degree", 2, "fdr")),
            ("exhaustive_tracing/edges_by_layer.json", ("sources", 0, "layers", 0, "edges_mean")),
            ("exhaustive_tracing/graph_statistics.json", ("tail", "result", "power_law", "alpha")),
            ("pairwise_ablation/summary.json", ("per_pair_results", 0, "ratio_median")),
            ("pairwise_ablation/additivity.json", ("combinations", 0, "redundancy_index")),
            ("higher_order_ablation/summary.json", ("per_triplet_results", 0, "threeway_ratio")),
            ("trajectory_steering/summary.json", ("features", 0, "alpha_results", "5.0", "mean_state_shift")),
            ("trajectory_steering/steering_F3_L0.json", ("alpha_results", "5.0", "top_upregulated", 0, "delta")),
            ("trajectory/trajectory_summary.json", ("confounds", "depth", "rho")),
            ("specificity/specificity.json", ("controls", "random", "edge_ratio")),
            ("controlled_steering/steering_tests.json", ("primary", "estimate")),
            ("controlled_steering/steering_tests.json", ("contrasts", 0, "n_on")),  # drawn nowhere
            ("published.json", ("facts", "n_edges", "value")),
        ],
    )
    def test_one_changed_number_is_noticed(self, made: tuple[Results, Path], tmp_path: Path, file: str, keys, capsys):
        shutil.copytree(made[0].folder, tmp_path / "results")
        content: Any = json.loads((tmp_path / "results" / file).read_text())
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = inner[keys[-1]] + 1
        (tmp_path / "results" / file).write_text(json.dumps(content))
        assert check(tmp_path / "results", made[1]) == 1
        assert "Make them again" in capsys.readouterr().out

    @pytest.mark.parametrize("n", range(9))
    def test_any_changed_byte_is_noticed(self, made: tuple[Results, Path], tmp_path: Path, n: int):
        shutil.copytree(made[0].folder, tmp_path / "results")
        path = sorted(tmp_path / "results" / name for name in kept_files(tmp_path / "results"))[3 * n]
        raw = path.read_bytes()
        # white space between values, or a byte between a Parquet file's magic number and its first page
        path.write_bytes(raw.replace(b"{", b"{ ", 1) if path.suffix == ".json" else raw[:4] + b"\0" + raw[5:])
        assert check(tmp_path / "results", made[1]) in (1, 2)

    def test_every_file_that_is_kept_is_in_the_hash(self, made: tuple[Results, Path], tmp_path: Path):
        shutil.copytree(made[0].folder, tmp_path / "results")
        np.savez(tmp_path / "results/trajectory_steering/state_signatures.npz", early=np.zeros(3))
        before = content_hash(tmp_path / "results")
        for name in set(kept_files(tmp_path / "results")):
            path = tmp_path / "results" / name
            raw = path.read_bytes()
            path.write_bytes(raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
            assert content_hash(tmp_path / "results") != before, name
            path.write_bytes(raw)
        assert content_hash(tmp_path / "results") == before

    def test_a_changed_file_is_named_and_rounding_is_not(self, made: tuple[Results, Path], tmp_path: Path, capsys):
        shutil.copytree(made[1], tmp_path / "paper")
        path = tmp_path / "paper/figures/figure4_steering.csv"
        text = path.read_text()
        rounded = text.replace(",0.0005,", ",0.000500000001,")
        assert rounded != text
        made_elsewhere(tmp_path / "paper", {path.name: rounded})
        claims = tmp_path / "results/claims.json"
        shutil.copytree(made[0].folder, tmp_path / "results")
        claims.write_text(re.sub(r"(0\.\d{9})\d*", r"\1", claims.read_text()))
        assert check(tmp_path / "results", tmp_path / "paper") == 0
        path.write_text(text.replace(",0.0005,", ",0.0006,"))
        (tmp_path / "paper/macros.tex").unlink()
        (tmp_path / "paper/figures/figure1_overview.pdf").unlink()
        (tmp_path / "paper/figures/figure2_hubs.png").write_text("drawn from something else")
        (tmp_path / "paper/manuscript.pdf").write_text("made from something else")
        assert check(made[0].folder, tmp_path / "paper") == 1
        said = capsys.readouterr().out
        changed = ("figure4_steering.csv", "macros.tex", "figure1_overview.pdf", "figure2_hubs.png", "manuscript.pdf")
        assert all(f"{name}: " in said for name in changed)


class TestPublished:
    def test_every_fact_has_a_number_and_a_source(self):
        facts = json.loads(PUBLISHED.read_text())["facts"]
        assert all(type(fact["value"]) in (int, float) and fact["what"] and fact["source"] for fact in facts.values())

    def test_facts_of_the_published_summary_are_its_own(self):
        path = ROOT.parent / "shared/published/exhaustive_summary.json"
        if not path.is_file():
            pytest.skip("the published summary is not here")
        summary, facts = json.loads(path.read_text()), json.loads(PUBLISHED.read_text())["facts"]
        names = {"n_features": "n_features_traced", "n_edges": "total_edges", "edges_mean": "mean_edges_per_feature",
                 "edges_median": "median_edges_per_feature", "edges_max": "max_edges",
                 "n_without_edge": "n_zero_edge_features", "source_layer": "source_layer"}  # fmt: skip
        assert {name: facts[name]["value"] for name in names} == {name: summary[key] for name, key in names.items()}
        hubs = [hub["label"] != "unannotated" for hub in summary["top_20_hubs"]]
        assert (sum(hubs), len(hubs) - sum(hubs)) == (
            facts["top_20_annotated"]["value"], facts["top_20_unannotated"]["value"],
        )  # fmt: skip
        layers = [facts[f"edges_to_layer_{layer}"]["value"] for layer in (6, 11, 17)]
        assert sum(layers) == facts["n_edges"]["value"]


class TestDamaged:
    def test_no_damaged_value_gives_a_traceback(self, tmp_path: Path):
        results = write_results(tmp_path)
        files = sorted(path for path in tmp_path.rglob("*.json") if "steering_F" not in path.name)
        rng = np.random.default_rng(0)
        n_refused = 0
        for _ in range(30):
            path = files[rng.integers(len(files))]
            kept = path.read_text()
            content = json.loads(kept)
            holder, key = random_place(content, rng)
            holder[key] = [None, "many", [], {}, -1, 1e300, [None], {"a": 1}][rng.integers(8)]
            path.write_text(json.dumps(content))
            try:
                paper_files(results)
            except UserError as error:
                n_refused += 1
                assert path.name in str(error)
            path.write_text(kept)
        assert n_refused > 5


def random_place(content: Any, rng: np.random.Generator) -> tuple[Any, Any]:
    """A dict or list inside, and one of its keys; not the name of the inputs."""
    holder = content
    keys = [key for key in holder if key != "inputs_name"]
    key = keys[rng.integers(len(keys))]
    while isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.8:
        holder = holder[key]
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = keys[rng.integers(len(keys))]
    return holder, key
