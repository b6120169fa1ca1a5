"""The mathematics of ppo_clip.py against brute force, hand-computed numbers and trusted implementations."""

import functools
import math

import batches
import gymnasium as gym
import numpy as np
import pytest
import torch
from batches import BOX, DISCRETE, make_coef, move
from conftest import needs_compiler
from torch import nn

import ppo_clip

make_agent = functools.partial(batches.make_agent, ppo_clip)
make_batch = functools.partial(batches.make_batch, ppo_clip)

# ---- generalised advantage estimation --------------------------------------------------------------------------------


def test_gae_of_the_fixed_case():
    r, v = torch.tensor([[1.0], [2.0], [3.0]]).double(), torch.tensor([[0.5], [1.0], [1.5]]).double()
    zero, v_next = torch.zeros(3, 1).double(), torch.tensor([[1.0], [1.5], [2.0]]).double()
    advantage = ppo_clip.gae(r, v, v_next, zero, zero, 0.99, 0.95)
    assert advantage[:, 0].tolist() == pytest.approx([6.90534, 5.75794, 3.48], abs=5e-6)


@pytest.mark.parametrize("T", [1, 2, 37, 64])
@pytest.mark.parametrize("gamma,lam", [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0)])
def test_gae_against_the_double_sum(T, gamma, lam):
    """A_t = sum_k (gamma lambda)^k delta_{t+k} up to the episode's end, added up term by term."""
    rng, N = np.random.default_rng(T), 5
    r, v, v_next = rng.normal(size=(3, T, N))
    terminated, truncated = rng.random((2, T, N)) < 0.2
    terminated[0], truncated[-1] = True, True  # first and last step; both flags at once occur at random and here:
    terminated[-1, 0] = truncated[0, 0] = True
    done = terminated | truncated
    expected = np.zeros((T, N))
    for n in range(N):
        for t in range(T):
            for k in range(T - t):
                i = t + k
                delta = r[i, n] + (0 if terminated[i, n] else gamma * v_next[i, n]) - v[i, n]
                expected[t, n] += (gamma * lam) ** k * delta
                if done[i, n]:
                    break
    tensors = [torch.tensor(x, dtype=torch.float64) for x in (r, v, v_next, terminated, done)]
    torch.testing.assert_close(ppo_clip.gae(*tensors, gamma, lam), torch.tensor(expected))


# ---- the clipped surrogate -------------------------------------------------------------------------------------------


def test_the_numbers_of_the_notes():
    """A = 2, r = 1.3 gives 2.4; A = -2, r = 0.6 gives -1.6."""
    surrogate = ppo_clip.clipped_surrogate(torch.tensor([1.3, 0.6]), torch.tensor([2.0, -2.0]), 0.2)
    assert surrogate.tolist() == pytest.approx([2.4, -1.6])


@pytest.mark.parametrize(
    "advantage,ratio,value,slope",
    [(1, 0.5, 0.5, 1), (1, 1.0, 1, 1), (1, 1.5, 1.2, 0), (-1, 0.5, -0.8, 0), (-1, 1.0, -1, -1), (-1, 1.5, -1.5, -1)],
)
@pytest.mark.parametrize("eps", [0.2, torch.tensor(0.2)])
def test_value_and_gradient_in_all_quadrants(advantage, ratio, value, slope, eps):
    ratio = torch.tensor(float(ratio), requires_grad=True)
    surrogate = ppo_clip.clipped_surrogate(ratio, torch.tensor(float(advantage)), eps)
    assert surrogate.item() == pytest.approx(value)
    assert torch.autograd.grad(surrogate, ratio)[0].item() == slope


def test_an_infinite_clip_coef_is_the_plain_surrogate():
    ratio, advantage = torch.rand(100) * 3, torch.randn(100)
    assert torch.equal(ppo_clip.clipped_surrogate(ratio, advantage, torch.tensor(math.inf)), ratio * advantage)


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1.0, 1e-8])
@pytest.mark.parametrize("space", [BOX, DISCRETE])
def test_loss_against_torch_distributions(space, size):
    """The whole loss, written a second time, at parameters that have moved. Advantages as small as rounding errors are
    not blown up to the size of a signal: the 1e-8 halves those of size 1e-8."""
    agent, coef = make_agent(space), make_coef()
    batch = make_batch(agent)
    batch["advantage"] *= size
    move(agent)
    loss, logged = ppo_clip.ppo_loss(agent, batch, coef, True)

    if agent.discrete:
        pi = torch.distributions.Categorical(logits=agent.actor(batch["obs"]))
        logprob, entropy = pi.log_prob(batch["action"]), pi.entropy()
    else:
        pi = torch.distributions.Normal(agent.actor(batch["obs"]), agent.log_std.exp())
        logprob, entropy = pi.log_prob(batch["action"]).sum(-1), pi.entropy().sum(-1)
    A = (batch["advantage"] - batch["advantage"].mean()) / (batch["advantage"].std(correction=0) + 1e-8)
    ratio = (logprob - batch["logprob"]).exp()
    policy_loss = -torch.min(ratio * A, ratio.clip(0.8, 1.2) * A).mean()
    value_loss = ((agent.critic(batch["obs"])[:, 0] - batch["return"]) ** 2).mean()
    torch.testing.assert_close(loss, policy_loss + 0.5 * value_loss - 0.01 * entropy.mean())
    clipfrac, approx_kl = ((ratio - 1).abs() > 0.2).float().mean(), (ratio - 1 - ratio.log()).mean()
    expected = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy.mean()}
    torch.testing.assert_close(logged, expected | {"approx_kl": approx_kl, "clipfrac": clipfrac})
    assert clipfrac > 0


def test_advantages_are_normalised_only_if_asked():
    agent, coef = make_agent(), make_coef()
    batch = make_batch(agent)
    batch["advantage"].mul_(10).add_(3)
    policy_loss = [ppo_clip.ppo_loss(agent, batch, coef, asked)[1]["policy_loss"].item() for asked in (True, False)]
    assert policy_loss == [pytest.approx(0, abs=1e-5), pytest.approx(-batch["advantage"].mean().item(), rel=1e-4)]


def test_constant_advantages_give_a_finite_loss():
    agent = make_agent()
    batch = make_batch(agent)
    batch["advantage"].fill_(3.0)
    assert ppo_clip.ppo_loss(agent, batch, make_coef(), True)[0].isfinite()


# ---- distributions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [BOX, DISCRETE])
def test_kl_entropy_and_actions_against_monte_carlo(space):
    """Actions as act() draws them give the closed forms back as averages."""
    agent, other, n = make_agent(space), make_agent(space, seed=1), 200_000
    if not agent.discrete:
        agent.log_std.data = torch.tensor([0.3, -0.5, 0.0])
        other.log_std.data = torch.tensor([0.0, 0.2, -0.3])
    for a in (agent, other):
        a.actor[-1].weight.data *= 100  # far from uniform
    obs = torch.randn(5)
    with torch.no_grad():
        old, new = (a.policy(obs) for a in (agent, other))
        action = agent.act(obs.expand(n, 5), agent.noise(n, 1)[:, 0])
        log_ratio = old.log_prob(action) - new.log_prob(action)
        kl, entropy = torch.distributions.kl_divergence(old, new), old.entropy()
    error = 4 * log_ratio.std() / math.sqrt(n)
    assert kl.item() == pytest.approx(log_ratio.mean().item(), abs=error.item()) and kl > 0.02
    surprise = -old.log_prob(action)
    assert entropy.item() == pytest.approx(surprise.mean().item(), abs=4 * surprise.std().item() / math.sqrt(n))
    data = {"obs": obs.expand(3, 5), "old_policy": agent.policy_parameters(obs).expand(3, -1)}
    assert ppo_clip.mean_kl(other, data).item() == pytest.approx(kl.item(), rel=1e-5)
    assert ppo_clip.mean_kl(agent, data).abs() < 1e-6


def test_acting_scales_observations_and_without_noise_takes_the_mode():
    agent, raw, noise = make_agent(), torch.randn(8, 5) * 20, torch.randn(8, 3)
    agent.obs_rms.update(torch.randn(100, 5) * 7 + 3)
    agent.log_std.data = torch.tensor([0.3, -0.5, 0.0])
    pi = agent.policy(agent.obs_rms(raw))
    torch.testing.assert_close(agent.act(raw, 0.0), pi.mode)
    torch.testing.assert_close(agent.act(raw, noise), pi.mean + pi.stddev * noise)
    agent = make_agent(DISCRETE)
    agent.actor[-1].weight.data *= 100
    assert torch.equal(agent.act(raw, 0.0), agent.policy(agent.obs_rms(raw)).mode)


# ---- the update: Adam, epochs, compilation ---------------------------------------------------------------------------


def epochs(script, agent, data, coefs, norm_adv=True, compiled=False, minibatch=64):
    """Epochs of minibatches as train() runs them, one for each dict of coefficients. Returns the final state."""
    names = script.ppo_loss(agent, data, coefs[0], norm_adv)[1]
    state, coef = script.initial_state(agent, len(names) + 1), {key: x.clone() for key, x in coefs[0].items()}
    order = torch.zeros(len(data["obs"]) // minibatch, minibatch, dtype=torch.long)
    args, rng = script.Args(compile=compiled), torch.Generator().manual_seed(0)
    run = script.accelerated(args, script.update, agent, state, data, order, coef, norm_adv)
    for values in coefs:
        for key, x in values.items():
            coef[key].copy_(x)
        order.copy_(torch.randperm(len(data["obs"]), generator=rng).view_as(order))
        run()
    return state


def test_minibatch_means_average_to_the_full_batch():
    agent = make_agent()
    data, coef = make_batch(agent), make_coef(learning_rate=0.0)
    expected = ppo_clip.ppo_loss(agent, data, coef, False)[1]
    sums = epochs(ppo_clip, agent, data, [coef], norm_adv=False)["sums"]
    torch.testing.assert_close(sums[:-1] / 4, torch.stack([*expected.values()]).detach())


@pytest.mark.parametrize("max_norm", [0.1, 100.0])  # every gradient is clipped, or none
@pytest.mark.parametrize("space", [BOX, DISCRETE])
def test_adam_and_gradient_clipping_equal_torch(space, max_norm):
    agent, twin = make_agent(space), make_agent(space)
    data, coef = make_batch(agent), make_coef(learning_rate=1e-3, max_grad_norm=max_norm)
    optimizer, rng, norms = torch.optim.Adam(twin.parameters(), lr=1e-3, eps=1e-5), torch.Generator().manual_seed(0), []
    state = epochs(ppo_clip, agent, data, [coef] * 12)
    for _ in range(12):
        for index in torch.randperm(256, generator=rng).view(-1, 64):
            optimizer.zero_grad()
            ppo_clip.ppo_loss(twin, {k: x[index] for k, x in data.items()}, coef, True)[0].backward()
            norms.append(nn.utils.clip_grad_norm_(twin.parameters(), max_norm))
            optimizer.step()
    expected = nn.utils.parameters_to_vector(twin.parameters()).detach()
    torch.testing.assert_close(state["parameters"], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(nn.utils.parameters_to_vector(agent.parameters()).detach(), state["parameters"])
    torch.testing.assert_close(state["sums"][-1], torch.stack(norms).sum())
    assert state["t"] == 48 and 0.1 < min(norms) <= max(norms) < 100


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("space", [BOX, DISCRETE])
def test_compiled_equals_eager(space):
    """Thirty epochs of 32 minibatches from the same data, the learning rate changing: 1e-5 relative."""
    coefs = [make_coef(learning_rate=3e-4 * (1 - k / 30), clip_coef=0.2 - 0.005 * k) for k in range(30)]
    eager, compiled = (
        epochs(ppo_clip, agent, make_batch(agent, B=2048), coefs, compiled=compiled)["parameters"]
        for agent, compiled in ((make_agent(space), False), (make_agent(space), True))
    )
    assert ((eager - compiled).norm() / eager.norm()).item() < 1e-5


def test_adapted_learning_rate_at_every_border():
    def rate(kl, band=1.5, lr=1e-3):
        return ppo_clip.adapted_learning_rate(lr, kl, 0.01, band)

    up, same, down = 2e-3, 1e-3, 5e-4
    assert [rate(kl) for kl in (0.0, 0.01 / 1.5 - 1e-9, 0.01 / 1.5 + 1e-9, 0.01)] == [up, up, same, same]
    assert [rate(kl) for kl in (0.015 - 1e-9, 0.015 + 1e-9, 1.0)] == [same, down, down]
    assert [rate(kl, band=1) for kl in (0.01 - 1e-9, 0.01, 0.01 + 1e-9)] == [up, same, down]  # the rule without a band
    assert rate(1.0, lr=1.5e-5) == 1e-5 and rate(0.0, lr=9e-3) == 1e-2


# ---- networks and normaliser -----------------------------------------------------------------------------------------


def test_networks_start_orthogonal_with_the_gains_that_the_docstring_names():
    layers = [x for x in ppo_clip.mlp(30, 3, 0.01, hidden=(20, 10)) if isinstance(x, nn.Linear)]
    for layer, gain, shape in zip(layers, (2**0.5, 2**0.5, 0.01), ((20, 30), (10, 20), (3, 10))):
        assert layer.weight.shape == shape and not layer.bias.any()
        torch.testing.assert_close(layer.weight @ layer.weight.T, gain**2 * torch.eye(shape[0]), rtol=1e-4, atol=1e-5)
    assert isinstance(ppo_clip.mlp(3, 2, 1.0, activation=nn.ReLU)[1], nn.ReLU)
    agent = make_agent()
    assert [type(x).__name__ for x in agent.actor] == ["Linear", "Tanh"] * 2 + ["Linear"]
    for network, gain in ((agent.actor, 0.01), (agent.critic, 1.0)):
        lengths = network[-1].weight.norm(dim=1)
        torch.testing.assert_close(lengths, torch.full_like(lengths, gain))
    assert not hasattr(make_agent(DISCRETE), "log_std")


def test_running_statistics_against_numpy():
    rms, rows = ppo_clip.RunningMeanStd(3), np.random.default_rng(0).normal(5, 100, (1000, 3))
    x = torch.from_numpy(rows[:2]).float()
    torch.testing.assert_close(rms(x), x.clip(-10, 10))  # nothing seen: identity
    for part in np.split(rows, [1, 10, 500]):
        rms.update(torch.from_numpy(part))
    np.testing.assert_allclose(rms.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(rms.var, rows.var(0), rtol=1e-12)
    expected = ((rows - rows.mean(0)) / rows.std(0)).clip(-10, 10)
    np.testing.assert_allclose(rms(torch.from_numpy(rows).float()), expected, rtol=1e-4, atol=1e-5)
    assert rms(torch.full((3,), 1e9)).tolist() == [10, 10, 10] and rms(x).dtype == torch.float32


def test_running_statistics_against_gymnasium():
    """Theirs begins with a count of epsilon, ours with 0. Parts of one row, and of rows far away from each other."""
    ours, theirs = ppo_clip.RunningMeanStd(3), gym.wrappers.utils.RunningMeanStd(epsilon=0.0, shape=(3,))
    for n, center in ((1, 0.0), (7, 1e3), (256, -5.0), (1, 2.0)):
        rows = np.random.default_rng(n).normal(center, 3, (n, 3))
        ours.update(torch.from_numpy(rows))
        theirs.update(rows)
        np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-12)
        np.testing.assert_allclose(ours.var, theirs.var, rtol=1e-12)
        assert ours.count == theirs.count


def test_what_never_moved_is_not_scaled():
    rms = ppo_clip.RunningMeanStd(2)
    rms.update(torch.tensor([[3.0, 0.0], [3.0, 2.0]]))
    assert rms.inv_std.tolist() == [1, 1] and rms(torch.tensor([4.0, 1.0])).tolist() == [1, 0]
    just_more = [(1, 1.01e-6, 1 / 1.01e-6), (0, 1.01e-10, 1 / 1.01e-10)]
    for mean, deviation, expected in ((1, 0.99e-6, 1), (0, 0.99e-10, 1), *just_more):
        rms = ppo_clip.RunningMeanStd()
        rms.update(mean + torch.tensor([1.0, -1.0]).double() * deviation)
        assert rms.inv_std.item() == pytest.approx(expected)


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_units_do_not_matter(unit):
    """An environment that counts in metres or in micrometres is the same to the networks."""
    rms, x = ppo_clip.RunningMeanStd(3), torch.randn(100, 3, dtype=torch.double)
    rms.update(unit * x)
    torch.testing.assert_close(rms(unit * x), ((x - x.mean(0)) / x.std(0, correction=0)).float())


def test_statistics_travel_with_the_agent():
    agent, other = make_agent(), make_agent(seed=1)
    agent.obs_rms.update(torch.randn(50, 5) * 3 + 1)
    agent.return_rms.update(torch.randn(50) * 9)
    other.load_state_dict(agent.state_dict())
    raw = torch.randn(4, 5)
    assert torch.equal(other.obs_rms(raw), agent.obs_rms(raw))
    assert torch.equal(other.return_rms.inv_std, agent.return_rms.inv_std)
