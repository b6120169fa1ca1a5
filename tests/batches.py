"""Agents and batches for the tests of the mathematics; `script` is one of the training scripts."""

import gymnasium as gym
import torch

BOX, DISCRETE = gym.spaces.Box(-1, 1, (3,)), gym.spaces.Discrete(4)


def make_agent(script, space=BOX, obs_dim=5, seed=0):
    return script.Agent(obs_dim, space, torch.Generator().manual_seed(seed))


def make_batch(script, agent, B=256, seed=0):
    """A batch with everything that an update reads, from the agent's present policy, with random actions."""
    rng = torch.Generator().manual_seed(seed)
    data = script.empty_batch(agent, 5, B)
    data["obs"].normal_(generator=rng)
    with torch.no_grad():
        data["policy"].copy_(agent.policy(data["obs"]))
        if agent.discrete:
            data["action"].copy_(torch.randint(4, (B,), generator=rng))
        else:
            data["action"].normal_(generator=rng)
        data["logprob"].copy_(agent.dist.log_prob(data["policy"], data["action"]))
        data["value"].copy_(agent.value(data["obs"]))
    data["advantage"].normal_(generator=rng)
    data["return"].copy_(data["value"] + data["advantage"])
    data["weight"].fill_(1)
    return data


def make_adam(script, module):
    flat = script.flatten_parameters(module.parameters())
    return {"params": flat, "m": torch.zeros_like(flat), "v": torch.zeros_like(flat), "step": torch.zeros(())}
