"""benchmark/scale.py: the parts of a training's time are told apart."""

import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmark"))
import scale

import ppo_lstm_predictor as script

PARTS = {
    "environments": (gym.vector.SyncVectorEnv, "step"),
    "network": (script.Agent, "step"),
    "update": (script.Agent, "unroll"),
}


@pytest.mark.parametrize("part", PARTS)
def test_what_takes_all_the_time_has_all_of_it(monkeypatch, part):
    """By a clock that goes on only there."""
    clock, (where, name) = [0.0], PARTS[part]
    function = getattr(where, name)

    def takes_a_second(*args, **kwargs):
        clock[0] += 1
        return function(*args, **kwargs)

    for replaced in ("make_envs", "collect", "assess"):
        monkeypatch.setattr(script, replaced, getattr(script, replaced))
    monkeypatch.setattr(scale, "STEPS", 256)
    monkeypatch.setattr(scale, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(where, name, takes_a_second)
    found = scale.measure(num_envs=2, lstm_hidden=8, bptt_length=8, torch_threads=1, processes=1)
    some = 0.1 * (part == "network")  # the update also steps the network, for the value behind an end
    assert [found[name] for name in PARTS] == pytest.approx([float(name == part) for name in PARTS], abs=some)
    calls = 5 * 4 * 2 if part == "update" else 5 * 128  # of five updates: epochs and minibatches; steps
    assert found["sps"] == pytest.approx(5 * 256 / calls, rel=some, abs=0.5)
