"""PPO with an LSTM policy, and a head that forecasts the next `horizon` observations in one shot.

The data goes one way, and each stage has one place below:

    environment step -> flatten -> Agent.step (one LSTM cell, no gradients) -> Rollout [T, N] (states before each step)
    Rollout -> gae (terminated / truncated, values of final observations) -> advantages, returns [T, N]
    Rollout -> cut_segments at episode ends and every bptt_length steps -> minibatches of them, laid into rows [L, R]
    rows -> Agent.unroll (one LSTM call, states flushed between segments) -> logits, values -> ppo_loss -> optimizer
    the last rollouts -> Predictor, at steps whose future is known by now -> predictor_loss -> predictor_optimizer

PPO is Schulman et al. 2017, arXiv 1707.06347. Numbers such as `detail 5` refer to docs/ppo_lstm_predictor.md.
"""

import heapq
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.gae import gae
from common.obs import entry_names, flatten


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
    checkpoint_every: int = 50
    """updates between checkpoints, each with an evaluation; 0 = only at the end"""
    resume: str | None = None
    """a run folder to continue, with its arguments unless others are given"""
    init_from: str | None = None
    """a checkpoint whose weights to start from, wherever names and shapes fit"""
    evaluate: str | None = None
    """a checkpoint to evaluate, with its arguments unless others are given; no training"""
    eval_episodes: int = 20
    """episodes of each evaluation, on seeds that are not trained on"""
    eval_deterministic: bool = True
    """evaluate with the most likely action instead of a sampled one"""
    capture_video: bool = False
    """record the evaluations' first environment to `videos/` in the run folder"""

    # --- environment
    env_id: str = "LunarLander-v3"
    """any Gymnasium id, also `module:Name-v0`, which imports the module first"""
    env_kwargs: str = "{}"
    """keyword arguments of `gymnasium.make`, as JSON"""
    vectorization: Literal["sync", "async"] = "sync"
    """step the environments in turn, or each in a process of its own (for slow environments)"""
    visible: tuple[int, ...] | None = None
    """entries of the flattened observation that the policy sees; None = all. The forecast is of all entries anyway"""

    # --- PPO
    total_timesteps: int = 500_000
    """environment steps to train for, over all environments and processes"""
    learning_rate: float = 3e-3
    """Adam's step size"""
    num_envs: int = 16
    """environments of each process"""
    num_steps: int = 128
    """steps of each environment per rollout"""
    anneal_lr: bool = True
    """lower the learning rate linearly to 0"""
    gamma: float = 0.995
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    num_minibatches: int = 4
    """minibatches per epoch; at most num_envs"""
    update_epochs: int = 4
    """passes over each rollout"""
    norm_adv: bool = True
    """normalise the advantages of each rollout"""
    clip_coef: float = 0.2
    """clip range of the probability ratio"""
    clip_vloss: bool = False
    """clip the value loss with clip_coef too (values are in units of the returns' standard deviation)"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
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
    bptt_length: int = 0
    """steps through which gradients flow; 0 = the whole episode, as far as the rollout holds it"""
    refresh_states: bool = False
    """recompute the stored LSTM states with the current weights before each later epoch"""

    # --- predictor
    predictor: bool = True
    """train the head that forecasts observations"""
    horizon: int = 50
    """steps that it forecasts"""
    predictor_samples: int | None = None
    """steps per predictor minibatch, one a PPO epoch; None = 1024, 512, 256 for horizons up to 10, 50, above"""
    predictor_learning_rate: float = 3e-3
    """step size of the predictor's Adam, annealed like PPO's"""
    predictor_loss_weight: float = 1.0
    """step size of encoder and LSTM relative to the head's where both learn to forecast (Adam cancels a loss weight)"""
    freeze_extractor: bool = True
    """train the head only, so that PPO is exactly what it is without it; off = its gradient reaches encoder and LSTM"""


class InputError(Exception):
    """The user asked for something that cannot be done; the message is one line."""


def check(args: Args) -> None:
    """Raises InputError, with one clear line, for whatever can be known to fail before any work is done."""

    def need(ok: bool, message: str) -> None:
        if not ok:
            raise InputError(message)

    above_zero = ["total_timesteps", "num_envs", "num_steps", "num_minibatches", "update_epochs", "learning_rate"]
    above_zero += ["max_grad_norm", "torch_threads", "lstm_hidden", "lstm_layers", "eval_episodes", "horizon"]
    above_zero += ["predictor_learning_rate"] + ["predictor_samples"] * (args.predictor_samples is not None)
    above_zero += ["target_kl"] * (args.target_kl is not None)
    not_negative = [
        "seed",
        "bptt_length",
        "checkpoint_every",
        "ent_coef",
        "vf_coef",
        "clip_coef",
        "predictor_loss_weight",
    ]
    for name in above_zero + not_negative + ["gamma", "gae_lambda"]:
        value, flag = getattr(args, name), "--" + name.replace("_", "-")
        need(value > 0 or name not in above_zero, f"{flag} must be above 0, not {value}")
        need(value >= 0, f"{flag} must not be negative, not {value}")
        need(value <= 1 or name not in ("gamma", "gae_lambda"), f"{flag} must be at most 1, not {value}")
    need(args.num_minibatches <= args.num_envs, "--num-minibatches must not exceed --num-envs")
    exclusive = [args.resume, args.init_from, args.evaluate]
    need(sum(map(bool, exclusive)) <= 1, "--resume, --init-from and --evaluate exclude each other")
    moviepy = not args.capture_video or importlib.util.find_spec("moviepy")
    need(moviepy, "--capture-video needs moviepy: pip install -r requirements-envs.txt")
    try:
        env = make_env(args, "rgb_array" if args.capture_video else None)
        names, space = entry_names(env.observation_space), env.action_space
        env.close()
    except Exception as error:
        raise InputError(f"{args.env_id}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    need(isinstance(space, (Box, Discrete, MultiDiscrete)), f"{args.env_id}: no support for actions in {space}")
    for i in args.visible or ():
        need(0 <= i < len(names), f"--visible {i}: the entries of {args.env_id} are 0 to {len(names) - 1}")
    layers = args.lstm_layers if args.recurrent else 0
    per_step = 4 * (2 * len(names) + 2 * layers * args.lstm_hidden)
    rollouts = per_step * args.num_envs * args.num_steps * history_length(args)
    forecasts = 4 * args.horizon * len(names) * 6 * predictor_samples(args) * args.predictor
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    size = f"{rollouts / 1e9:.1f} GB for rollouts and {forecasts / 1e9:.1f} GB for forecasts"
    need(rollouts + forecasts < memory, f"this needs {size}; the machine has {memory / 1e9:.1f} GB")
    if rollouts + forecasts > 1e9:
        print(f"warning: this needs {size}", file=sys.stderr)


def history_length(args: Args) -> int:
    """Rollouts to keep so that every step of the oldest has its whole future within them."""
    return 1 + math.ceil(args.horizon / args.num_steps) if args.predictor else 1


def predictor_samples(args: Args) -> int:
    return args.predictor_samples or (1024 if args.horizon <= 10 else 512 if args.horizon <= 50 else 256)


# --- environment


def make_env(args: Args, render_mode: str | None = None) -> gym.Env:
    return gym.make(args.env_id, **({"render_mode": render_mode} if render_mode else {}), **json.loads(args.env_kwargs))


def make_envs(args: Args, num_envs: int, video_dir: Path | None = None) -> VectorEnv:
    """Environments that reset themselves in the step that ends an episode; the first is filmed if there is a folder."""
    main_process = os.getpid()

    def make(i: int) -> gym.Env:
        if os.getpid() != main_process:  # a worker leaves Ctrl-C to the main process, and ends when that says so
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if video_dir and i == 0:
            return gym.wrappers.RecordVideo(make_env(args, "rgb_array"), str(video_dir), episode_trigger=lambda _: True)
        return make_env(args)

    vector_class = AsyncVectorEnv if args.vectorization == "async" else SyncVectorEnv
    makers = [lambda i=i: make(i) for i in range(num_envs)]
    return vector_class(makers, copy=False, autoreset_mode=AutoresetMode.SAME_STEP)


def env_action(action: Tensor, space: gym.Space) -> np.ndarray:
    """The agent's actions [N, A] as the environments want them. A Box is scaled from [-1, 1], and clipped, to its
    bounds; an entry without both bounds is only clipped."""
    array = action.cpu().numpy()
    if isinstance(space, Discrete):
        return array[:, 0] + space.start
    array = array.reshape(-1, *space.shape)
    if isinstance(space, MultiDiscrete):
        return array + space.start
    bounded = np.isfinite(space.low) & np.isfinite(space.high)
    low, high = np.where(bounded, space.low, -1), np.where(bounded, space.high, 1)
    scaled = np.where(bounded, low + (np.clip(array, -1, 1) + 1) / 2 * (high - low), array)
    return np.clip(scaled, space.low, space.high).astype(space.dtype)


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
    Distribution parameters [..., P] are logits, side by side for MultiDiscrete, or means then log standard deviations.
    """

    def __init__(self, obs_size: int, action_space: gym.Space, args: Args):
        super().__init__()
        self.layers = args.lstm_layers if args.recurrent else 0
        self.hidden_size = args.lstm_hidden
        self.register_buffer("visible", torch.tensor(args.visible or range(obs_size)), persistent=False)
        self.obs_stats = RunningMeanStd((obs_size,))
        self.return_stats = RunningMeanStd((), memory=100_000)
        self.encoder = nn.Sequential(init_linear(len(self.visible), 64, gain=math.sqrt(2)), nn.Tanh())
        if args.recurrent:
            self.lstm = nn.LSTM(64, self.hidden_size, self.layers)
            for name, weight in self.lstm.named_parameters():
                nn.init.zeros_(weight) if "bias" in name else nn.init.orthogonal_(weight)
            gates = torch.tensor([-1e9, -1e9, 0.0, 0.0])  # input, forget, cell, output
            self.register_buffer("flush", gates.repeat_interleave(self.hidden_size)[:, None], persistent=False)
        else:
            self.mlp = nn.Sequential(init_linear(64, self.hidden_size, gain=math.sqrt(2)), nn.Tanh())
        num_params = int(np.prod(action_space.shape)) if isinstance(action_space, Box) else sum(choices(action_space))
        self.log_std = nn.Parameter(torch.full((num_params,), -0.5)) if isinstance(action_space, Box) else None
        self.actor = init_linear(self.hidden_size, num_params, gain=0.01)
        self.critic = init_linear(self.hidden_size, 1, gain=1.0)

    def initial_state(self, n: int) -> Tensor:
        return torch.zeros(n, 2, self.layers, self.hidden_size, device=self.critic.weight.device)

    def normalize_obs(self, obs: Tensor) -> Tensor:
        return self.obs_stats.normalize(obs).clamp(-10, 10)

    def extractor_parameters(self) -> list[nn.Parameter]:
        """The weights that the features depend on: encoder and LSTM."""
        return [weight for name, weight in self.named_parameters() if name.split(".")[0] in ("encoder", "lstm", "mlp")]

    def encode(self, obs: Tensor) -> Tensor:
        return self.encoder(self.normalize_obs(obs).index_select(-1, self.visible))

    def heads(self, features: Tensor, action_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        params = self.actor(features)  # [..., P]
        if self.log_std is not None:
            params = torch.cat((params, self.log_std.expand_as(params)), -1)
        elif action_mask is not None:
            params = params.masked_fill(~action_mask, torch.finfo(params.dtype).min)
        return params, self.critic(features).squeeze(-1)

    def step(self, obs: Tensor, state: Tensor, action_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """One step of N environments: obs [N, D], state [N, 2, layers, H] -> features [N, H], parameters [N, P],
        values [N], next state."""
        x = self.encode(obs)
        if not self.layers:
            x = self.mlp(x)
        else:
            cells = []  # (h, c) of each layer, [N, 2, H]
            for layer, weights in enumerate(self.lstm.all_weights):
                cell = torch.lstm_cell(x, (state[:, 0, layer], state[:, 1, layer]), *weights)
                cells.append(torch.stack(cell, 1))
                x = cell[0]
            state = torch.stack(cells, 2)
        return x, *self.heads(x, action_mask), state

    def unroll(
        self, obs: Tensor, state: Tensor, flush: Tensor | None = None, action_mask: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """R rows of L steps: obs [L, R, D], state [R, 2, layers, H] before their first step -> features [L, R, H],
        parameters [L, R, P], values [L, R]. A step that `flush` [L, R] marks leaves a state of zeros: one more input of
        the LSTM shuts its input and forget gates, which also keeps gradients out (detail 2)."""
        x = self.encode(obs)
        if not self.layers:
            x = self.mlp(x)
        else:
            h, c = state.permute(1, 2, 0, 3).contiguous().unsqueeze(2)  # each [layers, 1, R, H]
            for layer, (w_input, *weights) in enumerate(self.lstm.all_weights):
                if flush is not None:
                    x = torch.cat((x, flush[..., None].to(x.dtype)), -1)
                    w_input = torch.cat((w_input, self.flush), 1)
                x, _, _ = torch.lstm(x, (h[layer], c[layer]), [w_input, *weights], True, 1, 0.0, True, False, False)
        return x, *self.heads(x, action_mask)

    @torch.no_grad()
    def update_statistics(self, obs: Tensor, returns: Tensor) -> None:
        """Merges obs [M, D] and returns [M], and rescales the critic so that its denormalised values stay the same
        (detail 8; PopArt, eq. 9)."""
        mean, std = self.return_stats.mean.clone(), self.return_stats.std.clone()
        self.obs_stats.update(obs)
        self.return_stats.update(returns)
        self.critic.weight.mul_(std / self.return_stats.std)
        self.critic.bias.copy_((std * self.critic.bias + mean - self.return_stats.mean) / self.return_stats.std)


def choices(space: gym.Space) -> list[int]:
    """Numbers of choices of a discrete action: [n], or one for each entry of a MultiDiscrete."""
    return [int(space.n)] if isinstance(space, Discrete) else [int(n) for n in space.nvec.flat]


def sample(params: Tensor, space: gym.Space, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Actions [N, A] and their log-probabilities [N]; without a generator, the most likely actions."""
    if isinstance(space, Box):
        mean, log_std = params.chunk(2, -1)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device) if generator else 0
        action = mean + log_std.exp() * noise
        return action, gaussian_logprob(action, mean, log_std)
    actions, logprob = [], 0
    for logits in params.split(choices(space), -1):
        logprobs = logits.log_softmax(-1)
        exponential = torch.empty_like(logits).exponential_(generator=generator) if generator else torch.ones(())
        gumbel = -(exponential + 1e-20).log()  # the maximum of logits + Gumbel noise is a sample of their softmax
        actions.append((logprobs + gumbel).argmax(-1, keepdim=True))
        logprob = logprob + logprobs.gather(-1, actions[-1]).squeeze(-1)
    return torch.cat(actions, -1), logprob


def gaussian_logprob(action: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    return (-0.5 * ((action - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def logprob_entropy(params: Tensor, action: Tensor, space: gym.Space) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [...] for params [..., P], actions [..., A]. A Box action is the Gaussian sample
    before it is scaled and clipped to the bounds: clipping is part of the environment."""
    if isinstance(space, Box):
        mean, log_std = params.chunk(2, -1)
        return gaussian_logprob(action, mean, log_std), (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)
    logprob, entropy = 0, 0
    for i, logits in enumerate(params.split(choices(space), -1)):
        logprobs = logits.log_softmax(-1)
        logprob = logprob + logprobs.gather(-1, action[..., i : i + 1]).squeeze(-1)
        entropy = entropy - (logprobs.exp() * logprobs).sum(-1)
    return logprob, entropy


# --- rollout and segments


class Rollout:
    """T steps of N environments. Row t of every array [T, N, ...] belongs to step t: what the agent saw and its state
    *before* the step, what it did, and what came back."""

    def __init__(
        self, args: Args, agent: Agent, obs_size: int, action_space: gym.Space, masked: bool, device: torch.device
    ):
        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(args.num_steps, args.num_envs, *shape, dtype=dtype, device=device)

        discrete = not isinstance(action_space, Box)
        self.obs = empty(obs_size)
        self.start = empty(dtype=torch.bool)  # obs is the first of its episode
        self.state = empty(2, agent.layers, agent.hidden_size)
        self.action_mask = empty(sum(choices(action_space)), dtype=torch.bool) if masked else None
        self.action = empty(int(np.prod(action_space.shape)), dtype=torch.int64 if discrete else torch.float32)
        self.logprob = empty()
        self.value = empty()  # in units of reward
        self.reward = empty()
        self.terminated = empty(dtype=torch.bool)
        self.truncated = empty(dtype=torch.bool)
        self.next_obs = empty(obs_size)  # the true next observation, the last one of an episode included
        self.advantages, self.returns = empty(), empty()

    @property
    def done(self) -> Tensor:
        return self.terminated | self.truncated


@dataclass
class Carry:
    """Where the environments stand between two rollouts."""

    obs: Tensor  # [N, D]
    start: Tensor  # [N] bool
    state: Tensor  # [N, 2, layers, H]
    action_mask: Tensor | None  # [N, P] bool
    returns: np.ndarray  # [N] of the running episodes
    lengths: np.ndarray  # [N]


def finite(x: np.ndarray, what: str) -> np.ndarray:
    if not np.isfinite(x).all():
        raise FloatingPointError(f"an environment returned a non-finite {what}: {x}")
    return x


def observe(envs: VectorEnv, obs, infos: dict, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Observations [N, D] and the action mask [N, P] of `infos["action_mask"]`, if the environment gives one."""
    flat = torch.from_numpy(finite(flatten(envs.single_observation_space, obs), "observation")).to(device)
    if "action_mask" not in infos:
        return flat, None
    action_mask = torch.from_numpy(np.asarray(infos["action_mask"])).bool().to(device)  # [N, P]
    allowed = [part.any(-1) for part in action_mask.split(choices(envs.single_action_space), -1)]
    if not torch.stack(allowed).all():
        raise ValueError(f"environment {(~torch.stack(allowed).all(0)).nonzero()[0, 0]} allows no action at all")
    return flat, action_mask


def final_observation(envs: VectorEnv, infos: dict, n: int, device: torch.device) -> Tensor:
    flat = gym.spaces.flatten(envs.single_observation_space, infos["final_obs"][n]).astype(np.float32)  # [D]
    return torch.from_numpy(finite(flat, "final observation")).to(device)


def reset(envs: VectorEnv, agent: Agent, seed: int) -> Carry:
    obs, infos = envs.reset(seed=seed)
    state, n = agent.initial_state(envs.num_envs), envs.num_envs
    obs, action_mask = observe(envs, obs, infos, state.device)
    start = torch.ones(n, dtype=torch.bool, device=state.device)
    return Carry(obs, start, state, action_mask, np.zeros(n), np.zeros(n, int))


@torch.inference_mode()
def collect(envs: VectorEnv, agent: Agent, rollout: Rollout, carry: Carry, generator: torch.Generator) -> list:
    """Fills the rollout, moves `carry` on, and gives (return, length) of each episode that ended on the way."""
    space, device, episodes = envs.single_action_space, carry.obs.device, []
    for t in range(len(rollout.obs)):
        _, params, value, state = agent.step(carry.obs, carry.state, carry.action_mask)
        action, logprob = sample(params, space, generator)
        rollout.obs[t], rollout.start[t], rollout.state[t] = carry.obs, carry.start, carry.state
        rollout.action[t], rollout.logprob[t], rollout.value[t] = action, logprob, value
        if rollout.action_mask is not None:
            rollout.action_mask[t] = carry.action_mask

        try:
            obs, reward, terminated, truncated, infos = envs.step(env_action(action, space))
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            if not isinstance(envs, AsyncVectorEnv):
                raise
            for process in envs.processes:  # Gymnasium's close would wait for the dead one
                process.terminate()
            envs.closed = True
            raise RuntimeError("the process of an environment died") from error
        carry.obs, carry.action_mask = observe(envs, obs, infos, device)
        rollout.reward[t], rollout.next_obs[t] = torch.from_numpy(finite(reward, "reward")), carry.obs
        rollout.terminated[t], rollout.truncated[t] = torch.from_numpy(terminated), torch.from_numpy(truncated)
        carry.state, carry.start = state, rollout.terminated[t] | rollout.truncated[t]
        carry.returns += reward
        carry.lengths += 1
        for n in np.flatnonzero(terminated | truncated):
            rollout.next_obs[t, n] = final_observation(envs, infos, n, device)
            episodes.append((float(carry.returns[n]), int(carry.lengths[n])))
            carry.state[n], carry.returns[n], carry.lengths[n] = 0, 0, 0
    rollout.value.copy_(agent.return_stats.denormalize(rollout.value))
    return episodes


@torch.no_grad()
def next_values(agent: Agent, rollout: Rollout, carry: Carry) -> Tensor:
    """V of the observation after each step [T, N]: the next row's value or, where the episode was truncated, that of
    its final observation under the state that the stored one leads to (detail 5)."""
    _, _, last, _ = agent.step(carry.obs, carry.state)
    values = torch.cat((rollout.value[1:], agent.return_stats.denormalize(last)[None]))  # [T, N]
    cut = rollout.truncated.nonzero(as_tuple=True)
    if len(cut[0]):
        *_, state = agent.step(rollout.obs[cut], rollout.state[cut])
        _, _, final, _ = agent.step(rollout.next_obs[cut], state)
        values[cut] = agent.return_stats.denormalize(final)
    return values


class Segments(NamedTuple):
    """S runs of consecutive steps of one environment within one episode."""

    t: Tensor  # [S] first step
    n: Tensor  # [S] environment
    length: Tensor  # [S]
    fresh: Tensor  # [S] bool: at its episode's start, so that its first state is zero


def cut_segments(start: Tensor, bptt_length: int) -> Segments:
    """Cuts a rollout at its first row, at episode starts (`start` [T, N] bool) and every `bptt_length` steps within an
    episode (0 = never) (detail 1)."""
    num_steps, num_envs = start.shape
    time = torch.arange(num_steps, device=start.device)[:, None]  # [T, 1]
    cut = start | (time == 0)
    if bptt_length:
        age = time - torch.where(cut, time, 0).cummax(0).values  # [T, N] steps since the last cut
        cut = age % bptt_length == 0
    n, t = cut.T.nonzero(as_tuple=True)  # one environment after the other, time ascending
    length = torch.diff(n * num_steps + t, append=n.new_tensor([num_envs * num_steps]))
    return Segments(t, n, length, start[t, n])


class Rows(NamedTuple):
    """Segments laid into R rows of L steps, to go through the LSTM together. A row starts with a segment's first step;
    another segment may follow behind a flush step if its first state is zero."""

    index: Tensor  # [L, R] into a flattened [T * N] rollout
    mask: Tensor  # [L, R] real steps; the others are padding
    flush: Tensor  # [L, R] padding that separates two segments


def lay_rows(segments: Segments, num_envs: int) -> Rows:
    """Longest first, each behind the row that ends soonest, if it fits there: hardly any padding (detail 2)."""
    length, fresh = segments.length.tolist(), segments.fresh.tolist()
    longest = max(length)
    ends: list[tuple[int, int]] = []  # heap of (steps in the row, row)
    place = [(0, 0)] * len(length)  # (row, step within it) of each segment
    for i in sorted(range(len(length)), key=lambda i: (fresh[i], -length[i])):
        row, step = len(ends), 0
        if fresh[i] and ends and ends[0][0] + 1 + length[i] <= longest:
            end, row = heapq.heappop(ends)
            step = end + 1
        heapq.heappush(ends, (step + length[i], row))
        place[i] = row, step
    row, step = torch.tensor(place, device=segments.t.device).T  # each [S]
    shape = max(end for end, _ in ends), len(ends)
    index, mask, flush = (step.new_zeros(shape, dtype=dtype) for dtype in (torch.int64, torch.bool, torch.bool))
    flush[step[step > 0] - 1, row[step > 0]] = True
    first = torch.cumsum(segments.length, 0) - segments.length  # [S] of each segment's steps in a list of all
    offset = torch.arange(int(segments.length.sum()), device=row.device) - first.repeat_interleave(segments.length)
    t, n, row, step = (x.repeat_interleave(segments.length) for x in (segments.t, segments.n, row, step))  # [M]
    index[step + offset, row] = (t + offset) * num_envs + n
    mask[step + offset, row] = True
    return Rows(index, mask, flush)


def minibatches(segments: Segments, num_minibatches: int, num_envs: int, generator: torch.Generator) -> Iterator[Rows]:
    """Shuffles the segments and deals them out."""
    order = torch.randperm(len(segments.t), generator=generator, device=generator.device)
    for chosen in order.tensor_split(num_minibatches):
        yield lay_rows(Segments(*(x[chosen] for x in segments)), num_envs)


@torch.no_grad()
def refresh_states(agent: Agent, rollout: Rollout) -> None:
    """Recomputes the stored states with the current weights, from the first row on (detail 9)."""
    state = rollout.state[0]
    for t in range(len(rollout.obs)):
        rollout.state[t] = state.masked_fill(rollout.start[t, :, None, None, None], 0) if t else state
        *_, state = agent.step(rollout.obs[t], rollout.state[t])


# --- loss


def ppo_loss(
    agent: Agent, rollout: Rollout, rows: Rows, space: gym.Space, args: Args, num_steps: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped loss (eq. 7, 9) of a minibatch, and metrics: sums over its real steps divided by `num_steps`, the
    real steps of an average minibatch, so that every step of the rollout weighs the same (detail 3)."""
    real = rows.index[rows.mask]  # [M]

    def take(x: Tensor, index: Tensor = real) -> Tensor:
        return x.flatten(0, 1)[index]

    action_mask = None if rollout.action_mask is None else take(rollout.action_mask, rows.index)
    first_states = take(rollout.state, rows.index[0])  # [R, 2, layers, H]
    _, params, values = agent.unroll(take(rollout.obs, rows.index), first_states, rows.flush, action_mask)
    value = values[rows.mask]  # [M] normalised, as are the targets
    logprob, entropy = logprob_entropy(params[rows.mask], take(rollout.action), space)
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


# --- predictor


class Predictor(nn.Module):
    """Features [B, F] and the current normalised observation [B, D] -> the next `horizon` normalised observations
    [B, horizon, D], in one shot. An MLP gives the change from now at knots 1, 2, 3, 4, 6, 8, 11, … steps ahead, with
    straight lines between them: sharp soon, coarse later. It starts at zero, with the forecast that nothing changes."""

    def __init__(self, feature_size: int, obs_size: int, horizon: int):
        super().__init__()
        self.horizon, self.obs_size = horizon, obs_size
        doublings = math.ceil(math.log2(horizon))
        knots = sorted({min(horizon, round(2 ** (i / 2))) for i in range(2 * doublings + 1)})
        hats = [np.interp(np.arange(1, horizon + 1), knots, row) for row in np.eye(len(knots))]
        self.register_buffer("basis", torch.tensor(np.array(hats), dtype=torch.float32), persistent=False)  # [K, H]
        self.hidden = nn.Linear(feature_size + obs_size, 256)
        self.head = nn.Linear(256, obs_size * len(knots))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.recent_error = RunningMeanStd((), memory=50)  # of `drift`

    def forward(self, features: Tensor, obs: Tensor) -> Tensor:
        changes = self.head(self.hidden(torch.cat((features, obs), -1)).relu())
        changes = changes.unflatten(-1, (self.obs_size, -1)) @ self.basis  # [B, D, H]
        return obs.unsqueeze(-2) + changes.transpose(-1, -2)


def future(history: deque[Rollout], index: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
    """The observations [B, H, D] that followed steps `index` [B] of the oldest rollout, flattened [T * N], and a mask
    [B, H]: false beyond the end of the step's episode. The rollouts in `history` follow each other in time."""
    next_obs = torch.cat([rollout.next_obs for rollout in history])  # [R, N, D]
    done = torch.cat([rollout.done for rollout in history])  # [R, N]
    num_envs = done.shape[1]
    t = (index // num_envs)[:, None] + torch.arange(horizon, device=index.device)  # [B, H]
    n = (index % num_envs)[:, None]
    ended = done[t, n].int().cumsum(1) - done[t, n].int()  # [B, H] episode ends before row t
    return next_obs[t, n], ended == 0


def predictor_loss(
    agent: Agent, predictor: Predictor, history: deque[Rollout], args: Args, generator: torch.Generator
) -> Tensor:
    """Mean squared error of forecasts from about `predictor_samples` steps of the oldest rollout, whose features are
    recomputed: from single steps without gradients if the extractor is frozen, else from whole segments with them."""
    rollout, samples = history[0], predictor_samples(args)
    obs, state = rollout.obs.flatten(0, 1), rollout.state.flatten(0, 1)  # [T * N, ...]
    if args.freeze_extractor:
        real = torch.randperm(len(obs), generator=generator, device=obs.device)[:samples]  # [B]
        with torch.no_grad():
            features, *_ = agent.step(obs[real], state[real])  # [B, F]
    else:
        segments = cut_segments(rollout.start, args.bptt_length)
        rows = next(minibatches(segments, math.ceil(len(obs) / samples), args.num_envs, generator))
        real = rows.index[rows.mask]
        features = agent.unroll(obs[rows.index], state[rows.index[0]], rows.flush)[0][rows.mask]
    target, mask = future(history, real, args.horizon)  # [B, H, D], [B, H]
    forecast = predictor(features, agent.normalize_obs(obs[real]))
    error = (forecast - agent.normalize_obs(target)).square().mean(-1)  # [B, H]
    return (error * mask).sum() / all_sum(mask.sum().float())


@torch.no_grad()
def drift(agent: Agent, predictor: Predictor, rollout: Rollout) -> float:
    """How unusual the one-step forecasts of a fresh rollout are: the z-score, among the last 50, of the logarithm of
    their squared error. A change in the environment's dynamics raises it."""
    obs, state, after = (x[::8].flatten(0, 1) for x in (rollout.obs, rollout.state, rollout.next_obs))
    forecast = predictor(agent.step(obs, state)[0], agent.normalize_obs(obs))[:, 0]
    log_error = ((forecast - agent.normalize_obs(after)).square().mean() + 1e-8).log()
    z = float(predictor.recent_error.normalize(log_error)) if predictor.recent_error.count >= 10 else 0.0
    predictor.recent_error.update(log_error[None])
    return z


@torch.no_grad()
def replay(agent: Agent, episode: Tensor) -> tuple[Tensor, Tensor]:
    """A whole episode of raw observations [length + 1, D] -> normalised ones, and the features [length, F] before each
    step."""
    features, *_ = agent.unroll(episode[:-1, None], agent.initial_state(1))
    return agent.normalize_obs(episode), features[:, 0]


@torch.no_grad()
def forecast_skill(
    agent: Agent, predictor: Predictor, episodes: list[Tensor], moments: int = 64
) -> tuple[Tensor, Tensor]:
    """Forecasts from up to `moments` steps of each episode [length + 1, D] against what came. By steps ahead [H]: the
    root mean squared error in standard deviations of the observations, and the skill, 1 − MSE / MSE of the best trivial
    forecast: nothing changes, the last change goes on, or the running mean. 1 is perfect; NaN means no data."""
    count, errors = 0, 0  # [H], [4, H]
    for episode in episodes:
        obs, features = replay(agent, episode)
        length = len(features)
        t = torch.linspace(0, length - 1, min(moments, length), device=obs.device).long()  # [B]
        ahead = torch.arange(1, predictor.horizon + 1, device=obs.device)  # [H]
        mask = t[:, None] + ahead <= length  # [B, H]
        target = obs[(t[:, None] + ahead).clamp(max=length)]  # [B, H, D]
        now = obs[t, None].expand_as(target)
        change = (obs[t] - obs[(t - 1).clamp(min=0)])[:, None] * ahead[:, None]  # [B, H, D]
        forecasts = predictor(features[t], obs[t]), now, now + change, torch.zeros_like(now)
        count = count + mask.sum(0)
        errors = errors + torch.stack([((f - target).square().mean(-1) * mask).sum(0) for f in forecasts])
    return (errors[0] / count).sqrt(), 1 - errors[0] / errors[1:].min(0).values


def forecast_figure(agent: Agent, predictor: Predictor, episode: Tensor, names: list[str], skill: Tensor):
    """A matplotlib figure: up to four entries of an episode with forecasts from four moments, and skill over steps."""
    from matplotlib.figure import Figure

    obs, features = replay(agent, episode)
    t = torch.arange(0, len(features), max(1, len(features) // 4))[:4]
    with torch.no_grad():
        forecasts = predictor(features[t], obs[t])  # [4, H, D]
    figure = Figure(figsize=(10, 10), layout="constrained")
    *axes, bottom = figure.subplots(min(4, len(names)) + 1)
    for i, axis in enumerate(axes):
        axis.plot(obs[:, i].cpu(), color="black", label="actual")
        for start, forecast in zip(t.tolist(), forecasts.cpu(), strict=True):
            ahead = range(start + 1, min(start + 1 + predictor.horizon, len(obs)))
            axis.plot(ahead, forecast[: len(ahead), i], label=f"forecast at step {start}")
        axis.set_ylabel(f"{names[i]} (std)")
    axes[0].legend(fontsize="small", ncols=5)
    axes[-1].set_xlabel("step of the episode")
    bottom.plot(range(1, predictor.horizon + 1), skill.cpu())
    bottom.axhline(0, color="black", linewidth=0.5)
    bottom.set(xlabel="steps ahead", ylabel="skill", ylim=(-1, 1))
    return figure


# --- evaluate

LONGEST = 27_000  # steps after which an evaluation does not wait for the end of an episode any more


class Evaluation(NamedTuple):
    returns: np.ndarray  # [E] in the order in which the episodes ended
    lengths: np.ndarray  # [E]
    successes: list[bool]  # of the episodes whose environment says `is_success` at their end
    episodes: list[Tensor]  # raw observations [length + 1, D], if recorded


@torch.no_grad()
def evaluate(
    agent: Agent, args: Args, policy: str = "agent", record: bool = False, video_dir: Path | None = None
) -> Evaluation:
    """Plays `eval_episodes` episodes, as many on each environment (a fixed time would favour short ones). Policies are
    `agent`, `random`, and `memoryless`: the agent with its state zeroed before every step."""
    num_envs, seed = min(args.eval_episodes, args.num_envs), args.seed + 1_000_000_000
    envs = make_envs(args, num_envs, video_dir)
    envs.action_space.seed(seed)
    space, carry = envs.single_action_space, reset(envs, agent, seed)
    generator = torch.Generator(carry.obs.device).manual_seed(seed)
    left = np.array([len(range(n, args.eval_episodes, num_envs)) for n in range(num_envs)])  # episodes to play
    seen, ended, successes, episodes = [[obs] for obs in carry.obs], [], [], []
    while left.any():
        state = torch.zeros_like(carry.state) if policy == "memoryless" else carry.state
        _, params, _, carry.state = agent.step(carry.obs, state, carry.action_mask)
        if policy == "random" and carry.action_mask is None:
            action = envs.action_space.sample()
        elif policy == "random":  # uniform over what is allowed
            action = env_action(sample(carry.action_mask.float().log(), space, generator)[0], space)
        else:
            action = env_action(sample(params, space, None if args.eval_deterministic else generator)[0], space)
        obs, reward, terminated, truncated, infos = envs.step(action)
        carry.obs, carry.action_mask = observe(envs, obs, infos, carry.obs.device)
        carry.returns += reward
        carry.lengths += 1
        for n in range(num_envs) if record else ():
            seen[n].append(carry.obs[n])
        for n in np.flatnonzero((terminated | truncated) & (left > 0)):
            left[n] -= 1
            ended.append((carry.returns[n], carry.lengths[n]))
            carry.state[n], carry.returns[n], carry.lengths[n] = 0, 0, 0
            if "is_success" in infos["final_info"]:
                successes.append(bool(infos["final_info"]["is_success"][n]))
            if record:
                seen[n][-1] = final_observation(envs, infos, n, carry.obs.device)
                episodes.append(torch.stack(seen[n]))
                seen[n] = [carry.obs[n]]
        if (carry.lengths[left > 0] >= LONGEST).any():
            warnings.warn(f"an episode that does not end within {LONGEST} steps counts as it stands", stacklevel=1)
            ended += zip(carry.returns[left > 0], carry.lengths[left > 0], strict=True)
            episodes += [torch.stack(seen[n]) for n in np.flatnonzero(left) if record]
            break
    envs.close()
    returns, lengths = np.array(ended).T
    return Evaluation(returns, lengths, successes, episodes)


# --- save, load


@dataclass
class Progress:
    """Counters of a run, saved with it."""

    global_step: int = 0
    update: int = 0
    best: float = -math.inf  # mean return of the best evaluation
    recent: list[float] = field(default_factory=list)  # returns of the last 100 training episodes
    random: float = math.nan  # mean return of random actions
    before: float = math.nan  # mean return of the untrained agent


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
        raise InputError(f"{path} is not a checkpoint: {str(error).splitlines()[0]}") from error
    if unknown := set(saved) ^ {item.name for item in fields(Args)}:
        raise InputError(f"{path} is a checkpoint of another script, with or without {', '.join(sorted(unknown))}")
    same = ["env_id", "env_kwargs", "visible", "recurrent", "lstm_hidden", "lstm_layers", "horizon", "freeze_extractor"]
    for name in same if args else ():
        if saved[name] != getattr(args, name):
            raise InputError(f"{path} has {name} {saved[name]}, not {getattr(args, name)}")
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


def transfer(parts: dict, state: dict) -> None:
    """Takes those weights of a checkpoint whose names and shapes fit, and names the others; running statistics are
    taken as a whole or not at all."""
    for part in ("agent", "predictor"):
        own = parts[part].state_dict()
        fitting = {name: x for name, x in state[part].items() if name in own and own[name].shape == x.shape}
        torn = {name.rpartition(".")[0] for name in own.keys() - fitting.keys()}
        fitting = {name: x for name, x in fitting.items() if "stats" not in name or name.rpartition(".")[0] not in torn}
        parts[part].load_state_dict(own | fitting)
        for name in own.keys() - fitting.keys():
            print(f"not taken from the checkpoint: {part} {name}", file=sys.stderr)


def assess(agent: Agent, predictor: Predictor, args: Args, run_dir: Path, names: list[str]) -> dict[str, float]:
    """Evaluates the policy, with and without memory, and the forecasts; draws `forecast.png` in the run folder."""
    played = evaluate(agent, args, record=args.predictor, video_dir=run_dir / "videos" if args.capture_video else None)
    scores = {
        "eval/episodic_return": played.returns.mean(),
        "eval/episodic_return_std": played.returns.std(),
        "eval/episodic_length": played.lengths.mean(),
        "eval/return_memoryless": evaluate(agent, args, "memoryless").returns.mean(),
    }
    if played.successes:
        scores["eval/success_rate"] = np.mean(played.successes)
    if args.predictor:
        rmse, skill = forecast_skill(agent, predictor, played.episodes)
        for k in sorted({k for k in (1, 10, 50, args.horizon) if k <= args.horizon}):
            scores |= {f"predictor/rmse_k{k}": rmse[k - 1], f"predictor/skill_k{k}": skill[k - 1]}
        longest = max(played.episodes, key=len)
        forecast_figure(agent, predictor, longest, names, skill).savefig(run_dir / "forecast.png", dpi=100)
    return {name: float(score) for name, score in scores.items()}


def summary(scores: dict[str, float], progress: Progress, args: Args, run_dir: Path) -> dict:
    """The closing JSON object; None where there is no number."""
    numbers = {
        "sps": scores.get("charts/SPS", math.nan),
        "train_return_mean": float(np.mean(progress.recent or [math.nan])),
        "eval_return_mean": scores["eval/episodic_return"],
        "eval_return_std": scores["eval/episodic_return_std"],
        "eval_return_memoryless": scores["eval/return_memoryless"],
        "random_return_mean": progress.random,
        "before_return_mean": progress.before,
    }
    extra = ("predictor/", "eval/success_rate")
    numbers |= {name.replace("/", "_"): score for name, score in scores.items() if name.startswith(extra)}
    known = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
    return {"run_dir": str(run_dir), "global_step": progress.global_step, "eval_episodes": args.eval_episodes} | known


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
    shutil.copytree(Path(__file__).parent / "common", run_dir / "common", ignore=shutil.ignore_patterns("__pycache__"))
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
    envs = make_envs(args, args.num_envs)
    space, names = envs.single_action_space, entry_names(envs.single_observation_space)
    torch.manual_seed(args.seed)  # initial weights; whatever is random later draws from one of two generators
    agent = Agent(len(names), space, args).to(device)
    predictor = Predictor(agent.hidden_size, len(names), args.horizon).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5, fused=True)
    predictor_optimizer = torch.optim.Adam(predictor.parameters(), args.predictor_learning_rate, fused=True)
    forecasting = list(predictor.parameters())  # weights that the forecast trains
    if not args.freeze_extractor:
        forecasting += agent.extractor_parameters()
        lr = args.predictor_learning_rate * args.predictor_loss_weight
        predictor_optimizer.add_param_group({"params": agent.extractor_parameters(), "lr": lr})
    initial_lrs = [group["lr"] for group in optimizer.param_groups + predictor_optimizer.param_groups]
    rng, predictor_rng = (torch.Generator(device).manual_seed(args.seed + rank) for _ in range(2))
    parts = {"agent": agent, "optimizer": optimizer, "rng": rng}
    parts |= {"predictor": predictor, "predictor_optimizer": predictor_optimizer, "rng_predictor": predictor_rng}
    progress = Progress()
    if args.evaluate or args.resume:
        progress = restore(parts, load(args.evaluate or f"{args.resume}/checkpoint.pt", args))
        if rank > 0:  # the checkpoint holds the generators of rank 0
            rng.manual_seed(args.seed + rank + progress.global_step)
            predictor_rng.manual_seed(args.seed + rank + progress.global_step)
    if args.evaluate:
        envs.close()
        run_dir = Path(args.evaluate).parent
        return {} if rank > 0 else summary(assess(agent, predictor, args, run_dir, names), progress, args, run_dir)
    if progress.global_step >= args.total_timesteps:
        raise InputError(f"{args.resume} has its {progress.global_step} steps: --total-timesteps says how far to go")
    if args.init_from:
        transfer(parts, load(args.init_from))
    if rank == 0 and not args.resume:
        progress.random = float(evaluate(agent, args, "random").returns.mean())
        progress.before = float(evaluate(agent, args).returns.mean())
    run_dir, writer = open_run(args, progress) if rank == 0 else (None, None)
    bar = progress_bar(args, progress, rank)
    history = deque(maxlen=history_length(args))  # the last rollouts
    steps_per_update, steps_done, seconds, stop = world * args.num_envs * args.num_steps, 0, 0.0, False
    try:
        carry = reset(envs, agent, args.seed + rank * args.num_envs + 1000 * progress.update)
        while progress.global_step < args.total_timesteps and not stop:
            # --- rollout, advantages
            started = time.perf_counter()
            remaining = 1 - progress.global_step / args.total_timesteps if args.anneal_lr else 1.0
            groups = optimizer.param_groups + predictor_optimizer.param_groups
            for group, initial_lr in zip(groups, initial_lrs, strict=True):
                group["lr"] = initial_lr * remaining
            rollout = Rollout(args, agent, len(names), space, carry.action_mask is not None, device)
            episodes = collect(envs, agent, rollout, carry, rng)
            history.append(rollout)
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
                for rows in minibatches(segments, args.num_minibatches, args.num_envs, rng):
                    loss, metrics = ppo_loss(agent, rollout, rows, space, args, batch_size)
                    optimizer.zero_grad()
                    loss.backward()
                    metrics["grad_norm"] = sum_and_clip(list(agent.parameters()), args.max_grad_norm) / world
                    optimizer.step()
                    log.append(metrics)
                if args.target_kl and mean_metrics(log[-args.num_minibatches :])["approx_kl"] > args.target_kl:
                    break
            scalars = {f"losses/{name}": mean for name, mean in mean_metrics(log).items()}

            # --- predictor, as soon as the oldest rollout's future is known
            if args.predictor and len(history) == history.maxlen:
                scalars["predictor/drift"] = drift(agent, predictor, rollout)
                for _ in range(args.update_epochs):
                    loss = predictor_loss(agent, predictor, history, args, predictor_rng)
                    predictor_optimizer.zero_grad()
                    loss.backward()
                    sum_and_clip(forecasting, args.max_grad_norm)
                    predictor_optimizer.step()
                scalars["predictor/loss"] = float(all_sum(loss.detach()))

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
                scalars["losses/first_ratio_error"] = error = float(log[0]["ratio_error"])
                if error > 1e-3:
                    warnings.warn("rollout and update compute different log-probabilities", stacklevel=1)
            scalars["losses/explained_variance"] = 1 - float((returns - rollout.value).var() / returns.var())
            scalars["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            scalars["charts/SPS"] = steps_done / seconds
            recent = np.mean(progress.recent or [math.nan])
            bar.set_postfix_str(f"{scalars['charts/SPS']:.0f} steps/s, return {recent:.1f}", refresh=False)
            bar.update(steps_per_update)
            due = args.checkpoint_every and progress.update % args.checkpoint_every == 0
            due = due or progress.global_step >= args.total_timesteps
            if stop or due:
                save(run_dir / "checkpoint.pt", parts, progress, args)
            if due and not stop:
                scalars |= assess(agent, predictor, args, run_dir, names)
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
        before, now = result["before_return_mean"], result["eval_return_mean"]
        with make_env(args) as env:
            solved = env.spec.reward_threshold
        print(
            f"random policy {result['random_return_mean']:.0f} | before {before:.0f} | now {now:.0f} | solved {solved}"
        )
        print(f"watch: tensorboard --logdir {args.runs_dir}")
        print(f"evaluate: python {sys.argv[0]} --evaluate {result['run_dir']}/checkpoint.pt")
        print(json.dumps(result))


if __name__ == "__main__":
    main()
