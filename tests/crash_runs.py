"""Kill small runs of every script, go on with the same command, and compare with runs that nobody disturbed.

    python tests/crash_runs.py --kills 200 --seed 0

A run is killed by SIGKILL, SIGTERM or SIGINT: at a random moment, in the middle of writing a file, or microseconds
after a file has come. It is then started again, maybe killed again, and in the end left alone. After every kill each
file in the folder must be whole and what the undisturbed run has there; at the end all files must be the same, byte for
byte but for `TIMES` and `ORIGIN`, and nothing else may lie there. SIGTERM and SIGINT must end a run within 5 seconds in
one sentence that says how to go on.

The scripts run from a copy of src/, in children forked by one process (forked_runs.py), with small blocks, frequent
saves and slowed steps. Every twentieth kill goes to the real command line in a fresh interpreter, and some to one of
two runs in one folder, where that may be. Moments repeat with the seed as far as the machine's timing does. Prints a
table; the status is 1 where anything was wrong.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from forked_runs import AFTER, COMMANDS, SOURCES, Forker, Run, command, contents, is_unfinished, start_alone

FORKED, SHARED, FRESH = "", ", one of two", ", command line"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}
LONGEST_STOP = 5.0  # without those that the run waits for a core, where the machine has more to do
LONGEST_END = 2.0  # of a run that a signal finds when its results are complete
LONGEST_RUN = 300.0
OF_MODE = {
    FORKED: [name for name in COMMANDS if name != "pseudotime"],  # what scanpy compiles takes seconds
    SHARED: ["exhaustive", "two layers", "selective"],
    FRESH: ["exhaustive", "triplets", "pseudotime", "steering", "prepare"],
}
SHARE = {SHARED: 0.1, FRESH: 0.05}
STARTING = 0.25  # share of a run by a fresh interpreter, in the beginning of which no signal is caught yet
EARLIER = (  # whole, but not yet as in the end: counts, and tables of what is finished so far
    "progress.json", "results.json", "features.parquet", "edges.parquet", "exhaustive_summary.json",
    "layers_summary.json", "selective_summary.json", "calibration.json",
)  # fmt: skip
Start = Callable[[Path, Path], Run]


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run made: its files, how long it took, and when the first file had come."""

    files: dict[str, bytes]
    seconds: float
    first_file: float


@dataclass(frozen=True)
class Aim:
    """When to kill: after `seconds`; `kind` says since what, the `nth` of it where that happens often."""

    kind: str  # "start", "writing" (a half-written file), "written" (a new file)
    nth: int
    seconds: float

    @classmethod
    def drawn(cls, rng: random.Random, reference: Reference, starting: float) -> "Aim":
        """A random one; two of five are at random moments."""
        kind = rng.choice(("start", "start", "writing", "writing", "written"))
        if kind != "start":
            return cls(kind, 1 + int(len(reference.files) * rng.random() ** 2), rng.uniform(0, 2e-3))
        earliest = rng.choice((starting * reference.seconds, reference.first_file, reference.first_file))
        return cls(kind, 1, rng.uniform(earliest, 1.05 * reference.seconds))


@dataclass
class Tally:
    """What was seen of one experiment."""

    n_runs: int = 0
    kills: Counter = field(default_factory=Counter)
    n_half_written: int = 0
    longest_stop: float = 0.0
    found: Counter = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def fault(self, kind: str, what: str) -> None:
        """Count something that must not be."""
        self.found[kind] += 1
        self.notes.append(f"{kind}: {what}")


@dataclass
class Victim:
    """One output folder that a run is killed in again and again."""

    out_dir: Path
    start: Start
    reference: Reference
    tally: Tally
    is_shared: bool = False
    seen: set[str] = field(default_factory=set)
    n_runs: int = 0

    def run(self) -> Run:
        """Start the command once more."""
        self.n_runs += 1
        self.tally.n_runs += 1
        return self.start(self.out_dir, self.out_dir.with_name(f"{self.out_dir.name}.{self.n_runs}.log"))

    def kill(self, aim: Aim, number: signal.Signals, *, to_group: bool) -> bool:
        """Run and kill; False where the run was over before."""
        other = self.run() if self.is_shared else None
        run = self.run()
        try:
            return self.hit(run, aim, number, to_group=to_group)
        finally:
            if other is not None:
                self.ended_alone(other)

    def hit(self, run: Run, aim: Aim, number: signal.Signals, *, to_group: bool) -> bool:
        """Kill a run that has been started; False where it was over before."""
        if not wait_for(aim, run, self.out_dir):
            self.ended_alone(run)
            return False
        killed, queued = time.monotonic(), run.seconds_queued()
        run.send(number, to_group=to_group)
        status = run.wait(LONGEST_RUN)
        if status is None:
            run.send(signal.SIGKILL, to_group=True)
            run.wait(60)
        seconds = time.monotonic() - killed - (run.queued - queued)
        self.tally.kills[number.name] += 1
        self.look(f"{run.log} after {number.name} ({aim})")
        if number in STATUS:
            self.tally.longest_stop = max(self.tally.longest_stop, seconds)
            self.stopped(run, number, seconds, aim)
        return True

    def look(self, where: str) -> None:
        """Check the folder after a kill: every file whole, none gone."""
        there = contents(self.out_dir)
        unfinished = {name for name in there if is_unfinished(name)}
        half_written = sorted(name for name in unfinished if name.endswith(".tmp"))
        self.tally.n_half_written += bool(half_written)
        for name in sorted(there.keys() - set(half_written)):
            if isinstance(there[name], str):
                self.tally.fault("damaged", f"{name}: {there[name]}; {where}")
            elif name in unfinished or Path(name).name in EARLIER:
                continue
            elif there[name] != self.reference.files.get(name):
                self.tally.fault("damaged", f"{name} is not what it is in the end; {where}")
        for name in sorted(self.seen - there.keys()):
            self.tally.fault("lost", f"{name}; {where}")
        self.seen |= there.keys() - unfinished

    def stopped(self, run: Run, number: signal.Signals, seconds: float, aim: Aim) -> None:
        """Check how a run answered SIGTERM or SIGINT."""
        said = run.said()
        if seconds > LONGEST_STOP:
            self.tally.fault("untidy", f"{seconds:.1f} s until {number.name} ended {run.log}")
        is_over = self.is_shared or contents(self.out_dir) == self.reference.files
        if run.status() in (0, -number) and "Traceback" not in said and is_over and seconds < LONGEST_END:
            return  # it was as good as over
        sentences = [line for line in said.splitlines() if "run the same command again" in line]
        if run.status() != STATUS[number] or len(sentences) != 1 or "Traceback" in said:
            self.tally.fault(
                "untidy", f"status {run.status()} after {number.name} ({aim}), see {run.log}: {said[-500:]}"
            )

    def ended_alone(self, run: Run) -> None:
        """Wait for a run that nobody kills, and check that it ended well."""
        if run.wait(LONGEST_RUN) != 0:
            self.tally.fault("wrong", f"status {run.status()}, see {run.log}: {run.said()[-500:]}")

    def finish(self) -> None:
        """Leave it alone now, and compare every file."""
        self.ended_alone(self.run())
        there, expected = contents(self.out_dir), self.reference.files
        for name in sorted(expected.keys() - there.keys()):
            self.tally.fault("lost", f"{name} in {self.out_dir}")
        for name in sorted(there.keys() - expected.keys()):
            self.tally.fault("untidy", f"{name} is left over in {self.out_dir}")
        for name in sorted(there.keys() & expected.keys()):
            if there[name] != expected[name]:
                self.tally.fault("wrong", f"{name} in {self.out_dir}")


def wait_for(aim: Aim, run: Run, out_dir: Path) -> bool:
    """Wait for the moment to kill; False where the run is over before."""
    started = time.monotonic()
    if aim.kind == "start":
        run.wait(aim.seconds - (time.monotonic() - started))
        return run.status() is None
    known = {str(path) for path in out_dir.rglob("*")}
    n_new = 0
    while n_new < aim.nth:
        for path in (path for path in out_dir.rglob("*") if str(path) not in known):
            known.add(str(path))
            n_new += (path.suffix == ".tmp") == (aim.kind == "writing")
        if run.status() is not None:
            return False
        time.sleep(5e-4)
    if aim.kind == "written":
        time.sleep(aim.seconds)
    return run.status() is None


def reference_of(start: Start, folder: Path) -> Reference:
    """The undisturbed run.

    Raises:
        SystemExit: it fails.
    """
    out_dir, started, first_file = folder / "undisturbed", time.monotonic(), None
    run = start(out_dir, folder / "undisturbed.log")
    while run.status() is None:
        if first_file is None and out_dir.is_dir() and any(out_dir.iterdir()):
            first_file = time.monotonic() - started
        time.sleep(0.005)
    if run.status() != 0:
        raise SystemExit(f"the undisturbed run ended with status {run.status()}: {run.said()}")
    seconds = time.monotonic() - started
    return Reference(contents(out_dir), seconds, seconds / 2 if first_file is None else first_file)


def crash(mode: str, start: Start, folder: Path, n_kills: int, rng: random.Random) -> Tally:
    """Kill runs of one command until `n_kills` have hit."""
    folder.mkdir()
    tally, reference = Tally(n_runs=1), reference_of(start, folder)
    starting = STARTING if mode == FRESH else 0.0
    for number in range(10 * n_kills):
        if tally.kills.total() == n_kills:
            break
        victim = Victim(folder / f"out{number}", start, reference, tally, is_shared=mode == SHARED)
        for _ in range(min(rng.randint(1, 4), n_kills - tally.kills.total())):
            aim = Aim.drawn(rng, reference, starting)
            signal_sent = rng.choice((signal.SIGKILL, *SIGNALS))
            if not victim.kill(aim, signal_sent, to_group=rng.random() < 0.5):
                break
        victim.finish()
        if not tally.found:
            shutil.rmtree(victim.out_dir)
    return tally


def table(tallies: dict[str, Tally]) -> Iterator[str]:
    """The counts as text, with a line of sums."""
    faults = ("wrong", "lost", "damaged", "untidy")
    names = [number.name for number in SIGNALS]
    yield f"{'experiment':<26}" + "".join(
        f"{title:>10}" for title in (*names, "mid-write", "runs", "stop [s]", *faults)
    )
    everything = Tally()
    for tally in tallies.values():
        everything.kills += tally.kills
        everything.found += tally.found
        everything.n_runs += tally.n_runs
        everything.n_half_written += tally.n_half_written
        everything.longest_stop = max(everything.longest_stop, tally.longest_stop)
    for name, tally in {**tallies, "all": everything}.items():
        counts = [*(tally.kills[number] for number in names), tally.n_half_written, tally.n_runs]
        numbers = [*counts, f"{tally.longest_stop:.2f}", *(tally.found[fault] for fault in faults)]
        yield f"{name:<26}" + "".join(f"{number:>10}" for number in numbers)


def shares(n_kills: int, chosen: list[str]) -> dict[tuple[str, str], int]:
    """How often to kill {(experiment, mode)}."""
    turns: list[tuple[str, str]] = []
    for mode in (FRESH, SHARED, FORKED):
        names = [name for name in OF_MODE[mode] if name in chosen]
        n_turns = int(n_kills * SHARE[mode]) if mode in SHARE else n_kills - len(turns)
        turns += [(name, mode) for name in (names * n_kills)[:n_turns]]
    return dict(sorted(Counter(turns).items()))


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--experiment", action="append", choices=COMMANDS, help="only this one; repeatable")
    parser.add_argument("--sources", type=Path, default=SOURCES, help="the scripts to kill")
    parser.add_argument("--slow", type=float, default=0.004, help="seconds that a step sleeps")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # runs in the background inherit that it is ignored
    root = Path(tempfile.mkdtemp(prefix="crash_runs_"))
    sources = shutil.copytree(args.sources, root / "src", ignore=shutil.ignore_patterns("__pycache__"))
    tallies: dict[str, Tally] = {}
    with Forker(sources, args.slow) as forker:
        chosen = args.experiment or list(COMMANDS)
        forker.ask({"inputs": str(root / "study")})
        for before in {AFTER[name] for name in chosen if name in AFTER}:
            script, flags = command(before, root / "study", root / "study" / "trace")
            run = forker.start(script, flags, root / f"{before}.log")
            if run.wait(LONGEST_RUN) != 0:
                raise SystemExit(f"{before} ended with status {run.status()}: {run.said()}")

        def starter(name: str, mode: str) -> Start:
            def start(out_dir: Path, log: Path) -> Run:
                script, flags = command(name, root / "study", out_dir)
                return start_alone(sources, script, flags, log) if mode == FRESH else forker.start(script, flags, log)

            return start

        for (name, mode), n_kills in shares(args.kills, chosen).items():
            title, rng = name + mode, random.Random(f"{args.seed} {name}{mode}")
            tallies[title] = crash(mode, starter(name, mode), root / title.replace(" ", "_"), n_kills, rng)
            print("\n".join(tallies[title].notes), end="\n" * bool(tallies[title].notes), flush=True)
    print("\n".join(table(tallies)))
    is_clean = not any(tally.found for tally in tallies.values())
    if is_clean:
        shutil.rmtree(root)
    else:
        print(f"Logs and folders: {root}")
    return 0 if is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
