"""Fixed-wing velocity-vector control: the F-16 of the package `flycraft` (x86-64 Linux and Windows).

The goal is a velocity vector: speed v, flight-path angle mu and heading chi. Two tasks:

    environments.flycraft:FlyCraftEasy-v0    v 150 to 250 m/s, mu within 10 degrees, chi within 30
    environments.flycraft:FlyCraft-v0        v 100 to 300 m/s, mu within 90 degrees, chi within 180

Actions are roll rate [-180, 180] degrees/s, load factor [-4, 9] and throttle [0, 1], at 10 Hz for at most 400 steps.
An episode's last info says `is_success`.
"""

import contextlib
import functools
import io

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict

try:
    from flycraft import env as package
    from flycraft.env import FlyCraftEnv, VelocityVectorControlTask
    from flycraft.planes import f16_plane
    from flycraft.rewards import dense_reward_based_on_angle_and_velocity as dense_reward
    from flycraft.utils_common import geometry_utils
except ImportError as error:
    raise ImportError("FlyCraft is not installed: pip install -r requirements-envs.txt") from error

GOALS = {
    "FlyCraftEasy-v0": {"v_min": 150, "v_max": 250, "mu_min": -10, "mu_max": 10, "chi_min": -30, "chi_max": 30},
    "FlyCraft-v0": {"v_min": 100, "v_max": 300, "mu_min": -90, "mu_max": 90, "chi_min": -180, "chi_max": 180},
}
ANGLES = {  # entries in degrees
    "aircraft": [0, 1, 2, 4, 5],  # of phi, theta, psi, v, mu, chi, p, h
    "error": [1, 2],  # goal minus what is achieved
    "goal": [1, 2],  # of v, mu, chi
}


def angle_between(v1: list[float], v2: list[float]) -> float:
    x, y = np.array(v1), np.array(v2)
    cosine = x.dot(y) / (np.sqrt(x.dot(x)) * np.sqrt(y.dot(y)))
    return np.rad2deg(np.arccos(np.clip(cosine, -1.0, 1.0)))


# Most of a step's time the package checks vectors for length 0, defines the same class anew, and copies numbers deeply.
# Without that its steps are the same to the last bit, and some five times as fast.
geometry_utils.angle_of_2_3d_vectors = dense_reward.angle_of_2_3d_vectors = angle_between
VelocityVectorControlTask.get_state_vars = staticmethod(functools.cache(VelocityVectorControlTask.get_state_vars))
package.deepcopy = f16_plane.deepcopy = dict


class FlyCraft(gym.Wrapper):
    """The package's environment without its printing and its bulky infos, with how far the goal is in place of what is
    achieved (which is also in `aircraft`), with angles as sine and cosine (no jump at 180 degrees), and with a
    timeout that only truncates (the package also calls it terminated)."""

    def __init__(self, goal: dict[str, float]):
        with contextlib.redirect_stdout(io.StringIO()):
            super().__init__(FlyCraftEnv(custom_config={"debug_mode": False, "goal": goal}))
        sizes = {"aircraft": 8, "error": 3, "goal": 3}
        spaces = {name: Box(-np.inf, np.inf, (size + len(ANGLES[name]),)) for name, size in sizes.items()}
        self.observation_space = Dict(spaces)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        obs, _ = self.env.reset(seed=seed, options=options)
        return self.encode(obs), {}

    def step(self, action: np.ndarray):
        obs, reward, terminated, truncated, info = self.env.step(action)
        if info.get("termination") == "timeout_termination":
            terminated, truncated = False, True
        return self.encode(obs), float(reward), terminated, truncated, {"is_success": info["is_success"]}

    def encode(self, obs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Each part: what is no angle, then the sines, then the cosines."""
        state, goal = obs["observation"].astype(float), obs["desired_goal"].astype(float)
        parts = {}
        for name, values in {"aircraft": state, "error": goal - state[3:6], "goal": goal}.items():
            angles = np.deg2rad(values[ANGLES[name]])
            rest = np.delete(values, ANGLES[name])
            parts[name] = np.concatenate((rest, np.sin(angles), np.cos(angles))).astype(np.float32)
        return parts


def make(goal: dict[str, float]) -> gym.Env:
    return FlyCraft(goal)


gym.registry.pop("FlyCraft-v0", None)  # the package's own, whose goals depend on a configuration file
for name, goal in GOALS.items():
    gym.register(name, entry_point=make, kwargs={"goal": goal})
