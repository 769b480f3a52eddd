"""What a step of worldmodel_a2c.py costs on CartPole with 16 environments: the environments alone, rollouts without and
with plans, whole training, and the KV cache against recomputing what each step depends on.

    python benchmark/worldmodel_speed.py    # 2 minutes; results/worldmodel_speed.csv

Figures are steps per second of one thread, interleaved in one run; their ratios are what matters.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import records
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import worldmodel_a2c as wm  # noqa: E402

ROUNDS = 3


def setting(**changes) -> tuple:
    args = wm.Args(cuda=False, **changes)
    envs = wm.make_envs(args, args.num_envs)
    return args, envs, wm.Agent(envs.single_observation_space, envs.single_action_space, args)


def environments_alone() -> int:
    args, envs, _ = setting()
    envs.reset(seed=1)
    actions = np.random.default_rng(0).integers(2, size=(2000, args.num_envs))
    for action in actions:
        envs.step(action)
    return actions.size


def rollout(plans: bool, steps: int = 256) -> int:
    args, envs, agent = setting()
    agent.updates += 1  # from the first rollout on there are plans
    wm.collect(wm.play(envs, agent, args, 1, plans=plans), steps, agent.memory.prefix, None)
    return steps * args.num_envs


@torch.inference_mode()
def memory_steps(cached: bool, steps: int) -> int:
    """Latents of 16 environments, one after the other, through the memory."""
    args, _, agent = setting()
    memory, n = agent.memory, args.num_envs
    length = memory.prefix + 1  # what a step depends on
    z, previous = torch.randn(n, steps + length, agent.vision.size), torch.zeros(n, steps + length, 2)
    age = torch.arange(length).expand(n, -1)
    _, cache = memory(z[:, :length], previous[:, :length], age)
    for t in range(1, steps + 1):
        if cached:
            _, cache = memory.step(z[:, t], previous[:, t], cache)
        else:
            memory(z[:, t : t + length], previous[:, t : t + length], age)
    return steps * n


def training(planning: bool) -> int:
    steps = 16 * 32 * 12
    with tempfile.TemporaryDirectory() as folder:
        fixed = {"eval_episodes": 1, "checkpoint_every": 0, "total_timesteps": steps, "runs_dir": folder}
        return wm.train(wm.Args(planning=planning, cuda=False, **fixed))["sps"]


MEASURED = {
    "environments alone": environments_alone,
    "rollout without plans": lambda: rollout(False),
    "rollout with plans": lambda: rollout(True),
    "memory with KV cache": lambda: memory_steps(True, 200),
    "memory, recomputing what a step depends on": lambda: memory_steps(False, 40),
}


def main() -> None:
    parser, path = records.parser(__doc__), records.RESULTS / "worldmodel_speed.csv"
    records.refuse(parser, parser.parse_args(), path)
    torch.set_num_threads(1)
    trained = {"training without plans": False, "training with plans": True}
    speeds = {name: [] for name in (*MEASURED, *trained)}
    for _ in range(ROUNDS):
        for name, measure in MEASURED.items():
            started = time.perf_counter()
            steps = measure()
            speeds[name].append(steps / (time.perf_counter() - started))
        for name, planning in trained.items():
            speeds[name].append(training(planning))
    rows, about, columns = [], records.circumstances(), ("what", "steps per second, median", "lowest", "highest")
    for name, values in speeds.items():
        row = [name, *(f"{value:.0f}" for value in (np.median(values), min(values), max(values)))]
        rows.append(dict(zip(columns, row, strict=True)) | about)
        print(*row, sep=", ")
    records.write(path, rows)


if __name__ == "__main__":
    main()
