"""Toy environments with known episodes, registered as `toys:Toy-v0`, and small helpers of the tests."""

import os
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ACTION_SPACES = {
    "discrete": Discrete(3, start=2),
    "multidiscrete": MultiDiscrete([2, 4]),
    "box": Box(np.array([-2, 0, -np.inf], np.float32), np.array([2, 10, np.inf], np.float32)),
}


class Toy(gym.Env):
    """Observation: step in the episode, the previous observation's noise plus the last action, new noise, 1. Episodes
    last `lengths` steps in turn and end as `ends` says in turn: terminated, truncated or both. `fault` strikes at step
    `fault_step` of the environment's life: raise, die, nan, nan_reward."""

    def __init__(self, lengths=(5,), ends=("terminated",), action="discrete", masked=False, fault="", fault_step=0):
        self.observation_space = Box(-np.inf, np.inf, (4,))
        self.action_space = ACTION_SPACES[action]
        self.lengths, self.ends, self.masked, self.fault, self.fault_step = lengths, ends, masked, fault, fault_step
        self.episode, self.life = -1, 0

    def info(self):
        if not self.masked:
            return {}
        mask = self.np_random.random(6 if isinstance(self.action_space, MultiDiscrete) else 3) < 0.5
        mask[[0, 2]] = True
        if self.masked == "nothing":
            mask[:] = False
        self.allowed = mask
        return {"action_mask": mask.astype(np.int8)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1 + (seed or 0), 0  # so that environments are not in step
        self.obs = np.array([0, 0, self.np_random.normal(), 1], np.float32)
        return self.obs, self.info()

    def step(self, action):
        chosen = action + np.array([0, 2]) if isinstance(self.action_space, MultiDiscrete) else action - 2
        if self.masked and not self.allowed[chosen].all():
            raise ValueError(f"action {action} is forbidden")
        self.t, self.life = self.t + 1, self.life + 1
        struck = self.life == self.fault_step
        if struck and self.fault == "raise":
            raise RuntimeError("the rotor fell off")
        if struck and self.fault == "die":
            os._exit(1)
        noise = np.nan if struck and self.fault == "nan" else self.np_random.normal()
        self.obs = np.array([self.t, self.obs[2] + np.sum(action), noise, 1], np.float32)
        done = self.t >= self.lengths[self.episode % len(self.lengths)]
        end = self.ends[self.episode % len(self.ends)]
        reward = np.nan if struck and self.fault == "nan_reward" else float(self.obs[1])
        return self.obs, reward, done and end != "truncated", done and end != "terminated", self.info()


class Recall(gym.Env):
    """A cue, 0 or 1, is seen at the first of four steps only; the reward is 1 for answering with it at the last."""

    observation_space, action_space = Box(-1, 1, (3,)), Discrete(2)

    def observe(self):
        return np.array([self.t == 0, (2 * self.cue - 1) * (self.t == 0), self.t / 4], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cue, self.t = int(self.np_random.integers(2)), 0
        return self.observe(), {}

    def step(self, action):
        self.t += 1
        return self.observe(), float(self.t == 4 and action == self.cue), self.t == 4, False, {}


class Pendulum(gym.Env):
    """A pendulum (angle, velocity) that ignores the policy; `gravity` changes its dynamics."""

    gravity = 1.0

    def __init__(self):
        self.observation_space, self.action_space = Box(-np.inf, np.inf, (2,)), Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = 0.5 * self.np_random.normal(size=2), 0
        return self.x.astype(np.float32), {}

    def step(self, action):
        self.x[1] -= 0.2 * Pendulum.gravity * np.sin(self.x[0])
        self.x[0] += 0.2 * self.x[1]
        self.t += 1
        return self.x.astype(np.float32), 0.0, False, self.t >= 50, {}


gym.register("Toy-v0", entry_point=Toy)
gym.register("Recall-v0", entry_point=Recall)
gym.register("ToyPendulum-v0", entry_point=Pendulum)


def scalars(run_dir: str | Path) -> dict[str, list[tuple[int, float]]]:
    """All TensorBoard scalars of a run: tag -> [(step, value), …], by step: the files of
    two runs within a second may be read in either order."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {tag: sorted((e.step, e.value) for e in events.Scalars(tag)) for tag in events.Tags()["scalars"]}


def same_but_for_time(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for tag in a.keys() - {"charts/SPS"}:
        np.testing.assert_array_equal(a[tag], b[tag], err_msg=tag)


def tiny_hosts(monkeypatch, minibatches: int) -> None:
    """Epochs of a few small minibatches, and 60 images for validation and test."""
    from environments import hosts

    real = hosts.load_images

    def load_images(*args):
        train, *others = real(*args)
        return [train, *(tuple(x[:60] for x in part) for part in others)]

    monkeypatch.setattr(hosts, "load_images", load_images)
    monkeypatch.setattr(hosts, "BATCH_SIZE", 8)
    monkeypatch.setattr(hosts, "MINIBATCHES", minibatches)


def gradients(loss: torch.Tensor, agent: torch.nn.Module) -> torch.Tensor:
    agent.zero_grad()
    loss.backward()
    weights = list(agent.parameters())  # a loss that does not depend on one leaves it without a gradient
    return torch.cat([torch.zeros_like(w).flatten() if w.grad is None else w.grad.flatten() for w in weights])
