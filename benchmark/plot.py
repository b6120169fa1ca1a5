"""Tables and figures from the stored data alone, in seconds.

    python benchmark/plot.py v4                 # a study of reproduce.py: its tables (STUDY.md) and figure (STUDY.png)
    python benchmark/plot.py learning-curves    # the figure of the first page
    python benchmark/plot.py klpen-beta         # KL and beta of ppo_klpen.py over a run
    python benchmark/plot.py statistics         # what running statistics alone do to a policy
    python benchmark/plot.py notes              # one TRPO step, by the scripts' own functions (a minute)
    python benchmark/plot.py pbt                # Population Based Training against random search
    python benchmark/plot.py selfplay           # how strong self-play is, and what each of its parts does
    python benchmark/plot.py runs RUN ...       # run folders of your own: runs.png
    python benchmark/plot.py film RUN RUN RUN   # a looping picture of three policies, from their run folders

The intervals of ppo-table1 and pbt need scipy: pip install -r benchmark/requirements.txt
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from reproduce import ROOT, STUDIES, csv_rows, markdown, play, read

RESULTS, IMAGES = ROOT / "benchmark/results", ROOT / "docs/images"
RANDOM = {  # mean return of uniformly random actions, 100 episodes on v4
    "HalfCheetah-v4": -282.5, "Hopper-v4": 17.7, "InvertedDoublePendulum-v4": 59.1, "InvertedPendulum-v4": 6.2,
    "Reacher-v4": -43.4, "Swimmer-v4": 0.8, "Walker2d-v4": 2.6,
}  # fmt: skip
PAPER = {  # PPO paper, Table 1
    "no clipping or penalty": -0.39,
    "clipping, eps = 0.1": 0.76, "clipping, eps = 0.2": 0.82, "clipping, eps = 0.3": 0.70,
    "adaptive KL, d_target = 0.003": 0.68, "adaptive KL, d_target = 0.01": 0.74, "adaptive KL, d_target = 0.03": 0.71,
    "fixed KL, beta = 0.3": 0.62, "fixed KL, beta = 1": 0.71, "fixed KL, beta = 3": 0.72, "fixed KL, beta = 10": 0.69,
}  # fmt: skip
FIGURE3 = {  # PPO paper, Figure 3 (v1): the curves' ends, as Tianshou's authors read them off
    "PPO (clip)": {
        "HalfCheetah-v4": 1800, "Hopper-v4": 2330, "InvertedDoublePendulum-v4": 8000, "InvertedPendulum-v4": 1000,
        "Reacher-v4": -7, "Swimmer-v4": 108, "Walker2d-v4": 3460,
    },
    "TRPO": {
        "HalfCheetah-v4": 0, "Hopper-v4": 2100, "InvertedDoublePendulum-v4": 200, "InvertedPendulum-v4": 1000,
        "Reacher-v4": -115, "Swimmer-v4": 121, "Walker2d-v4": 1100,
    },
}  # fmt: skip


GAMMA, STEADY, LINEAR = "trpo_continuous.py --gamma 0.99", "--steady-obs", "trpo_continuous.py --kl-schedule linear"
DOUBLE, OTHER = ("double-pendulum", "trpo_continuous.py"), ("double-pendulum", "sb3-contrib TRPO")
LESS = {  # differences that a study is for: a row's name, a setting of the study, another study and its setting
    "v4": [
        ("ppo_clip.py, less Stable-Baselines3 PPO", "ppo_clip.py", "v4-baselines", "Stable-Baselines3 PPO"),
        ("ppo_klpen.py, less Stable-Baselines3 PPO", "ppo_klpen.py", "v4-baselines", "Stable-Baselines3 PPO"),
        ("trpo_continuous.py, less sb3-contrib TRPO", "trpo_continuous.py", "v4-baselines", "sb3-contrib TRPO"),
    ],
    "v5": [
        (f"{script}, less the same seeds of v4", script, "v4", script)
        for script in ("ppo_clip.py", "ppo_klpen.py", "trpo_continuous.py")
    ],
    "v4-flags": [(f"{GAMMA}, less sb3-contrib TRPO", GAMMA, "v4-baselines", "sb3-contrib TRPO")],
    "steady": [
        (f"`{STEADY}` less the default: {script}", f"{script} {STEADY}", "v4", script)
        for script in ("ppo_clip.py", "ppo_klpen.py", "trpo_continuous.py")
    ],
    "double-pendulum": [
        ("sb3-contrib's flags, less the default", STUDIES["double-pendulum"].settings[1].name, *DOUBLE),
        ("sb3-contrib's flags, less sb3-contrib TRPO", STUDIES["double-pendulum"].settings[1].name, *OTHER),
        ("the default, less sb3-contrib TRPO", "trpo_continuous.py", *OTHER),
    ],
    "kl-schedule": [
        ("`--kl-schedule linear`, less the default", LINEAR, "v4", "trpo_continuous.py"),
        ("both flags, less the default", f"{LINEAR} {STEADY}", "v4", "trpo_continuous.py"),
        ("both flags, less `--steady-obs` alone", f"{LINEAR} {STEADY}", "steady", f"trpo_continuous.py {STEADY}"),
        ("both flags, less sb3-contrib TRPO", f"{LINEAR} {STEADY}", "v4-baselines", "sb3-contrib TRPO"),
    ],
}


# ---- studies of reproduce.py -----------------------------------------------------------------------------------------


def returns(study, results, at=None):
    """{(setting, env): {seed: episodic_return}} at the end, or at a step, on a straight line between stored points."""
    found = {}
    for (setting, env, seed), rows in read(study, results).items():
        points = [(int(row["step"]), float(row["episodic_return"])) for row in rows]
        value = float(np.interp(at, *zip(*points, strict=True))) if at else points[-1][1]
        found.setdefault((setting, env), {})[seed] = value
    return found


def normalised(found, envs):
    """{setting: {seed: score}} as in the PPO paper's Table 1: per environment 0 is a random policy and 1 the best
    setting's mean; averaged over environments. Of the seeds that all settings have in all of these environments."""
    settings = list(dict.fromkeys(setting for setting, _ in found))
    seeds = sorted(set.intersection(*(set(found[setting, env]) for setting in settings for env in envs)))
    x = np.array([[[found[setting, env][seed] for seed in seeds] for env in envs] for setting in settings])
    random, best = np.array([RANDOM[env] for env in envs]), x.mean(2).max(0)  # of each environment
    scores = ((x - random[:, None]) / (best - random)[:, None]).mean(1)  # (settings, seeds)
    return {setting: dict(zip(seeds, row)) for setting, row in zip(settings, scores.tolist())}


def students(values):
    """95 % interval of the mean by Student's t. A bootstrap of three values would give only their range, which is too
    narrow."""
    from scipy.stats import t

    mean, error = statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5
    return [mean + error * x for x in t.interval(0.95, len(values) - 1)]


def interval(values):
    """The same as text; empty for a single value."""
    digits = 2 if abs(statistics.fmean(values)) < 100 else 0
    return " to ".join(f"{x:.{digits}f}" for x in students(values)) if len(values) > 1 else ""


def cell(values, number=True):
    """Mean ± standard deviation over seeds (and their number), as text."""
    if not values:
        return ""
    mean = statistics.fmean(values)
    digits = 0 if abs(mean) >= 100 else 1
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{spread}" + f" ({len(values)})" * number


def table(study, results):
    """A markdown table: one row per setting, one column per environment (and step)."""
    what = STUDIES[study]
    found = {step: returns(study, results, step) for step in (*what.at, None)}
    settings = [s.name for s in what.settings if any(setting == s.name for setting, _ in found[None])]
    envs = [env for env in what.envs if any(e == env for _, e in found[None])]
    scores = {}
    if study == "ppo-table1":  # its scores compare the settings, so an environment counts when all of them have run
        envs = [
            env for env in envs if all(len(found[None].get((s.name, env), ())) >= what.seeds for s in what.settings)
        ]
        scores = normalised(found[None], envs) if envs else {}
    heads = [f"{env}, {step or what.steps:,} steps" if what.at else env for env in envs for step in found]
    rows = []
    for setting in settings:
        cells = [cell(found[step].get((setting, env), {}).values(), not scores) for env in envs for step in found]
        if scores:
            x = list(scores[setting].values())
            cells = [f"{PAPER[setting]:.2f}", f"{statistics.fmean(x):.2f} ({interval(x)})", *cells]
        rows.append([setting, *cells])
    if study == "figure3":
        rows += [[f"the paper's {setting}", *(ends[env] for env in envs)] for setting, ends in FIGURE3.items()]
    if scores:
        heads = ["paper", "here (95 % interval)", *(env.removesuffix("-v4") for env in envs)]
    return markdown(["setting", *heads], rows)


def difference(found, others):
    """What the returns {seed: return} have more than others, over the seeds that both have: mean ± its standard
    error (and the number of seeds), as text."""
    more = [x - others[seed] for seed, x in found.items() if seed in others]
    mean, error = statistics.fmean(more), statistics.stdev(more) / len(more) ** 0.5
    digits = 0 if max(map(abs, found.values())) >= 100 else 1
    return f"{mean:.{digits}f} ± {error:.{digits}f} ({len(more)})"


def less_table(study, results):
    """The differences that a study is for, seed by seed."""
    envs, rows = STUDIES[study].envs, []
    for name, setting, other_study, other in LESS[study]:
        found, others = returns(study, results), returns(other_study, results)
        pairs = [(found[setting, env], others[other, env.replace("-v5", "-v4")]) for env in envs]
        rows.append([name, *(difference(*pair) for pair in pairs)])
    return markdown(["seed by seed, ± standard error (seeds)", *envs], rows)


def seeds_table(study, results):
    """Every seed's return, for the studies of ten seeds."""
    seeds, found, rows = range(1, STUDIES[study].seeds + 1), returns(study, results), []
    for env in STUDIES[study].envs:
        for setting in STUDIES[study].settings:
            if values := found.get((setting.name, env)):
                cells = [f"{values[seed]:.0f}" if seed in values else "" for seed in seeds]
                rows.append([f"{setting.name}, {env}", *cells])
    return markdown(["seed", *map(str, seeds)], rows)


def fresh_table(study, results):
    """Beside the last training episodes: fresh ones of the finished policy, mean ± standard deviation over seeds."""
    found = {}  # {row: {env: values}}
    for row in csv_rows(results / f"{study}.fresh.csv"):
        for measure, name in (("mean_action", "the mean action"), ("sampled", "sampled actions")):
            values = found.setdefault(f"{row['setting']}, {name}", {}).setdefault(row["env"], [])
            values.append(float(row[measure]))
    envs = [env for env in STUDIES[study].envs if any(env in x for x in found.values())]
    rows = [[name, *(cell(x.get(env, ())) for env in envs)] for name, x in found.items()]
    return markdown(["50 fresh episodes", *envs], rows)


LABELS = {
    "episodic_return": "return, mean of the last 100 episodes",
    "kl": "KL(old||new) of an iteration, nats",
    "learning_rate": "learning rate",
}


def mean_and_band(axis, runs, colour, label, quantity="episodic_return", step="step", standard_error=False, alpha=0.15):
    """Mean over several runs, which are lists of rows, and their range or the mean's standard error. Greys, which are
    the baselines', are dashed."""
    runs = [np.array([(row[step], row[quantity]) for row in rows], float).T for rows in runs]
    steps = min((x[0] for x in runs), key=lambda steps: steps[-1])
    y = np.array([np.interp(steps, *x) for x in runs])
    mean, low, high = y.mean(0), y.min(0), y.max(0)
    if standard_error:
        error = y.std(0, ddof=1) / len(y) ** 0.5
        low, high = mean - error, mean + error
    axis.plot(steps, mean, color=colour, label=label, ls="--" if colour.startswith("0.") else "-")
    axis.fill_between(steps, low, high, color=colour, alpha=alpha, lw=0)


def runs(*folders):
    """Run folders of your own: the return of each script, mean and range over its runs, one panel for each environment.
    Writes runs.png into the present folder."""
    found = {}  # {env: {script: lists of rows}}
    for folder in map(Path, folders):
        if not (folder / "args.json").exists():
            sys.exit(f"{folder} is not the folder of a run: it has no args.json")
        env, script = json.loads((folder / "args.json").read_text())["env_id"], next(folder.glob("*.py")).stem
        if rows := [row for row in csv_rows(folder / "progress.csv") if row["episodic_return"] != "nan"]:
            found.setdefault(env, {}).setdefault(script, []).append(rows)
    if not found:
        sys.exit("no episode has ended in these runs")
    scripts = sorted({script for by_script in found.values() for script in by_script})
    size = (5 * len(found), 4)
    figure, axes = plt.subplots(1, len(found), figsize=size, squeeze=False, layout="constrained")
    for axis, (env, by_script) in zip(axes[0], found.items(), strict=True):
        for script, lists in by_script.items():
            label = f"{script} ({len(lists)} run{'s' * (len(lists) > 1)})"
            mean_and_band(axis, lists, f"C{scripts.index(script)}", label, step="global_step")
        axis.set(title=env, xlabel="environment steps", ylabel=LABELS["episodic_return"])
        axis.legend()
    figure.savefig("runs.png", dpi=110)


def in_thousands(steps, _):
    return f"{steps / 1e6:g}M" if steps >= 1e6 else f"{steps / 1e3:g}k" if steps else "0"


def curves(study, results):
    """One panel per environment: mean over seeds of every setting, and the range of its seeds. figure3: dashed, where
    the paper's curve ends. kl-adaptive-lr: below it the KL, its target dashed, and the learning rate. pendulums: first
    the four codes, below them the other flags of TRPO."""
    runs, settings = read(study, results), [s.name for s in STUDIES[study].settings]
    envs = [env for env in STUDIES[study].envs if any(e == env for _, e, _ in runs)]
    quantities = list(LABELS) if study == "kl-adaptive-lr" else ["episodic_return"]
    groups = [settings[:4], [settings[1], *settings[4:]]] if study == "pendulums" else [settings]
    panels = [(group, quantity, env) for group in groups for quantity in quantities for env in envs]
    columns = min(4, len(envs))
    rows, drawn = -(-len(panels) // columns), {}  # drawn: the legend
    size = (4.2 * columns + 2 * (len(panels) == rows * columns), 3.2 * rows)  # an empty panel has room for the legend
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, (group, quantity, env) in zip(axes.flat, panels, strict=False):
        for setting in group:
            i = settings.index(setting)
            colour = f"C{i}" if i < 10 else "k"
            if seeds := [x for (s, e, _), x in sorted(runs.items()) if (s, e) == (setting, env)]:
                mean_and_band(axis, seeds, colour, setting, quantity)
            if study == "figure3":
                axis.axhline(FIGURE3[setting][env], color=colour, ls="--", lw=1, label=f"end of the paper's {setting}")
        if study == "figure3" and env == "Reacher-v4":
            axis.set_ylim(-20, -3)
            axis.text(0.5, 0.05, "the paper's TRPO ends at -115", transform=axis.transAxes, fontsize=8, ha="center")
        if quantity == "kl":
            axis.axhline(0.01, color="k", ls="--", lw=1, label="--kl-lr-target")
        if quantity != "episodic_return":
            axis.set_yscale("log")
        axis.set_title(env, fontsize=10)
        axis.locator_params(axis="x", nbins=4)
        axis.xaxis.set_major_formatter(in_thousands)
        drawn |= {label: line for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        if axis in axes[:, 0]:
            axis.set_ylabel(LABELS[quantity], fontsize=9)
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    legend = list(drawn.values()), list(drawn)
    if len(panels) < rows * columns:
        axes.flat[-1].legend(*legend, fontsize=9, loc="center")
    else:
        figure.legend(*legend, fontsize=8, loc="outside right upper")
    figure.supxlabel("environment steps", fontsize=9)
    figure.savefig(results / f"{study}.png", dpi=100)


def table1(study, results):
    """PPO's Table 1 as a picture. Left: each objective's normalised score and its interval, and the paper's. Then each
    environment: one dot a seed, a bar at their mean."""
    found, envs, names = returns(study, results), STUDIES[study].envs, list(PAPER)
    scores, rows = normalised(found, envs), range(len(names))
    widths = {"width_ratios": [2.5, *(1 for _ in envs)]}
    figure, (left, *others) = plt.subplots(1, 1 + len(envs), figsize=(15, 4), sharey=True, gridspec_kw=widths)
    means = [statistics.fmean(scores[name].values()) for name in names]
    low, high = zip(*(students(list(scores[name].values())) for name in names), strict=True)
    left.hlines(rows, low, high, "C0", lw=2, label="95 % interval over seeds")
    left.plot(means, rows, "o", color="C0", label="here")
    left.plot(PAPER.values(), rows, "D", mfc="none", color="k", label="in the paper")
    left.set(title="score, mean of the seven", yticks=rows, yticklabels=names, xlim=(-0.5, 1.2))
    left.invert_yaxis()
    left.legend(loc="center left", fontsize=8)
    for axis, env in zip(others, envs, strict=True):
        for row, name in enumerate(names):
            values = list(found[name, env].values())
            axis.plot(values, [row] * len(values), ".", color="C0", alpha=0.6)
            axis.plot(statistics.fmean(values), row, "|", color="C0", markersize=12, mew=2)
        axis.set_title(env.replace("InvertedDouble", "Inverted\nDouble"), fontsize=10)
        axis.locator_params(axis="x", nbins=2)
    for axis in (left, *others):
        axis.grid(axis="y", lw=0.4)
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(results / f"{study}.png", dpi=100)


# ---- single pictures -------------------------------------------------------------------------------------------------


def klpen_runs():
    """{run: steps, KL and beta, an array each}"""
    runs = {}
    for row in csv_rows(RESULTS / "klpen-beta.csv.gz"):
        runs.setdefault(row["run"], []).append([float(row[key]) for key in ("step", "kl", "beta")])
    return {name: np.array(rows).T for name, rows in runs.items()}


def klpen_medians():
    """{run: median KL over its second half}"""
    return {name: np.median(kl[len(kl) // 2 :]) for name, (_, kl, _) in klpen_runs().items()}


def klpen_beta():
    """KL and beta over one run of ppo_klpen.py on Hopper-v4 with a constant and one with a linear learning rate."""
    runs = klpen_runs()
    figure, axes = plt.subplots(2, 2, figsize=(10, 4.5), sharex=True, sharey="row")
    for name, (top, bottom) in zip(("constant, seed 11", "linear, seed 1"), axes.T, strict=True):
        step, kl, beta = runs[name]
        top.axhspan(0.01 / 1.5, 0.01 * 1.5, color="0.85", label="the band: target / 1.5 to 1.5 target")
        top.plot(step, kl, ".", markersize=2, label="KL(old||new) of an iteration")
        top.set(yscale="log", ylim=(1e-4, 1e-1), title=f"learning rate: {name}")
        bottom.step(step, beta, where="post")
        bottom.set(yscale="log", xlabel="environment steps")
    axes[0, 0].set_ylabel("nats")
    axes[0, 0].legend(loc="lower left", fontsize=8)
    axes[1, 0].set_ylabel("beta")
    figure.tight_layout()
    figure.savefig(IMAGES / "klpen_beta.png", dpi=110)
    for name, median in klpen_medians().items():
        print(f"{name}: median KL over the run's second half {median:.4f}")


def learning_curves():
    """The first page's figure: the three scripts and the baselines, mean and standard error over seeds. The marks at
    the right edge are where the PPO paper's curves end."""
    runs = read("v4", RESULTS) | read("v4-baselines", RESULTS)
    lines = {"ppo_clip.py": "C0", "ppo_klpen.py": "C1", "trpo_continuous.py": "C2"}
    lines |= {"Stable-Baselines3 PPO": "0.6", "sb3-contrib TRPO": "0.2"}
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.3), layout="constrained")
    for axis, env in zip(axes, STUDIES["v4"].envs, strict=True):
        for setting, colour in lines.items():
            seeds = [x for (s, e, _), x in sorted(runs.items()) if (s, e) == (setting, env)]
            mean_and_band(axis, seeds, colour, setting, standard_error=True, alpha=0.2)
        for setting, colour in (("PPO (clip)", "C0"), ("TRPO", "C2")):
            label = f"end of the paper's {setting.split()[0]}"
            axis.plot(1.03e6, FIGURE3[setting][env], "<", color=colour, clip_on=False, label=label)
        axis.set(title=env, xlim=(0, 1.05e6), xticks=(0, 5e5, 1e6), ylim=(-300, None))
        axis.xaxis.set_major_formatter(in_thousands)
    axes[0].set_ylabel("return of the last 100 episodes")
    axes[1].set_xlabel("environment steps")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(IMAGES / "learning.png", dpi=110)


def film(*folders):
    """A looping picture of trained policies, side by side: run folders, one policy each. Needs MUJOCO_GL=egl or osmesa
    where there is no display."""
    from PIL import Image

    strips = []
    for folder in map(Path, folders):
        frames = []
        for t, (env, *_) in enumerate(play(folder, 1, render_mode="rgb_array", width=200, height=200)):
            if t % max(1, round(1 / 30 / env.unwrapped.dt)) == 0:
                frames.append(env.render())
            if len(frames) == 100:
                break
        strips.append(frames)
    pictures = [Image.fromarray(np.concatenate(frames, 1)).quantize(48) for frames in zip(*strips, strict=True)]
    pictures[0].save(IMAGES / "trained.gif", save_all=True, append_images=pictures[1:], duration=33, loop=0)


def notes():
    """The notes' Figures 1-3. Left to right: the clipped objective over the ratio; one real TRPO update on
    InvertedPendulum-v4: the true objective (512 episodes a point) beside its local linear approximation; the surrogate
    and the trust region along the same step, and the step that was taken."""
    import torch
    from torch.nn.utils import parameters_to_vector, vector_to_parameters

    import ppo_clip
    import trpo_continuous as trpo

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 3.8))
    ratio = torch.linspace(0, 2, 401)
    for advantage, colour in ((1.0, "C0"), (-1.0, "C3")):
        A = torch.full_like(ratio, advantage)
        left.plot(ratio, ppo_clip.clipped_surrogate(ratio, A, 0.2), colour, label=f"A = {advantage:+.0f}")
        left.plot(ratio, ratio * A, colour, ls=":", lw=1)
    left.set(title="clipped objective (dotted: r A)", xlabel="ratio r", ylim=(-2, 2))
    left.axvline(1, color="0.8", lw=0.8)
    left.legend()

    args = trpo.Args(env_id="InvertedPendulum-v4", num_envs=64, num_steps=64, num_workers=0, max_kl=0.05, gamma=0.95)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    env = trpo.make_env(args.env_id)
    agent = trpo.Agent(env.observation_space.shape[0], env.action_space)
    scales = np.concatenate([np.linspace(-1, 4, 11), np.linspace(6, 40, 12)])
    measured = []
    with trpo.Actors(args, agent) as actors:

        def collect(seed):
            torch.manual_seed(seed)
            return actors.collect(agent, seed=(seed,))

        def true_objective():
            """Mean discounted return of 64 steps from reset, over 8 x 64 starts."""
            total = []
            for seed in range(8):
                rollout = collect(seed)
                alive = torch.cat([torch.ones(1, 64), 1 - rollout["done"][:-1]]).cumprod(0)
                discount = args.gamma ** torch.arange(args.num_steps).unsqueeze(1)
                total.append((rollout["reward"] * alive * discount).sum(0).mean().item())
            return statistics.fmean(total)

        rollout = collect(100)
        agent.update_statistics(rollout)
        data = trpo.make_batch(agent, rollout, args.gamma, 1.0)
        data["advantage"] = (data["advantage"] - data["advantage"].mean()) / data["advantage"].std()
        policy = trpo.policy_part(agent).values()
        old = parameters_to_vector(policy).detach().clone()
        report = trpo.policy_step(*trpo.functions_of_theta(agent, data, args), args.max_kl, 1.0, args)
        taken = parameters_to_vector(policy).detach() - old
        with torch.no_grad():
            for scale in scales:
                theta = old + float(scale) * taken
                vector_to_parameters(theta, policy)
                surrogate, kl_by_state = trpo.surrogate_and_kl(agent, theta, data)
                measured.append((true_objective(), surrogate.item(), kl_by_state.mean().item()))
    J, L, kl = np.array(measured).T
    zero = int(np.abs(scales).argmin())
    slope = (J[zero + 1] - J[zero - 1]) / (scales[zero + 1] - scales[zero - 1])
    middle.plot(scales, J, label="true objective J")
    middle.plot(scales, J[zero] + slope * scales, "--", label="local linear approximation")
    middle.axvline(1, color="k", lw=1, label="TRPO's step")
    middle.set(title="J along one TRPO update", xlabel="multiple of the step taken", ylim=(min(J) - 1, max(J) * 1.5))
    right.plot(scales, L - L[zero], label="surrogate L - L_old")
    expected = report["improvement"] / report["improvement_ratio"]
    right.plot(scales, expected * scales, "--", lw=1, label="its linear model, gᵀs")
    right.plot(scales, kl, label="mean KL(old||new)")
    inside = scales[kl <= args.max_kl]
    right.axvspan(inside.min(), inside.max(), color="0.9", label=f"trust region, KL <= {args.max_kl}")
    right.axvline(1, color="k", lw=1, label="step taken")
    right.set(title="what TRPO sees", xlabel="multiple of the step taken", xlim=(-1, 6), ylim=(-0.2, 0.8))
    for axis in (middle, right):
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(IMAGES / "notes.png", dpi=100)


def statistics_runs(quantity, results):
    """{(way, seed): an array over rollouts} of falls or kl: see reproduce.statistics_alone"""
    runs = {}
    for row in csv_rows(results / "statistics.csv.gz"):
        runs.setdefault((row["way"], int(row["seed"])), []).append(float(row[quantity]))
    return {key: np.array(values) for key, values in runs.items()}


def draw_statistics(results):
    """A solved policy that nobody trains any more, while its running statistics go on. Draws its falls, and the KL
    between the policy before and after each rollout's statistics (thin: one seed; thick: the median). Returns a table
    of all falls."""
    falls, kl = (statistics_runs(quantity, results) for quantity in ("falls", "kl"))
    ways = {"usual": ("C3", "usual: mean and variance of all so far"), "steady": ("C0", "steady 0 and unit")}
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, runs in zip(axes, (falls, kl), strict=True):
        for way, (colour, label) in ways.items():
            curves = np.array([run for key, run in runs.items() if key[0] == way])
            number = np.arange(1, curves.shape[1] + 1)
            axis.plot(number, curves.T, colour, lw=0.5, alpha=0.5)
            axis.plot(number, np.median(curves, 0), colour, lw=2.5, label=label)
        axis.set_xlabel("rollouts of 2048 steps since the last one that was learned from")
    axes[0].set(yscale="symlog", ylim=(-0.2, None), ylabel="falls in a rollout")
    axes[1].axhline(0.02, color="k", ls="--", lw=1, label="--max-kl, the bound on a step of TRPO")
    axes[1].set(yscale="log", ylim=(1e-6, 0.1), ylabel="KL(before||after) of the statistics, nats")
    for axis in axes:
        axis.legend(fontsize=8)
    figure.savefig(results / "statistics.png", dpi=100)
    seeds = sorted({seed for _, seed in falls})
    rows = [[label, *(f"{falls[way, seed].sum():.0f}" for seed in seeds)] for way, (_, label) in ways.items()]
    return markdown(["falls in 150 rollouts, by seed", *map(str, seeds)], rows)


def populations_table(results):
    """A markdown table of what PBT and random search have found, for each environment and length that is stored: see
    reproduce.populations. Then differences, population by population. Intervals are over populations."""
    arms = {
        "pbt": "PBT, best member, 50 fresh episodes",
        "random": "random search, best member, 50 fresh episodes",
        "pbt_members": "PBT, all members, training return",
        "random_members": "random search, all members, training return",
        "replay": "the schedule of PBT's winner, new seeds, training return",
        "constant": "the setting of random search's winner, the same new seeds, training return",
        "defaults": "defaults, the same new seeds, training return",
    }
    pairs = {
        ("pbt", "random"): "PBT less random search, best member",
        ("pbt_members", "random_members"): "PBT less random search, all members",
        ("replay", "defaults"): "the schedule less the defaults",
        ("replay", "constant"): "the schedule less the constant setting",
    }
    tables = []
    for path in sorted(results.glob("pbt_*_*.json")):
        _, env, steps = path.stem.split("_")
        found, rows = {}, []  # found: {arm: {repetition: mean over its members}}
        for row in json.loads(path.read_text()):
            for arm in arms.keys() & row.keys():
                found.setdefault(arm, {})[row["repetition"]] = float(np.nanmean(row[arm]))
        for one, other in pairs:
            both = found.get(one, {}).keys() & found.get(other, {}).keys()
            found[one, other] = {n: found[one][n] - found[other][n] for n in sorted(both)}
        for arm, name in (arms | pairs).items():
            if x := list(found.get(arm, {}).values()):
                rows.append([name, f"{np.mean(x):.0f}", interval(x), ", ".join(f"{v:.0f}" for v in x)])
        head = [f"{env}, {int(steps):,} steps a member", "mean", "95 % interval", "by population"]
        tables.append(markdown(head, rows, words=(2, 3)))
    return "\n".join(tables)


SELFPLAY = {  # rows of the table: how seed 101 was trained, and its name in selfplay_study.json
    "**the defaults**": "default",
    "earlier: lines": "ln16g7",
    "earlier: lines, `--opening-plies 24`": "ln16o24",
    "earlier: lines, `--hidden-size 64`": "ln16h64",
    "earlier: lines, 8 features of each, not 16": "ln8g7",
    "earlier: lines, gamma and lambda 0.8": "ln16",
    "earlier: squares, gamma and lambda 0.8": "w32_g80_l80_e15",
    "earlier: the same, `--opening-plies 0`": "w32_noopening",
    "earlier: the same, `--hidden-size 256`": "w64_hidden256",
    "earlier: the same, `--ent-final 1`": "w32_g80_l80_e15const",
    "earlier: neither, gamma and lambda 0.8": "m_lr10_g80_l80_e15",
    "earlier: neither, gamma and lambda 0.95": "default_before_windows",
}


def selfplay(results):
    """A markdown table of what benchmark/tournament.py found: first one seed with other flags, then the defaults."""
    rows = {(row["variant"], row["seed"]): row for row in json.loads((results / "selfplay_study.json").read_text())}

    def line(name, variant, seed, *keys):
        """A cell has what is stored once, or of the player's own positions and of random ones."""
        row = rows[variant, seed]
        places = row, row["one_ply"]["own"], row["one_ply"]["random"]
        return [name, *(" / ".join(f"{x[key]:.2f}" for x in places if key in x) for key in keys)]

    measured = "mcts-50", "mcts-1000", "wins_taken", "blocks", "right_moves"
    by_chance = None, None, "wins_by_chance", "blocks_by_chance", "right_by_chance"
    lines = [line("uniformly random moves", "default", 101, *by_chance)]
    lines += [line(name, variant, 101, *measured) for name, variant in SELFPLAY.items()]
    for name, variant in (
        ("earlier: squares, 10M moves", "squares"),
        ("**the defaults, 2M moves**", "default_2M"),
        ("**the defaults, 5M moves**", "default_5M"),
        ("**the defaults, 20M moves**", "default"),
    ):
        lines += [line(f"{name}, seed {seed}", variant, seed, *measured) for seed in (1, 2, 3)]
    games, moves = ("MCTS-50", "MCTS-1000 (50 games)"), ("wins taken, own / random", "threats blocked, own / random")
    text = markdown(["", *games, *moves, "right moves"], lines)
    return text.replace("|  |", "| |", 1)  # as it is stored


def main():
    names = {"learning-curves": learning_curves, "klpen-beta": klpen_beta, "notes": notes, "film": film, "runs": runs}
    tables = {"pbt": populations_table, "selfplay": selfplay, "statistics": draw_statistics}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*names, *STUDIES, *tables], metavar="NAME", help="what to draw: see above")
    parser.add_argument("folders", nargs="*", metavar="RUN", help="run folders, for film and runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where a study's data are")
    args = parser.parse_args()
    name, results = args.name, args.results
    if bool(args.folders) != (name in ("film", "runs")):
        parser.error("film and runs take run folders, the others none")
    if name in names and results != RESULTS:
        parser.error("--results goes with a study, pbt, selfplay and statistics")
    if name in names:
        names[name](*args.folders)
        return
    if name in STUDIES and not read(name, results):
        parser.error(f"nothing is stored of {name} in {results}: see benchmark/reproduce.py {name}")
    text = tables[name](results) if name in tables else table(name, results)
    (results / f"{name}.md").write_text(text + "\n")
    if name in ("v4", "v4-baselines", "v5"):
        (results / f"{name}.seeds.md").write_text(seeds_table(name, results) + "\n")
    if name in LESS and results == RESULTS:  # they need other studies, too
        (results / f"{name}.less.md").write_text(less_table(name, results) + "\n")
    if (results / f"{name}.fresh.csv").exists():
        (results / f"{name}.fresh.md").write_text(fresh_table(name, results) + "\n")
    if name in STUDIES:
        stored = read(name, results)
        whole = name == "ppo-table1" and all((s.name, env, seed) in stored for s, env, seed in STUDIES[name].runs())
        (table1 if whole else curves)(name, results)
    print(text)


if __name__ == "__main__":
    main()
