"""The forecasts: targets, losses and skill against brute force, and their independence of PPO."""

import json

import numpy as np
import pytest
import torch
from helpers import blank_figure
from test_exact import play
from toys import Pendulum, same_but_for_time, scalars


@pytest.fixture(autouse=True)
def no_pictures(script, monkeypatch):
    monkeypatch.setattr(script, "forecast_figure", blank_figure)


SMALL = {"num_envs": 2, "num_minibatches": 2, "lstm_hidden": 8, "eval_episodes": 4, "checkpoint_every": 3}


def small_run(script, folder, **changes):
    env_kwargs = json.dumps({"lengths": [5, 9, 30], "ends": ["terminated", "truncated"]})
    defaults = {"env_id": "toys:Toy-v0", "env_kwargs": env_kwargs, "num_steps": 16, "total_timesteps": 32 * 8}
    return script.train(script.Args(**SMALL | defaults | {"horizon": 20, "runs_dir": str(folder)} | changes))


def walk(rollouts):
    """What really followed each step of environment n: [(t, [observations to the episode's end])] over all rollouts."""
    next_obs = torch.cat([rollout.next_obs for rollout in rollouts])
    done = torch.cat([rollout.terminated | rollout.truncated for rollout in rollouts])
    futures = {}
    for n in range(done.shape[1]):
        for t in range(len(done)):
            futures[t, n] = []
            for u in range(t, len(done)):
                futures[t, n].append(next_obs[u, n])
                if done[u, n]:
                    break
    return futures


def wild_predictor(script, agent, horizon, frozen=True):
    predictor = script.Predictor(agent, horizon, frozen).to(agent.critic.weight.dtype)
    torch.nn.init.normal_(predictor.head.weight)
    return predictor


@pytest.mark.parametrize("lengths", [(1,), (5,), (3, 1, 7, 40, 2), (100,)])
@pytest.mark.parametrize("horizon", [1, 9, 30])
def test_10_targets_are_a_walk_over_the_episodes(script, lengths, horizon):
    env = {"lengths": lengths, "ends": ("terminated", "truncated")}
    _, agent, rollouts = play(script, num_steps=12, num_rollouts=3, env=env)
    predictor, futures = wild_predictor(script, agent, horizon), walk(rollouts)
    _, target, known = script.forecasts(agent, predictor, rollouts, torch.arange(12 * 3))
    for i in range(12 * 3):
        expected = futures[i // 3, i % 3][:horizon]
        assert known[i].tolist() == [k < len(expected) for k in range(horizon)]
        expected = agent.normalize_obs(torch.stack(expected))[:, :4]
        torch.testing.assert_close(target[i, : len(expected)], expected, rtol=0, atol=0)


def test_10_targets_include_the_final_observation_and_cross_rollouts(script):
    _, agent, rollouts = play(script, num_steps=12, num_rollouts=4, env={"lengths": (20,)})
    _, target, known = script.forecasts(agent, wild_predictor(script, agent, 30), rollouts, torch.tensor([11 * 3]))
    counted = target[0, :9, 0] * agent.obs_stats.std[0] + agent.obs_stats.mean[0]  # the toy counts its steps
    assert known[0].sum() == 9 and counted.tolist() == pytest.approx(list(range(12, 21)))


@pytest.mark.parametrize("frozen", [True, False])
def test_10_forecasts_and_their_gradients(script, frozen):
    """Features are the LSTM's after the step, from the stored state; their gradient reaches back that one step."""
    _, agent, rollouts = play(script, num_steps=12, dtype=torch.float64)
    predictor, index = wild_predictor(script, agent, 30, frozen), torch.tensor([0, 7, 35])
    forecast, target, known = script.forecasts(agent, predictor, rollouts, index)
    expected = []
    for i in index.tolist():
        obs, state = rollouts[0].obs[i // 3, i % 3], rollouts[0].state[i // 3, i % 3]
        features = agent.step(obs[None], state[None])[-1][:, 0]
        expected.append(predictor(features, agent.normalize_obs(obs)[None])[0])
    torch.testing.assert_close(forecast, torch.stack(expected), atol=1e-12, rtol=0)
    weights = [*predictor.parameters(), agent.encoder.weight, agent.lstm.weight_ih_l0]
    losses = [((x - target).square().mean(-1) * known).sum() for x in (forecast, torch.stack(expected))]
    got, want = (torch.autograd.grad(loss, weights, allow_unused=True) for loss in losses)
    for name, a, b in zip(range(len(weights)), got, want, strict=True):
        if frozen and name >= len(weights) - 2:
            assert a is None
        else:
            torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


@pytest.mark.parametrize("horizon", [1, 2, 5, 50, 200])
def test_10_forecasts_are_straight_lines_between_knots(script, horizon):
    _, agent, _ = play(script, num_rollouts=0)
    predictor = wild_predictor(script, agent, horizon)
    features, obs = torch.randn(7, agent.lstm.hidden_size), torch.randn(7, 7)
    knots = sorted({min(horizon, round(2 ** (i / 2))) for i in range(2 * 8 + 1)})
    hidden = torch.relu(predictor.hidden(torch.cat((features, obs), -1)))
    changes = predictor.head(hidden).reshape(7, 4, len(knots)).detach().numpy()
    forecast = predictor(features, obs).detach().numpy()
    assert forecast.shape == (7, horizon, 4) and knots[0] == 1 and knots[-1] == horizon
    for b in range(7):
        for d in range(4):
            line = obs[b, d].item() + np.interp(np.arange(1, horizon + 1), knots, changes[b, d])
            np.testing.assert_allclose(forecast[b, :, d], line, rtol=1e-4, atol=1e-5)


def test_10_skill_by_hand(script):
    """Means over entries, then over all moments that have a future; against the best trivial forecast."""
    _, agent, (_, rollout) = play(script, num_steps=30)
    predictor, futures = wild_predictor(script, agent, 5), walk([rollout])
    torch.nn.init.normal_(predictor.head.weight, std=0.1)
    rmse, skill = script.forecast_skill(agent, predictor, rollout, 29 * 3)  # all moments but those of the first row
    for k in range(1, 6):
        errors = []
        for t in range(1, 30):
            for n in range(3):
                obs, state = agent.normalize_obs(rollout.obs[t, n]), rollout.state[t, n]
                last = obs - agent.normalize_obs(rollout.obs[t - 1, n])
                change = torch.zeros(4) if rollout.start[t, n] else last[:4]
                if len(futures[t, n]) >= k:
                    features = agent.step(rollout.obs[t, n][None], state[None])[-1][:, 0]
                    forecast = predictor(features, obs[None])[0, k - 1]
                    target = agent.normalize_obs(futures[t, n][k - 1])[:4]
                    guesses = forecast, obs[:4], obs[:4] + k * change, torch.zeros(4)
                    errors.append([(guess - target).square().mean().item() for guess in guesses])
        mean = np.mean(errors, 0)
        assert rmse[k - 1].item() == pytest.approx(mean[0] ** 0.5, rel=1e-4)
        assert skill[k - 1].item() == pytest.approx(1 - mean[0] / min(mean[1:]), rel=1e-3)
    untrained = script.forecast_skill(agent, script.Predictor(agent, 5, True), rollout, 29 * 3)[1]
    assert (untrained <= 0).all()  # it says that nothing changes


@pytest.mark.parametrize("num_steps", [1, 2])
def test_10_skill_of_the_shortest_evaluations(script, num_steps, monkeypatch):
    _, agent, (rollout, _) = play(script, num_steps=num_steps)
    rmse, _ = script.forecast_skill(agent, script.Predictor(agent, 5, True), rollout, 64)
    assert rmse[0].isfinite() and rmse[num_steps:].isnan().all()
    monkeypatch.undo()
    assert len(script.forecast_figure(agent, script.Predictor(agent, 5, True), rollout).axes) == 4


@pytest.mark.parametrize("changes", [{}, {"env_id": "CartPole-v1", "env_kwargs": "{}"}])
def test_11_ppo_is_bit_identical_with_and_without_the_frozen_predictor(script, tmp_path, changes):
    runs = [small_run(script, tmp_path / name, predictor=name == "on", **changes) for name in ("on", "off")]
    on, off = (scalars(run["run_dir"]) for run in runs)
    assert any(tag.startswith("predictor/skill") for tag in on) and "predictor/loss" in on
    same_but_for_time({tag: x for tag, x in on.items() if not tag.startswith("predictor/")}, off)


def test_11_joint_training_moves_the_extractor_and_12_same_seed_same_scalars(script, tmp_path):
    changes = {"a": {}, "same": {}, "joint": {"freeze_extractor": False}, "seed": {"seed": 2}}
    runs = {name: scalars(small_run(script, tmp_path / name, **change)["run_dir"]) for name, change in changes.items()}
    same_but_for_time(runs["a"], runs["same"])
    assert runs["a"]["losses/value_loss"] not in (runs["joint"]["losses/value_loss"], runs["seed"]["losses/value_loss"])


@pytest.mark.slow
def test_10_learns_to_forecast_a_pendulum_and_notices_another(script, tmp_path, monkeypatch):
    """Skill on unseen episodes becomes clearly positive; the drift stays small until gravity changes."""
    rollouts, real = [], script.collect

    def collect(*args):
        monkeypatch.setattr(Pendulum, "gravity", 3.0 if len(rollouts) >= 51 else 1.0)
        rollouts.append(real(*args))
        return rollouts[-1]

    monkeypatch.setattr(script, "collect", collect)
    run = {"num_envs": 4, "num_steps": 50, "total_timesteps": 200 * 54, "checkpoint_every": 50}
    run |= {"update_epochs": 16, "num_minibatches": 1, "predictor_learning_rate": 1e-2, "predictor_samples": 100}
    result = small_run(script, tmp_path, env_id="toys:ToyPendulum-v0", env_kwargs="{}", horizon=5, **run)
    curves = scalars(result["run_dir"])
    drifts = {step // 200: drift for step, drift in curves["predictor/drift"]}  # by rollout
    assert max(drifts[n] for n in range(22, 52)) < 2.5 < min(drifts[52], drifts[53])
    assert curves["predictor/skill_k5"][0][1] > 0.3  # at step 10,000, before the change
