"""PPO with an LSTM policy that watches small networks, the hosts, train, and decides once an epoch for each of them
whether to grow a module, make it permanent, or remove it.

The data goes one way, and each stage has one place below:

    Morphogenesis.step (an epoch of N hosts) -> Agent.step (one LSTM cell, no gradients) -> Rollout [T, N]
    Rollout -> gae -> advantages, returns [T, N]
    Rollout -> cut_segments at episode ends and every bptt_length epochs -> minibatches of them, as columns [L, S]
    segments -> Agent.unroll (one LSTM call) -> logits, values -> ppo_loss -> optimizer

The hosts are in environments/hosts.py. PPO is Schulman et al. 2017, arXiv 1707.06347; the controller and the lifecycle
of its modules follow github.com/tachyon-beep/esper-lite. Numbers such as `detail 5` refer to docs/ppo_lstm_tamiyo.md.
"""

import importlib
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from gymnasium.spaces import Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.gae import gae
from common.obs import entry_names, flatten
from environments.hosts import (
    ACTIONS,
    BLUEPRINTS,
    CULL,
    EPOCHS,
    FOSSILIZE,
    GERMINATE,
    HELD_OUT,
    OBSERVATION,
    WAIT,
    Morphogenesis,
    Stage,
)


@dataclass
class Args:
    # --- run
    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the run folder's name"""
    seed: int = 1
    """seed of environments, networks and sampling; the same seed gives the same run on one machine"""
    torch_deterministic: bool = True
    """ask cuDNN for deterministic algorithms"""
    cuda: bool = True
    """use a CUDA device if there is one"""
    torch_threads: int = 1
    """threads of torch on the CPU; one is fastest for small recurrent networks"""
    runs_dir: str = "runs"
    """folder that holds the run folders"""
    checkpoint_every: int = 25
    """updates between checkpoints, each with an evaluation; 0 = only at the end"""
    resume: str | None = None
    """a run folder to continue, with its arguments unless others are given"""
    init_from: str | None = None
    """a checkpoint whose weights to start from, wherever names and shapes fit"""
    evaluate: str | None = None
    """a checkpoint to evaluate, with its arguments unless others are given; no training"""
    policy: Literal["learned", "never", "random", "always", "schedule", "heuristic", "static"] = "learned"
    """what `--evaluate` plays (`never` to `heuristic` need no checkpoint); static: the modules that the learned policy
    ends with, there from the start"""
    eval_episodes: int = 64
    """hosts of each evaluation, none of them trained on"""
    eval_deterministic: bool = True
    """evaluate with the most likely action instead of a sampled one"""

    # --- environment
    env_id: str = "environments.hosts:Morphogenesis-v0"
    """a Gymnasium id with Discrete actions; `module:Name-v0` imports the module first"""
    env_kwargs: str = "{}"
    """keyword arguments of the environment, as JSON, such as `{"history": 5}`"""
    dataset: Literal["digits", "cifar10"] = "digits"
    """what the hosts learn: scikit-learn's handwritten digits, or CIFAR-10"""
    data_dir: str = "data"
    """folder of CIFAR-10's binary archive, which is downloaded if it is not there"""

    # --- PPO
    total_timesteps: int = 128_000
    """epochs of hosts to train for, over all hosts and processes; a host has 25"""
    learning_rate: float = 1e-3
    """Adam's step size"""
    num_envs: int = 64
    """hosts of each process that train side by side"""
    num_steps: int = 25
    """epochs of each host per rollout"""
    anneal_lr: bool = True
    """lower the learning rate, and the entropy bonus, linearly to 0"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    num_minibatches: int = 4
    """minibatches per epoch; at most num_envs"""
    update_epochs: int = 8
    """passes over each rollout"""
    norm_adv: bool = True
    """normalise the advantages of each rollout"""
    clip_coef: float = 0.2
    """clip range of the probability ratio"""
    clip_vloss: bool = False
    """clip the value loss with clip_coef too (values are in units of the returns' standard deviation)"""
    ent_coef: float = 0.01
    """weight of the entropy bonus, lowered to 0 like the learning rate"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient"""
    target_kl: float | None = None
    """stop an update after an epoch whose mean approximate KL exceeds this; None = never"""

    # --- recurrence
    recurrent: bool = True
    """False replaces the LSTM by a feed-forward layer of the same width"""
    lstm_hidden: int = 128
    """width of the LSTM"""
    lstm_layers: int = 1
    """layers of the LSTM"""
    lstm_layer_norm: bool = False
    """normalise the LSTM's output"""
    bptt_length: int = 8
    """steps through which gradients flow; 0 = the whole episode, as far as the rollout holds it"""
    refresh_states: bool = False
    """recompute the stored LSTM states with the current weights before each later epoch"""
    reset_every: int = 0
    """zero the LSTM's state after so many steps of an episode, to measure what memory is worth; 0 = never"""


class InputError(Exception):
    """The user asked for something that cannot be done; the message is one line."""


def check(args: Args) -> None:
    """Raises InputError, with one clear line, for whatever can be known to fail before any work is done."""

    def need(ok: bool, message: str) -> None:
        if not ok:
            raise InputError(message)

    above_zero = ["total_timesteps", "num_envs", "num_steps", "num_minibatches", "update_epochs", "learning_rate"]
    above_zero += ["max_grad_norm", "torch_threads", "lstm_hidden", "lstm_layers", "eval_episodes"]
    above_zero += ["target_kl"] * (args.target_kl is not None)
    not_negative = ["seed", "bptt_length", "reset_every", "checkpoint_every", "ent_coef", "vf_coef", "clip_coef"]
    for name in above_zero + not_negative + ["gamma", "gae_lambda"]:
        value, flag = getattr(args, name), "--" + name.replace("_", "-")
        need(value > 0 or name not in above_zero, f"{flag} must be above 0, not {value}")
        need(value >= 0, f"{flag} must not be negative, not {value}")
        need(value <= 1 or name not in ("gamma", "gae_lambda"), f"{flag} must be at most 1, not {value}")
    need(args.num_minibatches <= args.num_envs, "--num-minibatches must not exceed --num-envs")
    need(args.seed < 2**32, f"--seed must be below 2**32, not {args.seed}")
    exclusive = [args.resume, args.init_from, args.evaluate]
    need(sum(map(bool, exclusive)) <= 1, "--resume, --init-from and --evaluate exclude each other")
    fixed = args.policy != "learned"
    need(not fixed or not (args.resume or args.init_from), f"--policy {args.policy} does not train")
    need(args.policy != "static" or args.evaluate, "--policy static needs --evaluate: it copies what that policy grows")
    try:
        envs = make_envs(args, 1)
        space, _ = envs.single_action_space, entry_names(envs.single_observation_space)
        envs.close()
    except Exception as error:
        raise InputError(f"{args.env_id}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    need(isinstance(space, Discrete), f"{args.env_id}: no support for actions in {space}")
    need(not fixed or isinstance(envs, Morphogenesis), f"--policy {args.policy} is for Morphogenesis only")


# --- environment


def make_envs(args: Args, num_envs: int) -> VectorEnv:
    """Environments that reset themselves in the step that ends an episode."""
    kwargs = json.loads(args.env_kwargs)
    module, _, name = args.env_id.rpartition(":")
    if module:
        importlib.import_module(module)
    if name == "Morphogenesis-v0":
        images = {"dataset": args.dataset, "data_dir": args.data_dir, "gamma": args.gamma}
        return gym.make_vec(name, num_envs, **images | kwargs)
    same_step = {"autoreset_mode": AutoresetMode.SAME_STEP, "copy": False}
    return gym.make_vec(name, num_envs, vectorization_mode="sync", vector_kwargs=same_step, **kwargs)


def all_sum(x: Tensor) -> Tensor:
    """The sum of x over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


class RunningMeanStd(nn.Module):
    """Mean and variance of a stream of [M, *shape] batches over all processes, merged as in Chan et al. 1979. Beyond
    `memory` samples, older ones fade exponentially."""

    def __init__(self, shape: tuple[int, ...], memory: float = math.inf):
        super().__init__()
        self.memory = memory
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))
        self.register_buffer("count", torch.zeros(()))

    def update(self, x: Tensor) -> None:
        count = all_sum(torch.tensor(float(len(x)), device=x.device))
        mean = all_sum(x.sum(0)) / count
        var = all_sum(((x - mean) ** 2).sum(0)) / count
        weight, delta = count / (self.count + count), mean - self.mean
        merged = (1 - weight) * (self.std**2 + weight * delta**2) + weight * var
        self.std.copy_(merged.sqrt().clamp(min=1e-4))
        self.mean += weight * delta
        self.count.copy_((self.count + count).clamp(max=self.memory))

    def normalize(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def denormalize(self, x: Tensor) -> Tensor:
        return x * self.std + self.mean


# --- network


def init_linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """encoder -> LSTM -> actor and critic, with the running statistics of its inputs and value targets.

    The state [N, 2, layers, H] is the LSTM's (h, c), batch first, so that it is stored and indexed like an observation;
    without an LSTM it has 0 layers. Values are normalised; `return_stats.denormalize` gives them in units of reward.
    """

    def __init__(self, obs_size: int, action_space: Discrete, args: Args):
        super().__init__()
        self.layers = args.lstm_layers if args.recurrent else 0
        self.hidden_size = args.lstm_hidden
        self.obs_stats = RunningMeanStd((obs_size,))
        self.return_stats = RunningMeanStd((), memory=100_000)
        self.encoder = nn.Sequential(init_linear(obs_size, 256, gain=math.sqrt(2)), nn.ReLU())
        if args.recurrent:
            self.lstm = nn.LSTM(256, self.hidden_size, self.layers)
            for name, weight in self.lstm.named_parameters():
                nn.init.zeros_(weight) if "bias" in name else nn.init.orthogonal_(weight)
        else:
            self.mlp = nn.Sequential(init_linear(256, self.hidden_size, gain=math.sqrt(2)), nn.ReLU())
        self.norm = nn.LayerNorm(self.hidden_size) if args.lstm_layer_norm else nn.Identity()
        self.actor = self.head(int(action_space.n), gain=0.01)
        if args.env_id.endswith("Morphogenesis-v0"):  # equal chances would cull nearly every seed before it grows
            nn.init.constant_(self.actor[-1].bias[WAIT : WAIT + 1], 3.0)
        self.critic = self.head(1, gain=1.0)

    def head(self, outputs: int, gain: float) -> nn.Sequential:
        hidden = init_linear(self.hidden_size, 64, gain=math.sqrt(2))
        return nn.Sequential(hidden, nn.Tanh(), init_linear(64, outputs, gain))

    def initial_state(self, n: int) -> Tensor:
        return torch.zeros(n, 2, self.layers, self.hidden_size, device=self.critic[-1].weight.device)

    def normalize_obs(self, obs: Tensor) -> Tensor:
        return self.obs_stats.normalize(obs).clamp(-10, 10)

    def heads(self, features: Tensor, action_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        features = self.norm(features)
        logits = self.actor(features)  # [..., A]
        if action_mask is not None:  # detail 7
            logits = logits.masked_fill(~action_mask, torch.finfo(logits.dtype).min)
        return logits, self.critic(features).squeeze(-1)

    def step(self, obs: Tensor, state: Tensor, action_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """One step of N environments: obs [N, D], state [N, 2, layers, H] -> logits [N, A], values [N], next state."""
        x = self.encoder(self.normalize_obs(obs))
        if not self.layers:
            x = self.mlp(x)
        else:
            cells = []  # (h, c) of each layer, [N, 2, H]
            for layer, weights in enumerate(self.lstm.all_weights):
                cell = torch.lstm_cell(x, (state[:, 0, layer], state[:, 1, layer]), *weights)
                cells.append(torch.stack(cell, 1))
                x = cell[0]
            state = torch.stack(cells, 2)
        return *self.heads(x, action_mask), state

    def unroll(self, obs: Tensor, state: Tensor, action_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """S segments of L steps: obs [L, S, D], state [S, 2, layers, H] before their first step -> logits [L, S, A],
        values [L, S] (detail 2)."""
        x = self.encoder(self.normalize_obs(obs))
        if not self.layers:
            x = self.mlp(x)
        else:
            h, c = state.permute(1, 2, 0, 3).contiguous()  # each [layers, S, H]
            x, _ = self.lstm(x, (h, c))
        return self.heads(x, action_mask)

    @torch.no_grad()
    def update_statistics(self, obs: Tensor, returns: Tensor) -> None:
        """Merges obs [M, D] and returns [M], and rescales the critic so that its denormalised values stay the same
        (detail 8; PopArt, eq. 9)."""
        mean, std = self.return_stats.mean.clone(), self.return_stats.std.clone()
        self.obs_stats.update(obs)
        self.return_stats.update(returns)
        last = self.critic[-1]
        last.weight.mul_(std / self.return_stats.std)
        last.bias.copy_((std * last.bias + mean - self.return_stats.mean) / self.return_stats.std)


def sample(logits: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Actions [N] and their log-probabilities [N]; without a generator, the most likely actions."""
    logprobs = logits.log_softmax(-1)
    exponential = torch.empty_like(logits).exponential_(generator=generator) if generator else torch.ones(())
    gumbel = -(exponential + 1e-20).log()  # the maximum of logits + Gumbel noise is a sample of their softmax
    action = (logprobs + gumbel).argmax(-1)
    return action, logprobs.gather(-1, action[:, None]).squeeze(-1)


def logprob_entropy(logits: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [...] for logits [..., A], actions [...]."""
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(-1, action[..., None]).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)


# --- rollout and segments


class Rollout:
    """T steps of N environments. Row t of every array [T, N, ...] belongs to step t: what the agent saw and its state
    *before* the step, what it did, and what came back."""

    def __init__(self, args: Args, agent: Agent, obs_size: int, carry: "Carry"):
        device = carry.obs.device

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(args.num_steps, args.num_envs, *shape, dtype=dtype, device=device)

        self.obs = empty(obs_size)
        self.start = empty(dtype=torch.bool)  # the state before the step is zero
        self.state = empty(2, agent.layers, agent.hidden_size)
        self.action_mask = None if carry.action_mask is None else empty(*carry.action_mask.shape[1:], dtype=torch.bool)
        self.action = empty(dtype=torch.int64)
        self.logprob = empty()
        self.value = empty()  # in units of reward
        self.reward = empty()
        self.terminated = empty(dtype=torch.bool)
        self.truncated = empty(dtype=torch.bool)
        self.wiped = empty(dtype=torch.bool)  # by `reset_every`, after the step
        self.next_obs = empty(obs_size)  # the true next observation, the last one of an episode included
        self.advantages, self.returns = empty(), empty()


@dataclass
class Carry:
    """Where the environments stand between two rollouts."""

    obs: Tensor  # [N, D]
    start: Tensor  # [N] bool: its state is zero
    state: Tensor  # [N, 2, layers, H]
    action_mask: Tensor | None  # [N, A] bool
    returns: np.ndarray  # [N] of the running episodes
    lengths: np.ndarray  # [N]


def finite(x: np.ndarray, what: str) -> np.ndarray:
    if not np.isfinite(x).all():
        raise FloatingPointError(f"an environment returned a non-finite {what}: {x}")
    return x


def observe(envs: VectorEnv, obs, infos: dict, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Observations [N, D] and the action mask [N, A] of `infos["action_mask"]`, if the environment gives one."""
    flat = torch.from_numpy(finite(flatten(envs.single_observation_space, obs), "observation")).to(device)
    if "action_mask" not in infos:
        return flat, None
    action_mask = torch.from_numpy(np.asarray(infos["action_mask"])).bool().to(device)  # [N, A]
    if not action_mask.any(-1).all():
        raise ValueError(f"environment {(~action_mask.any(-1)).nonzero()[0, 0]} allows no action at all")
    return flat, action_mask


def final_observation(envs: VectorEnv, infos: dict, n: int, device: torch.device) -> Tensor:
    flat = gym.spaces.flatten(envs.single_observation_space, infos["final_obs"][n]).astype(np.float32)  # [D]
    return torch.from_numpy(finite(flat, "final observation")).to(device)


def reset(envs: VectorEnv, agent: Agent, seed: int | list[int]) -> Carry:
    obs, infos = envs.reset(seed=seed)
    state, n = agent.initial_state(envs.num_envs), envs.num_envs
    obs, action_mask = observe(envs, obs, infos, state.device)
    start = torch.ones(n, dtype=torch.bool, device=state.device)
    return Carry(obs, start, state, action_mask, np.zeros(n), np.zeros(n, int))


@torch.inference_mode()
def collect(
    envs: VectorEnv, agent: Agent, rollout: Rollout, carry: Carry, generator: torch.Generator, reset_every: int = 0
) -> list[tuple[float, int]]:
    """Fills the rollout, moves `carry` on, and gives (return, length) of each episode that ended."""
    space, device, episodes = envs.single_action_space, carry.obs.device, []
    for t in range(len(rollout.obs)):
        logits, value, state = agent.step(carry.obs, carry.state, carry.action_mask)
        action, logprob = sample(logits, generator)
        rollout.obs[t], rollout.start[t], rollout.state[t] = carry.obs, carry.start, carry.state
        rollout.action[t], rollout.logprob[t], rollout.value[t] = action, logprob, value
        if rollout.action_mask is not None:
            rollout.action_mask[t] = carry.action_mask

        obs, reward, terminated, truncated, infos = envs.step(action.cpu().numpy() + space.start)
        carry.obs, carry.action_mask = observe(envs, obs, infos, device)
        rollout.reward[t], rollout.next_obs[t] = torch.from_numpy(finite(reward, "reward")), carry.obs
        rollout.terminated[t], rollout.truncated[t] = torch.from_numpy(terminated), torch.from_numpy(truncated)
        carry.returns += reward
        carry.lengths += 1
        wiped = carry.lengths % reset_every == 0 if reset_every else np.zeros_like(terminated)
        rollout.wiped[t] = torch.from_numpy(wiped)
        for n in np.flatnonzero(terminated | truncated):
            rollout.next_obs[t, n] = final_observation(envs, infos, n, device)
            episodes.append((float(carry.returns[n]), int(carry.lengths[n])))
            carry.returns[n], carry.lengths[n] = 0, 0
        carry.start = torch.from_numpy(terminated | truncated | wiped).to(device)  # detail 6
        carry.state = state.masked_fill(carry.start[:, None, None, None], 0)
    rollout.value.copy_(agent.return_stats.denormalize(rollout.value))
    return episodes


@torch.no_grad()
def next_values(agent: Agent, rollout: Rollout, carry: Carry) -> Tensor:
    """V of the observation after each step [T, N]: the next row's value or, where the episode was truncated, that of
    its final observation under the state that the stored one leads to (detail 5)."""
    _, last, _ = agent.step(carry.obs, carry.state)
    values = torch.cat((rollout.value[1:], agent.return_stats.denormalize(last)[None]))  # [T, N]
    cut = rollout.truncated.nonzero(as_tuple=True)
    if len(cut[0]):
        *_, state = agent.step(rollout.obs[cut], rollout.state[cut])
        state = state.masked_fill(rollout.wiped[cut][:, None, None, None], 0)
        _, final, _ = agent.step(rollout.next_obs[cut], state)
        values[cut] = agent.return_stats.denormalize(final)
    return values


class Segments(NamedTuple):
    """S runs of consecutive steps of one environment within one episode, to go through the LSTM together."""

    index: Tensor  # [L, S] into a flattened [T * N] rollout
    mask: Tensor  # [L, S] real steps; the others are padding


def cut_segments(start: Tensor, bptt_length: int) -> Segments:
    """Cuts a rollout at its first row, where the state is zero (`start` [T, N] bool) and every `bptt_length` steps
    between (0 = never) (detail 1)."""
    num_steps, num_envs = start.shape
    row = torch.arange(num_steps, device=start.device)[:, None]  # [T, 1]
    cut = start | (row == 0)
    if bptt_length:
        age = row - torch.where(cut, row, 0).cummax(0).values  # [T, N] steps since the last cut
        cut = age % bptt_length == 0
    n, t = cut.T.nonzero(as_tuple=True)  # [S] one environment after the other, time ascending
    length = torch.diff(n * num_steps + t, append=n.new_tensor([num_envs * num_steps]))  # [S]
    step = torch.arange(int(length.max()), device=start.device)[:, None]  # [L, 1]
    mask = step < length
    return Segments(torch.where(mask, (t + step) * num_envs + n, 0), mask)


def minibatches(segments: Segments, num_minibatches: int, generator: torch.Generator) -> Iterator[Segments]:
    """Shuffles the segments and deals them out."""
    order = torch.randperm(segments.index.shape[1], generator=generator, device=generator.device)
    for chosen in order.tensor_split(num_minibatches):
        mask = segments.mask[:, chosen]
        longest = int(mask.sum(0).max())
        yield Segments(segments.index[:longest, chosen], mask[:longest])


@torch.no_grad()
def refresh_states(agent: Agent, rollout: Rollout) -> None:
    """Recomputes the stored states with the current weights, from the first row on (detail 9)."""
    state = rollout.state[0]
    for t in range(len(rollout.obs)):
        rollout.state[t] = state.masked_fill(rollout.start[t, :, None, None, None], 0) if t else state
        *_, state = agent.step(rollout.obs[t], rollout.state[t])


# --- loss


def ppo_loss(
    agent: Agent, rollout: Rollout, segments: Segments, args: Args, num_steps: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped loss (eq. 7, 9) of a minibatch, and metrics: sums over its real steps divided by `num_steps`, the
    real steps of an average minibatch, so that every step of the rollout weighs the same (detail 3)."""
    index, mask = segments
    real = index[mask]  # [M]

    def take(x: Tensor, index: Tensor = real) -> Tensor:
        return x.flatten(0, 1)[index]

    action_mask = None if rollout.action_mask is None else take(rollout.action_mask, index)
    logits, values = agent.unroll(take(rollout.obs, index), take(rollout.state, index[0]), action_mask)
    value = values[mask]  # [M] normalised, as are the targets
    logprob, entropy = logprob_entropy(logits[mask], take(rollout.action))
    log_ratio = logprob - take(rollout.logprob)
    ratio, advantage = log_ratio.exp(), take(rollout.advantages)

    policy_loss = torch.max(-advantage * ratio, -advantage * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef))
    target = agent.return_stats.normalize(take(rollout.returns))
    value_loss = 0.5 * (value - target) ** 2
    if args.clip_vloss:
        old = agent.return_stats.normalize(take(rollout.value))
        clipped = old + (value - old).clamp(-args.clip_coef, args.clip_coef)
        value_loss = torch.max(value_loss, 0.5 * (clipped - target) ** 2)

    loss = (policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy).sum() / num_steps
    with torch.no_grad():
        per_step = {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": entropy,
            "old_approx_kl": -log_ratio,
            "approx_kl": ratio - 1 - log_ratio,  # http://joschu.net/blog/kl-approx.html
            "clipfrac": ((ratio - 1).abs() > args.clip_coef).float(),
        }
        metrics = {name: x.sum() / num_steps for name, x in per_step.items()}
        metrics["ratio_error"] = (ratio - 1).abs().max()
    return loss, metrics


# --- policies that learn nothing

SCHEDULE = ((0, 0), (0, 3))  # (first epoch, blueprint) to germinate in turn: the best of benchmark/tamiyo_schedule.py


def reference_action(
    policy: str, obs: np.ndarray, mask: np.ndarray, grown: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Actions [N] of a fixed rule, for observations [N, D], action masks [N, A] and germinations so far [N]. All but
    `random` make permanent what they may; only `heuristic` looks before it does, grows when the validation loss stands
    still, and takes the blueprints in turn (detail 11)."""
    if policy == "random":
        return np.where(mask, rng.random(mask.shape), -1).argmax(-1)
    now = dict(zip(OBSERVATION, obs.T, strict=False))
    epoch = np.rint(now["epoch"] * EPOCHS)
    grow, keep, action = mask[:, GERMINATE], mask[:, FOSSILIZE], np.full(len(obs), WAIT)
    if policy == "always":
        action = np.where(grow, GERMINATE + BLUEPRINTS.index("conv_heavy"), action)
    if policy == "schedule":
        for number, (first_epoch, blueprint) in enumerate(SCHEDULE):
            action = np.where(grow & (grown == number) & (epoch >= first_epoch), GERMINATE + blueprint, action)
    if policy == "heuristic":
        still = now["plateau"] * EPOCHS >= 1
        action = np.where(grow & still, GERMINATE + grown % len(BLUEPRINTS), action)
        harmful = (now["contribution"] < 0) & (now["training"] + now["blending"] + now["holding"] > 0)
        action = np.where(mask[:, CULL] & harmful, CULL, action)
        keep = keep & ~harmful
    return action if policy in ("never", "static") else np.where(keep, FOSSILIZE, action)


# --- evaluate


LONGEST = 27_000  # steps after which an evaluation does not wait for the end of an episode any more


class Episodes(NamedTuple):
    """One episode for each of E seeds; steps behind an episode's end are -1."""

    returns: np.ndarray  # [E]
    lengths: np.ndarray  # [E]
    actions: np.ndarray  # [E, T]
    stages: np.ndarray  # [E, T, SLOTS] in which the action was taken
    info: dict[str, np.ndarray]  # closing info of the environment, each [E, ...]


@torch.no_grad()
def play(args: Args, seeds: list[int], choose: Callable, modules: np.ndarray | None = None) -> Episodes:
    """One episode for each seed, side by side. `choose` gives their actions [E]: of the step, obs [E, D] and action
    masks [E, A]. Hosts may start with permanent `modules` [E, SLOTS]."""
    envs = make_envs(args, len(seeds))
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    obs, infos = envs.reset(seed=seeds, options=None if modules is None else {"modules": modules})
    running, actions, stages, closing = np.ones(len(seeds), bool), [], [], [{} for _ in seeds]
    returns, lengths = np.zeros(len(seeds)), np.zeros(len(seeds), int)
    while running.any() and len(actions) < LONGEST:
        flat, action_mask = observe(envs, obs, infos, device)
        action = choose(len(actions), flat, action_mask)
        actions.append(np.where(running, action, -1))
        stages.append(infos.get("stage", np.zeros((len(seeds), 0), int)))
        obs, reward, terminated, truncated, infos = envs.step(action + envs.single_action_space.start)
        returns, lengths = returns + np.where(running, reward, 0), lengths + running
        for n in np.flatnonzero((terminated | truncated) & running):
            arrays = {name: x for name, x in infos["final_info"].items() if isinstance(x, np.ndarray)}
            closing[n] = {name: x[n] for name, x in arrays.items()}
        running &= ~(terminated | truncated)
    if running.any():
        warnings.warn(f"an episode that does not end within {LONGEST} steps counts as it stands", stacklevel=1)
    envs.close()
    known = set.intersection(*map(set, closing))
    info = {name: np.stack([entry[name] for entry in closing]) for name in known}
    return Episodes(returns, lengths, np.stack(actions, 1), np.stack(stages, 1), info)


def evaluate(agent: Agent | None, args: Args, policy: str = "learned", reset_every: int | None = None) -> Episodes:
    """Plays `eval_episodes` episodes whose seeds are not trained on, the same ones whatever `seed` is. The learned
    policy's state is zeroed every so many steps (default: as in training; 1: memoryless) (detail 10)."""
    seeds = [HELD_OUT + i for i in range(args.eval_episodes)]
    if policy == "learned":
        return play(args, seeds, learned_policy(agent, args, args.reset_every if reset_every is None else reset_every))
    modules = evaluate(agent, args).info["modules"] if policy == "static" else None
    grown, rng = np.zeros(len(seeds), int), np.random.default_rng(args.seed)

    def choose(t: int, obs: Tensor, action_mask: Tensor) -> np.ndarray:
        action = reference_action(policy, obs.cpu().numpy(), action_mask.cpu().numpy(), grown, rng)
        grown[:] += (action >= GERMINATE) & (action < FOSSILIZE)
        return action

    return play(args, seeds, choose, modules)


def learned_policy(agent: Agent, args: Args, reset_every: int) -> Callable:
    state = agent.initial_state(args.eval_episodes)
    generator = None if args.eval_deterministic else torch.Generator(state.device).manual_seed(args.seed)

    def choose(t: int, obs: Tensor, action_mask: Tensor | None) -> np.ndarray:
        nonlocal state
        if reset_every and t % reset_every == 0:
            state = torch.zeros_like(state)
        logits, _, state = agent.step(obs, state, action_mask)
        return sample(logits, generator)[0].cpu().numpy()

    return choose


def cull_outcomes(args: Args, episodes: Episodes, most: int = 100) -> np.ndarray:
    """For each cull of evaluated episodes (`most` of them at random): is the host better off for it [C] bool? The host
    is trained twice more up to the cull, with the same data in the same order. Then one loses the seed and the other
    keeps it, permanently as soon as that is allowed, and nothing else is done; culls too late for that are left out,
    unless the host that keeps it diverges. Better is the higher accuracy on the test images, or the lower loss if that
    is the same (detail 12)."""
    culls = np.argwhere(episodes.actions == CULL)  # [C, 2] episode, step
    culls = np.random.default_rng(args.seed).permutation(culls)[:most]
    if not len(culls):
        return np.zeros(0, bool)
    episode, when = culls.repeat(2, 0).T  # each [2 C], for the host that loses the seed and the one that keeps it
    keeps = np.arange(len(when)) % 2 == 1

    def choose(t: int, obs: Tensor, action_mask: Tensor) -> np.ndarray:
        planned = (t < when) | (t == when) & ~keeps
        fossilize = keeps & (t > when) & action_mask[:, FOSSILIZE].cpu().numpy()
        action = np.where(planned, episodes.actions[episode, t], np.where(fossilize, FOSSILIZE, WAIT))
        return np.where(action_mask.cpu().numpy()[np.arange(len(action)), action], action, WAIT)  # behind a divergence

    info = play(args, [HELD_OUT + int(e) for e in episode], choose).info
    names = ("test_accuracy", "test_loss", "fossilized", "diverged")
    (culled, kept), (culled_loss, kept_loss), permanent, diverged = (info[name].reshape(-1, 2).T for name in names)
    better = (culled > kept) | ((culled == kept) & (culled_loss < kept_loss))
    return better[(permanent[1] > permanent[0]) | diverged[1]]


def actions_figure(episodes: Episodes):
    """A matplotlib figure: how often each action was taken at each epoch, and the stages of six hosts' slots."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), layout="constrained")
    top, bottom = figure.subplots(2)
    taken = episodes.actions[:, :, None] == np.arange(len(ACTIONS))  # [E, T, A]
    image = top.imshow(taken.mean(0).T, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    top.set(yticks=range(len(ACTIONS)), yticklabels=ACTIONS, xlabel="epoch", title="share of hosts")
    figure.colorbar(image, ax=top)
    stages = episodes.stages[:6].transpose(0, 2, 1).reshape(-1, episodes.stages.shape[1])  # [6 * SLOTS, T]
    colors = ListedColormap(["white", "khaki", "gold", "orange", "tomato", "seagreen", "black", "lightgrey"])
    image = bottom.imshow(stages, aspect="auto", cmap=colors, vmin=-0.5, vmax=len(Stage) - 0.5)
    labels = [f"host {row // 2}, slot {row % 2}" for row in range(len(stages))]
    bottom.set(yticks=range(len(stages)), yticklabels=labels, xlabel="epoch", title="stages of six hosts")
    figure.colorbar(image, ax=bottom, ticks=range(len(Stage))).ax.set_yticklabels([stage.name for stage in Stage])
    return figure


# --- save, load


@dataclass
class Progress:
    """Counters of a run, saved with it."""

    global_step: int = 0
    update: int = 0
    best: float = -math.inf  # mean return of the best evaluation
    recent: list[float] = field(default_factory=list)  # returns of the last 100 training episodes
    # what other policies reach on the hosts of the evaluation
    reference: dict[str, float] = field(default_factory=dict)


def save(path: Path, parts: dict, progress: Progress, args: Args) -> None:
    """Writes a checkpoint of tensors and plain types; a crash at any moment leaves the old file or the new one."""
    state = {name: part.get_state() if name.startswith("rng") else part.state_dict() for name, part in parts.items()}
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(state | {"progress": asdict(progress), "args": asdict(args)}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path: str | Path, args: Args | None = None) -> dict:
    """Reads a checkpoint without running any code that a stranger may have put into it. With `args`, its networks and
    environment must be theirs."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["args"]
    except Exception as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{path} is not a checkpoint: {problem}") from error
    if unknown := set(saved) ^ {item.name for item in fields(Args)}:
        raise InputError(f"{path} is a checkpoint of another script, with or without {', '.join(sorted(unknown))}")
    same = ["env_id", "env_kwargs", "dataset", "recurrent", "lstm_hidden", "lstm_layers", "lstm_layer_norm"]
    if args and not args.evaluate:
        same += ["reset_every"]
    for name in same if args else ():
        if saved[name] != getattr(args, name):
            raise InputError(f"{path} has {name} {saved[name]}, not {getattr(args, name)}")
    if args and saved["eval_episodes"] != args.eval_episodes:
        state["progress"]["reference"] = {}  # that was on other hosts
    return state


def restore(parts: dict, state: dict) -> Progress:
    try:
        for name, part in parts.items():
            if not name.startswith("rng"):
                part.load_state_dict(state[name])
            elif len(state[name]) == len(part.get_state()):
                part.set_state(state[name])
            else:  # of a GPU's generator, and this is none, or the other way round
                part.manual_seed(state["progress"]["global_step"])
    except RuntimeError as error:
        raise InputError(f"the checkpoint does not fit: {' '.join(str(error).split())}") from error
    return Progress(**state["progress"])


def transfer(agent: Agent, state: dict) -> None:
    """Takes those weights of a checkpoint whose names and shapes fit, and names the others; running statistics are
    taken as a whole or not at all."""
    own = agent.state_dict()
    fitting = {name: x for name, x in state["agent"].items() if name in own and own[name].shape == x.shape}
    torn = {name.rpartition(".")[0] for name in own.keys() - fitting.keys()}
    fitting = {name: x for name, x in fitting.items() if "stats" not in name or name.rpartition(".")[0] not in torn}
    agent.load_state_dict(own | fitting)
    for name in own.keys() - fitting.keys():
        print(f"not taken from the checkpoint: agent {name}", file=sys.stderr)


def describe(episodes: Episodes) -> dict[str, float]:
    """Means over hosts, by their tags in TensorBoard."""
    names = {"validation_accuracy": "val_accuracy", "test_accuracy": "test_accuracy", "parameter_ratio": "params_ratio"}
    names |= {name: name for name in ("germinations", "fossilized", "culled")}
    return {f"tamiyo/{tag}": float(episodes.info[name].mean()) for name, tag in names.items() if name in episodes.info}


def assess(agent: Agent | None, args: Args, run_dir: Path | None, writer: SummaryWriter | None, step: int) -> dict:
    """Evaluates the policy, with and without memory, and its culls; draws `actions.png` in the run folder."""
    played = evaluate(agent, args, args.policy)
    scores = {
        "eval/episodic_return": played.returns.mean(),
        "eval/episodic_return_std": played.returns.std(),
        "eval/episodic_length": played.lengths.mean(),
    }
    if args.policy == "learned":
        scores["eval/return_memoryless"] = evaluate(agent, args, reset_every=1).returns.mean()
    if "test_accuracy" in played.info:
        scores |= describe(played)
        better = cull_outcomes(args, played)
        scores["tamiyo/culls_examined"] = len(better)
        scores["tamiyo/cull_precision"] = better.mean() if len(better) >= 50 else math.nan  # too few to tell
        if run_dir and args.policy == "learned":
            actions_figure(played).savefig(run_dir / "actions.png", dpi=100)
        if writer:
            writer.add_figure("tamiyo/actions", actions_figure(played), step)
    return {name: float(score) for name, score in scores.items()}


def references(agent: Agent, args: Args) -> dict[str, float]:
    """What the untrained agent and the policies that need no training reach on the hosts of the evaluation."""
    envs = make_envs(args, 1)
    policies = ("never", "random") if isinstance(envs, Morphogenesis) else ()
    envs.close()
    played = {name: evaluate(agent, args, name) for name in policies} | {"before": evaluate(agent, args)}
    scores = {f"{name}_return_mean": float(episodes.returns.mean()) for name, episodes in played.items()}
    for name, episodes in played.items():
        if "test_accuracy" in episodes.info:
            scores[f"{name}_test_accuracy"] = float(episodes.info["test_accuracy"].mean())
    return scores


def summary(scores: dict[str, float], progress: Progress, args: Args, run_dir: Path | None) -> dict:
    """The closing JSON object; None where there is no number."""
    numbers = {
        "sps": scores.get("charts/SPS", math.nan),
        "train_return_mean": float(np.mean(progress.recent or [math.nan])),
        "eval_return_mean": scores["eval/episodic_return"],
        "eval_return_std": scores["eval/episodic_return_std"],
        "eval_return_memoryless": scores.get("eval/return_memoryless", math.nan),
    }
    numbers |= progress.reference
    numbers |= {name.split("/")[1]: score for name, score in scores.items() if name.startswith("tamiyo/")}
    known = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
    place = {"run_dir": run_dir and str(run_dir), "global_step": progress.global_step, "policy": args.policy}
    return place | {"eval_episodes": args.eval_episodes} | known


# --- train

signals: list[int] = []  # SIGINT and SIGTERM received so far; read once per update


def on_signal(number: int, frame) -> None:
    signals.append(number)
    signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once


def setup(args: Args) -> tuple[torch.device, int, int]:
    """Device, rank and number of processes: one, unless torchrun started more."""
    on_gpu = args.cuda and torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu")
    torch.set_num_threads(args.torch_threads)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    if "RANK" not in os.environ:
        return device, 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, dist.get_rank(), dist.get_world_size()


def open_run(args: Args, progress: Progress) -> tuple[Path, SummaryWriter]:
    """The run's folder, with its arguments and the code as it runs, and the writer of its TensorBoard events."""
    if args.resume:
        return Path(args.resume), SummaryWriter(args.resume, purge_step=progress.global_step + 1)
    env_name = args.env_id.replace("/", "-").replace(":", "-")
    name, started = f"{env_name}__{args.exp_name}__{args.seed}", int(time.time())
    while (run_dir := Path(args.runs_dir, f"{name}__{started}")).exists():  # begun in the same second
        started += 1
    run_dir.mkdir(parents=True)
    (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=2))
    shutil.copy(__file__, run_dir)
    for folder in ("common", "environments"):
        source = Path(__file__).parent / folder
        shutil.copytree(source, run_dir / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return run_dir, SummaryWriter(run_dir)


def progress_bar(args: Args, progress: Progress, rank: int) -> tqdm:
    """On standard error; where that is no terminal, a line every 30 s."""
    style = {} if sys.stderr.isatty() else {"mininterval": 30, "bar_format": "{l_bar}{bar}{r_bar}\n"}
    style |= {"initial": progress.global_step, "unit": "step", "unit_scale": True, "disable": rank > 0}
    return tqdm(total=args.total_timesteps, **style)


def sum_and_clip(weights: list[nn.Parameter], max_norm: float) -> Tensor:
    """Sums gradients over processes and clips them; gives their norm, or raises if it is not finite."""
    for weight in weights:
        all_sum(weight.grad)
    return nn.utils.clip_grad_norm_(weights, max_norm, error_if_nonfinite=True)


def mean_metrics(log: list[dict[str, Tensor]]) -> dict[str, float]:
    """Means over minibatches, summed over processes, each of which holds its share of the sum."""
    return {
        name: float(all_sum(torch.stack([entry[name] for entry in log]).mean())) for name in (log[0] if log else ())
    }


def train(args: Args) -> dict:
    """Trains, evaluates the final weights and returns the closing summary. Raises InputError before any work if it is
    asked for what cannot be; any other exception leaves the last checkpoint as it is."""
    check(args)
    device, rank, world = setup(args)
    if args.policy != "learned" and not args.evaluate:
        return {} if rank > 0 else summary(assess(None, args, None, None, 0), Progress(), args, None)
    envs = make_envs(args, args.num_envs)
    names = entry_names(envs.single_observation_space)
    torch.manual_seed(args.seed)  # initial weights; whatever is random later draws from a generator (detail 13)
    agent = Agent(len(names), envs.single_action_space, args).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5, fused=True)
    rng = torch.Generator(device).manual_seed(args.seed + rank)
    parts = {"agent": agent, "optimizer": optimizer, "rng": rng}
    progress = Progress()
    if args.evaluate:
        envs.close()
        progress, run_dir = restore({"agent": agent}, load(args.evaluate, args)), Path(args.evaluate).parent
        return {} if rank > 0 else summary(assess(agent, args, run_dir, None, 0), progress, args, run_dir)
    if args.resume:
        progress = restore(parts, load(f"{args.resume}/checkpoint.pt", args))
        if rank > 0:  # the checkpoint holds the generator of rank 0
            rng.manual_seed(args.seed + rank + progress.global_step)
    if progress.global_step >= args.total_timesteps:
        raise InputError(f"{args.resume} has its {progress.global_step} steps: --total-timesteps says how far to go")
    if args.init_from:
        transfer(agent, load(args.init_from))
    if rank == 0 and not args.resume:
        progress.reference = references(agent, args)
    run_dir, writer = open_run(args, progress) if rank == 0 else (None, None)
    bar = progress_bar(args, progress, rank)
    steps_per_update, steps_done, seconds, stop = world * args.num_envs * args.num_steps, 0, 0.0, False
    try:
        first_seeds = np.random.default_rng([args.seed, rank, progress.update]).integers(HELD_OUT, size=args.num_envs)
        carry = reset(envs, agent, first_seeds.tolist())
        while progress.global_step < args.total_timesteps and not stop:
            # --- rollout, advantages
            started = time.perf_counter()
            remaining = 1 - progress.global_step / args.total_timesteps if args.anneal_lr else 1.0
            optimizer.param_groups[0]["lr"] = args.learning_rate * remaining
            annealed = replace(args, ent_coef=args.ent_coef * remaining)
            rollout = Rollout(args, agent, len(names), carry)
            episodes = collect(envs, agent, rollout, carry, rng, args.reset_every)
            values_after, ends = next_values(agent, rollout, carry), (rollout.terminated, rollout.truncated)
            advantages, returns = gae(rollout.reward, rollout.value, values_after, *ends, args.gamma, args.gae_lambda)
            if args.norm_adv:
                mean = all_sum(advantages.mean()) / world
                std = (all_sum((advantages - mean).square().mean()) / world).sqrt()
                advantages = (advantages - mean) / (std + 1e-8)
            rollout.advantages, rollout.returns = advantages, returns

            # --- PPO; the first rollout only gives the statistics (detail 8)
            segments = cut_segments(rollout.start, args.bptt_length)
            batch_size = steps_per_update / args.num_minibatches
            log = []  # metrics of each minibatch
            for epoch in range(args.update_epochs if agent.obs_stats.count else 0):
                if epoch and args.refresh_states:
                    refresh_states(agent, rollout)
                for minibatch in minibatches(segments, args.num_minibatches, rng):
                    loss, metrics = ppo_loss(agent, rollout, minibatch, annealed, batch_size)
                    optimizer.zero_grad()
                    loss.backward()
                    metrics["grad_norm"] = sum_and_clip(list(agent.parameters()), args.max_grad_norm) / world
                    optimizer.step()
                    log.append(metrics)
                if args.target_kl and mean_metrics(log[-args.num_minibatches :])["approx_kl"] > args.target_kl:
                    break
            scalars = {f"losses/{name}": mean for name, mean in mean_metrics(log).items()}

            # --- statistics, counters
            agent.update_statistics(rollout.obs.flatten(0, 1), returns.flatten())
            progress.update, progress.global_step = progress.update + 1, progress.global_step + steps_per_update
            steps_done, seconds = steps_done + steps_per_update, seconds + time.perf_counter() - started
            stop = bool(all_sum(torch.tensor(float(len(signals)), device=device)))
            stop = stop and progress.global_step < args.total_timesteps  # else only the last evaluation is left
            if rank > 0:
                continue

            # --- log, evaluate, save
            progress.recent = [*progress.recent, *(episode_return for episode_return, _ in episodes)][-100:]
            if episodes:
                scalars["charts/episodic_return"], scalars["charts/episodic_length"] = np.mean(episodes, axis=0)
            if log:
                scalars["losses/first_ratio_error"] = error = float(log[0]["ratio_error"])  # detail 4
                if error > 1e-3:
                    warnings.warn("rollout and update compute different log-probabilities", stacklevel=1)
            scalars["losses/explained_variance"] = 1 - float((returns - rollout.value).var() / returns.var())
            scalars["charts/learning_rate"] = args.learning_rate * remaining
            scalars["charts/SPS"] = steps_done / seconds
            recent = np.mean(progress.recent or [math.nan])
            bar.set_postfix_str(f"{scalars['charts/SPS']:.0f} steps/s, return {recent:.1f}", refresh=False)
            bar.update(steps_per_update)
            due = args.checkpoint_every and progress.update % args.checkpoint_every == 0
            due = due or progress.global_step >= args.total_timesteps
            if stop or due:
                save(run_dir / "checkpoint.pt", parts, progress, args)
            if due and not stop:
                scalars |= assess(agent, args, run_dir, writer, progress.global_step)
            for name, value in scalars.items():
                writer.add_scalar(name, value, progress.global_step)
            if "eval/episodic_return" in scalars and scalars["eval/episodic_return"] > progress.best:
                progress.best = scalars["eval/episodic_return"]
                for name in ("best.pt", "checkpoint.pt"):
                    save(run_dir / name, parts, progress, args)
    finally:
        envs.close()
        if rank == 0:
            bar.close()
            writer.close()
            if progress.global_step < args.total_timesteps and (run_dir / "checkpoint.pt").exists():
                print(f"continue with: python {sys.argv[0]} --resume {run_dir}", file=sys.stderr)
    return {} if rank > 0 or stop else summary(scalars, progress, args, run_dir)


def main() -> None:
    args = tyro.cli(Args)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    try:
        if source := args.evaluate or (args.resume and f"{args.resume}/checkpoint.pt"):
            saved = load(source)["args"] | {"evaluate": args.evaluate, "resume": args.resume, "init_from": None}
            args = tyro.cli(Args, default=Args(**saved))
        result = train(args)
        if dist.is_initialized():
            dist.destroy_process_group()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if signals and not result:
        sys.exit(128 + signals[0])
    if result:
        names = ("never", "random", "before")
        others = [f"{name} {result[f'{name}_return_mean']:.2f}" for name in names if f"{name}_return_mean" in result]
        print(" | ".join([*others, f"now {result['eval_return_mean']:.2f} (return on hosts not trained on)"]))
        if "test_accuracy" in result:
            others = [
                f"{name} {result[f'{name}_test_accuracy']:.1%}" for name in names if f"{name}_test_accuracy" in result
            ]
            print(" | ".join([*others, f"now {result['test_accuracy']:.1%} (their accuracy on test images)"]))
        if result["run_dir"]:
            print(f"watch: tensorboard --logdir {args.runs_dir}")
            print(f"evaluate: python {sys.argv[0]} --evaluate {result['run_dir']}/checkpoint.pt")
        print(json.dumps(result))


if __name__ == "__main__":
    main()
