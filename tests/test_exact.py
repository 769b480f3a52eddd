"""The maths of the script against slow references that are obvious. Numbers are the details of docs/."""

import json

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from torch.distributions import Categorical, Normal
from toys import gradients

MIXED = {"lengths": (3, 1, 7, 40, 2), "ends": ("terminated", "truncated", "both")}


def play(script, num_steps=24, num_rollouts=2, seed=1, dtype=torch.float32, env=MIXED, **changes):
    """A few rollouts of an untrained agent on the toy, and what belongs to them."""
    defaults = {"num_envs": 3, "num_steps": num_steps, "lstm_hidden": 8, "horizon": 30, "seed": seed}
    args = script.Args(env_id="toys:Toy-v0", env_kwargs=json.dumps(env), **defaults | changes)
    torch.manual_seed(seed)
    envs = script.make_envs(args, args.num_envs)
    space = envs.single_action_space
    agent = script.Agent(4, space, args)
    torch.nn.init.normal_(agent.actor.weight)  # so that the policy depends on the features
    agent.obs_stats.update(torch.randn(50, 4) * 3 + 1)
    agent.return_stats.update(torch.randn(50) * 5 + 2)
    carry, generator, rollouts = script.reset(envs, agent, seed), torch.Generator().manual_seed(seed), []
    for _ in range(num_rollouts):
        rollout = script.Rollout(args, agent, 4, space, carry.action_mask is not None, torch.device("cpu"))
        script.collect(envs, agent, rollout, carry, generator)
        rollout.advantages, rollout.returns = torch.randn(2, *rollout.reward.shape)
        rollouts.append(rollout)
    agent.to(dtype)
    for rollout in rollouts:
        for name, x in vars(rollout).items():
            setattr(rollout, name, x.to(dtype) if x is not None and x.is_floating_point() else x)
    return args, agent, space, rollouts, carry


def reference_loss(agent, rollout, space, args):
    """PPO's loss of a whole rollout, a step of an environment at a time, with one LSTM cell and torch.distributions."""
    num_steps, num_envs = rollout.reward.shape
    total = 0
    for n in range(num_envs):
        for t in range(num_steps):
            if t == 0 or rollout.start[t, n]:
                state, age = rollout.state[t, n][None], 0
            elif args.bptt_length and age % args.bptt_length == 0:
                state = rollout.state[t, n][None]
            age += 1
            mask = None if rollout.action_mask is None else rollout.action_mask[t, n][None]
            *_, params, value, state = agent.step(rollout.obs[t, n][None], state, mask)
            action = rollout.action[t, n].reshape(-1)
            if isinstance(space, Box):
                mean, log_std = params[0].chunk(2)
                parts, choices = [Normal(mean, log_std.exp())], [action]
            else:
                sizes = [space.n] if isinstance(space, Discrete) else space.nvec.tolist()
                parts, choices = [Categorical(logits=logits) for logits in params[0].split(sizes)], action
            logprob = sum(part.log_prob(choice).sum() for part, choice in zip(parts, choices, strict=True))
            entropy = sum(part.entropy().sum() for part in parts)
            ratio = (logprob - rollout.logprob[t, n]).exp()
            advantage = rollout.advantages[t, n]
            clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
            target = (rollout.returns[t, n] - agent.return_stats.mean) / agent.return_stats.std
            total += -torch.min(ratio * advantage, clipped * advantage)
            total += args.vf_coef * 0.5 * (value[0] - target) ** 2 - args.ent_coef * entropy
    return total / (num_steps * num_envs)


def disturb(agent):
    """Weights other than those that collected the rollout, so that ratios differ from 1 and some are clipped."""
    with torch.no_grad():
        for weight in agent.parameters():
            weight += 0.1 * torch.randn_like(weight)


def all_rows(script, rollout, bptt_length):
    return script.lay_rows(script.cut_segments(rollout.start, bptt_length), rollout.start.shape[1])


def rows_loss(script, agent, rollout, space, args, rows=None):
    rows = rows or all_rows(script, rollout, args.bptt_length)
    return script.ppo_loss(agent, rollout, rows, space, args, rollout.reward.numel())[0]


def assert_is_the_loop(script, agent, rollout, space, args):
    disturb(agent)
    expected = reference_loss(agent, rollout, space, args)
    expected_gradient = gradients(expected, agent)
    loss = rows_loss(script, agent, rollout, space, args)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
    torch.testing.assert_close(gradients(loss, agent), expected_gradient, atol=1e-9, rtol=0)


@pytest.mark.parametrize("bptt_length", [0, 1, 8, 1000])
@pytest.mark.parametrize("lengths", [(1,), (5,), (3, 1, 7, 40, 2), (100,)])
def test_01_segments_are_the_step_by_step_loop(script, lengths, bptt_length):
    for seed in range(3):
        env = {"lengths": lengths, "ends": ("truncated", "terminated")}
        args, agent, space, (_, rollout), _ = play(
            script, seed=seed, dtype=torch.float64, env=env, bptt_length=bptt_length
        )
        assert_is_the_loop(script, agent, rollout, space, args)


@pytest.mark.parametrize("action", ["discrete", "multidiscrete", "box"])
@pytest.mark.parametrize("changes", [{}, {"lstm_layers": 2}, {"recurrent": False}, {"visible": (2, 1)}])
def test_01_for_every_action_space_and_network(script, action, changes):
    env = MIXED | {"action": action, "masked": action != "box"}
    args, agent, space, (_, rollout), _ = play(script, dtype=torch.float64, env=env, bptt_length=4, **changes)
    assert_is_the_loop(script, agent, rollout, space, args)


def test_02_float32_gradient(script):
    args, agent, space, (_, rollout), _ = play(script, num_steps=64)
    disturb(agent)
    expected = gradients(reference_loss(agent, rollout, space, args), agent)
    gradient = gradients(rows_loss(script, agent, rollout, space, args), agent)
    assert (gradient - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("lengths", [(100,), (7, 10)])
def test_01_gradient_reaches_back_exactly_as_far_as_it_should(script, lengths):
    """The value of a step depends on an earlier observation if and only if both are in the same segment."""
    _, agent, _, (rollout, _), _ = play(script, dtype=torch.float64, env={"lengths": lengths})
    for bptt_length in (0, 5):
        rows = all_rows(script, rollout, bptt_length)
        obs = rollout.obs.clone().requires_grad_()
        states = rollout.state.flatten(0, 1)[rows.index[0]]
        values = agent.unroll(obs.flatten(0, 1)[rows.index], states, rows.flush)[2]
        last = values[rows.mask & (rows.index == 23 * 3)]  # V at t = 23 of environment 0
        reach = torch.autograd.grad(last.sum(), obs)[0][:, 0].abs().sum(-1) > 0
        episode_start = 0 if lengths == (100,) else 17
        begin = episode_start + (23 - episode_start) // bptt_length * bptt_length if bptt_length else episode_start
        assert reach.tolist() == [begin <= t <= 23 for t in range(24)]


@pytest.mark.parametrize("bptt_length", [0, 1, 7])
def test_01_rows_hold_each_step_of_the_rollout_once(script, bptt_length):
    for seed in range(30):
        start = torch.rand(17, 3, generator=torch.Generator().manual_seed(seed)) < 0.2
        segments = script.cut_segments(start, bptt_length)
        rows = script.lay_rows(segments, 3)
        assert sorted(rows.index[rows.mask].tolist()) == list(range(17 * 3))
        assert not (rows.mask & rows.flush).any() and rows.mask[0].all()
        assert len(rows.index) == segments.length.max() <= (bptt_length or 17)
        for index, mask, flush in zip(rows.index.T, rows.mask.T, rows.flush.T, strict=True):
            for i in range(1, len(index)):
                if mask[i] and mask[i - 1]:  # the same segment goes on
                    assert index[i] == index[i - 1] + 3 and not start.flatten()[index[i]]
                elif mask[i]:  # a new segment, whose first state is zero
                    assert flush[i - 1] and mask[i - 2] and start.flatten()[index[i]]
        dealt = list(script.minibatches(segments, 3, 3, torch.Generator().manual_seed(seed)))
        assert sorted(torch.cat([part.index[part.mask] for part in dealt]).tolist()) == list(range(17 * 3))


def test_02_a_flush_step_leaves_exact_zeros_and_no_gradient(script):
    _, agent, _, _, _ = play(script, num_rollouts=0, lstm_layers=2)
    for dtype in (torch.float32, torch.float64):
        agent.to(dtype)
        obs = (100 * torch.randn(9, 5, 4)).to(dtype).requires_grad_()
        state = torch.randn(5, 2, 2, 8, dtype=dtype)
        flush = torch.zeros(9, 5, dtype=torch.bool)
        flush[4] = True
        features, _, values = agent.unroll(obs, state, flush)
        assert (features[4] == 0).all()
        fresh = agent.unroll(obs[5:], torch.zeros_like(state))[2]
        torch.testing.assert_close(values[5:], fresh, atol=1e-6, rtol=0)
        reach = torch.autograd.grad(values[5:].sum(), obs)[0]
        assert (reach[:5] == 0).all() and (reach[5:] != 0).any()


def test_03_padding_has_no_influence(script):
    args, agent, space, (rollout, _), _ = play(script, dtype=torch.float64)
    disturb(agent)
    segments = script.cut_segments(rollout.start, 0)
    rows = script.lay_rows(script.Segments(*(x[1:] for x in segments)), 3)
    expected = gradients(rows_loss(script, agent, rollout, space, args, rows), agent)
    poison = int(segments.t[0] * 3 + segments.n[0])  # a step that no real step of the batch uses
    for name in ("obs", "logprob", "value", "advantages", "returns"):
        getattr(rollout, name).flatten(0, 1)[poison] = 1e9
    more = torch.zeros(5, rows.index.shape[1], dtype=torch.bool)
    index = torch.where(torch.cat((rows.mask, more)), torch.cat((rows.index, 0 * more)), poison)
    poisoned = script.Rows(index, torch.cat((rows.mask, more)), torch.cat((rows.flush, more)))
    gradient = gradients(rows_loss(script, agent, rollout, space, args, poisoned), agent)
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=0)


def test_03_every_step_weighs_the_same_in_any_minibatch(script):
    args, agent, space, (_, rollout), _ = play(script, dtype=torch.float64)
    disturb(agent)
    whole, whole_metrics = script.ppo_loss(agent, rollout, all_rows(script, rollout, 0), space, args, 72)
    expected = gradients(whole, agent)
    for num_minibatches in (1, 2, 3):
        generator, size = torch.Generator().manual_seed(0), 72 / num_minibatches
        segments = script.cut_segments(rollout.start, 0)
        parts = [
            script.ppo_loss(agent, rollout, rows, space, args, size)
            for rows in script.minibatches(segments, num_minibatches, 3, generator)
        ]
        loss = sum(loss for loss, _ in parts) / num_minibatches
        assert loss.item() == pytest.approx(whole.item(), abs=1e-12)
        torch.testing.assert_close(gradients(loss, agent), expected, atol=1e-12, rtol=0)
        for name in whole_metrics.keys() - {"ratio_error"}:
            mean = sum(metrics[name] for _, metrics in parts) / num_minibatches
            torch.testing.assert_close(mean, whole_metrics[name])


@pytest.mark.parametrize("env", [{}, {"action": "box"}, {"action": "multidiscrete", "masked": True}, {"masked": True}])
@pytest.mark.parametrize("bptt_length", [0, 4])
def test_04_first_ratio_is_one(script, env, bptt_length):
    args, agent, space, rollouts, _ = play(script, env=MIXED | env, num_rollouts=3, bptt_length=bptt_length)
    for rollout in rollouts:
        segments = script.cut_segments(rollout.start, bptt_length)
        for rows in script.minibatches(segments, 2, 3, torch.Generator()):
            _, metrics = script.ppo_loss(agent, rollout, rows, space, args, 1.0)
            assert metrics["ratio_error"] < 1e-5


def test_05_truncation_bootstraps_with_the_right_state(script):
    """V after every step, by playing each episode again from its first observation."""
    _, agent, _, rollouts, carry = play(script, env=MIXED | {"lengths": (3, 7, 1)})
    rollout = rollouts[1]
    values = script.next_values(agent, rollout, carry)
    checked = 0
    for n in range(3):
        state = rollout.state[0, n][None]
        for t in range(24):
            if rollout.start[t, n]:
                state = agent.initial_state(1)
            *_, state = agent.step(rollout.obs[t, n][None], state)
            final = agent.step(rollout.next_obs[t, n][None], state)[2]
            if not rollout.terminated[t, n]:
                expected = agent.return_stats.mean + agent.return_stats.std * final
                assert values[t, n].item() == pytest.approx(expected.item(), abs=1e-5)
                checked += bool(rollout.truncated[t, n])
    assert checked > 3


def test_05_terminated_wins_over_truncated(script):
    from common.gae import gae

    one, yes, no = torch.ones(1, 1), torch.tensor([[True]]), torch.tensor([[False]])
    assert gae(one, one, 100 * one, yes, yes, 0.9, 0.9)[1].item() == 1
    assert gae(one, one, 100 * one, no, yes, 0.9, 0.9)[1].item() == 91


def test_05_next_observations_are_the_true_ones(script):
    """Within an episode the next row's, at its end the final one; never the next episode's first."""
    _, _, _, rollouts, _ = play(script)
    rollout = rollouts[0]
    for t in range(24):
        for n in range(3):
            assert rollout.next_obs[t, n, 0] == rollout.obs[t, n, 0] + 1  # the toy counts its steps
            assert rollout.next_obs[t, n, 1] >= rollout.obs[t, n, 2]  # … and remembers its noise
            if t < 23:
                assert (rollout.start[t + 1, n] == rollout.done[t, n]).all()
                assert (rollout.obs[t + 1, n, 0] == 0) == rollout.done[t, n]


def test_06_states_are_those_of_a_step_by_step_replay(script):
    _, agent, _, rollouts, _ = play(script, num_rollouts=3)
    state = agent.initial_state(3)
    for rollout in rollouts:
        for t in range(24):
            state = torch.where(rollout.start[t][:, None, None, None], 0, state)
            torch.testing.assert_close(rollout.state[t], state, atol=1e-6, rtol=0)
            *_, state = agent.step(rollout.obs[t], state)
    assert rollouts[2].start.any() and not rollouts[1].start.any()


def test_06_evaluation_is_a_plain_loop_over_single_environments(script):
    args, agent, space, _, _ = play(script, num_rollouts=0)
    args.eval_episodes, args.num_envs = 7, 3
    evaluation = script.evaluate(agent, args, record=True)
    expected, observations = [], []
    for n in range(3):
        env = script.make_env(args)
        obs, _ = env.reset(seed=args.seed + 1_000_000_000 + n)
        for episode in range(3 if n == 0 else 2):
            if episode:
                obs, _ = env.reset()
            state, total, length, done, seen = agent.initial_state(1), 0, 0, False, [obs]
            while not done:
                _, params, _, state = agent.step(torch.from_numpy(obs)[None], state)
                obs, reward, terminated, truncated, _ = env.step(params.argmax().item() + space.start)
                total, length, done = total + reward, length + 1, terminated or truncated
                seen.append(obs)
            expected.append((length, total))
            observations.append(np.stack(seen))
    got = sorted(zip(evaluation.lengths.tolist(), evaluation.returns.tolist(), strict=True))
    np.testing.assert_allclose(got, sorted(expected), rtol=1e-5)
    for episode in evaluation.episodes:
        assert any(episode.shape == seen.shape and np.allclose(episode, seen) for seen in observations)


def test_06_memoryless_policy_forgets(script):
    args, agent, _, _, _ = play(script, num_rollouts=0, env={"lengths": (30,)})
    args.eval_episodes = 3
    calls, step = [], agent.step
    agent.step = lambda obs, state, mask=None: calls.append(state.abs().sum().item()) or step(obs, state, mask)
    script.evaluate(agent, args, "memoryless")
    assert calls and not any(calls)
    calls.clear()
    script.evaluate(agent, args)
    assert sum(map(bool, calls)) == len(calls) - 1


@pytest.mark.parametrize("action", ["discrete", "multidiscrete"])
def test_07_masked_actions_are_never_taken_and_get_no_gradient(script, action):
    args, agent, space, (_, rollout), _ = play(script, env=MIXED | {"action": action, "masked": True})
    assert not rollout.action_mask.all()
    offsets = torch.tensor([0] if action == "discrete" else [0, 2])
    assert rollout.action_mask.gather(-1, rollout.action + offsets).all()
    params = torch.randn(5, 6 if action == "multidiscrete" else 3, requires_grad=True)
    mask = torch.ones_like(params, dtype=torch.bool)
    mask[:, 1] = False
    masked = params.masked_fill(~mask, torch.finfo(params.dtype).min)
    logprob, entropy = script.logprob_entropy(masked, torch.zeros(5, len(offsets), dtype=torch.long), space)
    (logprob.sum() + entropy.sum()).backward()
    assert params.grad.isfinite().all() and (params.grad[:, 1] == 0).all() and (params.grad[:, 2] != 0).all()
    args.eval_episodes = 5
    for policy in ("agent", "random", "memoryless"):
        script.evaluate(agent, args, policy)  # the toy would not complain, so ask the mask
    random = script.sample(mask.float().log(), space, torch.Generator().manual_seed(0))[0]
    assert (random[:, 0] != 1).all()


def test_actions_stay_within_every_bound_there_is(script):
    space = Box(np.array([0, -np.inf, -2], np.float32), np.array([np.inf, 1, 2], np.float32))
    actions = script.env_action(torch.tensor([[-3.0, 5.0, 0.5], [3.0, -5.0, 9.0]]), space)
    np.testing.assert_array_equal(actions, [[0, 1, 1], [3, -5, 2]])


def assert_statistics_are_those_of_all_data(script):
    stats, batches = script.RunningMeanStd((3,)), [torch.randn(n, 3) * 4 + 7 + n / 50 for n in (5, 1, 300)]
    for batch in batches:
        stats.update(batch)
    everything = torch.cat(batches)
    torch.testing.assert_close(stats.mean, everything.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.std, everything.std(0, unbiased=False), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.denormalize(stats.normalize(everything)), everything)


def test_08_statistics_are_those_of_all_data(script):
    assert_statistics_are_those_of_all_data(script)


def test_08_popart_keeps_the_values(script):
    _, agent, _, (_, rollout), _ = play(script)

    def values():
        return agent.return_stats.denormalize(agent.critic(features).squeeze(-1))

    features = torch.randn(40, 8)
    before, bias = values(), agent.critic.bias.item()
    agent.update_statistics(rollout.obs.flatten(0, 1), torch.randn(100) * 50 + 300)
    torch.testing.assert_close(values(), before, atol=1e-3, rtol=1e-5)
    assert agent.critic.bias.item() != bias


def test_09_refreshed_states_are_those_of_the_new_weights(script):
    _, agent, _, (_, rollout), _ = play(script)
    stored = rollout.state.clone()
    script.refresh_states(agent, rollout)
    torch.testing.assert_close(rollout.state, stored, atol=1e-6, rtol=0)
    disturb(agent)
    script.refresh_states(agent, rollout)
    state = stored[0]
    for t in range(24):
        if t:
            state = torch.where(rollout.start[t][:, None, None, None], 0, state)
        torch.testing.assert_close(rollout.state[t], state, atol=1e-6, rtol=0)
        *_, state = agent.step(rollout.obs[t], state)
    assert (rollout.state - stored).abs().max() > 1e-3


def test_10_gaussian_density_by_numerical_integration(script):
    space = Box(-1, 1, (2,))
    params = torch.tensor([0.3, -0.8, -0.5, 0.4], dtype=torch.float64)
    axis = torch.linspace(-12, 12, 1201, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    logprob, entropy = script.logprob_entropy(params.expand(len(grid), 4), grid, space)
    cell = (axis[1] - axis[0]) ** 2
    assert (logprob.exp().sum() * cell).item() == pytest.approx(1, abs=1e-6)
    assert (-(logprob.exp() * logprob).sum() * cell).item() == pytest.approx(entropy[0].item(), abs=1e-6)


def test_10_samples_follow_their_log_probabilities(script):
    generator = torch.Generator().manual_seed(0)
    for space in (Discrete(3), MultiDiscrete([2, 3])):
        sizes = [3] if isinstance(space, Discrete) else [2, 3]
        params = torch.randn(sum(sizes), generator=generator).expand(40_000, -1)
        action, logprob = script.sample(params, space, generator)
        for choice in torch.cartesian_prod(*(torch.arange(n) for n in sizes)).reshape(-1, len(sizes)):
            chosen = (action == choice).all(-1)
            assert chosen.float().mean().item() == pytest.approx(logprob[chosen][0].exp().item(), abs=0.01)
        best, _ = script.sample(params[:1], space)
        assert [logits.argmax().item() for logits in params[0].split(sizes)] == best[0].tolist()
    params = torch.tensor([1.0, -2.0, 0.5, -1.0]).expand(40_000, 4)
    action, logprob = script.sample(params, Box(-1, 1, (2,)), generator)
    torch.testing.assert_close(action.mean(0), torch.tensor([1.0, -2.0]), atol=0.03, rtol=0)
    torch.testing.assert_close(action.std(0).log(), torch.tensor([0.5, -1.0]), atol=0.03, rtol=0)
    torch.testing.assert_close(logprob, Normal(params[:, :2], params[:, 2:].exp()).log_prob(action).sum(-1))


def test_10_box_actions_are_scaled_and_clipped_to_their_bounds(script):
    space = Box(np.array([-2, 0, -np.inf], np.float32), np.array([2, 10, np.inf], np.float32))
    action = torch.tensor([[0.0, 0.0, 5.0], [-1.0, 1.0, -5.0], [-9.0, 9.0, 0.1]])
    expected = [[0, 5, 5], [-2, 10, -5], [-2, 10, 0.1]]
    np.testing.assert_allclose(script.env_action(action, space), expected, rtol=1e-6)
    assert script.env_action(torch.tensor([[2]]), Discrete(3, start=5)).tolist() == [7]
