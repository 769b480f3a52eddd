"""PPO with an LSTM policy, and a head that forecasts the next `horizon` observations in one shot.

The data goes one way, and each arrow has its function below:

    environments ── play ──▶ steps ── collect ──▶ Rollout [T, N]        one LSTM cell a step, no gradients
    Rollout ── next_values, gae ──▶ advantages, returns [T, N]          truncation bootstraps, termination does not
    Rollout ── cut_segments ──▶ columns [L, S] ──▶ minibatches of them  consecutive steps of one environment
    minibatch ── Agent.unroll ── ppo_loss ── descend ──▶ weights        one LSTM call, flushed between episodes
    last Rollouts ── forecasts ── descend ──▶ weights of Predictor      at steps whose future is known by now

Letters in shapes: T steps, N environments, D entries of the flat observation, A of an action (one-hot if discrete),
P parameters of the policy's distribution, F features of the LSTM, H steps of a forecast, B or M samples; [L, S] are L
rows of S columns (cut_segments). PPO: Schulman et al. 2017, arXiv 1707.06347. `detail 5`: docs/ppo_lstm_predictor.md.
"""

import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.gae import gae
from common.obs import entry_names, flatten


@dataclass
class Args:  # the comments are what --help says
    exp_name: str = Path(__file__).stem  # RUN: name of the experiment, part of the run folder's name
    seed: int = 1  # of environments, networks and sampling; the same seed gives the same run on one machine
    cuda: bool = True  # use a CUDA device if there is one
    torch_threads: int = 1  # threads of torch on the CPU; one is fastest for small recurrent networks
    runs_dir: str = "runs"  # folder that holds the run folders
    checkpoint_every: int = 50  # updates between checkpoints, each with an evaluation; 0 = only at the end
    resume: str | None = None  # a run folder to continue, with its arguments unless others are given
    init_from: str | None = None  # a checkpoint whose networks to start from
    evaluate: str | None = None  # a checkpoint to evaluate, with its arguments unless others are given; no training
    eval_episodes: int = 20  # episodes of each evaluation, on seeds that are not trained on
    capture_video: bool = False  # record the evaluations' first environment to `videos/` in the run folder
    env_id: str = "LunarLander-v3"  # ENVIRONMENT: any Gymnasium id, also `module:Name-v0`, which imports the module
    env_kwargs: str = "{}"  # keyword arguments of `gymnasium.make`, as JSON
    vectorization: Literal["sync", "async"] = "sync"  # environments in turn, or (slow ones) each in its own process
    visible: tuple[int, ...] | None = None  # entries of the flattened observation that the policy sees; None = all
    total_timesteps: int = 500_000  # PPO: environment steps to train for, over all environments and processes
    learning_rate: float = 2e-3  # Adam's step size
    num_envs: int = 16  # environments of each process
    num_steps: int = 128  # steps of each environment per rollout
    anneal_lr: bool = True  # lower the learning rates linearly to 0
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    num_minibatches: int = 8  # minibatches per pass; at most num_envs
    update_epochs: int = 4  # passes over each rollout
    norm_adv: bool = True  # normalise the advantages of each rollout
    clip_coef: float = 0.2  # clip range of the probability ratio
    ent_coef: float = 0.003  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss; values are in units of the returns' standard deviation
    max_grad_norm: float = 0.5  # largest norm of the gradient
    target_kl: float | None = None  # stop an update after a pass whose mean approximate KL exceeds this; None = never
    recurrent: bool = True  # RECURRENCE: off zeroes the LSTM's state before every step: the same network, no memory
    lstm_hidden: int = 128  # width of the LSTM
    bptt_length: int = 0  # steps through which gradients flow; 0 = the whole episode, as far as the rollout holds it
    predictor: bool = True  # FORECAST: train the head that forecasts observations
    horizon: int = 50  # steps that it forecasts
    predictor_samples: int = 256  # steps that it learns from in each epoch
    predictor_learning_rate: float = 3e-3  # step size of the predictor's Adam
    freeze_extractor: bool = True  # train the head only, which leaves PPO as it is; off = encoder and LSTM learn too


class InputError(Exception):
    """The user asked for something that cannot be done; the message is one line."""


def check(args: Args) -> gym.Env:
    """A closed environment, to ask for its spaces; InputError for what can be known to fail before any work."""
    may_be_0 = ["seed", "checkpoint_every", "gamma", "gae_lambda", "clip_coef", "ent_coef", "vf_coef", "bptt_length"]
    at_most = {"gamma": 1, "gae_lambda": 1, "num_minibatches": args.num_envs, "seed": 10**9, "total_timesteps": 10**12}
    for name, x in vars(args).items():
        least, most = "0 or more" if name in may_be_0 else "above 0", at_most.get(name, 10**5)
        if type(x) in (int, float) and not (0 < x <= most or (x == 0 and name in may_be_0)):
            raise InputError(f"--{name.replace('_', '-')} must be {least} and at most {most}, not {x}")
    try:
        with tempfile.TemporaryDirectory() as tmp, make_env(args, f"{tmp}/v" if args.capture_video else None) as env:
            names = entry_names(env.observation_space)
            assert isinstance(env.action_space, (Box, Discrete, MultiDiscrete)), f"no support for {env.action_space}"
            assert all(0 <= i < len(names) for i in args.visible or ()), f"--visible goes from 0 to {len(names) - 1}"
            return env
    except Exception as error:
        raise InputError(f"{args.env_id}: {' '.join(str(error).split())}") from error


# --- environment
def make_env(args: Args, video_dir: str | Path | None = None) -> gym.Env:
    if multiprocessing.current_process().name.startswith("Worker<"):  # AsyncVectorEnv's leave Ctrl-C to the main one
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    env = gym.make(args.env_id, **({"render_mode": "rgb_array"} if video_dir else {}), **json.loads(args.env_kwargs))
    env = gym.wrappers.TimeLimit(env, 27_000)  # for environments that would never end
    if isinstance(env.action_space, Box):  # the policy's Gaussian is scaled from [-1, 1], and clipped, to the bounds
        env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1)) if env.action_space.is_bounded() else env
        env = gym.wrappers.ClipAction(env)
    if video_dir:
        env = gym.wrappers.RecordVideo(env, str(video_dir), episode_trigger=lambda _: True)
    return gym.wrappers.RecordEpisodeStatistics(env)


def make_envs(args: Args, num_envs: int, video_dir: Path | None = None) -> VectorEnv:
    """Environments that reset themselves in the step that ends an episode; the first is filmed if there is a folder."""
    makers = [lambda i=i: make_env(args, video_dir if i == 0 else None) for i in range(num_envs)]
    vector_class = {"sync": SyncVectorEnv, "async": AsyncVectorEnv}[args.vectorization]
    return vector_class(makers, copy=False, autoreset_mode=AutoresetMode.SAME_STEP)


# --- network
def all_mean(x: Tensor) -> Tensor:
    """The mean of x over all processes, in place. All hold as many steps, so a mean of means is the mean of all."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


class RunningMeanStd(nn.Module):
    """Mean and deviation of all processes' batches (Chan et al. 1979). Beyond `memory` samples, older ones fade."""

    def __init__(self, shape: tuple[int, ...], memory: float = math.inf):
        super().__init__()
        self.memory = memory
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))
        self.register_buffer("count", torch.zeros(()))

    def update(self, x: Tensor) -> None:  # [M, *shape]
        mean, size = all_mean(x.mean(0)), len(x) * (dist.get_world_size() if dist.is_initialized() else 1)
        var = all_mean((x - mean).square().mean(0))
        weight, delta = size / (self.count + size), mean - self.mean
        self.std.copy_(((1 - weight) * (self.std**2 + weight * delta**2) + weight * var).sqrt().clamp(min=1e-4))
        self.mean += weight * delta
        self.count.copy_((self.count + size).clamp(max=self.memory))

    def normalize(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def denormalize(self, x: Tensor) -> Tensor:
        return x * self.std + self.mean


class Agent(nn.Module):
    """encoder -> LSTM -> hidden layer, which sees both -> actor (its first half), critic (its second). Values are
    normalised. obs [..., D + A] is the flattened observation and the action before it, zeros at an episode's start; the
    state [N, 2, F] the LSTM's h (features) and c. Parameters [..., P] are logits, side by side for MultiDiscrete, or
    means, then log standard deviations."""

    def __init__(self, obs_space: gym.Space, action_space: gym.Space, args: Args):
        super().__init__()
        self.action_space, self.recurrent, width = action_space, args.recurrent, args.lstm_hidden
        self.choices = [int(n) for n in np.ravel(getattr(action_space, "nvec", getattr(action_space, "n", ())))]
        self.names = entry_names(obs_space)  # of the D entries of an observation
        obs_size, action_size = len(self.names), gym.spaces.flatdim(action_space)
        seen = [*(range(obs_size) if args.visible is None else args.visible), *range(obs_size, obs_size + action_size)]
        self.register_buffer("seen", torch.tensor(seen), persistent=False)
        self.obs_stats = RunningMeanStd((obs_size + action_size,))
        self.return_stats = RunningMeanStd((), memory=20_000)
        self.encoder, self.lstm, self.hidden = nn.Linear(len(seen), 64), nn.LSTM(64, width), nn.Linear(64 + width, 128)
        self.actor, self.critic = nn.Linear(64, action_size), nn.Linear(64, 1)  # each sees its half of the hidden layer
        self.log_std = nn.Parameter(torch.zeros(action_size)) if not self.choices else None
        for layer, gain in ((self.encoder, 1.4), (self.hidden, 1.4), (self.actor, 0.01), (self.critic, 1.0)):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)
        w_input, w_state, *biases = (weight.data.unflatten(0, (4, -1)) for weight in self.lstm.all_weights[0])
        for gate in (*w_input, *w_state):  # [F, 64] and [F, F] of input, forget, cell and output gate
            nn.init.orthogonal_(gate)
        line = width // 2  # units that start as a delay line: 8 hear the encoder, unit i + 8 only unit i (detail 13)
        w_input[[0, 1, 3], :line], w_input[2, 8:line], w_state[:, :line] = 0, 0, 0  # all else that they would hear
        w_state[2, :line, :line] = torch.tensor(2 * np.eye(line, k=-8))  # 2 at [i + 8, i]
        biases[0][:], biases[1][:] = torch.tensor([[0.0], [1.0], [0.0], [0.0]]), 0  # the others: forget gate 73% open
        biases[0][:, :line] = torch.tensor([[1.0], [-3.0], [0.0], [1.0]])  # forget gate 5%, input and output gate 73%
        shut = torch.tensor([-1e9, -1e9, 0.0, 0.0]).repeat_interleave(width)  # input and forget gate
        self.register_buffer("shut", shut[:, None], persistent=False)  # [4F, 1]: weights of unroll's extra input

    def initial_state(self, n: int) -> Tensor:
        return torch.zeros(n, 2, self.lstm.hidden_size, device=self.shut.device)

    def normalize_obs(self, obs: Tensor) -> Tensor:
        return self.obs_stats.normalize(obs).clamp(-10, 10)

    def heads(self, encoded: Tensor, features: Tensor, action_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        for_actor, for_critic = self.hidden(torch.cat((encoded, features), -1)).tanh().chunk(2, -1)
        params = self.actor(for_actor)
        if self.log_std is not None:
            params = torch.cat((params, self.log_std.expand_as(params)), -1)
        elif action_mask is not None:
            params = params.masked_fill(~action_mask, torch.finfo(params.dtype).min)
        return params, self.critic(for_critic).squeeze(-1)

    def step(self, obs: Tensor, state: Tensor, action_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """obs [N, D + A], state [N, 2, F], action_mask [N, A] -> parameters [N, P], values [N], the next state."""
        encoded = self.encoder(self.normalize_obs(obs)[..., self.seen]).tanh()
        state = torch.stack(torch.lstm_cell(encoded, state.unbind(1), *self.lstm.all_weights[0]), 1)
        return *self.heads(encoded, state[:, 0], action_mask), state

    def unroll(self, obs: Tensor, state: Tensor, flush: Tensor, action_mask: Tensor | None) -> tuple[Tensor, ...]:
        """obs [L, S, D + A], state [S, 2, F], action_mask [L, S, A] -> parameters [L, S, P], values [L, S]. A step with
        `flush` [L, S] leaves the initial state: one more input, with weights `shut`, closes two gates (detail 2)."""
        encoded = self.encoder(self.normalize_obs(obs)[..., self.seen]).tanh()
        w_input, *weights = self.lstm.all_weights[0]  # below: biases, layers, dropout, training, both ways, batch first
        x, w_input = torch.cat((encoded, flush[..., None]), -1), torch.cat((w_input, self.shut), 1)
        h, c = state.transpose(0, 1).contiguous().unsqueeze(1)  # each [1, S, F]
        features, _, _ = torch.lstm(x, (h, c), [w_input, *weights], True, 1, 0.0, True, False, False)
        return self.heads(encoded, features, action_mask)

    @torch.no_grad()
    def update_statistics(self, obs: Tensor, returns: Tensor) -> None:
        """Merges obs [M, D + A] and returns [M]; denormalised values stay as they are (PopArt, 1602.07714, eq. 9)."""
        stats, mean, std = self.return_stats, self.return_stats.mean.clone(), self.return_stats.std.clone()
        self.obs_stats.update(obs)
        stats.update(returns)
        self.critic.weight.mul_(std / stats.std)
        self.critic.bias.copy_((std * self.critic.bias + mean - stats.mean) / stats.std)


def sample(params: Tensor, choices: list[int], generator: torch.Generator | None) -> Tensor:
    """Actions [N, entries]; without a generator, the likeliest ones."""
    if not choices:  # a Box
        mean, log_std = params.chunk(2, -1)
        return torch.normal(mean, log_std.exp(), generator=generator) if generator else mean
    if generator:  # the maximum of logits + Gumbel noise is a sample of their softmax
        params = params - (torch.empty_like(params).exponential_(generator=generator) + 1e-20).log()
    return torch.stack([logits.argmax(-1) for logits in params.split(choices, -1)], -1)


def logprob_entropy(params: Tensor, action: Tensor, choices: list[int]) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [...] for params [..., P]; a Box's are those of the Gaussian (detail 9)."""
    if not choices:
        mean, log_std = params.chunk(2, -1)
        logprob = -0.5 * ((action - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
        return logprob.sum(-1), (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)
    logprobs = [logits.log_softmax(-1) for logits in params.split(choices, -1)]
    logprob = sum(x.gather(-1, action[..., i, None]).squeeze(-1) for i, x in enumerate(logprobs))
    return logprob, sum(-(x.exp() * x).sum(-1) for x in logprobs)


# --- rollout
class Rollout(NamedTuple):
    """T steps of N environments: what the agent saw and its state *before* the step, what it did, what came back."""

    obs: Tensor  # [T, N, D + A]
    start: Tensor  # [T, N] bool: obs is the first of its episode
    state: Tensor  # [T, N, 2, F]
    action_mask: Tensor  # [T, N, A] bool: what a discrete action may choose
    params: Tensor  # [T, N, P] of the policy that acted
    action: Tensor  # [T, N, entries]
    value: Tensor  # [T, N] normalised
    reward: Tensor  # [T, N]
    terminated: Tensor  # [T, N] bool
    truncated: Tensor  # [T, N] bool
    next_obs: Tensor  # [T, N, D + A] the true next observation, the last one of an episode included


class Episode(NamedTuple):
    n: int  # its environment
    total: float  # its return
    length: int
    success: bool | None  # what the environment says at its end, as `is_success`


@torch.inference_mode()
def play(envs: VectorEnv, agent: Agent, seed: int, sampled: bool = True, memory: bool = True) -> Iterator[tuple]:
    """Plays without end, and gives each step, a Rollout without the dimension T, and the list of Episodes that end with
    it. The actions are sampled, or the likeliest; without memory, every step starts from the initial state."""
    obs_space, space, device = envs.single_observation_space, agent.action_space, agent.shut.device
    generator = torch.Generator(device).manual_seed(seed) if sampled else None
    no_action = np.zeros((envs.num_envs, gym.spaces.flatdim(space)), np.float32)

    def masks(infos: dict) -> Tensor:
        silent = ~infos.get("_action_mask", no_action[:, 0] > 0)[:, None]  # environments without one allow everything
        action_mask = torch.from_numpy(np.asarray(infos.get("action_mask", no_action), bool) | silent)
        for part in action_mask.split(agent.choices, -1) if agent.choices else ():
            for n in (~part.any(-1)).nonzero():
                raise ValueError(f"environment {int(n)} allows no action at all")
        return action_mask.to(device)

    raw, infos = envs.reset(seed=seed)
    obs = torch.from_numpy(np.concatenate((flatten(obs_space, raw), no_action), 1)).to(device)
    start, fresh = torch.ones(envs.num_envs, dtype=torch.bool, device=device), agent.initial_state(envs.num_envs)
    state, action_mask = fresh, masks(infos)
    while True:
        params, value, next_state = agent.step(obs, state, action_mask)
        action = sample(params, agent.choices, generator)
        taken = action.cpu().numpy().reshape(-1, *space.shape) + getattr(space, "start", 0)
        try:
            raw, reward, terminated, truncated, infos = envs.step(taken)
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            for process in getattr(envs, "processes", ()):  # Gymnasium's close would wait for the dead one
                process.terminate()
            envs.closed = True
            raise RuntimeError("the process of an environment died") from error
        new, episodes = np.concatenate((flatten(obs_space, raw), flatten(space, taken)), 1), []
        next_obs = new.copy()  # the two differ where an episode ends: there, `new` is the first of the next one
        for n in np.flatnonzero(terminated | truncated):
            new[n, -no_action.shape[1] :] = 0
            next_obs[n, : -no_action.shape[1]] = gym.spaces.flatten(obs_space, infos["final_obs"][n])
            info = infos["final_info"]
            success = bool(info["is_success"][n]) if "is_success" in info else None
            episodes.append(Episode(n, float(info["episode"]["r"][n]), int(info["episode"]["l"][n]), success))
        if not (np.isfinite(new).all() and np.isfinite(next_obs).all() and np.isfinite(reward).all()):
            raise FloatingPointError("an environment returned an observation or a reward that is not finite")
        back = (np.float32(reward), terminated, truncated, next_obs, new)
        *back, new = (torch.from_numpy(x).to(device) for x in back)
        yield Rollout(obs, start, state, action_mask, params, action, value, *back), episodes
        obs, start, action_mask = new, back[1] | back[2], masks(infos)
        state = torch.where((start | (not (memory and agent.recurrent)))[:, None, None], fresh, next_state)


def collect(player: Iterator[tuple], num_steps: int) -> tuple[Rollout, list[Episode]]:
    """The next `num_steps` steps, and the episodes that end in them."""
    steps, ended = zip(*(next(player) for _ in range(num_steps)), strict=True)
    return Rollout(*(torch.stack(x) for x in zip(*steps, strict=True))), [x for episodes in ended for x in episodes]


@torch.no_grad()
def next_values(agent: Agent, rollout: Rollout) -> Tensor:
    """Normalised V after each step [T, N]: the next row's or, if truncated or last, that of `next_obs` (detail 5)."""
    values, cut = rollout.value.roll(-1, 0), rollout.truncated.clone()
    cut[-1] = True  # where row t + 1 is not what followed; a terminated step's value is not used, whatever it is
    *_, state = agent.step(rollout.obs[cut], rollout.state[cut])  # stored is the state before the step
    _, values[cut], _ = agent.step(rollout.next_obs[cut], state if agent.recurrent else agent.initial_state(len(state)))
    return values


# --- PPO
def cut_segments(start: Tensor, bptt_length: int) -> Tensor:
    """Columns [L, S] of steps, each of one environment, or `bptt_length` rows of it if that is not 0: indices into the
    flattened [T * N] rollout, or -1: a flush before an episode's `start` [T, N], or padding at the end (detail 2)."""
    num_steps, num_envs = start.shape
    length = min(bptt_length or num_steps, num_steps)
    t, n = torch.arange(num_steps, device=start.device)[:, None], torch.arange(num_envs, device=start.device)
    flushes = (start & (t % length > 0)).cumsum(0)  # [T, N] flush rows from the rollout's first step up to this one
    flushes = flushes - flushes[t[:, 0] - t[:, 0] % length]  # the same from its column's first step
    row, column = t % length + flushes, t // length * num_envs + n  # [T, N] each: where step t of environment n goes
    index = torch.full((int(row.max()) + 1, int(column.max()) + 1), -1, device=start.device)
    index[row, column] = t * num_envs + n
    return index


def ppo_loss(agent: Agent, flat: Rollout, advantages: Tensor, returns: Tensor, index: Tensor, args: Args) -> tuple:
    """PPO's clipped loss (eq. 7, 9) of the steps `index` [L, S] of a flattened rollout [T * N], and metrics: sums over
    real steps divided by how many an average minibatch has, so that every step weighs the same (detail 3)."""
    mask = index >= 0
    real = index[mask]  # [M]
    params, values = agent.unroll(flat.obs[index], flat.state[index[0]], ~mask, flat.action_mask[index])
    logprob, entropy = logprob_entropy(params[mask], flat.action[real], agent.choices)
    log_ratio = logprob - logprob_entropy(flat.params[real], flat.action[real], agent.choices)[0]
    ratio, advantage = log_ratio.exp(), advantages[real]
    policy_loss = torch.max(-advantage * ratio, -advantage * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef))
    value_loss = 0.5 * (values[mask] - agent.return_stats.normalize(returns[real])) ** 2
    per_step = {  # each [M]
        "loss": policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy,
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "old_approx_kl": -log_ratio,
        "approx_kl": ratio - 1 - log_ratio,  # http://joschu.net/blog/kl-approx.html
        "clipfrac": ((ratio - 1).abs() > args.clip_coef).float(),
    }
    metrics = {name: x.sum() / returns.numel() * args.num_minibatches for name, x in per_step.items()}
    loss = metrics.pop("loss")
    return loss, {name: x.detach() for name, x in metrics.items()} | {"ratio_error": (ratio - 1).abs().max().detach()}


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """A step down the gradient, its mean over processes, clipped; gives its norm, or raises if that is not finite."""
    optimizer.zero_grad()
    loss.backward()
    weights = [w for group in optimizer.param_groups for w in group["params"] if w.grad is not None]  # the others stay
    for weight in weights:
        all_mean(weight.grad)
    norm = nn.utils.clip_grad_norm_(weights, max_norm, error_if_nonfinite=True)
    optimizer.step()
    return norm


# --- predictor
class Predictor(nn.Module):
    """Features [B, F] and normalised obs [B, D + A] -> the next H normalised observations [B, H, D]. An MLP gives the
    change from now, at first none, at knots 1, 2, 3, 4, 6, 8, 11, … steps ahead; between them, straight lines."""

    def __init__(self, agent: Agent, horizon: int, frozen: bool):
        super().__init__()
        self.obs_size, self.horizon, self.frozen = len(agent.names), horizon, frozen
        knots = sorted({min(horizon, round(2 ** (i / 2))) for i in range(2 * math.ceil(math.log2(horizon)) + 1)})
        hats = [np.interp(np.arange(1, horizon + 1), knots, row) for row in np.eye(len(knots))]
        self.register_buffer("basis", torch.tensor(np.array(hats), dtype=torch.float32), persistent=False)  # [knots, H]
        self.hidden = nn.Linear(agent.lstm.hidden_size + len(agent.obs_stats.mean), 256)
        self.head = nn.Linear(256, self.obs_size * len(knots))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.recent_error = RunningMeanStd((1,), memory=50)

    def forward(self, features: Tensor, obs: Tensor) -> Tensor:
        changes = self.head(self.hidden(torch.cat((features, obs), -1)).relu())
        changes = changes.unflatten(-1, (self.obs_size, -1)) @ self.basis  # [B, D, H]
        return obs[:, None, : self.obs_size] + changes.transpose(-1, -2)

    def drift(self, log_error: Tensor) -> float:  # [1]
        """Its z-score among those of the last 50 rollouts, which a change in the dynamics raises."""
        z = self.recent_error.normalize(log_error) * (self.recent_error.count >= 10)
        self.recent_error.update(log_error)
        return float(z)


def forecasts(agent: Agent, predictor: Predictor, history: Sequence[Rollout], index: Tensor) -> tuple[Tensor, ...]:
    """From steps `index` [B] of the first of consecutive rollouts: forecasts and what came, [B, H, D], normalised, and
    a mask [B, H], false beyond the episode's end or the last rollout. Features are recomputed, from stored states."""
    obs, state = history[0].obs.flatten(0, 1)[index], history[0].state.flatten(0, 1)[index]
    features = agent.step(obs, state)[-1][:, 0]
    next_obs = torch.cat([rollout.next_obs for rollout in history])  # [rows, N, D + A]
    done = torch.cat([rollout.terminated | rollout.truncated for rollout in history]).int()  # [rows, N]
    num_rows, num_envs = done.shape
    t = (index // num_envs)[:, None] + torch.arange(predictor.horizon, device=index.device)  # [B, H]
    n, row = (index % num_envs)[:, None], t.clamp(max=num_rows - 1)
    ended = done[row, n].cumsum(1) - done[row, n]  # [B, H] episode ends before row t
    target = agent.normalize_obs(next_obs[row, n])[..., : predictor.obs_size]
    forecast = predictor(features.detach() if predictor.frozen else features, agent.normalize_obs(obs))
    return forecast, target, (ended == 0) & (t < num_rows)


@torch.no_grad()
def forecast_skill(agent: Agent, predictor: Predictor, rollout: Rollout, moments: int) -> tuple[Tensor, Tensor]:
    """By steps ahead [H]: root mean squared error in deviations of the observations, and skill, 1 - MSE / MSE of the
    best trivial forecast: nothing changes, the last change goes on, or the running mean. NaN means no data."""
    last, num_envs = rollout.reward.numel() - 1, rollout.reward.shape[1]
    index = torch.linspace(num_envs, last, moments, device=rollout.obs.device).long().clamp(max=last)  # [B]
    forecast, target, known = forecasts(agent, predictor, [rollout], index)
    obs = agent.normalize_obs(rollout.obs.flatten(0, 1))[:, : predictor.obs_size]
    change = (obs[index] - obs[index - num_envs]) * ~rollout.start.flatten()[index, None]  # [B, D]
    now, ahead = obs[index, None], torch.arange(1, predictor.horizon + 1, device=obs.device)[:, None]
    guesses = forecast, now, now + change[:, None] * ahead, torch.zeros_like(now)
    errors = torch.stack([((x - target).square().mean(-1) * known).sum(0) / known.sum(0) for x in guesses])  # [4, H]
    return errors[0].sqrt(), 1 - errors[0] / errors[1:].min(0).values


@torch.no_grad()
def forecast_figure(agent: Agent, predictor: Predictor, rollout: Rollout) -> Figure:
    """Up to four entries of the first environment's observations, and up to four forecasts of them in a row."""
    t = torch.arange(0, len(rollout.reward), predictor.horizon, device=rollout.obs.device)[:4]
    forecast, target, known = forecasts(agent, predictor, [rollout], t * rollout.reward.shape[1])
    lines = torch.stack((target, forecast)).where(known[..., None], torch.nan).cpu()  # [2, 4, H, D]
    figure = Figure(figsize=(10, 8), layout="constrained")
    for i, axis in enumerate(figure.subplots(min(4, predictor.obs_size), squeeze=False)[:, 0]):
        for start, actual, line in zip(t.tolist(), *lines[..., i], strict=True):
            ahead = range(start + 1, start + 1 + predictor.horizon)
            axis.plot(ahead, actual, "black", ahead, line, "C0")
        axis.set(ylabel=f"{agent.names[i]} (std)", xlabel="step; black what came, blue forecasts")
    return figure


# --- evaluate, save, load
def evaluate(agent: Agent, args: Args, video_dir: Path | None = None, **how) -> tuple[list[Episode], Rollout]:
    """`eval_episodes` episodes, as many of each environment, on seeds not trained on, and the last 2,000 steps."""
    num_envs = min(args.eval_episodes, args.num_envs)
    left = [len(range(n, args.eval_episodes, num_envs)) for n in range(num_envs)]  # episodes to play
    steps, episodes = deque(maxlen=2000), []
    with closing(make_envs(args, num_envs, video_dir)) as envs:
        for step, ended in play(envs, agent, args.seed + 1_000_000_000, **how):
            steps.append(step)
            for episode in ended:
                left[episode.n] -= 1
                episodes += [episode] if left[episode.n] >= 0 else []
            if signals or max(left) <= 0:
                return episodes, Rollout(*(torch.stack(x) for x in zip(*steps, strict=True)))


def assess(agent: Agent, predictor: Predictor, args: Args, video_dir: Path) -> tuple[dict, Figure]:
    """Scores of the policy, by its likeliest actions, by sampled ones and without memory, and of the forecasts."""
    episodes, rollout = evaluate(agent, args, video_dir if args.capture_video else None, sampled=False)
    others = evaluate(agent, args)[0], evaluate(agent, args, sampled=False, memory=False)[0]
    likeliest, sampled, memoryless = ([x.total for x in played] or [math.nan] for played in (episodes, *others))
    scores = {
        "eval/episodes": len(episodes),
        "eval/episodic_return": fmean(likeliest),
        "eval/return_std": float(np.std(likeliest)),
        "eval/return_sampled": fmean(sampled),
        "eval/return_memoryless": fmean(memoryless),
    }
    if any(episode.success is not None for episode in episodes):
        scores["eval/success_rate"] = fmean(bool(episode.success) for episode in episodes)
    if not args.predictor:
        return scores, Figure()
    rmse, skill = forecast_skill(agent, predictor, rollout, 2048)
    for k in sorted({k for k in (1, 10, 50, args.horizon) if k <= args.horizon}):
        scores |= {f"predictor/rmse_k{k}": float(rmse[k - 1]), f"predictor/skill_k{k}": float(skill[k - 1])}
    return scores, forecast_figure(agent, predictor, rollout)


def log_scalars(writer: SummaryWriter, scalars: dict, step: int) -> None:
    for name, value in scalars.items():
        if math.isfinite(value):  # there is one
            writer.add_scalar(name, value, step)
    writer.flush()


def save(path: Path, parts: dict, counters: dict, args: Args) -> None:
    """Writes a checkpoint; a kill or a power cut at any moment leaves the old file or the new one."""
    state = {name: part.state_dict() for name, part in parts.items()}
    with open(path.with_suffix(".tmp"), "wb", buffering=0) as file:
        torch.save(state | {"counters": counters, "args": asdict(args)}, file)
        os.fsync(file.fileno())
    os.replace(path.with_suffix(".tmp"), path)


def load(path: Path | str, **parts) -> dict:
    """Reads a checkpoint into `parts`, running no code that a stranger may have put into it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return {"counters": state["counters"], "args": state["args"]}
    except Exception as error:
        reason = " ".join(str(error).split()).partition("weights_only")[0]  # without advice to trust a stranger
        raise InputError(f"cannot load {path}: {type(error).__name__}: {reason[:300]}") from error


# --- train
signals: list[int] = []  # SIGINT and SIGTERM received so far; read once per update and per step of an evaluation


def on_signal(number: int, frame) -> None:
    signals.append(number)
    signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
    print("\nstopping at the next good moment; once more to end at once", file=sys.stderr)


def setup(env: gym.Env, args: Args) -> tuple[torch.device, int, int, dict]:
    """Device, rank and number of processes (one, unless torchrun started more), the networks and their optimisers."""
    on_gpu = args.cuda and torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu")
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")
    torch.set_num_threads(args.torch_threads)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    torch.manual_seed(args.seed)  # for the weights; whatever is random later draws from a generator of its own
    agent = Agent(env.observation_space, env.action_space, args).to(device)
    predictor = Predictor(agent, args.horizon, args.freeze_extractor).to(device)
    forecasting = [predictor] if args.freeze_extractor else [predictor, agent.encoder, agent.lstm]
    optimizer = torch.optim.Adam(agent.parameters(), betas=(0.9, 0.97), eps=1e-5, fused=True)  # detail 14
    predictor_optimizer = torch.optim.Adam([w for module in forecasting for w in module.parameters()], fused=True)
    parts = {"agent": agent, "predictor": predictor, "optimizer": optimizer, "predictor_optimizer": predictor_optimizer}
    return device, *((dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)), parts


def open_run(args: Args, global_step: int) -> tuple[Path, SummaryWriter]:
    """The run's folder, with its arguments and the code as it runs, and the writer of its TensorBoard events."""
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time():.3f}".replace("/", "-").replace(":", "-")
    run_dir = Path(args.resume or f"{args.runs_dir}/{name}")
    try:
        run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
        (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=2))
    except OSError as error:
        raise InputError(f"cannot write to {run_dir}: {error.strerror}") from error
    if not args.resume:
        shutil.copy(__file__, run_dir)
        for package in {"common", "environments"} & sys.modules.keys():
            shutil.copytree(sys.modules[package].__path__[0], run_dir / package)
    print(f"run folder: {run_dir}", file=sys.stderr)
    writer = SummaryWriter(run_dir, purge_step=global_step + 1)
    writer.add_text("args", f"```\n{json.dumps(asdict(args), indent=2)}\n```")
    return run_dir, writer


def summary(run_dir: Path, env: gym.Env, counters: dict, scores: dict) -> dict:
    """The closing JSON object; None where there is no number."""
    scores = {tag.replace("episodic_return", "return_mean").replace("/", "_"): x for tag, x in scores.items()}
    result = {"run_dir": str(run_dir), "solved": env.spec.reward_threshold} | counters | scores
    result = {name: round(x, 4) if isinstance(x, float) else x for name, x in result.items() if name != "recent"}
    return {name: None if x in (math.inf, -math.inf) or x != x else x for name, x in result.items()}


def train(args: Args) -> dict:
    """Trains, evaluates the final weights and returns the closing summary, empty if a signal came first. Raises
    InputError, before any work, for what cannot be; any other exception leaves the last checkpoint as it is."""
    device, rank, world, parts = setup(env := check(args), args)
    agent, predictor, optimizer, predictor_optimizer = parts.values()
    counters = {"global_step": 0, "seconds": 0.0, "recent": []}  # recent: returns of the last 100 episodes
    if args.evaluate or args.init_from:
        saved = load(args.evaluate or args.init_from, agent=agent, predictor=predictor)
    if args.evaluate:
        print(f"playing {args.eval_episodes} episodes three times", file=sys.stderr)
        run_dir, counters = Path(args.evaluate).parent, saved["counters"]
        scores = assess(agent, predictor, args, run_dir / "videos")[0] if rank == 0 else {}
        return summary(run_dir, env, counters, scores) if scores and not signals else {}
    if args.resume:
        counters = load(f"{args.resume}/checkpoint.pt", **parts)["counters"]
        if counters["global_step"] >= args.total_timesteps:
            raise InputError(f"{args.resume} has its steps: --total-timesteps above {counters['global_step']} goes on")
    if rank == 0:
        run_dir, writer = open_run(args, counters["global_step"])
        save(run_dir / "checkpoint.pt", parts, counters, args)
    tty = {} if sys.stderr.isatty() else {"mininterval": 30, "bar_format": "{l_bar}{bar}{r_bar}\n"}
    bar = tqdm(total=args.total_timesteps, initial=counters["global_step"], unit_scale=True, disable=rank > 0, **tty)
    seed = args.seed + rank * args.num_envs + counters["global_step"]  # resumed, environments start new episodes
    rng, predictor_rng = (torch.Generator(device).manual_seed(seed) for _ in range(2))
    history = deque(maxlen=1 + math.ceil(args.horizon / args.num_steps))  # rollouts: the oldest one's future is known
    batch_size, stop = world * args.num_envs * args.num_steps, False
    envs = make_envs(args, args.num_envs)
    player = play(envs, agent, seed)
    try:
        while counters["global_step"] < args.total_timesteps and not stop:
            # --- rollout, advantages
            started = time.perf_counter()
            remaining = 1 - counters["global_step"] / args.total_timesteps if args.anneal_lr else 1.0
            optimizer.param_groups[0]["lr"] = args.learning_rate * remaining
            predictor_optimizer.param_groups[0]["lr"] = args.predictor_learning_rate * remaining
            rollout, episodes = collect(player, args.num_steps)
            history.append(rollout)
            values, values_after = map(agent.return_stats.denormalize, (rollout.value, next_values(agent, rollout)))
            ends = rollout.terminated, rollout.truncated
            targets = gae(rollout.reward, values, values_after, *ends, args.gamma, args.gae_lambda)
            flat, advantages, returns = Rollout(*(x.flatten(0, 1) for x in rollout)), *(x.flatten() for x in targets)
            if args.norm_adv:
                advantages = advantages - all_mean(advantages.mean())
                advantages = advantages / (all_mean(advantages.square().mean()).sqrt() + 1e-8)

            # --- PPO; the first rollout only gives the statistics (detail 8)
            columns = cut_segments(rollout.start, args.bptt_length if args.recurrent else 1)  # [L, S]
            log = []  # metrics of each minibatch
            for _ in range(args.update_epochs if agent.obs_stats.count else 0):
                order = torch.randperm(columns.shape[1], generator=rng, device=device)
                for chosen in order.tensor_split(args.num_minibatches):
                    loss, metrics = ppo_loss(agent, flat, advantages, returns, columns[:, chosen], args)
                    log.append(metrics | {"grad_norm": descend(loss, optimizer, args.max_grad_norm)})
                kl = torch.stack([metrics["approx_kl"] for metrics in log[-args.num_minibatches :]]).mean()
                if args.target_kl and all_mean(kl) > args.target_kl:
                    break
            means = {name: torch.stack([metrics[name] for metrics in log]).mean() for name in (log[0] if log else ())}
            scalars = {f"losses/{name}": float(all_mean(x)) for name, x in means.items()}

            # --- predictor, as soon as the oldest rollout's future is known
            if args.predictor and len(history) == history.maxlen:
                log_error = forecast_skill(agent, predictor, rollout, 101)[0][:1].clamp(min=1e-6).log()  # of one step
                scalars["predictor/drift"] = predictor.drift(log_error)
                for _ in range(args.update_epochs):
                    some = torch.randperm(len(returns), generator=predictor_rng, device=device)
                    forecast, target, known = forecasts(agent, predictor, history, some[: args.predictor_samples])
                    loss = ((forecast - target).square().mean(-1) * known).sum() / all_mean(known.sum().float())
                    descend(loss, predictor_optimizer, args.max_grad_norm)
                scalars["predictor/loss"] = float(all_mean(loss.detach()))

            # --- statistics, log, save, evaluate
            agent.update_statistics(flat.obs, returns)
            counters["global_step"] += batch_size
            counters["seconds"] += time.perf_counter() - started
            done = counters["global_step"] >= args.total_timesteps
            stop = bool(all_mean(torch.tensor(float(len(signals)), device=device))) and not done
            if rank > 0:
                continue
            totals = [episode.total for episode in episodes]
            if not counters["recent"]:
                counters["first_return_mean"] = fmean(totals or [math.nan])
            counters["recent"] = [*counters["recent"], *totals][-100:]
            counters["train_return_mean"] = fmean(counters["recent"] or [math.nan])
            counters["sps"] = scalars["charts/SPS"] = counters["global_step"] / counters["seconds"]
            scalars["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            scalars["charts/episodic_return"] = fmean(totals or [math.nan])
            scalars["charts/episodic_length"] = fmean([episode.length for episode in episodes] or [math.nan])
            scalars["losses/explained_variance"] = 1 - float((returns - values.flatten()).var() / returns.var())
            scalars["losses/first_ratio_error"] = float(log[0]["ratio_error"]) if log else math.nan
            if scalars["losses/first_ratio_error"] > 1e-3:
                bar.write("warning: rollout and update compute different log-probabilities", file=sys.stderr)
            bar.set_postfix_str(f"return {counters['train_return_mean']:.1f}", refresh=False)
            bar.update(min(batch_size, bar.total - bar.n))
            log_scalars(writer, scalars, counters["global_step"])
            due = done or (args.checkpoint_every and counters["global_step"] // batch_size % args.checkpoint_every == 0)
            if due or stop:
                save(run_dir / "checkpoint.pt", parts, counters, args)
            if due and not stop:
                scores, figure = assess(agent, predictor, args, run_dir / "videos")
                if signals:  # which cut it short; the next update hears of them on all ranks
                    continue
                figure.savefig(run_dir / "forecast.png")
                writer.add_figure("predictor/forecast", figure, counters["global_step"])
                log_scalars(writer, scores, counters["global_step"])
                if scores["eval/episodic_return"] > counters.get("best", -math.inf):
                    counters["best"] = scores["eval/episodic_return"]
                    for name in ("best.pt", "checkpoint.pt"):
                        save(run_dir / name, parts, counters, args)
    finally:
        envs.close()
        bar.close()
        if rank == 0:
            writer.close()
            if counters["global_step"] < args.total_timesteps:
                print(f"continue with: python {sys.argv[0]} --resume {run_dir}", file=sys.stderr)
    return {} if rank > 0 or stop or signals else summary(run_dir, env, counters, scores)


def main() -> None:
    args = tyro.cli(Args)
    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if source := args.evaluate or (args.resume and f"{args.resume}/checkpoint.pt"):
            saved, known = load(source)["args"], {field.name for field in fields(Args)}
            if missing := known - saved.keys():
                print(f"{source} has no {', '.join(sorted(missing))}: the default is taken", file=sys.stderr)
            saved = {name: x for name, x in saved.items() if name in known}
            saved |= {"evaluate": args.evaluate, "resume": args.resume, "init_from": None}
            args = tyro.cli(Args, default=Args(**saved))
        result = train(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        received, signals[:] = signals[:], []
    if dist.is_initialized():
        dist.destroy_process_group()
    if received:
        sys.exit(128 + received[0])
    if result:
        print(f"first {result.get('first_return_mean')} | now {result['eval_return_mean']} | solved {result['solved']}")
        if not args.evaluate:
            print(f"watch: tensorboard --logdir {args.runs_dir}")
            print(f"evaluate: python {sys.argv[0]} --evaluate {result['run_dir']}/checkpoint.pt")
        print(json.dumps(result))


if __name__ == "__main__":
    main()
