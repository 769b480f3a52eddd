"""What benchmark/ does beside worldmodel_a2c.py: plans with the true dynamics by brute force, training in stages, and
results that are kept."""

import copy
import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import run

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmark"))
import learning
import worldmodel_oracle as oracle


@torch.no_grad()
@pytest.mark.parametrize("horizon", [1, 3])
def test_true_values_are_those_of_copies_of_the_environments(horizon, monkeypatch):
    wm = oracle.wm
    monkeypatch.setattr(oracle, "training", [])
    args = wm.Args(num_envs=6, context=3, planning_horizon=horizon, planning_hold=3, cuda=False)
    envs = oracle.remember(args, 6)
    agent = wm.Agent(envs.single_observation_space, envs.single_action_space, args)
    agent.return_stats.update(torch.randn(50) * 5 + 20)
    envs.reset(seed=1)
    for n, env in enumerate(envs.envs):
        env.unwrapped.state = [0.1 * n, 0.2, 0.04 * n, 0.3]  # the last is about to fall
    obs = torch.tensor([env.unwrapped.state for env in envs.envs])
    beginning = torch.zeros(6, 1, 2), torch.zeros(6, 1, dtype=torch.int64)
    rows = agent.unroll(obs[:, None], *beginning)
    seen = wm.Seen(*(x[:, -1] for x in rows[:-1]), rows.cache)
    candidates = torch.arange(2).expand(6, -1)[..., None]
    got = oracle.true_action_values(agent, seen, candidates, args, torch.Generator())
    ended = 0
    for n in range(6):
        for action in range(2):
            env, cache, total = copy.deepcopy(envs.envs[n].unwrapped), seen.cache.rows(torch.tensor([n])), 0.0
            for k in range(horizon):
                obs, reward, terminated, *_ = env.step(action)
                total += args.gamma**k * reward
                then = agent.step(torch.tensor(obs[None]), torch.eye(2)[[action]], cache)
                cache = then.cache
                if terminated:
                    ended += 1
                    break
            else:
                total += args.gamma**horizon * float(agent.return_stats.denormalize(then.value))
            assert float(got[n, action]) == pytest.approx(total / float(agent.return_stats.std), rel=1e-4)
    assert ended == (horizon == 3)


@pytest.mark.slow
def test_stages_take_the_steps_of_one_run(tmp_path):
    flags = ["--num-envs", "2", "--num-steps", "8", "--num-minibatches", "2", "--eval-episodes", "1", "--no-planning"]
    result = run(
        learning.HERE / "worldmodel_stages.py", "--total-timesteps", "160", "--runs-dir", str(tmp_path), *flags
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["global_step"] == 160
    stages = sorted(
        (json.loads(path.read_text()) for path in tmp_path.glob("*/args.json")), key=lambda x: x["init_from"] or ""
    )
    assert [(x["stage"], x["total_timesteps"]) for x in stages] == [("vision", 32), ("memory", 32), ("all", 96)]


def test_results_that_are_there_are_kept(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    ran = []

    def fake(label, command, seed, tags, keep):
        ran.append((label, seed))
        points = [
            {"label": label, "seed": seed, "global_step": step, "episodic_return": step + seed} for step in (1, 2)
        ]
        return points, {"label": label, "seed": seed, "command": f"python {command}", "eval_return_mean": 1.0}

    def call(*flags):
        ran.clear()
        monkeypatch.setattr(sys, "argv", ["learning.py", "toy", *flags])
        learning.main()
        with (
            open(tmp_path / "results" / "toy_final.csv") as final,
            open(tmp_path / "results" / "toy_curves.csv") as curve,
        ):
            rows, points = list(csv.DictReader(final)), list(csv.DictReader(curve))
        assert len(points) == 2 * len(rows) and (tmp_path / "results" / "toy.png").exists()
        return ran, [(row["label"], int(row["seed"])) for row in rows]

    monkeypatch.setattr(learning, "HERE", tmp_path)
    monkeypatch.setattr(learning, "run", fake)
    tasks = {"toy": (range(1, 3), "Toy", {"a": "x.py", "b": "x.py --flag"})}
    monkeypatch.setattr(learning, "TASKS", tasks)
    everything = [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert call("--labels", "b") == ([("b", 1), ("b", 2)], [("b", 1), ("b", 2)])
    assert call() == ([("a", 1), ("a", 2)], everything)
    assert call() == ([], everything)
    assert call("--again", "--labels", "a") == ([("a", 1), ("a", 2)], everything)
    tasks["toy"][2]["b"] += " --other"
    with pytest.raises(SystemExit, match="2"):  # results of another command are there
        call()
    assert not ran and call("--again", "--labels", "b") == ([("b", 1), ("b", 2)], everything)
