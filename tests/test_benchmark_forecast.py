"""benchmark/forecast_claims.py: its statistics by hand, what it reads from episodes, and a tiny run of each claim."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmark"))
import forecast_claims as claims


def test_auroc_counts_pairs():
    positive, negative = np.array([3.0, 1.0, 2.0, 2.0]), np.array([2.0, 0.0, 1.0])
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert claims.auroc(positive, negative) == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("shift", [0, 6, -6])
def test_alarms_of_a_shift_up_or_down(shift):
    rng = np.random.default_rng(1)
    first, second, changed = (rng.normal(5, 2, size) for size in (2000, 2000, 200))
    found = claims.alarms(first, second, changed + 2 * shift)
    assert 0.005 < found["false_alarms"] < 0.02
    if shift:
        assert found["auroc"] > 0.999 and found["delay"] < 2
        assert found["auroc_upward"] == pytest.approx(float(shift > 0), abs=0.001)
    else:
        assert abs(found["auroc"] - 0.5) < 0.07 and found["delay"] > 30


def test_episodes_forecasts_and_crashes():
    args = claims.script.Args(eval_episodes=3, horizon=50, cuda=False)
    agent, predictor = claims.networks(args)
    rollout, mask = claims.first_episodes(agent, args, batch=0)
    change, forecast, target, goes_on, known = claims.look_ahead(agent, predictor, rollout, mask, (1, 10))
    forecasts, now, seen, _, left, n = claims.crash_inputs(agent, predictor, rollout, mask)
    for e in range(3):
        mine, length = torch.from_numpy(n == e), int(mask[:, e].sum())
        assert mask[:length, e].all() and (rollout.terminated | rollout.truncated)[length - 1, e]
        obs = agent.normalize_obs(rollout.obs[:length, e])[:, :8]
        torch.testing.assert_close(forecast[mine], obs[:, None].expand(-1, 2, -1))  # an untrained head: no change
        torch.testing.assert_close(target[mine][:-10, 1], obs[10:])
        torch.testing.assert_close(change[mine][1:], obs[1:] - obs[:-1])
        torch.testing.assert_close(goes_on[mine][1:, 1], obs[1:] + 10 * (obs[1:] - obs[:-1]))
        assert known[mine].sum(0).tolist() == [length, length - 9]
        crash = rollout.reward[length - 1, e] == -100
        assert left[n == e].tolist() == [length - t if crash else np.inf for t in range(length)]
    assert forecasts.shape[1:] == (3, 8) and now.shape[1:] == (8 + 4 + 8,) and seen.shape[1:] == (8 + 4 + 128,)


def test_random_actions_are_mixed_in():
    args = claims.script.Args(cuda=False)
    agent, _ = claims.networks(args)
    obs, state = torch.randn(5, 12), agent.initial_state(5)
    before, value, _ = agent.step(obs, state)
    claims.mix_in_random_actions(agent)
    after, same_value, _ = agent.step(obs, state)
    torch.testing.assert_close(after.softmax(-1), 0.7 * before.softmax(-1) + 0.3 / 4)
    assert torch.equal(value, same_value)


@pytest.mark.slow
@pytest.mark.parametrize("claim", claims.JOBS)
def test_smoke(claim):
    call = [sys.executable, claims.__file__, claim, "--smoke", "--jobs", "1"]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    base = claims.MEASURES[claim][0]
    assert any(f"| {base} |" in line for line in done.stdout.splitlines())


@pytest.mark.slow
def test_unknown_claims_end_in_one_line():
    call = [sys.executable, claims.__file__, "magic"]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 2 and "invalid choice: 'magic'" in done.stderr.splitlines()[-1]
