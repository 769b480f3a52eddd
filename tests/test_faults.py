"""What happens when things go wrong: wrong input, signals, crashes, broken environments, hostile checkpoints."""

import dataclasses
import functools
import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT
from test_predictor import small_run
from toys import ACTION_SPACES, scalars

TINY = [
    "--env-id",
    "toys:Toy-v0",
    "--num-envs",
    "2",
    "--num-steps",
    "16",
    "--num-minibatches",
    "2",
    "--lstm-hidden",
    "8",
]
TINY += ["--horizon", "4", "--eval-episodes", "2"]


def command(script_path, *args: str) -> list[str]:
    return [sys.executable, str(script_path), *map(str, args)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}


def run(script_path, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(script_path, *args), env=environment(), capture_output=True, text=True, timeout=120)


def start(script_path, *args: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command(script_path, *args), env=environment(), **pipes)


def wait_for_checkpoint(process: subprocess.Popen, runs_dir: Path) -> Path:
    while not (found := list(runs_dir.glob("*/checkpoint.pt"))):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    return found[0]


def assert_a_signal_saves(script, script_path, flags: dict, tmp_path, number: int, code: int) -> None:
    """The update is finished and saved, the command to go on is printed, and it goes on from there."""
    parts = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", value)]
    process = start(script_path, *parts, "--runs-dir", tmp_path, "--total-timesteps", "10000000")
    checkpoint = wait_for_checkpoint(process, tmp_path)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert f"--resume {checkpoint.parent}" in err and "Traceback" not in err and not out
    saved = script.load(checkpoint)["progress"]["global_step"]
    more = run(script_path, "--resume", checkpoint.parent, "--total-timesteps", saved + 64)
    assert more.returncode == 0, more.stderr
    assert json.loads(more.stdout.splitlines()[-1])["global_step"] == saved + 64


# --- wrong input: one line, exit code 2, nothing done

WRONG = [
    (["--num-envs", "0"], "--num-envs must be above 0, not 0"),
    (["--learning-rate", "-1"], "--learning-rate must be above 0"),
    (["--bptt-length", "-3"], "--bptt-length must not be negative"),
    (["--gamma", "1.5"], "--gamma must be at most 1"),
    (["--learning-rate", "nan"], "--learning-rate must be above 0"),
    (["--target-kl", "-1"], "--target-kl must be above 0"),
    (["--num-minibatches", "32"], "--num-minibatches must not exceed --num-envs"),
    (["--predictor-samples", "0"], "--predictor-samples must be above 0"),
    (["--env-id", "CartPoll-v1"], "CartPole"),
    (["--env-id", "CartPole-v9"], "CartPole"),
    (["--env-id", "no_such_module:Thing-v0"], "no_such_module"),
    (["--env-id", "CartPole-v1", "--env-kwargs", "{oops"], "CartPole-v1"),
    (["--env-id", "CartPole-v1", "--env-kwargs", '{"nonsense": 1}'], "nonsense"),
    (["--env-id", "CartPole-v1", "--visible", "0", "4"], "--visible 4: the entries of CartPole-v1 are 0 to 3"),
    (["--resume", "nowhere"], "nowhere/checkpoint.pt"),
    (["--evaluate", "nowhere.pt"], "nowhere.pt"),
    (["--init-from", "nowhere.pt"], "nowhere.pt"),
    (["--evaluate", "a.pt", "--init-from", "b.pt"], "a.pt"),
    (["--num-steps", "1000000000"], "GB"),
    (["--env-id", "toys:Toy-v0", "--env-kwargs", '{"action": "continuous"}'], "continuous"),
]


def assert_refused(script, path, args, message, tmp_path, monkeypatch, capfd):
    """One line on standard error, exit code 2, and nothing done."""
    monkeypatch.setattr(sys, "argv", [str(path), *args, "--runs-dir", str(tmp_path / "runs")])
    with pytest.raises(SystemExit) as exit:
        script.main()
    error = capfd.readouterr().err
    assert exit.value.code == 2 and message in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("args, message", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(script, script_path, tmp_path, args, message, monkeypatch, capfd):
    assert_refused(script, script_path, args, message, tmp_path, monkeypatch, capfd)


def test_wrong_input_from_the_shell(script_path, tmp_path):
    result = run(script_path, "--env-id", "LunarLandr-v3", "--runs-dir", tmp_path)
    assert result.returncode == 2 and "LunarLander" in result.stderr and "Traceback" not in result.stderr
    assert run(script_path, "--num-envs", "many").returncode == 2


def test_videos_need_their_package_before_any_work(script, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(script.InputError, match="needs moviepy"):
        script.check(script.Args(capture_video=True))


def test_unknown_action_space(script, tmp_path, monkeypatch):
    monkeypatch.setitem(ACTION_SPACES, "words", gym.spaces.Text(3))
    args = script.Args(env_id="toys:Toy-v0", env_kwargs='{"action": "words"}', runs_dir=str(tmp_path))
    with pytest.raises(script.InputError, match="Text"):
        script.train(args)


# --- checkpoints


def checkpoints_equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(checkpoints_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(checkpoints_equal, a, b))
    return a == b or a != a


def test_kill_9_at_any_moment_leaves_a_whole_checkpoint(script, script_path, tmp_path):
    """A process that does nothing but save is killed at random moments; the file always loads and is one it wrote."""
    path, rng = tmp_path / "checkpoint.pt", np.random.default_rng(0)
    code = f"""
import importlib.util, pathlib, sys, torch
sys.argv = ["x"]
spec = importlib.util.spec_from_file_location("script", {str(script_path)!r})
script = sys.modules["script"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
layer, number = torch.nn.Linear(300, 300), 0
print("ready", flush=True)
while True:
    number += 1
    layer.weight.data.fill_(number)
    script.save(pathlib.Path({str(path)!r}), {{"agent": layer}}, script.Progress(update=number), script.Args())
    if number == 1:
        print("saved", flush=True)
"""
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n" and process.stdout.readline() == "saved\n"
        deadline = time.perf_counter() + rng.uniform(0, 0.2)
        while time.perf_counter() < deadline:
            pass
        process.kill()
        process.wait()
        state = script.load(path)
        assert (state["agent"]["weight"] == state["progress"]["update"]).all()


def test_resume_continues_counters_schedule_and_curve(script, tmp_path):
    whole = small_run(script, tmp_path, "whole")
    first = small_run(script, tmp_path, "half")
    args = script.Args(**script.load(f"{first['run_dir']}/checkpoint.pt")["args"])
    args = dataclasses.replace(args, resume=first["run_dir"], total_timesteps=32 * 16)
    second = script.train(args)
    assert whole["global_step"] == first["global_step"] == 32 * 8 and second["global_step"] == 32 * 16
    assert second["run_dir"] == first["run_dir"]
    curve = scalars(first["run_dir"])["losses/value_loss"]
    assert [step for step, _ in curve] == [32 * (i + 1) for i in range(1, 16)]  # the first rollout only warms up
    rates = dict(scalars(first["run_dir"])["charts/learning_rate"])
    assert rates[32 * 9] == pytest.approx(args.learning_rate * (1 - 8 / 16), rel=1e-4)
    state = script.load(f"{first['run_dir']}/checkpoint.pt")
    for optimizer in ("optimizer", "predictor_optimizer"):  # what the optimisers really used
        initial = args.learning_rate if optimizer == "optimizer" else args.predictor_learning_rate
        assert state[optimizer]["param_groups"][0]["lr"] == pytest.approx(initial * (1 - 15 / 16))
    assert state["agent"]["obs_stats.count"] == 32 * 16
    step = state["optimizer"]["state"][0]["step"]
    assert step == 15 * args.update_epochs * args.num_minibatches
    with pytest.raises(script.InputError, match="total-timesteps"):
        script.train(args)


def test_resumed_weights_are_the_saved_ones(script, tmp_path, monkeypatch):
    first = small_run(script, tmp_path, "run")
    saved = script.load(f"{first['run_dir']}/checkpoint.pt")
    restored = {}
    real = script.restore

    def restore(parts, state):
        progress = real(parts, state)
        restored.update(agent=parts["agent"].state_dict(), optimizer=parts["optimizer"].state_dict())
        raise InterruptedError(progress.update)

    monkeypatch.setattr(script, "restore", restore)
    with pytest.raises(InterruptedError, match="8"):
        script.train(script.Args(**saved["args"] | {"resume": first["run_dir"], "total_timesteps": 10**6}))
    assert checkpoints_equal(restored, {"agent": saved["agent"], "optimizer": saved["optimizer"]})


def test_a_checkpoint_of_a_gpu_resumes_on_a_cpu(script):
    """A GPU's generator has a state of 16 bytes, which no other takes."""
    generator = torch.Generator()
    state = {"rng": torch.zeros(16, dtype=torch.uint8), "progress": {"global_step": 7}}
    assert script.restore({"rng": generator}, state).global_step == generator.initial_seed() == 7


def test_a_failing_evaluation_costs_no_training(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "assess", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        small_run(script, tmp_path, "run", checkpoint_every=0)
    checkpoint = next((tmp_path / "run").glob("*/checkpoint.pt"))
    assert script.load(checkpoint)["progress"]["global_step"] == 32 * 8


def test_videos_need_an_environment_that_draws(script):
    with pytest.raises(script.InputError, match="render_mode"):
        script.check(script.Args(env_id="toys:Toy-v0", capture_video=True))


def test_an_episode_without_end_does_not_hold_up_the_evaluation(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "LONGEST", 50)
    endless = {"env_kwargs": json.dumps({"lengths": [10**9]}), "total_timesteps": 64}
    with pytest.warns(UserWarning, match="does not end within 50 steps"):
        result = small_run(script, tmp_path, "run", **endless)
    assert result["global_step"] == 64 and result["eval_return_mean"] is not None


def test_runs_of_the_same_second_have_folders_of_their_own(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script.time, "time", lambda: 1e9)
    folders = [script.open_run(script.Args(runs_dir=str(tmp_path)), script.Progress())[0].name for _ in range(3)]
    assert [name.rsplit("__", 1)[1] for name in folders] == ["1000000000", "1000000001", "1000000002"]


def assert_ends_reach_the_advantages(script, train, folder, monkeypatch):
    seen, real = {}, script.gae

    def gae(reward, value, values_after, terminated, truncated, *rest):
        seen["terminated"], seen["truncated"] = terminated.any().item(), truncated.any().item()
        return real(reward, value, values_after, terminated, truncated, *rest)

    monkeypatch.setattr(script, "gae", gae)
    for end in ("terminated", "truncated"):
        env_kwargs = json.dumps({"lengths": [3], "ends": [end]})
        train(runs_dir=str(folder / end), env_kwargs=env_kwargs, total_timesteps=32)
        assert seen == {"terminated": end == "terminated", "truncated": end == "truncated"}


def test_05_termination_and_truncation_reach_the_advantages(script, tmp_path, monkeypatch):
    train = functools.partial(small_run, script, tmp_path, "run")
    assert_ends_reach_the_advantages(script, train, tmp_path, monkeypatch)


def test_evaluate_and_transfer_a_checkpoint(script, script_path, tmp_path):
    first = small_run(script, tmp_path, "run")
    checkpoint = f"{first['run_dir']}/checkpoint.pt"
    result = run(script_path, "--evaluate", checkpoint)
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["eval_return_mean"] == pytest.approx(first["eval_return_mean"]), result.stderr
    wider = small_run(script, tmp_path, "wider", init_from=checkpoint, lstm_hidden=9)
    assert wider["global_step"] == 32 * 8
    same = small_run(script, tmp_path, "same", init_from=checkpoint, total_timesteps=32, learning_rate=1e-9)
    old, new = (script.load(path)["agent"] for path in (checkpoint, f"{same['run_dir']}/checkpoint.pt"))
    torch.testing.assert_close(new["encoder.0.weight"], old["encoder.0.weight"], atol=1e-5, rtol=0)
    other = small_run(script, tmp_path, "other", init_from=checkpoint, env_id="ToyPendulum-v0", env_kwargs="{}")
    state = script.load(f"{other['run_dir']}/checkpoint.pt")["agent"]
    assert state["obs_stats.count"] == 32 * 8  # nothing of statistics whose other half does not fit


def test_other_checkpoints_are_refused_by_name(script, tmp_path):
    first = small_run(script, tmp_path, "run")
    path = f"{first['run_dir']}/checkpoint.pt"
    args = script.Args(**script.load(path)["args"] | {"resume": first["run_dir"], "total_timesteps": 10**6})
    for change in (
        {"env_id": "CartPole-v1", "env_kwargs": "{}"},
        {"lstm_hidden": 9},
        {"visible": (0,)},
        {"horizon": 3},
    ):
        with pytest.raises(script.InputError, match=next(iter(change))):
            script.train(dataclasses.replace(args, **change))
    state = torch.load(path, weights_only=True)
    torch.save(state | {"args": state["args"] | {"tree_depth": 3}}, path)
    with pytest.raises(script.InputError, match="tree_depth"):
        script.train(args)
    state["agent"]["actor.weight"] = torch.zeros(7, 8)
    torch.save(state, path)
    with pytest.raises(script.InputError, match=r"actor.weight.*\[7, 8\]"):
        script.train(args)
    Path(path).write_bytes(Path(path).read_bytes()[:1000])
    with pytest.raises(script.InputError, match="is not a checkpoint"):
        script.train(args)


def test_a_checkpoint_runs_no_code(script, tmp_path):
    class Attack:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"args": Attack()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Attack()))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(script.InputError, match="is not a checkpoint"):
            script.load(tmp_path / name)
    assert not (tmp_path / "owned").exists()


# --- signals


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_a_signal_saves_says_how_to_go_on_and_exits(script, script_path, tmp_path, number, code, vectorization):
    args = [*TINY, "--runs-dir", tmp_path, "--total-timesteps", "10000000", "--checkpoint-every", "2"]
    process = start(script_path, *args, "--vectorization", vectorization)
    checkpoint = wait_for_checkpoint(process, tmp_path)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert f"--resume {checkpoint.parent}" in err and "Traceback" not in err and not out
    saved = script.load(checkpoint)["progress"]
    steps = [step for step, _ in scalars(checkpoint.parent)["charts/SPS"]]
    assert saved["global_step"] == steps[-1]  # the last finished update
    more = run(script_path, "--resume", checkpoint.parent, "--total-timesteps", saved["global_step"] + 64)
    assert more.returncode == 0, more.stderr
    assert json.loads(more.stdout.splitlines()[-1])["global_step"] == saved["global_step"] + 64


# --- environments and losses that break


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize(
    "fault, error, message",
    [
        ("raise", RuntimeError, "the rotor fell off"),
        ("nan", FloatingPointError, "non-finite observation"),
        ("nan_reward", FloatingPointError, "non-finite reward"),
        ("die", RuntimeError, "process of an environment died"),
    ],
)
def test_a_broken_environment_is_one_clear_error(script, tmp_path, fault, error, message, vectorization):
    if (fault, vectorization) == ("die", "sync"):
        pytest.skip("takes this process with it")
    env_kwargs = json.dumps({"lengths": [50], "fault": fault, "fault_step": 16 * 5 + 3})
    with pytest.raises(error, match=message):
        small_run(
            script,
            tmp_path,
            "run",
            env_kwargs=env_kwargs,
            vectorization=vectorization,
            checkpoint_every=2,
            eval_episodes=1,
        )
    saved = script.load(next((tmp_path / "run").glob("*/checkpoint.pt")))
    assert saved["progress"]["update"] == 4  # the last consistent state


def test_a_mask_that_allows_nothing_names_the_environment(script, tmp_path):
    env_kwargs = json.dumps({"masked": "nothing"})
    with pytest.raises(ValueError, match="environment 0 allows no action"):
        small_run(script, tmp_path, "run", env_kwargs=env_kwargs)


def test_a_non_finite_loss_stops_before_the_weights_change(script, tmp_path, monkeypatch):
    real, seen = script.ppo_loss, []

    def broken(agent, *args):
        loss, metrics = real(agent, *args)
        seen.append((agent, {name: x.clone() for name, x in agent.state_dict().items()}))
        return (loss * torch.nan if len(seen) == 50 else loss), metrics

    monkeypatch.setattr(script, "ppo_loss", broken)
    with pytest.raises(RuntimeError, match="non-finite"):
        small_run(script, tmp_path, "run")
    agent, before = seen[-1]
    assert len(seen) == 50 and checkpoints_equal(dict(agent.state_dict()), before)
    assert script.load(next((tmp_path / "run").glob("*/checkpoint.pt")))["progress"]["update"] == 6


# --- two processes


def assert_two_processes_match_one(driver: Path) -> None:
    """The driver saves its final weights beside itself as weights_{processes}_{rank}.pt."""
    one = subprocess.run([sys.executable, str(driver)], env=environment(), capture_output=True, text=True, timeout=120)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(driver)]
    two = subprocess.run(torchrun, env=environment(), capture_output=True, text=True, timeout=180)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    alone, first, second = (torch.load(driver.parent / f"weights_{name}.pt") for name in ("1_0", "2_0", "2_1"))
    assert checkpoints_equal(dict(first), dict(second))
    for name, x in alone.items():
        torch.testing.assert_close(first[name], x, atol=2e-4, rtol=1e-3)


def test_two_processes_match_one_with_the_same_data(script, script_path, tmp_path):
    """Actions are the likeliest ones, so that the data do not depend on which process draws which random number."""
    driver = tmp_path / "driver.py"
    driver.write_text(f"""
import importlib.util, os, sys, torch
sys.argv = ["driver"]
spec = importlib.util.spec_from_file_location("script", {str(script_path)!r})
script = sys.modules["script"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
sample, train_agent = script.sample, script.Agent
agents = []
script.sample = lambda params, space, generator=None: sample(params, space)
script.Agent = lambda *args: agents.append(train_agent(*args)) or agents[-1]
world = int(os.environ.get("WORLD_SIZE", 1))
args = script.Args(
    env_id="toys:Toy-v0", env_kwargs='{{"lengths": [3, 9, 1], "ends": ["truncated", "terminated"]}}',
    num_envs=4 // world, num_steps=16, num_minibatches=1, total_timesteps=64 * 6, lstm_hidden=8,
    horizon=4, eval_episodes=2, checkpoint_every=0, predictor_samples=10**6,
    freeze_extractor=False, target_kl=10.0, runs_dir={str(tmp_path)!r},
)
result = script.train(args)
torch.save(agents[0].state_dict(), {str(tmp_path)!r} + f"/weights_{{world}}_{{os.environ.get('RANK', 0)}}.pt")
""")
    assert_two_processes_match_one(driver)
