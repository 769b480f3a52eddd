"""ppo_lstm_tamiyo.py: the recurrent update against a slow loop, and what evaluates policies by brute force. Numbers are
the details of docs/."""

import copy
import json

import numpy as np
import pytest
import torch
from gymnasium.spaces import Discrete
from helpers import MIXED, assert_statistics_are_those_of_all_data, disturb, reference_loss
from toys import gradients, tiny_hosts

from environments import hosts
from environments.hosts import CULL, FOSSILIZE, GERMINATE, OBSERVATION, WAIT, Morphogenesis, Stage


@pytest.fixture
def quick(monkeypatch):
    tiny_hosts(monkeypatch, minibatches=2)


def rollouts_of(tamiyo, num_steps=24, num_rollouts=2, seed=1, dtype=torch.float32, env=MIXED, **changes):
    """A few rollouts of an untrained agent on the toy, and what belongs to them."""
    defaults = {"num_envs": 3, "num_steps": num_steps, "lstm_hidden": 8, "seed": seed}
    args = tamiyo.Args(env_id="toys:Toy-v0", env_kwargs=json.dumps(env), **defaults | changes)
    torch.manual_seed(seed)
    envs = tamiyo.make_envs(args, args.num_envs)
    agent = tamiyo.Agent(4, envs.single_action_space, args)
    torch.nn.init.normal_(agent.actor[-1].weight)  # so that the policy depends on the features
    agent.obs_stats.update(torch.randn(50, 4) * 3 + 1)
    agent.return_stats.update(torch.randn(50) * 5 + 2)
    carry, generator, rollouts = tamiyo.reset(envs, agent, seed), torch.Generator().manual_seed(seed), []
    for _ in range(num_rollouts):
        rollout = tamiyo.Rollout(args, agent, 4, carry)
        tamiyo.collect(envs, agent, rollout, carry, generator, args.reset_every)
        rollout.advantages, rollout.returns = torch.randn(2, *rollout.reward.shape)
        rollouts.append(rollout)
    agent.to(dtype)
    for rollout in rollouts:
        for name, x in vars(rollout).items():
            setattr(rollout, name, x.to(dtype) if x is not None and x.is_floating_point() else x)
    return args, agent, rollouts, carry


def whole_loss(tamiyo, agent, rollout, args):
    segments = tamiyo.cut_segments(rollout.start, args.bptt_length)
    return tamiyo.ppo_loss(agent, rollout, segments, args, rollout.reward.numel())


def assert_is_the_loop(tamiyo, agent, rollout, args):
    disturb(agent)
    expected = reference_loss(agent, rollout, Discrete(3), args)
    expected_gradient = gradients(expected, agent)
    loss, _ = whole_loss(tamiyo, agent, rollout, args)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
    torch.testing.assert_close(gradients(loss, agent), expected_gradient, atol=1e-9, rtol=0)


@pytest.mark.parametrize("bptt_length", [0, 1, 8, 1000])
@pytest.mark.parametrize("lengths", [(1,), (25,), (3, 1, 7, 40, 2), (100,)])
def test_01_segments_are_the_step_by_step_loop(tamiyo, lengths, bptt_length):
    for seed in range(2):
        env = {"lengths": lengths, "ends": ("truncated", "terminated"), "masked": True}
        args, agent, (_, rollout), _ = rollouts_of(
            tamiyo, seed=seed, dtype=torch.float64, env=env, bptt_length=bptt_length
        )
        assert_is_the_loop(tamiyo, agent, rollout, args)


@pytest.mark.parametrize(
    "changes",
    [{"lstm_layers": 2}, {"recurrent": False}, {"lstm_layer_norm": True}, {"reset_every": 3}, {"reset_every": 1}],
)
def test_01_for_every_network(tamiyo, changes):
    args, agent, (_, rollout), _ = rollouts_of(tamiyo, dtype=torch.float64, **changes)
    assert_is_the_loop(tamiyo, agent, rollout, args)


@pytest.mark.parametrize("lengths", [(100,), (7, 10)])
def test_01_gradient_reaches_back_exactly_as_far_as_it_should(tamiyo, lengths):
    _, agent, (rollout, _), _ = rollouts_of(tamiyo, dtype=torch.float64, env={"lengths": lengths})
    for bptt_length in (0, 5):
        index, mask = tamiyo.cut_segments(rollout.start, bptt_length)
        obs = rollout.obs.clone().requires_grad_()
        _, values = agent.unroll(obs.flatten(0, 1)[index], rollout.state.flatten(0, 1)[index[0]])
        last = values[mask & (index == 23 * 3)]  # V at t = 23 of environment 0
        reach = torch.autograd.grad(last.sum(), obs)[0][:, 0].abs().sum(-1) > 0
        episode_start = 0 if lengths == (100,) else 17
        begin = episode_start + (23 - episode_start) // bptt_length * bptt_length if bptt_length else episode_start
        assert reach.tolist() == [begin <= t <= 23 for t in range(24)]


def test_02_float32_gradient(tamiyo):
    args, agent, (_, rollout), _ = rollouts_of(tamiyo, num_steps=64)
    disturb(agent)
    expected = gradients(reference_loss(agent, rollout, Discrete(3), args), agent)
    gradient = gradients(whole_loss(tamiyo, agent, rollout, args)[0], agent)
    assert (gradient - expected).norm() / expected.norm() < 1e-5


def test_03_padding_has_no_influence(tamiyo):
    args, agent, (rollout, _), _ = rollouts_of(tamiyo, dtype=torch.float64)
    disturb(agent)
    index, mask = tamiyo.cut_segments(rollout.start, 0)
    poison = int(index[0, 0])
    index, mask = index[:, 1:], mask[:, 1:]
    expected = gradients(tamiyo.ppo_loss(agent, rollout, tamiyo.Segments(index, mask), args, 72)[0], agent)
    assert poison not in index[mask]
    for name in ("obs", "logprob", "value", "advantages", "returns"):
        getattr(rollout, name).flatten(0, 1)[poison] = 1e9
    poisoned = tamiyo.Segments(torch.where(mask, index, poison), mask)
    gradient = gradients(tamiyo.ppo_loss(agent, rollout, poisoned, args, 72)[0], agent)
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("bptt_length", [0, 7, 8])
def test_03_every_step_weighs_the_same_in_any_minibatch(tamiyo, bptt_length):
    """Also where 25 is no multiple of bptt_length, or bptt_length is longer than the episode."""
    env = {"lengths": (25, 3)}
    args, agent, (_, rollout), _ = rollouts_of(tamiyo, dtype=torch.float64, env=env, bptt_length=bptt_length)
    disturb(agent)
    whole, whole_metrics = whole_loss(tamiyo, agent, rollout, args)
    expected = gradients(whole, agent)
    for num_minibatches in (1, 2, 3):
        segments = tamiyo.cut_segments(rollout.start, bptt_length)
        dealt = list(tamiyo.minibatches(segments, num_minibatches, torch.Generator().manual_seed(0)))
        assert sorted(torch.cat([index[mask] for index, mask in dealt]).tolist()) == list(range(72))
        parts = [tamiyo.ppo_loss(agent, rollout, part, args, 72 / num_minibatches) for part in dealt]
        loss = sum(loss for loss, _ in parts) / num_minibatches
        torch.testing.assert_close(gradients(loss, agent), expected, atol=1e-12, rtol=0)
        for name in whole_metrics.keys() - {"ratio_error"}:
            mean = sum(metrics[name] for _, metrics in parts) / num_minibatches
            torch.testing.assert_close(mean, whole_metrics[name])


@pytest.mark.parametrize("changes", [{}, {"reset_every": 4}, {"bptt_length": 5}, {"env": MIXED | {"masked": True}}])
def test_04_first_ratio_is_one(tamiyo, changes):
    args, agent, rollouts, _ = rollouts_of(tamiyo, num_rollouts=3, **changes)
    for rollout in rollouts:
        assert whole_loss(tamiyo, agent, rollout, args)[1]["ratio_error"] < 1e-5


@pytest.mark.parametrize("reset_every", [0, 3])
def test_05_truncation_bootstraps_with_the_right_state(tamiyo, reset_every):
    """V after every step, by playing each episode again from its first observation."""
    changes = {"env": MIXED | {"lengths": (3, 7, 1)}, "reset_every": reset_every}
    _, agent, rollouts, carry = rollouts_of(tamiyo, num_steps=24, num_rollouts=1, **changes)
    rollout, checked = rollouts[0], 0
    values = tamiyo.next_values(agent, rollout, carry)
    for n in range(3):
        age = 0
        for t in range(24):
            if rollout.start[t, n]:
                state = agent.initial_state(1)
            *_, state = agent.step(rollout.obs[t, n][None], state)
            age += 1
            if reset_every and age % reset_every == 0:
                state = agent.initial_state(1)
            age *= not (rollout.terminated[t, n] or rollout.truncated[t, n])
            _, final, _ = agent.step(rollout.next_obs[t, n][None], state)
            if not rollout.terminated[t, n]:
                expected = agent.return_stats.mean + agent.return_stats.std * final
                assert values[t, n].item() == pytest.approx(expected.item(), abs=1e-5)
                checked += bool(rollout.truncated[t, n])
    assert checked > 3


@pytest.mark.parametrize("reset_every", [0, 4])
def test_06_states_are_stored_before_the_step(tamiyo, reset_every):
    """… and zero at episode starts, and every `reset_every` steps of an episode."""
    _, agent, rollouts, _ = rollouts_of(tamiyo, num_rollouts=3, reset_every=reset_every)
    state, age = agent.initial_state(3), torch.zeros(3)
    for rollout in rollouts:
        for t in range(24):
            forget = (age == 0) | ((age % reset_every == 0) if reset_every else False)
            assert rollout.start[t].tolist() == forget.tolist()
            state = torch.where(forget[:, None, None, None], 0, state)
            torch.testing.assert_close(rollout.state[t], state, atol=1e-6, rtol=0)
            *_, state = agent.step(rollout.obs[t], state)
            age = torch.where(rollout.terminated[t] | rollout.truncated[t], 0, age + 1)


def test_07_masked_actions_are_never_taken(tamiyo):
    _, _, (rollout, _), _ = rollouts_of(tamiyo, env=MIXED | {"masked": True})
    assert not rollout.action_mask.all()
    assert rollout.action_mask.gather(-1, rollout.action[..., None]).all()


def test_08_statistics_are_those_of_all_data(tamiyo):
    assert_statistics_are_those_of_all_data(tamiyo)


def test_08_beyond_their_memory_statistics_forget(tamiyo):
    """From 100 samples on, a batch of 100 weighs one half."""
    stats = tamiyo.RunningMeanStd((), memory=100)
    for mean in (0.0, 0.0, 0.0, 8.0, 8.0):
        stats.update(torch.full((100,), mean))
    assert stats.mean == 6 and stats.count == 100


def test_08_popart_keeps_the_values(tamiyo):
    _, agent, (_, rollout), _ = rollouts_of(tamiyo)

    def values():
        return agent.return_stats.denormalize(agent.critic(features).squeeze(-1))

    features = torch.randn(40, 8)
    before, bias = values(), agent.critic[-1].bias.item()
    agent.update_statistics(rollout.obs.flatten(0, 1), torch.randn(100) * 50 + 300)
    torch.testing.assert_close(values(), before, atol=1e-3, rtol=1e-5)
    assert agent.critic[-1].bias.item() != bias


def test_09_refreshed_states_are_those_of_the_new_weights(tamiyo):
    _, agent, (_, rollout), _ = rollouts_of(tamiyo, reset_every=5)
    stored = rollout.state.clone()
    tamiyo.refresh_states(agent, rollout)
    torch.testing.assert_close(rollout.state, stored, atol=1e-6, rtol=0)
    disturb(agent)
    tamiyo.refresh_states(agent, rollout)
    state = stored[0]
    for t in range(24):
        if t:
            state = torch.where(rollout.start[t][:, None, None, None], 0, state)
        torch.testing.assert_close(rollout.state[t], state, atol=1e-6, rtol=0)
        *_, state = agent.step(rollout.obs[t], state)


# --- policies and their evaluation


def an_agent(tamiyo, **changes):
    args = tamiyo.Args(num_envs=4, eval_episodes=6, lstm_hidden=8, **changes)
    torch.manual_seed(1)
    agent = tamiyo.Agent(len(OBSERVATION), Discrete(8), args)
    torch.nn.init.normal_(agent.actor[-1].weight)
    return agent, args


def test_10_sampled_actions_are_evaluated_too(tamiyo, quick):
    agent, args = an_agent(tamiyo, eval_deterministic=False)
    first, second = tamiyo.evaluate(agent, args), tamiyo.evaluate(agent, args)
    np.testing.assert_array_equal(first.actions, second.actions)
    args.eval_deterministic = True
    assert (tamiyo.evaluate(agent, args).actions != first.actions).any()


@pytest.mark.parametrize("reset_every", [0, 1, 3])
def test_10_evaluation_is_a_plain_loop_over_single_hosts(tamiyo, quick, reset_every):
    agent, args = an_agent(tamiyo)
    played = tamiyo.evaluate(agent, args, reset_every=reset_every)
    for e in range(6):
        env = Morphogenesis(1)
        obs, infos = env.reset(seed=[1_000_000_000 + e])
        state, total = agent.initial_state(1), 0
        for t in range(25):
            if reset_every and t % reset_every == 0:
                state = agent.initial_state(1)
            with torch.no_grad():
                logits, _, state = agent.step(torch.from_numpy(obs), state, torch.from_numpy(infos["action_mask"]))
            assert played.stages[e, t].tolist() == infos["stage"][0].tolist()
            action = logits.argmax().item()
            assert played.actions[e, t] == action
            obs, reward, *_, infos = env.step(np.array([action]))
            total += reward[0]
        assert played.returns[e] == pytest.approx(total, abs=1e-3) and played.lengths[e] == 25
        correct = played.info["test_correct"][e] != infos["final_info"]["test_correct"][0]
        assert correct.mean() < 0.04  # rounding may tip one


def test_10_all_seeds_are_evaluated_on_the_same_hosts(tamiyo, quick):
    _, args = an_agent(tamiyo)
    _, other = an_agent(tamiyo, seed=5)
    first, second = (tamiyo.evaluate(None, x, "never") for x in (args, other))
    np.testing.assert_array_equal(first.info["test_correct"], second.info["test_correct"])
    np.testing.assert_array_equal(first.info["test_accuracy"], first.info["bare_test_accuracy"])
    assert first.returns.tolist() == [0] * 6 and (first.actions == WAIT).all()


def test_11_reference_policies_by_hand(tamiyo, quick):
    _, args = an_agent(tamiyo)
    for policy in ("random", "always", "schedule", "heuristic"):
        played = tamiyo.evaluate(None, args, policy)
        for actions, stages in zip(played.actions, played.stages, strict=True):
            grown = 0
            for t, (action, slots) in enumerate(zip(actions, stages, strict=True)):
                live = [stage for stage in slots if stage in hosts.LIVE]
                if policy != "random" and Stage.HOLDING in live:
                    assert action == FOSSILIZE or (policy == "heuristic" and action == CULL)
                elif policy == "always":
                    assert (action == GERMINATE + 4) == (not live and Stage.DORMANT in slots) and action != CULL
                elif policy == "schedule":
                    due = grown < len(tamiyo.SCHEDULE) and t >= tamiyo.SCHEDULE[grown][0]
                    expected = GERMINATE + tamiyo.SCHEDULE[grown][1] if due else WAIT
                    assert action == (expected if not live and Stage.DORMANT in slots else WAIT)
                grown += GERMINATE <= action < FOSSILIZE
    assert {WAIT, GERMINATE, CULL} <= set(tamiyo.evaluate(None, args, "random").actions.flatten().tolist())


def test_11_the_heuristic_looks_at_plateau_and_contribution(tamiyo):
    order, rows = list(OBSERVATION), []
    for plateau, stage, contribution in [
        (0, "no_seed", 0),
        (1, "no_seed", 0),
        (0, "blending", -0.1),
        (0, "holding", 0.1),
    ]:
        obs = np.zeros(len(order))
        obs[[order.index("plateau"), order.index(stage), order.index("contribution")]] = plateau / 25, 1, contribution
        rows.append(obs)
    grow, cull, keep = [1, 1, 1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0, 1, 1]
    mask = np.array([grow, grow, cull, keep], bool)
    grown = np.array([0, 3, 1, 1])
    actions = tamiyo.reference_action("heuristic", np.array(rows), mask, grown, np.random.default_rng(0))
    assert actions.tolist() == [WAIT, GERMINATE + 3, CULL, FOSSILIZE]
    rows[3][order.index("contribution")] = -0.1
    assert tamiyo.reference_action("heuristic", np.array(rows), mask, grown, None)[3] == CULL


def test_11_static_hosts_have_the_modules_from_the_start(tamiyo, quick, monkeypatch):
    agent, args = an_agent(tamiyo)
    learned = tamiyo.evaluate(agent, args)
    grown = np.where(np.arange(12).reshape(6, 2) % 3 == 0, 2, -1)
    learned.info["modules"][:] = grown
    real = tamiyo.play
    monkeypatch.setattr(
        tamiyo,
        "play",
        lambda args, seeds, policy, modules=None: learned if modules is None else real(args, seeds, policy, modules),
    )
    static = tamiyo.evaluate(agent, args, "static")
    assert (static.info["modules"] == grown).all() and (static.actions == WAIT).all()
    assert (static.stages[:, 0] == np.where(grown >= 0, Stage.FOSSILIZED, Stage.DORMANT)).all()


def test_12_forked_culls_by_copying_the_host(tamiyo, quick, monkeypatch):
    """The environment as it stood before each cull, copied and played to the end with and without it."""
    _, args = an_agent(tamiyo)
    args.eval_episodes, seen = 3, []
    real_choice = tamiyo.reference_action

    def patient(*given):  # culls sometimes, so that some seeds live long
        action = real_choice(*given)
        return np.where((action == CULL) & (given[-1].random(len(action)) < 0.8), WAIT, action)

    monkeypatch.setattr(tamiyo, "reference_action", patient)
    played = tamiyo.evaluate(None, args, "random")
    expected = {}
    for e in range(3):
        env = Morphogenesis(1)
        env.reset(seed=[1_000_000_000 + e])
        for t, action in enumerate(played.actions[e]):
            if action == CULL:
                ends = []
                for first in (CULL, WAIT):
                    fork = copy.deepcopy(env)
                    *_, infos = fork.step(np.array([first]))
                    for _ in range(24 - t):
                        keep = first == WAIT and infos["action_mask"][0, FOSSILIZE]
                        *_, infos = fork.step(np.array([FOSSILIZE if keep else WAIT]))
                    ends.append([infos["final_info"][name][0] for name in ("test_accuracy", "test_loss", "fossilized")])
                expected[e, t] = ends
            env.step(np.array([action]))
    real = tamiyo.play
    monkeypatch.setattr(tamiyo, "play", lambda *given: seen.append(real(*given)) or seen[-1])
    better = tamiyo.cull_outcomes(args, played)
    culls = np.random.default_rng(args.seed).permutation(np.argwhere(played.actions == CULL))
    assert len(culls) == len(expected)
    outcomes = iter(better)
    for i, (e, t) in enumerate(culls):
        (culled, culled_loss, without), (kept, kept_loss, permanent) = expected[e, t]
        np.testing.assert_allclose(seen[0].info["test_loss"][2 * i : 2 * i + 2], [culled_loss, kept_loss], atol=1e-3)
        if permanent > without:
            outcome = next(outcomes)
            assert abs(culled - kept) < 0.01 or outcome == (culled > kept)
    assert next(outcomes, None) is None and len(better) >= 3


def test_12_hosts_that_are_not_culled_have_no_outcome(tamiyo, quick):
    _, args = an_agent(tamiyo)
    assert len(tamiyo.cull_outcomes(args, tamiyo.evaluate(None, args, "never"))) == 0


def test_12_culls_too_late_to_matter_are_left_out(tamiyo, quick):
    """Grown at 16, a seed could never become permanent; grown at 15, it just could."""
    _, args = an_agent(tamiyo)
    played = tamiyo.evaluate(None, args, "never")
    for e, epoch in enumerate((15, 16)):
        played.actions[e, [epoch, epoch + 3]] = GERMINATE, CULL
    assert len(tamiyo.cull_outcomes(args, played)) == 1


def test_pictures_show_what_was_done(tamiyo, quick, tmp_path):
    _, args = an_agent(tamiyo)
    played = tamiyo.evaluate(None, args, "random")
    figure = tamiyo.actions_figure(played)
    shares, stages = (axis.images[0].get_array() for axis in figure.axes[:2])
    np.testing.assert_allclose(shares.sum(0), 1)
    assert shares[CULL, 3] == (played.actions[:, 3] == CULL).mean()
    assert stages.shape == (12, 25) and stages[3, 7] == played.stages[1, 7, 1]
    figure.savefig(tmp_path / "actions.png")
