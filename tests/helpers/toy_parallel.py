"""Small worlds with PettingZoo's parallel interface and known answers: --env-id toy_parallel.NAME."""

import numpy as np
from gymnasium.spaces import Box, Dict, Discrete


class Parallel:
    """What a PettingZoo ParallelEnv has, without the package."""

    render_mode = None

    def __init__(self, render_mode=None):
        self.agents = []

    def observation_space(self, agent):
        return self.observation_spaces[agent]

    def action_space(self, agent):
        return self.action_spaces[agent]

    def close(self):
        pass


class MatrixGame(Parallel):
    """One joint action, then the end. Both agents get the payoff; the best joint action is (1, 1)."""

    PAYOFF = np.array([[2.0, 0.0, 0.0], [0.0, 5.0, 1.0], [0.0, 0.0, 3.0]])
    possible_agents = ["row", "column"]
    observation_spaces = dict.fromkeys(possible_agents, Box(0, 1, (1,)))
    action_spaces = dict.fromkeys(possible_agents, Discrete(3))

    def reset(self, seed=None, options=None):
        self.agents = self.possible_agents[:]
        return {name: np.ones(1, np.float32) for name in self.agents}, {name: {} for name in self.agents}

    def step(self, actions):
        payoff = self.PAYOFF[actions["row"], actions["column"]]
        names, self.agents = self.agents, []
        same = lambda x: dict.fromkeys(names, x)  # noqa: E731
        return same(np.ones(1, np.float32)), same(payoff), same(True), same(False), same({})


class Mortals(Parallel):
    """Three agents of different width. Agent g sees (episode, step, ...) / 100; "short" dies after 3 of 5 steps, which
    are then truncated, or in every other episode terminated for all. Rewards: 1, 10, 100 a step. "short" may not take
    action 0 in its first step. The state is not the observations: it is (7, episode, step)."""

    possible_agents = ["long", "short", "wide"]
    widths = {"long": 2, "short": 2, "wide": 4}
    observation_spaces = {name: Box(-1, 1, (n,)) for name, n in widths.items()}
    observation_spaces["short"] = Dict({"observation": observation_spaces["short"], "action_mask": Box(0, 1, (2,))})
    action_spaces = {"long": Discrete(3), "short": Discrete(2, start=5), "wide": Discrete(4)}
    rewards = {"long": 1.0, "short": 10.0, "wide": 100.0}
    episode = -1

    def observe(self, names):
        obs = {name: np.zeros(self.widths[name], np.float32) for name in names}
        for x in obs.values():
            x[:2] = self.episode / 100, self.clock / 100
        if "short" in obs:
            obs["short"] = {"observation": obs["short"], "action_mask": np.array([self.clock > 0, 1], np.int8)}
        return obs

    def state(self):
        return np.array([7, self.episode, self.clock])

    def reset(self, seed=None, options=None):
        self.agents = self.possible_agents[:]
        self.episode, self.clock = 0 if seed is not None else self.episode + 1, 0
        return self.observe(self.agents), {name: {} for name in self.agents}

    def step(self, actions):
        assert set(actions) == set(self.agents)
        assert "short" not in actions or actions["short"] in ((6,) if self.clock == 0 else (5, 6))
        names, self.clock = self.agents, self.clock + 1
        over, dies = self.clock == 5, {name: name == "short" and self.clock == 3 for name in names}
        terminated = {name: dies[name] or over and self.episode % 2 == 1 for name in names}
        truncated = {name: over and self.episode % 2 == 0 for name in names}
        self.agents = [] if over else [name for name in names if not dies[name]]
        rewards = {name: self.rewards[name] for name in names}
        return self.observe(names), rewards, terminated, truncated, {name: {} for name in names}


class Alone(Parallel):
    """One agent that sees the whole state: the sign of a number, to be answered with the action of the same sign."""

    possible_agents = ["only"]
    observation_spaces = {"only": Box(-1, 1, (1,))}
    action_spaces = {"only": Discrete(2)}

    def reset(self, seed=None, options=None):
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self.agents, self.clock = self.possible_agents[:], 0
        return self.observe(), {"only": {}}

    def observe(self):
        self.seen = self.rng.uniform(-1, 1, 1).astype(np.float32)
        return {"only": self.seen}

    def step(self, actions):
        reward = float((self.seen[0] > 0) == actions["only"])
        self.clock += 1
        self.agents = [] if self.clock == 10 else self.agents
        return self.observe(), {"only": reward}, {"only": False}, {"only": self.clock == 10}, {"only": {}}


class Thrusters(Alone):
    """The same with a Box of (0, 4): its centre is the answer to everything, and what an action of 0 stands for."""

    action_spaces = {"only": Box(0, 4, (1,))}

    def step(self, actions):
        assert actions["only"].dtype == np.float32 and 0 <= actions["only"] <= 4
        _, _, *rest = super().step({"only": 0})
        return self.observe(), {"only": -float(abs(actions["only"][0] - 2))}, *rest


class Leavers(Mortals):
    """Nobody ever terminates. "short" is truncated after 3 of 5 steps, all the others after 5."""

    def step(self, actions):
        observations, rewards, terminated, truncated, infos = super().step(actions)
        leaving = {name: x or truncated[name] for name, x in terminated.items()}
        return observations, rewards, dict.fromkeys(terminated, False), leaving, infos


class Broken(Alone):
    """Fails in the way that its name says: toy_parallel.broken_raise, _nan, _reward, _shape, _state."""

    def state(self):
        if self.trouble != "state":
            raise NotImplementedError
        return np.full(3, np.inf if self.clock == 4 else 1.0)

    def step(self, actions):
        if self.clock == 3 and self.trouble == "raise":
            raise ZeroDivisionError("a bug")
        seen, reward, *rest = super().step(actions)
        if self.clock == 4 and self.trouble == "reward":
            reward = {"only": float("nan")}
        if self.clock == 4 and self.trouble in ("nan", "shape"):
            seen = {"only": np.full(1 if self.trouble == "nan" else 3, np.nan if self.trouble == "nan" else 0.0)}
        return seen, reward, *rest


class Mixed(Mortals):
    """One agent's actions are numbers, another's are choices: refused."""

    action_spaces = Mortals.action_spaces | {"wide": Box(-1, 1, (2,))}


class Waiting(Mortals):
    """Agent "short" may do nothing at all in its first step, and its mask says so."""

    def observe(self, names):
        obs = super().observe(names)
        if "short" in obs and self.clock == 0:
            obs["short"]["action_mask"] = np.zeros(2, np.int8)
        return obs

    def step(self, actions):
        assert "short" not in actions or actions["short"] in (5, 6)
        return super().step(actions | ({"short": 6} if self.clock == 0 else {}))


class Nested(Alone):
    """An agent that sees a Dict: refused."""

    observation_spaces = {"only": Dict({"left": Box(0, 1, (1,)), "right": Box(0, 1, (1,))})}


class Pictures(Alone):
    """An agent that sees an image: refused."""

    observation_spaces = {"only": Box(0, 255, (8, 8, 3), np.uint8)}


class WholeNumbers(Alone):
    """An agent whose Box is one of integers: refused."""

    action_spaces = {"only": Box(-100, 100, (1,), np.int8)}


class Filmed(Alone):
    """One that can be looked at."""

    metadata = {"render_fps": 10}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def render(self):
        return np.full((64, 64, 3), 20 * self.clock, np.uint8)


TROUBLES = "raise", "nan", "reward", "shape", "state"
TROUBLE = {f"broken_{x}": type("Broken", (Broken,), {"trouble": x}) for x in TROUBLES}
NAMED = {"mixed": Mixed, "matrix": MatrixGame, "mortals": Mortals, "alone": Alone, "thrusters": Thrusters}
NAMED |= {"leavers": Leavers, "pictures": Pictures, "waiting": Waiting, "nested": Nested, "filmed": Filmed}
NAMED |= {"whole_numbers": WholeNumbers}
for name, env in (NAMED | TROUBLE).items():
    globals()[name] = type(name, (), {"parallel_env": env})
