"""TRPO's second-order machinery against explicit matrices, and its promises on real runs."""

import csv
import functools
import math

import batches
import pytest
import torch

import trpo_continuous as trpo

make_agent = functools.partial(batches.make_agent, trpo)
make_batch = functools.partial(batches.make_batch, trpo)

SMALL = ["--num-envs", "2", "--num-steps", "64", "--num-minibatches", "4", "--vf-epochs", "2", "--no-compile"]
SMALL += ["--env-id", "Pendulum-v1", "--total-timesteps", "2048", "--checkpoint-every", "512"]


def run(tmp_path, name, *flags):
    """A short run through main(); its progress.csv as one dict of columns."""
    assert trpo.main([*SMALL, "--run-dir", str(tmp_path / name), *map(str, flags)]) == 0
    with open(tmp_path / name / "progress.csv") as file:
        table = list(csv.DictReader(file))
    return {key: [float(row[key]) for row in table] for key in table[0]}


def make_policy(seed=0, B=256, double=False, small=False):
    """An agent, its policy vector (which its parameters are views of) and a batch with normalised advantages. small:
    few enough parameters for B states to determine, so that F is regular without damping."""
    agent = make_agent(seed=seed)
    agent.actor[-1].weight.data *= 30  # actions that depend on the state
    if small:
        agent.actor = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    data = make_batch(agent, B)
    data["advantage"].sub_(data["advantage"].mean()).div_(data["advantage"].std(correction=0))
    if double:
        agent, data = agent.double(), {key: x.double() for key, x in data.items()}
    with torch.no_grad():
        data["policy"].copy_(agent.policy(data["obs"]))
        data["logprob"].copy_(agent.dist.log_prob(data["policy"], data["action"]))
    return agent, trpo.flatten_parameters(agent.policy_parameters()), data


def args(**flags):
    return trpo.Args(**flags)


def update(agent, params, data, max_kl=0.01, beta=1.0, **flags):
    scalars = params.new_tensor(max_kl), params.new_tensor(beta)
    report = trpo.policy_update(agent, params, data, *scalars, args(**flags)).tolist()
    return dict(zip(trpo.POLICY_METRICS, report, strict=True))


def natural_gradient(agent, data, damping=0.1, iters=10):
    g = trpo.flat_gradient(trpo.surrogate_and_kl(agent, data)[0], agent.policy_parameters())
    product = trpo.fisher_product(agent, data["obs"], data["weight"], damping)
    return g, trpo.conjugate_gradient(product, g, iters)[0], product


# ---- Fisher-vector products ------------------------------------------------------------------------------------------


def test_fisher_product_against_the_explicit_hessian():
    """float64, all states in a weighted mean; and the matrix that the products make is symmetric and positive."""
    agent, _, data = make_policy(B=16, double=True, small=True)
    data["weight"][::5] = 0
    shapes = [p.shape for p in agent.policy_parameters()]
    flat = torch.cat([p.detach().flatten() for p in agent.policy_parameters()])

    def mean_kl(vector):
        parts = [x.view(shape) for x, shape in zip(vector.split([s.numel() for s in shapes]), shapes, strict=True)]
        mean = torch.tanh(data["obs"] @ parts[0].T + parts[1]) @ parts[2].T + parts[3]
        new = torch.cat([mean, parts[4].expand_as(mean)], -1)
        return (data["weight"] * agent.dist.kl(data["policy"], new)).sum() / data["weight"].sum()

    hessian = torch.autograd.functional.hessian(mean_kl, flat)
    product = trpo.fisher_product(agent, data["obs"], data["weight"], damping=0.0)
    F = torch.stack([product(v) for v in torch.eye(len(flat), dtype=torch.float64)])
    assert ((F - hessian).norm() / hessian.norm()).item() < 1e-8
    assert (F - F.T).abs().max() < 1e-12 and torch.linalg.eigvalsh(F).min() > -1e-12
    damped = trpo.fisher_product(agent, data["obs"], data["weight"], damping=0.3)
    torch.testing.assert_close(damped(flat), F @ flat + 0.3 * flat)


def test_policy_vector_holds_log_std_and_nothing_of_the_critic():
    agent, params, _ = make_policy()
    before = [p.clone() for p in agent.critic.parameters()]
    assert len(params) == sum(p.numel() for p in agent.actor.parameters()) + 3
    params += 1
    assert torch.equal(agent.log_std, torch.ones(3))
    assert all(torch.equal(a, b) for a, b in zip(before, agent.critic.parameters(), strict=True))


def test_fvp_subsample_thins_the_products_and_never_the_gradient(monkeypatch):
    agent, params, data = make_policy()
    seen, original = [], trpo.fisher_product

    def spy(agent, obs, weight, damping):
        seen.append((obs, weight))
        return original(agent, obs, weight, damping)

    monkeypatch.setattr(trpo, "fisher_product", spy)
    expected = trpo.flat_gradient(trpo.surrogate_and_kl(agent, data)[0], agent.policy_parameters()).norm()
    report = update(agent, params, data, fvp_subsample=7)
    assert torch.equal(seen[0][0], data["obs"][::7]) and len(seen[0][1]) == 37
    assert report["gradient_norm"] == pytest.approx(expected.item(), rel=1e-6)


# ---- conjugate gradients ---------------------------------------------------------------------------------------------


def positive_definite(n=20):
    A = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return A @ A.T + torch.eye(n, dtype=torch.float64)


def test_conjugate_gradient_against_solve():
    F, b = positive_definite(), torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x, residual = trpo.conjugate_gradient(lambda v: F @ v, b, iters=60, tolerance=1e-24)
    torch.testing.assert_close(x, torch.linalg.solve(F, b), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(residual, b - F @ x, rtol=0, atol=1e-10)
    x, residual = trpo.conjugate_gradient(lambda v: F @ v, b, iters=5)  # not yet there: the residual says how far
    torch.testing.assert_close(residual, b - F @ x, rtol=0, atol=1e-10)
    assert residual.norm() > 1e-4


def test_conjugate_gradient_scales_with_b_and_keeps_zero():
    F, b = positive_definite().float(), torch.randn(20, generator=torch.Generator().manual_seed(1))
    for iters in (3, 60):
        x = trpo.conjugate_gradient(lambda v: F @ v, b, iters)[0]
        small = trpo.conjugate_gradient(lambda v: F @ v, 1e-8 * b, iters)[0]
        torch.testing.assert_close(small / 1e-8, x, rtol=1e-3, atol=1e-5)
    for zero in trpo.conjugate_gradient(lambda v: F @ v, torch.zeros(20), 10):
        assert torch.equal(zero, torch.zeros(20))


def test_conjugate_gradient_stops_once_it_is_there():
    """Further iterations after convergence, at which rounding would divide 0 by 0, change nothing."""
    for F in (torch.eye(20), 3 * torch.eye(20)):
        b = torch.randn(20, generator=torch.Generator().manual_seed(1))
        x, residual = trpo.conjugate_gradient(lambda v, F=F: F @ v, b, iters=50)
        torch.testing.assert_close(x, b / F[0, 0])
        assert residual.norm() <= 1e-5 * b.norm()


# ---- the step --------------------------------------------------------------------------------------------------------


def test_surrogate_gradient_at_the_old_policy_is_the_policy_gradient():
    """Notes §1.1-1.2: d/dtheta mean[r A] = mean[A d/dtheta log pi] at theta_old."""
    agent, _, data = make_policy()
    ours = trpo.flat_gradient(trpo.surrogate_and_kl(agent, data)[0], agent.policy_parameters())
    log_prob = agent.dist.log_prob(agent.policy(data["obs"]), data["action"])
    policy_gradient = trpo.flat_gradient((log_prob * data["advantage"]).mean(), agent.policy_parameters())
    torch.testing.assert_close(ours, policy_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("max_kl,tolerance", [(1e-6, 0.2), (1e-8, 0.02), (1e-10, 0.002)])
def test_kl_of_the_full_step_approaches_max_kl(max_kl, tolerance):
    agent, params, data = make_policy(double=True, small=True)
    g, x, product = natural_gradient(agent, data, damping=0.0, iters=100)
    scale = math.sqrt(2 * max_kl / (x @ product(x)).item())
    with torch.no_grad():
        params += scale * x
        kl = trpo.surrogate_and_kl(agent, data)[1].item()
    assert kl / max_kl == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize("damping,iters", [(0.0, 100), (0.1, 10), (0.1, 3)])
def test_both_forms_take_the_same_full_step_at_beta_star(damping, iters):
    """Notes §1.3, "for a suitable choice of beta": beta* = sqrt(g' F^-1 g / (2 max_kl))."""
    flags = {"cg_damping": damping, "cg_iters": iters}
    agent, params, data = make_policy(double=True, small=True)
    old = params.clone()
    report = update(agent, params, data, max_kl=1e-8, **flags)
    assert report["line_search_step"] >= 0
    constrained = (params - old) / 0.8 ** report["line_search_step"]  # without damping the KL lies a hair above max_kl
    params.copy_(old)
    g, x, _ = natural_gradient(agent, data, damping, iters)
    assert report["beta_star"] == pytest.approx(math.sqrt((g @ x).item() / 2e-8), rel=1e-4)  # x is not quite F^-1 g
    report = update(agent, params, data, beta=report["beta_star"], form="penalized", **flags)
    assert report["line_search_step"] == 0
    assert ((params - old) - constrained).norm() < 1e-6 * constrained.norm()


@pytest.mark.parametrize("flags", [{}, {"kl_constraint": "max"}, {"form": "penalized"}])
def test_a_step_raises_the_surrogate_and_reports_what_it_did(flags):
    agent, params, data = make_policy()
    before, old = trpo.surrogate_and_kl(agent, data)[0].item(), params.clone()
    report = update(agent, params, data, **flags)
    surrogate, kl, kl_max = (x.item() for x in trpo.surrogate_and_kl(agent, data))
    assert surrogate > before and report["expected_improvement"] > 0
    assert report["improvement"] == pytest.approx(surrogate - before, rel=1e-3)
    assert report["kl"] == pytest.approx(kl, rel=1e-4) and report["kl_max"] == pytest.approx(kl_max, rel=1e-4)
    assert report["step_norm"] == pytest.approx((params - old).norm().item(), rel=1e-4)
    assert report["improvement_ratio"] == pytest.approx(
        report["improvement"] / report["expected_improvement"], rel=1e-3
    )
    assert 0.3 < report["improvement_ratio"] < 1.5
    if flags.get("kl_constraint") == "max":
        assert 0.4 * 0.01 < kl_max <= 0.01
    elif not flags:
        assert 0.2 * 0.01 < kl <= 0.01


def test_the_max_form_holds_on_every_sampled_state():
    for seed in range(10):
        agent, params, data = make_policy(seed)
        data["weight"][::3] = 0
        assert update(agent, params, data, max_kl=0.02, kl_constraint="max")["line_search_step"] >= 0
        per_state = agent.dist.kl(data["policy"], agent.policy(data["obs"]))
        assert per_state[data["weight"] > 0].max() <= 0.02


def test_rows_that_are_no_transitions_are_not_seen():
    """A batch with weight-0 rows gives the step of the batch without them."""
    results = []
    for masked in (True, False):
        agent, params, data = make_policy()
        if masked:
            data["weight"][::4] = 0
        else:
            keep = torch.arange(256) % 4 > 0
            data = {key: x[keep] for key, x in data.items()}
        update(agent, params, data, kl_constraint="max")
        results.append(params.clone())
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


def test_a_zero_gradient_moves_nothing():
    agent, params, data = make_policy()
    data["advantage"].zero_()
    old = params.clone()
    for flags in ({}, {"kl_constraint": "max"}, {"form": "penalized"}):
        report = update(agent, params, data, **flags)
        assert torch.equal(params, old) and report["line_search_step"] == -1
        assert report["kl"] == report["improvement"] == report["step_norm"] == report["gradient_norm"] == 0
        assert report["improvement_ratio"] == 0
        assert math.isfinite(report["cg_residual"])


# ---- line search -----------------------------------------------------------------------------------------------------


def search(acceptable, iters=5):
    """Search from 0.1 along a step of 8, halving; acceptable(x) -> bool. Returns step, report and where params are."""
    params = torch.full((3,), 0.1)

    def evaluate():
        return torch.tensor(acceptable(params[0].item())), params[:1].clone()

    taken, report = trpo.line_search(params, torch.full((3,), 8.0), evaluate, 0.5, iters)
    return taken.item(), report, params


def test_line_search_accepts_the_first_candidate():
    taken, report, params = search(lambda x: True)
    assert taken == 0 and torch.equal(params, torch.full((3,), 8.1)) and report == params[0]


def test_line_search_backtracks():
    taken, report, params = search(lambda x: x < 3)
    assert taken == 2 and torch.equal(params, torch.full((3,), 2.1)) and report == params[0]


def test_line_search_restores_bit_for_bit():
    taken, report, params = search(lambda x: False)
    assert taken == -1 and report == 0 and torch.equal(params, torch.full((3,), 0.1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_rejected(bad):
    """Ten candidates without one finite surrogate, and a step that is itself not finite: the old parameters stay."""
    agent, params, data = make_policy()
    old = params.clone()
    report = update(agent, params, data | {"logprob": torch.full((256,), -bad)})
    assert report["line_search_step"] == -1 and torch.equal(params, old)
    assert report["kl"] == 0 and report["improvement"] == 0
    report = update(agent, params, data | {"advantage": torch.full((256,), bad)})
    assert report["line_search_step"] == -1 and torch.equal(params, old)


def test_a_rejected_step_is_logged_and_leaves_the_policy(tmp_path, monkeypatch):
    """In a whole run whose every candidate is refused the policy stays as it was initialised; the critic learns."""
    monkeypatch.setattr(trpo, "line_search", refusing(trpo.line_search))
    table = run(tmp_path, "a")
    assert set(table["line_search_step"]) == {-1} and set(table["kl"]) == {0}
    trained = trpo.load_checkpoint(tmp_path / "a")["agent"]
    fresh = trpo.Agent(3, trpo.make_env("Pendulum-v1").action_space, torch.Generator().manual_seed(1)).state_dict()
    for key, x in trained.items():
        if "actor" in key or key == "log_std":
            assert torch.equal(x, fresh[key])
        if "critic" in key:
            assert not torch.equal(x, fresh[key])


def refusing(line_search):
    def wrapped(params, step, evaluate, coeff, iters):
        def refuse():
            acceptable, report = evaluate()
            return acceptable & False, report

        return line_search(params, step, refuse, coeff, iters)

    return wrapped


@pytest.mark.parametrize(
    "flags", [[], ["--kl-constraint", "max"], ["--cg-damping", 0, "--cg-iters", 40], ["--max-kl", 0.3]]
)
def test_no_candidate_above_the_bound_is_ever_accepted(tmp_path, flags):
    table = run(tmp_path, "a", "--total-timesteps", 25_600, *flags)
    bound = 0.3 if "--max-kl" in flags else trpo.Args().max_kl
    bounded = table["kl_max" if "max" in flags else "kl"]
    assert len(bounded) == 200 and max(bounded) <= bound * (1 + 1e-6)
    for taken, improvement, kl in zip(table["line_search_step"], table["improvement"], table["kl"], strict=True):
        assert (taken >= 0 and improvement > 0 and kl > 0) or (taken == -1 and improvement == kl == 0)
    assert max(table["line_search_step"]) > 0 or not flags  # the harder settings do backtrack


# ---- penalised form, logging, resume ---------------------------------------------------------------------------------


def test_adaptive_beta_follows_the_rule_and_survives_a_resume(tmp_path):
    flags = ["--form", "penalized", "--beta-schedule", "adaptive", "--beta", 50]
    table = run(tmp_path, "whole", *flags)
    beta, kl = table["beta"], table["kl"]
    assert beta[0] == 50 and len(set(beta)) > 2
    assert all(
        b == trpo.adapted_beta(a, d or math.inf, trpo.Args().max_kl)
        for a, b, d in zip(beta, beta[1:], kl, strict=False)
    )
    run(tmp_path, "a", *flags, "--stop-at-step", 512)
    resume = ["--resume", str(tmp_path / "a"), "--run-dir"]
    assert trpo.main([*resume, str(tmp_path / "b")]) == 0
    with open(tmp_path / "b" / "progress.csv") as file:
        assert [float(row["beta"]) for row in csv.DictReader(file)] == beta[4:]
    assert trpo.main([*resume, str(tmp_path / "c"), "--beta", "7"]) == 0
    with open(tmp_path / "c" / "progress.csv") as file:
        assert float(next(csv.DictReader(file))["beta"]) == 7


def test_penalty_coefficient_of_the_bound(tmp_path, monkeypatch):
    """C = 4 eps gamma / (1-gamma)^2 with eps = max |A| before normalisation (TRPO theorem 1)."""
    seen, gae = [], trpo.gae

    def spy(*arguments):
        seen.append(gae(*arguments))
        return seen[-1].clone()

    monkeypatch.setattr(trpo, "gae", spy)
    table = run(tmp_path, "a", "--gamma", 0.9)
    expected = [4 * A.abs().max().item() * 0.9 / 0.1**2 for A in seen]
    assert table["penalty_coefficient_of_the_bound"] == pytest.approx(expected, rel=1e-5)


def test_discrete_actions_are_refused(tmp_path, capsys):
    assert trpo.main([*SMALL, "--env-id", "CartPole-v1", "--run-dir", str(tmp_path / "a")]) == 2
    err = capsys.readouterr().err
    assert "action space" in err and err.count("\n") == 1 and not (tmp_path / "a").exists()


def test_compiled_critic_equals_eager():
    results = []
    for compiled in (False, True):
        agent = make_agent()
        step = trpo.compiled(trpo.minibatch_update, torch.device("cpu")) if compiled else trpo.minibatch_update
        data = make_batch(agent, 1024)
        data = {key: data[key] for key in ("obs", "return", "weight")}
        adam, metrics = batches.make_adam(trpo, agent.critic), torch.zeros(2)
        coef = {"learning_rate": torch.tensor(1e-3), "max_grad_norm": torch.tensor(math.inf)}
        rng = torch.Generator().manual_seed(0)
        for _ in range(60):
            for index in torch.randperm(1024, generator=rng).view(-1, 128):
                step(trpo.critic_loss, agent.critic, adam, data, index, coef, metrics)
        results.append(adam["params"].clone())
    eager, compiled = results
    assert ((eager - compiled).norm() / eager.norm()).item() < 1e-5


def test_surrogate_kl_is_old_to_new():
    """Not the other direction: KL(N(0,1) || N(0,s)) and KL(N(0,s) || N(0,1)) differ."""
    agent, params, data = make_policy()
    with torch.no_grad():
        params[-3:] += 1.0
        kl = trpo.surrogate_and_kl(agent, data)[1]
    assert kl.item() == pytest.approx(3 * (1 + 0.5 * math.exp(-2) - 0.5), rel=1e-4)
