"""PPO with an LSTM policy that watches small networks, the hosts, train, and decides once an epoch for each of them
whether to grow a module, make it permanent, or remove it.

The data goes one way, and each arrow has its function below:

    environments ── play ──▶ steps ── collect ──▶ Rollout [T, N]        one LSTM cell a step, no gradients
    Rollout ── next_values, gae ──▶ advantages, returns [T, N]          truncation bootstraps, termination does not
    Rollout ── cut_segments ──▶ columns [L, S] ──▶ minibatches of them  consecutive steps of one environment
    minibatch ── Agent.unroll ── ppo_loss ── descend ──▶ weights        one LSTM call, flushed between episodes

Letters in shapes: T steps, N environments, D entries of what the agent sees, A actions, F features of the LSTM, B or M
samples; [L, S] are L rows of S columns (cut_segments). The hosts are in environments/hosts.py. PPO: Schulman et al.
2017, arXiv 1707.06347; controller and lifecycle of modules follow github.com/tachyon-beep/esper-lite. `detail 5`:
docs/ppo_lstm_tamiyo.md.
"""

import json
import math
import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from gymnasium.spaces import Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.gae import gae
from common.obs import entry_names, flatten
from environments.hosts import ACTIONS, HELD_OUT, OBSERVATION, UNSEEN, WAIT


@dataclass
class Args:  # the comments are what --help says
    exp_name: str = Path(__file__).stem  # RUN: name of the experiment, part of the run folder's name
    seed: int = 1  # of environments, networks and sampling; the same seed gives the same run on one machine
    cuda: bool = True  # use a CUDA device if there is one
    torch_threads: int = 1  # threads of torch on the CPU; one is fastest for small recurrent networks
    runs_dir: str = "runs"  # folder that holds the run folders
    checkpoint_every: int = 25  # updates between checkpoints, each with an evaluation; 0 = only at the end
    resume: str | None = None  # a run folder to continue, with its arguments unless others are given
    init_from: str | None = None  # a checkpoint whose networks to start from
    evaluate: str | None = None  # a checkpoint to evaluate, with its arguments unless others are given; no training
    eval_episodes: int = 64  # episodes (hosts) of each evaluation, always the same, and never trained on
    env_id: str = "environments.hosts:Morphogenesis-v0"  # ENVIRONMENT: any Gymnasium id with discrete actions
    env_kwargs: str = "{}"  # keyword arguments of `gymnasium.make_vec`, as JSON: `{"setting": "memory"}`
    total_timesteps: int = 64_000  # PPO: epochs of hosts to train for, over all hosts and processes
    learning_rate: float = 1e-3  # Adam's step size
    num_envs: int = 64  # environments (hosts) of each process
    num_steps: int = 25  # steps of each environment per rollout; a step is an epoch of its host
    anneal_lr: bool = True  # lower the learning rate, and the entropy bonus, linearly to 0
    gamma: float = 1.0  # discount factor
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    num_minibatches: int = 4  # minibatches per pass; at most num_envs
    update_epochs: int = 8  # passes over each rollout
    norm_adv: bool = True  # normalise the advantages of each rollout
    clip_coef: float = 0.2  # clip range of the probability ratio
    ent_coef: float = 0.01  # weight of the entropy bonus, lowered like the learning rate
    vf_coef: float = 0.5  # weight of the value loss; values are in units of the returns' standard deviation
    max_grad_norm: float = 0.5  # largest norm of the gradient
    target_kl: float | None = None  # stop an update after a pass whose mean approximate KL exceeds this; None = never
    recurrent: bool = True  # RECURRENCE: off zeroes the LSTM's state before every step: the same network, no memory
    reset_every: int = 0  # zero the state after so many steps of an episode, to measure what memory is worth; 0 = never
    lstm_hidden: int = 128  # width of the LSTM
    bptt_length: int = 8  # steps through which gradients flow; 0 = the whole episode, as far as the rollout holds it


class InputError(Exception):
    """The user asked for something that cannot be done; the message is one line."""


def check(args: Args) -> VectorEnv:
    """Closed environments, to ask for their spaces; InputError for what can be known to fail before any work."""
    may_be_0 = ["seed", "checkpoint_every", "gamma", "gae_lambda", "clip_coef", "ent_coef", "vf_coef"]
    may_be_0 += ["bptt_length", "reset_every"]
    at_most = {"gamma": 1, "gae_lambda": 1, "num_minibatches": args.num_envs, "seed": 10**9, "total_timesteps": 10**12}
    for name, x in vars(args).items():
        least, most = "0 or more" if name in may_be_0 else "above 0", at_most.get(name, 10**5)
        if type(x) in (int, float) and not (0 < x <= most or (x == 0 and name in may_be_0)):
            raise InputError(f"--{name.replace('_', '-')} must be {least} and at most {most}, not {x}")
    try:
        with closing(make_envs(args, 1)) as envs:
            entry_names(envs.single_observation_space)
            assert isinstance(envs.single_action_space, Discrete), f"no support for {envs.single_action_space}"
            return envs
    except Exception as error:
        raise InputError(f"{args.env_id}: {' '.join(str(error).split())}") from error


# --- environment
def make_envs(args: Args, num_envs: int) -> VectorEnv:
    """Environments that reset themselves in the step that ends an episode."""
    kwargs = json.loads(args.env_kwargs)
    if args.env_id.endswith("Morphogenesis-v0"):  # many hosts are one environment
        return gym.make_vec(args.env_id, num_envs, **kwargs)
    vector = {"copy": False, "autoreset_mode": AutoresetMode.SAME_STEP}
    wrappers = [lambda env: gym.wrappers.TimeLimit(env, 27_000), gym.wrappers.RecordEpisodeStatistics]
    return gym.make_vec(args.env_id, num_envs, "sync", vector_kwargs=vector, wrappers=wrappers, **kwargs)


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
    """encoder -> LSTM -> actor and critic, each with a hidden layer that sees both. Values are normalised. obs [..., D]
    is the flattened observation, the action before it (zeros at an episode's start) and what the critic alone sees
    (detail 11); the state [N, 2, F] the LSTM's h (features) and c."""

    def __init__(self, obs_space: gym.Space, action_space: Discrete, args: Args):
        super().__init__()
        self.action_space, self.num_actions, width = action_space, int(action_space.n), args.lstm_hidden
        self.of_hosts = args.env_id.endswith("Morphogenesis-v0")
        self.reset_every = args.reset_every if args.recurrent else 1
        self.obs_size = len(entry_names(obs_space)) + self.num_actions  # entries that the actor sees
        unseen = len(UNSEEN) if self.of_hosts else 0
        self.obs_stats = RunningMeanStd((self.obs_size + unseen,))
        self.return_stats = RunningMeanStd((), memory=100_000)
        self.encoder, self.lstm = nn.Linear(self.obs_size, 64), nn.LSTM(64, width)
        self.for_actor, self.for_critic = nn.Linear(64 + width, 64), nn.Linear(64 + width + unseen, 64)
        self.actor, self.critic = nn.Linear(64, self.num_actions), nn.Linear(64, 1)
        gains = {self.encoder: 1.4, self.for_actor: 1.4, self.for_critic: 1.4, self.actor: 0.01, self.critic: 1.0}
        for layer, gain in gains.items():
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)
        if self.of_hosts:  # equal chances would cull nearly every seed before it grows
            self.actor.bias.data[WAIT] = 3.0
        w_input, w_state, *biases = (weight.data.unflatten(0, (4, -1)) for weight in self.lstm.all_weights[0])
        for gate in (*w_input, *w_state):  # [F, 64] and [F, F] of input, forget, cell and output gate
            nn.init.orthogonal_(gate)
        biases[0][:], biases[1][:] = torch.tensor([[0.0], [1.0], [0.0], [0.0]]), 0  # forget gate 73% open
        shut = torch.tensor([-1e9, -1e9, 0.0, 0.0]).repeat_interleave(width)  # input and forget gate
        self.register_buffer("shut", shut[:, None], persistent=False)  # [4F, 1]: weights of unroll's extra input

    def initial_state(self, n: int) -> Tensor:
        return torch.zeros(n, 2, self.lstm.hidden_size, device=self.shut.device)

    def begins(self, age: Tensor) -> Tensor:
        """Whether a step, so many after its episode's start, starts from the initial state."""
        return (age % self.reset_every if self.reset_every else age) == 0

    def encode(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """What goes into the LSTM [..., 64], and what the critic alone sees."""
        seen, unseen = self.obs_stats.normalize(obs).clamp(-10, 10).tensor_split([self.obs_size], -1)
        return self.encoder(seen).tanh(), unseen

    def heads(self, encoded: Tensor, features: Tensor, unseen: Tensor, action_mask: Tensor | None) -> tuple:
        for_actor = self.for_actor(torch.cat((encoded, features), -1)).tanh()
        for_critic = self.for_critic(torch.cat((encoded, features, unseen), -1)).tanh()
        logits = self.actor(for_actor)
        if action_mask is not None:
            logits = logits.masked_fill(~action_mask, torch.finfo(logits.dtype).min)
        return logits, self.critic(for_critic).squeeze(-1)

    def step(self, obs: Tensor, state: Tensor, action_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """obs [N, D], state [N, 2, F], action_mask [N, A] -> logits [N, A], values [N], the next state."""
        encoded, unseen = self.encode(obs)
        state = torch.stack(torch.lstm_cell(encoded, state.unbind(1), *self.lstm.all_weights[0]), 1)
        return *self.heads(encoded, state[:, 0], unseen, action_mask), state

    def unroll(self, obs: Tensor, state: Tensor, flush: Tensor, action_mask: Tensor | None) -> tuple[Tensor, ...]:
        """obs [L, S, D], state [S, 2, F], action_mask [L, S, A] -> logits [L, S, A], values [L, S]. A step with
        `flush` [L, S] leaves the initial state: one more input, with weights `shut`, closes two gates (detail 2)."""
        encoded, unseen = self.encode(obs)
        w_input, *weights = self.lstm.all_weights[0]  # below: biases, layers, dropout, training, both ways, batch first
        x, w_input = torch.cat((encoded, flush[..., None]), -1), torch.cat((w_input, self.shut), 1)
        h, c = state.transpose(0, 1).contiguous().unsqueeze(1)  # each [1, S, F]
        features, _, _ = torch.lstm(x, (h, c), [w_input, *weights], True, 1, 0.0, True, False, False)
        return self.heads(encoded, features, unseen, action_mask)

    @torch.no_grad()
    def update_statistics(self, obs: Tensor, returns: Tensor) -> None:
        """Merges obs [M, D] and returns [M]; denormalised values stay as they are (PopArt, 1602.07714, eq. 9)."""
        stats, mean, std = self.return_stats, self.return_stats.mean.clone(), self.return_stats.std.clone()
        self.obs_stats.update(obs)
        stats.update(returns)
        self.critic.weight.mul_(std / stats.std)
        self.critic.bias.copy_((std * self.critic.bias + mean - stats.mean) / stats.std)


def sample(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Actions [N]; without a generator, the likeliest ones."""
    if generator:  # the maximum of logits + Gumbel noise is a sample of their softmax
        logits = logits - (torch.empty_like(logits).exponential_(generator=generator) + 1e-20).log()
    return logits.argmax(-1)


def logprob_entropy(logits: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [...] for logits [..., A], actions [...]."""
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(-1, action[..., None]).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)


# --- rollout
class Rollout(NamedTuple):
    """T steps of N environments: what the agent saw and its state *before* the step, what it did, what came back."""

    obs: Tensor  # [T, N, D]
    age: Tensor  # [T, N] steps since the episode's start
    state: Tensor  # [T, N, 2, F]
    action_mask: Tensor  # [T, N, A] bool: what may be chosen
    logits: Tensor  # [T, N, A] of the policy that acted
    action: Tensor  # [T, N]
    value: Tensor  # [T, N] normalised
    reward: Tensor  # [T, N]
    terminated: Tensor  # [T, N] bool
    truncated: Tensor  # [T, N] bool
    next_obs: Tensor  # [T, N, D] the true next observation, the last of an episode too; only `unseen` is the next one's


class Episode(NamedTuple):
    n: int  # its environment
    total: float  # its return
    length: int
    info: dict  # what is told of a host at its end


@torch.inference_mode()
def play(envs: VectorEnv, agent: Agent, seeds: list[int], sampled: bool = True, memory: bool = True) -> Iterator[tuple]:
    """Plays without end, and gives each step, a Rollout without the dimension T, and the list of Episodes that end with
    it. The actions are sampled, or the likeliest; without memory, every step starts from the initial state."""
    obs_space, space, device = envs.single_observation_space, agent.action_space, agent.shut.device
    generator = torch.Generator(device).manual_seed(seeds[0]) if sampled else None
    no_action = np.zeros((envs.num_envs, agent.num_actions), np.float32)

    def masks(infos: dict) -> Tensor:
        silent = ~infos.get("_action_mask", no_action[:, 0] > 0)[:, None]  # environments without one allow everything
        action_mask = torch.from_numpy(np.asarray(infos.get("action_mask", no_action), bool) | silent)
        for n in (~action_mask.any(-1)).nonzero():
            raise ValueError(f"environment {int(n)} allows no action at all")
        return action_mask.to(device)

    def seen(raw, action: np.ndarray, infos: dict) -> np.ndarray:
        unseen = infos["unseen"] if agent.of_hosts else no_action[:, :0]
        return np.concatenate((flatten(obs_space, raw), action, unseen), 1)

    raw, infos = envs.reset(seed=seeds)
    obs = torch.from_numpy(seen(raw, no_action, infos)).to(device)
    age, fresh = torch.zeros(envs.num_envs, dtype=torch.int64, device=device), agent.initial_state(envs.num_envs)
    state, action_mask = fresh, masks(infos)
    while True:
        logits, value, next_state = agent.step(obs, state, action_mask)
        action = sample(logits, generator)
        taken = action.cpu().numpy() + space.start
        raw, reward, terminated, truncated, infos = envs.step(taken)
        new, episodes = seen(raw, flatten(space, taken), infos), []
        next_obs = new.copy()  # the two differ where an episode ends: there, `new` is the first of the next one
        for n in np.flatnonzero(terminated | truncated):
            final = gym.spaces.flatten(obs_space, infos["final_obs"][n])
            next_obs[n, : len(final)], new[n, len(final) : len(final) + agent.num_actions] = final, 0
            info = infos["final_info"]
            told = {name: x[n] for name, x in info.items() if agent.of_hosts and name != "episode"}
            episodes.append(Episode(n, float(info["episode"]["r"][n]), int(info["episode"]["l"][n]), told))
        if not (np.isfinite(new).all() and np.isfinite(next_obs).all() and np.isfinite(reward).all()):
            raise FloatingPointError("an environment returned an observation or a reward that is not finite")
        back = (np.float32(reward), terminated, truncated, next_obs, new)
        *back, new = (torch.from_numpy(x).to(device) for x in back)
        yield Rollout(obs, age, state, action_mask, logits, action, value, *back), episodes
        obs, action_mask, age = new, masks(infos), (age + 1) * ~(back[1] | back[2])
        state = torch.where((agent.begins(age) | (not memory))[:, None, None], fresh, next_state)


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
    state[agent.begins(rollout.age[cut] + 1)] = 0
    _, values[cut], _ = agent.step(rollout.next_obs[cut], state)
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
    logits, values = agent.unroll(flat.obs[index], flat.state[index[0]], ~mask, flat.action_mask[index])
    logprob, entropy = logprob_entropy(logits[mask], flat.action[real])
    log_ratio = logprob - logprob_entropy(flat.logits[real], flat.action[real])[0]
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


# --- picture
def actions_figure(agent: Agent, rollout: Rollout) -> Figure:
    """Of hosts: how often each action is taken in each epoch, and what becomes of the seeds of eight."""
    figure = Figure(figsize=(10, 8), layout="constrained")
    if not agent.of_hosts:
        return figure
    top, bottom = figure.subplots(2)
    first = rollout.age == torch.arange(len(rollout.age), device=rollout.age.device)[:, None]  # not of a second episode
    taken = nn.functional.one_hot(rollout.action, agent.num_actions) * first[..., None]  # [T, N, A]
    image = top.imshow((taken.sum(1) / first.sum(1, keepdim=True)).T.cpu().numpy(), aspect="auto", vmin=0, vmax=1)
    top.set(yticks=range(len(ACTIONS)), yticklabels=ACTIONS, title="share of hosts")
    figure.colorbar(image, ax=top)
    stages = ("no_seed", "germinated", "training", "blending", "holding")  # one-hot
    seen = rollout.obs[:, :8, [list(OBSERVATION).index(name) for name in stages]]  # [T, 8, 5]
    image = bottom.imshow(seen.argmax(-1).T.cpu().numpy(), aspect="auto", cmap="YlOrRd", vmin=0, vmax=4)
    figure.colorbar(image, ax=bottom, ticks=range(5)).ax.set_yticklabels(stages)
    bottom.set(xlabel="epoch", ylabel="host", title="stage of the live seed")
    return figure


# --- evaluate, save, load
def evaluate(agent: Agent, args: Args, **how) -> tuple[list[Episode], Rollout]:
    """An episode for each of `eval_episodes` seeds, the same ones whatever `seed` is, side by side; and the last
    2,000 steps, of which those behind an environment's first episode count for nothing."""
    seeds, steps, episodes = [HELD_OUT + i for i in range(args.eval_episodes)], deque(maxlen=2000), {}
    with closing(make_envs(args, len(seeds))) as envs:
        for step, ended in play(envs, agent, seeds, **how):
            steps.append(step)
            episodes = {episode.n: episode for episode in ended} | episodes
            if signals or len(episodes) == len(seeds):
                return list(episodes.values()), Rollout(*(torch.stack(x) for x in zip(*steps, strict=True)))


def assess(agent: Agent, args: Args) -> tuple[dict, Figure]:
    """Scores of the policy, by its likeliest actions, by sampled ones and without memory, and means of what is told of
    hosts at their end."""
    episodes, rollout = evaluate(agent, args, sampled=False)
    others = evaluate(agent, args)[0], evaluate(agent, args, sampled=False, memory=False)[0]
    likeliest, sampled, memoryless = ([x.total for x in played] or [math.nan] for played in (episodes, *others))
    scores = {
        "eval/episodes": len(episodes),
        "eval/episodic_return": fmean(likeliest),
        "eval/return_std": float(np.std(likeliest)),
        "eval/return_sampled": fmean(sampled),
        "eval/return_memoryless": fmean(memoryless),
    }
    for name, x in (episodes[0].info if episodes else {}).items():
        if np.ndim(x) == 0:
            scores[f"tamiyo/{name}"] = fmean(float(episode.info[name]) for episode in episodes)
    return scores, actions_figure(agent, rollout)


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


def setup(envs: VectorEnv, args: Args) -> tuple[torch.device, int, int, dict]:
    """Device, rank and number of processes (one, unless torchrun started more), the network and its optimiser."""
    on_gpu = args.cuda and torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu")
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")
    torch.set_num_threads(args.torch_threads)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    torch.manual_seed(args.seed)  # for the weights; whatever is random later draws from a generator of its own
    agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(device)
    parts = {"agent": agent, "optimizer": torch.optim.Adam(agent.parameters(), eps=1e-5, fused=True)}
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


def summary(run_dir: Path, counters: dict, scores: dict) -> dict:
    """The closing JSON object; None where there is no number."""
    scores = {tag.replace("episodic_return", "return_mean").replace("/", "_"): x for tag, x in scores.items()}
    result = {"run_dir": str(run_dir)} | counters | {name.removeprefix("tamiyo_"): x for name, x in scores.items()}
    result = {name: round(x, 4) if isinstance(x, float) else x for name, x in result.items() if name != "recent"}
    return {name: None if x in (math.inf, -math.inf) or x != x else x for name, x in result.items()}


def train(args: Args) -> dict:
    """Trains, evaluates the final weights and returns the closing summary, empty if a signal came first. Raises
    InputError, before any work, for what cannot be; any other exception leaves the last checkpoint as it is."""
    device, rank, world, parts = setup(check(args), args)
    agent, optimizer = parts.values()
    counters = {"global_step": 0, "seconds": 0.0, "recent": []}  # recent: returns of the last 100 episodes
    if args.evaluate or args.init_from:
        saved = load(args.evaluate or args.init_from, agent=agent)
    if args.evaluate:
        print(f"playing {args.eval_episodes} episodes three times", file=sys.stderr)
        run_dir, counters = Path(args.evaluate).parent, saved["counters"]
        scores = assess(agent, args)[0] if rank == 0 else {}
        return summary(run_dir, counters, scores) if scores and not signals else {}
    if args.resume:
        counters = load(f"{args.resume}/checkpoint.pt", **parts)["counters"]
        if counters["global_step"] >= args.total_timesteps:
            raise InputError(f"{args.resume} has its steps: --total-timesteps above {counters['global_step']} goes on")
    if rank == 0:
        run_dir, writer = open_run(args, counters["global_step"])
        save(run_dir / "checkpoint.pt", parts, counters, args)
    tty = {} if sys.stderr.isatty() else {"mininterval": 30, "bar_format": "{l_bar}{bar}{r_bar}\n"}
    bar = tqdm(total=args.total_timesteps, initial=counters["global_step"], unit_scale=True, disable=rank > 0, **tty)
    seed = [args.seed, rank, counters["global_step"]]  # resumed, environments start new episodes
    seeds = np.random.default_rng(seed).integers(HELD_OUT, size=args.num_envs).tolist()
    rng = torch.Generator(device).manual_seed(seeds[-1])
    batch_size, stop = world * args.num_envs * args.num_steps, False
    bptt_length = 1 if agent.reset_every == 1 else args.bptt_length
    envs = make_envs(args, args.num_envs)
    player = play(envs, agent, seeds)
    try:
        while counters["global_step"] < args.total_timesteps and not stop:
            # --- rollout, advantages
            started = time.perf_counter()
            remaining = 1 - counters["global_step"] / args.total_timesteps if args.anneal_lr else 1.0
            optimizer.param_groups[0]["lr"] = args.learning_rate * remaining
            now = replace(args, ent_coef=args.ent_coef * remaining)
            rollout, episodes = collect(player, args.num_steps)
            values, values_after = map(agent.return_stats.denormalize, (rollout.value, next_values(agent, rollout)))
            ends = rollout.terminated, rollout.truncated
            targets = gae(rollout.reward, values, values_after, *ends, args.gamma, args.gae_lambda)
            flat, advantages, returns = Rollout(*(x.flatten(0, 1) for x in rollout)), *(x.flatten() for x in targets)
            if args.norm_adv:
                advantages = advantages - all_mean(advantages.mean())
                advantages = advantages / (all_mean(advantages.square().mean()).sqrt() + 1e-8)

            # --- PPO; the first rollout only gives the statistics (detail 8)
            columns = cut_segments(agent.begins(rollout.age), bptt_length)  # [L, S]
            log = []  # metrics of each minibatch
            for _ in range(args.update_epochs if agent.obs_stats.count else 0):
                order = torch.randperm(columns.shape[1], generator=rng, device=device)
                for chosen in order.tensor_split(args.num_minibatches):
                    loss, metrics = ppo_loss(agent, flat, advantages, returns, columns[:, chosen], now)
                    log.append(metrics | {"grad_norm": descend(loss, optimizer, args.max_grad_norm)})
                kl = torch.stack([metrics["approx_kl"] for metrics in log[-args.num_minibatches :]]).mean()
                if args.target_kl and all_mean(kl) > args.target_kl:
                    break
            means = {name: torch.stack([metrics[name] for metrics in log]).mean() for name in (log[0] if log else ())}
            scalars = {f"losses/{name}": float(all_mean(x)) for name, x in means.items()}

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
                scores, figure = assess(agent, args)
                if signals:  # which cut it short; the next update hears of them on all ranks
                    continue
                figure.savefig(run_dir / "actions.png")
                writer.add_figure("tamiyo/actions", figure, counters["global_step"])
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
    return {} if rank > 0 or stop or signals else summary(run_dir, counters, scores)


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
        bare, grown = result.get("bare_test_accuracy"), result.get("test_accuracy")
        accuracy = f" | test accuracy {bare:.1%} ungrown, {grown:.1%} now" if grown else ""
        print(f"first {result.get('first_return_mean')} | now {result['eval_return_mean']}{accuracy}")
        if not args.evaluate:
            print(f"watch: tensorboard --logdir {args.runs_dir}")
            print(f"evaluate: python {sys.argv[0]} --evaluate {result['run_dir']}/checkpoint.pt")
        print(json.dumps(result))


if __name__ == "__main__":
    main()
