"""common/ against brute force and against Gymnasium."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from common.gae import gae
from common.obs import entry_names, flatten


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 4), st.floats(0, 1), st.floats(0, 1), st.integers(0, 10**6))
def test_05_gae_is_the_weighted_sum_of_td_errors(num_steps, num_envs, gamma, gae_lambda, seed):
    rng = np.random.default_rng(seed)
    rewards, values, next_values = rng.normal(size=(3, num_steps, num_envs))
    terminated, truncated = rng.random((2, num_steps, num_envs)) < 0.2
    arrays = map(torch.from_numpy, (rewards, values, next_values, terminated, truncated))
    advantages, returns = gae(*arrays, gamma, gae_lambda)
    for n in range(num_envs):
        for t in range(num_steps):
            expected, weight = 0.0, 1.0
            for u in range(t, num_steps):
                future = 0.0 if terminated[u, n] else gamma * next_values[u, n]
                expected += weight * (rewards[u, n] + future - values[u, n])
                weight *= gamma * gae_lambda
                if terminated[u, n] or truncated[u, n]:
                    break
            assert advantages[t, n].item() == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(returns, advantages + torch.from_numpy(values))


LEAVES = st.one_of(
    st.builds(lambda n, start: spaces.Discrete(n, start=start), st.integers(1, 5), st.integers(-3, 3)),
    st.builds(lambda nvec: spaces.MultiDiscrete(nvec), st.lists(st.integers(1, 4), min_size=1, max_size=3)),
    st.builds(lambda n: spaces.MultiDiscrete(np.full((2, n), 3), start=np.full((2, n), -1)), st.integers(1, 2)),
    st.builds(lambda shape: spaces.MultiBinary(shape), st.lists(st.integers(1, 3), min_size=1, max_size=2)),
    st.builds(
        lambda shape, dtype: spaces.Box(0, 100, tuple(shape), dtype),
        st.lists(st.integers(1, 3), max_size=3),
        st.sampled_from([np.float32, np.float64, np.uint8, np.int64]),
    ),
)
SPACES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(lambda parts: spaces.Tuple(parts), st.lists(inner, min_size=1, max_size=3)),
        st.builds(
            lambda parts: spaces.Dict(parts), st.dictionaries(st.sampled_from("cab"), inner, min_size=1, max_size=3)
        ),
    ),
    max_leaves=5,
)


@settings(deadline=None, max_examples=150)
@given(SPACES, st.integers(1, 4), st.integers(0, 10**6))
def test_flatten_is_gymnasiums_flatten_on_a_batch(space, num_envs, seed):
    space.seed(seed)
    observations = [space.sample() for _ in range(num_envs)]
    batch = gym.vector.utils.concatenate(space, observations, gym.vector.utils.create_empty_array(space, num_envs))
    flat = flatten(space, batch)
    expected = np.stack([gym.spaces.flatten(space, obs) for obs in observations]).astype(np.float32)
    np.testing.assert_array_equal(flat, expected)
    assert flat.dtype == np.float32
    names = entry_names(space)
    assert len(names) == len(set(names)) == flat.shape[1]


def test_flatten_copies():
    batch = np.zeros((2, 3), np.float32)
    flatten(spaces.Box(-1, 1, (3,)), batch)[:] = 7
    assert (batch == 0).all()


def test_names_and_refusals():
    space = spaces.Dict(goal=spaces.Box(0, 1, (2,)), light=spaces.Discrete(2, start=1))
    assert entry_names(space) == ["goal[0]", "goal[1]", "light=1", "light=2"]
    with pytest.raises(TypeError, match="Text"):
        entry_names(spaces.Text(5))
