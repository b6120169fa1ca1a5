"""Figures of the README, from the stored curves alone.

python benchmark/plot.py     # writes benchmark/results/*.png
"""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

RESULTS = Path(__file__).parent / "results"


def columns(path):
    with open(path) as file:
        rows = list(csv.DictReader(file))
    return {key: [float(row[key]) for row in rows] for key in rows[0]}


def klpen_beta():
    """d and beta over one run of ppo_klpen.py with a constant and one with a linear learning rate."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 4.5), sharex=True, sharey="row")
    studies = {"ppo_klpen_constant_lr": "--lr-schedule constant", "ppo_klpen": "--lr-schedule linear (default)"}
    for (study, title), (top, bottom) in zip(studies.items(), axes.T, strict=True):
        run = columns(RESULTS / study / "Hopper-v4__1.csv")
        top.axhspan(0.01 / 1.5, 0.01 * 1.5, color="0.85", label="d_target / 1.5 ... 1.5 d_target")
        top.plot(run["global_step"], run["kl"], ".", markersize=2, label="d, KL(old||new) of an iteration")
        top.set(yscale="log", ylim=(1e-4, 1e-1), title=f"Hopper-v4, seed 1, {title}")
        bottom.step(run["global_step"], run["beta"], where="post")
        bottom.set(yscale="log", xlabel="environment steps")
    axes[0, 0].set_ylabel("nats")
    axes[0, 0].legend(loc="lower left", fontsize=8)
    axes[1, 0].set_ylabel("beta")
    figure.tight_layout()
    figure.savefig(RESULTS / "klpen_beta.png", dpi=110)


if __name__ == "__main__":
    klpen_beta()
