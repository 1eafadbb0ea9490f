"""Mutation testing: does a test fail when the code it covers is broken? mutmut answers, in a copy of the tree.

    .venv/bin/python -m pip install mutmut==3.8.1
    .venv/bin/python tests/mutation.py effects /tmp/mutation_effects
    cd /tmp/mutation_effects && PYTHON -m mutmut show cellcircuits.stats.x_cohens_d__mutmut_3
    .venv/bin/python tests/mutation.py effects /tmp/mutation_effects --survivors

`GROUPS` says which modules are broken and which tests are asked. A second run into the same folder goes on: it tries
what has changed and keeps the other results.
mutmut leaves functions with decorators alone. Here they are the heart of the matter, so in the copy
`@inference_mode() def clean` becomes `def clean` and `clean = inference_mode()(clean)`, which is the same.
"""

import argparse
import ast
import gc
import json
import os
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GROUPS = {  # modules of the library, tests
    "effects": (
        ("interventions", "effects", "stats"),
        ("interventions", "engine", "stats", "precision", "self_check", "clean_runs", "batch_memory", "finite"),
    ),
    "files": (
        ("jsonio", "graph_store", "claims", "manifest", "results"),
        ("jsonio", "results", "manifest", "folders_in_words", "graph_store", "edge_records", "claims",
         "claims_in_trouble", "shared_folder", "calibration", "untrusted.py::TestJson"),
    ),
    "resume": (
        ("tracing", "trace_run"),
        ("trace_block", "tracer", "calibration"),
    ),
}  # fmt: skip
SETTINGS = """
[tool.mutmut]
source_paths = ["src"]
only_mutate = {modules}
pytest_add_cli_args_test_selection = {tests}
pytest_add_cli_args = ["-p", "no:cacheprovider", "-p", "mutation"]
process_isolation = "forkserver"
timeout_multiplier = 8.0
timeout_constant = 5.0
use_git_change_detection = false
"""
LEFT_TO_MUTMUT = ("classmethod", "staticmethod")
# of one mutant's tests, by pytest's or the child's exit code; mutmut kills a child that takes too long with SIGXCPU
KILLED, TIMEOUT, SURVIVED, NO_TESTS, UNTRIED = "killed", "timeout", "survived", "no tests", "untried"
OUTCOMES = {None: UNTRIED, 0: SURVIVED, 5: NO_TESTS, 33: NO_TESTS, 36: TIMEOUT, -signal.SIGXCPU: TIMEOUT}


def main(argv: list[str] | None = None) -> int:
    """Copy, run mutmut, print the score of every module."""
    parser = argparse.ArgumentParser(description="Mutation testing with mutmut in a copy of the tree.")
    parser.add_argument("group", choices=GROUPS, help="which modules")
    parser.add_argument("folder", type=Path, help="where to work; a folder of an earlier run is gone on with")
    parser.add_argument("--survivors", action="store_true", help="try those again that survived")
    parser.add_argument("--max-children", type=int, default=os.cpu_count(), help="processes at once")
    args = parser.parse_args(argv)
    copy_tree(args.folder, *GROUPS[args.group])
    survivors = [name for name, outcome in outcomes(args.folder) if outcome in (SURVIVED, NO_TESTS)]
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(args.max_children)]
    command += survivors if args.survivors else []
    this_as_plugin = {"PYTHONPATH": str(args.folder.resolve() / "tests")}
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **this_as_plugin}
    code = subprocess.run(command, cwd=args.folder, env=settings, check=False).returncode
    print(report(args.folder))
    return code


def pytest_collection_finish(session: pytest.Session) -> None:
    """After the look at all tests from which mutmut forks a child per mutant, spare the children much copying.

    The first garbage collection of a child would write to every object of torch and so copy it: most of a second.
    """
    if session.config.option.collectonly:
        gc.collect()
        gc.freeze()


def copy_tree(folder: Path, modules: Sequence[str], tests: Sequence[str]) -> None:
    """Bring the copy up to date; files that are the same keep their time, by which mutmut knows them."""
    mutated = [f"src/cellcircuits/{name}.py" for name in modules]
    selection = [f"tests/test_{name}" if "::" in name else f"tests/test_{name}.py" for name in tests]
    settings = SETTINGS.format(modules=mutated, tests=selection)
    for path in (*ROOT.glob("src/**/*.py"), *ROOT.glob("tests/*.py"), ROOT / "pyproject.toml"):
        name = path.relative_to(ROOT).as_posix()
        content = path.read_text(encoding="utf-8")
        if name in mutated:
            content = undecorated(content)
        elif name == "pyproject.toml":
            content += settings
        copy = folder / name
        if not copy.exists() or copy.read_text(encoding="utf-8") != content:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(content, encoding="utf-8")


def undecorated(source: str) -> str:
    """The same module with the decorators of its functions and methods applied after each function."""
    tree = ast.parse(source)
    lines = source.splitlines()
    bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef))]
    functions = [node for body in bodies for node in body if isinstance(node, ast.FunctionDef)]
    for function in sorted(functions, key=lambda node: node.lineno, reverse=True):
        decorators = [ast.unparse(node) for node in function.decorator_list]
        if not decorators or decorators[0] in LEFT_TO_MUTMUT:
            continue
        applied = function.name
        for decorator in reversed(decorators):
            applied = f"{decorator}({applied})"
        lines.insert(function.end_lineno, f"{' ' * function.col_offset}{function.name} = {applied}")
        del lines[function.decorator_list[0].lineno - 1 : function.lineno - 1]
    return "\n".join(lines) + "\n"


def outcomes(folder: Path) -> Iterator[tuple[str, str]]:
    """Every mutant and what became of it."""
    for path in sorted((folder / "mutants" / "src").rglob("*.py.meta")):
        for name, code in json.loads(path.read_text())["exit_code_by_key"].items():
            yield name, OUTCOMES.get(code, KILLED)


def report(folder: Path) -> str:
    """One line per module: mutants, killed, timeouts, survivors and the share that was caught."""
    by_module: dict[str, Counter[str]] = defaultdict(Counter)
    for name, outcome in outcomes(folder):
        for module in (name.split(".")[-2], "all"):
            by_module[module][outcome] += 1
    columns = (KILLED, TIMEOUT, SURVIVED, NO_TESTS, UNTRIED)
    lines = [f"{'module':20} mutants" + "".join(f"{column:>10}" for column in columns) + "    caught"]
    for module, counts in sorted(by_module.items(), key=lambda item: (item[0] == "all", item[0])):
        tried = counts.total() - counts[UNTRIED]
        share = (counts[KILLED] + counts[TIMEOUT]) / max(tried, 1)
        lines.append(f"{module:20} {counts.total():7}" + "".join(f"{counts[c]:10}" for c in columns) + f"{share:10.1%}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
