"""Mutation testing: do the tests notice if a line of the algorithm is wrong?

    python tests/mutate.py ppo_clip.py ppo_klpen.py trpo_continuous.py --sample 320

A mutant is one script with one small error: + for -, < for <=, another constant, a missing statement, a condition that
is always true. Errors are made in the algorithm's half of a script, above the banner of its plumbing (the launcher: of
its legs). What is drawn follows from --seed. A function that several scripts share is mutated in all of them at once,
as a test compares them. The quick tests of the scripts concerned then run in a copy of the repository, until the first
that fails: the mutant is killed. If all pass, it has survived, and either it is equivalent, or a test is missing.
tests/MUTATION.md has the outcome. Each mutant's tests run in a fork of this process, which has imported what is slow to
import."""

import argparse
import ast
import contextlib
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import gymnasium  # noqa: F401
import pytest
import tensorboard.compat  # noqa: F401
import torch
import torch.utils.tensorboard  # noqa: F401
import tyro  # noqa: F401

with contextlib.suppress(ImportError):
    import sb3_contrib  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
TESTS = {
    "ppo_clip.py": "test_ppo_clip test_rollout test_truncation test_workers",
    "ppo_klpen.py": "test_ppo_klpen test_truncation",
    "trpo_continuous.py": "test_trpo test_truncation",
    "ppo_multiagent.py": "test_multiagent",
    "pbt_launcher.py": "test_pbt",
}
ONE_AGENT = {"ppo_clip.py", "ppo_klpen.py", "trpo_continuous.py"}  # in test_train and test_against_sb3, too
SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}
SWAPS |= {ast.FloorDiv: ast.Mult, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq}
SWAPS |= {ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And}
NAMES = {"min": "max", "max": "min", "minimum": "maximum", "mean": "sum", "any": "all", "std": "var", "randn": "rand"}
DROPPED = {"abs", "clamp", "clip", "clone", "copy", "exp", "log", "rsqrt", "sqrt", "square"}  # x.abs() -> x


def variants(node):
    """Source text of everything that the node is replaced with."""
    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPS:
        yield ast.unparse(ast.copy_location(type(node)(**vars(node) | {"op": SWAPS[type(node.op)]()}), node))
        if ast.unparse(node).startswith("1 - "):
            yield ast.unparse(node.right)
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield ast.unparse(ast.Compare(node.left, [SWAPS[type(node.ops[0])](), *node.ops[1:]], node.comparators))
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        yield repr(not node.value if isinstance(node.value, bool) else node.value + 1)
        if isinstance(node.value, float) and node.value:
            yield repr(node.value * 0.9)
    elif isinstance(node, ast.UnaryOp):
        yield ast.unparse(node.operand)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in DROPPED:
        yield ast.unparse(node.func.value)
    elif isinstance(node, ast.Name | ast.Attribute):
        name = node.id if isinstance(node, ast.Name) else node.attr
        if name in NAMES:
            yield ast.unparse(node)[: -len(name)] + NAMES[name]
    elif isinstance(node, ast.Expr | ast.AugAssign | ast.Break) or (
        isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name | ast.Tuple)
    ):
        yield "pass"


def sites(text):
    """(name of the function, its source, its line, start, end, replacement) of each possible mutant."""
    for top in ast.parse(re.split("# ==== (?:Plumbing|Slots)", text)[0]).body:
        if not isinstance(top, ast.FunctionDef | ast.ClassDef):
            continue
        source, found = ast.get_source_segment(text, top).encode(), []
        starts = [0]
        for line in source.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))

        def place(node, starts=starts, top=top):
            first, last = node.lineno - top.lineno, node.end_lineno - top.lineno
            return starts[first] + node.col_offset, starts[last] + node.end_col_offset

        def visit(node, found=found, place=place):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) or isinstance(node, ast.JoinedStr):
                return  # a docstring, a message
            found.extend((*place(node), x, node.lineno) for x in variants(node))
            if isinstance(node, ast.If | ast.IfExp | ast.While):
                found.extend((*place(node.test), x, node.lineno) for x in ("True", "False"))
            for child in ast.iter_child_nodes(node):
                visit(child)

        visit(top)
        for start, end, new, line in found:
            new = new if new in ("pass", "True", "False") else f"({new})"
            yield top.name, source, line, start, end, new.encode()


def all_mutants(files):
    """{name: {file: mutated text}}; a function that several files share is one."""
    texts, mutants, seen = {file: (ROOT / file).read_text() for file in files}, {}, set()
    for text in texts.values():
        for function, source, line, start, end, new in sites(text):
            if (source, start, end, new) in seen:
                continue
            seen.add((source, start, end, new))
            shared = {f: x.encode().replace(source, source[:start] + new + source[end:]) for f, x in texts.items()}
            changed = {f: x for f, x in shared.items() if x != texts[f].encode()}
            old = " ".join(source[start:end].decode().split())
            where = "all" if len(changed) == len(texts) > 1 else "+".join(changed)
            mutants[f"{where}:{line} {function}: {old} -> {new.decode()}"] = changed
    return mutants


def run_tests(folder, name, files):
    """In a fork: the quick tests of the files concerned, with what is found in folder. Does not return."""
    os.setsid()  # with its workers it can be killed as a group
    os.chdir(folder)
    os.dup2(os.open("log", os.O_CREAT | os.O_WRONLY), 1)
    os.dup2(1, 2)
    sys.path[:] = [x for x in sys.path if x != str(ROOT / "tests")]
    del sys.modules["__main__"].__file__  # or each process that a test spawns would import all of the above
    tests = [test for file in files for test in TESTS[file].split()]
    if ONE_AGENT & set(files):
        tests.append("test_against_sb3")
        tests.insert(0 if " train:" in name or " Args:" in name else len(tests), "test_train")  # the likeliest first
    others = " or ".join(file.removesuffix(".py") for file in ONE_AGENT - set(files))
    flags = ["-x", "-q", "-n0", "-pno:cacheprovider", "-mnot slow"]
    flags += ["-k", f"not ({others})"] if others and ONE_AGENT & set(files) else []
    os._exit(pytest.main([*flags, *(f"tests/{test}.py" for test in dict.fromkeys(tests))]))


def outcome(folder, name, files, cpu_seconds):
    """Whether the tests pass in folder, and what they print."""
    pid, status, end = os.fork(), None, time.time() + 20 * cpu_seconds  # what hangs uses no CPU; a machine may be slow
    if not pid:
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))  # for a loop without an end
        run_tests(folder, name, files)
    while status is None and time.time() < end:
        time.sleep(0.02)
        ended, code = os.waitpid(pid, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if ended else None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if status is None:
        os.waitpid(pid, 0)
    return status == 0, Path(folder, "log").read_text() if status is not None else "hangs"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", choices=TESTS)
    parser.add_argument("--sample", type=int, default=320)
    parser.add_argument("--skip", type=int, default=0, help="of the sample, leave out as many: they were done before")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[""], help="of the sample, only what holds one of these texts")
    parser.add_argument("--timeout", type=int, default=30, help="seconds of CPU; a mutant that takes more is killed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    mutants = all_mutants(args.files)
    order = sorted(mutants, key=lambda name: random.Random(f"{args.seed} {name}").random())  # others change it little
    drawn = [name for name in order[args.skip : args.sample] if any(text in name for text in args.only)]
    with tempfile.TemporaryDirectory() as whole:
        for path in (*ROOT.glob("*.py"), *ROOT.glob("*.t*")):
            shutil.copy2(path, whole)
        shutil.copytree(ROOT / "tests", Path(whole, "tests"), ignore=shutil.ignore_patterns("__pycache__"))
        passed, log = outcome(whole, "", args.files, 600)
        if not passed:
            sys.exit(f"the tests fail without a mutant:\n{log}")
        print(f"{len(drawn)} of {len(mutants)} mutants", flush=True)
        counts = {}
        for name in drawn:
            start = time.time()
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                shutil.copytree(whole, folder, dirs_exist_ok=True)
                for file, text in mutants[name].items():
                    Path(folder, file).write_bytes(text)
                survived, log = outcome(folder, name, mutants[name], args.timeout)
            counts.setdefault(name.split(":")[0], [0, 0])[survived] += 1
            result = f"{'SURVIVED' if survived else 'killed'} {time.time() - start:.1f} s {name}"
            failed = [x.split("::")[-1] for x in log.splitlines() if x.startswith(("FAILED", "ERROR"))]
            print(result if survived else f"{result} # {(failed or [log[-200:]])[0]}", flush=True)
    for file, (killed, survived) in sorted(counts.items()):
        print(f"{file}: {killed} killed, {survived} survived")


if __name__ == "__main__":
    main()
