"""Tiny learning checks; the real ones are in benchmark/."""

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
