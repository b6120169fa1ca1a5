"""The mathematics of the PPO scripts against brute force, hand-computed numbers and trusted implementations."""

import functools
import math

import batches
import numpy as np
import pytest
import torch
from batches import BOX, DISCRETE
from torch import nn

import ppo_clip

make_agent = functools.partial(batches.make_agent, ppo_clip)
make_batch = functools.partial(batches.make_batch, ppo_clip)
make_adam = functools.partial(batches.make_adam, ppo_clip)


def make_coef(learning_rate=3e-4, clip_coef=0.2, ent_coef=0.01, vf_coef=0.5, max_grad_norm=0.5):
    values = (learning_rate, clip_coef, ent_coef, vf_coef, max_grad_norm)
    return {key: torch.tensor(x) for key, x in zip(ppo_clip.COEFFICIENTS, values, strict=True)}


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
    """Notes §2.1: A = 2, r = 1.3 gives 2.4; A = -2, r = 0.6 gives -1.6."""
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


def test_no_clip_is_the_plain_surrogate():
    ratio, advantage = torch.rand(100) * 3, torch.randn(100)
    assert torch.equal(ppo_clip.clipped_surrogate(ratio, advantage, torch.tensor(math.inf)), ratio * advantage)


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [BOX, DISCRETE])
def test_loss_against_torch_distributions(space):
    """The whole loss, written a second time with torch.distributions, at parameters that have moved."""
    agent, coef = make_agent(space), make_coef()
    data = make_batch(agent)
    data["weight"][::7] = 0  # rows that are no transitions must not be seen at all
    with torch.no_grad():
        for p in agent.parameters():
            p += 0.05 * torch.randn_like(p)
    loss, metrics = ppo_clip.ppo_loss(agent, data, coef, True, False)

    rows = {key: x[data["weight"] > 0] for key, x in data.items()}
    if agent.discrete:
        pi = torch.distributions.Categorical(logits=agent.actor(rows["obs"]))
        logprob, entropy = pi.log_prob(rows["action"]), pi.entropy()
    else:
        pi = torch.distributions.Normal(agent.actor(rows["obs"]), agent.log_std.exp())
        logprob, entropy = pi.log_prob(rows["action"]).sum(-1), pi.entropy().sum(-1)
    A = (rows["advantage"] - rows["advantage"].mean()) / (rows["advantage"].std(correction=0) + 1e-8)
    ratio = (logprob - rows["logprob"]).exp()
    policy_loss = -torch.min(ratio * A, ratio.clip(0.8, 1.2) * A).mean()
    value_loss = ((agent.critic(rows["obs"])[:, 0] - rows["return"]) ** 2).mean()
    expected = policy_loss + 0.5 * value_loss - 0.01 * entropy.mean()
    torch.testing.assert_close(loss, expected)
    clipfrac, approx_kl = ((ratio - 1).abs() > 0.2).float().mean(), (ratio - 1 - ratio.log()).mean()
    torch.testing.assert_close(
        metrics, torch.stack([policy_loss, value_loss, entropy.mean(), approx_kl, clipfrac]).detach()
    )


def test_value_clipping_takes_the_worse_of_the_two_errors():
    agent, coef = make_agent(), make_coef()
    data = make_batch(agent)
    data["value"] += torch.linspace(-1, 1, 256)  # the critic's output is up to 1 away from the old value
    v, old, target = agent.value(data["obs"]).detach(), data["value"], data["return"]
    worse = torch.max((v - target) ** 2, (old + (v - old).clip(-0.2, 0.2) - target) ** 2)
    metrics = ppo_clip.ppo_loss(agent, data, coef, True, True)[1]
    torch.testing.assert_close(metrics[1], worse.mean())


def test_advantages_are_normalised_only_if_asked():
    agent, coef = make_agent(), make_coef()
    data = make_batch(agent)
    data["advantage"].mul_(10).add_(3)
    assert ppo_clip.ppo_loss(agent, data, coef, True, False)[1][0].item() == pytest.approx(0, abs=1e-5)
    assert ppo_clip.ppo_loss(agent, data, coef, False, False)[1][0].item() == pytest.approx(
        -data["advantage"].mean().item(), rel=1e-4
    )


def test_constant_advantages_give_a_finite_loss():
    agent = make_agent()
    data = make_batch(agent)
    data["advantage"].fill_(3.0)
    assert ppo_clip.ppo_loss(agent, data, make_coef(), True, False)[0].isfinite()


def test_minibatch_means_average_to_the_full_batch():
    agent, coef, metrics = make_agent(), make_coef(learning_rate=0.0), torch.zeros(6)
    data, adam = make_batch(agent), make_adam(agent)
    for index in torch.randperm(256).view(-1, 64):
        ppo_clip.minibatch_update(ppo_clip.ppo_loss, agent, adam, data, index, coef, metrics, False, False)
    torch.testing.assert_close((metrics / 4)[:5], ppo_clip.ppo_loss(agent, data, coef, False, False)[1])


# ---- distributions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [BOX, DISCRETE])
def test_kl_entropy_and_noise_against_monte_carlo(space):
    """Actions drawn as in a rollout (actor's output plus noise) give the closed forms back as averages."""
    agent, other, n = make_agent(space), make_agent(space, seed=1), 200_000
    if not agent.discrete:
        agent.log_std.data = torch.tensor([0.3, -0.5, 0.0])
        other.log_std.data = torch.tensor([0.0, 0.2, -0.3])
    for a in (agent, other):
        a.actor[-1].weight.data *= 100  # far from uniform
    obs = torch.randn(5)
    with torch.no_grad():
        old, new = (a.policy(obs).expand(n, -1) for a in (agent, other))
        output = agent.actor(obs) + torch.from_numpy(agent.noise(n, 1, torch.Generator().manual_seed(0)))[:, 0]
        action = output.argmax(-1) if agent.discrete else output
        log_ratio = agent.dist.log_prob(old, action) - agent.dist.log_prob(new, action)
        kl, entropy = agent.dist.kl(old[0], new[0]), agent.dist.entropy(old[0])
    error = 4 * log_ratio.std() / math.sqrt(n)
    assert kl.item() == pytest.approx(log_ratio.mean().item(), abs=error.item())
    surprise = -agent.dist.log_prob(old, action)
    assert entropy.item() == pytest.approx(surprise.mean().item(), abs=4 * surprise.std().item() / math.sqrt(n))
    assert kl > 0.02 and agent.dist.kl(old[0], old[0]).abs() < 1e-6


def test_frozen_actor_is_the_actor():
    agent = make_agent()
    agent.obs_rms.update(torch.randn(100, 5) * 7 + 3)
    raw = torch.randn(8, 5) * 20
    expected = agent.actor(agent.obs_rms.normalizer()(raw)).detach().numpy()
    np.testing.assert_allclose(agent.frozen_actor()(raw.numpy()), expected, rtol=1e-5, atol=1e-6)


# ---- Adam, compilation, learning rate --------------------------------------------------------------------------------


def test_adam_and_gradient_clipping_equal_torch():
    agent, twin = make_agent(), make_agent()
    data, adam, coef = make_batch(agent), make_adam(agent), make_coef(learning_rate=1e-3, max_grad_norm=0.1)
    optimizer = torch.optim.Adam(twin.parameters(), lr=1e-3, eps=1e-5)
    metrics = torch.zeros(6)
    for i in range(50):
        index = torch.randperm(256, generator=torch.Generator().manual_seed(i))[:64]
        ppo_clip.minibatch_update(ppo_clip.ppo_loss, agent, adam, data, index, coef, metrics, True, False)
        optimizer.zero_grad()
        ppo_clip.ppo_loss(twin, {k: x[index] for k, x in data.items()}, coef, True, False)[0].backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        optimizer.step()
    torch.testing.assert_close(
        adam["params"], nn.utils.parameters_to_vector(twin.parameters()).detach(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("space", [BOX, DISCRETE])
def test_compiled_equals_eager(space):
    """Three iterations' updates (3 x 10 epochs x 32 minibatches) from the same data: 1e-5 relative."""
    results = []
    for compiled in (False, True):
        agent = make_agent(space)
        step = (
            ppo_clip.compiled(ppo_clip.minibatch_update, torch.device("cpu")) if compiled else ppo_clip.minibatch_update
        )
        data, adam, metrics = make_batch(agent, B=2048), make_adam(agent), torch.zeros(6)
        rng = torch.Generator().manual_seed(0)
        for iteration in range(3):
            coef = make_coef(learning_rate=3e-4 * (1 - iteration / 3), clip_coef=0.2 - 0.05 * iteration)
            for _ in range(10):
                for index in torch.randperm(2048, generator=rng).view(32, 64):
                    step(ppo_clip.ppo_loss, agent, adam, data, index, coef, metrics, True, False)
        results.append(adam["params"].clone())
    eager, compiled = results
    assert ((eager - compiled).norm() / eager.norm()).item() < 1e-5


def test_adapted_learning_rate_at_every_border():
    def rate(kl, band=1.5, lr=1e-3):
        return ppo_clip.adapted_learning_rate(lr, kl, 0.01, band, 2.0)

    up, same, down = 2e-3, 1e-3, 5e-4
    assert [rate(kl) for kl in (0.0, 0.01 / 1.5 - 1e-9, 0.01 / 1.5 + 1e-9, 0.01)] == [up, up, same, same]
    assert [rate(kl) for kl in (0.015 - 1e-9, 0.015 + 1e-9, 1.0)] == [same, down, down]
    assert [rate(kl, band=1) for kl in (0.01 - 1e-9, 0.01, 0.01 + 1e-9)] == [up, same, down]  # the notes to the letter
    assert rate(1.0, lr=1.5e-5) == 1e-5 and rate(0.0, lr=9e-3) == 1e-2


def test_explained_variance():
    y = torch.tensor([1.0, 2.0, 3.0])
    assert ppo_clip.explained_variance(y, y) == 1
    assert ppo_clip.explained_variance(torch.zeros(3), y) == pytest.approx(0)
    assert math.isnan(ppo_clip.explained_variance(y, torch.ones(3)))


# ---- normaliser ------------------------------------------------------------------------------------------------------


def test_running_statistics_against_numpy():
    rms, rows = ppo_clip.RunningMeanStd((3,)), np.random.default_rng(0).normal(5, 100, (1000, 3))
    x = rows[:2].astype(np.float32)
    np.testing.assert_allclose(rms.normalizer(numpy=True)(x), x.clip(-10, 10), rtol=1e-6)  # nothing seen: identity
    for part in np.split(rows, [1, 10, 500]):
        rms.update(torch.from_numpy(part))
    np.testing.assert_allclose(rms.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(rms.var, rows.var(0), rtol=1e-12)
    expected = ((rows - rows.mean(0)) / rows.std(0)).clip(-10, 10)
    np.testing.assert_allclose(rms.normalizer()(torch.from_numpy(rows).float()), expected, rtol=1e-4, atol=1e-5)
    assert rms.normalizer()(torch.full((3,), 1e9)).tolist() == [10, 10, 10]


def test_statistics_travel_with_the_agent():
    agent, other = make_agent(), make_agent(seed=1)
    agent.obs_rms.update(torch.randn(50, 5) * 3 + 1)
    agent.return_rms.update(torch.randn(50) * 9)
    other.load_state_dict(agent.state_dict())
    assert torch.equal(other.obs_rms.mean, agent.obs_rms.mean) and torch.equal(
        other.return_rms.inv_std(), agent.return_rms.inv_std()
    )
