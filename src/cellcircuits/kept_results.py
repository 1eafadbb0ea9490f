"""Reading the files of `results/` by name and field, each error naming both. Standard library only."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellcircuits.errors import UserError
from cellcircuits.jsonio import read_json

MEND = "make it again with `make results`"
PUBLISHED = Path(__file__).with_name("published.json")


@dataclass(frozen=True)
class Document:
    """A JSON file, or a part of one at `place`."""

    path: Path
    content: Any
    place: str = ""

    def get(self, *keys: str | int, default: Any = ...) -> Any:
        """The value below these keys or list positions.

        Args:
            keys: from the outermost in.
            default: what to give where it is absent; without one that is an error.

        Raises:
            UserError: there is no such field; names file and field.
        """
        value = self.content
        for key in keys:
            if isinstance(value, dict) and key in value:
                value = value[key]
            elif isinstance(value, list) and isinstance(key, int) and -len(value) <= key < len(value):
                value = value[key]
            elif default is not ...:
                return default
            else:
                raise UserError(f"{self.path}: {self._named(keys)} is missing; {MEND}.")
        return value

    def number(self, *keys: str | int) -> float:
        """The number below these keys.

        Raises:
            UserError: it is absent or no number.
        """
        value = self.get(*keys)
        if type(value) not in (int, float):
            raise UserError(f"{self.path}: {self._named(keys)} is {str(value)[:40]!r} and no number; {MEND}.")
        return value

    def within(self, low: float, high: float, *keys: str | int) -> float:
        """The number below these keys, from `low` to `high`.

        Raises:
            UserError: it is absent, no number or outside.
        """
        value = self.number(*keys)
        if not low <= value <= high:
            raise UserError(f"{self.path}: {self._named(keys)} is {value} and not from {low} to {high}; {MEND}.")
        return value

    def maybe(self, *keys: str | int) -> float | None:
        """The number below these keys, None where it is null or absent.

        Raises:
            UserError: it is something else.
        """
        return None if self.get(*keys, default=None) is None else self.number(*keys)

    def numbers(self, *keys: str | int) -> list[float]:
        """The list of numbers below these keys.

        Raises:
            UserError: it is absent or no such list.
        """
        value = self.get(*keys)
        if not isinstance(value, list):
            raise UserError(f"{self.path}: {self._named(keys)} is no list of numbers; {MEND}.")
        return [self.number(*keys, i) for i in range(len(value))]

    def ascending(self, *keys: str | int) -> list[str]:
        """The keys of the object below these keys, which are numbers as text, in the order of the numbers.

        Raises:
            UserError: it is absent, no object, or has other keys.
        """
        names = self.part(*keys).content
        try:
            return sorted(names, key=float)
        except ValueError:
            raise UserError(f"{self.path}: {self._named(keys)} has keys that are no numbers; {MEND}.") from None

    def interval(self, name: str) -> tuple[float | None, float | None]:
        """The ends of a number's interval, `name_low` and `name_high`."""
        return self.maybe(f"{name}_low"), self.maybe(f"{name}_high")

    def text(self, *keys: str | int) -> str:
        """The text below these keys.

        Raises:
            UserError: it is absent or no text.
        """
        value = self.get(*keys)
        if not isinstance(value, str):
            raise UserError(f"{self.path}: {self._named(keys)} is {str(value)[:40]!r} and no text; {MEND}.")
        return value

    def parts(self, *keys: str | int) -> "list[Document]":
        """The objects of the list below these keys.

        Raises:
            UserError: it is absent or no list of objects.
        """
        value = self.get(*keys)
        if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
            raise UserError(f"{self.path}: {self._named(keys)} is no list of objects; {MEND}.")
        return [Document(self.path, part, f"{self._named(keys)}[{i}]") for i, part in enumerate(value)]

    def part(self, *keys: str | int) -> "Document":
        """The object below these keys.

        Raises:
            UserError: it is absent or no object.
        """
        value = self.get(*keys)
        if not isinstance(value, dict):
            raise UserError(f"{self.path}: {self._named(keys)} is no object; {MEND}.")
        return Document(self.path, value, self._named(keys))

    def _named(self, keys: Sequence[str | int]) -> str:
        return ".".join(filter(None, (self.place, *map(str, keys))))


@dataclass(frozen=True)
class Results:
    """A folder of results and the published figures beside them."""

    folder: Path
    published_file: Path

    def document(self, *names: str) -> Document:
        """A JSON file of the results.

        Raises:
            UserError: missing or damaged.
        """
        path = self.folder.joinpath(*names)
        if not path.is_file():
            raise UserError(f"{path}: no such file; {MEND}.")
        return Document(path, read_json(path))

    def maybe(self, *names: str) -> Document | None:
        """A JSON file of the results, None where that analysis was not run.

        Raises:
            UserError: damaged.
        """
        return self.document(*names) if self.folder.joinpath(*names).is_file() else None

    def published(self, name: str) -> float:
        """A figure of the published study.

        Raises:
            UserError: the file is missing, damaged, or does not have it.
        """
        return Document(self.published_file, read_json(self.published_file)).number("facts", name, "value")

    @property
    def inputs_name(self) -> str:
        """What the inputs are called."""
        return self.document("exhaustive_tracing", "exhaustive_summary.json").text("inputs_name")


def all_triplets(summary: Document) -> list[Document]:
    """The triplets of a summary, and the random ones where it has such controls."""
    key = "control_triplet_results"
    controls = summary.parts(key) if summary.get(key, default=None) else []
    return [*summary.parts("per_triplet_results"), *controls]


def add_results_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--results` and `--published`."""
    add = parser.add_argument
    add("--results", type=Path, default=Path("results"), metavar="FOLDER", help="results (default: %(default)s)")
    add(
        "--published",
        type=Path,
        default=PUBLISHED,
        metavar="FILE",
        help="the study's own figures (default: those of this software)",
    )
