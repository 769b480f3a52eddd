"""The forecasts: targets, losses and skill against brute force, and their independence of PPO."""

import json
from collections import deque

import numpy as np
import pytest
import torch
from test_exact import disturb, play
from toys import Pendulum, same_but_for_time, scalars

SMALL = {"num_envs": 2, "num_minibatches": 2, "lstm_hidden": 8, "eval_episodes": 4, "checkpoint_every": 3}


def small_run(script, tmp_path, name, **changes):
    env_kwargs = json.dumps({"lengths": [5, 9, 30], "ends": ["terminated", "truncated"]})
    defaults = {"env_id": "toys:Toy-v0", "env_kwargs": env_kwargs, "num_steps": 16, "total_timesteps": 32 * 8}
    args = script.Args(**SMALL | defaults | {"horizon": 20, "runs_dir": str(tmp_path / name)} | changes)
    return script.train(args)


def walk(rollouts):
    """What really followed each step of environment n: [(t, [observations to the episode's end])] over all rollouts."""
    next_obs = torch.cat([rollout.next_obs for rollout in rollouts])
    done = torch.cat([rollout.done for rollout in rollouts])
    futures = {}
    for n in range(done.shape[1]):
        for t in range(len(done)):
            futures[t, n] = []
            for u in range(t, len(done)):
                futures[t, n].append(next_obs[u, n])
                if done[u, n]:
                    break
    return futures


@pytest.mark.parametrize("lengths", [(1,), (5,), (3, 1, 7, 40, 2), (100,)])
@pytest.mark.parametrize("horizon", [1, 9, 30])
def test_11_targets_are_a_walk_over_the_episodes(script, lengths, horizon):
    env = {"lengths": lengths, "ends": ("terminated", "truncated")}
    args, _, _, rollouts, _ = play(script, num_steps=12, num_rollouts=4, env=env, horizon=horizon)
    length = script.history_length(args)
    history, futures = deque(rollouts[:length], maxlen=length), walk(rollouts)
    index = torch.arange(12 * 3)
    target, mask = script.future(history, index, horizon)
    for i in index.tolist():
        expected = futures[i // 3, i % 3][:horizon]
        assert mask[i].tolist() == [k < len(expected) for k in range(horizon)]
        torch.testing.assert_close(target[i, : len(expected)], torch.stack(expected), rtol=0, atol=0)


def test_11_targets_include_the_final_observation_and_cross_rollouts(script):
    _, _, _, rollouts, _ = play(script, num_steps=12, num_rollouts=4, env={"lengths": (20,)}, horizon=30)
    target, mask = script.future(deque(rollouts), torch.tensor([11 * 3]), 30)
    assert mask[0].sum() == 9 and target[0, :9, 0].tolist() == list(range(12, 21))  # the toy counts its steps


@pytest.mark.parametrize("freeze_extractor", [True, False])
def test_11_loss_is_the_mean_over_real_targets(script, freeze_extractor):
    """Over a whole rollout, and with features that a step-by-step replay gives."""
    args, agent, _, rollouts, _ = play(
        script, num_steps=12, num_rollouts=4, dtype=torch.float64, freeze_extractor=freeze_extractor
    )
    args.predictor_samples = 10**6
    disturb(agent) if not freeze_extractor else None
    predictor = script.Predictor(8, 4, 30).double()
    torch.nn.init.normal_(predictor.head.weight)
    rollout, futures, errors = rollouts[0], walk(rollouts), []
    for n in range(3):
        for t in range(12):
            if freeze_extractor or t == 0 or rollout.start[t, n]:
                state = rollout.state[t, n][None]
            features, _, _, state = agent.step(rollout.obs[t, n][None], state)
            now = agent.normalize_obs(rollout.obs[t, n])
            forecast = predictor(features, now[None])[0]
            for k, obs in enumerate(futures[t, n][:30]):
                errors.append((forecast[k] - agent.normalize_obs(obs)).square().mean())
    expected = torch.stack(errors).mean()
    loss = script.predictor_loss(agent, predictor, deque(rollouts), args, torch.Generator())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
    weights = list(predictor.parameters()) + ([] if freeze_extractor else agent.extractor_parameters())
    for got, want in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(got, want, atol=1e-9, rtol=0)
    agent.zero_grad()
    script.predictor_loss(agent, predictor, deque(rollouts), args, torch.Generator()).backward()
    assert all((weight.grad is None) == freeze_extractor for weight in agent.extractor_parameters())


@pytest.mark.parametrize("horizon", [1, 2, 5, 50, 200])
def test_11_forecasts_are_straight_lines_between_knots(script, horizon):
    predictor = script.Predictor(6, 3, horizon)
    torch.nn.init.normal_(predictor.head.weight)
    features, obs = torch.randn(7, 6), torch.randn(7, 3)
    knots = sorted({min(horizon, round(2 ** (i / 2))) for i in range(2 * 8 + 1)})
    hidden = torch.relu(predictor.hidden(torch.cat((features, obs), -1)))
    changes = predictor.head(hidden).reshape(7, 3, len(knots)).detach().numpy()
    forecast = predictor(features, obs).detach().numpy()
    assert forecast.shape == (7, horizon, 3) and knots[0] == 1 and knots[-1] == horizon
    for b in range(7):
        for d in range(3):
            line = obs[b, d].item() + np.interp(np.arange(1, horizon + 1), knots, changes[b, d])
            np.testing.assert_allclose(forecast[b, :, d], line, rtol=1e-4, atol=1e-5)


def test_11_skill_by_hand(script):
    """Means over entries, then over all moments of all episodes that have a future; against the best trivial one."""
    _, agent, _, _, _ = play(script, num_rollouts=0, horizon=5)
    predictor = script.Predictor(8, 4, 5)
    torch.nn.init.normal_(predictor.head.weight, std=0.1)
    episodes = [torch.randn(8, 4).cumsum(0), torch.randn(3, 4), torch.linspace(0, 9, 40)[:, None].expand(40, 4)]
    rmse, skill = script.forecast_skill(agent, predictor, episodes)
    for k in range(1, 6):
        errors = []
        for episode in episodes:
            obs, state = agent.normalize_obs(episode), agent.initial_state(1)
            for t in range(len(episode) - k):
                features, _, _, state = agent.step(episode[t][None], state)
                last = obs[t] - obs[max(t - 1, 0)]
                forecasts = predictor(features, obs[t][None])[0, k - 1], obs[t], obs[t] + k * last, torch.zeros(4)
                errors.append([float((forecast - obs[t + k]).square().mean()) for forecast in forecasts])
        mean = np.mean(errors, 0)
        assert rmse[k - 1].item() == pytest.approx(mean[0] ** 0.5, rel=1e-4)
        assert skill[k - 1].item() == pytest.approx(1 - mean[0] / min(mean[1:]), rel=1e-3)
    untrained = script.forecast_skill(agent, script.Predictor(8, 4, 5), episodes)[1]
    assert (untrained <= 0).all()  # it says that nothing changes


@pytest.mark.parametrize("changes", [{}, {"env_id": "CartPole-v1", "env_kwargs": "{}"}])
def test_12_ppo_is_bit_identical_with_and_without_the_frozen_predictor(script, tmp_path, changes):
    runs = [small_run(script, tmp_path, name, predictor=name == "on", **changes) for name in ("on", "off")]
    on, off = (scalars(run["run_dir"]) for run in runs)
    assert any(tag.startswith("predictor/skill") for tag in on) and "predictor/loss" in on
    same_but_for_time({tag: x for tag, x in on.items() if not tag.startswith("predictor/")}, off)


def test_12_joint_training_moves_the_extractor(script, tmp_path):
    runs = [small_run(script, tmp_path, str(joint), freeze_extractor=not joint) for joint in (True, False)]
    joint, frozen = (scalars(run["run_dir"])["losses/value_loss"] for run in runs)
    assert joint != frozen


def test_13_same_seed_same_scalars(script, tmp_path):
    runs = [small_run(script, tmp_path, name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    a, b, c = (scalars(run["run_dir"]) for run in runs)
    same_but_for_time(a, b)
    assert a["losses/value_loss"] != c["losses/value_loss"]


def test_11_learns_to_forecast_a_pendulum_and_notices_another(script, tmp_path, monkeypatch):
    """Skill on unseen episodes becomes clearly positive; the drift stays small until gravity changes."""
    drifts, real_drift = [], script.drift

    def drift(agent, predictor, rollout):
        drifts.append(real_drift(agent, predictor, rollout))
        monkeypatch.setattr(Pendulum, "gravity", 3.0 if len(drifts) >= 50 else 1.0)
        return drifts[-1]

    monkeypatch.setattr(script, "drift", drift)
    run = {"num_envs": 4, "num_steps": 50, "total_timesteps": 200 * 54, "checkpoint_every": 50}
    run |= {"update_epochs": 16, "num_minibatches": 1, "predictor_learning_rate": 1e-2, "predictor_samples": 100}
    result = small_run(script, tmp_path, "run", env_id="toys:ToyPendulum-v0", env_kwargs="{}", horizon=5, **run)
    assert np.max(drifts[20:50]) < 2.5 < np.min(drifts[50:52])
    assert scalars(result["run_dir"])["predictor/skill_k5"][0][1] > 0.3  # at step 10,000, before the change
