"""How much could plans help? worldmodel_a2c.py on CartPole, its model replaced by the environment itself: candidates
are imagined without error, and only the values at the plans' end are still learnt. On the CPU.

    python benchmark/worldmodel_oracle.py --total-timesteps 10240 --no-anneal-lr    # the script's flags and its output

`python benchmark/learning.py planning` runs it beside the script.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import worldmodel_a2c as wm

make_envs = wm.make_envs
training = []  # the environments that the script trains in


def remember(*args):
    envs = make_envs(*args)
    training.append(envs)
    return envs


def true_action_values(agent: wm.Agent, seen: wm.Seen, action: Tensor, args: wm.Args, generator) -> Tensor:
    """As wm.action_values, Q [N, K] of actions [N, K, 1], but what is imagined is what would happen."""
    num_candidates = action.shape[1]
    rows = torch.arange(len(action)).repeat_interleave(num_candidates)
    sim = CartPoleVectorEnv(len(rows))
    sim.reset()
    sim.state = np.array([env.unwrapped.state for env in training[0].envs])[rows].T
    cache, action, alive = seen.cache.rows(rows), action.flatten(), torch.ones(len(rows))
    total, reward = 0.0, 1 / agent.return_stats.std
    for k in range(1, args.planning_horizon + 1):
        obs, _, terminated, _, _ = sim.step(action.numpy())
        sim.prev_done[:] = False  # what has fallen lies on; nothing is counted after
        total = total + args.gamma ** (k - 1) * alive * reward
        alive = alive * ~torch.from_numpy(terminated)
        taken = wm.encode_action(action[:, None], agent.choices)
        then = agent.step(torch.from_numpy(obs), taken, cache)
        cache = then.cache
        if k >= args.planning_hold:
            action = wm.sample(then.params, agent.choices, generator, alike=num_candidates)[:, 0]
    mean = agent.return_stats.mean / agent.return_stats.std
    total = total + args.gamma**args.planning_horizon * alive * (then.value + mean)
    return total.unflatten(0, (-1, num_candidates))


if __name__ == "__main__":
    wm.make_envs, wm.action_values = remember, true_action_values
    sys.argv.append("--no-cuda")
    wm.main()
