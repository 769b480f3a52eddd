"""The maths of the script against slow references that are obvious. Numbers are the details of docs/."""

import json

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from gymnasium.vector import SyncVectorEnv
from helpers import (
    MIXED,
    assert_columns_hold_each_step_once_and_in_order,
    assert_gradient_reaches_back,
    assert_statistics_are_those_of_all_data,
    disturb,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, Normal
from toys import gradients


def play(script, num_steps=24, num_rollouts=2, seed=1, dtype=torch.float32, env=MIXED, **changes):
    """A few rollouts of an untrained agent on the toy, and what belongs to them."""
    defaults = {"num_envs": 3, "num_steps": num_steps, "lstm_hidden": 20, "horizon": 30, "seed": seed}
    defaults |= {"num_minibatches": 1, "ent_coef": 0.01}
    args = script.Args(env_id="toys:Toy-v0", env_kwargs=json.dumps(env), **defaults | changes)
    torch.manual_seed(seed)
    envs = script.make_envs(args, args.num_envs)
    agent = script.Agent(envs.single_observation_space, envs.single_action_space, args)
    torch.nn.init.normal_(agent.actor.weight, std=1 / 3)  # so that the policy depends on the features
    agent.obs_stats.update(torch.randn(50, len(agent.obs_stats.mean)) * 3 + 1)
    agent.return_stats.update(torch.randn(50) * 5 + 2)
    player = script.play(envs, agent, seed)
    rollouts = [script.collect(player, num_steps)[0] for _ in range(num_rollouts)]
    agent.to(dtype)
    return args, agent, [cast(rollout, dtype) for rollout in rollouts]


def cast(rollout, dtype):
    return type(rollout)(*(x.to(dtype) if x.is_floating_point() else x for x in rollout))


def flat(rollout):
    return type(rollout)(*(x.flatten(0, 1) for x in rollout))


def distributions(params, action, space):
    """The policy's distributions of one step, side by side, and what each of them gave."""
    if isinstance(space, Box):
        mean, log_std = params.chunk(2)
        return [Normal(mean, log_std.exp())], [action]
    sizes = [int(space.n)] if isinstance(space, Discrete) else space.nvec.tolist()
    return [Categorical(logits=logits) for logits in params.split(sizes)], action


def reference_loss(agent, rollout, advantages, returns, args):
    """PPO's loss of a whole rollout, a step of an environment at a time, with one LSTM cell and torch.distributions."""
    num_steps, num_envs = rollout.reward.shape
    total = 0
    for n in range(num_envs):
        for t in range(num_steps):
            if t == 0 or rollout.start[t, n] or not args.recurrent or (args.bptt_length and t % args.bptt_length == 0):
                state = rollout.state[t, n][None]
            params, value, state = agent.step(rollout.obs[t, n][None], state, rollout.action_mask[t, n][None])
            parts, choices = distributions(params[0], rollout.action[t, n], agent.action_space)
            logprob = sum(part.log_prob(choice).sum() for part, choice in zip(parts, choices, strict=True))
            entropy = sum(part.entropy().sum() for part in parts)
            parts, choices = distributions(rollout.params[t, n], rollout.action[t, n], agent.action_space)
            ratio = (logprob - sum(part.log_prob(x).sum() for part, x in zip(parts, choices, strict=True))).exp()
            advantage = advantages[t, n]
            clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
            target = (returns[t, n] - agent.return_stats.mean) / agent.return_stats.std
            total += -torch.min(ratio * advantage, clipped * advantage)
            total += args.vf_coef * 0.5 * (value[0] - target) ** 2 - args.ent_coef * entropy
    return total / (num_steps * num_envs)


def targets(rollout):
    """Advantages and returns [T, N] at random."""
    return torch.randn(2, *rollout.reward.shape, dtype=rollout.reward.dtype)


def columns_of(script, rollout, args):
    return script.cut_segments(rollout.start, args.bptt_length if args.recurrent else 1)


def loss_of(script, agent, rollout, advantages, returns, args, index=None):
    index = columns_of(script, rollout, args) if index is None else index
    return script.ppo_loss(agent, flat(rollout), advantages.flatten(), returns.flatten(), index, args)


def assert_is_the_loop(script, args, agent, rollout):
    disturb(agent)
    advantages, returns = targets(rollout)
    expected = reference_loss(agent, rollout, advantages, returns, args)
    expected_gradient = gradients(expected, agent)
    loss, _ = loss_of(script, agent, rollout, advantages, returns, args)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
    torch.testing.assert_close(gradients(loss, agent), expected_gradient, atol=1e-9, rtol=0)


@pytest.mark.parametrize("bptt_length", [0, 1, 8, 1000])
@pytest.mark.parametrize("lengths", [(1,), (5,), (3, 1, 7, 40, 2), (100,)])
def test_01_segments_are_the_step_by_step_loop(script, lengths, bptt_length):
    for seed in range(3):
        env = {"lengths": lengths, "ends": ("truncated", "terminated")}
        args, agent, (_, rollout) = play(script, seed=seed, dtype=torch.float64, env=env, bptt_length=bptt_length)
        assert_is_the_loop(script, args, agent, rollout)


@pytest.mark.parametrize("action", ["discrete", "multidiscrete", "box"])
@pytest.mark.parametrize("changes", [{}, {"recurrent": False}, {"visible": (2, 1)}])
def test_01_for_every_action_space_and_network(script, action, changes):
    env = MIXED | {"action": action, "masked": action != "box"}
    args, agent, (_, rollout) = play(script, dtype=torch.float64, env=env, bptt_length=4, **changes)
    assert_is_the_loop(script, args, agent, rollout)


def test_02_float32_gradient(script):
    args, agent, (_, rollout) = play(script, num_steps=64)
    disturb(agent)
    advantages, returns = targets(rollout)
    expected = gradients(reference_loss(agent, rollout, advantages, returns, args), agent)
    gradient = gradients(loss_of(script, agent, rollout, advantages, returns, args)[0], agent)
    assert (gradient - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("lengths", [(100,), (7, 10)])
def test_01_gradient_reaches_back_exactly_as_far_as_it_should(script, lengths):
    """The value of a step depends on an earlier observation if and only if both are in the same segment."""
    _, agent, (rollout, _) = play(script, dtype=torch.float64, env={"lengths": lengths})
    for bptt_length in (0, 5):
        begin = max(0 if lengths == (100,) else 17, 20 if bptt_length else 0)
        assert_gradient_reaches_back(script, agent, rollout, rollout.start, bptt_length, begin)


@settings(deadline=None)
@given(num_steps=st.integers(1, 20), num_envs=st.integers(1, 4), bptt_length=st.integers(0, 25), data=st.data())
def test_01_columns_hold_each_step_once_and_in_order(script, num_steps, num_envs, bptt_length, data):
    starts = st.lists(st.booleans(), min_size=num_steps * num_envs, max_size=num_steps * num_envs)
    start = torch.tensor(data.draw(starts)).reshape(num_steps, num_envs)
    assert_columns_hold_each_step_once_and_in_order(script, start, bptt_length)


def test_02_a_flush_step_leaves_the_initial_state_and_passes_no_gradient(script):
    _, agent, _ = play(script, num_rollouts=0)
    for dtype in (torch.float32, torch.float64):
        agent.to(dtype)
        obs = (100 * torch.randn(9, 5, 7)).to(dtype).requires_grad_()
        state, flush, mask = agent.initial_state(5).to(dtype), torch.zeros(9, 5, dtype=torch.bool), torch.ones(9, 5, 3)
        flush[4] = True
        values = agent.unroll(obs, torch.randn_like(state), flush, mask.bool())[1]
        fresh = agent.unroll(obs[5:], state, flush[5:], mask.bool()[5:])[1]
        torch.testing.assert_close(values[5:], fresh, atol=1e-6, rtol=0)
        reach = torch.autograd.grad(values[5:].sum(), obs)[0]
        assert (reach[:5] == 0).all() and (reach[5:] != 0).any()


def test_03_padding_has_no_influence(script):
    """Padding looks at the rollout's last step, which is poisoned and no real step of this minibatch."""
    args, agent, (rollout, _) = play(script, dtype=torch.float64, bptt_length=8)
    disturb(agent)
    advantages, returns = targets(rollout)
    index = columns_of(script, rollout, args)[:, :-1]
    expected = gradients(loss_of(script, agent, rollout, advantages, returns, args, index)[0], agent)
    for x in (rollout.obs, rollout.state, rollout.params, rollout.value, advantages, returns):
        x[-1, -1] = 1e9
    more = torch.cat((index, torch.full((5, index.shape[1]), -1)))
    assert (index < 0).any()
    gradient = gradients(loss_of(script, agent, rollout, advantages, returns, args, more)[0], agent)
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=0)


def test_03_every_step_weighs_the_same_in_any_minibatch(script):
    args, agent, (_, rollout) = play(script, dtype=torch.float64, bptt_length=5)
    disturb(agent)
    advantages, returns = targets(rollout)
    whole, whole_metrics = loss_of(script, agent, rollout, advantages, returns, args)
    expected, index = gradients(whole, agent), columns_of(script, rollout, args)
    for args.num_minibatches in (1, 2, 3):
        order = torch.randperm(index.shape[1]).tensor_split(args.num_minibatches)
        parts = [loss_of(script, agent, rollout, advantages, returns, args, index[:, chosen]) for chosen in order]
        loss = sum(loss for loss, _ in parts) / args.num_minibatches
        assert loss.item() == pytest.approx(whole.item(), abs=1e-12)
        torch.testing.assert_close(gradients(loss, agent), expected, atol=1e-12, rtol=0)
        for name in whole_metrics.keys() - {"ratio_error"}:
            mean = sum(metrics[name] for _, metrics in parts) / args.num_minibatches
            torch.testing.assert_close(mean, whole_metrics[name])


@pytest.mark.parametrize("env", [{}, {"action": "box"}, {"action": "multidiscrete", "masked": True}, {"masked": True}])
@pytest.mark.parametrize("bptt_length", [0, 4])
def test_04_first_ratio_is_one(script, env, bptt_length):
    args, agent, rollouts = play(script, env=MIXED | env, num_rollouts=3, bptt_length=bptt_length)
    for rollout in rollouts:
        index = columns_of(script, rollout, args)
        for chosen in torch.arange(index.shape[1]).tensor_split(2):
            _, metrics = loss_of(script, agent, rollout, *targets(rollout), args, index[:, chosen])
            assert metrics["ratio_error"] < 1e-5


@pytest.mark.parametrize("recurrent", [True, False])
def test_05_truncation_bootstraps_with_the_right_state(script, recurrent):
    """V after every step, by playing each episode again from its first observation."""
    _, agent, rollouts = play(script, env=MIXED | {"lengths": (3, 7, 1)}, recurrent=recurrent)
    rollout = rollouts[1]
    values = script.next_values(agent, rollout)
    checked = 0
    for n in range(3):
        state = rollout.state[0, n][None]
        for t in range(24):
            if rollout.start[t, n] or not recurrent:
                state = agent.initial_state(1)
            *_, state = agent.step(rollout.obs[t, n][None], state)
            final = agent.step(rollout.next_obs[t, n][None], state if recurrent else agent.initial_state(1))[1]
            if not rollout.terminated[t, n]:
                assert values[t, n].item() == pytest.approx(final.item(), abs=1e-5)
                checked += bool(rollout.truncated[t, n])
    assert checked > 3


def test_05_terminated_wins_over_truncated(script):
    from common.gae import gae

    one, yes, no = torch.ones(1, 1), torch.tensor([[True]]), torch.tensor([[False]])
    assert gae(one, one, 100 * one, yes, yes, 0.9, 0.9)[1].item() == 1
    assert gae(one, one, 100 * one, no, yes, 0.9, 0.9)[1].item() == 91


@pytest.mark.parametrize("action", ["discrete", "multidiscrete", "box"])
def test_05_next_observations_are_the_true_ones(script, action):
    """Within an episode the next row's, at its end the final one, never the next episode's first; and with each the
    action before it, zeros at a start."""
    _, _, (rollout, _) = play(script, env=MIXED | {"action": action})
    done = rollout.terminated | rollout.truncated
    for t in range(24):
        for n in range(3):
            assert rollout.next_obs[t, n, 0] == rollout.obs[t, n, 0] + 1  # the toy counts its steps
            taken = rollout.action[t, n].numpy()
            if action != "box":
                sizes = [3] if action == "discrete" else [2, 4]
                taken = np.concatenate([np.eye(size)[choice] for size, choice in zip(sizes, taken, strict=True)])
            np.testing.assert_allclose(rollout.next_obs[t, n, 4:], taken, rtol=1e-6)
            if t < 23:
                assert rollout.start[t + 1, n] == done[t, n]
                if done[t, n]:
                    assert rollout.obs[t + 1, n, 0] == 0 and (rollout.obs[t + 1, n, 4:] == 0).all()
                else:
                    assert torch.equal(rollout.obs[t + 1, n], rollout.next_obs[t, n])


def test_06_states_are_those_of_a_step_by_step_replay(script):
    _, agent, rollouts = play(script, num_rollouts=3)
    fresh = agent.initial_state(3)
    state = fresh
    for rollout in rollouts:
        for t in range(24):
            state = torch.where(rollout.start[t][:, None, None], fresh, state)
            torch.testing.assert_close(rollout.state[t], state, atol=1e-6, rtol=0)
            *_, state = agent.step(rollout.obs[t], state)
    starts = torch.stack([rollout.start.any(0) for rollout in rollouts[1:]])  # an episode is longer than a rollout
    assert starts.any() and not starts.all()


def test_06_evaluation_is_a_plain_loop_over_single_environments(script):
    args, agent, _ = play(script, num_rollouts=0)
    args.eval_episodes, args.num_envs = 7, 3
    episodes, rollout = script.evaluate(agent, args, sampled=False)
    expected = []
    for n in range(3):
        env = script.make_env(args)
        obs, _ = env.reset(seed=args.seed + 1_000_000_000 + n)
        for episode in range(3 if n == 0 else 2):
            if episode:
                obs, _ = env.reset()
            state, last, total, length, done = agent.initial_state(1), torch.zeros(3), 0, 0, False
            while not done:
                with torch.no_grad():
                    params, _, state = agent.step(torch.cat((torch.from_numpy(obs), last))[None], state)
                choice = params.argmax().item()
                obs, reward, terminated, truncated, _ = env.step(choice + 2)  # the toy's actions start at 2
                last = torch.eye(3)[choice]
                total, length, done = total + reward, length + 1, terminated or truncated
            expected.append((n, length, total))
    got = sorted((episode.n, episode.length, episode.total) for episode in episodes)
    np.testing.assert_allclose(got, sorted(expected), rtol=1e-5)
    assert len(rollout.reward) >= max(length for _, length, _ in expected)


def test_06_memoryless_policy_forgets(script):
    args, agent, _ = play(script, num_rollouts=0, env={"lengths": (30,)})
    args.eval_episodes, fresh, same = 3, agent.initial_state(3), []
    step = agent.step
    agent.step = lambda obs, state, mask=None: same.append(torch.equal(state, fresh)) or step(obs, state, mask)
    script.evaluate(agent, args, memory=False)
    assert len(same) == 30 and all(same)
    same.clear()
    script.evaluate(agent, args)
    assert sum(same) == 1


@pytest.mark.parametrize("action", ["discrete", "multidiscrete"])
def test_07_masked_actions_are_never_taken_and_get_no_gradient(script, action):
    args, agent, (_, rollout) = play(script, env=MIXED | {"action": action, "masked": True})
    assert not rollout.action_mask.all()
    offsets = torch.tensor([0] if action == "discrete" else [0, 2])
    assert rollout.action_mask.gather(-1, rollout.action + offsets).all()
    params = torch.randn(5, 6 if action == "multidiscrete" else 3, requires_grad=True)
    mask = torch.ones_like(params, dtype=torch.bool)
    mask[:, 1] = False
    masked = params.masked_fill(~mask, torch.finfo(params.dtype).min)
    logprob, entropy = script.logprob_entropy(masked, torch.zeros(5, len(offsets), dtype=torch.long), agent.choices)
    (logprob.sum() + entropy.sum()).backward()
    assert params.grad.isfinite().all() and (params.grad[:, 1] == 0).all() and (params.grad[:, 2] != 0).all()
    args.eval_episodes = 5
    for how in ({"sampled": True}, {"sampled": False}, {"memory": False}):
        script.evaluate(agent, args, **how)  # the toy raises at a forbidden action


def test_07_the_mask_reaches_the_update(script):
    """An action that is forbidden has no gradient in the actor, whatever its logit is."""
    args, agent, (_, rollout) = play(script, env=MIXED | {"masked": True}, dtype=torch.float64)
    rollout = rollout._replace(action_mask=torch.ones_like(rollout.action_mask), action=0 * rollout.action)
    rollout.action_mask[..., 2] = False
    loss, _ = loss_of(script, agent, rollout, *targets(rollout), args)
    bias = torch.autograd.grad(loss, agent.actor.bias)[0]
    assert bias[2] == 0 and (bias[:2] != 0).all()


def test_08_statistics_are_those_of_all_data(script):
    assert_statistics_are_those_of_all_data(script)


def test_08_popart_keeps_the_values(script):
    _, agent, (_, rollout) = play(script)
    x = torch.randn(40, agent.critic.in_features)

    def values():
        return agent.return_stats.denormalize(agent.critic(x).squeeze(-1))

    before, bias = values(), agent.critic.bias.item()
    agent.update_statistics(rollout.obs.flatten(0, 1), torch.randn(100) * 50 + 300)
    torch.testing.assert_close(values(), before, atol=1e-3, rtol=1e-5)
    assert agent.critic.bias.item() != bias


def test_09_gaussian_density_by_numerical_integration(script):
    params = torch.tensor([0.3, -0.8, -0.5, 0.4], dtype=torch.float64)
    axis = torch.linspace(-12, 12, 1201, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    logprob, entropy = script.logprob_entropy(params.expand(len(grid), 4), grid, [])
    cell = (axis[1] - axis[0]) ** 2
    assert (logprob.exp().sum() * cell).item() == pytest.approx(1, abs=1e-6)
    assert (-(logprob.exp() * logprob).sum() * cell).item() == pytest.approx(entropy[0].item(), abs=1e-6)


def test_09_samples_follow_their_log_probabilities(script):
    generator = torch.Generator().manual_seed(0)
    for choices in ([3], [2, 3]):
        params = torch.randn(sum(choices), generator=generator).expand(40_000, -1)
        action = script.sample(params, choices, generator)
        for choice in torch.cartesian_prod(*(torch.arange(n) for n in choices)).reshape(-1, len(choices)):
            chance = script.logprob_entropy(params[:1], choice[None], choices)[0].exp().item()
            assert (action == choice).all(-1).float().mean().item() == pytest.approx(chance, abs=0.01)
        best = script.sample(params[:1], choices, None)
        assert [logits.argmax().item() for logits in params[0].split(choices)] == best[0].tolist()
    params = torch.tensor([1.0, -2.0, 0.5, -1.0]).expand(40_000, 4)
    action = script.sample(params, [], generator)
    torch.testing.assert_close(action.mean(0), torch.tensor([1.0, -2.0]), atol=0.03, rtol=0)
    torch.testing.assert_close(action.std(0).log(), torch.tensor([0.5, -1.0]), atol=0.03, rtol=0)
    logprob = script.logprob_entropy(params, action, [])[0]
    torch.testing.assert_close(logprob, Normal(params[:, :2], params[:, 2:].exp()).log_prob(action).sum(-1))


@pytest.mark.parametrize("low, high, taken", [([-2, 0], [2, 10], [[0, 5], [2, 0]]), ([0, -np.inf], [np.inf, 1], None)])
def test_09_box_actions_are_scaled_and_clipped_to_their_bounds(script, monkeypatch, low, high, taken):
    """From [-1, 1] to the bounds; where some entry has none, actions are as the policy gives them, clipped."""
    from toys import ACTION_SPACES, Toy

    seen, step = [], Toy.step
    monkeypatch.setitem(ACTION_SPACES, "box", Box(np.array(low, np.float32), np.array(high, np.float32)))
    monkeypatch.setattr(Toy, "step", lambda self, action: seen.append(np.array(action)) or step(self, action))
    env = script.make_env(script.Args(env_id="toys:Toy-v0", env_kwargs='{"action": "box"}'))
    env.reset(seed=1)
    for action in ([0.0, 0.0], [9.0, -9.0]):
        env.step(np.array(action, np.float32))
    np.testing.assert_allclose(seen, taken or [[0, 0], [9, -9]], rtol=1e-6)


def test_nested_observations_masks_and_success(script, tmp_path):
    """A nested dict observation with a masked MultiDiscrete: what the toy allows is what pays."""
    import gymnasium as gym

    mask = {"action_mask": np.array([1, 1, 1, 0, 1], np.int8)}

    class Nested(gym.Env):
        observation_space = Dict(a=Dict(x=Box(-1, 1, (2, 2)), d=Discrete(3)), t=Tuple((MultiBinary(2), Discrete(3))))
        action_space = MultiDiscrete([2, 3])

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.observation_space.seed(seed)
            self.t = 0
            return self.observation_space.sample(), mask

        def step(self, action):
            assert action[1] != 1
            self.t += 1
            done, info = self.t == 9, mask | {"is_success": bool(action[0])}
            return self.observation_space.sample(), float(action[0]), False, done, info

    if "Nested-v0" not in gym.registry:
        gym.register("Nested-v0", Nested)
    args = script.Args(env_id="Nested-v0", total_timesteps=12_000, eval_episodes=4, checkpoint_every=0, horizon=3)
    args.runs_dir = str(tmp_path)
    result = script.train(args)
    assert result["eval_return_mean"] > 6 and 0 <= result["eval_success_rate"] <= 1


def test_vector_environments_are_gymnasiums(script):
    envs = script.make_envs(script.Args(env_id="CartPole-v1"), 2)
    assert isinstance(envs, SyncVectorEnv) and envs.metadata["autoreset_mode"].name == "SAME_STEP"
