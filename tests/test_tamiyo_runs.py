"""Whole runs of ppo_lstm_tamiyo.py: the same seed, resume, evaluation, signals, wrong input, two processes."""

import dataclasses
import functools
import json
import signal

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
    run,
    run_from_shell,
)
from toys import same_but_for_time, scalars, tiny_hosts

from environments import hosts

SMALL = {"num_envs": 4, "num_minibatches": 2, "lstm_hidden": 8, "eval_episodes": 4, "checkpoint_every": 2}
TOY = {"env_id": "toys:Toy-v0", "num_envs": 2, "num_steps": 16, "total_timesteps": 32 * 8}
TOY["env_kwargs"] = json.dumps({"lengths": [5, 9, 30], "ends": ["terminated", "truncated"]})


@pytest.fixture(autouse=True)
def no_pictures(tamiyo, monkeypatch):
    """test_tamiyo.py draws them."""
    monkeypatch.setattr(tamiyo, "actions_figure", blank_figure)


@pytest.fixture
def quick(monkeypatch):
    tiny_hosts(monkeypatch, minibatches=1)


def small_run(tamiyo, folder, **changes):
    args = tamiyo.Args(**({"total_timesteps": 400, "runs_dir": str(folder)} | SMALL | changes))
    return tamiyo.train(args)


def toy_run(tamiyo, folder, **changes):
    return small_run(tamiyo, folder, **(TOY | changes))


@pytest.mark.parametrize("changes", [{}, {"recurrent": False, "env_kwargs": '{"history": 5}'}, {"reset_every": 4}])
def test_13_the_same_seed_gives_the_same_scalars(tamiyo, tmp_path, quick, changes):
    first, second = (small_run(tamiyo, tmp_path / name, total_timesteps=200, **changes) for name in "ab")
    same_but_for_time(scalars(first["run_dir"]), scalars(second["run_dir"]))
    assert first["eval_return_mean"] == second["eval_return_mean"] and first["global_step"] == 200
    tags = scalars(first["run_dir"])
    assert all(error < 1e-4 for _, error in tags["losses/first_ratio_error"])
    assert {f"tamiyo/{name}" for name in ("val_accuracy", "test_accuracy", "params_ratio", "culled")} <= tags.keys()
    assert first["never_return_mean"] == 0 and first["cull_precision"] is None  # too few culls to tell
    folder = tmp_path / "a"
    for name in ("actions.png", "args.json", "best.pt", "common/gae.py", "environments/hosts.py"):
        assert len(list(folder.glob(f"*/{name}"))) == 1


def test_training_scores_are_those_of_the_episodes(tamiyo, tmp_path, quick, monkeypatch):
    real, seen = tamiyo.collect, []
    monkeypatch.setattr(tamiyo, "collect", lambda *args: seen.append(real(*args)) or seen[-1])
    result = small_run(tamiyo, tmp_path)
    tags = scalars(result["run_dir"])
    for (_, logged), episodes in zip(tags["charts/episodic_return"], seen, strict=True):
        assert logged == pytest.approx(np.mean([episode_return for episode_return, _ in episodes]), rel=1e-5)
        assert all(length == 25 for _, length in episodes)


def test_runs_train_on_hosts_of_their_own(tamiyo, tmp_path, quick, monkeypatch):
    """Different seeds, different hosts; none is one of the evaluation's."""
    real, seen = hosts.Morphogenesis.begin, []

    def begin(self, n, seed, *rest):
        seen.append((self, seed))
        real(self, n, seed, *rest)

    monkeypatch.setattr(hosts.Morphogenesis, "begin", begin)
    drawn = []
    for seed in (1, 2):
        small_run(tamiyo, tmp_path / str(seed), seed=seed, checkpoint_every=0, total_timesteps=200)
        first = {id(env): begun for env, begun in reversed(seen)}  # the first host of each environment
        drawn.append([begun for env, begun in seen if first[id(env)] < hosts.HELD_OUT])  # of the one that trains
        evaluated = {begun for _, begun in seen if begun >= hosts.HELD_OUT}
        assert evaluated == {hosts.HELD_OUT + i for i in range(4)}
        seen.clear()
    assert len(drawn[0]) == len(drawn[1]) == 4 * (2 + 1)  # two rollouts of an episode, and what follows
    assert len({*drawn[0], *drawn[1]}) == 2 * len(drawn[0]) and max(*drawn[0], *drawn[1]) < hosts.HELD_OUT


def test_every_update_refreshes_anneals_and_stops(tamiyo, tmp_path, monkeypatch):
    """States before each later epoch; the entropy bonus falls to 0; a KL above the target ends the epochs."""
    refreshed, bonuses, refresh, loss = [], [], tamiyo.refresh_states, tamiyo.ppo_loss
    monkeypatch.setattr(tamiyo, "refresh_states", lambda *args: (refreshed.append(1), refresh(*args)))
    monkeypatch.setattr(tamiyo, "ppo_loss", lambda *args: (bonuses.append(args[3].ent_coef), loss(*args))[1])
    toy_run(tamiyo, tmp_path / "a", refresh_states=True, update_epochs=3)
    assert len(refreshed) == 2 * 7 and len(bonuses) == 7 * 3 * 2  # the first of 8 rollouts only gives the statistics
    np.testing.assert_allclose(bonuses[::6], [0.01 * (1 - update / 8) for update in range(1, 8)])
    bonuses.clear()
    toy_run(tamiyo, tmp_path / "b", target_kl=1e-12, update_epochs=3)
    assert len(bonuses) == 7 * 2


def test_resume_continues_counters_schedule_and_curve(tamiyo, tmp_path):
    first = toy_run(tamiyo, tmp_path)
    args = tamiyo.Args(**tamiyo.load(f"{first['run_dir']}/checkpoint.pt")["args"])
    args = dataclasses.replace(args, resume=first["run_dir"], total_timesteps=32 * 16)
    second = tamiyo.train(args)
    assert first["global_step"] == 32 * 8 and second["global_step"] == 32 * 16
    curve = scalars(first["run_dir"])["losses/value_loss"]
    assert [step for step, _ in curve] == [32 * (i + 1) for i in range(1, 16)]  # the first rollout only warms up
    rates = dict(scalars(first["run_dir"])["charts/learning_rate"])
    assert rates[32 * 9] == pytest.approx(args.learning_rate * (1 - 8 / 16), rel=1e-4)
    state = tamiyo.load(f"{first['run_dir']}/checkpoint.pt")
    assert state["agent"]["obs_stats.count"] == 32 * 16
    with pytest.raises(tamiyo.InputError, match="total-timesteps"):
        tamiyo.train(args)


def test_evaluate_a_checkpoint_and_reference_policies(tamiyo, tamiyo_path, tmp_path, quick, capsys):
    first = small_run(tamiyo, tmp_path)
    checkpoint = f"{first['run_dir']}/checkpoint.pt"
    saved = tamiyo.load(checkpoint)["args"]
    again = tamiyo.train(tamiyo.Args(**saved | {"evaluate": checkpoint}))
    assert again["eval_return_mean"] == pytest.approx(first["eval_return_mean"])
    other = tamiyo.train(tamiyo.Args(**saved | {"evaluate": checkpoint, "eval_episodes": 3}))
    assert "never_return_mean" in again and "never_return_mean" not in other  # that was on other hosts
    wiped = tamiyo.train(tamiyo.Args(**saved | {"evaluate": checkpoint, "reset_every": 1}))
    assert wiped["eval_return_mean"] == pytest.approx(first["eval_return_memoryless"])
    static = tamiyo.train(tamiyo.Args(**saved | {"evaluate": checkpoint, "policy": "static"}))
    assert static["policy"] == "static" and static["germinations"] >= static["fossilized"]
    never = tamiyo.train(tamiyo.Args(**SMALL, policy="never", runs_dir=str(tmp_path / "none")))
    assert never["eval_return_mean"] == 0 and never["run_dir"] is None and not (tmp_path / "none").exists()
    random = run(tamiyo_path, "--policy", "random", "--eval-episodes", "2", "--num-envs", "4")
    assert random.returncode == 0, random.stderr
    assert json.loads(random.stdout.splitlines()[-1])["germinations"] > 0


def test_from_the_shell(tamiyo_path):
    never = run_from_shell(tamiyo_path, "--policy", "never", "--eval-episodes", "1")
    assert never.returncode == 0, never.stderr
    assert json.loads(never.stdout.splitlines()[-1])["eval_return_mean"] == 0
    assert run(tamiyo_path, "--num-envs", "many").returncode == 2


def test_a_checkpoint_of_a_gpu_resumes_on_a_cpu(tamiyo):
    """A GPU's generator has a state of 16 bytes, which no other takes."""
    generator = torch.Generator()
    state = {"rng": torch.zeros(16, dtype=torch.uint8), "progress": {"global_step": 7}}
    assert tamiyo.restore({"rng": generator}, state).global_step == generator.initial_seed() == 7


def test_05_termination_and_truncation_reach_the_advantages(tamiyo, tmp_path, monkeypatch):
    train = functools.partial(toy_run, tamiyo, tmp_path)
    assert_ends_reach_the_advantages(tamiyo, train, tmp_path, monkeypatch)


def test_an_episode_without_end_does_not_hold_up_the_evaluation(tamiyo, tmp_path, monkeypatch):
    monkeypatch.setattr(tamiyo, "LONGEST", 50)
    with pytest.warns(UserWarning, match="does not end within 50 steps"):
        result = toy_run(tamiyo, tmp_path, env_kwargs=json.dumps({"lengths": [10**9]}), total_timesteps=64)
    assert result["global_step"] == 64 and result["eval_return_mean"] is not None


def test_transfer_takes_what_fits(tamiyo, tmp_path, capfd):
    checkpoint = f"{toy_run(tamiyo, tmp_path)['run_dir']}/checkpoint.pt"
    toy_run(tamiyo, tmp_path / "wider", init_from=checkpoint, lstm_hidden=9, total_timesteps=32)
    assert "not taken from the checkpoint: agent lstm.weight_hh_l0" in capfd.readouterr().err
    same = toy_run(tamiyo, tmp_path / "same", init_from=checkpoint, total_timesteps=32, learning_rate=1e-9)
    old, new = (tamiyo.load(path)["agent"] for path in (checkpoint, f"{same['run_dir']}/checkpoint.pt"))
    torch.testing.assert_close(new["encoder.0.weight"], old["encoder.0.weight"], atol=1e-5, rtol=0)
    other = toy_run(tamiyo, tmp_path / "other", init_from=checkpoint, env_id="Acrobot-v1", env_kwargs="{}")
    state = tamiyo.load(f"{other['run_dir']}/checkpoint.pt")["agent"]
    assert state["obs_stats.count"] == 32 * 8  # nothing of statistics whose other half does not fit


def test_other_checkpoints_are_refused_by_name(tamiyo, tmp_path):
    first = toy_run(tamiyo, tmp_path)
    path = f"{first['run_dir']}/checkpoint.pt"
    args = tamiyo.Args(**tamiyo.load(path)["args"] | {"resume": first["run_dir"], "total_timesteps": 10**6})
    for change in ({"lstm_hidden": 9}, {"recurrent": False}, {"reset_every": 2}, {"dataset": "cifar10"}):
        with pytest.raises(tamiyo.InputError, match=next(iter(change))):
            tamiyo.train(dataclasses.replace(args, **change))
    state = torch.load(path, weights_only=True)
    state["agent"]["actor.0.weight"] = torch.zeros(7, 8)
    torch.save(state, path)
    with pytest.raises(tamiyo.InputError, match=r"actor.0.weight.*\[7, 8\]"):
        tamiyo.train(args)
    torch.save(state | {"args": state["args"] | {"tree_depth": 3}}, path)
    with pytest.raises(tamiyo.InputError, match="tree_depth"):
        tamiyo.train(args)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_says_how_to_go_on_and_exits(tamiyo, tamiyo_path, tmp_path, number, code):
    assert_a_signal_saves(tamiyo, tamiyo_path, SMALL | TOY, tmp_path, number, code)


WRONG = [
    (["--num-envs", "0"], "--num-envs must be above 0, not 0"),
    (["--target-kl", "-1"], "--target-kl must be above 0"),
    (["--seed", str(2**32)], "--seed must be below"),
    (["--reset-every", "-1"], "--reset-every must not be negative"),
    (["--gamma", "1.5"], "--gamma must be at most 1"),
    (["--num-minibatches", "100"], "--num-minibatches must not exceed --num-envs"),
    (["--env-id", "environments.hosts:Morphogenesi-v0"], "Morphogenesis"),
    (["--env-id", "no_such_module:Thing-v0"], "no_such_module"),
    (["--env-kwargs", "{oops"], "Expecting"),
    (["--env-kwargs", '{"nonsense": 1}'], "nonsense"),
    (["--env-id", "Pendulum-v1"], "no support for actions in Box"),
    (["--policy", "static"], "--policy static needs --evaluate"),
    (["--policy", "always", "--env-id", "CartPole-v1"], "is for Morphogenesis only"),
    (["--policy", "never", "--init-from", "a.pt"], "--policy never does not train"),
    (["--resume", "nowhere"], "nowhere/checkpoint.pt"),
    (["--evaluate", "a.pt", "--init-from", "b.pt"], "a.pt"),
]


@pytest.mark.parametrize("args, message", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(tamiyo, tamiyo_path, tmp_path, args, message, monkeypatch, capfd):
    assert_refused(tamiyo, tamiyo_path, args, message, tmp_path, monkeypatch, capfd)


def test_a_broken_archive_is_wrong_input(tamiyo, tamiyo_path, tmp_path, monkeypatch, capfd):
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"not an archive")
    args = ["--dataset", "cifar10", "--data-dir", str(tmp_path)]
    assert_refused(tamiyo, tamiyo_path, args, "cifar-10-binary.tar.gz", tmp_path, monkeypatch, capfd)


@pytest.mark.parametrize("fault, message", [("raise", "the rotor fell off"), ("nan", "non-finite observation")])
def test_a_broken_environment_is_one_clear_error(tamiyo, tmp_path, fault, message):
    env_kwargs = json.dumps({"lengths": [50], "fault": fault, "fault_step": 16 * 5 + 3})
    with pytest.raises((RuntimeError, FloatingPointError), match=message):
        toy_run(tamiyo, tmp_path, env_kwargs=env_kwargs, eval_episodes=1)
    saved = tamiyo.load(next(tmp_path.glob("*/checkpoint.pt")))
    assert saved["progress"]["update"] == 4  # the last consistent state


def test_a_mask_that_allows_nothing_names_the_environment(tamiyo, tmp_path):
    with pytest.raises(ValueError, match="environment 0 allows no action"):
        toy_run(tamiyo, tmp_path, env_kwargs=json.dumps({"masked": "nothing"}))


@pytest.mark.parametrize("launch", LAUNCHERS)
def test_two_processes_match_one_with_the_same_data(tamiyo_path, tmp_path, launch):
    """Actions are the likeliest ones, so that the data do not depend on which process draws which random number."""
    driver = tmp_path / "driver.py"
    driver.write_text(f"""
import importlib.util, os, sys, torch
sys.argv = ["driver"]
spec = importlib.util.spec_from_file_location("script", {str(tamiyo_path)!r})
script = sys.modules["script"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
sample, train_agent, reset = script.sample, script.Agent, script.reset
agents = []
script.sample = lambda logits, generator=None: sample(logits)
script.Agent = lambda *args: agents.append(train_agent(*args)) or agents[-1]
world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
script.reset = lambda envs, agent, seed: reset(envs, agent, 1 + rank * envs.num_envs)
args = script.Args(
    env_id="toys:Toy-v0", env_kwargs='{{"lengths": [3, 9, 1], "ends": ["truncated", "terminated"]}}',
    num_envs=4 // world, num_steps=16, num_minibatches=1, total_timesteps=64 * 6, lstm_hidden=8,
    eval_episodes=2, checkpoint_every=0, target_kl=10.0, runs_dir={str(tmp_path)!r},
)
result = script.train(args)
torch.save(agents[0].state_dict(), {str(tmp_path)!r} + f"/weights_{{world}}_{{rank}}.pt")
""")
    assert_two_processes_match_one(driver, launch)


@pytest.mark.slow
def test_it_learns_to_remember(tamiyo, tmp_path):
    """What was seen three steps ago is the answer: without memory, chance is 0.5."""
    sizes = {"num_envs": 16, "num_steps": 32, "num_minibatches": 4, "lstm_hidden": 32}
    sizes |= {"eval_episodes": 100, "checkpoint_every": 0}
    result = toy_run(tamiyo, tmp_path, env_id="toys:Recall-v0", env_kwargs="{}", total_timesteps=20_000, **sizes)
    assert result["eval_return_memoryless"] < 0.7
    assert result["eval_return_mean"] > 0.95
