"""Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16)."""

import torch
from torch import Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both [T, N], of a rollout of T steps of N environments.

    Args (each [T, N], row t belongs to step t):
        values: V of the observation before the step.
        next_values: V of the observation after it: the next row's value, or V(final observation) where the episode
            was truncated. Ignored where it terminated.
        terminated, truncated: bool. Both end the episode and cut the recursion; only a terminated step has no
            future. Where both are set, terminated wins.
    """
    delta = rewards + gamma * next_values * ~terminated - values  # [T, N]
    carry_on = gamma * gae_lambda * (~(terminated | truncated)).to(delta)  # [T, N]
    advantages = torch.empty_like(delta)
    advantage = torch.zeros_like(delta[0])  # [N]
    for t in reversed(range(len(delta))):
        advantages[t] = advantage = delta[t] + carry_on[t] * advantage
    return advantages, advantages + values
