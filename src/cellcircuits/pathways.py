"""From a term of an ontology to the pathway it is filed under: an ordered table of keywords, the first hit wins."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellcircuits.errors import UserError, printable
from cellcircuits.jsonio import read_json

FORM = 'write {"name": ["keyword", ...]} or {"name": {"any": [...], "none": [...]}}'


@dataclass(frozen=True)
class Pathway:
    """Terms that hold any of the `any_of` keywords and none of the `none_of`; all in lower case."""

    name: str
    any_of: tuple[str, ...]
    none_of: tuple[str, ...] = ()

    def holds(self, term: str) -> bool:
        """Whether a term, in lower case, belongs here."""
        return any(word in term for word in self.any_of) and not any(word in term for word in self.none_of)


# The order decides: "rRNA processing" is translation, not rna; "DNA metabolic process" is ddr, not metabolism.
# A post-translational modification is no translation. `signaling` is not among the study's keyword lists, so it
# comes last, where it takes no term from a pathway that is.
PATHWAYS = (
    Pathway("ddr", ("dna damage", "dna repair", "double-strand", "dna replication", "dna metabolic")),
    Pathway(
        "mitosis",
        ("mitotic", "spindle", "cell cycle", "g2/m", "chromosome segregation", "kinetochore", "cell division"),
    ),
    Pathway("chromatin", ("chromatin", "histone", "nucleosome")),
    Pathway("vesicle", ("vesicle", "golgi", "endosom", "protein transport", "secretion", "exocyt")),
    Pathway("translation", ("translation", "ribosom", "rrna"), ("post-translation", "posttranslation")),
    Pathway("rna", ("mrna", "splic", "rna processing", "ncrna")),
    Pathway(
        "metabolism",
        ("metabolic", "glycoly", "oxidative phosphorylation", "lipid", "cholesterol", "fatty acid"),
        ("dna", "rna", "protein"),
    ),
    Pathway("signaling", ("signal transduction", "signaling", "signalling", "kinase cascade", "map kinase", "mapk")),
)


def pathway_of(term: str, pathways: Sequence[Pathway] = PATHWAYS) -> str | None:
    """Name of the first pathway whose keywords fit the term, whatever its case; None where none does."""
    lowered = term.lower()
    return next((pathway.name for pathway in pathways if pathway.holds(lowered)), None)


def read_pathways(path: Path) -> tuple[Pathway, ...]:
    """Read a user's table, `{"name": [keywords]}` or `{"name": {"any": [...], "none": [...]}}`, in its order.

    Raises:
        UserError: the file is missing, empty or of another form; names the pathway.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: holds no table of pathways; {FORM}.")
    return tuple(_pathway(name, keywords, path) for name, keywords in content.items())


def as_json(pathways: Sequence[Pathway]) -> dict[str, Any]:
    """The table in the form that `read_pathways` reads."""
    return {pathway.name: {"any": list(pathway.any_of), "none": list(pathway.none_of)} for pathway in pathways}


def _pathway(name: str, keywords: Any, path: Path) -> Pathway:
    if not name.strip():
        raise UserError(f"{path}: a pathway has an empty name; {FORM}.")
    table: Mapping[str, Any] = keywords if isinstance(keywords, dict) else {"any": keywords}
    unknown = sorted(table.keys() - {"any", "none"})
    if unknown:
        raise UserError(f"{path}: pathway {name} has a key {unknown[0]!r}; {FORM}.")
    any_of = _keywords(table.get("any"), f"{path}: pathway {name}")
    none_of = _keywords(table["none"], f"{path}: `none` of pathway {name}") if table.get("none") else ()
    return Pathway(printable(" ".join(name.split())), any_of, none_of)


def _keywords(words: Any, where: str) -> tuple[str, ...]:
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise UserError(f"{where} needs a list of keywords, none of them empty; {FORM}.")
    return tuple(word.strip().lower() for word in words)
