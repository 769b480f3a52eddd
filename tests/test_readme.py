"""What the README shows of Python is run as it stands; its recipe for another recurrent cell is carried out."""

import os
import re
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, run_from_shell

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_use_it_from_python(script, script_path, tmp_path, monkeypatch):
    """Each block, after those before it. The exported policy is the agent, over 1,000 steps with resets."""
    onnxruntime = pytest.importorskip("onnxruntime")
    if script_path.name != "ppo_lstm_predictor.py":
        pytest.skip("the README imports the original")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ppo_lstm_predictor", script)
    names = {}
    for block in blocks("python"):
        exec(block, names)
    assert names["result"]["global_step"] >= 20_000 and names["total"] > 0 and os.path.exists("policy.onnx")

    agent, session, rng = names["agent"], onnxruntime.InferenceSession("policy.onnx"), np.random.default_rng(0)
    state, exported = agent.initial_state(1), agent.initial_state(1).numpy()
    for _ in range(1000):
        if rng.random() < 0.02:  # a new episode
            state, exported = agent.initial_state(1), agent.initial_state(1).numpy()
        obs = rng.normal(size=(1, len(agent.obs_stats.mean))).astype(np.float32)
        with torch.no_grad():
            params, _, state = agent.step(torch.from_numpy(obs), state)
        exported_params, exported = session.run(None, {"obs": obs, "state": exported})
        np.testing.assert_allclose(exported_params, params, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(exported, state, rtol=1e-5, atol=1e-5)


def gru_of(source: str) -> str:
    """The script with the README's `diff` carried out: the removed lines of each part become the added ones."""
    (diff,) = blocks("diff")
    assert sum(line.startswith("+") for line in diff.splitlines()) <= 15
    for part in diff.split("\n\n"):
        old, new = ("".join(line[1:] + "\n" for line in part.splitlines() if line[0] == sign) for sign in "-+")
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


@pytest.mark.slow
def test_a_gru_in_a_few_lines_passes_the_tests_of_exactness(script_path, tmp_path):
    copy = tmp_path / "gru.py"
    copy.write_text(gru_of(script_path.read_text()))
    assert "nn.GRU(" in copy.read_text()
    done = run_from_shell("-m", "pytest", "-q", "-n0", ROOT / "tests" / "test_exact.py", "--script", copy)
    assert done.returncode == 0, done.stdout[-3000:]
