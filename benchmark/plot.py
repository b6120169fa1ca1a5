"""Tables and figures from the stored data alone, in seconds.

    python benchmark/plot.py ppo-table1     # a study of reproduce.py: its table (STUDY.md) and figure (STUDY.png)
    python benchmark/plot.py klpen-beta     # the README's picture of KL and beta
    python benchmark/plot.py notes          # the notes' three figures, by the scripts' own functions (a minute)

The interval in ppo-table1's table needs scipy: pip install -r benchmark/requirements.txt
"""

import csv
import importlib
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark/results"
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
from reproduce import STUDIES, read  # noqa: E402

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


# ---- studies of reproduce.py -----------------------------------------------------------------------------------------


def finals(study, results):
    """{(setting, env): {seed: last episodic_return}}"""
    found = {}
    for (setting, env, seed), rows in read(study, results).items():
        found.setdefault((setting, env), {})[seed] = float(rows[-1]["episodic_return"])
    return found


def normalised(found, envs):
    """{setting: {seed: score}} as in the PPO paper's Table 1: per environment 0 is a random policy and 1 the best
    setting's mean; averaged over environments. Only settings and seeds that have all of them."""
    settings = dict.fromkeys(setting for setting, _ in found)
    best = {env: max(statistics.fmean(x.values()) for (_, e), x in found.items() if e == env) for env in envs}
    scores = {}
    for setting in settings:
        seeds = set.intersection(*(set(found.get((setting, env), {})) for env in envs))
        for seed in sorted(seeds):
            each = [(found[setting, env][seed] - RANDOM[env]) / (best[env] - RANDOM[env]) for env in envs]
            scores.setdefault(setting, {})[seed] = statistics.fmean(each)
    return scores


def interval(values):
    """95 % bootstrap interval of the mean over seeds."""
    from scipy.stats import bootstrap

    if len(set(values)) < 2:
        return values[0], values[0]
    result = bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0))
    return result.confidence_interval


def table(study, results):
    """A markdown table: one row per setting, one column per environment (mean ± std over seeds)."""
    found = finals(study, results)
    envs = [env for env in STUDIES[study].envs if any(e == env for _, e in found)]
    settings = [s.name for s in STUDIES[study].settings if any(setting == s.name for setting, _ in found)]
    scores = normalised(found, envs) if study == "ppo-table1" else {}
    head = ["setting", *envs] + (["normalised, 95 % interval", "paper"] if scores else [])
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for setting in settings:
        cells = [setting]
        for env in envs:
            x = list(found.get((setting, env), {}).values())
            digits = 0 if x and abs(statistics.fmean(x)) >= 100 else 1
            spread = f" ± {statistics.stdev(x):.{digits}f}" if len(x) > 1 else ""
            cells.append(f"{statistics.fmean(x):.{digits}f}{spread} ({len(x)})" if x else "")
        if scores:
            x = list(scores.get(setting, {}).values())
            cells.append(f"{statistics.fmean(x):.2f}, {'-'.join(f'{v:.2f}' for v in interval(x))}" if x else "")
            cells.append(f"{PAPER[setting]:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    if study == "figure3":
        for setting, ends in FIGURE3.items():
            lines.append(f"| the paper's {setting} | {' | '.join(str(ends[env]) for env in envs)} |")
    return "\n".join(lines)


LABELS = {
    "episodic_return": "return, mean of the last 100 episodes",
    "kl": "KL(old||new) of an iteration, nats",
    "learning_rate": "learning rate",
}


def curves(study, results):
    """One panel per environment: mean over seeds of every setting, and the range of its seeds. figure3: dashed, where
    the paper's curve ends. kl-adaptive-lr: below it the KL, its target dashed, and the learning rate."""
    runs, settings = read(study, results), [s.name for s in STUDIES[study].settings]
    envs = [env for env in STUDIES[study].envs if any(e == env for _, e, _ in runs)]
    quantities = list(LABELS) if study == "kl-adaptive-lr" else ["episodic_return"]
    panels = [(quantity, env) for quantity in quantities for env in envs]
    columns = min(4, len(envs))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.2 * columns + 2, 3.2 * rows), squeeze=False, layout="constrained"
    )
    for axis, (quantity, env) in zip(axes.flat, panels, strict=False):
        for i, setting in enumerate(settings):
            series = [data for (s, e, _), data in sorted(runs.items()) if (s, e) == (setting, env)]
            if not series:
                continue
            steps = np.array([float(row["step"]) for row in series[0]])
            y = [np.interp(steps, *np.array([(r["step"], r[quantity]) for r in x], float).T) for x in series]
            colour = f"C{i}" if i < 10 else "k"
            axis.plot(steps, np.mean(y, 0), color=colour, label=setting)
            axis.fill_between(steps, np.min(y, 0), np.max(y, 0), color=colour, alpha=0.15, lw=0)
            if study == "figure3":
                axis.axhline(FIGURE3[setting][env], color=colour, ls="--", lw=1)
        if quantity == "kl":
            axis.axhline(0.01, color="k", ls="--", lw=1)
        if quantity != "episodic_return":
            axis.set_yscale("log")
        axis.set_title(env, fontsize=10)
        axis.locator_params(axis="x", nbins=4)
        if axis in axes[:, 0]:
            axis.set_ylabel(LABELS[quantity], fontsize=9)
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    figure.supxlabel("environment steps", fontsize=9)
    figure.savefig(results / f"{study}.png", dpi=100)


# ---- single pictures -------------------------------------------------------------------------------------------------


def columns(path):
    with open(path) as file:
        rows = list(csv.DictReader(file))
    return {key: [float(row[key]) for row in rows] for key in rows[0]}


def klpen_beta():
    """d and beta over one run of ppo_klpen.py with a constant and one with a linear learning rate."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 4.5), sharex=True, sharey="row")
    runs = {"ppo_klpen_constant_lr/Hopper-v4__11": "seed 11, --lr-schedule constant"}
    runs |= {"ppo_klpen/Hopper-v4__1": "seed 1, --lr-schedule linear (default)"}
    for (name, title), (top, bottom) in zip(runs.items(), axes.T, strict=True):
        run = columns(RESULTS / f"{name}.csv")
        top.axhspan(0.01 / 1.5, 0.01 * 1.5, color="0.85", label="d_target / 1.5 ... 1.5 d_target")
        top.plot(run["global_step"], run["kl"], ".", markersize=2, label="d, KL(old||new) of an iteration")
        top.set(yscale="log", ylim=(1e-4, 1e-1), title=f"Hopper-v4, {title}")
        bottom.step(run["global_step"], run["beta"], where="post")
        bottom.set(yscale="log", xlabel="environment steps")
    axes[0, 0].set_ylabel("nats")
    axes[0, 0].legend(loc="lower left", fontsize=8)
    axes[1, 0].set_ylabel("beta")
    figure.tight_layout()
    figure.savefig(RESULTS / "klpen_beta.png", dpi=110)
    print("median d over a run's second half, last entropy:")
    for study in ("ppo_klpen_constant_lr", "ppo_klpen", "ppo_clip"):
        for path in sorted((RESULTS / study).glob("Hopper-v4__*.csv")):
            run = columns(path)
            middle = statistics.median(run["kl"][len(run["kl"]) // 2 :])
            print(f"{study} {path.stem}: {middle:.4f} {run['entropy'][-1]:.2f}")


def notes():
    """The notes' Figures 1-3. Left to right: the clipped objective over the ratio; one real TRPO update on
    InvertedPendulum-v4: the true objective (512 episodes a point) beside its local linear approximation; the surrogate
    and the trust region along the same step, and the step that was taken."""
    import torch
    from torch.nn.utils import parameters_to_vector, vector_to_parameters

    ppo_clip, trpo = importlib.import_module("ppo_clip"), importlib.import_module("trpo_continuous")
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
    J, L, kl = [], [], []
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
        report = trpo.policy_step(agent, *trpo.functions_of_theta(agent, data, args), 1.0, args)
        taken = parameters_to_vector(policy).detach() - old
        with torch.no_grad():
            for scale in scales:
                theta = old + float(scale) * taken
                vector_to_parameters(theta, policy)
                surrogate, kl_by_state = trpo.surrogate_and_kl(agent, theta, data)
                J.append(true_objective())
                L.append(surrogate.item())
                kl.append(kl_by_state.mean().item())
    zero = int(np.abs(scales).argmin())
    slope = (J[zero + 1] - J[zero - 1]) / (scales[zero + 1] - scales[zero - 1])
    middle.plot(scales, J, label="true objective J")
    middle.plot(scales, J[zero] + slope * scales, "--", label="local linear approximation")
    middle.axvline(1, color="k", lw=1, label="TRPO's step")
    middle.set(title="J along one TRPO update", xlabel="multiple of the step taken", ylim=(min(J) - 1, max(J) * 1.5))
    right.plot(scales, np.array(L) - L[zero], label="surrogate L - L_old")
    right.plot(scales, report["expected_improvement"] * scales, "--", lw=1, label="its linear model g's")
    right.plot(scales, kl, label="mean KL(old||new)")
    inside = scales[np.array(kl) <= args.max_kl]
    right.axvspan(inside.min(), inside.max(), color="0.9", label=f"trust region, KL <= {args.max_kl}")
    right.axvline(1, color="k", lw=1, label="step taken")
    right.set(title="what TRPO sees", xlabel="multiple of the step taken", xlim=(-1, 6), ylim=(-0.2, 0.8))
    for axis in (middle, right):
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(RESULTS / "notes.png", dpi=100)


def main():
    names = {"klpen-beta": klpen_beta, "notes": notes}
    if len(sys.argv) != 2 or sys.argv[1] not in {*names, *STUDIES}:
        sys.exit(f"usage: python benchmark/plot.py [{' | '.join([*names, *STUDIES])}]")
    if sys.argv[1] in names:
        names[sys.argv[1]]()
        return
    text = table(sys.argv[1], RESULTS)
    (RESULTS / f"{sys.argv[1]}.md").write_text(text + "\n")
    curves(sys.argv[1], RESULTS)
    print(text)


if __name__ == "__main__":
    main()
