"""The pages say what the repository does: their tables are those of the stored data, their flags, files, links and
edits exist."""

import importlib
import importlib.util
import json
import re
import shlex
import statistics

import pytest
from conftest import ROOT, SCRIPTS


def loaded(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pages = loaded(ROOT / "docs/pages.py")
README = (ROOT / "README.md").read_text()
TEXT = {path.name: path.read_text() for path in pages.PAGES}
ALL = "\n".join(TEXT.values())


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda path: path.name)
def test_tables_and_links_to_lines_are_up_to_date(page):
    assert pages.updated(page) == page.read_text(), "run python docs/pages.py"


def test_a_link_to_a_line_that_is_not_there_is_noticed():
    good = pages.with_line_numbers("[`def gae`](../ppo_clip.py#L1)")
    line = int(re.search(r"#L(\d+)", good)[1])
    assert (ROOT / "ppo_clip.py").read_text().splitlines()[line - 1].startswith("def gae(")
    for text in ("def no_such_function", "import"):  # in no line, in many
        with pytest.raises(ValueError, match="lines of ppo_clip.py"):
            pages.with_line_numbers(f"[`{text}`](../ppo_clip.py#L1)")


def test_the_scores_of_the_first_page_are_those_of_the_stored_runs():
    runs = importlib.import_module("reproduce").read("v4", ROOT / "benchmark/results")
    for script in ("ppo_clip.py", "ppo_klpen.py", "trpo_continuous.py"):
        ends = [float(x[-1]["episodic_return"]) for (s, env, _), x in runs.items() if (s, env) == (script, "Hopper-v4")]
        cell = f"{statistics.fmean(ends):.0f} ± {statistics.stdev(ends):.0f}"
        assert re.search(rf"^\| \[`{script}`\].*\| {cell} \|", README, flags=re.M), f"{script}: {cell}"


@pytest.mark.parametrize("group", ["ppo", "trpo", "teams"])
def test_the_speeds_are_the_stored_ones(group):
    """Medians and ranges of the CPU's table, by the name of the contender."""
    stored, rows = json.loads((ROOT / f"benchmark/results/speed_{group}.json").read_text()), 0
    baseline = statistics.median(run["sps"] for run in next(iter(stored.values())))
    if group == "trpo":
        del stored["bare environments, 1 core"]  # the table's are from the run beside PPO
    for line in TEXT["speed.md"].splitlines():
        name, *cells = (x.strip() for x in line.strip("| ").split(" | "))
        if name in stored:
            sps = [run["sps"] for run in stored[name]]
            assert cells[:2] == [f"{statistics.median(sps):.0f}", f"{min(sps):.0f}-{max(sps):.0f}"], name
            assert group == "teams" or cells[2] == f"{statistics.median(sps) / baseline:.2f}", name
            if "startup_s" in stored[name][0]:
                other = [statistics.median(run[key] for run in stored[name]) for key in ("startup_s", "memory_mb")]
                assert cells[-2:] == [f"{x:.0f}" for x in other], name
            rows += 1
    assert rows >= 3


def test_the_first_page_is_short():
    assert len(README.split()) <= 900
    command = next(line for line in README.splitlines() if line.endswith("-m pytest"))
    assert all(len(line) <= 120 for line in README.splitlines() if line != command)


def test_the_two_commands():
    commands = re.findall(r"^python3 -m venv .*$", README, flags=re.M)
    assert len(commands) == 2
    assert commands[0].endswith("ppo_clip.py --env-id Hopper-v4") and commands[1].endswith("-m pytest")


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_in_a_command_exists(name):
    source = (ROOT / f"{name}.py").read_text()
    fields = set(re.findall(r"^    (\w+): .* = ", source, flags=re.M))
    for line in re.findall(rf"^.*python {name}\.py.*$", (ALL + source).replace("\\\n", " "), flags=re.M):
        for flag in re.findall(r"--([a-z][a-z-]+)", line.split("#")[0].split(" -- ")[0]):
            assert flag.removeprefix("no-").replace("-", "_") in fields, line


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_command_that_starts_a_run_is_accepted(name, monkeypatch):
    """All but those that need a run to go on from, or a GPU. tests/test_contract.py and test_pbt.py have those."""
    monkeypatch.chdir(ROOT)
    script, commands = importlib.import_module(name), 0
    text = re.sub(r"\\+\n", " ", ALL + (ROOT / f"{name}.py").read_text())
    for line in re.findall(rf"^ *(?:uv run|python) {name}\.py (.*)$", text, flags=re.M):
        argv = shlex.split(line, comments=True)
        if not {"--resume", "--evaluate", "--replay", "--cuda", "..."} & {*argv}:
            script.check_args(script.parse_args([x.replace("my_module:MyEnv-v0", "CartPole-v1") for x in argv]))
            commands += 1
    assert commands >= (1 if name == "pbt_launcher" else 3)


def test_every_file_and_anchor_it_names_exists():
    for path in re.findall(r"`((?:benchmark|tests|docs)/(?!results/STUDY)[\w./]*|\w+\.(?:py|txt))`", ALL):
        assert (ROOT / path).exists() or (ROOT / "tests" / path).exists(), path
    for page in pages.PAGES:
        targets = re.findall(r"\]\((?!http)([^)\s]+)\)|^\[\w+\]: (?!http)(\S+)", page.read_text(), flags=re.M)
        for target in map("".join, targets):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), f"{page.name}: {target}"
            if anchor and file.suffix == ".md":
                heads = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.M)
                assert anchor in [re.sub(r"[^\w\- ]", "", head).lower().replace(" ", "-") for head in heads], target


def test_a_trained_policy_in_ones_own_code(tmp_path):
    """The page's Python, with a run of our own."""
    script = importlib.import_module("ppo_clip")
    flags = ["--env-id", "Pendulum-v1", "--total-timesteps", "256", "--num-envs", "4", "--num-steps", "64"]
    script.train(script.parse_args([*flags, "--num-workers", "0", "--run-dir", str(tmp_path / "run")]))
    code, training = re.findall(r"```python\n(.*?)```", TEXT["runs.md"], flags=re.S)
    names = {}
    exec(code.replace("runs/walker", str(tmp_path / "run")).replace("Walker2d-v4", "Pendulum-v1"), names)
    assert names["obs"].shape == (3,) and -17 < names["reward"] <= 0 and names["action"].shape == (1, 1)
    small = ["--env-id", "Pendulum-v1", *flags[2:], "--gamma", "0.9", "--run-dir", str(tmp_path / "second")]
    training = training.replace('["--env-id", "Hopper-v4", "--gamma", "0.995"]', repr(small)).replace("2000000", "512")
    exec(training, names)
    assert names["summary"]["global_step"] == 512
    assert script.load_checkpoint(tmp_path / "second")["args"]["gamma"] == 0.9


def edits():
    """Each diff block of the page about copies: [(old line, new lines), ...]."""
    for block in re.findall(r"```diff\n(.*?)```", TEXT["changing-a-copy.md"], flags=re.S):
        pairs = []
        for line in block.splitlines():
            if line.startswith("-"):
                pairs.append((line[1:], []))
            elif line.startswith("+"):
                pairs[-1][1].append(line[1:])
        yield pairs


@pytest.mark.slow
@pytest.mark.parametrize("name,diffs", [("ppo_clip", 4), ("ppo_klpen", 4), ("trpo_continuous", 2)])
@pytest.mark.parametrize("number,pairs", enumerate(edits(), 1))
def test_the_edits_of_the_page_work_on_a_copy(number, pairs, name, diffs, tmp_path):
    source = (ROOT / f"{name}.py").read_text()
    if number > diffs:  # and the page says so
        assert not all(old.split("  # ")[0] in source for old, _ in pairs)
        return
    for old, new in pairs:
        lines = [line for line in source.splitlines() if line.split("  # ")[0] == old.split("  # ")[0]]
        assert len(lines) == 1, f"{old!r} is in {len(lines)} lines"
        source = source.replace(lines[0] + "\n", "\n".join(new) + "\n")
    (tmp_path / "my_ppo.py").write_text(source)
    script = loaded(tmp_path / "my_ppo.py")
    flags = ["--env-id", "Pendulum-v1", "--total-timesteps", "512", "--num-envs", "4", "--num-steps", "64"]
    result = script.train(script.parse_args([*flags, "--num-workers", "0", "--run-dir", str(tmp_path / "run")]))
    assert result["global_step"] == 512
    if "l2" in source:
        assert "l2" in (tmp_path / "run" / "progress.csv").read_text().splitlines()[0]
