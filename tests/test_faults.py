"""What happens when things go wrong: wrong input, signals, crashes, broken environments, hostile checkpoints."""

import dataclasses
import json
import os
import pickle
import signal
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import (
    LAUNCHERS,
    assert_a_signal_saves,
    assert_ends_reach_the_advantages,
    assert_refused,
    assert_two_processes_match_one,
    blank_figure,
    checkpoints_equal,
    run,
    run_from_shell,
    start,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_predictor import small_run
from toys import ACTION_SPACES, scalars


@pytest.fixture(autouse=True)
def no_pictures(script, monkeypatch):
    monkeypatch.setattr(script, "forecast_figure", blank_figure)


@pytest.fixture(scope="module")
def finished(script, tmp_path_factory) -> dict:
    """The summary of a tiny run that is only looked at."""
    return small_run(script, tmp_path_factory.mktemp("finished"))


def checkpoint_of(summary: dict) -> Path:
    return Path(summary["run_dir"], "checkpoint.pt")


def args_of(script, summary: dict, **changes):
    return script.Args(**script.load(checkpoint_of(summary))["args"] | changes)


def main(script, script_path, monkeypatch, *args) -> int:
    """The exit code of the script's `main`, in this process."""
    monkeypatch.setattr(sys, "argv", [str(script_path), *map(str, args)])
    try:
        script.main()
    except SystemExit as exit:
        return exit.code
    return 0


# --- wrong input: one line, exit code 2, nothing done

WRONG = [
    (["--num-envs", "0"], "--num-envs must be above 0 and at most 100000, not 0"),
    (["--learning-rate", "-1"], "--learning-rate must be above 0"),
    (["--learning-rate", "inf"], "--learning-rate must be above 0 and at most 100000, not inf"),
    (["--learning-rate", "nan"], "--learning-rate must be above 0"),
    (["--bptt-length", "-3"], "--bptt-length must be 0 or more"),
    (["--gamma", "1.5"], "--gamma must be 0 or more and at most 1"),
    (["--target-kl", "-1"], "--target-kl must be above 0"),
    (["--num-minibatches", "32"], "--num-minibatches must be above 0 and at most 16"),
    (["--predictor-samples", "0"], "--predictor-samples must be above 0"),
    (["--seed", "100000000000000000000"], "--seed must be 0 or more and at most 1000000000"),
    (["--num-steps", "1000000000"], "--num-steps must be above 0 and at most 100000"),
    (["--lstm-hidden", "1000000"], "--lstm-hidden must be above 0 and at most 100000"),
    (["--env-id", "CartPoll-v1"], "CartPole"),
    (["--env-id", "CartPole-v9"], "CartPole"),
    (["--env-id", "no_such_module:Thing-v0"], "no_such_module"),
    (["--env-id", "CartPole-v1", "--env-kwargs", "{oops"], "CartPole-v1"),
    (["--env-id", "CartPole-v1", "--env-kwargs", '{"nonsense": 1}'], "nonsense"),
    (["--env-id", "CartPole-v1", "--visible", "0", "4"], "--visible goes from 0 to 3"),
    (["--resume", "nowhere"], "nowhere/checkpoint.pt"),
    (["--evaluate", "nowhere.pt"], "nowhere.pt"),
    (["--init-from", "nowhere.pt"], "nowhere.pt"),
    (["--env-id", "toys:Toy-v0", "--env-kwargs", '{"action": "continuous"}'], "continuous"),
    (["--env-id", "toys:Toy-v0", "--capture-video"], "render_mode"),
]


@pytest.mark.parametrize("args, message", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(script, script_path, tmp_path, args, message, monkeypatch, capfd):
    assert_refused(script, script_path, args, message, tmp_path, monkeypatch, capfd)


def test_wrong_input_from_the_shell(script_path, tmp_path):
    result = run_from_shell(script_path, "--env-id", "LunarLandr-v3", "--runs-dir", tmp_path)
    assert result.returncode == 2 and "LunarLander" in result.stderr and "Traceback" not in result.stderr
    assert run(script_path, "--num-envs", "many").returncode == 2


def test_help_shows_groups_units_and_what_0_means(script_path):
    text = " ".join(run(script_path, "--help").stdout.replace("│", " ").split())
    for part in ("RUN:", "ENVIRONMENT:", "PPO:", "RECURRENCE:", "FORECAST:", "0 = only at the end", "None = never"):
        assert part in text


def test_videos_need_their_package_before_any_work(script, monkeypatch):
    monkeypatch.setitem(sys.modules, "moviepy", None)
    with pytest.raises(script.InputError, match="pip install"):
        script.check(script.Args(env_id="CartPole-v1", capture_video=True))


def test_unknown_action_space(script, tmp_path, monkeypatch):
    monkeypatch.setitem(ACTION_SPACES, "words", gym.spaces.Text(3))
    args = script.Args(env_id="toys:Toy-v0", env_kwargs='{"action": "words"}', runs_dir=str(tmp_path))
    with pytest.raises(script.InputError, match="Text"):
        script.train(args)


def test_a_runs_folder_that_cannot_be_written(script, script_path, tmp_path, monkeypatch, capfd):
    (tmp_path / "file").touch()
    played = []
    monkeypatch.setattr(script, "play", lambda *args: played.append(args))
    code = main(script, script_path, monkeypatch, "--env-id", "CartPole-v1", "--runs-dir", tmp_path / "file")
    assert code == 2 and not played
    assert f"error: cannot write to {tmp_path / 'file'}" in capfd.readouterr().err


# --- what a run says and leaves


def test_something_to_read_from_the_start(script, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(script, "collect", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        small_run(script, tmp_path)
    error = capfd.readouterr().err
    assert error.startswith(f"run folder: {tmp_path}") and "0.00/256" in error
    assert f"--resume {next(tmp_path.iterdir())}" in error  # the first checkpoint is there before the first update
    assert script.load(next(tmp_path.glob("*/checkpoint.pt")))["counters"]["global_step"] == 0


def test_the_bar_ends_at_its_total_and_the_last_line_is_json(script, script_path, tmp_path, monkeypatch, capfd):
    flags = "--env-id toys:Toy-v0 --num-envs 2 --num-minibatches 2 --lstm-hidden 8 --horizon 4 --eval-episodes 2"
    flags = [*flags.split(), "--runs-dir", tmp_path, "--total-timesteps", "300"]  # no whole number of rollouts
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert main(script, script_path, monkeypatch, *flags) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    out, err = capfd.readouterr()
    assert "100%" in err and "300/300" in err and "/?" not in err
    *people, last = out.splitlines()
    result = json.loads(last)
    assert [line.split()[0] for line in people] == ["first", "watch:", "evaluate:"]
    keys = "run_dir global_step sps train_return_mean eval_return_mean eval_return_std eval_return_sampled"
    assert result["eval_episodes"] == 2 and set(keys.split()) <= result.keys()


def test_a_run_folder_holds_what_it_should(script, script_path, finished):
    run_dir = Path(finished["run_dir"])
    names = {"args.json", "checkpoint.pt", "best.pt", "forecast.png", "common", script_path.name}
    assert names < {path.name for path in run_dir.iterdir()}
    assert (run_dir / script_path.name).read_text() == script_path.read_text()
    assert (run_dir / "common" / "gae.py").exists() and json.loads((run_dir / "args.json").read_text())["horizon"] == 20
    events = EventAccumulator(str(run_dir)).Reload()
    assert "predictor/forecast" in events.Tags()["images"]
    assert b'"horizon": 20' in events.Tensors("args/text_summary")[0].tensor_proto.string_val[0]
    tags = "charts/episodic_return charts/episodic_length charts/learning_rate charts/SPS losses/value_loss"
    tags += " losses/policy_loss losses/entropy losses/old_approx_kl losses/approx_kl losses/clipfrac losses/grad_norm"
    tags += " losses/explained_variance losses/first_ratio_error eval/episodic_return eval/return_sampled"
    tags += " eval/return_memoryless predictor/loss predictor/drift predictor/rmse_k1 predictor/skill_k1"
    assert set(tags.split()) <= set(events.Tags()["scalars"])


def test_evaluating_leaves_the_folder_as_it_was(script, script_path, finished, monkeypatch, capfd):
    def contents():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in Path(finished["run_dir"]).rglob("*")}

    before = contents()
    assert main(script, script_path, monkeypatch, "--evaluate", checkpoint_of(finished)) == 0
    assert contents() == before
    people, last = capfd.readouterr().out.splitlines()
    result = json.loads(last)
    assert people.startswith("first")
    for name in ("eval_return_mean", "eval_return_sampled", "eval_return_memoryless", "predictor_skill_k1"):
        assert result[name] == finished[name]  # the closing evaluation again


def test_videos_are_recorded(script, tmp_path):
    pytest.importorskip("moviepy")
    changes = {"env_id": "CartPole-v1", "env_kwargs": "{}", "eval_episodes": 1, "capture_video": True}
    result = small_run(script, tmp_path, checkpoint_every=0, **changes)
    assert list(Path(result["run_dir"], "videos").glob("*.mp4"))


# --- checkpoints


def test_kill_9_at_any_moment_leaves_a_whole_checkpoint(script, script_path, tmp_path):
    """A process that does nothing but save is killed at random moments; the file always loads and is one it wrote."""
    driver, rng = tmp_path / "driver.py", np.random.default_rng(0)
    driver.write_text(f"""
import importlib.util, pathlib, sys, torch
path = pathlib.Path(sys.argv.pop())
spec = importlib.util.spec_from_file_location("script", {str(script_path)!r})
script = sys.modules["script"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
layer, number = torch.nn.Linear(300, 300), 0
while True:
    number += 1
    layer.weight.data.fill_(number)
    script.save(path, {{"agent": layer}}, {{"updates": number}}, script.Args())
""")
    for attempt in range(8):
        path = tmp_path / f"checkpoint_{attempt}.pt"
        process = start(driver, path)
        while not path.exists():
            assert process.poll() is None, process.communicate()[1]
        deadline = time.perf_counter() + rng.uniform(0, 0.2)
        while time.perf_counter() < deadline:
            pass
        process.kill()
        process.join()
        layer = torch.nn.Linear(300, 300)
        counters = script.load(path, agent=layer)["counters"]
        assert (layer.weight == counters["updates"]).all()


def test_resume_continues_counters_schedule_and_curve(script, tmp_path):
    whole = small_run(script, tmp_path / "whole")
    first = small_run(script, tmp_path / "half")
    args = args_of(script, first, resume=first["run_dir"], total_timesteps=32 * 16)
    second = script.train(args)
    assert whole["global_step"] == first["global_step"] == 32 * 8 and second["global_step"] == 32 * 16
    assert second["run_dir"] == first["run_dir"] and second["first_return_mean"] == first["first_return_mean"]
    curve = scalars(first["run_dir"])["losses/value_loss"]
    assert [step for step, _ in curve] == [32 * (i + 1) for i in range(1, 16)]  # the first rollout only warms up
    rates = dict(scalars(first["run_dir"])["charts/learning_rate"])
    assert rates[32 * 9] == pytest.approx(args.learning_rate * (1 - 8 / 16), rel=1e-4)
    state = torch.load(checkpoint_of(first), weights_only=True)
    for optimizer in ("optimizer", "predictor_optimizer"):  # what the optimisers really used
        initial = args.learning_rate if optimizer == "optimizer" else args.predictor_learning_rate
        assert state[optimizer]["param_groups"][0]["lr"] == pytest.approx(initial * (1 - 15 / 16))
    assert state["agent"]["obs_stats.count"] == 32 * 16
    step = state["optimizer"]["state"][0]["step"]
    assert step == 15 * args.update_epochs * args.num_minibatches
    with pytest.raises(script.InputError, match="total-timesteps"):
        script.train(args)


def test_resumed_weights_are_the_saved_ones(script, finished, tmp_path, monkeypatch):
    """Every weight, statistic and moment of Adam, before the first step of the resumed run."""
    import shutil

    run_dir = shutil.copytree(finished["run_dir"], tmp_path / "run")
    saved, restored = torch.load(run_dir / "checkpoint.pt", weights_only=True), {}

    def save(path, parts, counters, args):
        restored.update({name: part.state_dict() for name, part in parts.items()} | {"counters": dict(counters)})
        raise InterruptedError

    monkeypatch.setattr(script, "save", save)
    with pytest.raises(InterruptedError):
        script.train(args_of(script, finished, resume=str(run_dir), total_timesteps=10**6))
    assert checkpoints_equal(restored, {name: x for name, x in saved.items() if name != "args"})


def test_a_failing_evaluation_costs_no_training_and_no_curve(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "assess", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        small_run(script, tmp_path, checkpoint_every=0)
    checkpoint = next(tmp_path.glob("*/checkpoint.pt"))
    assert script.load(checkpoint)["counters"]["global_step"] == 32 * 8
    assert scalars(checkpoint.parent)["charts/SPS"][-1][0] == 32 * 8


def test_the_best_evaluation_is_kept(script, tmp_path, monkeypatch):
    returns, real = iter([3.0, 7.0, 5.0]), script.assess

    def assess(*args):
        scores, figure = real(*args)
        return scores | {"eval/episodic_return": next(returns)}, figure

    monkeypatch.setattr(script, "assess", assess)
    result = small_run(script, tmp_path)
    best = script.load(Path(result["run_dir"], "best.pt"))["counters"]
    assert best["global_step"] == 32 * 6 and best["best"] == 7
    assert script.load(checkpoint_of(result))["counters"]["best"] == 7


def test_an_episode_without_end_does_not_hold_up_the_evaluation(script, tmp_path, monkeypatch):
    real = gym.wrappers.TimeLimit
    monkeypatch.setattr(gym.wrappers, "TimeLimit", lambda env, steps: real(env, 50) if steps == 27_000 else None)
    endless = {"env_kwargs": json.dumps({"lengths": [10**9]}), "total_timesteps": 64}
    result = small_run(script, tmp_path, **endless)
    assert result["global_step"] == 64 and result["eval_return_mean"] is not None


def test_05_termination_and_truncation_reach_the_advantages(script, tmp_path, monkeypatch):
    def train(runs_dir, **changes):
        small_run(script, runs_dir, eval_episodes=1, **changes)

    assert_ends_reach_the_advantages(script, train, tmp_path, monkeypatch)


def test_start_from_another_runs_networks(script, finished, tmp_path):
    checkpoint = checkpoint_of(finished)
    changes = {"init_from": str(checkpoint), "total_timesteps": 32, "learning_rate": 1e-9, "eval_episodes": 1}
    result = small_run(script, tmp_path, **changes)
    old, new = (torch.load(path, weights_only=True)["agent"] for path in (checkpoint, checkpoint_of(result)))
    torch.testing.assert_close(new["encoder.weight"], old["encoder.weight"], atol=1e-5, rtol=0)
    assert result["global_step"] == 32


def test_other_checkpoints_are_refused_by_what_does_not_fit(script, finished, tmp_path):
    path = tmp_path / "checkpoint.pt"
    state = torch.load(checkpoint_of(finished), weights_only=True)
    args = args_of(script, finished, resume=str(tmp_path), total_timesteps=10**6)
    torch.save(state, path)
    for change, message in (
        ({"env_id": "CartPole-v1", "env_kwargs": "{}"}, r"obs_stats.mean.*\[7\]"),
        ({"lstm_hidden": 9}, "lstm.weight_hh_l0"),
        ({"visible": (0,)}, "encoder.weight"),
        ({"horizon": 3}, "head.weight"),
        ({"freeze_extractor": False}, "parameter group"),
    ):
        with pytest.raises(script.InputError, match=message) as error:
            script.train(dataclasses.replace(args, **change))
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    whole = path.read_bytes()
    torch.save({"model": state["agent"]}, tmp_path / "foreign.pt")  # another program's
    foreign = (tmp_path / "foreign.pt").read_bytes()
    for content in (b"", whole[:1000], foreign, b"import os", pickle.dumps({"agent": 1})):  # empty, half, foreign
        path.write_bytes(content)
        with pytest.raises(script.InputError, match="cannot load") as error:
            script.train(args)
        assert "\n" not in str(error.value) and "weights_only" not in str(error.value)


def test_an_older_checkpoint_takes_the_default_of_a_newer_flag(
    script, script_path, finished, tmp_path, monkeypatch, capfd
):
    state = torch.load(checkpoint_of(finished), weights_only=True)
    state["args"].pop("target_kl")
    state["args"]["a_flag_that_was_dropped"] = 3
    torch.save(state, tmp_path / "old.pt")
    assert main(script, script_path, monkeypatch, "--evaluate", tmp_path / "old.pt") == 0
    out, err = capfd.readouterr()
    assert "old.pt has no target_kl: the default is taken" in err
    assert json.loads(out.splitlines()[-1])["eval_return_mean"] == finished["eval_return_mean"]


def test_a_checkpoint_runs_no_code(script, tmp_path):
    class Attack:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"args": Attack()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Attack()))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(script.InputError, match="cannot load") as error:
            script.load(tmp_path / name)
        assert "weights_only" not in str(error.value)
    assert not (tmp_path / "owned").exists()


# --- signals


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_update_and_saves(script, script_path, tmp_path, number, code):
    flags = {"env_id": "toys:Toy-v0", "num_envs": 2, "num_steps": 16, "num_minibatches": 2, "lstm_hidden": 8}
    flags |= {"horizon": 4, "eval_episodes": 2}
    assert_a_signal_saves(script, script_path, flags, tmp_path, number, code)


@pytest.mark.parametrize("updates", [3, 8])  # in the middle of the run, and at its end
def test_a_signal_cuts_an_evaluation_short(script, script_path, tmp_path, updates, monkeypatch, capfd):
    """It comes in the evaluation's third step, of an episode that would take 27,000."""
    real, steps = script.play, []

    def play(envs, agent, seed, **how):
        for step in real(envs, agent, seed, **how):
            if seed > 1_000_000_000:
                steps.append(step)
                if len(steps) == 3:
                    os.kill(os.getpid(), signal.SIGINT)
            yield step

    monkeypatch.setattr(script, "play", play)
    flags = "--env-id toys:Toy-v0 --num-envs 2 --num-steps 16 --num-minibatches 2 --lstm-hidden 8 --total-timesteps 256"
    flags = [*flags.split(), "--env-kwargs", '{"lengths": [1000000]}', "--checkpoint-every", updates]
    assert main(script, script_path, monkeypatch, *flags, "--runs-dir", tmp_path) == 130
    out, err = capfd.readouterr()
    assert len(steps) <= 6 and not out and "stopping" in err and "Traceback" not in err
    checkpoint = next(tmp_path.glob("*/checkpoint.pt"))
    last = min(updates + 1, 8)  # the update that hears of it
    assert script.load(checkpoint)["counters"]["global_step"] == 32 * last
    assert "eval/episodic_return" not in scalars(checkpoint.parent)
    assert (f"--resume {checkpoint.parent}" in err) == (updates == 3)


# --- environments and losses that break


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize(
    "fault, error, message",
    [
        ("raise", RuntimeError, "the rotor fell off"),
        ("nan", FloatingPointError, "not finite"),
        ("nan_reward", FloatingPointError, "not finite"),
        ("die", RuntimeError, "process of an environment died"),
    ],
)
def test_a_broken_environment_is_one_clear_error(script, tmp_path, fault, error, message, vectorization):
    if (fault, vectorization) == ("die", "sync"):
        pytest.skip("takes this process with it")
    env_kwargs = json.dumps({"lengths": [50], "fault": fault, "fault_step": 16 * 5 + 3})
    changes = {"env_kwargs": env_kwargs, "vectorization": vectorization, "checkpoint_every": 2, "eval_episodes": 1}
    with pytest.raises(error, match=message):
        small_run(script, tmp_path, **changes)
    saved = script.load(next(tmp_path.glob("*/checkpoint.pt")))
    assert saved["counters"]["global_step"] == 32 * 4  # the last consistent state


@pytest.mark.parametrize("fault, message", [("die", "process of an environment died"), ("nan", "not finite")])
def test_an_environment_that_breaks_in_an_evaluation_is_one_clear_error(script, tmp_path, fault, message):
    """It lives longer there than the training's ever get."""
    env_kwargs = json.dumps({"lengths": [500], "fault": fault, "fault_step": 200})
    changes = {"env_kwargs": env_kwargs, "vectorization": "async", "total_timesteps": 64, "eval_episodes": 1}
    with pytest.raises((RuntimeError, FloatingPointError), match=message):
        small_run(script, tmp_path, **changes)
    assert script.load(next(tmp_path.glob("*/checkpoint.pt")))["counters"]["global_step"] == 64


def test_a_mask_that_allows_nothing_names_the_environment(script, tmp_path):
    env_kwargs = json.dumps({"masked": "nothing"})
    with pytest.raises(ValueError, match="environment 0 allows no action"):
        small_run(script, tmp_path, env_kwargs=env_kwargs)


def test_a_non_finite_loss_stops_before_the_weights_change(script, tmp_path, monkeypatch):
    real, seen = script.ppo_loss, []

    def broken(agent, *args):
        loss, metrics = real(agent, *args)
        seen.append((agent, {name: x.clone() for name, x in agent.state_dict().items()}))
        return (loss * torch.nan if len(seen) == 50 else loss), metrics

    monkeypatch.setattr(script, "ppo_loss", broken)
    with pytest.raises(RuntimeError, match="non-finite"):
        small_run(script, tmp_path)
    agent, before = seen[-1]
    assert len(seen) == 50 and checkpoints_equal(dict(agent.state_dict()), before)
    assert script.load(next(tmp_path.glob("*/checkpoint.pt")))["counters"]["global_step"] == 32 * 6


def test_target_kl_ends_the_update(script, tmp_path, monkeypatch):
    calls, real = [], script.ppo_loss
    monkeypatch.setattr(script, "ppo_loss", lambda *args: calls.append(args) or real(*args))
    small_run(script, tmp_path, target_kl=1e-12, checkpoint_every=0, eval_episodes=1)
    assert len(calls) == 7 * 2  # one epoch of two minibatches for all rollouts but the first


# --- two processes


@pytest.mark.parametrize("launch", LAUNCHERS)
def test_two_processes_match_one_with_the_same_data(script_path, tmp_path, launch):
    """Actions are the likeliest ones, so that the data do not depend on which process draws which random number."""
    driver = tmp_path / "driver.py"
    driver.write_text(f"""
import importlib.util, os, sys, torch
sys.argv = ["driver"]
spec = importlib.util.spec_from_file_location("script", {str(script_path)!r})
script = sys.modules["script"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
sample, agents, Agent = script.sample, [], script.Agent
script.sample = lambda params, choices, generator: sample(params, choices, None)
script.Agent = lambda *args: agents.append(Agent(*args)) or agents[-1]
world = int(os.environ.get("WORLD_SIZE", 1))
args = script.Args(
    env_id="toys:Toy-v0", env_kwargs='{{"lengths": [3, 9, 1], "ends": ["truncated", "terminated"]}}',
    num_envs=4 // world, num_steps=16, num_minibatches=1, total_timesteps=64 * 6, lstm_hidden=8,
    horizon=4, eval_episodes=2, checkpoint_every=0, predictor_samples=10**5,
    freeze_extractor=False, target_kl=10.0, runs_dir={str(tmp_path)!r},
)
result = script.train(args)
torch.save(agents[0].state_dict(), {str(tmp_path)!r} + f"/weights_{{world}}_{{os.environ.get('RANK', 0)}}.pt")
""")
    assert_two_processes_match_one(driver, launch)


def test_infos_that_some_environments_give_sometimes(script, tmp_path):
    """Masks of one environment leave the others free; success that is only said on success is a rate all the same."""
    from toys import Toy

    class Sometimes(Toy):
        def step(self, action):
            obs, reward, terminated, truncated, _ = super().step(action)
            info = {"action_mask": np.array([0, 1, 1], np.int8)} if self.obs[2] > 0 else {}
            won = {"is_success": True} if terminated and self.obs[2] > 0 else {}
            return obs, reward, terminated, truncated, info | won

    if "Sometimes-v0" not in gym.registry:
        gym.register("Sometimes-v0", Sometimes)
    result = small_run(script, tmp_path, env_id="Sometimes-v0", env_kwargs="{}", eval_episodes=20, checkpoint_every=0)
    assert 0 < result["eval_success_rate"] < 1


def test_the_start_checkpoint_can_be_evaluated(script, script_path, tmp_path, monkeypatch, capfd):
    """What a kill in the first update leaves; and what is no number is null, not Infinity."""
    monkeypatch.setattr(script, "collect", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        small_run(script, tmp_path, predictor=False)
    assert main(script, script_path, monkeypatch, "--evaluate", next(tmp_path.glob("*/checkpoint.pt"))) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["global_step"] == 0
    scores = {"predictor/skill_k1": -np.inf, "eval/episodic_return": 1.23456}
    env = script.make_env(script.Args(env_id="CartPole-v1"))
    result = script.summary(tmp_path, env, {"global_step": 0, "recent": []}, scores)
    assert result["predictor_skill_k1"] is None and result["eval_return_mean"] == 1.2346


def test_resuming_with_the_copy_in_the_runs_folder(script, finished, tmp_path, monkeypatch):
    import shutil

    run_dir = shutil.copytree(finished["run_dir"], tmp_path / "run")
    monkeypatch.setattr(script, "__file__", str(run_dir / Path(script.__file__).name))
    changes = {"resume": str(run_dir), "total_timesteps": finished["global_step"] + 32}
    assert script.train(args_of(script, finished, **changes))["global_step"] == changes["total_timesteps"]
