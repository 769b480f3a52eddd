"""Training throughput on velocity-free CartPole (16 environments x 128 steps, 4 epochs x 4 minibatches, one thread) of
this project's script, sb3-contrib's RecurrentPPO, a loop over nn.LSTM steps, and the floor: the environments alone plus
one bare nn.LSTM forward and backward a minibatch. Then the predictor's cost on LunarLander. Rivals take turns; medians.

    python benchmark/throughput.py            # about 10 minutes, needs a machine that does nothing else

The first run installs sb3-contrib into benchmark/.venv-sb3 from requirements-rivals.txt. Results: throughput.csv and
predictor_cost.csv in benchmark/results/.
"""

import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import records
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
TASK = {"env_id": "CartPole-v1", "visible": (0, 2), "num_minibatches": 4, "lstm_hidden": 128}
BATCH = 16 * 128


def measure_script(updates: int, agent_class: str = "Agent", **changes) -> dict:
    """Steps per second of `train` between the start of its third rollout and that of its last."""
    from matplotlib.figure import Figure

    import ppo_lstm_predictor as script

    class LoopAgent(script.Agent):
        """The same with nn.LSTM called once a step, in the rollout and in the update."""

        def one_step(self, encoded, state):
            features, state = self.lstm(encoded[None], tuple(state.transpose(0, 1).contiguous().unsqueeze(1)))
            return features[0], torch.stack(state).squeeze(1).transpose(0, 1)

        def step(self, obs, state, action_mask=None):
            encoded = self.encoder(self.normalize_obs(obs)[..., self.seen]).tanh()
            features, state = self.one_step(encoded, state)
            return *self.heads(encoded, features, action_mask), state

        def unroll(self, obs, state, flush, action_mask):
            features, encoded = [], self.encoder(self.normalize_obs(obs)[..., self.seen]).tanh()
            for t in range(len(encoded)):
                y, state = self.one_step(encoded[t], state)
                state = state * ~flush[t, :, None, None]
                features.append(y)
            return self.heads(encoded, torch.stack(features), action_mask)

    times, collect = [], script.collect
    script.Agent = {"Agent": script.Agent, "LoopAgent": LoopAgent}[agent_class]
    script.collect = lambda *args: times.append(time.perf_counter()) or collect(*args)
    script.assess = lambda *args: ({"eval/episodic_return": 0.0}, Figure())
    args = script.Args(total_timesteps=BATCH * updates, eval_episodes=1, checkpoint_every=0, **changes)
    with tempfile.TemporaryDirectory() as args.runs_dir:
        script.train(args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"sps": BATCH * (len(times) - 3) / (times[-1] - times[2]), "peak_mb": peak}


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
    "loop": lambda: measure_script(6, "LoopAgent", predictor=False, **TASK),
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
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", HERE / "requirements-rivals.txt"], check=True)
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
    rows, about = [], records.circumstances()
    for i in range(rounds):
        for subject in subjects:
            figures = run(subject)
            kept = {"sps": figures["sps"], "peak_mb": figures.get("peak_mb", math.nan)}
            rows.append({"round": i, "subject": subject} | kept | about)
            print(f"round {i + 1}: {subject} {rows[-1]['sps']:.0f} steps/s", file=sys.stderr)
    records.write(path, rows)
    of = {subject: [row for row in rows if row["subject"] == subject] for subject in subjects}
    print(f"| subject | steps/s | {reference} / it | peak MB |\n|---|---|---|---|")
    for subject in subjects:
        ratios = [a["sps"] / b["sps"] for a, b in zip(of[reference], of[subject], strict=True)]
        sps, peak = (statistics.median(row[key] for row in of[subject]) for key in ("sps", "peak_mb"))
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {subject} | {sps:.0f} | {spread} | {peak:.0f} |")


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--subject", choices=SUBJECTS, help="measure this one alone and print JSON")
    args = parser.parse_args()
    if args.subject:
        torch.set_num_threads(1)
        print(json.dumps(SUBJECTS[args.subject]()))
        return
    rivals, cost = records.RESULTS / "throughput.csv", records.RESULTS / "predictor_cost.csv"
    records.refuse(parser, args, rivals, cost)
    compare(["script", "sb3-contrib", "loop", "floor"], "script", args.rounds, rivals)
    predictors = [subject for subject in SUBJECTS if subject.startswith("predictor")]
    compare(predictors, "predictor off", args.rounds, cost)


if __name__ == "__main__":
    main()
