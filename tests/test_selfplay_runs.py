"""Whole runs of sequence_ppo_selfplay.py: the same seed, resume, evaluation, signals, wrong input, two processes."""

import copy
import dataclasses
import json
import signal

import numpy as np
import pytest
import torch
from helpers import (
    LAUNCHERS,
    assert_refused,
    checkpoints_equal,
    run,
    run_from_shell,
    start,
    step_of,
    wait_for_checkpoint,
)
from toys import same_but_for_time, scalars

SMALL = {
    "env_id": "kuhn_poker",
    "num_envs": 32,
    "games_per_update": 64,
    "num_minibatches": 2,
    "hidden_size": 8,
    "eval_episodes": 10,
    "elo_games": 4,
    "snapshot_every": 128,
    "checkpoint_every": 3,
    "opponents": "self:0.5,past:0.4,random:0.1",
}
FLAGS = [part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def small_run(selfplay, folder, **changes):
    args = selfplay.Args(**({"total_timesteps": 1000, "runs_dir": str(folder)} | SMALL | changes))
    return selfplay.train(args)


@pytest.mark.parametrize("network", ["lstm", "attention", "lstm_attention", "mlp"])
def test_the_same_seed_gives_the_same_scalars(selfplay, tmp_path, network):
    first, second = (small_run(selfplay, tmp_path / name, network=network) for name in "ab")
    tags = scalars(first["run_dir"])
    others = scalars(second["run_dir"])
    for tag in ("selfplay/games_per_s", "selfplay/play_share"):
        del tags[tag], others[tag]
    same_but_for_time(tags, others)
    assert first["exploitability"] == second["exploitability"]


def test_logged_action_frequencies_are_those_of_the_games(selfplay, tmp_path, monkeypatch):
    real, counts = selfplay.play, []

    def spy(games, pairs, generator, learner=None):
        payoffs, data, lost = real(games, pairs, generator, learner)
        if data is not None:
            counts.append(np.bincount(data.action.numpy(), minlength=2) / len(data.action))
        return payoffs, data, lost

    monkeypatch.setattr(selfplay, "play", spy)
    tags = scalars(small_run(selfplay, tmp_path)["run_dir"])
    logged = np.array([[value for _, value in tags[f"actions/{action}"]] for action in range(2)]).T
    np.testing.assert_allclose(logged, counts, rtol=1e-6)
    np.testing.assert_allclose(logged.sum(1), 1, rtol=1e-6)


def test_10_first_ratio_is_one_in_every_update(selfplay, tmp_path):
    result = small_run(selfplay, tmp_path, network="lstm_attention", num_envs=7, env_id="leduc_poker")
    assert all(error < 1e-4 for _, error in scalars(result["run_dir"])["losses/first_ratio_error"])


def test_evaluation_plays_the_policy_or_its_average(selfplay):
    args = selfplay.Args(hidden_size=8)
    agent = selfplay.Agent(5, 0, 2, args)
    reference = copy.deepcopy(agent.policy)
    assert selfplay.evaluated(agent, reference, args).net is agent.policy
    assert selfplay.evaluated(agent, reference, dataclasses.replace(args, eval_average=True)).net is reference


GOOFSPIEL = {"env_id": "goofspiel", "env_kwargs": '{"imp_info": true, "num_cards": 4}', "algorithm": "reinforce"}
PHANTOM_GO = {"env_id": "phantom_go", "env_kwargs": '{"board_size": 3}', "games_per_update": 8, "network": "attention"}
RUNS = [
    {"bptt_length": 1, "network": "lstm_attention", "env_id": "leduc_poker"},
    {"bptt_length": -1, "memory_budget_mb": 0, "env_id": "leduc_poker", "target_kl": 1e-9, "update_epochs": 3},
    {"sequence": False, "algorithm": "reinforce", "baseline": False},
    {"opponents": "random:1", "num_minibatches": 1, "eval_deterministic": True, "eval_average": True},
    {"opponents": "past:1", "past_sampling": "prioritised", "games_per_update": 10, "num_envs": 64},
    GOOFSPIEL,
    PHANTOM_GO,
]


@pytest.mark.parametrize("changes", RUNS)
def test_every_kind_of_run_ends_with_a_summary(selfplay, tmp_path, changes):
    result = small_run(selfplay, tmp_path, total_timesteps=300, **changes)
    assert result["global_step"] >= 300 and 0 <= result["win_rates"]["random"] <= 1 and "snapshot_0" in result["elo"]
    known = "env_id" not in changes or changes["env_id"] == "leduc_poker"
    assert ("exploitability" in result) == known
    tags = scalars(result["run_dir"])
    if changes.get("bptt_length"):
        assert {value for _, value in tags["selfplay/bptt_length"]} == {1.0}
    assert np.isfinite([value for points in tags.values() for _, value in points]).all()


def test_10_payoffs_are_booked_where_they_belong(selfplay, tmp_path, monkeypatch):
    real, seen = selfplay.Pool.record, []

    def record(pool, pairs, payoffs, learner):
        booked = real(pool, pairs, payoffs, learner)
        seats = [pair.index(learner) for pair in pairs if pair[0] is not pair[1]]
        rows = [payoff for pair, payoff in zip(pairs, payoffs, strict=True) if pair[0] is not pair[1]]
        assert booked == [row[seat] for row, seat in zip(rows, seats, strict=True)] and len(booked) > 0
        seen.extend(booked)
        return booked

    monkeypatch.setattr(selfplay.Pool, "record", record)
    result = small_run(selfplay, tmp_path)
    assert result["train_return_mean"] == pytest.approx(np.mean(seen[-100:]))


def test_07_reference_and_entropy_bonus_follow_their_schedules(selfplay, tmp_path, monkeypatch):
    real, coefficients = selfplay.accumulate, []

    def accumulate(*args):
        coefficients.append(args[-1])
        return real(*args)

    monkeypatch.setattr(selfplay, "accumulate", accumulate)
    result = small_run(selfplay, tmp_path, ent_coef=0.3, ent_coef_final=0.1, num_minibatches=1)
    steps = [0, *[step for step, _ in scalars(result["run_dir"])["charts/SPS"]][:-1]]
    np.testing.assert_allclose(coefficients, [0.3 - 0.2 * step / 1000 for step in steps])


def test_07_the_reference_is_the_moving_average_that_is_evaluated(selfplay, tmp_path, monkeypatch):
    weights, record = [], selfplay.Pool.record

    def spy(pool, pairs, payoffs, learner):
        weights.append(copy.deepcopy(learner.net.state_dict()))
        return record(pool, pairs, payoffs, learner)

    monkeypatch.setattr(selfplay.Pool, "record", spy)
    result = small_run(selfplay, tmp_path, ref_rate=0.3)
    state = selfplay.load(f"{result['run_dir']}/checkpoint.pt")
    steps = [0, *[step for step, _ in scalars(result["run_dir"])["charts/SPS"]][:-1]]
    average = state["pool"]["nets"][0]  # the untrained policy
    for step, new in zip(steps, weights, strict=True):
        average = {name: x + 0.3 * (1 - step / 1000) * (new[name] - x) for name, x in average.items()}
    for name, x in state["reference"].items():
        torch.testing.assert_close(x, average[name], atol=1e-5, rtol=0)

    args = selfplay.Args(**state["args"])
    games = selfplay.make_games(args, 0)
    agent = selfplay.Agent(games.obs_size + games.num_actions, games.unseen_size, games.num_actions, args)
    agent.policy.load_state_dict(state["reference"])
    tables = selfplay.policy_tables(agent.policy, games.levels, games.num_actions, args.sequence)
    expected = selfplay.exploitability(games, games.levels, tables)
    assert result["exploitability_average"] == pytest.approx(expected, abs=1e-6) != result["exploitability"]


def test_resume_keeps_pool_counters_and_curve(selfplay, tmp_path):
    first = small_run(selfplay, tmp_path)
    state = selfplay.load(f"{first['run_dir']}/checkpoint.pt")
    before = scalars(first["run_dir"])["charts/SPS"]
    args = selfplay.Args(**(state["args"] | {"resume": first["run_dir"], "total_timesteps": 2000}))
    seen, real = {}, selfplay.restore

    def spy(parts, state, args):
        progress = real(parts, state, args)
        kept = {name: x.state_dict() for name, x in parts.items() if name != "rng"}
        seen["state"] = copy.deepcopy(kept)
        seen["pool"] = [player.name for player in parts["pool"].players]
        return progress

    selfplay.restore = spy
    try:
        second = selfplay.train(args)
    finally:
        selfplay.restore = real
    for name, saved in seen["state"].items():
        assert checkpoints_equal(saved, state[name]), name
    assert len(seen["pool"]) > 3 and seen["pool"][0] == "snapshot_0" and sum(map(len, state["pool"]["recent"])) > 20
    assert second["run_dir"] == first["run_dir"] and second["global_step"] >= 2000 > first["global_step"]
    after = scalars(first["run_dir"])["charts/SPS"]
    assert after[: len(before)] == before and len(after) > len(before)
    assert [step for step, _ in after] == sorted(step for step, _ in after)
    assert selfplay.load(f"{first['run_dir']}/checkpoint.pt")["pool"]["made"][-1] > state["pool"]["made"][-1]


def test_a_checkpoint_of_a_gpu_resumes_on_a_cpu(selfplay):
    """A GPU's generator has a state of 16 bytes, which no other takes."""
    generator = torch.Generator()
    state = {"rng": torch.zeros(16, dtype=torch.uint8), "progress": {"global_step": 7}}
    assert selfplay.restore({"rng": generator}, state, selfplay.Args()).global_step == generator.initial_seed() == 7


def test_a_failing_evaluation_costs_no_training(selfplay, tmp_path, monkeypatch):
    real = selfplay.assess
    monkeypatch.setattr(selfplay, "assess", lambda *args: 1 / 0 if args[-1] is True else real(*args))
    with pytest.raises(ZeroDivisionError):
        small_run(selfplay, tmp_path, checkpoint_every=0)
    checkpoint = next(tmp_path.glob("*/checkpoint.pt"))
    assert selfplay.load(checkpoint)["progress"]["global_step"] >= 1000


def test_against_a_checkpoint_s_average_plays_that(selfplay, tmp_path):
    checkpoint = f"{small_run(selfplay, tmp_path)['run_dir']}/checkpoint.pt"
    state = selfplay.load(checkpoint)
    args = selfplay.Args(**state["args"] | {"eval_average": True})
    games = selfplay.make_games(args, 0)
    agent = selfplay.Agent(games.obs_size + games.num_actions, games.unseen_size, games.num_actions, args)
    player = selfplay.opponent(checkpoint, agent, args)
    weights = player.net.state_dict()
    assert player.name == checkpoint and all(torch.equal(x, weights[name]) for name, x in state["reference"].items())
    assert any(not torch.equal(x, state["agent"][f"policy.{name}"]) for name, x in weights.items())


def test_evaluate_transfer_and_head_to_head(selfplay, selfplay_path, tmp_path):
    first, second = (small_run(selfplay, tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 2)))
    checkpoint, other = (f"{result['run_dir']}/checkpoint.pt" for result in (first, second))
    result = run_from_shell(selfplay_path, "--evaluate", checkpoint)
    assert result.returncode == 0, result.stderr
    again = json.loads(result.stdout.splitlines()[-1])
    for name in ("exploitability", "exploitability_average", "global_step"):
        assert again[name] == first[name]
    result = run(selfplay_path, "--evaluate", checkpoint, "--against", other, "--eval-episodes", 40)
    assert result.returncode == 0, result.stderr
    rates = json.loads(result.stdout.splitlines()[-1])["win_rates"]
    assert list(rates) == [other] and 0 <= rates[other] <= 1 and "nan" not in result.stdout
    started = small_run(selfplay, tmp_path / "c", init_from=checkpoint, seed=5)
    assert started["before"]["selfplay/exploitability"] == pytest.approx(first["exploitability"])


def test_a_checkpoint_of_another_game_or_network_is_refused(selfplay, tmp_path):
    result = small_run(selfplay, tmp_path)
    checkpoint = f"{result['run_dir']}/checkpoint.pt"
    args = selfplay.Args(**(selfplay.load(checkpoint)["args"] | {"evaluate": checkpoint}))
    for change in ({"env_id": "leduc_poker"}, {"network": "mlp"}, {"hidden_size": 16}, {"sequence": False}):
        with pytest.raises(selfplay.InputError, match=next(iter(change))):
            selfplay.train(dataclasses.replace(args, **change))
    with pytest.raises(selfplay.InputError, match="raise --total-timesteps"):
        selfplay.train(dataclasses.replace(args, evaluate=None, resume=result["run_dir"]))


WRONG = [
    (["--env-id", "leduc_pokr"], "leduc_poker"),
    (["--env-id", "tic_tac_toe", "--env-kwargs", "{oops"], "tic_tac_toe"),
    (["--env-id", "kuhn_poker", "--env-kwargs", '{"players": 3}'], "two-player"),
    (["--env-id", "kuhn_poker", "--env-kwargs", '{"nonsense": 3}'], "nonsense"),
    (["--num-envs", "0"], "--num-envs must be above 0"),
    (["--target-kl", "0"], "--target-kl must be above 0"),
    (["--gamma", "1.5"], "--gamma must be at most 1"),
    (["--ref-kl-coef", "-1"], "--ref-kl-coef must not be negative"),
    (["--bptt-length", "-2"], "--bptt-length"),
    (["--hidden-size", "30"], "--hidden-size must be a multiple of 4"),
    (["--env-id", "kuhn_poker", "--env-kwargs", "[1]"], "kuhn_poker"),
    (["--pool-size", "1"], "--pool-size must be at least 2"),
    (["--opponents", "self"], "expected name:share"),
    (["--opponents", "self:0.5,heuristic:0.5"], "no opponent heuristic"),
    (["--opponents", "self:0"], "all shares are 0"),
    (["--opponents", "self:1,past:-0.1"], "share of past is negative"),
    (["--against", "random"], "--against needs --evaluate"),
    (["--evaluate", "nowhere.pt"], "nowhere.pt"),
    (["--resume", "nowhere"], "nowhere/checkpoint.pt"),
    (["--init-from", "nowhere.pt"], "nowhere.pt"),
    (["--resume", "a", "--init-from", "b"], "a/checkpoint.pt"),
]


@pytest.mark.parametrize("args, message", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(selfplay, selfplay_path, tmp_path, args, message, monkeypatch, capfd):
    assert_refused(selfplay, selfplay_path, args, message, tmp_path, monkeypatch, capfd)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_says_how_to_go_on_and_exits(selfplay, selfplay_path, tmp_path, number, code):
    flags = [*FLAGS, "--runs-dir", tmp_path, "--checkpoint-every", 1]
    process = start(selfplay_path, *flags, "--total-timesteps", 10**9)
    checkpoint = wait_for_checkpoint(process, tmp_path)
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == code, err
    assert f"--resume {checkpoint.parent}" in err and "Traceback" not in err and not out
    saved = step_of(selfplay.load(checkpoint))
    assert saved == scalars(checkpoint.parent)["charts/SPS"][-1][0]
    more = run(selfplay_path, "--resume", checkpoint.parent, "--total-timesteps", saved + 64)
    assert more.returncode == 0, more.stderr
    assert json.loads(more.stdout.splitlines()[-1])["global_step"] > saved


def test_a_lost_connection_saves_first(selfplay, tmp_path, monkeypatch):
    real, calls = selfplay.play, []

    def broken(games, pairs, generator, learner=None):
        calls.append(learner)
        if sum(player is not None for player in calls) == 5:
            raise ConnectionError("the server is gone")
        return real(games, pairs, generator, learner)

    monkeypatch.setattr(selfplay, "play", broken)
    with pytest.raises(ConnectionError, match="the server is gone"):
        small_run(selfplay, tmp_path, checkpoint_every=0)
    assert selfplay.load(next(tmp_path.glob("*/checkpoint.pt")))["progress"]["update"] == 4


@pytest.mark.parametrize("launch", LAUNCHERS)
def test_two_processes_stay_identical(selfplay_path, tmp_path, launch):
    driver = tmp_path / "driver.py"
    driver.write_text(f"""
import importlib.util, os, sys, torch
sys.argv = ["driver"]
spec = importlib.util.spec_from_file_location("script", {str(selfplay_path)!r})
script = sys.modules["script"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
train_agent, agents = script.Agent, []
script.Agent = lambda *args: agents.append(train_agent(*args)) or agents[-1]
result = script.train(script.Args(total_timesteps=1500, target_kl=10.0, runs_dir={str(tmp_path)!r}, **{SMALL!r}))
torch.save(agents[0].state_dict(), {str(tmp_path)!r} + f"/weights_{{os.environ['RANK']}}.pt")
""")
    launch(driver, 2)
    first, second = (torch.load(tmp_path / f"weights_{rank}.pt") for rank in range(2))
    assert checkpoints_equal(dict(first), dict(second))
    assert len(list(tmp_path.glob("kuhn*"))) == 1  # one run folder


@pytest.mark.slow
def test_kuhn_gets_less_exploitable(selfplay, tmp_path):
    result = small_run(
        selfplay, tmp_path, total_timesteps=80_000, opponents="self:1", num_envs=512, games_per_update=512,
        hidden_size=32, checkpoint_every=0, learning_rate=3e-3, elo_games=0, ref_rate=0.05, ref_kl_coef=0.5,
        ent_coef=0.05, ent_coef_final=0.005, gae_lambda=0.5,
    )  # fmt: skip
    assert result["before"]["selfplay/exploitability"] > 0.4 and result["exploitability"] < 0.2
