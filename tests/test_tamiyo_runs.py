"""Whole runs of ppo_lstm_tamiyo.py: the same seed, resume, evaluation, signals, wrong input, two processes."""

import dataclasses
import functools
import json
import signal
from pathlib import Path

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
    return tamiyo.train(tamiyo.Args(**({"total_timesteps": 200, "runs_dir": str(folder)} | SMALL | changes)))


def toy_run(tamiyo, folder, **changes):
    return small_run(tamiyo, folder, **(TOY | changes))


def checkpoint_of(result):
    return f"{result['run_dir']}/checkpoint.pt"


@pytest.mark.parametrize("changes", [{}, {"recurrent": False, "env_kwargs": '{"history": 5}'}, {"reset_every": 4}])
def test_13_the_same_seed_gives_the_same_scalars(tamiyo, tamiyo_path, tmp_path, quick, changes):
    first, second = (small_run(tamiyo, tmp_path / name, **changes) for name in "ab")
    same_but_for_time(tags := scalars(first["run_dir"]), scalars(second["run_dir"]))
    assert first["eval_return_mean"] == second["eval_return_mean"] and first["global_step"] == 200
    assert all(error < 1e-4 for _, error in tags["losses/first_ratio_error"])
    names = ("validation_accuracy", "test_accuracy", "bare_test_accuracy", "parameter_ratio", "germinations", "culled")
    assert {f"tamiyo/{name}" for name in names} <= tags.keys() and set(names) <= first.keys()
    for name in ("actions.png", "args.json", "best.pt", "common/gae.py", "environments/hosts.py", tamiyo_path.name):
        assert len(list((tmp_path / "a").glob(f"*/{name}"))) == 1


def test_runs_train_on_hosts_of_their_own(tamiyo, tmp_path, quick, monkeypatch):
    """Different seeds, different hosts; none is one of the evaluation's."""
    real, seen = hosts.Morphogenesis.begin, []
    monkeypatch.setattr(
        hosts.Morphogenesis, "begin", lambda self, n, seed, x: seen.append(seed) or real(self, n, seed, x)
    )
    drawn = []
    for seed in (1, 2):
        small_run(tamiyo, tmp_path / str(seed), seed=seed, checkpoint_every=0, total_timesteps=100)
        evaluated = {begun for begun in seen if begun >= hosts.HELD_OUT}
        assert evaluated == {hosts.HELD_OUT + i for i in range(4)}
        drawn.append([begun for begun in seen if begun < hosts.HELD_OUT][:8])  # before the evaluation goes on
        seen.clear()
    assert len({*drawn[0], *drawn[1]}) == 16


def test_processes_and_resumed_runs_train_on_hosts_of_their_own(tamiyo, tmp_path, monkeypatch):
    drawn, real, setup = [], tamiyo.play, tamiyo.setup
    monkeypatch.setattr(
        tamiyo, "play", lambda envs, agent, seeds, **how: drawn.append(seeds) or real(envs, agent, seeds)
    )
    args = tamiyo.Args(**tamiyo.load(checkpoint_of(toy_run(tamiyo, tmp_path)))["args"])
    run_dir = str(next(tmp_path.iterdir()))
    tamiyo.train(dataclasses.replace(args, resume=run_dir, total_timesteps=32 * 9))

    def second(*given):
        device, _, _, *rest = setup(*given)
        return device, 1, 2, *rest

    monkeypatch.setattr(tamiyo, "setup", second)
    tamiyo.train(args)
    seeds = [seed for seeds in drawn for seed in seeds if seeds[0] < hosts.HELD_OUT]
    assert len(seeds) == len(set(seeds)) == 3 * 2 and max(seeds) < hosts.HELD_OUT


def test_environments_that_tell_what_they_like(tamiyo, tmp_path, monkeypatch):
    """… at an episode's end, now and then, are none of the script's business."""
    result = toy_run(tamiyo, tmp_path, env_id="CartPole-v1", env_kwargs="{}")
    assert not [name for name in result if "episode" in name and name != "eval_episodes"]
    assert not [tag for tag in scalars(result["run_dir"]) if tag.startswith("tamiyo/")]


def test_every_update_anneals_and_stops(tamiyo, tmp_path, monkeypatch):
    """The entropy bonus falls to 0; a KL above the target ends the epochs."""
    bonuses, loss = [], tamiyo.ppo_loss
    monkeypatch.setattr(tamiyo, "ppo_loss", lambda *args: bonuses.append(args[-1].ent_coef) or loss(*args))
    toy_run(tamiyo, tmp_path / "a", update_epochs=3)
    assert len(bonuses) == 7 * 3 * 2  # the first of 8 rollouts only gives the statistics
    np.testing.assert_allclose(bonuses[::6], [0.01 * (1 - update / 8) for update in range(1, 8)])
    bonuses.clear()
    toy_run(tamiyo, tmp_path / "b", target_kl=1e-12, update_epochs=3)
    assert len(bonuses) == 7 * 2


def test_resume_continues_counters_schedule_and_curve(tamiyo, tmp_path):
    first = toy_run(tamiyo, tmp_path)
    args = tamiyo.Args(**tamiyo.load(checkpoint_of(first))["args"])
    args = dataclasses.replace(args, resume=first["run_dir"], total_timesteps=32 * 16)
    second = tamiyo.train(args)
    assert first["global_step"] == 32 * 8 and second["global_step"] == 32 * 16
    curve = scalars(first["run_dir"])["losses/value_loss"]
    assert [step for step, _ in curve] == [32 * (i + 1) for i in range(1, 16)]  # the first rollout only warms up
    rates = dict(scalars(first["run_dir"])["charts/learning_rate"])
    assert rates[32 * 9] == pytest.approx(args.learning_rate * (1 - 8 / 16), rel=1e-4)
    assert torch.load(checkpoint_of(first), weights_only=True)["agent"]["obs_stats.count"] == 32 * 16
    with pytest.raises(tamiyo.InputError, match="total-timesteps"):
        tamiyo.train(args)


def test_evaluate_a_checkpoint(tamiyo, tamiyo_path, tmp_path, quick):
    first = small_run(tamiyo, tmp_path)
    saved = tamiyo.load(checkpoint_of(first))["args"] | {"evaluate": checkpoint_of(first)}
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    again, wiped = (tamiyo.train(tamiyo.Args(**saved | changes)) for changes in ({}, {"reset_every": 1}))
    assert again["eval_return_mean"] == pytest.approx(first["eval_return_mean"])
    assert again["eval_return_sampled"] == pytest.approx(first["eval_return_sampled"])
    assert wiped["eval_return_mean"] == pytest.approx(first["eval_return_memoryless"])
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


@pytest.mark.slow
def test_from_the_shell(tamiyo, tamiyo_path, tmp_path):
    first = toy_run(tamiyo, tmp_path, total_timesteps=64)
    result = run_from_shell(tamiyo_path, "--evaluate", checkpoint_of(first))
    assert result.returncode == 0, result.stderr
    _, last = result.stdout.splitlines()
    assert json.loads(last)["eval_return_mean"] == pytest.approx(first["eval_return_mean"])


def test_05_termination_and_truncation_reach_the_advantages(tamiyo, tmp_path, monkeypatch):
    train = functools.partial(toy_run, tamiyo, tmp_path)
    assert_ends_reach_the_advantages(tamiyo, train, tmp_path, monkeypatch)


def test_init_from_takes_the_weights(tamiyo, tmp_path):
    checkpoint = checkpoint_of(toy_run(tamiyo, tmp_path))
    same = toy_run(tamiyo, tmp_path / "same", init_from=checkpoint, total_timesteps=32, learning_rate=1e-9)
    old, new = (torch.load(path, weights_only=True)["agent"] for path in (checkpoint, checkpoint_of(same)))
    torch.testing.assert_close(new["encoder.weight"], old["encoder.weight"], atol=1e-6, rtol=0)
    assert new["obs_stats.count"] == old["obs_stats.count"] + 32


def test_other_checkpoints_are_refused_by_name(tamiyo, tmp_path):
    path = checkpoint_of(toy_run(tamiyo, tmp_path))
    for changes, name in (
        ({"lstm_hidden": 9}, "lstm.weight_hh_l0"),
        ({"env_id": "CartPole-v1", "env_kwargs": "{}"}, "obs_stats.mean"),
    ):
        with pytest.raises(tamiyo.InputError, match=name):
            toy_run(tamiyo, tmp_path / "x", init_from=path, **changes)
    assert not (tmp_path / "x").exists()
    args = tamiyo.Args(**tamiyo.load(path)["args"])
    state = torch.load(path, weights_only=True)
    for damage in (b"", b"no checkpoint", None):
        torch.save(state | {"agent": {}}, path) if damage is None else Path(path).write_bytes(damage)
        with pytest.raises(tamiyo.InputError, match="cannot load"):
            tamiyo.train(dataclasses.replace(args, evaluate=path))


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_says_how_to_go_on_and_exits(tamiyo, tamiyo_path, tmp_path, number, code):
    assert_a_signal_saves(tamiyo, tamiyo_path, SMALL | TOY, tmp_path, number, code)


WRONG = [
    (["--num-envs", "0"], "--num-envs must be above 0 and at most 100000, not 0"),
    (["--target-kl", "-1"], "--target-kl must be above 0"),
    (["--seed", str(2**32)], "--seed must be 0 or more and at most 1000000000"),
    (["--reset-every", "-1"], "--reset-every must be 0 or more"),
    (["--gamma", "1.5"], "--gamma must be 0 or more and at most 1"),
    (["--num-minibatches", "100"], "--num-minibatches must be above 0 and at most 64"),
    (["--env-id", "environments.hosts:Morphogenesi-v0"], "Morphogenesis"),
    (["--env-id", "no_such_module:Thing-v0"], "no_such_module"),
    (["--env-kwargs", "{oops"], "Expecting"),
    (["--env-kwargs", '{"nonsense": 1}'], "nonsense"),
    (["--env-kwargs", '{"setting": "easy"}'], "easy"),
    (["--env-id", "Pendulum-v1"], "no support for Box"),
    (["--resume", "nowhere"], "nowhere/checkpoint.pt"),
    (["--evaluate", "a.pt"], "a.pt"),
    (["--init-from", "a.pt"], "a.pt"),
]


@pytest.mark.parametrize("args, message", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(tamiyo, tamiyo_path, tmp_path, args, message, monkeypatch, capfd):
    assert_refused(tamiyo, tamiyo_path, args, message, tmp_path, monkeypatch, capfd)


def test_a_broken_archive_is_wrong_input(tamiyo, tamiyo_path, tmp_path, monkeypatch, capfd):
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"not an archive")
    args = ["--env-kwargs", json.dumps({"dataset": "cifar10", "data_dir": str(tmp_path)})]
    assert_refused(tamiyo, tamiyo_path, args, "cifar-10-binary.tar.gz", tmp_path, monkeypatch, capfd)


@pytest.mark.parametrize("fault, message", [("raise", "the rotor fell off"), ("nan", "not finite")])
def test_a_broken_environment_is_one_clear_error(tamiyo, tmp_path, fault, message):
    env_kwargs = json.dumps({"lengths": [50], "fault": fault, "fault_step": 16 * 5 + 3})
    with pytest.raises((RuntimeError, FloatingPointError), match=message):
        toy_run(tamiyo, tmp_path, env_kwargs=env_kwargs, eval_episodes=1)
    assert tamiyo.load(next(tmp_path.glob("*/checkpoint.pt")))["counters"]["global_step"] == 32 * 4


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
sample, train_agent, play = script.sample, script.Agent, script.play
agents = []
script.sample = lambda logits, generator: sample(logits, None)
script.Agent = lambda *args: agents.append(train_agent(*args)) or agents[-1]
world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
first = 1 + rank * 4 // world
script.play = lambda envs, agent, seeds, **how: play(envs, agent, [first + n for n in range(len(seeds))])
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
