"""Training throughput on velocity-free CartPole (16 environments x 128 steps, 4 epochs x 4 minibatches, one thread) of
this project's script, sb3-contrib's RecurrentPPO, a loop over nn.LSTM steps, and the floor: the environments alone plus
one bare nn.LSTM forward and backward a minibatch. Then the predictor's cost on LunarLander. Rivals take turns; medians.

    python benchmark/throughput.py            # about 10 minutes, needs a machine that does nothing else

The first run installs sb3-contrib into benchmark/.venv-sb3 from requirements-sb3.txt. Results: throughput.csv and
predictor_cost.csv in benchmark/results/.
"""

import argparse
import csv
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
TASK = {"env_id": "CartPole-v1", "visible": (0, 2), "num_envs": 16, "num_steps": 128, "num_minibatches": 4}
BATCH = 16 * 128


def measure_script(updates: int, **changes) -> dict:
    """Steps per second of `train` between the start of its third rollout and that of its last."""
    import ppo_lstm_predictor as script

    times, collect = [], script.collect
    script.collect = lambda *args: times.append(time.perf_counter()) or collect(*args)
    script.assess = lambda *args: {
        "eval/episodic_return": 0,
        "eval/episodic_return_std": 0,
        "eval/return_memoryless": 0,
    }
    args = script.Args(total_timesteps=BATCH * updates, eval_episodes=1, **changes)
    with tempfile.TemporaryDirectory() as args.runs_dir:
        script.train(args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"sps": BATCH * (len(times) - 3) / (times[-1] - times[2]), "peak_mb": peak}


def measure_loop(updates: int) -> dict:
    """The same algorithm with nn.LSTM called once a step, in the rollout and in the update over whole environments."""
    import ppo_lstm_predictor as script

    class LoopAgent(script.Agent):
        def step(self, obs, state, action_mask=None):
            h, c = state.permute(1, 2, 0, 3).contiguous()
            features, (h, c) = self.lstm(self.encode(obs)[None], (h, c))
            return features[0], *self.heads(features[0], action_mask), torch.stack((h, c)).permute(2, 0, 1, 3)

        def unroll(
            self, obs, state, flush=None, action_mask=None
        ):  # obs [T, N, D + 1], the last entry marks episode starts
            features, x = [], self.encode(obs[..., :-1])
            h, c = state.permute(1, 2, 0, 3).contiguous()
            for t in range(len(x)):
                going_on = 1 - obs[t, :, -1, None]
                y, (h, c) = self.lstm(x[t : t + 1], (going_on * h, going_on * c))
                features.append(y[0])
            features = torch.stack(features)
            return features, *self.heads(features, action_mask)

    class WholeEnvironments:
        """A rollout whose observations carry the episode starts, so that a segment may span episodes."""

        def __init__(self, rollout):
            self.__dict__ = dict(vars(rollout))
            self.obs = torch.cat((rollout.obs, rollout.start[..., None].float()), -1)

    args = script.Args(**TASK)
    torch.manual_seed(1)
    envs = script.make_envs(args, args.num_envs)
    space, generator = envs.single_action_space, torch.Generator().manual_seed(1)
    agent = LoopAgent(4, space, args)
    optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5, fused=True)
    carry, times = script.reset(envs, agent, 1), []
    for _ in range(updates):
        times.append(time.perf_counter())
        rollout = script.Rollout(args, agent, 4, space, False, torch.device("cpu"))
        script.collect(envs, agent, rollout, carry, generator)
        ends = rollout.terminated, rollout.truncated
        after = script.next_values(agent, rollout, carry)
        rollout.advantages, rollout.returns = script.gae(rollout.reward, rollout.value, after, *ends, 0.99, 0.95)
        segments = script.cut_segments(torch.zeros_like(rollout.start), 0)  # one for each environment
        for _ in range(args.update_epochs):
            for batch in script.minibatches(segments, args.num_minibatches, args.num_envs, generator):
                loss, _ = script.ppo_loss(agent, WholeEnvironments(rollout), batch, space, args, BATCH / 4)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()
        agent.update_statistics(rollout.obs.flatten(0, 1), rollout.returns.flatten())
    return {"sps": BATCH * (updates - 3) / (times[-1] - times[2])}


def measure_floor(updates: int) -> dict:
    import ppo_lstm_predictor as script

    envs = script.make_envs(script.Args(**TASK), 16)
    envs.reset(seed=1)
    envs.action_space.seed(1)
    actions = [envs.action_space.sample() for _ in range(128)]
    lstm = torch.nn.LSTM(64, 128)
    x, zeros = torch.randn(128, 4, 64), torch.zeros(1, 4, 128)
    start = time.perf_counter()
    for _ in range(updates):
        for action in actions:
            envs.step(action)
        for _ in range(16):
            lstm(x, (zeros, zeros))[0].sum().backward()
    return {"sps": BATCH * updates / (time.perf_counter() - start)}


SUBJECTS = {
    "script": lambda: measure_script(13, predictor=False, **TASK),
    "loop": lambda: measure_loop(6),
    "floor": lambda: measure_floor(10),
    "predictor off": lambda: measure_script(13, predictor=False),
    "predictor H=5": lambda: measure_script(13, horizon=5),
    "predictor H=50": lambda: measure_script(13, horizon=50),
    "predictor H=200": lambda: measure_script(13, horizon=200),
}


def sb3_python() -> Path:
    python = HERE / ".venv-sb3" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", HERE / ".venv-sb3"], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", HERE / "requirements-sb3.txt"], check=True)
    return python


def run(subject: str) -> dict:
    """Measures a subject in a process of its own."""
    command = [sys.executable, __file__, "--subject", subject]
    if subject == "sb3-contrib":
        command = [sb3_python(), HERE / "sb3_recurrent_ppo.py", "--total-timesteps", str(BATCH * 6)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def compare(subjects: list[str], reference: str, rounds: int, path: Path) -> None:
    """Runs the subjects in turn, writes every run to a CSV file, prints medians and ratios to the reference."""
    rows = []
    for i in range(rounds):
        for subject in subjects:
            rows.append({"round": i, "subject": subject, "peak_mb": math.nan} | run(subject))
            print(f"round {i + 1}: {subject} {rows[-1]['sps']:.0f} steps/s", file=sys.stderr)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["round", "subject", "sps", "peak_mb"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    of = {subject: [row for row in rows if row["subject"] == subject] for subject in subjects}
    print(f"| subject | steps/s | {reference} / it | peak MB |\n|---|---|---|---|")
    for subject in subjects:
        ratios = [a["sps"] / b["sps"] for a, b in zip(of[reference], of[subject], strict=True)]
        sps, peak = (statistics.median(row[key] for row in of[subject]) for key in ("sps", "peak_mb"))
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {subject} | {sps:.0f} | {spread} | {peak:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--subject", choices=SUBJECTS, help="measure this one alone and print JSON")
    args = parser.parse_args()
    if args.subject:
        torch.set_num_threads(1)
        print(json.dumps(SUBJECTS[args.subject]()))
        return
    results = HERE / "results"
    compare(["script", "sb3-contrib", "loop", "floor"], "script", args.rounds, results / "throughput.csv")
    predictors = [subject for subject in SUBJECTS if subject.startswith("predictor")]
    compare(predictors, "predictor off", args.rounds, results / "predictor_cost.csv")


if __name__ == "__main__":
    main()
