"""Feed mutants of every kind of input file to the loaders, each in a forked child of one process.

    OMP_NUM_THREADS=1 python tests/fuzz_inputs.py --n 2000

Every mutant must end in success or in one UserError, within 20 seconds, with less than 2 GB of memory above the
parent's, and without running code of the file's. What does not is printed with its kind and number, which repeat it.
"""

import argparse
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

MAX_SECONDS = 20
MAX_BYTES = 2 * 10**9
SUCCESS, USER_ERROR, TRACEBACK = 0, 3, 4


@dataclass(frozen=True)
class Kind:
    """One kind of input.

    `make(folder, rng)` writes a mutant and returns what loads it.
    """

    name: str
    make: Callable[[Path, Random], Callable[[], object]]


@dataclass(frozen=True)
class Outcome:
    """How one mutant ended; `fault` is empty where it ended well, `said` is the error's sentence."""

    ending: str
    fault: str
    seconds: float
    n_bytes: int
    said: str


def run_mutant(kind: Kind, number: int, seed: int, folder: Path) -> Outcome:
    """Make and load one mutant in a forked child; `folder` is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    reader, writer = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(kind, Random(f"{seed} {kind.name} {number}"), folder, writer)
    os.close(writer)
    ended, _, _ = select.select([reader], [], [], MAX_SECONDS + 2)
    if not ended:
        os.kill(child, signal.SIGKILL)
    said = b"".join(iter(lambda: os.read(reader, 65536), b"")) if ended else b""
    os.close(reader)
    _, status, _ = os.wait4(child, 0)
    seconds = time.monotonic() - started
    code, told = os.waitstatus_to_exitcode(status), said.decode("utf-8", "replace")
    measured, _, sentence = told.partition("\n")
    n_bytes = int(measured or 0)
    return Outcome(
        {SUCCESS: "success", USER_ERROR: "error"}.get(code, f"status {code}"),
        _fault(code, told, seconds, n_bytes, folder),
        seconds,
        n_bytes,
        _without_particulars(sentence, folder),
    )


def _without_particulars(sentence: str, folder: Path) -> str:
    """An error's sentence without what differs from mutant to mutant, so that equal ones can be counted."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|[-+.\d]*\d|\\x\w+", "#", sentence.replace(str(folder), ""))[:110]


def _fault(code: int, told: str, seconds: float, n_bytes: int, folder: Path) -> str:
    if (folder / "canary").exists():
        return "code of the file ran"
    if seconds > MAX_SECONDS:
        return f"took {seconds:.0f} s"
    if code not in (SUCCESS, USER_ERROR):
        return told or f"ended with {code} and said nothing"
    return f"took {n_bytes:,} bytes" if n_bytes > MAX_BYTES else ""


def _child(kind: Kind, rng: Random, folder: Path, writer: int) -> None:
    """Load one mutant, tell what it took, and end without the parent's clean-up."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from cellcircuits.errors import UserError

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said, code = "", SUCCESS
    try:
        kind.make(folder, rng)()
    except UserError as error:
        said, code = str(error), USER_ERROR
        if "\n" in said or not said.endswith("."):
            code, said = TRACEBACK, f"not one sentence: {said!r}"
    except BaseException:
        said, code = traceback.format_exc(), TRACEBACK
    above = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    above += resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    with os.fdopen(writer, "wb") as stream:
        stream.write(f"{above * 1024}\n{said}".encode("utf-8", "replace"))
    os._exit(code)


def kinds(seeds: Path) -> Iterator[Kind]:
    """The kinds of input, with sound files of each in `seeds`."""
    import fuzz_targets

    for name, make in fuzz_targets.makers(seeds):
        yield Kind(name, make)


@dataclass
class Tally:
    """How many mutants ended how, their errors, faults, longest time in seconds and most memory in bytes."""

    endings: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    longest: float = 0.0
    most: int = 0


def fuzz(kind: Kind, n: int, seed: int, folder: Path, start: int = 0) -> Tally:
    """Run mutants `start` to `start + n - 1`."""
    tally = Tally()
    for number in range(start, start + n):
        outcome = run_mutant(kind, number, seed, folder)
        tally.endings[outcome.ending] += 1
        tally.errors[outcome.said] += bool(outcome.said)
        tally.longest, tally.most = max(tally.longest, outcome.seconds), max(tally.most, outcome.n_bytes)
        if outcome.fault:
            tally.faults.append(f"{kind.name} {number}: {outcome.fault}")
    return tally


def main() -> int:
    """Run the mutants that the command line asks for, and print what became of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=2000, help="mutants of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", help="only these kinds")
    parser.add_argument("--number", type=int, help="only this mutant")
    parser.add_argument("--start", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--errors", type=int, default=0, help="how many of the most frequent errors to print")
    args = parser.parse_args()
    n_faults = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for kind in kinds(folder / "seeds"):
            if args.kind and kind.name not in args.kind:
                continue
            if args.number is not None:
                print(run_mutant(kind, args.number, args.seed, folder / "mutant"))
                continue
            tally = fuzz(kind, args.n, args.seed, folder / "mutant", args.start)
            n_faults += len(tally.faults)
            print(f"{kind.name}: {args.n} mutants, {dict(tally.endings)}, {len(tally.faults)} faults, "
                  f"longest {tally.longest:.1f} s, most {tally.most / 1e6:.0f} MB, "
                  f"{len(tally.errors)} different errors")  # fmt: skip
            most_frequent = [f"{count:6} {error}" for error, count in tally.errors.most_common(args.errors)]
            print("\n".join([*tally.faults, *most_frequent, ""]), end="", flush=True)
    return 1 if n_faults else 0


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "src")]
    sys.exit(main())
