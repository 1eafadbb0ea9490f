"""Runs of the scripts on small inputs, each in a child forked by one process that has done the imports.

A `Forker` starts that process; what it starts are `Run`s, which can be sent signals and waited for. `start_alone`
starts the real command line in a fresh interpreter instead. For crash_runs.py and the tests of faults.
"""

import contextlib
import ctypes
import importlib
import json
import os
import pkgutil
import platform
import resource
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).resolve().parents[1] / "src"
# what differs between two runs of one command
TIMES = ("elapsed_seconds", "total_elapsed_min", "seconds_per_pair_total_effect", "seconds_per_pair_same_position")
ORIGIN = ("provenance",)
LOCKS = (".lock", ".moment.lock")
CAPABILITY_VERSION = 0x20080522
FSYNC = {"x86_64": 74, "aarch64": 82}  # numbers of the system call
UNFINISHED = ("*.tmp", "*.claim.*", "*.partial.npz", "partial/*", "*/partial/*", "*/unfinished/*")
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STUDY = "--model {study}/model --data-root {study} --data-path {study}/cells.h5ad --min-median-tokens 5 --device cpu"
_CELLS = f"{_STUDY} --cells all --n-cells 12"
_TRAJECTORY = f"{_STUDY} --traj-dir {{study}}"
COMMANDS = {  # name: script and flags; {study} holds the inputs, {out} is the folder that the run writes
    "exhaustive": f"exhaustive_feature_tracing {_CELLS} --source-layer 1 --downstream-layers 2,4,5 --out-dir {{out}}",
    "two layers": f"exhaustive_feature_tracing {_CELLS} --source-layer 1,2 --downstream-layers 4,5 --end-idx 16 "
    "--save-effects --out-dir {out}",
    "same position": f"exhaustive_feature_tracing {_CELLS} --source-layer 1 --downstream-layers 2,4,5 --end-idx 20 "
    "--same-position --same-position-check 4 --out-dir {out}",
    "selective": f"selective_feature_tracing {_CELLS} --source-layers 1,2,4 --n-features 8 --out-dir {{out}}",
    "pairs": f"higher_order_ablation {_CELLS} --order 2 --pairs {{study}}/pairs.txt --target-layer 5 --save-effects "
    "--out-dir {out}",
    "triplets": f"higher_order_ablation {_CELLS} --triplets {{study}}/triplets.txt --target-layer 5 --out-dir {{out}}",
    "trajectory": f"trajectory_analysis {_TRAJECTORY} --layers 1,4 --out-dir {{out}}",
    "pseudotime": f"trajectory_analysis {_STUDY} --root-cell-type Monocyte --layers 1,4 --out-dir {{out}}",
    "steering": f"trajectory_steering {_TRAJECTORY} --panel {{study}}/panel.json --out-dir {{out}}",
    "specificity": f"specificity_controls {_CELLS} --trace-dir {{study}}/trace --n-features 4 --draws 2 "
    "--min-active-cells 2 --out-dir {out}",
    "controlled": f"controlled_steering {_TRAJECTORY} --layers 1,5 --n-on 2 --n-off 2 --draws 1 --doses 0.5 "
    "--probe-data-path {study}/others.h5ad --probe-labels macrophage Monocyte --markers {study}/markers.json "
    "--seed 2 --out-dir {out}",
    "prepare": f"prepare_inputs {_CELLS} --data-root {{out}} --layers 1,4 --expansion 2 --k 4 --epochs 3 "
    "--batch-size 32 --min-firings 2 --gmt GO_BP={study}/terms.gmt",
}
AFTER = {"specificity": "exhaustive"}  # what is to be run before one of them, into {study}/trace
PANEL = [{"layer": 1, "idx": 0, "d": 1.25, "label": "Chromatin"}, {"layer": 5, "idx": 6}, {"layer": 4, "idx": 10}]
TRIPLETS = "1:7,2:30,4:12\n1:0,1:21,4:5\n4:8,2:9,1:33\n"
PAIRS = "1:7,2:30\n2:9,2:11\n1:0,4:5\n"


def command(name: str, study: Path, out_dir: Path) -> tuple[str, list[str]]:
    """Script and flags of one of the `COMMANDS`."""
    script, *flags = (word.format(study=study, out=out_dir) for word in COMMANDS[name].split())
    return script, flags


def write_inputs(root: Path) -> None:
    """Everything that the commands read: a study with cell types, pseudotime, labels, a panel, pairs and gene sets."""
    import anndata
    import numpy as np

    from conftest import write_study
    from test_selective_tracing import annotate

    study = write_study(root)
    annotate(study)
    adata = anndata.read_h5ad(study.cells)
    adata.obs["cell_type"] = ["Monocyte" if i % 2 else "macrophage" for i in range(adata.n_obs)]
    adata.obs["tissue_in_publication"] = ["Blood"] * adata.n_obs
    adata.write_h5ad(study.cells)
    metadata = {
        "pseudotime": [*(i / adata.n_obs for i in range(adata.n_obs - 1)), None],
        "cell_types": list(adata.obs["cell_type"]),
        "tissues": ["Blood"] * adata.n_obs,
        "cell_ids": list(adata.obs_names),
    }
    others = adata.copy()  # for the probe: the same genes in another order, so that no cell is one of the run's
    others.X = adata.X[:, ::-1].copy()
    others.obs_names = [f"other {name}" for name in adata.obs_names]
    others.write_h5ad(root / "others.h5ad")
    rng = np.random.default_rng(0)
    terms = [["term", "", *(f"GENE{gene}" for gene in rng.choice(60, 12, replace=False))] for _ in range(25)]
    texts = {
        "cell_metadata.json": json.dumps(metadata),
        "panel.json": json.dumps(PANEL),
        "pairs.txt": PAIRS,
        "triplets.txt": TRIPLETS,
        "markers.json": json.dumps(
            {"early": [f"GENE{i}" for i in range(30)], "late": [f"GENE{i}" for i in range(30, 60)]}
        ),
        "terms.gmt": "".join("\t".join([f"{words[0]}{i}", *words[1:]]) + "\n" for i, words in enumerate(terms)),
    }
    for name, text in texts.items():
        (root / name).write_text(text)


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file of a run but its locks, without `TIMES` and `ORIGIN`; a text says what is damaged about a file."""
    files: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in LOCKS:
            try:
                files[str(path.relative_to(folder))] = _content(path)
            except FileNotFoundError:  # another run has just moved it
                continue
            except Exception as error:  # damaged files make their readers raise almost anything
                files[str(path.relative_to(folder))] = repr(error)
    return files


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix == ".json":
        return json.dumps(_timeless(json.loads(content))).encode()
    if path.suffix == ".npz":
        import numpy as np

        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                arrays[name]  # checks its sum
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        table = pq.read_table(path, partitioning=None, page_checksum_verification=True)
        if path.parent.name == "blocks":  # holds times
            facts = _timeless(json.loads(table.schema.metadata[b"features"]))
            return json.dumps([facts, table.to_pylist()]).encode()
    if path.suffix == ".pt":
        import torch

        torch.load(path, weights_only=True)
    return content


def _timeless(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _timeless(value) for key, value in content.items() if key not in (*TIMES, *ORIGIN)}
    return [_timeless(value) for value in content] if isinstance(content, list) else content


def is_unfinished(name: str) -> bool:
    """Whether a file, named relative to the folder, is one that only a run at work or a killed one leaves."""
    return any(fnmatch(name, pattern) for pattern in UNFINISHED)


@dataclass
class Run:
    """One run that has been started; what it prints goes to `log`, `queued` is how long it waited for a core."""

    pid: int
    log: Path
    asker: "Forker | subprocess.Popen[bytes]"
    ended: int | None = None
    queued: float = 0.0

    def status(self) -> int | None:
        """Its exit status, -N where signal N ended it, None while it is at work."""
        if self.ended is None:
            self.seconds_queued()
            is_alone = isinstance(self.asker, subprocess.Popen)
            self.ended = self.asker.poll() if is_alone else self.asker.ask({"poll": self.pid})
        return self.ended

    def seconds_queued(self) -> float:
        """How long it has waited for a core so far; 0 where the system does not say."""
        with contextlib.suppress(OSError, IndexError):
            self.queued = int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[1]) / 1e9
        return self.queued

    def wait(self, seconds: float) -> int | None:
        """What `status` says once it has ended, or after this many seconds."""
        deadline = time.monotonic() + seconds
        while self.status() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        return self.status()

    def send(self, number: int, *, to_group: bool = False) -> None:
        """Send a signal to it, or as Ctrl-C does to all that it has started too."""
        (os.killpg if to_group else os.kill)(self.pid, number)

    def said(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace")


@dataclass
class Forker:
    """One process with all imports done, which forks a child for every run.

    `sources` is the folder with the scripts, `slow` the seconds that every step of the engines sleeps, so that small
    runs last long enough to be hit.
    """

    sources: Path = SOURCES
    slow: float = 0.0
    process: subprocess.Popen[str] = field(init=False)

    def __enter__(self) -> "Forker":
        paths = os.pathsep.join([str(self.sources), str(Path(__file__).parent)])
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        words = [sys.executable, __file__, str(self.slow)]
        self.process = subprocess.Popen(
            words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def ask(self, request: Mapping[str, Any]) -> Any:
        """One question to the process, and its answer."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the process that forks has ended"
        return json.loads(answer)

    def start(self, script: str, flags: list[str], log: Path, **limits: Any) -> Run:
        """Start a run; `limits` are those of `confine`."""
        return Run(self.ask({"script": script, "flags": flags, "log": str(log), "limits": limits}), log, self)


def start_alone(sources: Path, script: str, flags: list[str], log: Path) -> Run:
    """Start a script by its command line."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, str(sources / f"{script}.py"), *flags], env=environment, stdin=subprocess.DEVNULL,
            stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip
    return Run(process.pid, log, process)


def serve(slow: float) -> None:
    """Answer a `Forker`."""
    names = dict.fromkeys(words.split()[0] for words in COMMANDS.values())
    scripts = {name: importlib.import_module(name) for name in names}
    importlib.import_module("transformers")
    hurry(slow)
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # until a run has begun to answer them
    for line in sys.stdin:
        request, answer = json.loads(line), None
        if "inputs" in request:
            with contextlib.redirect_stdout(sys.stderr):
                write_inputs(Path(request["inputs"]))
        elif "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                confine(Path(request["log"]), **request["limits"])
                status = scripts[request["script"]].main(request["flags"])
                sys.stdout.flush()
                os._exit(status)  # to take down all those imports takes seconds in a fork: it copies their memory
        print(json.dumps(answer), flush=True)
    os._exit(0)


def confine(
    log: Path,
    *,
    powerless: bool = False,
    file_bytes: int | None = None,
    no_sync: int | None = None,
    full: bool = False,
) -> None:
    """Prepare a child: a session of its own, its output in `log`, what it may do limited.

    Args:
        log: where it prints.
        powerless: permissions of files hold for it, even where it is root.
        file_bytes: how large a file may grow.
        no_sync: number of the error with which the kernel answers every fsync.
        full: its stdout is a full disk.
    """
    os.setsid()
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (said, 1), (said, 2)):
        os.dup2(source, target)
    if full:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
    libc = ctypes.CDLL(None, use_errno=True)
    if powerless and os.geteuid() == 0 and libc.capset(struct.pack("Ii", CAPABILITY_VERSION, 0), bytes(24)):
        raise OSError(ctypes.get_errno(), "capset")
    if no_sync is not None:
        refuse_sync(libc, no_sync)


def refuse_sync(libc: ctypes.CDLL, number: int) -> None:
    """Let the kernel answer every fsync of this process with an error, by a filter of system calls (seccomp)."""
    steps = [  # of the classic BPF machine: operation, jumps where true and false, value
        (0x20, 0, 0, 0),  # load the number of the system call
        (0x15, 0, 1, FSYNC[platform.machine()]),
        (0x06, 0, 0, 0x00050000 | number),
        (0x06, 0, 0, 0x7FFF0000),  # any other one is allowed
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)))
    for words in ((38, 1, 0, 0, 0), (22, 2, program, 0, 0)):  # PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP
        if libc.prctl(*words):
            raise OSError(ctypes.get_errno(), "prctl")


def hurry(slow: float) -> None:
    """Small blocks and frequent saves, so that small runs have parts; steps and writes that take `slow` seconds."""
    import torch

    import cellcircuits
    import sae_model
    from cellcircuits import cli, effects, graph_store, joint, steering

    for module in pkgutil.iter_modules(cellcircuits.__path__):
        found = importlib.import_module(f"cellcircuits.{module.name}")
        for name in vars(found):
            if name.startswith("SAVE_EVERY"):
                setattr(found, name, 0.05)
    graph_store.BLOCK_SIZE = 4
    steps = [
        (effects.Bench, "push_effects"), (joint.JointBench, "clean"), (steering.SteeringBench, "mean_changes"),
        (sae_model.TopKSAE, "top_k"), (torch.nn.Embedding, "forward"), (torch.optim.Adam, "step"), (os, "fsync"),
    ]  # fmt: skip
    for owner, name in steps:
        setattr(owner, name, _slowed(getattr(owner, name), slow))
    real = cli.run_script

    def run_script(main: Any, *rest: Any, **more: Any) -> int:
        def begun() -> int:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
            return main()

        return real(begun, *rest, **more)

    cli.run_script = run_script
    torch.set_num_threads(1)


def _slowed(real: Any, seconds: float) -> Any:
    def slowed(*values: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return real(*values, **named)

    return slowed


if __name__ == "__main__":
    serve(float(sys.argv[1]))
