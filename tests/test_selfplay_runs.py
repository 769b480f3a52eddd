"""Whole runs of sequence_ppo_selfplay.py: the same seed, resume, evaluation, signals, wrong input, two processes."""

import copy
import dataclasses
import json
import signal

import numpy as np
import pytest
import torch
from helpers import LAUNCHERS, assert_refused, checkpoints_equal, run, start, step_of, wait_for_checkpoint
from toys import same_but_for_time, scalars

from environments.openspiel import OpenSpielGames

SMALL = {
    "env_id": "kuhn_poker",
    "num_envs": 32,
    "games_per_update": 64,
    "num_minibatches": 2,
    "hidden_size": 8,
    "eval_episodes": 10,
    "snapshot_every": 128,
    "checkpoint_every": 3,
    "opponents": "self:0.5,past:0.4,random:0.1",
}
FLAGS = [part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def small_run(selfplay, folder, **changes):
    args = selfplay.Args(**({"total_timesteps": 1000, "runs_dir": str(folder)} | SMALL | changes))
    return selfplay.train(args)


@pytest.mark.parametrize("recurrent", [True, False])
def test_the_same_seed_gives_the_same_scalars(selfplay, tmp_path, recurrent):
    first, second = (small_run(selfplay, tmp_path / name, recurrent=recurrent) for name in "ab")
    tags, others = (scalars(result["run_dir"]) for result in (first, second))
    del tags["selfplay/games_per_s"], others["selfplay/games_per_s"]
    same_but_for_time(tags, others)
    assert first["exploitability"] == second["exploitability"]


def test_logged_action_frequencies_are_those_of_the_games(selfplay, tmp_path, monkeypatch):
    real, counts = selfplay.play, []

    def spy(*args, **how):
        payoffs, data, lost = real(*args, **how)
        if data is not None:
            counts.append(np.bincount(data.action.numpy(), minlength=2) / len(data.action))
        return payoffs, data, lost

    monkeypatch.setattr(selfplay, "play", spy)
    tags = scalars(small_run(selfplay, tmp_path)["run_dir"])
    logged = np.array([[value for _, value in tags[f"actions/{action}"]] for action in range(2)]).T
    np.testing.assert_allclose(logged, counts, rtol=1e-6)
    np.testing.assert_allclose(logged.sum(1), 1, rtol=1e-6)


def test_10_first_ratio_is_one_in_every_update(selfplay, tmp_path):
    result = small_run(selfplay, tmp_path, num_envs=7, env_id="leduc_poker")
    assert all(error < 1e-4 for _, error in scalars(result["run_dir"])["losses/first_ratio_error"])


def test_evaluation_is_of_the_policy_or_of_its_average_in_everything(selfplay, tmp_path):
    """--eval-average decides exploitability, matches and best.pt alike."""
    first, second = (small_run(selfplay, tmp_path / name, eval_average=name == "b") for name in "ab")
    for name in ("exploitability", "exploitability_memoryless"):
        assert first[name] != second[name]
    assert first["exploitability_average"] == second["exploitability_average"] == second["exploitability"]
    average = [x for _, x in scalars(second["run_dir"])["selfplay/exploitability_average"]]
    assert second["best"] == pytest.approx(-min(average), abs=1e-4)


def test_defaults_are_those_of_the_game(selfplay, selfplay_path):
    leduc, battle = selfplay.Args(), selfplay.Args(env_id="gen9randombattle", gamma=1.0)
    assert (leduc.num_envs, leduc.norm_adv, battle.num_envs, battle.norm_adv, battle.gamma) == (
        2048,
        False,
        25,
        True,
        1,
    )
    shown = " ".join(run(selfplay_path, "--env-id", "gen9randombattle", "--help").stdout.replace("│", " ").split())
    assert "--num-envs INT games that each process plays at once (default: 25)" in shown
    assert "(default: gen9randombattle)" in shown


GOOFSPIEL = {"env_id": "goofspiel", "env_kwargs": '{"imp_info": true, "num_cards": 4}', "algorithm": "reinforce"}
PHANTOM_GO = {"env_id": "phantom_go", "env_kwargs": '{"board_size": 3}', "games_per_update": 8}
RUNS = [
    {"bptt_length": 1, "env_id": "leduc_poker"},
    {"bptt_length": -1, "memory_mb": 1e-6, "env_id": "leduc_poker", "target_kl": 1e-9, "update_epochs": 3},
    {"recurrent": False, "algorithm": "reinforce"},
    {"opponents": "random:1", "num_minibatches": 1, "eval_likeliest": True, "eval_average": True},
    {"opponents": "past:1", "games_per_update": 10, "num_envs": 64, "norm_adv": True},
    GOOFSPIEL,
    PHANTOM_GO,
]


@pytest.mark.parametrize("changes", RUNS)
def test_every_kind_of_run_ends_with_a_summary(selfplay, tmp_path, changes):
    result = small_run(selfplay, tmp_path, total_timesteps=300, **changes)
    assert result["global_step"] >= 300 and 0 <= result["win_rate_vs_random"] <= 1
    known = "env_id" not in changes or changes["env_id"] == "leduc_poker"
    assert ("exploitability" in result) == known
    tags = scalars(result["run_dir"])
    if changes.get("bptt_length"):
        assert {value for _, value in tags["losses/bptt_length"]} == {1.0}
    assert np.isfinite([value for points in tags.values() for _, value in points]).all()


def test_10_payoffs_are_booked_where_they_belong(selfplay, tmp_path, monkeypatch):
    """The mean payoff is the learner's, over its last 100 games against others, in whichever seat."""
    real, seen = selfplay.play, []

    def play(games, pairs, generator, learner=None, **how):
        payoffs, *others = real(games, pairs, generator, learner, **how)
        for (first, second), payoff in zip(pairs, payoffs, strict=True):
            if learner and first is not second:
                assert (first is learner) != (second is learner)
                seen.append(payoff[0] if first is learner else payoff[1])
        return payoffs, *others

    monkeypatch.setattr(selfplay, "play", play)
    result = small_run(selfplay, tmp_path)
    assert len(seen) > 200 and result["train_return_mean"] == pytest.approx(np.mean(seen[-100:]), abs=1e-4)


def test_07_schedules_reach_the_loss_the_games_and_the_reference(selfplay, tmp_path, monkeypatch):
    """The reference, followed by hand, is the moving average of the weights that is saved and evaluated."""
    weights, seen, real, games = [], [], selfplay.descend, selfplay.play

    def descend(agent, optimizer, *rest):
        metrics = real(agent, optimizer, *rest)
        weights.append(copy.deepcopy(agent.policy.state_dict()))
        seen.append((rest[-1].ent_coef, rest[-1].barrier_coef, optimizer.param_groups[0]["lr"]))
        return metrics

    played = []
    monkeypatch.setattr(selfplay, "descend", descend)
    monkeypatch.setattr(selfplay, "play", lambda *args, **how: played.append(len(args[1])) or games(*args, **how))
    changes = {"ref_rate": 0.1, "games_growth": 3, "ent_coef": 0.3, "ent_coef_final": 0.1, "checkpoint_every": 0}
    result = small_run(selfplay, tmp_path, num_minibatches=1, snapshot_every=10**6, **changes)
    state = torch.load(f"{result['run_dir']}/checkpoint.pt", weights_only=True)
    steps = [0, *[step for step, _ in scalars(result["run_dir"])["charts/SPS"]][:-1]]
    now = [selfplay.scheduled(selfplay.Args(**state["args"]), step / 1000) for step in steps]
    assert played[: len(now)] == [entry.games_per_update for entry in now] and {64, 192} == set(played[: len(now)])
    assert seen == [(entry.ent_coef, entry.barrier_coef, entry.learning_rate) for entry in now]
    average = state["pool"][0]  # the untrained policy
    for entry, new in zip(now, weights, strict=True):
        average = {name: x + entry.ref_rate * (new[name] - x) for name, x in average.items()}
    for name, x in state["reference"].items():
        torch.testing.assert_close(x, average[name], atol=1e-5, rtol=0)


def test_resume_keeps_pool_counters_and_curve(selfplay, tmp_path, monkeypatch):
    first = small_run(selfplay, tmp_path)
    state = torch.load(f"{first['run_dir']}/checkpoint.pt", weights_only=True)
    before = scalars(first["run_dir"])["charts/SPS"]
    args = selfplay.Args(**(state["args"] | {"resume": first["run_dir"], "total_timesteps": 2000}))
    real, loaded = selfplay.load, []

    def load(path, **parts):
        result = real(path, **parts)
        loaded.append({name: copy.deepcopy(part.state_dict()) for name, part in parts.items()})
        return result

    monkeypatch.setattr(selfplay, "load", load)
    second = selfplay.train(args)
    assert loaded[-1].keys() == {"agent", "reference", "optimizer", "pool"}
    for name, part in loaded[-1].items():
        assert checkpoints_equal(part, state[name]), name
    assert len(state["pool"]) > 3 and 0 in state["pool"]
    assert second["run_dir"] == first["run_dir"] and second["global_step"] >= 2000 > first["global_step"]
    assert second["games"] > first["games"] and second["best"] >= first["best"]
    after = scalars(first["run_dir"])["charts/SPS"]
    assert after[: len(before)] == before and len(after) > len(before)
    assert [step for step, _ in after] == sorted(step for step, _ in after)
    again = torch.load(f"{first['run_dir']}/checkpoint.pt", weights_only=True)
    assert max(again["pool"]) > max(state["pool"])


def test_a_failing_evaluation_costs_no_training(selfplay, tmp_path, monkeypatch):
    monkeypatch.setattr(selfplay, "assess", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        small_run(selfplay, tmp_path, checkpoint_every=0)
    checkpoint = next(tmp_path.glob("*/checkpoint.pt"))
    assert step_of(selfplay.load(checkpoint)) >= 1000


def test_against_a_checkpoint_plays_its_policy_or_its_average(selfplay, tmp_path, monkeypatch):
    first, second = (f"{small_run(selfplay, tmp_path / n, recurrent=n == 'a')['run_dir']}/checkpoint.pt" for n in "ab")
    mine, other = (torch.load(path, weights_only=True) for path in (first, second))
    real, players = selfplay.head_to_head, []
    monkeypatch.setattr(selfplay, "head_to_head", lambda *args: players.append(args[1:3]) or real(*args))
    for average in (False, True):
        changes = {"evaluate": first, "against": second, "eval_average": average}
        result = selfplay.train(selfplay.Args(**mine["args"] | changes))
        assert 0 <= result["win_rate_vs_opponent"] <= 1 and "exploitability" not in result
        for net, state in zip(players[-1], (mine, other), strict=True):
            policy = {name[7:]: x for name, x in state["agent"].items() if name.startswith("policy.")}
            assert checkpoints_equal(dict(net.state_dict()), dict(state["reference"] if average else policy))
        assert [net.recurrent for net in players[-1]] == [True, False]  # each as it was trained
    with pytest.raises(selfplay.InputError, match="plays kuhn_poker"):
        changes = {"env_id": "leduc_poker", "evaluate": None, "total_timesteps": 100}
        leduc = f"{small_run(selfplay, tmp_path / 'c', **changes)['run_dir']}/checkpoint.pt"
        state = selfplay.load(leduc)["args"] | {"evaluate": leduc, "against": second}
        monkeypatch.setattr(selfplay, "load", lambda path, **parts: {"args": mine["args"], "counters": {}})
        selfplay.train(selfplay.Args(**state))


def test_evaluate_and_init_from(selfplay, selfplay_path, tmp_path, monkeypatch):
    first = small_run(selfplay, tmp_path / "a")
    checkpoint = f"{first['run_dir']}/checkpoint.pt"
    result = run(selfplay_path, "--evaluate", checkpoint)
    assert result.returncode == 0, result.stderr
    _, last = result.stdout.splitlines()
    again = json.loads(last)
    assert {name: x for name, x in again.items() if name != "best"} == {n: first[n] for n in again if n != "best"}
    monkeypatch.setattr(selfplay, "descend", lambda *args: {"ratio_error": torch.zeros(()), "padding": torch.zeros(()),
                        "bptt_length": torch.zeros(()), "approx_kl": torch.zeros(())})  # fmt: skip
    started = small_run(selfplay, tmp_path / "c", init_from=checkpoint, seed=5)
    for name in ("exploitability", "exploitability_average"):  # nothing was learnt, nothing lost
        assert started[name] == pytest.approx(first["exploitability"], abs=1e-4)


def test_a_checkpoint_of_another_game_or_network_is_refused(selfplay, tmp_path):
    result = small_run(selfplay, tmp_path)
    checkpoint = f"{result['run_dir']}/checkpoint.pt"
    args = selfplay.Args(**(selfplay.load(checkpoint)["args"] | {"evaluate": checkpoint}))
    for change in ({"env_id": "leduc_poker"}, {"hidden_size": 16}):
        with pytest.raises(selfplay.InputError, match=r"cannot load.*size mismatch"):
            selfplay.train(dataclasses.replace(args, **change))
    with pytest.raises(selfplay.InputError, match="has its steps: --total-timesteps"):
        selfplay.train(dataclasses.replace(args, evaluate=None, resume=result["run_dir"]))


WRONG = [
    (["--env-id", "leduc_pokr"], "leduc_poker"),
    (["--env-id", "tic_tac_toe", "--env-kwargs", "{oops"], "tic_tac_toe"),
    (["--env-id", "kuhn_poker", "--env-kwargs", '{"players": 3}'], "two-player"),
    (["--env-id", "kuhn_poker", "--env-kwargs", '{"nonsense": 3}'], "nonsense"),
    (["--num-envs", "0"], "--num-envs must be above 0"),
    (["--target-kl", "0"], "--target-kl must be above 0"),
    (["--gamma", "1.5"], "--gamma must be 0 or more and at most 1,"),
    (["--ref-kl-coef", "-1"], "--ref-kl-coef must be 0 or more"),
    (["--bptt-length", "-2"], "--bptt-length"),
    (["--env-id", "kuhn_poker", "--env-kwargs", "[1]"], "kuhn_poker"),
    (["--opponents", "self"], "expected name:share"),
    (["--opponents", "self:0.5,heuristic:0.5"], "no opponent heuristic"),
    (["--opponents", "self:0"], "not all 0"),
    (["--opponents", "self:nan"], "not all 0"),
    (["--opponents", "self:inf"], "not all 0"),
    (["--opponents", "self:1,past:-0.1"], "shares must be 0 or more"),
    (["--against", "random"], "--against needs --evaluate"),
    (["--evaluate", "nowhere.pt"], "nowhere.pt"),
    (["--resume", "nowhere"], "nowhere/checkpoint.pt"),
    (["--init-from", "nowhere.pt"], "nowhere.pt"),
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


@pytest.mark.parametrize("where", ["observation", "reward"])
def test_what_is_not_finite_is_an_error(selfplay, tmp_path, monkeypatch, where):
    real = OpenSpielGames.observe

    def observe(games):
        turn = real(games)
        (turn.obs if where == "observation" else turn.ended[0].reward if turn.ended else turn.obs[:0])[:1] = np.nan
        return turn

    monkeypatch.setattr(OpenSpielGames, "observe", observe)
    with pytest.raises(FloatingPointError, match="an observation or a reward that is not finite"):
        small_run(selfplay, tmp_path)


def test_a_signal_cuts_an_evaluation_short(selfplay, tmp_path, monkeypatch):
    """Running games end, no others start, and there is no summary."""
    checkpoint, real, seen = f"{small_run(selfplay, tmp_path)['run_dir']}/checkpoint.pt", selfplay.play, []

    def play(*args, **how):
        selfplay.signals.append(signal.SIGINT)
        seen.append(real(*args, **how))
        return seen[-1]

    monkeypatch.setattr(selfplay, "play", play)
    args = selfplay.load(checkpoint)["args"] | {"evaluate": checkpoint, "eval_episodes": 200}
    try:
        assert selfplay.train(selfplay.Args(**args)) == {}
    finally:
        selfplay.signals.clear()
    ended = np.isfinite(seen[0][0]).all(1).sum()
    assert 0 < ended <= SMALL["num_envs"] and len(seen) == 1


def test_a_lost_connection_saves_first(selfplay, tmp_path, monkeypatch):
    real, calls = selfplay.play, []

    def broken(*args):
        calls.append(args)
        if len(calls) == 5:
            raise ConnectionError("the server is gone")
        return real(*args)

    monkeypatch.setattr(selfplay, "play", broken)
    with pytest.raises(ConnectionError, match="the server is gone"):
        small_run(selfplay, tmp_path, checkpoint_every=0)
    assert selfplay.load(next(tmp_path.glob("*/checkpoint.pt")))["counters"]["games"] == 4 * 64


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
        hidden_size=32, checkpoint_every=0, games_growth=1,
    )  # fmt: skip
    assert result["exploitability"] < 0.2  # 0.458 before
