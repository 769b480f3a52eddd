"""A2C with a world model: vision, memory, and a controller that looks ahead in what it has learnt.

The data goes one way, and each arrow has its function below:

    observation ── Vision ──▶ latent z                               of an image, in codes
    (z, action before) ── Memory.step ──▶ h                          a transformer with a KV cache, no gradients
    (z, h) ── control, plan ──▶ behaviour                            the policy, steered by what the model imagines
    environments ── play ──▶ steps ── collect ──▶ Rollout [R, N]     with the rows before it that the memory sees
    Rollout ── gae ──▶ advantages, returns [T, N]                    truncation bootstraps, termination does not
    minibatch ── Agent.unroll ── a2c_loss ── descend ──▶ weights     of all parts; whole sequences in one pass
    last Rollouts ── look, memory_loss ── descend ──▶ model          alone, on what memory makes of them by now
    Rollout ── Agent.update ──▶ statistics, codes                    then `play` computes the cache once more

Letters in shapes: T steps, N environments, R rows of a rollout (T and those before it), A entries of an action, E of an
encoded one (one-hot if discrete), P parameters of the policy's distribution, Z of a latent, W of the memory, K
candidate actions, B or M samples, [B, L] sequences. World models: Ha & Schmidhuber 2018, arXiv 1803.10122; A2C with
clipped ratios: Schulman et al. 2017, arXiv 1707.06347. `detail 5`: docs/worldmodel_a2c.md.
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
import torch.nn.functional as F
import tyro
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.gae import gae
from common.obs import entry_names, flatten

HERMITE = [torch.tensor(x, dtype=torch.float32) for x in np.polynomial.hermite_e.hermegauss(16)]  # points, weights


@dataclass
class Args:  # the comments are what --help says
    exp_name: str = Path(__file__).stem  # RUN: name of the experiment, part of the run folder's name
    seed: int = 1  # of environments, networks and sampling; the same seed gives the same run on one machine
    cuda: bool = True  # use a CUDA device if there is one
    torch_threads: int = 1  # threads of torch on the CPU
    runs_dir: str = "runs"  # folder that holds the run folders
    checkpoint_every: int = 50  # updates between checkpoints, each with an evaluation; 0 = only at the end
    resume: str | None = None  # a run folder to continue, with its arguments unless others are given
    init_from: str | None = None  # a checkpoint whose networks to start from; for --stage, that of the stage before
    evaluate: str | None = None  # a checkpoint to evaluate, with its arguments unless others are given; no training
    eval_episodes: int = 20  # episodes of each evaluation, on seeds that are not trained on
    capture_video: bool = False  # record the evaluations' first environment to `videos/` in the run folder
    env_id: str = "CartPole-v1"  # ENVIRONMENT: any Gymnasium id, also `module:Name-v0`, which imports the module
    env_kwargs: str = "{}"  # keyword arguments of `gymnasium.make`, as JSON
    vectorization: Literal["sync", "async"] = "sync"  # environments in turn, or (slow ones) each in its own process
    total_timesteps: int = 100_000  # A2C: environment steps to train for, over all environments and processes
    learning_rate: float = 1e-3  # Adam's step size
    num_envs: int = 16  # environments of each process
    num_steps: int = 32  # steps of each environment per rollout
    anneal_lr: bool = True  # lower the learning rate linearly to 0
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    num_minibatches: int = 4  # minibatches per pass; at most num_envs
    update_epochs: int = 4  # passes over each rollout; with one, one minibatch and no planning, the gradient is A2C's
    norm_adv: bool = True  # normalise the advantages of each rollout
    clip_coef: float = 0.2  # clip range of the probability ratio
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss; values are in units of the returns' standard deviation
    max_grad_norm: float = 0.5  # largest norm of the gradient
    target_kl: float | None = None  # stop an update after a pass whose mean approximate KL exceeds this; None = never
    stage: Literal["vision", "memory", "all"] = "all"  # WORLD MODEL: what learns; each takes the checkpoint before it
    quantize: bool = True  # latents of images are codes; those of vectors never are
    vision_coef: float = 1.0  # weight of the reconstruction and commitment losses
    memory_width: int = 128  # size of the transformer's tokens
    memory_layers: int = 2  # transformer blocks
    context: int = 16  # steps that a block looks back, its own included; all of them see layers x (context - 1) back
    memory_coef: float = 1.0  # weight of the losses of the next latent, the reward and the episode's going on
    planning: bool = True  # PLANNING: let plans steer the policy while it trains, as far as they prove right
    planning_horizon: int = 8  # steps to imagine, at the end of which the value stands for the rest
    planning_hold: int = 3  # steps for which a candidate action is held, before the policy goes on
    planning_samples: int = 32  # actions to try where they are continuous; of discrete ones, all are tried
    planning_beta: float = 5.0  # factor of Q in the logits, times the slope of a fit of what came to what was planned
    model_steps: int = 256  # steps of the model alone after each update, with planning, on the last 100 rollouts
    distill_coef: float = 1.0  # weight of drawing the policy towards plans, times what they add to logits (at most 1)


class InputError(Exception):
    """The user asked for something that cannot be done; the message is one line."""


def check(args: Args) -> gym.Env:
    """A closed environment, to ask for its spaces; InputError for what can be known to fail before any work."""
    may_be_0 = ["seed", "checkpoint_every", "gamma", "gae_lambda", "clip_coef", "ent_coef", "vf_coef", "vision_coef"]
    may_be_0 += ["memory_coef", "planning_beta", "model_steps", "distill_coef"]
    at_most = {"gamma": 1, "gae_lambda": 1, "num_minibatches": args.num_envs, "seed": 10**9, "total_timesteps": 10**12}
    for name, x in vars(args).items():
        least, most = "0 or more" if name in may_be_0 else "above 0", at_most.get(name, 10**5)
        if type(x) in (int, float) and not (0 < x <= most or (x == 0 and name in may_be_0)):
            raise InputError(f"--{name.replace('_', '-')} must be {least} and at most {most}, not {x}")
    try:
        with tempfile.TemporaryDirectory() as tmp, make_env(args, f"{tmp}/v" if args.capture_video else None) as env:
            shape, space = obs_shape(env.observation_space), env.action_space
            assert isinstance(space, (Box, Discrete, MultiDiscrete)), f"no support for {space}"
            assert not (args.planning and isinstance(space, MultiDiscrete)), f"{space} needs --no-planning"
            assert args.memory_width % 8 == 0, "--memory-width must be a multiple of 8"
            trained = args.stage != "memory" or args.init_from or args.resume or args.evaluate
            assert trained, "--stage memory needs --init-from, a checkpoint of --stage vision"
            assert len(shape) == 1 or shape[0] % 16 == shape[1] % 16 == 0, f"sides must be multiples of 16: {shape}"
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
    if isinstance(env.action_space, Box):  # the policy's actions, in [-1, 1], are scaled, and clipped, to the bounds
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


def obs_shape(space: gym.Space) -> tuple[int, ...]:
    """(height, width, channels) of an image, at least 16 x 16, else (entries of the flattened observation,)."""
    bytes_3d = isinstance(space, Box) and space.dtype == np.uint8 and len(space.shape) == 3
    return space.shape if bytes_3d and min(space.shape[:2]) >= 16 else (len(entry_names(space)),)


# --- statistics
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


# --- vision
class Quantizer(nn.Module):
    """Codes that follow the means of what is assigned to them (van den Oord et al. 2017, arXiv 1711.00937, appendix A),
    the same for each of the latent's sites (detail 1)."""

    def __init__(self, size: int, codes: int = 512, decay: float = 0.8):
        super().__init__()
        self.decay = decay
        self.register_buffer("codebook", torch.randn(codes, size))
        self.register_buffer("count", torch.zeros(codes))  # of assignments, a moving average
        self.register_buffer("total", torch.zeros(codes, size))  # of what was assigned, likewise

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., Z] -> the nearest codes, with the gradient of x [..., Z]; the commitment loss [...]; the codes'
        indices [..., sites]."""
        sites = x.unflatten(-1, (-1, self.codebook.shape[1]))  # [..., sites, size]
        index = (self.codebook.square().sum(-1) - 2 * sites @ self.codebook.T).argmin(-1)
        code = self.codebook[index].flatten(-2)
        return x + (code - x).detach(), (x - code).square().mean(-1), index

    def update(self, x: Tensor, generator: torch.Generator) -> None:
        """Moves the codes towards x [M, Z]. A code that hardly anything is assigned to becomes one of x."""
        index, x = self(x)[2].flatten(), x.reshape(-1, self.codebook.shape[1])  # [M'], [M', size]
        assigned = F.one_hot(index, len(self.codebook)).to(x.dtype)  # [M', codes]
        self.count.lerp_(all_mean(assigned.sum(0)), 1 - self.decay)
        self.total.lerp_(all_mean(assigned.T @ x), 1 - self.decay)
        fresh = x[torch.randint(len(x), self.count.shape, generator=generator, device=x.device)]
        if dist.is_initialized():
            dist.broadcast(fresh, 0)
        dead, mean = self.count < 0.03 * self.count.mean(), self.count.mean()
        self.total[dead] = fresh[dead] * mean
        self.count[dead] = mean
        self.codebook.copy_(self.total / self.count[:, None])


class Vision(nn.Module):
    """Observations [..., *shape] <-> latents [..., Z]: 32 numbers for a vector, 16 for each site of 16 x 16 pixels."""

    def __init__(self, shape: tuple[int, ...], quantize: bool, size: int = 16):
        super().__init__()
        self.shape, self.image = shape, len(shape) == 3
        rows, columns = (shape[0] // 16, shape[1] // 16) if self.image else (1, 2)
        self.sites, self.size = rows * columns, rows * columns * size
        self.quantizer = Quantizer(size) if self.image and quantize else None
        if self.image:
            down, up = [], []
            for inner, outer in ((16, shape[2]), (32, 16), (64, 32)):
                down += [nn.Conv2d(outer, inner, 4, 2, 1), nn.ReLU()]
                up = [nn.ReLU(), nn.ConvTranspose2d(inner, outer, 4, 2, 1), *up]
            self.encoder = nn.Sequential(*down, nn.Conv2d(64, size, 4, 2, 1), nn.Flatten(2))  # [B, size, sites]
            self.decoder = nn.Sequential(nn.Unflatten(2, (rows, columns)), nn.ConvTranspose2d(size, 64, 4, 2, 1), *up)
        else:
            self.obs_stats = RunningMeanStd(shape)
            self.encoder = nn.Sequential(nn.Linear(shape[0], 64), nn.ReLU(), nn.Linear(64, self.size))
            self.decoder = nn.Sequential(nn.Linear(self.size, 64), nn.ReLU(), nn.Linear(64, shape[0]))

    def normalize(self, obs: Tensor) -> Tensor:
        """What is encoded, and what the decoder gives: images [..., channels, height, width], ±0.5, or vectors."""
        if self.image:
            return obs.movedim(-1, -3).float() / 255 - 0.5
        return self.obs_stats.normalize(obs).clamp(-10, 10)

    def encode(self, obs: Tensor) -> Tensor:
        """obs [..., *shape] -> [..., Z], before it is quantised."""
        batch = obs.shape[: -len(self.shape)]
        x = self.encoder(self.normalize(obs).flatten(0, len(batch) - 1))
        return (x.mT if self.image else x).reshape(*batch, self.size)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encoded or imagined x [..., Z] -> the latent [..., Z], and the commitment loss [...]."""
        return self.quantizer(x)[:2] if self.quantizer else (x, torch.zeros_like(x[..., 0]))

    def decode(self, z: Tensor) -> Tensor:
        """Latents z [..., Z] -> what `normalize` gives."""
        x = z.flatten(0, -2).unflatten(-1, (self.sites, -1)).mT if self.image else z.flatten(0, -2)
        return self.decoder(x).unflatten(0, z.shape[:-1])


# --- memory
def rotation(position: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Cosines and sines [2, ..., 1, size / 2] of rotary positions (Su et al. 2021, arXiv 2104.09864)."""
    frequency = 10_000 ** (-torch.arange(size // 2, device=position.device, dtype=dtype) / (size // 2))
    angle = (position[..., None].to(dtype) * frequency).unsqueeze(-2)
    return torch.stack((angle.cos(), angle.sin()))


class Block(nn.Module):
    """A transformer block, normalised before attention and MLP."""

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def project(self, x: Tensor, turned: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, L, W] -> queries [B, L, heads, size], keys and values [B, L, 2, heads, size]. Values are not turned."""
        *both, value = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        (cos, sin), (a, b) = turned, torch.stack(both).chunk(2, -1)
        query, key = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
        return query, torch.stack((key, value), -3)

    def attend(self, x: Tensor, query: Tensor, seen: Tensor, mask: Tensor) -> Tensor:
        """Tokens x [B, L, W] with their queries, over S keys and values; mask [B, L, S] is true where one may look."""
        key, value = seen.transpose(1, 3).unbind(2)  # each [B, heads, S, size]
        found = F.scaled_dot_product_attention(query.transpose(1, 2), key, value, mask.unsqueeze(1))
        x = x + self.out(found.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class Cache(NamedTuple):
    """Keys and values of the last `context` - 1 tokens. What is older than the episode is ignored."""

    seen: tuple[Tensor, ...]  # of each layer [B, context - 1, 2, heads, size], newest last
    age: Tensor  # [B] steps since the episode's start, of the next token

    def rows(self, chosen: Tensor) -> "Cache":
        return Cache(tuple(layer[chosen] for layer in self.seen), self.age[chosen])


class Memory(nn.Module):
    """A causal transformer over tokens (z_t, a_{t-1}) -> h_t. In every layer a token sees the last `context` tokens of
    its episode, so that h_t depends on the `prefix` = layers x (context - 1) steps before and no others (detail 2)."""

    def __init__(self, latent: int, action: int, args: Args):
        super().__init__()
        self.context, self.prefix = args.context, args.memory_layers * (args.context - 1)
        self.latent = nn.Linear(latent, args.memory_width)
        self.action = nn.Linear(action, args.memory_width, bias=False)
        self.blocks = nn.ModuleList(Block(args.memory_width) for _ in range(args.memory_layers))
        self.head_size = args.memory_width // self.blocks[0].heads
        self.norm = nn.LayerNorm(args.memory_width)

    def forward(self, z: Tensor, previous: Tensor, age: Tensor) -> tuple[Tensor, Cache]:
        """Whole sequences: z [B, L, Z], encoded actions before each [B, L, E] (zeros at an episode's start), age [B, L]
        steps since that start (negative: padding) -> h [B, L, W], and the cache of the token behind them."""
        x, length = self.latent(z) + self.action(previous), z.shape[1]
        step = torch.arange(length, device=x.device)
        behind = step[:, None] - step  # [L, L]
        mask = (behind > 0) & (behind < self.context) & (behind <= age[..., None])  # [B, L, L]
        mask = mask | (behind == 0)  # padding sees itself: a softmax over nothing would be NaN
        turned, seen = rotation(age, self.head_size, x.dtype), []
        for block in self.blocks:
            query, own = block.project(x, turned)
            seen.append(F.pad(own, (0, 0) * 3 + (self.context - 1, 0))[:, length:])
            x = block.attend(x, query, own, mask)
        return self.norm(x), Cache(tuple(seen), age[:, -1] + 1)

    def step(self, z: Tensor, previous: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """One token of each sequence: z [B, Z], encoded action before it [B, E] -> h [B, W] and the next cache."""
        x = (self.latent(z) + self.action(previous)).unsqueeze(1)  # [B, 1, W]
        behind = torch.arange(self.context - 1, -1, -1, device=x.device)  # of each key
        mask = (behind <= cache.age[:, None]).unsqueeze(1)  # [B, 1, context]
        turned, seen = rotation(cache.age[:, None], self.head_size, x.dtype), []
        for block, before in zip(self.blocks, cache.seen, strict=True):
            query, own = block.project(x, turned)
            both = torch.cat((before, own), 1)  # [B, context, 2, heads, size]
            seen.append(both[:, 1:])
            x = block.attend(x, query, both, mask)
        return self.norm(x)[:, 0], Cache(tuple(seen), cache.age + 1)


# --- agent
def mlp(inputs: int, outputs: int, gain: float) -> nn.Sequential:
    layers = [nn.Linear(inputs, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 64), nn.LayerNorm(64), nn.ReLU()]
    layers.append(nn.Linear(64, outputs))
    for layer, scale in zip(layers[::3], (math.sqrt(2), math.sqrt(2), gain), strict=True):
        nn.init.orthogonal_(layer.weight, scale)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Agent(nn.Module):
    """vision (observation <-> latent z), memory (z, action -> h), model (h, action -> what comes next), and actor and
    critic of (z, h). Values are normalised. Parameters [..., P] are logits, side by side for MultiDiscrete, or means,
    then log standard deviations, of actions before tanh."""

    def __init__(self, obs_space: gym.Space, action_space: gym.Space, args: Args):
        super().__init__()
        self.choices = [int(n) for n in np.ravel(getattr(action_space, "nvec", getattr(action_space, "n", ())))]
        self.obs_space, self.action_space = obs_space, action_space
        self.vision = Vision(obs_shape(obs_space), args.quantize)
        self.action_size, latent = gym.spaces.flatdim(action_space), self.vision.size
        self.memory = Memory(latent, self.action_size, args)
        last = nn.Linear(256, latent + 2)
        self.model = nn.Sequential(nn.Linear(args.memory_width + self.action_size, 256), nn.ReLU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.actor = mlp(latent + args.memory_width, self.action_size, 0.01)
        self.critic = mlp(latent + args.memory_width, 1, 1.0)
        self.log_std = nn.Parameter(torch.full((self.action_size,), -0.5)) if not self.choices else None
        self.return_stats, self.latent_stats = (RunningMeanStd((), memory=100_000) for _ in range(2))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("foretold", torch.zeros(2))  # planned advantages squared, and times what came: averages

    def control(self, z: Tensor, h: Tensor, action_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Parameters [..., P] and values [...]."""
        features = torch.cat((z, h), -1)
        params = self.actor(features)
        if self.log_std is not None:
            params = torch.cat((params, self.log_std.expand_as(params)), -1)
        elif action_mask is not None:
            params = params.masked_fill(~action_mask, torch.finfo(params.dtype).min)
        return params, self.critic(features).squeeze(-1)

    def imagine(self, z: Tensor, h: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What encoded actions [..., E] lead to: the next latent [..., Z] before it is quantised, the reward [...] in
        standard deviations of returns, and the logit [...] of not terminating."""
        change, reward, goes_on = self.model(torch.cat((h, action), -1)).split((z.shape[-1], 1, 1), -1)
        return z + change, reward.squeeze(-1), goes_on.squeeze(-1)

    def step(self, obs: Tensor, previous: Tensor, cache: Cache, action_mask: Tensor | None = None) -> "Seen":
        """One step of N environments: obs [N, *shape], encoded actions before it [N, E], action_mask [N, E]."""
        z, commitment = self.vision.quantize(self.vision.encode(obs))
        h, cache = self.memory.step(z, previous, cache)
        return Seen(z, commitment, h, *self.control(z, h, action_mask), cache)

    def unroll(self, obs: Tensor, previous: Tensor, age: Tensor, action_mask: Tensor | None = None) -> "Seen":
        """Whole sequences, as Memory.forward takes them: obs [B, L, *shape], action_mask [B, L, E]."""
        z, commitment = self.vision.quantize(self.vision.encode(obs))
        h, cache = self.memory(z, previous, age)
        return Seen(z, commitment, h, *self.control(z, h, action_mask), cache)

    def beta(self, args: Args) -> float:
        """How much plans steer: as much as what they said of past actions came true, by least squares (detail 4)."""
        return args.planning_beta * max(0.0, float(self.foretold[1] / (self.foretold[0] + 1e-4)))

    @torch.no_grad()
    def update(self, obs: Tensor, returns: Tensor, generator: torch.Generator | None) -> None:
        """Merges obs [M, *shape] and returns [M], moves the codes, both of vision only with a generator, and rescales
        critic and reward head so that what they say stays the same (details 1 and 8; PopArt, 1602.07714, eq. 9)."""
        stats, last = self.return_stats, self.critic[-1]
        mean, std = stats.mean.clone(), stats.std.clone()
        if generator and not self.vision.image:
            self.vision.obs_stats.update(obs)
        x = self.vision.encode(obs)
        if generator and self.vision.quantizer:
            self.vision.quantizer.update(x, generator)
        self.latent_stats.update(self.vision.quantize(x)[0].flatten())
        stats.update(returns)
        last.weight.mul_(std / stats.std)
        last.bias.copy_((std * last.bias + mean - stats.mean) / stats.std)
        for weight in (self.model[-1].weight, self.model[-1].bias):
            weight[-2] *= std / stats.std
        self.updates += 1


class Seen(NamedTuple):
    """What an agent makes of observations [..., *shape]: one step [N] or sequences [B, L]."""

    z: Tensor  # [..., Z] latents
    commitment: Tensor  # [...]
    h: Tensor  # [..., W]
    params: Tensor  # [..., P]
    value: Tensor  # [...] normalised
    cache: Cache  # of the next step


# --- distributions
def encode_action(action: Tensor, choices: list[int]) -> Tensor:
    """Actions [..., A] as memory and model take them [..., E]: one-hot, or squashed."""
    if not choices:  # a Box
        return action.tanh()
    return torch.cat([F.one_hot(a, n) for a, n in zip(action.unbind(-1), choices, strict=True)], -1).float()


def sample(params: Tensor, choices: list[int], generator: torch.Generator | None, alike: int = 1) -> Tensor:
    """Actions [..., A], of a Box before tanh; without a generator, the likeliest ones. Each `alike` rows in turn share
    their random numbers."""
    mean, *log_std = (params,) if choices else params.chunk(2, -1)
    noise = torch.zeros_like(mean[::alike])
    if generator and choices:  # the maximum of logits + Gumbel noise is a sample of their softmax
        noise = -(noise.exponential_(generator=generator) + 1e-20).log()
    elif generator:
        noise.normal_(generator=generator)
    noise = noise.repeat_interleave(alike, 0)
    if not choices:
        return mean + log_std[0].exp() * noise
    return torch.stack([logits.argmax(-1) for logits in (mean + noise).split(choices, -1)], -1)


def logprob_entropy(params: Tensor, action: Tensor, choices: list[int]) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [...] for params [..., P], actions [..., A]: densities of tanh(action) for a Box,
    whose entropy is that of a Gaussian plus the mean of log tanh', by Gauss-Hermite quadrature (detail 6)."""
    if not choices:
        mean, log_std = params.chunk(2, -1)
        gaussian = -0.5 * ((action - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
        points, weights = (x.to(mean) for x in HERMITE)
        at = torch.cat((action[..., None], mean[..., None] + log_std.exp()[..., None] * points), -1)  # [..., A, 17]
        slope = 2 * (math.log(2) - at - F.softplus(-2 * at))  # log of tanh'(at), exactly
        entropy = log_std + 0.5 * math.log(2 * math.pi * math.e) + slope[..., 1:] @ weights / math.sqrt(2 * math.pi)
        return (gaussian - slope[..., 0]).sum(-1), entropy.sum(-1)
    logprobs = [logits.log_softmax(-1) for logits in params.split(choices, -1)]
    logprob = sum(x.gather(-1, action[..., i, None]).squeeze(-1) for i, x in enumerate(logprobs))
    return logprob, sum(-(x.exp() * x).sum(-1) for x in logprobs)


def cross_entropy(params: Tensor, target: Tensor, choices: list[int]) -> Tensor:
    """Of the policy `params` under the policy `target`, both [..., P] -> [...]; less a Box's constant."""
    if not choices:
        (mean, log_std), (target_mean, target_log_std) = params.chunk(2, -1), target.chunk(2, -1)
        spread = (2 * target_log_std).exp() + (target_mean - mean) ** 2
        return (0.5 * spread * (-2 * log_std).exp() + log_std).sum(-1)
    pairs = zip(params.split(choices, -1), target.split(choices, -1), strict=True)
    return -sum((wanted.softmax(-1) * logits.log_softmax(-1)).sum(-1) for logits, wanted in pairs)


# --- planning
def action_values(agent: Agent, seen: Seen, action: Tensor, args: Args, generator: torch.Generator) -> Tensor:
    """Q [N, K] of candidate actions [N, K, A], in standard deviations of returns: each is held for `planning_hold`
    steps, then the model follows the policy, with the same random numbers for all K; at the end comes the value."""
    num_candidates = action.shape[1]
    rows = torch.arange(len(action), device=action.device).repeat_interleave(num_candidates)
    z, h, cache, action = seen.z[rows], seen.h[rows], seen.cache.rows(rows), action.flatten(0, 1)
    total, discount = 0.0, 1.0
    for k in range(1, args.planning_horizon + 1):
        taken = encode_action(action, agent.choices)
        z, reward, goes_on = agent.imagine(z, h, taken)
        total, discount = total + discount * reward, discount * args.gamma * goes_on.sigmoid()
        z, _ = agent.vision.quantize(z)
        h, cache = agent.memory.step(z, taken, cache)
        params, value = agent.control(z, h)
        if k >= args.planning_hold:
            action = sample(params, agent.choices, generator, alike=num_candidates)
    mean = agent.return_stats.mean / agent.return_stats.std
    return (total + discount * (value + mean)).unflatten(0, (-1, num_candidates))


def steer(params: Tensor, action: Tensor, q: Tensor, beta: float, choices: list[int]) -> Tensor:
    """Parameters [N, P] of the policy times exp(beta Q), Q [N, K] (detail 4). Logits move by beta (Q - its mean), as in
    Gumbel MuZero; a Box's Gaussian moves as the mean of its candidates [N, K, A] when they weigh exp(beta Q)."""
    if choices:
        return params + beta * (q - (params.softmax(-1) * q).sum(-1, keepdim=True))
    mean, log_std = params.chunk(2, -1)
    moved = ((beta * q).softmax(-1)[..., None] * action).sum(1) - action.mean(1)  # [N, A]
    return torch.cat((mean + moved, log_std), -1)


def plan(agent: Agent, seen: Seen, args: Args, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Parameters of the planned policy, which acts, and of the policy times exp(Q), which says what plans foretell."""
    if agent.choices:
        action = torch.arange(agent.action_size, device=seen.z.device).expand(len(seen.z), -1)[..., None]  # [N, K, 1]
    else:
        action = sample(seen.params[:, None].expand(-1, args.planning_samples, -1), [], generator)  # [N, K, A]
    q = action_values(agent, seen, action, args, generator)
    return tuple(steer(seen.params, action, q, beta, agent.choices) for beta in (agent.beta(args), 1.0))


# --- rollout
class Rollout(NamedTuple):
    """Steps of N environments: what the agent saw *before* the step, what it did, what came back. Of the R rows, the
    last T are the rollout's own; the `prefix` before them are what the memory looks back on."""

    obs: Tensor  # [R, N, *shape]
    previous: Tensor  # [R, N, E] the action before, encoded; zeros at an episode's start
    age: Tensor  # [R, N] steps since that start; -1: there is no such step
    action_mask: Tensor  # [R, N, E] bool: what a discrete action may choose
    params: Tensor  # [R, N, P] of the policy …
    behaviour: Tensor  # [R, N, P] … and of the planned one, which acted
    planned: Tensor  # [R, N] advantage that the plan saw in the action; 0 without a plan
    action: Tensor  # [R, N, A] of a Box before tanh
    value: Tensor  # [R, N] normalised
    next_value: Tensor  # [R, N] of the true next observation; of no use where the episode terminated (detail 5)
    reward: Tensor  # [R, N]
    terminated: Tensor  # [R, N] bool
    truncated: Tensor  # [R, N] bool


class Episode(NamedTuple):
    n: int  # its environment
    total: float  # its return
    length: int


@torch.inference_mode()
def play(envs: VectorEnv, agent: Agent, args: Args, seed: int, sampled=True, memory=True, plans=False) -> Iterator:
    """Plays without end, and gives each step, a Rollout without the dimension R, and the list of Episodes that end with
    it. The actions are sampled, or the likeliest; without memory, every step is taken for the first of its episode;
    with plans, these steer. After Agent.update the memory looks again at what it has seen."""
    space, choices, device = agent.action_space, agent.choices, agent.updates.device
    generator = torch.Generator(device).manual_seed(seed)
    no_action = np.zeros((envs.num_envs, agent.action_size), np.float32)

    def masks(infos: dict) -> Tensor:
        silent = ~infos.get("_action_mask", no_action[:, 0] > 0)[:, None]  # environments without one allow everything
        action_mask = torch.from_numpy(np.asarray(infos.get("action_mask", no_action), bool) | silent)
        for part in action_mask.split(choices, -1) if choices else ():
            for n in (~part.any(-1)).nonzero():
                raise ValueError(f"environment {int(n)} allows no action at all")
        return action_mask.to(device)

    def observed(raw) -> np.ndarray:  # [N, *shape]
        return np.array(raw) if agent.vision.image else flatten(agent.obs_space, raw)

    raw, infos = envs.reset(seed=seed)
    obs, action_mask = torch.from_numpy(observed(raw)).to(device), masks(infos)
    previous, age = torch.from_numpy(no_action).to(device), agent.updates.new_zeros(envs.num_envs)
    updates, recent = None, deque(maxlen=agent.memory.prefix + 1)
    while True:
        recent.append((obs, previous, age, action_mask))
        if updates != int(agent.updates):
            updates, rows = int(agent.updates), agent.unroll(*(torch.stack(x, 1) for x in zip(*recent, strict=True)))
            seen = Seen(*(x[:, -1] for x in rows[:-1]), rows.cache)
        params, behaviour, planned = seen.params, seen.params, torch.zeros_like(seen.value)
        if plans and updates:
            behaviour, unit = plan(agent, seen, args, generator)
        action = sample(behaviour, choices, generator if sampled else None)
        if plans and updates:  # log of unit / params is Q and a constant; less its mean under what acts
            gain = logprob_entropy(unit, action, choices)[0] - logprob_entropy(params, action, choices)[0]
            planned = gain + cross_entropy(unit, behaviour, choices) - cross_entropy(params, behaviour, choices)
        taken = encode_action(action, choices)
        sent = (action if choices else taken).cpu().numpy().reshape(-1, *space.shape) + getattr(space, "start", 0)
        try:
            raw, reward, terminated, truncated, infos = envs.step(sent)
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            for process in getattr(envs, "processes", ()):  # Gymnasium's close would wait for the dead one
                process.terminate()
            envs.closed = True
            raise RuntimeError("the process of an environment died") from error
        new, episodes = observed(raw), []
        next_obs = new.copy()  # the two differ where an episode ends: there, `new` is the first of the next one
        for n in np.flatnonzero(terminated | truncated):
            last, info = infos["final_obs"][n], infos["final_info"]["episode"]
            next_obs[n] = last if agent.vision.image else gym.spaces.flatten(agent.obs_space, last)
            episodes.append(Episode(n, float(info["r"][n]), int(info["l"][n])))
        if not (np.isfinite(new).all() and np.isfinite(next_obs).all() and np.isfinite(reward).all()):
            raise FloatingPointError("an environment returned an observation or a reward that is not finite")
        back = (np.float32(reward), terminated, truncated, next_obs, new)
        *back, cut, next_obs, new = (torch.from_numpy(x).to(device) for x in back)
        on = ~(back[1] | cut) & memory  # [N] where the episode goes on
        following = new, taken * on[:, None], seen.cache.age * on, masks(infos)
        then = agent.step(*following[:2], Cache(seen.cache.seen, following[2]), following[3])
        next_value = then.value.clone()
        if cut.any():
            next_value[cut] = agent.step(next_obs[cut], taken[cut], seen.cache.rows(cut)).value
        acted = (params, behaviour, planned, action, seen.value, next_value)
        yield Rollout(obs, previous, age, action_mask, *acted, *back, cut), episodes
        (obs, previous, age, action_mask), seen = following, then


def join(steps: Sequence[Rollout], prefix: int, before: Rollout | None = None) -> Rollout:
    """Steps as a Rollout, behind the last `prefix` rows of the one before, or behind padding."""
    new = Rollout(*(torch.stack(x) for x in zip(*steps, strict=True)))
    if before is None:
        before = Rollout(*(x.new_zeros(prefix, *x.shape[1:]) for x in new))
        before.age.fill_(-1)
    return Rollout(*(torch.cat((x[len(x) - prefix :], y)) for x, y in zip(before, new, strict=True)))


def collect(player: Iterator[tuple], num_steps: int, prefix: int, before: Rollout | None) -> tuple[Rollout, list]:
    """The next `num_steps` steps, and the episodes that end in them."""
    steps, ended = zip(*(next(player) for _ in range(num_steps)), strict=True)
    return join(steps, prefix, before), [x for episodes in ended for x in episodes]


# --- A2C
def look(agent: Agent, batch: Rollout) -> tuple[Rollout, Seen]:
    """The last T rows of sequences [B, R, ...], and what the agent makes of them."""
    prefix = agent.memory.prefix
    seen = agent.unroll(batch.obs, batch.previous, batch.age, batch.action_mask)
    return Rollout(*(x[:, prefix:] for x in batch)), Seen(*(x[:, prefix:] for x in seen[:-1]), seen.cache)


def a2c_loss(agent: Agent, batch: Rollout, advantages: Tensor, returns: Tensor, shift: float, args: Args) -> tuple:
    """Loss of sequences `batch` [B, R, ...] with advantages and returns [B, T] of their last rows, and metrics: sums
    divided by the steps of an average minibatch, so that all weigh the same. `shift`, at most 1: see detail 4."""
    batch, seen = look(agent, batch)
    policies = (seen.params, batch.params, batch.behaviour)
    (logprob, entropy), (old, _), (acting, _) = (logprob_entropy(x, batch.action, agent.choices) for x in policies)
    log_ratio, importance = logprob - old, (old - acting).exp()
    ratio, weight = log_ratio.exp(), importance.clamp(max=2)
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    error = agent.vision.decode(seen.z) - agent.vision.normalize(batch.obs)
    per_step = {  # each [B, T]
        "policy_loss": weight * torch.max(-advantages * ratio, -advantages * clipped),
        "value_loss": 0.5 * (seen.value - agent.return_stats.normalize(returns)) ** 2,
        "entropy": entropy,
        "distill_loss": cross_entropy(seen.params, batch.behaviour, agent.choices),
        "vision_loss": error.square().flatten(2).mean(-1) + 0.25 * seen.commitment,
        "memory_loss": memory_loss(agent, batch, seen),
        "importance": weight,
        "old_approx_kl": importance * -log_ratio,
        "approx_kl": importance * (ratio - 1 - log_ratio),  # http://joschu.net/blog/kl-approx.html
        "clipfrac": ((ratio - 1).abs() > args.clip_coef).float(),
    }
    average = args.num_envs * args.num_steps / args.num_minibatches
    metrics = {name: x.sum() / average for name, x in per_step.items()}
    coefficients = {"policy_loss": 1.0, "value_loss": args.vf_coef, "entropy": -args.ent_coef}
    coefficients |= {"vision_loss": args.vision_coef, "memory_loss": args.memory_coef}
    coefficients["distill_loss"] = args.distill_coef * shift
    if args.stage != "all":
        coefficients = {f"{args.stage}_loss": 1.0}
    loss = sum(coefficient * metrics[name] for name, coefficient in coefficients.items())
    metrics["ratio_error"] = (ratio - 1).abs().max()
    return loss, {name: x.detach() for name, x in metrics.items()}


def memory_loss(agent: Agent, batch: Rollout, seen: Seen) -> Tensor:
    """Of the model's next latent (relative to the variance of latents, and without gradient to the target), reward and
    going on, [B, T]. An episode's last step has no next latent, and only termination is its end (detail 3)."""
    next_z, reward, goes_on = agent.imagine(seen.z.detach(), seen.h, encode_action(batch.action, agent.choices))
    error = (next_z[:, :-1] - seen.z[:, 1:].detach()).square().mean(-1) / agent.latent_stats.std**2
    error = F.pad(error * ~(batch.terminated | batch.truncated)[:, :-1], (0, 1))
    reward_error = (reward - batch.reward / agent.return_stats.std) ** 2
    going_on = (~batch.terminated).to(goes_on)
    return error + reward_error + F.binary_cross_entropy_with_logits(goes_on, going_on, reduction="none")


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


# --- dreams
class Dream(NamedTuple):
    """What came in the H steps after each of M starts, and what the model imagined."""

    obs: Tensor  # [M, H, *shape]
    actual: Tensor  # [M, H, Z] its latents
    imagined: Tensor  # [M, H, Z]
    start: Tensor  # [M, Z] latents at the start
    mask: Tensor  # [M, H] bool: still in the episode of the start


@torch.no_grad()
def dream(agent: Agent, rollout: Rollout, starts: Sequence[int], steps: int = 20) -> Dream:
    """Imagines what follows rows `starts` of each environment, with the actions that were taken and without looking
    again. M = starts x N."""

    def rows(x: Tensor, first: int, last: int) -> Tensor:  # [M, rows, ...] relative to each start
        return torch.cat([x[s + first : s + last + 1].transpose(0, 1) for s in starts])

    seen = agent.unroll(*(rows(x, -agent.memory.prefix, 0) for x in (rollout.obs, rollout.previous, rollout.age)))
    start, h, cache, imagined = seen.z[:, -1], seen.h[:, -1], seen.cache, []
    z, obs = start, rows(rollout.obs, 1, steps)
    for action in rows(rollout.previous, 1, steps).unbind(1):
        z, _ = agent.vision.quantize(agent.imagine(z, h, action)[0])
        h, cache = agent.memory.step(z, action, cache)
        imagined.append(z)
    actual, _ = agent.vision.quantize(agent.vision.encode(obs))
    ahead = torch.arange(1, steps + 1, device=z.device)
    mask = rows(rollout.age, 1, steps) == rows(rollout.age, 0, 0) + ahead
    return Dream(obs, actual, torch.stack(imagined, 1), start, mask)


def forecast_skill(dreams: Dream) -> Tensor:
    """By steps ahead [H]: 1 - MSE of imagined latents / MSE of "nothing changes". NaN means no data."""
    guesses = dreams.imagined, dreams.start[:, None]
    error, persistence = (((x - dreams.actual).square().mean(-1) * dreams.mask).sum(0) for x in guesses)
    return torch.where(persistence > 0, 1 - error / persistence, torch.nan)


@torch.no_grad()
def dream_figure(agent: Agent, rollout: Rollout, starts: Sequence[int]) -> Figure:
    """Of the first environment: rows of images, reconstructions and what is imagined; or up to four entries of its
    observations, and dreams of them from each of the rows `starts` on, which follow each other."""
    dreams = dream(agent, Rollout(*(x[:, :1] for x in rollout)), starts)
    views = agent.vision.normalize(dreams.obs), agent.vision.decode(dreams.actual), agent.vision.decode(dreams.imagined)
    figure = Figure(figsize=(10, 8), layout="constrained")
    if agent.vision.image:
        longest = dreams.mask.sum(1).argmax()  # within an episode
        grid = torch.stack([view[longest, ::3] for view in views]).permute(0, 3, 1, 4, 2)  # [3, height, 7, width, *]
        grid = (grid.flatten(2, 3).flatten(0, 1) + 0.5).clamp(0, 1).cpu().numpy()
        axis = figure.subplots()
        axis.imshow(grid if grid.shape[-1] == 3 else grid[..., -1], cmap="gray")
        axis.set(xticks=[], yticks=[], title="1, 4, … 19 steps ahead: what came, its reconstruction, what was imagined")
        return figure
    came, _, imagined = (x.where(dreams.mask[..., None], torch.nan).cpu() for x in views)  # [5, H, entries]
    names = entry_names(agent.obs_space)
    for i, axis in enumerate(figure.subplots(min(4, len(names)), squeeze=False)[:, 0]):
        for k in range(len(starts)):
            ahead = range(20 * k + 1, 20 * k + 21)
            axis.plot(ahead, came[k, :, i], "black", ahead, imagined[k, :, i], "C0")
        axis.set(ylabel=f"{names[i]} (std)", xlabel="step; black what came, blue what was imagined")
    return figure


# --- evaluate, save, load
def evaluate(agent: Agent, args: Args, video_dir: Path | None = None, **how) -> tuple[list[Episode], Rollout]:
    """`eval_episodes` episodes, as many of each environment, on seeds not trained on, and the last 300 steps."""
    num_envs = min(args.eval_episodes, args.num_envs)
    left = [len(range(n, args.eval_episodes, num_envs)) for n in range(num_envs)]  # episodes to play
    steps, episodes, prefix = deque(maxlen=300 + agent.memory.prefix), [], agent.memory.prefix
    with closing(make_envs(args, num_envs, video_dir)) as envs:
        for step, ended in play(envs, agent, args, args.seed + 1_000_000_000, **how):
            steps.append(step)
            for episode in ended:
                left[episode.n] -= 1
                episodes += [episode] if left[episode.n] >= 0 else []
            if signals or max(left) <= 0:
                rollout = join(steps, prefix)  # its first rows are padding only if nothing was played before them
                return episodes, Rollout(*(x[prefix * (len(steps) == steps.maxlen) :] for x in rollout))


@torch.no_grad()
def assess(agent: Agent, args: Args, video_dir: Path) -> tuple[dict, Figure]:
    """Scores of the policy, by its likeliest actions, by sampled ones and without memory, of codes and of dreams."""
    episodes, _ = evaluate(agent, args, video_dir if args.capture_video else None, sampled=False)
    (others, rollout), (blind, _) = evaluate(agent, args), evaluate(agent, args, sampled=False, memory=False)
    likeliest, sampled, memoryless = ([x.total for x in played] or [math.nan] for played in (episodes, others, blind))
    scores = {
        "eval/episodes": len(episodes),
        "eval/episodic_return": fmean(likeliest),
        "eval/return_std": float(np.std(likeliest)),
        "eval/return_sampled": fmean(sampled),
        "eval/return_memoryless": fmean(memoryless),
    }
    if agent.vision.quantizer:
        index = agent.vision.quantizer(agent.vision.encode(rollout.obs[agent.memory.prefix :][-100:]))[2].flatten()
        scores["vision/perplexity"] = float(torch.special.entr(index.bincount() / len(index)).sum().exp())
    starts = range(agent.memory.prefix, len(rollout.age) - 20, 20)
    if not starts:
        return scores, Figure()
    skill = forecast_skill(dream(agent, rollout, starts))
    scores |= {f"model/skill_k{k}": float(skill[k - 1]) for k in (1, 5, 20)}
    return scores, dream_figure(agent, rollout, starts[:5])


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
    """Device, rank and number of processes (one, unless torchrun started more), the networks and their optimiser."""
    on_gpu = args.cuda and torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu")
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")
    torch.set_num_threads(args.torch_threads)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    torch.manual_seed(args.seed)  # for the weights; whatever is random later draws from a generator of its own
    agent = Agent(env.observation_space, env.action_space, args).to(device)
    learning = {"vision": "vision.", "memory": ("memory.", "model."), "all": ""}[args.stage]
    for name, weight in agent.named_parameters():
        weight.requires_grad_(name.startswith(learning))
    optimizer = torch.optim.Adam([w for w in agent.parameters() if w.requires_grad], eps=1e-5, fused=True)
    parts = {"agent": agent, "optimizer": optimizer}
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
    agent, optimizer = parts.values()
    counters = {"global_step": 0, "seconds": 0.0, "recent": []}  # recent: returns of the last 100 episodes
    if args.evaluate or args.init_from:
        saved = load(args.evaluate or args.init_from, agent=agent)
    if args.evaluate:
        print(f"playing {args.eval_episodes} episodes three times", file=sys.stderr)
        run_dir, counters = Path(args.evaluate).parent, saved["counters"]
        scores = assess(agent, args, run_dir / "videos")[0] if rank == 0 else {}
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
    rng, prefix, rollout = torch.Generator(device).manual_seed(seed), agent.memory.prefix, None
    batch_size, stop = world * args.num_envs * args.num_steps, False
    envs, planning = make_envs(args, args.num_envs), args.planning and args.stage == "all"
    past = deque(maxlen=100 if planning and args.model_steps else 0)  # rollouts
    player = play(envs, agent, args, seed, plans=planning)
    try:
        while counters["global_step"] < args.total_timesteps and not stop:
            # --- rollout, advantages
            started = time.perf_counter()
            remaining = 1 - counters["global_step"] / args.total_timesteps if args.anneal_lr else 1.0
            optimizer.param_groups[0]["lr"] = args.learning_rate * remaining
            beta = agent.beta(args) if planning else 0.0
            rollout, episodes = collect(player, args.num_steps, prefix, rollout)
            own = Rollout(*(x[prefix:] for x in rollout))  # [T, N]
            values, values_after = map(agent.return_stats.denormalize, (own.value, own.next_value))
            ends = own.terminated, own.truncated
            advantages, returns = gae(own.reward, values, values_after, *ends, args.gamma, args.gae_lambda)
            centred = advantages - all_mean(advantages.mean())
            normal = centred / (all_mean(centred.square().mean()).sqrt() + 1e-8)
            advantages = normal if args.norm_adv else advantages
            proved = torch.stack((own.planned.square().mean(), (own.planned * normal).mean()))
            agent.foretold.lerp_(all_mean(proved), 0.2)  # what plans foretold, and what came
            spread = float(agent.foretold[0].sqrt())  # beta x spread is the deviation of what plans add to logits

            # --- A2C; the first rollout only gives the statistics (detail 8)
            log = []  # metrics of each minibatch
            for _ in range(args.update_epochs if agent.updates else 0):
                order = torch.randperm(args.num_envs, generator=rng, device=device)
                for chosen in order.tensor_split(args.num_minibatches):
                    *batch, adv, ret = (x[:, chosen].transpose(0, 1) for x in (*rollout, advantages, returns))
                    loss, metrics = a2c_loss(agent, Rollout(*batch), adv, ret, min(1.0, beta * spread), args)
                    log.append(metrics | {"grad_norm": descend(loss, optimizer, args.max_grad_norm)})
                kl = torch.stack([metrics["approx_kl"] for metrics in log[-args.num_minibatches :]]).mean()
                if args.target_kl and all_mean(kl) > args.target_kl:
                    break
            past.append(rollout)
            for step in range(args.model_steps if planning and agent.updates else 0):  # of the model alone
                if step % 8 == 0:  # a draw, which takes longer than a step, serves for eight
                    drawn = past[int(torch.randint(len(past), (), generator=rng, device=device))]
                    chosen = torch.randperm(args.num_envs, generator=rng, device=device)[: len(chosen)]
                    with torch.no_grad():
                        old, seen = look(agent, Rollout(*(x[:, chosen].transpose(0, 1) for x in drawn)))
                descend(args.memory_coef * memory_loss(agent, old, seen).mean(), optimizer, args.max_grad_norm)
            means = {name: torch.stack([metrics[name] for metrics in log]).mean() for name in (log[0] if log else ())}
            scalars = {f"losses/{name}": float(all_mean(x)) for name, x in means.items()}

            # --- statistics and codes, log, save, evaluate
            agent.update(own.obs.flatten(0, 1), returns.flatten(), rng if args.stage != "memory" else None)
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
            scalars["losses/explained_variance"] = 1 - float((returns - values).var() / returns.var())
            scalars["losses/first_ratio_error"] = float(log[0]["ratio_error"]) if log else math.nan
            if scalars["losses/first_ratio_error"] > 1e-3:
                bar.write("warning: rollout and update compute different log-probabilities", file=sys.stderr)
            cross, entropy = (cross_entropy(x, own.behaviour, agent.choices) for x in (own.params, own.behaviour))
            scalars["planning/kl"] = float((cross - entropy).mean())
            scalars |= {"planning/beta": beta, "planning/spread": spread}
            bar.set_postfix_str(f"return {counters['train_return_mean']:.1f}", refresh=False)
            bar.update(min(batch_size, bar.total - bar.n))
            log_scalars(writer, scalars, counters["global_step"])
            due = done or (args.checkpoint_every and counters["global_step"] // batch_size % args.checkpoint_every == 0)
            if due or stop:
                save(run_dir / "checkpoint.pt", parts, counters, args)
            if due and not stop:
                scores, figure = assess(agent, args, run_dir / "videos")
                if signals:  # which cut it short; the next update hears of them on all ranks
                    continue
                figure.savefig(run_dir / "dream.png")
                writer.add_figure("model/dream", figure, counters["global_step"])
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
