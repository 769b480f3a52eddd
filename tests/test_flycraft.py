"""environments/flycraft.py against the package itself. Skipped where requirements-envs.txt is not installed."""

import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from toys import scalars

pytest.importorskip("flycraft", reason="pip install -r requirements-envs.txt")
IDS = {"FlyCraftEasy-v0": (150, 250, 10, 30), "FlyCraft-v0": (100, 300, 90, 180)}


def make(name: str) -> gym.Env:
    return gym.make(f"environments.flycraft:{name}")


@pytest.mark.parametrize("name", IDS)
def test_goals_are_those_of_the_preset(name):
    env, goals = make(name), []
    for seed in range(40):
        v, *angles = env.reset(seed=seed)[0]["goal"]
        goals.append((v, *np.rad2deg(np.arctan2(angles[:2], angles[2:]))))
    v_min, v_max, mu, chi = IDS[name]
    v, mus, chis = np.array(goals).T
    assert v_min <= v.min() < v_min + 0.2 * (v_max - v_min) and v_max - 0.2 * (v_max - v_min) < v.max() <= v_max
    assert 0.8 * mu < np.abs(mus).max() <= mu and 0.8 * chi < np.abs(chis).max() <= chi


def test_observations_are_the_packages_with_angles_as_sine_and_cosine(capsys):
    env = make("FlyCraft-v0")
    inner, rng = env.unwrapped, np.random.default_rng(0)
    obs, _ = env.reset(seed=3)
    for _ in range(60):
        assert env.observation_space.contains(obs)
        phi, theta, psi, v, mu, chi, p, h = inner._get_obs()["observation"].astype(float)
        angles = np.deg2rad([phi, theta, psi, mu, chi])
        expected = [v, p, h, *np.sin(angles), *np.cos(angles)]
        np.testing.assert_allclose(obs["aircraft"], expected, rtol=1e-5, atol=1e-5)
        goal, achieved = (inner._get_obs()[part].astype(float) for part in ("desired_goal", "achieved_goal"))
        for part, (v, mu, chi) in {"goal": goal, "error": goal - achieved}.items():
            angles = np.deg2rad([mu, chi])
            np.testing.assert_allclose(obs[part], [v, *np.sin(angles), *np.cos(angles)], rtol=1e-4, atol=1e-4)
        obs, _, terminated, truncated, info = env.step(rng.uniform(env.action_space.low, env.action_space.high))
        assert set(info) == {"is_success"}
        if terminated or truncated:
            obs, _ = env.reset()
    printed = capsys.readouterr()
    assert not printed.out and not printed.err


def test_faster_steps_are_the_package_s_to_the_last_bit():
    """What importing environments.flycraft changes in the package, against a process in which it is not imported."""
    code = """
import hashlib, sys
import numpy as np
if "changed" in sys.argv:
    import environments.flycraft
from flycraft.env import FlyCraftEnv
env, rng, steps = FlyCraftEnv(custom_config={"debug_mode": False}), np.random.default_rng(0), []
for seed in range(12):
    obs, done = env.reset(seed=seed)[0], False
    while not done:
        action = np.array([0, 1, 0.5]) + rng.normal(size=3) * ([20, 1, 0.2] if seed % 2 else [1, 0.1, 0.1])
        obs, reward, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        state = np.array([*info["plane_state"].values(), *info["plane_next_state"].values()])
        steps.append(np.concatenate((*obs.values(), state, [reward, terminated, truncated, info["is_success"]])))
print(len(steps), hashlib.sha256(np.array(steps).tobytes()).hexdigest())
"""
    root = Path(__file__).parents[1]
    calls = [[sys.executable, "-c", code, *how] for how in ([], ["changed"])]
    ends = [subprocess.run(x, cwd=root, capture_output=True, text=True, check=True).stdout.split()[-2:] for x in calls]
    assert ends[0] == ends[1] and int(ends[0][0]) > 1000


def test_a_timeout_truncates_and_does_not_terminate():
    """Level flight with throttle reaches no goal and hits nothing for 40 seconds."""
    for seed in range(20):
        env, steps, terminated, truncated = make("FlyCraft-v0"), 0, False, False
        env.reset(seed=seed)
        while not (terminated or truncated):
            _, _, terminated, truncated, info = env.step(np.array([0, 1, 0.3], np.float32))
            steps += 1
        if steps >= 398:
            assert truncated and not terminated and not info["is_success"]
            return
    pytest.fail("no episode lasted to its timeout")


@pytest.mark.slow
def test_trains_on_the_dict_observation_in_processes(script, tmp_path):
    result = script.train(
        script.Args(
            env_id="environments.flycraft:FlyCraftEasy-v0",
            env_kwargs='{"max_episode_steps": 60}',
            vectorization="async",
            num_envs=2,
            num_minibatches=2,
            num_steps=64,
            total_timesteps=128 * 4,
            eval_episodes=2,
            horizon=20,
            runs_dir=str(tmp_path),
        )
    )
    assert 0 <= result["eval_success_rate"] <= 1 and np.isfinite(result["predictor_skill_k1"])
    assert max(error for _, error in scalars(result["run_dir"])["losses/first_ratio_error"]) < 1e-3
