"""Agents, batches and coefficients for the tests of the mathematics; `script` is one of the training scripts."""

import gymnasium as gym
import torch

BOX, DISCRETE = gym.spaces.Box(-1, 1, (3,)), gym.spaces.Discrete(4)


def make_agent(script, space=BOX, obs_dim=5, seed=0):
    torch.manual_seed(seed)
    return script.Agent(obs_dim, space)


def move(agent, scale=0.05, seed=1):
    """Move all parameters a little, so that the policy is no longer the one that made the batch."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in agent.parameters():
            p += scale * torch.randn(p.shape, generator=rng)


def make_batch(script, agent, B=256, seed=0):
    """A batch with everything that an update reads, from the agent's present policy, with random actions."""
    rng = torch.Generator().manual_seed(seed)
    obs, advantage = torch.randn(B, 5, generator=rng), torch.randn(B, generator=rng)
    if agent.discrete:
        action = torch.randint(4, (B,), generator=rng)
    else:
        action = torch.randn(B, agent.action_dim, generator=rng)
    with torch.no_grad():
        parameters, value = agent.policy_parameters(obs), agent.value(obs)
        logprob = agent.distribution(parameters).log_prob(action)
    batch = {"obs": obs, "action": action, "old_policy": parameters, "logprob": logprob, "value": value}
    return batch | {"advantage": advantage, "return": value + advantage}


def make_coef(**values):
    """Coefficients as update() takes them; those of the scripts where nothing else is said."""
    defaults = {"learning_rate": 3e-4, "clip_coef": 0.2, "beta": 1.0, "ent_coef": 0.01, "vf_coef": 0.5}
    return {key: torch.tensor(x) for key, x in (defaults | {"max_grad_norm": 0.5} | values).items()}
