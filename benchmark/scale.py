"""How speed and memory of ppo_lstm_predictor.py's default run (LunarLander, horizon 50) scale, and what bounds them.

    python benchmark/scale.py    # 15 minutes on an idle machine; results/scale.csv, and a table

One setting at a time is changed: environments, width of the LSTM, steps of backpropagation (0: whole episodes), threads
of torch, processes of torchrun. Each point is a process of its own (or two), at least five updates; the first is not
counted. Columns: steps a second of all processes, peak memory in MB of the first, and the shares of its time that go
into stepping environments, into the rest of the rollout (the network), and into everything else, which is the update.
With a CUDA device, the script takes it.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import records
import torch
from matplotlib.figure import Figure

HERE = Path(__file__).parent
SWEEPS = {
    "num_envs": [1, 4, 16, 64, 256, 1024],
    "lstm_hidden": [32, 64, 128, 256, 512],
    "bptt_length": [8, 32, 0],
    "torch_threads": [1, 2],
    "processes": [1, 2],
}
DEFAULTS = {"num_envs": 16, "lstm_hidden": 128, "bptt_length": 0, "torch_threads": 1, "processes": 1}
STEPS = 32_768  # at least, of each point
COLUMNS = ["setting", "value", "round", "sps", "peak_mb", "environments", "network", "update"]


def measure(num_envs: int, lstm_hidden: int, bptt_length: int, torch_threads: int, processes: int) -> dict:
    import ppo_lstm_predictor as script

    batch, spent, started = processes * num_envs * 128, {"environments": 0.0, "rollout": 0.0}, []
    updates = max(5, STEPS // batch) + 1

    def timed(name: str, function):
        def call(*args):
            start = time.perf_counter()
            result = function(*args)
            spent[name] += time.perf_counter() - start
            return result

        return call

    def make_envs(*args, make=script.make_envs):
        envs = make(*args)
        envs.step = timed("environments", envs.step)
        return envs

    rollout = timed("rollout", script.collect)

    def collect(*args):
        if len(started) == 1:  # the first update is over
            spent.update(dict.fromkeys(spent, 0.0))
        started.append(time.perf_counter())
        return rollout(*args)

    def assess(*args):  # the training is over
        started.append(time.perf_counter())
        return {"eval/episodic_return": 0.0}, Figure()

    script.make_envs, script.collect, script.assess = make_envs, collect, assess
    flags = {"num_envs": num_envs, "lstm_hidden": lstm_hidden, "bptt_length": bptt_length}
    flags |= {"torch_threads": torch_threads, "num_minibatches": min(8, num_envs), "total_timesteps": updates * batch}
    with tempfile.TemporaryDirectory() as folder:
        script.train(script.Args(runs_dir=folder, checkpoint_every=0, eval_episodes=1, **flags))
    seconds = started[-1] - started[1]
    parts = {"environments": spent["environments"], "network": spent["rollout"] - spent["environments"]}
    parts["update"] = seconds - spent["rollout"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    shares = {name: round(x / seconds, 3) for name, x in parts.items()}
    return {"sps": round((updates - 1) * batch / seconds), "peak_mb": round(peak)} | shares


def run(settings: dict) -> dict:
    """Measures in a process of its own, or several."""
    call = [sys.executable]
    if settings["processes"] > 1:
        call += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={settings['processes']}"]
    done = subprocess.run([*call, __file__, "--one", json.dumps(settings)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{settings}: failed")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(line)


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--settings", nargs="+", default=list(SWEEPS), choices=list(SWEEPS))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "scale.csv")
    parser.add_argument("--one", help="measure these settings alone and print JSON")
    args = parser.parse_args()
    if args.one:
        sys.path.insert(0, str(HERE.parent))
        result = measure(**json.loads(args.one))
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(result))
        return
    records.refuse(parser, args, args.out)
    about, rows = records.circumstances(("torch",)), []
    about["machine"] += f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    for i in range(args.rounds):
        for setting in args.settings:
            for value in SWEEPS[setting]:
                rows.append({"setting": setting, "value": value, "round": i} | run(DEFAULTS | {setting: value}) | about)
                print("| " + " | ".join(str(rows[-1][name]) for name in COLUMNS) + " |", flush=True)
                records.write(args.out, rows)


if __name__ == "__main__":
    main()
