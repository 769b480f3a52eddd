"""Tiny learning checks; the real ones are in benchmark/."""

import pytest
import torch
from gymnasium.spaces import Box, Discrete
from toys import scalars


@pytest.mark.slow
def test_memory_is_learnt_and_used(script, tmp_path):
    """Velocity-free CartPole: after 30,000 steps clearly better than at random, and than with its state wiped."""
    args = script.Args(
        env_id="CartPole-v1",
        visible=(0, 2),
        total_timesteps=30_000,
        num_steps=64,  # twice as many updates
        horizon=10,
        checkpoint_every=0,
        runs_dir=str(tmp_path),
    )
    result = script.train(args)
    assert result["first_return_mean"] < 40 and result["eval_return_mean"] > 150
    assert result["eval_return_memoryless"] < result["eval_return_mean"] * 2 / 3
    curves = scalars(result["run_dir"])
    assert max(error for _, error in curves["losses/first_ratio_error"]) < 1e-4
    assert curves["predictor/loss"][-1][1] < curves["predictor/loss"][0][1]


def test_13_half_of_the_lstm_starts_as_a_delay_line(script):
    """A pulse in the input is strongest in the first eight units at once, in the next eight a step later, and so on."""
    agent = script.Agent(Box(-1, 1, (4,)), Discrete(2), script.Args(lstm_hidden=65))
    pulse, silence = torch.zeros(2, 4, 6)
    pulse[0] = 1.0
    features = []
    for obs in (pulse, silence):
        state, line = agent.initial_state(1), []
        for x in obs[:, None]:
            *_, state = agent.step(x, state)
            line.append(state[0, 0, :32].view(4, 8).detach())
        features.append(torch.stack(line))  # [step, delay, 8]
    strength = (features[0] - features[1]).norm(dim=-1)
    assert strength.argmax(1).tolist() == [0, 1, 2, 3]
    assert (strength.triu(1) == 0).all() and strength[3, 3] > strength[0, 0] / 2
    bias = agent.lstm.bias_ih_l0.view(4, 65)  # input, forget, cell, output gate
    assert bias[:, 32:].T.tolist() == [[0, 1, 0, 0]] * 33


def test_14_adams_second_moments_are_of_about_one_update(script):
    args = script.Args(env_id="CartPole-v1")
    *_, parts = script.setup(script.check(args), args)
    _, beta2 = parts["optimizer"].param_groups[0]["betas"]
    assert abs(1 / (1 - beta2) - args.num_minibatches * args.update_epochs) < 2
