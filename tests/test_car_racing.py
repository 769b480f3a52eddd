"""environments/car_racing.py against Gymnasium's own CarRacing."""

import itertools

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.box2d import car_racing


def make(**kwargs) -> gym.Env:
    return gym.make("environments.car_racing:CarRacing64-v0", **kwargs)


@pytest.mark.parametrize("repeat", [1, 4])
def test_an_action_is_held_and_only_the_last_frame_is_drawn(repeat, monkeypatch):
    """Rewards, physics and pixels are those of the original, stepped frame by frame."""
    env, original = make(action_repeat=repeat), car_racing.CarRacing(continuous=True)
    obs, _ = env.reset(seed=3)
    pixels, _ = original.reset(seed=3)
    drawn, draw = [], car_racing.CarRacing._render
    rng, edges = np.random.default_rng(0), 1.5 * np.arange(65)
    share = [[max(0, min(b, k + 1) - max(a, k)) / 1.5 for k in range(96)] for a, b in itertools.pairwise(edges)]
    for _ in range(8):
        expected = np.einsum("ik,jl,klc->ijc", share, share, pixels.astype(float))
        assert np.abs(obs - expected).max() <= 0.501
        assert env.observation_space.contains(obs)
        steering, pedals = action = rng.uniform(-1, 1, 2).astype(np.float32)
        total = 0.0
        for _ in range(repeat):
            pixels, reward, *_ = original.step(np.array([steering, max(pedals, 0), max(-pedals, 0)]))
            total += reward
        monkeypatch.setattr(car_racing.CarRacing, "_render", lambda self, mode: drawn.append(1) or draw(self, mode))
        obs, reward, terminated, truncated, _ = env.step(action)
        monkeypatch.setattr(car_racing.CarRacing, "_render", draw)
        assert reward == pytest.approx(total) and not terminated and not truncated
    assert len(drawn) == 8


def test_only_what_is_not_seen_is_left_out():
    """Pixels are the original's, wherever the car is and however it is turned, while the view zooms in and after."""
    env, original = make(action_repeat=1).unwrapped, car_racing.CarRacing(continuous=True)
    rng = np.random.default_rng(0)
    for seed in range(4):
        env.reset(seed=seed), original.reset(seed=seed)
        for _ in range(6):
            place, angle, t = rng.uniform(-250, 250, 2), rng.uniform(-4, 4), rng.uniform(0, 1.5)
            for each in (env, original):
                each.car.hull.position, each.car.hull.angle, each.t = place.tolist(), angle, t
            assert (env._render("rgb_array") == original._render("rgb_array")).all()


def test_episodes_end_after_1000_frames_or_off_the_field():
    env, steps = make(action_repeat=250), 0
    env.reset(seed=10**9)
    truncated = False
    while not truncated:
        _, _, terminated, truncated, _ = env.step(np.zeros(2, np.float32))
        steps += 1
        assert not terminated
    assert steps == 4
    before, _ = env.reset(seed=1)
    env.unwrapped.car.hull.position = (1000, 0)
    obs, reward, terminated, truncated, _ = env.step(np.zeros(2, np.float32))
    assert terminated and not truncated and reward == -100
    assert (obs != before).any()  # drawn, although the episode ended between two drawn frames


def test_hopeless_episodes_are_cut_unless_held_out():
    """100 frames after the last new piece of road, also in the episodes behind the one that was given a seed."""
    env = make(action_repeat=10)
    for seed, whole in ((1, False), (None, False), (10**9, True), (None, True), (2, False)):
        env.reset(seed=seed)
        truncated, last, frames = False, 0, 0
        while not truncated and frames < 400:
            action = np.array([0.0, 0.5 if frames < 60 else 0.0], np.float32)
            _, reward, terminated, truncated, _ = env.step(action)
            frames += 10
            last = frames if reward > 0 else last
        assert (frames == 400 and not truncated) if whole else (last < frames <= last + 100 and truncated)
        assert not terminated and env.unwrapped.frames == (400 if whole else env.unwrapped.last + 100)


def test_gray_is_the_luminance():
    colour, gray = make(), make(gray=True)
    a, b = (env.reset(seed=0)[0] for env in (colour, gray))
    assert b.shape == (64, 64, 1)
    assert np.abs(a @ np.array([0.299, 0.587, 0.114]) - b[..., 0]).max() <= 1.5
