"""The README says what the repository does: its tables are those of the stored data, its flags and files exist."""

import importlib
import importlib.util
import re
import statistics

import pytest
from conftest import ROOT, SCRIPTS

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "name,table", [("learning", "table"), ("multiagent", "table"), ("multiagent", "strength_table")]
)
def test_tables_are_made_from_the_stored_curves(name, table):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmark/{name}.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    assert getattr(benchmark, table)() in README


def test_table_1_is_made_from_the_stored_runs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmark"))
    plot = importlib.import_module("plot")
    scores = plot.normalised(plot.finals("ppo-table1", plot.RESULTS), ["Hopper-v4"])
    here = [f"{statistics.fmean(scores[setting].values()):.2f}" for setting in plot.PAPER]
    assert f"| here, Hopper-v4 | {' | '.join(here)} |" in README
    paper = [f"{score:.2f}" for score in plot.PAPER.values()]
    assert f"| paper, seven environments | {' | '.join(paper)} |" in README


def test_the_two_commands():
    commands = re.findall(r"^python3 -m venv .*$", README, flags=re.M)
    assert len(commands) == 2
    assert commands[0].endswith("ppo_clip.py --env-id Hopper-v4") and commands[1].endswith("-m pytest")


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_in_a_command_exists(name):
    source = (ROOT / f"{name}.py").read_text()
    fields = set(re.findall(r"^    (\w+): .* = ", source, flags=re.M))
    for line in re.findall(rf"^.*python {name}\.py.*$", README + source, flags=re.M):
        for flag in re.findall(r"--([a-z][a-z-]+)", line.split("#")[0].split(" -- ")[0]):
            assert flag.removeprefix("no-").replace("-", "_") in fields, line


def test_every_file_it_names_exists():
    for path in re.findall(r"`((?:benchmark|tests)/[\w./]*|\w+\.(?:py|txt))`", README):
        assert (ROOT / path).exists() or (ROOT / "tests" / path).exists(), path
