"""Tiny learning checks; the real ones are in benchmark/."""

import torch
from gymnasium.spaces import Box, Discrete
from toys import scalars


def test_memory_is_learnt_and_used(script, tmp_path):
    """Velocity-free CartPole: after 30,000 steps clearly better than at random, and than with its state wiped."""
    args = script.Args(
        env_id="CartPole-v1",
        visible=(0, 2),
        total_timesteps=30_000,
        num_steps=64,
        learning_rate=3e-3,
        horizon=10,
        checkpoint_every=0,
        runs_dir=str(tmp_path),
    )
    result = script.train(args)
    assert result["first_return_mean"] < 40 and result["eval_return_mean"] > 90
    assert result["eval_return_memoryless"] < result["eval_return_mean"] * 2 / 3
    curves = scalars(result["run_dir"])
    assert max(error for _, error in curves["losses/first_ratio_error"]) < 1e-4
    assert curves["predictor/loss"][-1][1] < curves["predictor/loss"][0][1]


def test_13_first_weights(script):
    """Two thirds of the units with an open forget gate, a third that echoes what it hears."""
    agent = script.Agent(Box(-1, 1, (4,)), Discrete(2), script.Args(lstm_hidden=9))
    bias = agent.lstm.bias_ih_l0.view(4, 9)  # input, forget, cell, output gate
    assert bias[:, :3].T.tolist() == [[1, -1, 0, 1]] * 3 and bias[:, 3:].T.tolist() == [[0, 1, 0, 0]] * 6
    for gate, weight in enumerate(agent.lstm.weight_hh_l0.view(4, 9, 9)):
        scale = torch.ones(9)
        scale[:3] = 1.5 if gate == 2 else 1.0
        torch.testing.assert_close(weight @ weight.T, torch.diag(scale**2), atol=1e-5, rtol=0)
