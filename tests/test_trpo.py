"""TRPO's second-order machinery against explicit matrices, and its promises on real runs."""

import csv
import functools
import itertools
import math

import batches
import numpy as np
import pytest
import torch
from conftest import needs_compiler

import trpo_continuous as trpo

make_agent = functools.partial(batches.make_agent, trpo)
make_batch = functools.partial(batches.make_batch, trpo)

SMALL = ["--num-envs", "2", "--num-steps", "64", "--num-minibatches", "4", "--vf-epochs", "2", "--no-compile"]
SMALL += ["--env-id", "Pendulum-v1", "--total-timesteps", "2048", "--checkpoint-every", "512", "--num-workers", "0"]


def table_of(path):
    """progress.csv as one dict of columns."""
    with open(path / "progress.csv") as file:
        table = list(csv.DictReader(file))
    return {key: [float(row[key]) for row in table] for key in table[0]}


def run(tmp_path, name, *flags):
    """A short run through main(); its progress.csv."""
    assert trpo.main([*SMALL, "--run-dir", str(tmp_path / name), *map(str, flags)]) == 0
    return table_of(tmp_path / name)


def make_policy(seed=0, B=256, double=False, small=False):
    """An agent, its policy vector and a batch with normalised advantages. small: few enough parameters for B states to
    determine, so that F is regular without damping."""
    agent = make_agent(seed=seed)
    agent.actor[-1].weight.data *= 30  # actions that depend on the state
    if small:
        agent.actor = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    data = make_batch(agent, B)
    data["advantage"].sub_(data["advantage"].mean()).div_(data["advantage"].std(correction=0))
    if double:
        agent, data = agent.double(), {key: x.double() for key, x in data.items()}
    with torch.no_grad():
        data["old_policy"] = agent.policy_parameters(data["obs"])
        data["logprob"] = agent.policy(data["obs"]).log_prob(data["action"])
    return agent, vector(agent), data


def vector(agent):
    """The policy's parameters as they are now, as one vector that no step overwrites."""
    return torch.nn.utils.parameters_to_vector(trpo.policy_part(agent).values()).detach().clone()


def update(agent, data, beta=1.0, max_kl=0.01, **flags):
    args = trpo.Args(**flags)  # whose own max_kl must not matter
    return trpo.policy_step(*trpo.functions_of_theta(agent, data, args), max_kl, beta, args)


def surrogate_and_kl(agent, data, theta=None):
    with torch.no_grad():
        return trpo.surrogate_and_kl(agent, vector(agent) if theta is None else theta, data)


def gradient(agent, data):
    return torch.func.grad(lambda theta: trpo.surrogate_and_kl(agent, theta, data)[0])(vector(agent))


def natural_gradient(agent, data, damping=0.1, iters=10):
    g, product = gradient(agent, data), trpo.fisher_product(agent, vector(agent), data["obs"], damping)
    return g, trpo.conjugate_gradient(product, g, iters)[0], product


def flat_gradient(y, params, **options):
    return torch.cat([g.flatten() for g in torch.autograd.grad(y, params, **options)])


def dense(product, size):
    return torch.stack([product(v) for v in torch.eye(size, dtype=torch.float64)])


# ---- Fisher-vector products ------------------------------------------------------------------------------------------


def test_fisher_product_against_the_explicit_hessian():
    """float64, all states; and the matrix that the products make is symmetric and positive."""
    agent, theta, data = make_policy(B=16, double=True, small=True)
    shapes = [p.shape for p in trpo.policy_part(agent).values()]
    old = agent.distribution(data["old_policy"])

    def mean_kl(vector):
        parts = [x.view(shape) for x, shape in zip(vector.split([s.numel() for s in shapes]), shapes, strict=True)]
        log_std, w1, b1, w2, b2 = parts
        mean = torch.tanh(data["obs"] @ w1.T + b1) @ w2.T + b2
        new = agent.distribution(torch.cat([mean, log_std.expand_as(mean)], -1))
        return torch.distributions.kl_divergence(old, new).mean()

    hessian = torch.autograd.functional.hessian(mean_kl, theta)
    F = dense(trpo.fisher_product(agent, theta, data["obs"], damping=0.0), len(theta))
    assert ((F - hessian).norm() / hessian.norm()).item() < 1e-8
    assert (F - F.T).abs().max() < 1e-12 and torch.linalg.eigvalsh(F).min() > -1e-12
    damped = trpo.fisher_product(agent, theta, data["obs"], damping=0.3)
    torch.testing.assert_close(damped(theta), F @ theta + 0.3 * theta)


def test_fisher_product_against_the_definition():
    """F = E[score score'], the expectation over actions taken exactly: the integrand is a polynomial of degree 4 in
    each action, and three Gauss-Hermite nodes integrate degree 5."""
    agent, theta, data = make_policy(B=16, double=True, small=True)
    agent.log_std.data = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64)
    theta, obs = vector(agent), data["obs"]
    mean, log_std = agent.policy_parameters(obs).detach().chunk(2, -1)

    def log_prob(theta, obs, action):
        return agent.distribution(trpo.policy_parameters_at(agent, theta, obs)).log_prob(action)

    scores = torch.func.vmap(torch.func.grad(log_prob), in_dims=(None, 0, 0))  # (B, K)
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    F = torch.zeros(len(theta), len(theta), dtype=torch.float64)
    for z, w in zip(itertools.product(nodes, repeat=3), itertools.product(weights, repeat=3), strict=True):
        score = scores(theta, obs, mean + log_std.exp() * torch.tensor(z))
        F += math.prod(w) / (2 * math.pi) ** 1.5 * score.T @ score / len(obs)
    product = trpo.fisher_product(agent, theta, obs, damping=0.0)
    torch.testing.assert_close(dense(product, len(theta)), F, rtol=1e-9, atol=1e-12)


def test_fisher_product_against_double_backward_and_forward_mode():
    """The KL's gradient, differentiated along v once more; and J v by forward-mode differentiation. In float32, at the
    size of a run."""
    agent, theta, data = make_policy(B=2048)
    obs, params = data["obs"], list(trpo.policy_part(agent).values())
    kl = torch.distributions.kl_divergence(agent.distribution(data["old_policy"]), agent.policy(obs)).mean()
    kl_gradient = flat_gradient(kl, params, create_graph=True)

    def policy_parameters(theta):
        return trpo.policy_parameters_at(agent, theta, obs)

    eta, transposed = torch.func.vjp(policy_parameters, theta)
    M = torch.cat([(-2 * eta[:, 3:]).exp(), torch.full_like(eta[:, 3:], 2)], -1) / 2048
    product = trpo.fisher_product(agent, theta, obs, damping=0.1)
    for seed in range(5):
        v = torch.randn(len(theta), generator=torch.Generator().manual_seed(seed))
        double_backward = flat_gradient(kl_gradient @ v, params, retain_graph=True) + 0.1 * v
        forward_mode = transposed(M * torch.func.jvp(policy_parameters, (theta,), (v,))[1])[0] + 0.1 * v
        for reference in (double_backward, forward_mode):
            assert ((product(v) - reference).norm() / reference.norm()).item() < 5e-7


def test_policy_vector_holds_log_std_and_nothing_of_the_critic():
    agent, theta, data = make_policy()
    names = {name for name, _ in agent.named_parameters()}
    assert set(trpo.policy_part(agent)) == {name for name in names if "actor" in name or name == "log_std"}
    critic = [p.clone() for p in agent.critic.parameters()]
    before = {name: p.clone() for name, p in trpo.policy_part(agent).items()}
    assert update(agent, data)["line_search_step"] >= 0
    assert not any(torch.equal(p, before[name]) for name, p in trpo.policy_part(agent).items())
    assert all(torch.equal(a, b) for a, b in zip(critic, agent.critic.parameters(), strict=True))


@pytest.mark.parametrize("k", [7, 8, 32])
def test_fvp_subsample_thins_the_products_and_never_the_gradient(k, monkeypatch):
    """Every k-th step of all eight environments, also where k is a multiple of their number."""
    agent, _, data = make_policy()
    data["obs"][:, 0] = torch.arange(256) % 8  # rows are ordered (t, n): the environment
    data["obs"][:, 1] = torch.arange(256) // 8  # and the step
    with torch.no_grad():
        data["old_policy"] = agent.policy_parameters(data["obs"])
        data["logprob"] = agent.policy(data["obs"]).log_prob(data["action"])
    seen, original = [], trpo.fisher_product

    def spy(agent, theta, obs, damping):
        seen.append(obs)
        return original(agent, theta, obs, damping)

    monkeypatch.setattr(trpo, "fisher_product", spy)
    expected = gradient(agent, data).norm()
    report = update(agent, data, fvp_subsample=k)
    steps = range(0, 32, k)
    assert seen[0][:, :2].tolist() == [[n, t] for t in steps for n in range(8)]
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


def test_natural_gradient_against_a_direct_solve():
    """F + damping I of a policy, as a matrix, solved by LAPACK."""
    agent, theta, data = make_policy(double=True, small=True)
    g, x, product = natural_gradient(agent, data, damping=0.1, iters=100)
    expected = torch.linalg.solve(dense(product, len(theta)), g)
    assert (x - expected).norm() < 1e-4 * expected.norm()  # |F x - g| is 1e-5 |g| where it stops
    x = trpo.conjugate_gradient(product, g, 100, tolerance=1e-24)[0]
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-12)


def test_conjugate_gradient_scales_with_b_and_keeps_zero():
    F, b = positive_definite().float(), torch.randn(20, generator=torch.Generator().manual_seed(1))
    for iters in (3, 60):
        x = trpo.conjugate_gradient(lambda v: F @ v, b, iters)[0]
        small = trpo.conjugate_gradient(lambda v: F @ v, 1e-8 * b, iters)[0]
        torch.testing.assert_close(small / 1e-8, x, rtol=1e-3, atol=1e-5)
    for zero in trpo.conjugate_gradient(lambda v: F @ v, torch.zeros(20), 10):
        assert torch.equal(zero, torch.zeros(20))


def test_conjugate_gradient_stops_once_it_is_there():
    """Further iterations after convergence, at which rounding would divide 0 by 0, do not happen."""
    for F in (torch.eye(20), 3 * torch.eye(20)):
        b, calls = torch.randn(20, generator=torch.Generator().manual_seed(1)), []
        x, residual = trpo.conjugate_gradient(lambda v, F=F, calls=calls: calls.append(1) or F @ v, b, iters=50)
        torch.testing.assert_close(x, b / F[0, 0])
        assert residual.norm() <= 1e-5 * b.norm() and len(calls) <= 2


def test_steps_after_the_solution_change_nothing():
    """On a GPU nobody looks whether it is there. In float32 the residual becomes 0 exactly, and 0 / 0 would be nan."""
    for diagonal in (torch.ones(20), torch.arange(20).div(10).floor() + 1):
        b = torch.randn(20, generator=torch.Generator().manual_seed(1))
        x, residual = trpo.conjugate_gradient(lambda v, d=diagonal: d * v, b, iters=200, tolerance=None)
        torch.testing.assert_close(x, b / diagonal)
        assert residual.norm() < 1e-5 * b.norm()


@pytest.mark.parametrize("cuda,products", [(False, range(1, 15)), (True, [30])])
def test_conjugate_gradients_stop_early_but_not_on_a_gpu(cuda, products, monkeypatch):
    """A large damping makes the system so easy that a few of 30 iterations solve it. A CUDA graph cannot look at the
    residual, so it makes all of them; the direction is the same."""
    agent, theta, data = make_policy(double=True, small=True)
    calls, fisher_product = [], trpo.fisher_product

    def spy(*args):
        product = fisher_product(*args)
        return lambda v: calls.append(1) or product(v)

    monkeypatch.setattr(trpo, "fisher_product", spy)
    args = trpo.Args(cuda=cuda, cg_iters=30, cg_damping=10.0)
    surrogate, g, x, residual = trpo.natural_gradient(agent, theta, data, args)
    assert len(calls) in products and residual.norm() <= 1e-5 * g.norm()
    dense_F = dense(fisher_product(agent, theta, data["obs"], 10.0), len(theta))
    torch.testing.assert_close(x, torch.linalg.solve(dense_F, g), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close((surrogate, g), (surrogate_and_kl(agent, data)[0], gradient(agent, data)))


# ---- the step --------------------------------------------------------------------------------------------------------


def test_surrogate_gradient_at_the_old_policy_is_the_policy_gradient():
    """d/dtheta mean[r A] = mean[A d/dtheta log pi] at theta_old."""
    agent, _, data = make_policy()
    log_prob = agent.policy(data["obs"]).log_prob(data["action"])
    policy_gradient = flat_gradient((log_prob * data["advantage"]).mean(), list(trpo.policy_part(agent).values()))
    torch.testing.assert_close(gradient(agent, data), policy_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("max_kl,tolerance", [(1e-6, 0.2), (1e-8, 0.02), (1e-10, 0.002)])
def test_kl_of_the_full_step_approaches_max_kl(max_kl, tolerance):
    agent, theta, data = make_policy(double=True, small=True)
    g, x, product = natural_gradient(agent, data, damping=0.0, iters=100)
    scale = math.sqrt(2 * max_kl / (x @ product(x)).item())
    kl = surrogate_and_kl(agent, data, theta + scale * x)[1].mean().item()
    assert kl / max_kl == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize("damping,iters", [(0.0, 100), (0.1, 10), (0.1, 3)])
def test_both_forms_take_the_same_full_step_at_beta_star(damping, iters):
    """The forms are equivalent for a suitable beta: beta* = sqrt(g' F^-1 g / (2 max_kl))."""
    flags = {"cg_damping": damping, "cg_iters": iters}
    agent, old, data = make_policy(double=True, small=True)
    g, x, _ = natural_gradient(agent, data, damping, iters)
    report = update(agent, data, max_kl=1e-8, **flags)
    assert report["line_search_step"] >= 0
    # Without damping the KL lies a hair above max_kl, and the line search shortens the step.
    constrained = (vector(agent) - old) / 0.8 ** report["line_search_step"]
    assert report["beta_star"] == pytest.approx(math.sqrt((g @ x).item() / 2e-8), rel=1e-4)  # x is not quite F^-1 g
    torch.nn.utils.vector_to_parameters(old.clone(), trpo.policy_part(agent).values())
    report = update(agent, data, beta=report["beta_star"], form="penalized", **flags)
    assert report["line_search_step"] == 0
    assert ((vector(agent) - old) - constrained).norm() < 1e-6 * constrained.norm()


@pytest.mark.parametrize("flags", [{}, {"kl_constraint": "max"}, {"form": "penalized"}])
def test_a_step_raises_the_surrogate_and_reports_what_it_did(flags):
    agent, old, data = make_policy()
    before = surrogate_and_kl(agent, data)[0].item()
    report = update(agent, data, **flags)
    surrogate, kl = surrogate_and_kl(agent, data)
    surrogate, kl, kl_max = surrogate.item(), kl.mean().item(), kl.max().item()
    assert surrogate > before
    assert report["improvement"] == pytest.approx(surrogate - before, rel=1e-3)
    assert report["kl"] == pytest.approx(kl, rel=1e-4) and report["kl_max"] == pytest.approx(kl_max, rel=1e-4)
    assert 0.3 < report["improvement_ratio"] < 1.5 and report["beta"] == 1.0
    if flags.get("kl_constraint") == "max":
        assert 0.4 * 0.01 < kl_max <= 0.01
    elif not flags:
        assert 0.2 * 0.01 < kl <= 0.01


def test_the_max_form_holds_on_every_sampled_state():
    """And the step is as long as that allows: scaled so well that the line search need not shorten it."""
    for seed in range(10):
        agent, _, data = make_policy(seed)
        assert update(agent, data, max_kl=0.02, kl_constraint="max")["line_search_step"] == 0
        assert 0.9 * 0.02 < surrogate_and_kl(agent, data)[1].max() <= 0.02


def test_a_zero_gradient_moves_nothing():
    agent, old, data = make_policy()
    data["advantage"].zero_()
    for flags in ({}, {"kl_constraint": "max"}, {"form": "penalized"}):
        report = update(agent, data, **flags)
        assert torch.equal(vector(agent), old) and report["line_search_step"] == -1
        assert report["kl"] == report["improvement"] == report["gradient_norm"] == 0
        assert report["improvement_ratio"] == report["beta_star"] == 0
        assert math.isfinite(report["cg_residual"])


def test_surrogate_kl_is_old_to_new():
    """Not the other direction: KL(N(0,1) || N(0,s)) and KL(N(0,s) || N(0,1)) differ."""
    agent, _, data = make_policy()
    agent.log_std.data += 1.0
    kl = surrogate_and_kl(agent, data)[1]
    assert kl.shape == (256,)
    assert kl.mean().item() == pytest.approx(3 * (1 + 0.5 * math.exp(-2) - 0.5), rel=1e-4)


def test_a_standard_deviation_that_depends_on_the_state_needs_no_other_change(monkeypatch):
    class Other(trpo.Agent):
        def __init__(self, obs_dim, action_space):
            super().__init__(obs_dim, action_space)
            del self.log_std
            self.actor = trpo.mlp(obs_dim, 2 * self.action_dim, output_gain=0.01)

        def policy_parameters(self, obs):
            return self.actor(obs)

    monkeypatch.setattr(trpo, "Agent", Other)
    agent = make_agent()
    data, old = make_batch(agent), vector(agent)
    report = update(agent, data)
    assert report["line_search_step"] >= 0 and 0 < report["kl"] <= 0.01
    assert not torch.equal(vector(agent), old)


def test_the_report_of_a_step():
    """Each number from its definition."""
    agent, theta, data = make_policy()
    args = trpo.Args(max_kl=0.01)
    old, g, x, residual = trpo.natural_gradient(agent, theta, data, args)
    report, moved = update(agent, data), vector(agent) - theta
    surrogate, kl = surrogate_and_kl(agent, data)
    expected = {
        "cg_residual": residual.norm() / g.norm(), "gradient_norm": g.norm(),
        "improvement": surrogate - old, "kl": kl.mean(), "kl_max": kl.max(),
        "improvement_ratio": (surrogate - old) / (g @ moved), "beta": 1.0,
        "beta_star": (x @ (g - residual) / 0.02).sqrt(), "max_kl": 0.01,
    }  # fmt: skip
    for key, value in expected.items():
        assert report[key] == pytest.approx(float(value), rel=1e-3), key
    assert {*expected, "line_search_step"} == {*report} and 0 < report["cg_residual"] < 1


def test_two_looks_scale_a_step_to_the_largest_kl():
    """For a KL that is not quite quadratic. The second look repairs most of what the first one got wrong; each of them
    evaluates the policy on the whole batch, so there is no third."""
    looks, theta = [], torch.tensor(0.0)

    def look(theta):
        looks.append(theta.item())
        return None, torch.stack([theta.square() + theta**3 / 4, theta.square() / 2])

    step = trpo.scaled_to_max_kl(look, theta, torch.tensor(3.0), max_kl=0.02)
    assert len(looks) == 2 and theta == 0
    assert 0.95 * 0.02 < look(step / 0.99)[1].max() < 1.05 * 0.02
    exact = trpo.scaled_to_max_kl(lambda theta: (None, theta.square()[None]), theta, torch.tensor(1.0), max_kl=0.04)
    assert exact.item() == pytest.approx(0.99 * 0.2)


# ---- line search -----------------------------------------------------------------------------------------------------


@pytest.fixture
def search(monkeypatch):
    """Search from 0.1 along a step of 8, halving; accept(x) -> bool. Returns where it ends, numbers and place."""

    def search(accept):
        monkeypatch.setattr(trpo, "acceptable", lambda report, max_kl, beta, args: accept(report["improvement"]))
        theta, args = torch.full((3,), 0.1), trpo.Args(backtrack_coeff=0.5, backtrack_iters=5)
        looks.clear()

        def look(theta):  # the surrogate is theta's first number, the KLs of two states are its double and triple
            looks.append(theta.clone())
            return theta[0].clone(), theta[0] * torch.tensor([2.0, 3.0])

        return trpo.line_search(look, theta, torch.full((3,), 8.0), torch.tensor(0.0), 0.01, 1.0, args)

    looks = search.looks = []
    return search


def test_line_search_accepts_the_first_candidate(search):
    theta, numbers, taken = search(lambda x: True)
    assert taken == 0 and torch.equal(theta, torch.full((3,), 8.1)) and len(search.looks) == 1
    assert numbers == pytest.approx({"kl": 2.5 * 8.1, "kl_max": 3 * 8.1, "improvement": 8.1})


def test_line_search_backtracks(search):
    theta, numbers, taken = search(lambda x: x < 3)
    assert taken == 2 and torch.equal(theta, torch.full((3,), 2.1)) and len(search.looks) == 3
    assert numbers == pytest.approx({"kl": 2.5 * 2.1, "kl_max": 3 * 2.1, "improvement": 2.1})


def test_line_search_restores_bit_for_bit(search):
    theta, numbers, taken = search(lambda x: False)
    assert taken == -1 and torch.equal(theta, torch.full((3,), 0.1)) and len(search.looks) == 5
    assert numbers == {"kl": 0, "kl_max": 0, "improvement": 0}


def test_what_is_acceptable():
    def accepted(kl=0.005, kl_max=0.05, improvement=0.1, beta=1.0, **flags):
        numbers = {"kl": kl, "kl_max": kl_max, "improvement": improvement}
        return trpo.acceptable(numbers, 0.01, beta, trpo.Args(**flags))

    assert accepted() and accepted(kl=0.01) and not accepted(kl=0.0101)
    assert not accepted(improvement=0.0) and not accepted(improvement=-0.1)
    assert not accepted(kl_constraint="max") and accepted(kl_max=0.01, kl_constraint="max")
    assert accepted(form="penalized") and accepted(kl=0.09, form="penalized")  # no bound: 0.1 pays 0.09
    assert not accepted(kl=0.1, form="penalized") and not accepted(beta=20.0, form="penalized")
    for flags in ({}, {"kl_constraint": "max"}, {"form": "penalized"}):
        assert not any(accepted(improvement=bad, **flags) for bad in (math.nan, math.inf, -math.inf))
        assert not accepted(kl=math.nan, kl_max=math.nan, **flags)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("flags", [{}, {"kl_constraint": "max"}, {"form": "penalized"}])
def test_what_is_not_finite_is_rejected(bad, flags):
    """Ten candidates without one finite surrogate, and a step that is itself not finite: the old parameters stay."""
    agent, old, data = make_policy()
    report = update(agent, data | {"logprob": torch.full((256,), -bad)}, **flags)
    assert report["line_search_step"] == -1 and torch.equal(vector(agent), old)
    assert report["kl"] == 0 and report["improvement"] == 0
    report = update(agent, data | {"advantage": torch.full((256,), bad)}, **flags)
    assert report["line_search_step"] == -1 and torch.equal(vector(agent), old)


def test_a_rejected_step_is_logged_and_leaves_the_policy(tmp_path, monkeypatch):
    """In a whole run whose every candidate is refused the policy stays as it was initialised; the critic learns."""
    monkeypatch.setattr(trpo, "acceptable", lambda *args: False)
    table = run(tmp_path, "a")
    assert set(table["line_search_step"]) == {-1} and set(table["kl"]) == {0}
    trained = trpo.load_checkpoint(tmp_path / "a")["agent"]
    torch.manual_seed(1)
    fresh = trpo.Agent(3, trpo.make_env("Pendulum-v1").action_space).state_dict()
    for key, x in trained.items():
        if "actor" in key or key == "log_std":
            assert torch.equal(x, fresh[key])
        if "critic" in key:
            assert not torch.equal(x, fresh[key])


LINEAR = ["--kl-schedule", "linear"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [[], LINEAR, ["--kl-constraint", "max"], ["--cg-damping", 0, "--cg-iters", 40], ["--max-kl", 0.3]]
)
def test_no_candidate_above_the_bound_is_ever_accepted(tmp_path, flags):
    table = run(tmp_path, "a", "--total-timesteps", 25_600, "--vf-epochs", 1, "--num-minibatches", 1, *flags)
    bound = 0.3 if "--max-kl" in flags else trpo.Args().max_kl
    bounded = table["kl_max" if "max" in flags else "kl"]
    assert len(bounded) == 200
    for i, kl in enumerate(bounded):
        assert kl <= bound * (1 - i / 200 if "linear" in flags else 1) * (1 + 1e-6)
    for taken, loss, kl in zip(table["line_search_step"], table["policy_loss"], table["kl"], strict=True):
        improvement = -loss
        assert (taken >= 0 and improvement > 0 and kl > 0) or (taken == -1 and improvement == kl == 0)
    assert max(table["line_search_step"]) > 0 or not flags  # the harder settings do backtrack


# ---- the critic ------------------------------------------------------------------------------------------------------


def critic_data(agent, B):
    data = make_batch(agent, B)
    return {key: data[key] for key in ("obs", "return")}


def test_critic_update_equals_torch():
    agent, twin = make_agent(), make_agent()
    data, state = critic_data(agent, 256), trpo.initial_state(agent.critic, 2)
    optimizer, sums = torch.optim.Adam(twin.critic.parameters(), lr=1e-3, eps=1e-5), torch.zeros(2)
    for i in range(50):
        index = torch.randperm(256, generator=torch.Generator().manual_seed(i))[:64]
        batch = {key: x[index] for key, x in data.items()}
        state = trpo.critic_update(agent.critic, state, batch, torch.tensor(1e-3))
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(twin.value(batch["obs"]), batch["return"])
        loss.backward()
        grad = torch.cat([p.grad.flatten() for p in twin.critic.parameters()])
        sums += torch.stack([loss.detach(), grad.norm()])
        optimizer.step()
    expected = torch.nn.utils.parameters_to_vector(twin.critic.parameters()).detach()
    torch.testing.assert_close(state["parameters"], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state["sums"], sums, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@needs_compiler
def test_compiled_critic_equals_eager():
    results = []
    for compile in (False, True):
        agent = make_agent()
        policy, start = vector(agent), torch.nn.utils.parameters_to_vector(agent.critic.parameters()).detach().clone()
        data, state = critic_data(agent, 1024), trpo.initial_state(agent.critic, 2)
        order, rng = torch.zeros(8, 128, dtype=torch.long), torch.Generator().manual_seed(0)
        operands = agent.critic, state, data, order, torch.tensor(1e-3)
        epoch = trpo.accelerated(trpo.Args(compile=compile), trpo.critic_update, *operands)
        for _ in range(60):
            order.copy_(torch.randperm(1024, generator=rng).view(8, 128))
            epoch()
        results.append(torch.nn.utils.parameters_to_vector(agent.critic.parameters()).detach().clone())
        assert torch.equal(results[-1], state["parameters"])  # the critic's parameters are views of it
        assert torch.equal(policy, vector(agent)) and (results[-1] - start).norm() > 0.1 * start.norm()
    eager, compiled = results
    assert ((eager - compiled).norm() / eager.norm()).item() < 1e-5


# ---- penalised form, logging, resume, refusals -----------------------------------------------------------------------


def test_the_bound_falls_over_the_whole_run_also_if_it_is_resumed(tmp_path):
    expected = [0.02 * (1 - i / 16) for i in range(16)]
    assert run(tmp_path, "whole", *LINEAR)["max_kl"] == pytest.approx(expected)
    table = run(tmp_path, "a", *LINEAR, "--kl-constraint", "max", "--stop-at-step", 512)
    assert trpo.main(["--resume", str(tmp_path / "a")]) == 0
    assert table["max_kl"] == pytest.approx(expected[:4])
    table = table_of(tmp_path / "a")
    assert table["max_kl"] == pytest.approx(expected)
    for kl, bound in zip(table["kl_max"], expected, strict=True):
        assert kl == 0 or 0.1 * bound < kl <= bound * (1 + 1e-6)  # a full step, or one that was cut some times
    with pytest.raises(trpo.UserError, match="--kl-schedule linear goes with"):
        trpo.train(trpo.Args(form="penalized", kl_schedule="linear"))


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_adaptive_beta_follows_the_rule_and_survives_a_resume(tmp_path, schedule):
    flags = ["--form", "penalized", "--beta-schedule", "adaptive", "--beta", 50, "--kl-schedule", schedule]
    table = run(tmp_path, "whole", *flags)
    beta, kl = table["beta"], table["kl"]
    assert beta[0] == 50 and len(set(beta)) > 2
    for i, (before, after, d) in enumerate(zip(beta, beta[1:], kl, strict=False)):
        target = trpo.Args().max_kl * (1 - i / 16 if schedule == "linear" else 1)
        assert after == trpo.adapted_beta(before, d or math.inf, target)
    run(tmp_path, "a", *flags, "--stop-at-step", 512)
    resume = ["--resume", str(tmp_path / "a"), "--run-dir"]
    assert trpo.main([*resume, str(tmp_path / "b")]) == 0
    assert table_of(tmp_path / "b")["beta"] == beta[4:]
    assert trpo.main([*resume, str(tmp_path / "c"), "--beta", "7"]) == 0
    assert table_of(tmp_path / "c")["beta"][0] == 7


def test_without_a_discount_a_run_goes_on(tmp_path):
    assert len(run(tmp_path, "a", "--gamma", 1)["kl"]) == 16


def test_the_penalty_of_the_bound_is_far_from_what_a_step_costs(tmp_path):
    """What the docstring says: 4 max|A| gamma / (1-gamma) is about 800 max|A|; `beta_star` is some units."""
    gamma = trpo.Args().gamma
    assert round(4 * gamma / (1 - gamma), -2) == 800
    assert "about 800 max|A|" in " ".join(trpo.__doc__.split())
    beta_star = run(tmp_path, "a")["beta_star"]
    assert min(beta_star) > 0 and max(beta_star) < 80


def test_every_metric_has_its_column_and_its_tag(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    columns = ["policy_loss", "value_loss", "vf_grad_norm", "entropy", "explained_variance", "learning_rate", "kl"]
    trpo_columns = ["kl_max", "improvement_ratio", "line_search_step", "gradient_norm", "cg_residual", "beta_star"]
    trpo_columns += ["beta"]
    assert set(columns + trpo_columns) <= run(tmp_path, "a").keys()
    board = EventAccumulator(str(tmp_path / "a")).Reload()
    tags = {f"losses/{key}" for key in columns if key != "learning_rate"} | {"charts/learning_rate", "charts/SPS"}
    assert tags | {f"trpo/{key}" for key in trpo_columns} <= set(board.Tags()["scalars"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_the_run(bad, tmp_path, monkeypatch, capsys):
    """Its step was refused, and the policy is as it was; but the next gradient would be no better."""
    policy_step = trpo.policy_step
    monkeypatch.setattr(trpo, "policy_step", lambda *args: policy_step(*args) | {"gradient_norm": bad})
    assert trpo.main([*SMALL, "--run-dir", str(tmp_path / "a")]) == 1
    assert f"gradient_norm is {bad} at step 128" in capsys.readouterr().err
    assert trpo.load_checkpoint(tmp_path / "a")["global_step"] == 0


def refused(capsys, tmp_path, *flags):
    """The one line with which main() refuses the flags, before anything is written."""
    assert trpo.main([*SMALL, "--run-dir", str(tmp_path / "refused"), *map(str, flags)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and not (tmp_path / "refused").exists()
    return err


def test_discrete_actions_are_refused(tmp_path, capsys):
    assert "action space" in refused(capsys, tmp_path, "--env-id", "CartPole-v1")


PENALIZED = ["--form", "penalized"]


@pytest.mark.parametrize(
    "flags,line",
    [
        (["--beta", 2], "--beta goes with --form penalized"),
        (["--beta-schedule", "adaptive"], "--beta-schedule goes with --form penalized"),
        (["--kl-constraint", "max", "--beta=2"], "--beta goes with --form penalized"),
        ([*PENALIZED, "--kl-constraint", "max"], "--kl-constraint goes with --form constrained"),
        ([*PENALIZED, *LINEAR], "--kl-schedule linear goes with --form constrained or --beta-schedule adaptive"),
        ([*PENALIZED, "--max-kl", 0.1], "--max-kl goes with --form constrained or --beta-schedule adaptive"),
        (["--eval-episodes", 3], "--eval-episodes goes with --evaluate"),
        (["--capture-video"], "--capture-video goes with --evaluate"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(flags, line, tmp_path, capsys):
    assert line in refused(capsys, tmp_path, *flags)


def test_flags_of_the_form_that_a_checkpoint_has_are_taken(tmp_path, capsys):
    run(tmp_path, "a", *PENALIZED, "--beta-schedule", "adaptive", "--max-kl", 0.03, "--stop-at-step", 512)
    resume = ["--resume", str(tmp_path / "a")]
    args = trpo.parse_args([*resume, "--beta", "3", "--max-kl", "0.05"])
    assert (args.form, args.beta, args.max_kl, args.beta_schedule) == ("penalized", 3.0, 0.05, "adaptive")
    with pytest.raises(trpo.UserError, match="--kl-constraint goes with --form constrained"):
        trpo.parse_args([*resume, "--kl-constraint", "max"])
    with pytest.raises(trpo.UserError, match="--max-kl does nothing with --evaluate"):
        trpo.parse_args(["--evaluate", str(tmp_path / "a"), "--max-kl", "0.05"])


BAD = ["--max-kl 0", "--backtrack-coeff 1", "--fvp-subsample 65", "--cg-damping -1", "--cg-iters 0"]


@pytest.mark.parametrize("flags", [*BAD, "--beta 100000.0 --form penalized"])
def test_values_that_cannot_work_are_refused(flags, tmp_path, capsys):
    assert flags.split()[0] in refused(capsys, tmp_path, *flags.split())
