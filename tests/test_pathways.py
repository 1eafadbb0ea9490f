"""pathways.py: which pathway a term is filed under, and a user's own table."""

import json
from pathlib import Path

import pytest

from cellcircuits.errors import UserError
from cellcircuits.pathways import PATHWAYS, Pathway, as_json, pathway_of, read_pathways

TERMS = [
    ("DNA Damage Response (GO:0006974)", "ddr"),
    ("DNA metabolic process (GO:0006259)", "ddr"),
    ("Mitotic DNA replication checkpoint", "ddr"),
    ("Spindle-Kinetochore Attachment", "mitosis"),
    ("Mitotic G2/M transition", "mitosis"),
    ("Histone modification", "chromatin"),
    ("Golgi Vesicle Transport (GO:0048193)", "vesicle"),
    ("Intracellular Protein Transport (GO:0006886)", "vesicle"),
    ("cytoplasmic translation (GO:0002181)", "translation"),
    ("rRNA Processing (GO:0006364)", "translation"),
    ("mRNA Splicing, Via Spliceosome", "rna"),
    ("ncRNA metabolic process (GO:0034660)", "rna"),
    ("Cholesterol Biosynthetic Process (GO:0006695)", "metabolism"),
    ("fatty acid beta-oxidation", "metabolism"),
    ("Glycerophospholipid metabolism", "metabolism"),
    ("Glycolysis", "metabolism"),
    ("protein metabolic process", None),
    ("tRNA metabolic process", None),
    ("post-translational protein modification (GO:0043687)", None),
    ("Posttranslational modification", None),
    ("Signal transduction by p53 in response to DNA damage", "ddr"),
    ("toll-like receptor 3 signaling pathway (GO:0034138)", "signaling"),
    ("lipid-mediated signalling", "metabolism"),
    ("regulation of MAP kinase activity (GO:0043405)", "signaling"),
    ("spermatogenesis (GO:0007283)", None),
    ("unannotated", None),
    ("pairwise_enrichment", None),
    ("", None),
]


@pytest.mark.parametrize(("term", "pathway"), TERMS)
def test_terms_are_filed_by_the_first_hit(term: str, pathway: str | None):
    assert pathway_of(term) == pathway
    assert pathway_of(term.upper()) == pathway


def test_the_order_is_the_study_s_with_signaling_last():
    names = [pathway.name for pathway in PATHWAYS]
    assert names == ["ddr", "mitosis", "chromatin", "vesicle", "translation", "rna", "metabolism", "signaling"]
    assert all(word == word.lower() for pathway in PATHWAYS for word in pathway.any_of + pathway.none_of)


def test_signaling_takes_no_term_from_another_pathway():
    for term, pathway in TERMS:
        without = pathway_of(term, PATHWAYS[:-1])
        assert without == pathway or (without is None and pathway == "signaling")


def test_a_user_s_table(tmp_path: Path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({" heat ": ["Heat shock", " HSP "], "fold": {"any": ["folding"], "none": ["DNA"]}}))
    mine = read_pathways(path)
    assert mine == (Pathway("heat", ("heat shock", "hsp")), Pathway("fold", ("folding",), ("dna",)))
    assert pathway_of("Protein folding by HSP90", mine) == "heat"
    assert pathway_of("protein folding", mine) == "fold"
    assert pathway_of("DNA folding", mine) is None
    assert pathway_of("DNA repair", mine) is None


def test_a_table_survives_writing(tmp_path: Path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(as_json(PATHWAYS)))
    assert read_pathways(path) == PATHWAYS


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], ["holds no table"]),
        ({}, ["holds no table"]),
        ({"rna": []}, ["rna", "list of keywords"]),
        ({"rna": "mrna"}, ["rna", "list of keywords"]),
        ({"rna": ["mrna", ""]}, ["rna", "none of them empty"]),
        ({"rna": ["mrna", 3]}, ["rna"]),
        ({"rna": {"none": ["x"]}}, ["rna", "list of keywords"]),
        ({"rna": {"any": ["x"], "none": "y"}}, ["`none` of pathway rna"]),
        ({"rna": {"any": ["x"], "not": ["y"]}}, ["rna", "'not'"]),
        ({" ": ["x"]}, ["empty name"]),
    ],
)
def test_mistakes_in_a_user_s_table_are_named(tmp_path: Path, content: object, words: list[str]):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        read_pathways(path)
    assert all(word in str(error.value) for word in [str(path), *words]), error.value


def test_a_missing_table_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="no such file"):
        read_pathways(tmp_path / "none.json")
