"""The maths of ppo_lstm_tamiyo.py against slow references that are obvious. Numbers are the details of docs/."""

import json
from contextlib import closing

import numpy as np
import pytest
import torch
from gymnasium.spaces import Discrete
from helpers import (
    MIXED,
    assert_columns_hold_each_step_once_and_in_order,
    assert_gradient_reaches_back,
    assert_statistics_are_those_of_all_data,
    disturb,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical
from toys import gradients, tiny_hosts

from environments.hosts import HELD_OUT, OBSERVATION, SETTINGS, UNSEEN, Morphogenesis


@pytest.fixture
def quick(monkeypatch):
    tiny_hosts(monkeypatch, minibatches=2)


def play(tamiyo, num_rollouts=2, seed=1, dtype=torch.float32, env=MIXED, **changes):
    """A few rollouts of an untrained agent on the toy, and what belongs to them."""
    defaults = {"num_envs": 3, "num_steps": 24, "lstm_hidden": 8, "seed": seed, "num_minibatches": 1}
    args = tamiyo.Args(env_id="toys:Toy-v0", env_kwargs=json.dumps(env), **defaults | changes)
    torch.manual_seed(seed)
    envs = tamiyo.make_envs(args, args.num_envs)
    agent = tamiyo.Agent(envs.single_observation_space, envs.single_action_space, args)
    torch.nn.init.normal_(agent.actor.weight, std=1 / 3)  # so that the policy depends on the features
    agent.obs_stats.update(torch.randn(50, len(agent.obs_stats.mean)) * 3 + 1)
    agent.return_stats.update(torch.randn(50) * 5 + 2)
    player = tamiyo.play(envs, agent, [seed, seed + 1, seed + 2])
    rollouts = [tamiyo.collect(player, args.num_steps)[0] for _ in range(num_rollouts)]
    agent.to(dtype)
    rollouts = [type(x)(*(y.to(dtype) if y.is_floating_point() else y for y in x)) for x in rollouts]
    return args, agent, rollouts


def flat(rollout):
    return type(rollout)(*(x.flatten(0, 1) for x in rollout))


def targets(rollout):
    """Advantages and returns [T, N] at random."""
    return torch.randn(2, *rollout.reward.shape, dtype=rollout.reward.dtype)


def begins(rollout, args):
    """By hand: [T, N] where a step starts from the initial state."""
    every = args.reset_every if args.recurrent else 1
    return torch.tensor([[age == 0 or (every > 0 and age % every == 0) for age in row] for row in rollout.age.tolist()])


def reference_loss(agent, rollout, advantages, returns, args):
    """PPO's loss of a whole rollout, a step of an environment at a time, with one LSTM cell and torch.distributions."""
    num_steps, num_envs = rollout.reward.shape
    total, start = 0, begins(rollout, args)
    for n in range(num_envs):
        for t in range(num_steps):
            if t == 0 or start[t, n] or (args.bptt_length and t % args.bptt_length == 0):
                state = rollout.state[t, n][None]
            logits, value, state = agent.step(rollout.obs[t, n][None], state, rollout.action_mask[t, n][None])
            policy, old = Categorical(logits=logits[0]), Categorical(logits=rollout.logits[t, n])
            action, advantage = rollout.action[t, n], advantages[t, n]
            ratio = (policy.log_prob(action) - old.log_prob(action)).exp()
            clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
            target = (returns[t, n] - agent.return_stats.mean) / agent.return_stats.std
            total += -torch.min(ratio * advantage, clipped * advantage)
            total += args.vf_coef * 0.5 * (value[0] - target) ** 2 - args.ent_coef * policy.entropy()
    return total / (num_steps * num_envs)


def columns_of(tamiyo, agent, rollout, args):
    return tamiyo.cut_segments(agent.begins(rollout.age), 1 if agent.reset_every == 1 else args.bptt_length)


def loss_of(tamiyo, agent, rollout, advantages, returns, args, index=None):
    index = columns_of(tamiyo, agent, rollout, args) if index is None else index
    return tamiyo.ppo_loss(agent, flat(rollout), advantages.flatten(), returns.flatten(), index, args)


def assert_is_the_loop(tamiyo, args, agent, rollout):
    disturb(agent)
    advantages, returns = targets(rollout)
    expected = reference_loss(agent, rollout, advantages, returns, args)
    expected_gradient = gradients(expected, agent)
    loss, _ = loss_of(tamiyo, agent, rollout, advantages, returns, args)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
    torch.testing.assert_close(gradients(loss, agent), expected_gradient, atol=1e-9, rtol=0)


@pytest.mark.parametrize("bptt_length", [0, 1, 8, 1000])
@pytest.mark.parametrize("lengths", [(1,), (25,), (3, 1, 7, 40, 2), (100,)])
def test_01_segments_are_the_step_by_step_loop(tamiyo, lengths, bptt_length):
    for seed in range(2):
        env = {"lengths": lengths, "ends": ("truncated", "terminated"), "masked": True}
        args, agent, (_, rollout) = play(tamiyo, seed=seed, dtype=torch.float64, env=env, bptt_length=bptt_length)
        assert_is_the_loop(tamiyo, args, agent, rollout)


@pytest.mark.parametrize("changes", [{"recurrent": False}, {"reset_every": 3}, {"reset_every": 1}])
def test_01_with_less_memory(tamiyo, changes):
    args, agent, (_, rollout) = play(tamiyo, dtype=torch.float64, **changes)
    assert_is_the_loop(tamiyo, args, agent, rollout)


@pytest.mark.parametrize("lengths", [(100,), (7, 10)])
def test_01_gradient_reaches_back_exactly_as_far_as_it_should(tamiyo, lengths):
    """The value of a step depends on an earlier observation if and only if both are in the same segment."""
    _, agent, (rollout, _) = play(tamiyo, dtype=torch.float64, env={"lengths": lengths})
    for bptt_length in (0, 5):
        begin = max(0 if lengths == (100,) else 17, 20 if bptt_length else 0)
        assert_gradient_reaches_back(tamiyo, agent, rollout, rollout.age == 0, bptt_length, begin)


@settings(deadline=None, max_examples=50)
@given(num_steps=st.integers(1, 20), num_envs=st.integers(1, 4), bptt_length=st.integers(0, 25), data=st.data())
def test_01_columns_hold_each_step_once_and_in_order(tamiyo, num_steps, num_envs, bptt_length, data):
    starts = st.lists(st.booleans(), min_size=num_steps * num_envs, max_size=num_steps * num_envs)
    start = torch.tensor(data.draw(starts)).reshape(num_steps, num_envs)
    assert_columns_hold_each_step_once_and_in_order(tamiyo, start, bptt_length)


def test_02_float32_gradient(tamiyo):
    args, agent, (_, rollout) = play(tamiyo, num_steps=64)
    disturb(agent)
    advantages, returns = targets(rollout)
    expected = gradients(reference_loss(agent, rollout, advantages, returns, args), agent)
    gradient = gradients(loss_of(tamiyo, agent, rollout, advantages, returns, args)[0], agent)
    assert (gradient - expected).norm() / expected.norm() < 1e-5


def test_03_padding_has_no_influence(tamiyo):
    """Padding looks at the rollout's last step, which is poisoned and no real step of this minibatch."""
    args, agent, (rollout, _) = play(tamiyo, dtype=torch.float64)
    disturb(agent)
    advantages, returns = targets(rollout)
    index = columns_of(tamiyo, agent, rollout, args)[:, :-1]
    expected = gradients(loss_of(tamiyo, agent, rollout, advantages, returns, args, index)[0], agent)
    for x in (rollout.obs, rollout.state, rollout.logits, rollout.value, advantages, returns):
        x[-1, -1] = 1e9
    more = torch.cat((index, torch.full((5, index.shape[1]), -1)))
    gradient = gradients(loss_of(tamiyo, agent, rollout, advantages, returns, args, more)[0], agent)
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("bptt_length", [0, 7, 8])
def test_03_every_step_weighs_the_same_in_any_minibatch(tamiyo, bptt_length):
    env = {"lengths": (25, 3)}
    args, agent, (_, rollout) = play(tamiyo, dtype=torch.float64, env=env, bptt_length=bptt_length)
    disturb(agent)
    advantages, returns = targets(rollout)
    whole, whole_metrics = loss_of(tamiyo, agent, rollout, advantages, returns, args)
    expected, index = gradients(whole, agent), columns_of(tamiyo, agent, rollout, args)
    for args.num_minibatches in (1, 2, 3):
        order = torch.randperm(index.shape[1]).tensor_split(args.num_minibatches)
        parts = [loss_of(tamiyo, agent, rollout, advantages, returns, args, index[:, chosen]) for chosen in order]
        loss = sum(loss for loss, _ in parts) / args.num_minibatches
        torch.testing.assert_close(gradients(loss, agent), expected, atol=1e-12, rtol=0)
        for name in whole_metrics.keys() - {"ratio_error"}:
            mean = sum(metrics[name] for _, metrics in parts) / args.num_minibatches
            torch.testing.assert_close(mean, whole_metrics[name])


@pytest.mark.parametrize("changes", [{}, {"reset_every": 4}, {"bptt_length": 5}, {"env": MIXED | {"masked": True}}])
def test_04_first_ratio_is_one(tamiyo, changes):
    args, agent, rollouts = play(tamiyo, num_rollouts=3, **changes)
    for rollout in rollouts:
        assert loss_of(tamiyo, agent, rollout, *targets(rollout), args)[1]["ratio_error"] < 1e-5


@pytest.mark.parametrize("reset_every", [0, 1, 3])
def test_05_truncation_bootstraps_with_the_right_state(tamiyo, reset_every):
    """V after every step, by playing each episode again from its first observation."""
    env = MIXED | {"lengths": (3, 7, 1)}
    args, agent, (rollout,) = play(tamiyo, env=env, reset_every=reset_every, num_rollouts=1)
    values, start, checked = tamiyo.next_values(agent, rollout), begins(rollout, args), 0
    for n in range(3):
        for t in range(24):
            if start[t, n]:
                state = agent.initial_state(1)
            *_, state = agent.step(rollout.obs[t, n][None], state)
            if reset_every and (rollout.age[t, n] + 1) % reset_every == 0:
                state = agent.initial_state(1)
            if not rollout.terminated[t, n]:
                _, final, _ = agent.step(rollout.next_obs[t, n][None], state)
                assert values[t, n].item() == pytest.approx(final.item(), abs=1e-5)
                checked += bool(rollout.truncated[t, n])
    assert checked > 3


def test_05_next_observations_are_the_true_ones(tamiyo):
    """Within an episode the next row's, at its end the final one, never the next episode's first; and with each the
    action before it, zeros at a start."""
    _, _, (rollout, _) = play(tamiyo)
    done = rollout.terminated | rollout.truncated
    for t in range(24):
        for n in range(3):
            assert rollout.next_obs[t, n, 0] == rollout.obs[t, n, 0] + 1  # the toy counts its steps
            assert rollout.age[t, n] == rollout.obs[t, n, 0]
            assert rollout.next_obs[t, n, 4:].tolist() == np.eye(3)[rollout.action[t, n]].tolist()
            if t < 23 and done[t, n]:
                assert rollout.obs[t + 1, n, 0] == 0 and (rollout.obs[t + 1, n, 4:] == 0).all()
            elif t < 23:
                assert torch.equal(rollout.obs[t + 1, n], rollout.next_obs[t, n])


@pytest.mark.parametrize("changes", [{}, {"reset_every": 4}, {"recurrent": False}])
def test_06_states_are_those_of_a_step_by_step_replay(tamiyo, changes):
    args, agent, rollouts = play(tamiyo, num_rollouts=3, **changes)
    state = agent.initial_state(3)
    for rollout in rollouts:
        for t, start in enumerate(begins(rollout, args)):
            state = torch.where(start[:, None, None], 0, state)
            torch.testing.assert_close(rollout.state[t], state, atol=1e-6, rtol=0)
            *_, state = agent.step(rollout.obs[t], state)


def test_07_masked_actions_are_never_taken(tamiyo):
    args, agent, (_, rollout) = play(tamiyo, env=MIXED | {"masked": True})
    assert not rollout.action_mask.all()
    assert rollout.action_mask.gather(-1, rollout.action[..., None]).all()
    args.eval_episodes = 5
    for how in ({"sampled": True}, {"sampled": False}, {"memory": False}):
        tamiyo.evaluate(agent, args, **how)  # the toy raises at a forbidden action


def test_08_statistics_are_those_of_all_data(tamiyo):
    assert_statistics_are_those_of_all_data(tamiyo)


def test_08_popart_keeps_the_values(tamiyo):
    _, agent, (_, rollout) = play(tamiyo)
    x = torch.randn(40, agent.critic.in_features)

    def values():
        return agent.return_stats.denormalize(agent.critic(x).squeeze(-1))

    before, bias = values(), agent.critic.bias.item()
    agent.update_statistics(rollout.obs.flatten(0, 1), torch.randn(100) * 50 + 300)
    torch.testing.assert_close(values(), before, atol=1e-3, rtol=1e-5)
    assert agent.critic.bias.item() != bias


# --- evaluation (detail 10)


def an_agent(tamiyo, **changes):
    args = tamiyo.Args(num_envs=4, eval_episodes=6, lstm_hidden=8, **changes)
    torch.manual_seed(1)
    agent = tamiyo.Agent(Morphogenesis(1).single_observation_space, Discrete(8), args)
    torch.nn.init.normal_(agent.actor.weight)
    return agent, args


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("reset_every, memory", [(0, True), (0, False), (3, True)])
def test_10_evaluation_is_a_plain_loop_over_single_hosts(tamiyo, quick, reset_every, memory, setting):
    agent, args = an_agent(tamiyo, env_kwargs=json.dumps({"setting": setting}), reset_every=reset_every)
    episodes, rollout = tamiyo.evaluate(agent, args, sampled=False, memory=memory)
    assert sorted(episode.n for episode in episodes) == list(range(6))
    for n, total, length, info in episodes:
        env = Morphogenesis(1, setting)
        obs, infos = env.reset(seed=[HELD_OUT + n])
        state, last, done, t, rewards = agent.initial_state(1), torch.zeros(1, 8), False, 0, 0
        while not done:
            if not memory or (reset_every and t % reset_every == 0):
                state = agent.initial_state(1)
            mask = torch.from_numpy(infos["action_mask"])
            unseen = torch.zeros(1, len(UNSEEN))  # which does not matter to the policy
            with torch.no_grad():
                logits, _, state = agent.step(torch.cat((torch.from_numpy(obs), last, unseen), 1), state, mask)
            action = logits.argmax(-1)
            assert rollout.action[t, n] == action
            obs, reward, (done,), _, infos = env.step(action.numpy())
            last, rewards, t = torch.eye(8)[action], rewards + reward[0], t + 1
        assert total == pytest.approx(rewards, abs=1e-3) and length == t
        assert (info["test_correct"] != infos["final_info"]["test_correct"][0]).mean() < 0.04  # rounding may tip one


def test_11_what_is_unseen_reaches_the_critic_only(tamiyo, quick):
    """In a rollout of hosts, and in the update: logits and states do not depend on it, values do."""
    agent, args = an_agent(tamiyo, num_steps=30)
    agent.obs_stats.update(torch.randn(50, len(agent.obs_stats.mean)))
    with closing(tamiyo.make_envs(args, 4)) as envs:
        rollout, _ = tamiyo.collect(tamiyo.play(envs, agent, [1, 2, 3, 4]), 30)
        size = envs.single_observation_space.shape[0] + 8
    for obs in (rollout.obs, rollout.next_obs):
        unsound = obs[..., size + 2 :]
        assert ((unsound == 0) | (unsound == 1)).all() and 0.1 < unsound.mean() < 0.6
    assert len(UNSEEN) == rollout.obs.shape[-1] - size
    age = rollout.age.float()
    torch.testing.assert_close(rollout.obs[..., size], age / 25)
    first = rollout.age == 0
    assert (rollout.obs[..., size + 1][first] == 0).all()  # nothing is grown
    gained = rollout.next_obs[:24, :, size + 1] - rollout.obs[:24, :, size + 1]
    torch.testing.assert_close(gained, rollout.reward[:24], atol=1e-5, rtol=0)
    other = rollout.obs.clone()
    other[..., size:] += 1
    step, changed = (agent.step(obs[3], rollout.state[3], rollout.action_mask[3]) for obs in (rollout.obs, other))
    assert torch.equal(step[0], changed[0]) and torch.equal(step[2], changed[2]) and (step[1] != changed[1]).all()
    flush = torch.zeros(rollout.age.shape, dtype=torch.bool)
    logits, values = zip(
        *(agent.unroll(x, rollout.state[0], flush, rollout.action_mask) for x in (rollout.obs, other)), strict=True
    )
    assert torch.equal(*logits) and (values[0] != values[1]).all()


def test_10_all_seeds_are_evaluated_on_the_same_hosts(tamiyo, quick):
    agent, args = an_agent(tamiyo)
    first = tamiyo.evaluate(agent, args, sampled=False)[0]
    args.seed = 5
    again, sampled = (tamiyo.evaluate(agent, args, sampled=x)[0] for x in (False, True))
    assert [x.total for x in first] == [x.total for x in again] != [x.total for x in sampled]
    for a, b in zip(sorted(first, key=lambda x: x.n), sorted(sampled, key=lambda x: x.n), strict=True):
        np.testing.assert_array_equal(a.info["bare_test_correct"], b.info["bare_test_correct"])


def test_10_pictures_show_what_was_done(tamiyo, quick):
    agent, args = an_agent(tamiyo)
    _, rollout = tamiyo.evaluate(agent, args)
    top, bottom = (axis.images[0].get_array() for axis in tamiyo.actions_figure(agent, rollout).axes[:2])
    for t in range(25):
        assert top[:, t].tolist() == pytest.approx(np.bincount(rollout.action[t], minlength=8) / 6)
    order = list(OBSERVATION).index("no_seed")
    assert (np.array(bottom.T) == rollout.obs[:, :8, order : order + 5].argmax(-1).numpy()).all()
