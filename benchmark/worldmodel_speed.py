"""What a step of worldmodel_a2c.py costs on CartPole with 16 environments: the environments alone, rollouts without and
with planning, whole training, and the KV cache against recomputing the window of every step.

    python benchmark/worldmodel_speed.py    # 2 minutes; results/worldmodel_speed.csv

Figures are steps per second of one thread, interleaved in one run; their ratios are what matters.
"""

import csv
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import worldmodel_a2c as wm  # noqa: E402

ROUNDS = 3


def setting(**changes) -> tuple:
    args = wm.Args(cuda=False, **changes)
    envs = wm.make_envs(args, args.num_envs)
    agent = wm.Agent(wm.obs_shape(envs.single_observation_space), envs.single_action_space, args)
    rng = torch.Generator().manual_seed(1)
    return args, envs, agent, rng, wm.reset(envs, agent, 1)


def environments_alone() -> int:
    args, envs, *_ = setting()
    actions = np.random.default_rng(0).integers(2, size=(2000, args.num_envs))
    for action in actions:
        envs.step(action)
    return actions.size


def rollout(beta: float) -> int:
    args, envs, agent, rng, carry = setting()
    for _ in range(4):
        space = envs.single_action_space
        wm.collect(envs, agent, wm.Rollout(args, agent, space, False, torch.device("cpu")), carry, beta, args, rng)
    return 4 * args.num_envs * args.num_steps


@torch.inference_mode()
def memory_steps(cached: bool, steps: int = 200) -> int:
    """Latents of 16 environments, one after the other, through the memory."""
    args, _, agent, _, carry = setting()
    memory, n = agent.memory, args.num_envs
    length = memory.prefix + 1  # what a step depends on
    z, previous = torch.randn(steps + length, n, agent.vision.size), torch.zeros(n, 2)
    age = torch.arange(length).expand(n, -1)
    for t in range(steps):
        if cached:
            _, carry.cache = memory.step(z[t], previous, carry.cache)
        else:
            memory(z[t : t + length].transpose(0, 1), previous[:, None].expand(-1, length, -1), age)
    return steps * n


def training(planning: str) -> int:
    steps = 16 * 128 * 6
    with tempfile.TemporaryDirectory() as folder:
        real = wm.forecast_skill
        wm.forecast_skill = lambda *args: torch.full_like(real(*args), 0.9)  # so that it plans from the start
        fixed = {"eval_episodes": 1, "checkpoint_every": 0, "total_timesteps": steps, "runs_dir": folder}
        result = wm.train(wm.Args(planning=planning, **fixed))
        wm.forecast_skill = real
    return result["sps"]


MEASURED: dict[str, Callable[[], float]] = {
    "environments alone": environments_alone,
    "rollout, planning off": lambda: rollout(0.0),
    "rollout, planning on": lambda: rollout(1.0),
    "memory with KV cache": lambda: memory_steps(True),
    "memory, window recomputed": lambda: memory_steps(False, 40),
}


def main() -> None:
    torch.set_num_threads(1)
    speeds = {name: [] for name in (*MEASURED, "training, planning off", "training, planning on")}
    for _ in range(ROUNDS):
        for name, measure in MEASURED.items():
            started = time.perf_counter()
            steps = measure()
            speeds[name].append(steps / (time.perf_counter() - started))
        for planning in ("off", "always"):
            speeds[f"training, planning {'off' if planning == 'off' else 'on'}"].append(training(planning))
    with open(HERE / "results" / "worldmodel_speed.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["what", "steps per second, median", "lowest", "highest"])
        for name, values in speeds.items():
            row = [name, *(f"{value:.0f}" for value in (np.median(values), min(values), max(values)))]
            writer.writerow(row)
            print(*row, sep=", ")


if __name__ == "__main__":
    main()
