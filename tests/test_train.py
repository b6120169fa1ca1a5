"""train() as a whole: short runs against the same algorithm written a second time, in the plain form of the textbooks,
with torch's own Adam. The functions of a script have tests of their own; here it is their order that is tested, and
that they get the right numbers at the right time."""

import csv
import importlib
import math
import os
import signal
import threading

import numpy as np
import pytest
import torch
import toy_envs
from batches import make_coef
from torch.distributions import kl_divergence
from torch.nn.utils import clip_grad_norm_

B, STEPS = 32, 192  # samples in an iteration, and steps of a run: six iterations
FLAGS = {"env_id": "toy_envs:Counter-v0", "num_envs": 2, "num_steps": 16, "num_workers": 0, "num_minibatches": 4}
FLAGS |= {"total_timesteps": STEPS, "checkpoint_every": 100, "compile": False, "seed": 3}
PPO = {"update_epochs": 2, "learning_rate": 3e-3}
TRPO = {"vf_epochs": 2, "vf_learning_rate": 3e-3, "gamma": 0.9}


def run_args(name, tmp_path, **flags):
    defaults = FLAGS | (TRPO if name == "trpo_continuous" else PPO)
    return importlib.import_module(name).Args(run_dir=str(tmp_path / "run"), **defaults | flags)


def rows(folder):
    """progress.csv as one dict of numbers a row."""
    with open(folder / "progress.csv") as file:
        return [{key: float(x) for key, x in row.items()} for row in csv.DictReader(file)]


def epoch_of_minibatches(batch, count):
    for index in torch.randperm(B).view(count, -1):
        yield {key: x[index] for key, x in batch.items()}


def adam_step(optimizer, loss, rate, max_norm=math.inf):
    """One step of torch's Adam; returns the norm of the gradient before clipping."""
    optimizer.zero_grad()
    loss.backward()
    norm = clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], max_norm)
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()
    return norm


def mean_of(logged):
    return {key: float(np.mean([numbers[key].item() for numbers in logged])) for key in logged[0]}


def ppo_iteration(script, args, agent, optimizer, batch, step, adapted):
    """Lines 4 to 6 of PPO's Algorithm 1. Returns what is logged."""
    schedule, beta = args.lr_schedule, adapted.setdefault("beta", getattr(args, "beta_init", None))
    rate = {"constant": args.learning_rate, "linear": args.learning_rate * (1 - step / STEPS)}.get(schedule)
    rate = rate if rate is not None else adapted.setdefault("rate", args.learning_rate)
    floats = {key: x for key, x in vars(args).items() if isinstance(x, float)}
    coef = make_coef(**floats | ({"beta": beta} if beta is not None else {}))
    logged = []
    for epoch in range(args.update_epochs):  # noqa: B007 (logged below)
        for minibatch in epoch_of_minibatches(batch, args.num_minibatches):
            loss, numbers = script.ppo_loss(agent, minibatch, coef, args.norm_adv)
            logged.append(numbers | {"grad_norm": adam_step(optimizer, loss, rate, args.max_grad_norm)})
        with torch.no_grad():
            kl = kl_divergence(agent.distribution(batch["old_policy"]), agent.policy(batch["obs"])).mean().item()
        if kl > (getattr(args, "target_kl", None) or math.inf):
            break
    row = mean_of(logged) | {"kl": kl, "learning_rate": rate}
    row |= {"beta": beta} if beta is not None else {"epochs": epoch + 1}
    if schedule == "kl-adaptive":
        adapted["rate"] = script.adapted_learning_rate(rate, kl, args.kl_lr_target, args.kl_lr_band)
    if getattr(args, "beta_schedule", None) == "adaptive":
        adapted["beta"] = script.adapted_beta(beta, kl, args.kl_target)
    return row


def trpo_iteration(script, args, agent, optimizer, batch, step, adapted):
    """The policy's step and the critic's epochs. Returns what is logged."""
    with torch.no_grad():
        entropy = agent.policy(batch["obs"]).entropy().mean().item()
    if args.norm_adv:
        advantage = batch["advantage"].numpy()
        batch["advantage"] = torch.from_numpy((advantage - advantage.mean()) / (advantage.std() + 1e-8))
    beta = adapted.setdefault("beta", args.beta)
    report = script.policy_step(*script.functions_of_theta(agent, batch, args), args.max_kl, beta, args)
    if args.beta_schedule == "adaptive":
        kl = report["kl"] if report["line_search_step"] >= 0 else 1e9
        adapted["beta"] = script.adapted_beta(beta, kl, args.max_kl)
    logged = []
    for _ in range(args.vf_epochs):
        for minibatch in epoch_of_minibatches(batch, args.num_minibatches):
            loss = torch.nn.functional.mse_loss(agent.value(minibatch["obs"]), minibatch["return"])
            logged.append({"value_loss": loss, "vf_grad_norm": adam_step(optimizer, loss, args.vf_learning_rate)})
    row = mean_of(logged) | {"learning_rate": args.vf_learning_rate, "entropy": entropy} | report
    return row | {"policy_loss": -row.pop("improvement")}


def written_again(script, args):
    """A whole run in the plain form. Returns the agent and what is logged, one dict an iteration."""
    trpo = script.__name__ == "trpo_continuous"
    torch.manual_seed(args.seed)
    env = script.make_env(args.env_id)
    agent, table, adapted, cut = script.Agent(env.observation_space.shape[0], env.action_space), [], {}, True
    optimizer = torch.optim.Adam((agent.critic if trpo else agent).parameters(), eps=1e-5)
    with script.Actors(args, agent) as actors:
        for step in range(0, STEPS, B):
            rollout = actors.collect(agent, seed=(args.seed, step) if cut else None)
            if step == 0:
                agent.update_statistics(rollout, args.steady_obs)
            batch = script.make_batch(agent, rollout, args.gamma, args.gae_lambda)
            returns, value = batch["return"].numpy(), batch["value"].numpy()
            row = {"global_step": step + B, "explained_variance": 1 - np.var(returns - value) / np.var(returns)}
            iteration = trpo_iteration if trpo else ppo_iteration
            table.append(row | actors.statistics() | iteration(script, args, agent, optimizer, batch, step, adapted))
            if step > 0:
                agent.update_statistics(rollout, args.steady_obs)
            cut = (step + B) // args.checkpoint_every > step // args.checkpoint_every
    return agent, table


DISCRETE_ENV = "toy_envs:RewardFromObs-v0"
RUNS = [
    ("ppo_clip", {}),
    ("ppo_clip", {"lr_schedule": "constant", "norm_adv": False, "ent_coef": 0.05, "env_id": DISCRETE_ENV}),
    ("ppo_clip", {"lr_schedule": "kl-adaptive", "kl_lr_target": 0.004}),
    ("ppo_clip", {"target_kl": 0.003, "update_epochs": 4, "steady_obs": True}),
    ("ppo_klpen", {}),
    ("ppo_klpen", {"lr_schedule": "kl-adaptive", "kl_lr_target": 0.004, "kl_target": 0.003}),
    ("ppo_klpen", {"lr_schedule": "constant", "beta_schedule": "fixed", "beta_init": 2.0, "norm_adv": False}),
    ("trpo_continuous", {}),
    ("trpo_continuous", {"norm_adv": False, "kl_constraint": "max", "cg_iters": 3}),
    ("trpo_continuous", {"form": "penalized", "beta_schedule": "adaptive", "beta": 8.0, "max_kl": 0.01}),
]  # fmt: skip


@pytest.mark.parametrize("name,flags", RUNS)
def test_a_run_is_the_algorithm_written_again(name, flags, tmp_path):
    script, args = importlib.import_module(name), run_args(name, tmp_path, **flags)
    summary = script.train(args)
    agent, table = written_again(script, args)
    trained = script.load_checkpoint(summary["checkpoint"])["agent"]
    for key, x in agent.state_dict().items():
        torch.testing.assert_close(trained[key], x, rtol=1e-3, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    seen = rows(tmp_path / "run")
    assert len(seen) == len(table) == 6
    for ours, expected in zip(seen, table, strict=True):
        assert set(ours) - set(expected) == {"wall_time", "sps"} and set(ours) >= set(expected)
        for key, x in expected.items():
            assert ours[key] == pytest.approx(x, rel=2e-3, abs=2e-5, nan_ok=True), key
    if "kl-adaptive" in flags.values():
        assert len({row["learning_rate"] for row in table}) > 2
    if "target_kl" in flags:
        assert len({row["epochs"] for row in table}) > 1
    if name == "ppo_klpen" and "beta_schedule" not in flags or flags.get("beta_schedule") == "adaptive":
        assert len({row["beta"] for row in table}) > 2


def test_trpo_does_not_blow_up_advantages_as_small_as_rounding_errors(tmp_path, monkeypatch):
    """The 1e-8 beside the standard deviation halves advantages of that size, and with them the gradient."""
    script, args = importlib.import_module("trpo_continuous"), run_args("trpo_continuous", tmp_path)
    gae = script.gae
    monkeypatch.setattr(script, "gae", lambda *arguments: 1e-8 * gae(*arguments))
    script.train(args)
    _, table = written_again(script, args)
    seen = [row["gradient_norm"] for row in rows(tmp_path / "run")]
    assert seen == pytest.approx([row["gradient_norm"] for row in table], rel=1e-3)


def spied_upon(script, monkeypatch):
    """Lists that will hold the steps at which checkpoints are written and the seeds with which rollouts begin."""
    saves, seeds, save, collect = [], [], script.Run.save, script.Actors.collect

    def spy_save(self, global_step, **adapted):
        saves.append(global_step)
        save(self, global_step, **adapted)

    def spy_collect(self, agent, seed=None):
        seeds.append(seed)
        return collect(self, agent, seed)

    monkeypatch.setattr(script.Run, "save", spy_save)
    monkeypatch.setattr(script.Actors, "collect", spy_collect)
    return saves, seeds


def test_checkpoints_are_written_where_the_contract_says(script, tmp_path, monkeypatch):
    """At the start, at the first iteration's end at or past each multiple of --checkpoint-every, and at the end. The
    next rollout begins new episodes, from a seed that follows from the step."""
    saves, seeds = spied_upon(script, monkeypatch)
    summary = script.train(run_args(script.__name__, tmp_path))
    assert saves == [0, 128, 192] and summary["global_step"] == STEPS and summary["signal"] is None
    assert seeds == [(3, 0), None, None, None, (3, 128), None]
    assert script.load_checkpoint(tmp_path / "run")["global_step"] == STEPS


def test_a_multiple_that_is_met_exactly(script, tmp_path, monkeypatch):
    saves, _ = spied_upon(script, monkeypatch)
    script.train(run_args(script.__name__, tmp_path, checkpoint_every=64))
    assert saves == [0, 64, 128, 192]


def test_stopping_resuming_and_nothing_left(script, tmp_path, monkeypatch, capsys):
    """Stopped between two checkpoints and resumed there, a run has cut its episodes once more; afterwards nothing is
    left to do, and nothing is done."""
    saves, seeds = spied_upon(script, monkeypatch)
    args = run_args(script.__name__, tmp_path, stop_at_step=50)
    assert script.train(args)["global_step"] == 64 and saves == [0, 64]
    resumed = run_args(script.__name__, tmp_path, resume=str(tmp_path / "run"))
    summary = script.train(resumed)
    assert saves == [0, 64, 128, 192] and seeds == [(3, 0), None, (3, 64), None, (3, 128), None]
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    again = script.train(resumed)
    assert "nothing to do" in capsys.readouterr().err and len(rows(tmp_path / "run")) == 6
    assert again["global_step"] == STEPS and again["signal"] is None and again["episodes"] == summary["episodes"]
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before and len(seeds) == 6


def test_a_signal_ends_the_run_after_its_iteration(script, tmp_path, monkeypatch):
    saves, seeds = spied_upon(script, monkeypatch)
    collect, during, numbers = script.Actors.collect, [], (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]

    def signalled(self, agent, seed=None):
        if len(seeds) == 1:
            twin = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM))
            twin.start()  # timeout(1) sends it to the process, and then to its group
            os.kill(os.getpid(), signal.SIGTERM)
            twin.join()
            during.append(signal.getsignal(signal.SIGTERM))
        return collect(self, agent, seed)

    monkeypatch.setattr(script.Actors, "collect", signalled)
    summary = script.train(run_args(script.__name__, tmp_path))
    assert saves == [0, 64] and summary["global_step"] == 64 and summary["signal"] == signal.SIGTERM
    assert script.load_checkpoint(tmp_path / "run")["global_step"] == 64
    assert during == [signal.SIG_DFL]  # the same again, later, would have killed
    assert before == [signal.getsignal(number) for number in numbers]


def test_a_signal_in_the_first_iteration_ends_it_at_once(script, tmp_path, monkeypatch):
    """There is nothing to save yet, and it may be compiling for a long time."""
    monkeypatch.setattr(script.Actors, "collect", lambda *x, **more: os.kill(os.getpid(), signal.SIGTERM) or 1 / 0)
    with pytest.raises(KeyboardInterrupt) as error:
        script.train(run_args(script.__name__, tmp_path))
    assert error.value.args == (signal.SIGTERM,)
    assert script.load_checkpoint(tmp_path / "run")["global_step"] == 0


def test_frozen_layers_stay_as_they_are(script, tmp_path, monkeypatch):
    class Frozen(script.Agent):
        def __init__(self, *spaces):
            super().__init__(*spaces)
            self.actor[0].requires_grad_(False)
            self.critic[0].requires_grad_(False)
            made.append({key: x.clone() for key, x in self.state_dict().items()})

    made = []
    monkeypatch.setattr(script, "Agent", Frozen)
    script.train(run_args(script.__name__, tmp_path, stop_at_step=64))
    after = script.load_checkpoint(tmp_path / "run")["agent"]
    if script.__name__ != "trpo_continuous":  # whose policy needs no Adam
        monkeypatch.undo()
        with pytest.raises(script.UserError, match="other parameters were frozen"):
            script.train(run_args(script.__name__, tmp_path, resume=str(tmp_path / "run")))
    for network in ("actor", "critic"):
        assert torch.equal(made[0][f"{network}.0.weight"], after[f"{network}.0.weight"])
        assert not torch.equal(made[0][f"{network}.2.weight"], after[f"{network}.2.weight"])


def test_every_environment_is_closed(script, tmp_path, monkeypatch):
    """N that are run, and the one that is asked for its spaces."""
    made, closed = [], []
    monkeypatch.setattr(toy_envs.Counter, "__init__", lambda self: made.append(id(self)))
    monkeypatch.setattr(toy_envs.Counter, "close", lambda self: closed.append(id(self)))
    script.train(run_args(script.__name__, tmp_path, stop_at_step=32))
    assert len(made) == 3 and sorted(made) == sorted(closed)


def test_training_uses_one_thread(script, tmp_path):
    """More would cost more than they bring here, and would take cores from the workers and from other runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        script.train(run_args(script.__name__, tmp_path, stop_at_step=32))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


ADAPTED = [("ppo_clip", {"lr_schedule": "kl-adaptive", "kl_lr_target": 10.0, "learning_rate": 1e-4})]
ADAPTED += [("ppo_klpen", {"kl_target": 1e-6})]
ADAPTED += [("trpo_continuous", {"form": "penalized", "beta_schedule": "adaptive", "max_kl": 1e-6})]


@pytest.mark.parametrize("name,flags", ADAPTED)
def test_what_was_adapted_goes_on_after_a_resume(name, flags, tmp_path):
    """A target out of reach doubles the coefficient (TRPO: or halves it) in each iteration, also across a resume."""
    script, resume = importlib.import_module(name), {"resume": str(tmp_path / "run")}
    script.train(run_args(name, tmp_path, stop_at_step=64, **flags))
    script.train(run_args(name, tmp_path, **resume, **flags))
    script.train(run_args(name, tmp_path, **resume, **flags, total_timesteps=STEPS + B))
    seen = [row["learning_rate" if name == "ppo_clip" else "beta"] for row in rows(tmp_path / "run")]
    assert [b / a for a, b in zip(seen, seen[1:])] in ([pytest.approx(2)] * 6, [pytest.approx(0.5)] * 6)


@pytest.mark.parametrize("name", ["ppo_clip", "ppo_klpen"])
def test_a_schedule_that_becomes_adaptive_starts_at_the_last_rate(name, tmp_path):
    script = importlib.import_module(name)
    script.train(run_args(name, tmp_path, stop_at_step=96))
    flags = {"lr_schedule": "kl-adaptive", "kl_lr_target": 10.0, "resume": str(tmp_path / "run")}
    script.train(run_args(name, tmp_path, **flags))
    rates = [row["learning_rate"] for row in rows(tmp_path / "run")]
    assert rates == pytest.approx([3e-3, 2.5e-3, 2e-3, 2e-3, 4e-3, 8e-3])


# ---- defaults --------------------------------------------------------------------------------------------------------

CONTRACT = {"env_id": "Hopper-v4", "total_timesteps": 1_000_000, "seed": 1, "cuda": False, "compile": True}
CONTRACT |= {"run_dir": None, "checkpoint_every": 100_000, "resume": None, "stop_at_step": None, "evaluate": None}
CONTRACT |= {"eval_episodes": 10, "capture_video": False, "gae_lambda": 0.95, "norm_adv": True, "steady_obs": False}
PPO_PAPER = {"learning_rate": 3e-4, "update_epochs": 10, "gamma": 0.99, "ent_coef": 0.0}  # Table 3
PPO_RELEASED = {"vf_coef": 0.5, "max_grad_norm": 0.5, "lr_schedule": "linear", "kl_lr_target": 0.01, "kl_lr_band": 1.5}
DEFAULTS = {
    "ppo_clip": PPO_PAPER | PPO_RELEASED | {"clip_coef": 0.2, "target_kl": None},
    "ppo_klpen": PPO_PAPER | PPO_RELEASED | {"beta_schedule": "adaptive", "beta_init": 1.0, "kl_target": 0.01},
    "trpo_continuous": {"form": "constrained", "kl_constraint": "mean", "max_kl": 0.02, "beta": 1.0, "gamma": 0.995},
}
DEFAULTS["trpo_continuous"] |= {"beta_schedule": "fixed", "cg_iters": 10, "cg_damping": 0.1, "fvp_subsample": 1}
DEFAULTS["trpo_continuous"] |= {"backtrack_coeff": 0.8, "backtrack_iters": 10, "vf_epochs": 20}
DEFAULTS["trpo_continuous"] |= {"vf_learning_rate": 1e-3, "kl_schedule": "constant"}
MINIBATCH = {"ppo_clip": 64, "ppo_klpen": 64, "trpo_continuous": 128}


def test_defaults_are_those_of_the_papers_and_of_the_contract(script):
    """All stored results were made with them. Another default is another algorithm, and has to be one on purpose."""
    args = vars(script.Args())
    batch = args.pop("num_envs") * args.pop("num_steps")
    assert batch == 2048 and batch / args.pop("num_minibatches") == MINIBATCH[script.__name__]
    assert args.pop("num_workers") == script.CORES
    assert args == CONTRACT | DEFAULTS[script.__name__]
