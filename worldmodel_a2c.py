"""A2C with a world model: vision, memory, and a controller that plans in what it has learnt.

The data goes one way, and each stage has one place below:

    environment step -> observation (a vector, or an image) -> Vision.see: encoder, quantiser -> latent z
    (z, last action) -> Memory.step (a transformer with a KV cache, no gradients) -> h -> policy and value of (z, h)
    plan: the model imagines `planning_horizon` steps behind each candidate action -> what acts is the planned policy
    -> Rollout [T, N] and the `prefix` rows before it: raw observations, actions, log-probabilities of both policies
    Rollout -> gae (terminated / truncated, values of final observations) -> advantages, returns [T, N]
    columns of the rollout -> Agent.unroll (the transformer over whole columns) -> a2c_loss -> optimizer
    after the last epoch -> running statistics, codebook, and the KV cache once more under the new weights

World models are Ha & Schmidhuber 2018, arXiv 1803.10122; A2C with clipped ratios is Schulman et al. 2017, arXiv
1707.06347. Numbers such as `detail 5` refer to docs/worldmodel_a2c.md.
"""

import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
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
    """threads of torch on the CPU"""
    runs_dir: str = "runs"
    """folder that holds the run folders"""
    checkpoint_every: int = 25
    """updates between checkpoints, each with an evaluation; 0 = only at the end"""
    resume: str | None = None
    """a run folder to continue, with its arguments unless others are given"""
    init_from: str | None = None
    """a checkpoint whose weights to start from, wherever names and shapes fit; for --stage, of the stage before"""
    evaluate: str | None = None
    """a checkpoint to evaluate, with its arguments unless others are given; no training"""
    eval_episodes: int = 20
    """episodes of each evaluation, on seeds that are not trained on"""
    eval_deterministic: bool = True
    """evaluate with the most likely action instead of a sampled one"""
    dream: str | None = None
    """with --evaluate: a GIF to write, of an episode beside what the model imagines with the same actions"""
    capture_video: bool = False
    """record the evaluations' first environment to `videos/` in the run folder"""

    # --- environment
    env_id: str = "CartPole-v1"
    """any Gymnasium id, also `module:Name-v0`, which imports the module first"""
    env_kwargs: str = "{}"
    """keyword arguments of `gymnasium.make`, as JSON"""
    vectorization: Literal["sync", "async"] = "sync"
    """step the environments in turn, or each in a process of its own (for slow environments)"""

    # --- A2C
    total_timesteps: int = 100_000
    """environment steps to train for, over all environments and processes"""
    learning_rate: float = 1e-3
    """Adam's step size"""
    num_envs: int = 16
    """environments of each process"""
    num_steps: int = 128
    """steps of each environment per rollout"""
    anneal_lr: bool = True
    """lower the learning rate linearly to 0"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    num_minibatches: int = 4
    """minibatches per epoch; at most num_envs"""
    update_epochs: int = 4
    """passes over each rollout; with one, and one minibatch, the gradient is A2C's"""
    norm_adv: bool = True
    """normalise the advantages of each rollout"""
    clip_coef: float = 0.2
    """clip range of the probability ratio"""
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss; values are in units of the returns' standard deviation"""
    max_grad_norm: float = 0.5
    """gradients are scaled down to this norm"""
    target_kl: float | None = None
    """end an update once an epoch's mean KL divergence from the rollout's policy is above this; None = never"""
    controller: Literal["mlp", "linear"] = "mlp"
    """policy and value: of two hidden layers, or linear in (z, h)"""

    # --- world model
    stage: Literal["vision", "memory", "all"] = "all"
    """what learns: vision alone, then memory with vision as it is, or everything; each takes the other's checkpoint"""
    quantizer: Literal["ema", "fsq", "none"] = "ema"
    """codes that follow the means of what they stand for, rounding to a grid, or a continuous latent"""
    vision_coef: float = 1.0
    """weight of the reconstruction and commitment losses"""
    memory_width: int = 128
    """size of the transformer's tokens"""
    memory_heads: int = 4
    """attention heads"""
    memory_layers: int = 2
    """transformer blocks"""
    context: int = 32
    """steps that a block looks back, its own included; the whole sees layers x (context - 1) steps back"""
    memory_coef: float = 0.1
    """weight of the next-latent, reward and continue losses"""

    # --- planning
    planning: Literal["off", "train", "always"] = "always"
    """plan never, in training only, or in evaluations too"""
    planning_horizon: int = 5
    """steps to imagine, at the end of which the value stands for the rest"""
    planning_samples: int = 32
    """actions to try where they are continuous; of discrete ones, all are tried"""
    planning_beta: float = 1.0
    """how far planned advantages, in standard deviations of returns, move the policy's logits once the model is
    perfect: it is multiplied by the skill of forecasts `planning_horizon` steps ahead"""
    distill_coef: float = 0.1
    """weight, times beta, of the cross-entropy that draws the policy towards the planned one"""
    importance_cap: float = 2.0
    """largest weight of a step that the planned policy made less likely than the policy would have"""


class InputError(Exception):
    """The user asked for something that cannot be done; the message is one line."""


def check(args: Args) -> None:
    """Raises InputError, with one clear line, for whatever can be known to fail before any work is done."""

    def need(ok: bool, message: str) -> None:
        if not ok:
            raise InputError(message)

    above_zero = ["total_timesteps", "num_envs", "num_minibatches", "update_epochs", "learning_rate", "max_grad_norm"]
    above_zero += ["torch_threads", "eval_episodes", "memory_width", "memory_heads", "memory_layers", "context"]
    above_zero += ["planning_horizon", "importance_cap"]
    above_zero += ["target_kl"] * (args.target_kl is not None)
    not_negative = ["seed", "checkpoint_every", "ent_coef", "vf_coef", "clip_coef", "vision_coef", "memory_coef"]
    not_negative += ["planning_beta", "distill_coef"]
    for name in above_zero + not_negative + ["gamma", "gae_lambda"]:
        value, flag = getattr(args, name), "--" + name.replace("_", "-")
        need(value > 0 or name not in above_zero, f"{flag} must be above 0, not {value}")
        need(value >= 0, f"{flag} must not be negative, not {value}")
        need(value <= 1 or name not in ("gamma", "gae_lambda"), f"{flag} must be at most 1, not {value}")
    need(args.num_minibatches <= args.num_envs, "--num-minibatches must not exceed --num-envs")
    need(args.num_steps > 1, "--num-steps must be above 1: the model learns from one step to the next")
    need(args.planning_samples > 1, "--planning-samples must be above 1")
    need(args.memory_width % (2 * args.memory_heads) == 0, "--memory-width must be a multiple of 2 x --memory-heads")
    exclusive = [args.resume, args.init_from, args.evaluate]
    need(sum(map(bool, exclusive)) <= 1, "--resume, --init-from and --evaluate exclude each other")
    need(not args.dream or args.evaluate, "--dream needs --evaluate, a checkpoint")
    writable = not args.dream or (Path(args.dream).suffix == ".gif" and Path(args.dream).parent.is_dir())
    need(writable, f"--dream must be a .gif in an existing folder, not {args.dream}")
    continued = args.init_from or args.resume or args.evaluate
    need(args.stage != "memory" or continued, "--stage memory needs --init-from, a checkpoint of --stage vision")
    moviepy = not args.capture_video or importlib.util.find_spec("moviepy")
    need(moviepy, "--capture-video needs moviepy: pip install -r requirements-envs.txt")
    try:
        env = make_env(args, "rgb_array" if args.capture_video else None)
        shape, space = obs_shape(env.observation_space), env.action_space
        env.close()
    except Exception as error:
        raise InputError(f"{args.env_id}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    need(isinstance(space, (Box, Discrete, MultiDiscrete)), f"{args.env_id}: no support for actions in {space}")
    plannable = args.planning == "off" or not isinstance(space, MultiDiscrete)
    need(plannable, f"{args.env_id}: no planning for actions in {space}; use --planning off")
    if len(shape) == 3:
        need(shape[0] % 16 == shape[1] % 16 == 0, f"{args.env_id}: sides of images must be multiples of 16: {shape}")
    size = math.prod(shape) * (1 if len(shape) == 3 else 4)
    rows = 2 * args.num_steps + 2 * args.memory_layers * (args.context - 1)
    needed, memory = rows * args.num_envs * size, math.inf
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    need(needed < memory, f"this needs {needed / 1e9:.1f} GB for rollouts; the machine has {memory / 1e9:.1f} GB")


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


def obs_shape(space: gym.Space) -> tuple[int, ...]:
    """(height, width, channels) of an image, at least 16 x 16, else (entries of the flattened observation,)."""
    bytes_3d = isinstance(space, Box) and space.dtype == np.uint8 and len(space.shape) == 3
    image = bytes_3d and min(space.shape[:2]) >= 16
    return space.shape if image else (len(entry_names(space)),)


def env_action(action: Tensor, space: gym.Space) -> np.ndarray:
    """The agent's actions [N, A] as the environments want them. A Box is squashed by tanh to [-1, 1] and scaled to its
    bounds; an entry without bounds is left within [-1, 1]."""
    array = action.cpu().numpy()
    if isinstance(space, Discrete):
        return array[:, 0] + space.start
    array = array.reshape(-1, *space.shape)
    if isinstance(space, MultiDiscrete):
        return array + space.start
    bounded = np.isfinite(space.low) & np.isfinite(space.high)
    low, high = np.where(bounded, space.low, -1), np.where(bounded, space.high, 1)
    return np.clip(low + (np.tanh(array) + 1) / 2 * (high - low), space.low, space.high).astype(space.dtype)


def encode_action(action: Tensor, space: gym.Space) -> Tensor:
    """Actions [..., A] as the memory and the model take them [..., E]: one-hot, or squashed."""
    if isinstance(space, Box):
        return action.tanh()
    return torch.cat([F.one_hot(a, n) for a, n in zip(action.unbind(-1), choices(space), strict=True)], -1).float()


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


# --- vision


class ProductEMA(nn.Module):
    """Vector quantiser whose codes follow the means of what was assigned to them (van den Oord et al. 2017, arXiv
    1711.00937, appendix A). Each of the latent's `sites` has a codebook of its own, or all share one (detail 1)."""

    def __init__(self, sites: int, size: int, codes: int, shared: bool, decay: float = 0.8):
        super().__init__()
        self.sites, self.codes, self.decay = sites, codes, decay
        books = 1 if shared else sites
        self.register_buffer("codebook", torch.randn(books, codes, size))
        self.register_buffer("count", torch.zeros(books, codes))  # of assignments, a moving average
        self.register_buffer("total", torch.zeros(books, codes, size))  # of what was assigned, likewise

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., sites * size] -> the nearest codes, with the gradient of x [..., sites * size]; their indices [...,
        sites]; the commitment loss [...]."""
        x = x.unflatten(-1, (self.sites, -1))
        book = self.codebook.expand(self.sites, -1, -1)
        distance = book.square().sum(-1) - 2 * torch.einsum("...sd,scd->...sc", x, book)
        index = distance.argmin(-1)
        code = book[torch.arange(self.sites, device=x.device), index]  # [..., sites, size]
        commitment = (x - code).square().mean((-1, -2))
        return (x + (code - x).detach()).flatten(-2), index, commitment

    @torch.no_grad()
    def update(self, x: Tensor, generator: torch.Generator) -> None:
        """Moves the codes towards x [M, sites * size]. A code that hardly anything is assigned to becomes one of x."""
        index = self(x)[1]  # [M, sites]
        books, codes, size = self.codebook.shape
        x = x.view(-1, self.sites, size).transpose(0, 1).reshape(books, -1, size)  # [books, M', size]
        assigned = F.one_hot(index.T.reshape(books, -1), codes).to(x.dtype)  # [books, M', codes]
        self.count.mul_(self.decay).add_(all_sum(assigned.sum(1)), alpha=1 - self.decay)
        self.total.mul_(self.decay).add_(all_sum(assigned.mT @ x), alpha=1 - self.decay)
        chosen = torch.randint(x.shape[1], (books, codes), generator=generator, device=x.device)
        fresh = x.gather(1, chosen[..., None].expand(-1, -1, size))
        if dist.is_initialized():
            dist.broadcast(fresh, 0)
        mean_count = self.count.mean(1, keepdim=True)
        dead = self.count < 0.03 * mean_count
        self.total.copy_(torch.where(dead[..., None], fresh * mean_count[..., None], self.total))
        self.count.copy_(torch.where(dead, mean_count, self.count))
        self.codebook.copy_(self.total / self.count[..., None])


class FSQ(nn.Module):
    """Finite scalar quantisation (Mentzer et al. 2023, arXiv 2309.15505): each entry, bounded by the encoder's tanh, is
    rounded to one of 8 values in [-1, 1]. Nothing to learn, and no codes that die."""

    levels = 8

    def __init__(self, sites: int, size: int):
        super().__init__()
        self.sites, self.codes = sites, self.levels**size

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As ProductEMA's, without a commitment loss."""
        half = (self.levels - 1) / 2
        bounded = x.clamp(-1, 1)
        level = (bounded * half + half).round()  # 0 to 7
        digits = level.detach().long().unflatten(-1, (self.sites, -1))
        index = (digits * self.levels ** torch.arange(digits.shape[-1], device=x.device)).sum(-1)
        return bounded + (level / half - 1 - bounded).detach(), index, torch.zeros_like(x[..., 0])

    def update(self, x: Tensor, generator: torch.Generator) -> None:
        pass


class Unquantized(nn.Module):
    """A continuous latent."""

    def __init__(self, sites: int):
        super().__init__()
        self.sites, self.codes = sites, 1

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        none = torch.zeros_like(x[..., 0])
        return x, none.long()[..., None].expand(*none.shape, self.sites), none

    def update(self, x: Tensor, generator: torch.Generator) -> None:
        pass


class Vision(nn.Module):
    """Observations [..., *shape] <-> latents [..., Z] of `sites` codes: 4 for a vector, one for each 16 x 16 pixels."""

    def __init__(self, shape: tuple[int, ...], quantizer: str):
        super().__init__()
        self.shape, self.image = shape, len(shape) == 3
        rows, columns = (shape[0] // 16, shape[1] // 16) if self.image else (4, 1)
        sites, codes = rows * columns, 512 if self.image else 32
        size = {"ema": (8, 16), "fsq": (1, 3), "none": (8, 16)}[quantizer][self.image]  # numbers a site
        self.size = sites * size
        if quantizer == "ema":
            self.quantizer = ProductEMA(sites, size, codes, shared=self.image)
        else:
            self.quantizer = FSQ(sites, size) if quantizer == "fsq" else Unquantized(sites)
        if self.image:
            down, up = [], []
            for inner, outer in ((16, shape[2]), (32, 16), (64, 32)):
                down += [nn.Conv2d(outer, inner, 4, 2, 1), nn.ReLU()]
                up = [nn.ReLU(), nn.ConvTranspose2d(inner, outer, 4, 2, 1), *up]
            to_sites = (nn.Flatten(2), Transpose(), nn.Flatten(1))  # [B, size, rows, columns] -> [B, Z]
            to_maps = (nn.Unflatten(1, (sites, size)), Transpose(), nn.Unflatten(2, (rows, columns)))
            self.encoder = nn.Sequential(*down, nn.Conv2d(64, size, 4, 2, 1), *to_sites)
            self.decoder = nn.Sequential(*to_maps, nn.ConvTranspose2d(size, 64, 4, 2, 1), *up)
        else:
            self.obs_stats = RunningMeanStd(shape)
            self.encoder = nn.Sequential(nn.Linear(shape[0], 64), nn.ReLU(), nn.Linear(64, self.size))
            self.decoder = nn.Sequential(nn.Linear(self.size, 64), nn.ReLU(), nn.Linear(64, shape[0]))
        if quantizer == "fsq":
            self.encoder.append(nn.Tanh())

    def normalize(self, obs: Tensor) -> Tensor:
        """What is encoded, and what the decoder gives: images [..., C, height, width] in [-0.5, 0.5], or vectors."""
        if self.image:
            return obs.movedim(-1, -3).float() / 255 - 0.5
        return self.obs_stats.normalize(obs).clamp(-10, 10)

    def encode(self, obs: Tensor) -> Tensor:
        """obs [..., *shape] -> [..., Z], before it is quantised."""
        batch = obs.shape[: -len(self.shape)]
        return self.encoder(self.normalize(obs).flatten(0, len(batch) - 1)).unflatten(0, batch)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z.flatten(0, -2)).unflatten(0, z.shape[:-1])


class Transpose(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


# --- memory


def rotation(position: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Cosines and sines [2, ..., 1, size / 2] of rotary positions (Su et al. 2021, arXiv 2104.09864)."""
    frequency = 10_000 ** (-torch.arange(size // 2, device=position.device, dtype=dtype) / (size // 2))
    angle = (position[..., None].to(dtype) * frequency).unsqueeze(-2)
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x: Tensor, turned: Tensor) -> Tensor:
    """Queries or keys [..., heads, E] turned by the rotation of their positions."""
    (cos, sin), (a, b) = turned, x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


class Block(nn.Module):
    """A transformer block, normalised before attention and MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def project(self, x: Tensor, turned: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, L, W] -> queries [B, L, heads, E]; keys and values [B, L, 2, heads, E]. Queries and keys are turned."""
        query, key, value = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return rotate(query, turned), torch.stack((rotate(key, turned), value), -3)

    def attend(self, x: Tensor, query: Tensor, seen: Tensor, mask: Tensor) -> Tensor:
        """Tokens x [B, L, W] with their queries, over S keys and values; mask [B, L, S] is true where one may look."""
        key, value = seen.transpose(1, 3).unbind(2)  # each [B, heads, S, E]
        found = F.scaled_dot_product_attention(query.transpose(1, 2), key, value, mask.unsqueeze(1))
        x = x + self.out(found.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class Cache(NamedTuple):
    """What each layer has seen: keys and values of the last `context` - 1 tokens, newest last. What is older than the
    episode is ignored."""

    seen: tuple[Tensor, ...]  # of each layer [B, context - 1, 2, heads, E]
    age: Tensor  # [B] steps since the episode's start, of the next token

    def map(self, change: Callable[[Tensor], Tensor]) -> "Cache":
        return Cache(tuple(map(change, self.seen)), change(self.age))


class Memory(nn.Module):
    """A causal transformer over tokens (z_t, a_{t-1}) -> h_t. In every layer a token sees the last `context` tokens of
    its episode, so that h_t depends on the `prefix` = layers x (context - 1) steps before and no others (detail 2)."""

    def __init__(self, latent: int, action: int, args: Args):
        super().__init__()
        self.width, self.heads, self.context = args.memory_width, args.memory_heads, args.context
        self.prefix = args.memory_layers * (args.context - 1)
        self.latent, self.action = nn.Linear(latent, self.width), nn.Linear(action, self.width, bias=False)
        self.blocks = nn.ModuleList(Block(self.width, self.heads) for _ in range(args.memory_layers))
        self.norm = nn.LayerNorm(self.width)

    def forward(self, z: Tensor, previous: Tensor, age: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Whole sequences: z [B, L, Z], previous actions [B, L, E] (zeros at an episode's start), age [B, L] steps
        since that start (negative: padding) -> h [B, L, W]; keys and values of each layer [B, L, 2, heads, E]."""
        x = self.latent(z) + self.action(previous)
        step = torch.arange(x.shape[1], device=x.device)
        behind = step[:, None] - step  # [L, L]
        mask = (behind >= 0) & (behind < self.context) & (behind <= age[..., None])  # [B, L, L]
        mask = mask | (behind == 0)  # padding sees itself: a softmax over nothing would be NaN
        turned, seen = rotation(age, self.width // self.heads, x.dtype), []
        for block in self.blocks:
            query, own = block.project(x, turned)
            seen.append(own)
            x = block.attend(x, query, own, mask)
        return self.norm(x), seen

    def step(self, z: Tensor, previous: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """One token of each sequence: z [B, Z], previous action [B, E] -> h [B, W] and the next cache."""
        x = (self.latent(z) + self.action(previous)).unsqueeze(1)  # [B, 1, W]
        behind = torch.arange(self.context - 1, -1, -1, device=x.device)  # of each key
        mask = (behind <= cache.age[:, None]).unsqueeze(1)  # [B, 1, context]
        turned, seen = rotation(cache.age[:, None], self.width // self.heads, x.dtype), []
        for block, before in zip(self.blocks, cache.seen, strict=True):
            query, own = block.project(x, turned)
            both = torch.cat((before, own), 1)  # [B, context, 2, heads, E]
            seen.append(both[:, 1:])
            x = block.attend(x, query, both, mask)
        return self.norm(x)[:, 0], Cache(tuple(seen), cache.age + 1)

    def empty_cache(self, n: int) -> Cache:
        weight = self.norm.weight
        nothing = weight.new_zeros(n, self.context - 1, 2, self.heads, self.width // self.heads)
        return Cache((nothing,) * len(self.blocks), torch.zeros(n, dtype=torch.int64, device=weight.device))

    def cache(self, seen: list[Tensor], age: Tensor) -> Cache:
        """What the token behind a pass of `forward` needs; age [B] is its own."""
        pad, length = (0, 0) * 3 + (self.context - 1, 0), seen[0].shape[1]
        return Cache(tuple(F.pad(layer, pad)[:, length:] for layer in seen), age)


# --- agent


def init_linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def controller(inputs: int, outputs: int, gain: float, kind: str) -> nn.Sequential:
    if kind == "linear":
        return nn.Sequential(init_linear(inputs, outputs, gain))
    hidden = []
    for a, b in ((inputs, 128), (128, 64)):
        hidden += [init_linear(a, b, math.sqrt(2)), nn.LayerNorm(b), nn.ReLU()]
    return nn.Sequential(*hidden, init_linear(64, outputs, gain))


class Unrolled(NamedTuple):
    """What the networks make of observations [B, L, ...]."""

    z: Tensor  # [B, L, Z] latents
    commitment: Tensor  # [B, L]
    h: Tensor  # [B, L, W]
    params: Tensor  # [B, L, P]
    values: Tensor  # [B, L]
    seen: list[Tensor]  # keys and values of each layer [B, L, 2, heads, E]


class Agent(nn.Module):
    """vision (observation <-> latent z), memory (z, action -> h), model (h, action -> what comes next), and policy and
    value of (z, h), with the running statistics of value targets.

    Values are normalised; `return_stats.denormalize` gives them in units of reward. Distribution parameters [..., P]
    are logits, side by side for MultiDiscrete, or means then log standard deviations of the actions before tanh.
    """

    def __init__(self, shape: tuple[int, ...], action_space: gym.Space, args: Args):
        super().__init__()
        box = isinstance(action_space, Box)
        num_params = int(np.prod(action_space.shape)) if box else sum(choices(action_space))
        self.return_stats = RunningMeanStd((), memory=100_000)
        self.latent_stats = RunningMeanStd((), memory=100_000)
        self.vision = Vision(shape, args.quantizer)
        self.memory = Memory(self.vision.size, num_params, args)
        features = self.vision.size + args.memory_width
        self.model = nn.Sequential(
            nn.Linear(args.memory_width + num_params, 256), nn.ReLU(), nn.Linear(256, self.vision.size + 2)
        )
        nn.init.zeros_(self.model[-1].weight)
        nn.init.zeros_(self.model[-1].bias)
        self.log_std = nn.Parameter(torch.full((num_params,), -0.5)) if box else None
        self.actor = controller(features, num_params, 0.01, args.controller)
        self.critic = controller(features, 1, 1.0, args.controller)

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

    def step(
        self, obs: Tensor, previous: Tensor, cache: Cache, action_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Cache]:
        """One step of N environments: obs [N, *shape], previous actions [N, E] -> latents [N, Z], h [N, W], parameters
        [N, P], values [N], next cache."""
        z = self.vision.quantizer(self.vision.encode(obs))[0]
        h, cache = self.memory.step(z, previous, cache)
        return z, h, *self.control(z, h, action_mask), cache

    def unroll(self, obs: Tensor, previous: Tensor, age: Tensor, action_mask: Tensor | None = None) -> Unrolled:
        """Whole sequences, as Memory.forward takes them: obs [B, L, *shape], action_mask [B, L, P]."""
        z, _, commitment = self.vision.quantizer(self.vision.encode(obs))
        h, seen = self.memory(z, previous, age)
        return Unrolled(z, commitment, h, *self.control(z, h, action_mask), seen)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Weights by what they belong to."""
        groups = {"vision": [], "memory": [], "controller": []}
        for name, weight in self.named_parameters():
            first = name.split(".")[0]
            groups["memory" if first == "model" else first if first in groups else "controller"].append(weight)
        return groups

    @torch.no_grad()
    def update_statistics(self, obs: Tensor, returns: Tensor, generator: torch.Generator | None = None) -> None:
        """Merges obs [M, *shape] and returns [M], moves the codebook if there is a generator, and rescales critic and
        reward head so that what they say in units of reward stays the same (details 1 and 8; PopArt, arXiv 1602.07714,
        eq. 9)."""
        mean, std, last = self.return_stats.mean.clone(), self.return_stats.std.clone(), self.critic[-1]
        if generator is not None and not self.vision.image:
            self.vision.obs_stats.update(obs)
        x = self.vision.encode(obs)
        if generator is not None:
            self.vision.quantizer.update(x, generator)
        self.latent_stats.update(self.vision.quantizer(x)[0].flatten())
        self.return_stats.update(returns)
        last.weight.mul_(std / self.return_stats.std)
        last.bias.copy_((std * last.bias + mean - self.return_stats.mean) / self.return_stats.std)
        for weight in (self.model[-1].weight, self.model[-1].bias):
            weight[-2] *= std / self.return_stats.std


def choices(space: gym.Space) -> list[int]:
    """Numbers of choices of a discrete action: [n], or one for each entry of a MultiDiscrete."""
    return [int(space.n)] if isinstance(space, Discrete) else [int(n) for n in space.nvec.flat]


def sample(params: Tensor, space: gym.Space, generator: torch.Generator | None = None) -> Tensor:
    """Actions [..., A], of a Box before tanh; without a generator, the most likely ones."""
    if isinstance(space, Box):
        mean, log_std = params.chunk(2, -1)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device) if generator else 0
        return mean + log_std.exp() * noise
    actions = []
    for logits in params.split(choices(space), -1):
        exponential = torch.empty_like(logits).exponential_(generator=generator) if generator else torch.ones(())
        gumbel = -(exponential + 1e-20).log()  # the maximum of logits + Gumbel noise is a sample of their softmax
        actions.append((logits + gumbel).argmax(-1, keepdim=True))
    return torch.cat(actions, -1)


def log_slope(x: Tensor) -> Tensor:
    """log of tanh'(x), exactly, where 1 - tanh(x)^2 would be 0 in floating point."""
    return 2 * (math.log(2) - x - F.softplus(-2 * x))


HERMITE = [torch.tensor(x, dtype=torch.float32) for x in np.polynomial.hermite_e.hermegauss(16)]  # points, weights


def logprob_entropy(params: Tensor, action: Tensor, space: gym.Space) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [...] for params [..., P], actions [..., A]: densities of tanh(action) for a Box,
    whose entropy is that of a Gaussian plus the mean of log_slope, by Gauss-Hermite quadrature (detail 6)."""
    if isinstance(space, Box):
        mean, log_std = params.chunk(2, -1)
        gaussian = -0.5 * ((action - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
        points, weights = (x.to(mean) for x in HERMITE)
        slope = log_slope(mean[..., None] + log_std.exp()[..., None] * points) @ weights / math.sqrt(2 * math.pi)
        entropy = log_std + 0.5 * math.log(2 * math.pi * math.e) + slope
        return (gaussian - log_slope(action)).sum(-1), entropy.sum(-1)
    logprob, entropy = 0, 0
    for i, logits in enumerate(params.split(choices(space), -1)):
        logprobs = logits.log_softmax(-1)
        logprob = logprob + logprobs.gather(-1, action[..., i : i + 1]).squeeze(-1)
        entropy = entropy - (logprobs.exp() * logprobs).sum(-1)
    return logprob, entropy


def cross_entropy(params: Tensor, target: Tensor, space: gym.Space) -> Tensor:
    """Of the policy `params` under the policy `target`, both [..., P] -> [...]; of a Box, before tanh."""
    if isinstance(space, Box):
        (mean, log_std), (target_mean, target_log_std) = params.chunk(2, -1), target.chunk(2, -1)
        spread = (2 * target_log_std).exp() + (target_mean - mean) ** 2
        return (0.5 * spread * (-2 * log_std).exp() + log_std).sum(-1)
    pairs = zip(params.split(choices(space), -1), target.split(choices(space), -1), strict=True)
    return -sum((wanted.softmax(-1) * logits.log_softmax(-1)).sum(-1) for logits, wanted in pairs)


# --- planning


@torch.no_grad()
def action_values(
    agent: Agent, z: Tensor, h: Tensor, cache: Cache, action: Tensor, args: Args, space: gym.Space, rng: torch.Generator
) -> Tensor:
    """Q [N, K] of candidate actions [N, K, A], in standard deviations of returns: the model imagines what follows under
    the policy for `planning_horizon` steps; then comes the value."""
    shape, num_candidates = action.shape[:2], action.shape[1]
    z, h, action = z.repeat_interleave(num_candidates, 0), h.repeat_interleave(num_candidates, 0), action.flatten(0, 1)
    cache, total, discount = cache.map(lambda x: x.repeat_interleave(num_candidates, 0)), 0.0, 1.0
    for _ in range(args.planning_horizon):
        taken = encode_action(action, space)
        z, reward, goes_on = agent.imagine(z, h, taken)
        total, discount = total + discount * reward, discount * args.gamma * goes_on.sigmoid()
        z = agent.vision.quantizer(z)[0]
        h, cache = agent.memory.step(z, taken, cache)
        params, value = agent.control(z, h)
        action = sample(params, space, rng)
    mean = agent.return_stats.mean / agent.return_stats.std
    return (total + discount * (value + mean)).view(shape)


def steer(params: Tensor, action: Tensor, q: Tensor, beta: float, space: gym.Space) -> Tensor:
    """Parameters [N, P] of the planned policy, proportional to the policy times exp(beta Q) (detail 4).

    Discrete: logits + beta (Q - mean of Q under the policy), the completed-Q form of Gumbel MuZero (Danihelka et al.
    2022). Box: candidates [N, K, A] drawn from the policy weigh exp(beta Q); the Gaussian moves as their mean does, and
    its spread changes as theirs, unbiased, by a factor of at most 2. Equal Q change nothing.
    """
    if isinstance(space, Discrete):
        return params + beta * (q - (params.softmax(-1) * q).sum(-1, keepdim=True))
    mean, log_std = params.chunk(2, -1)
    weight = (beta * q).softmax(-1).unsqueeze(-1)  # [N, K, 1]
    center, new_center = action.mean(1), (weight * action).sum(1)  # [N, A]
    variance = action.var(1).clamp(min=1e-12)
    new_variance = (weight * (action - new_center[:, None]) ** 2).sum(1) / (1 - weight.square().sum(1)).clamp(min=1e-6)
    wider = 0.5 * (new_variance / variance).clamp(0.25, 4).log()
    return torch.cat((mean + new_center - center, log_std + wider), -1)


def plan(
    agent: Agent,
    z: Tensor,
    h: Tensor,
    params: Tensor,
    cache: Cache,
    beta: float,
    args: Args,
    space: gym.Space,
    rng: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Parameters [N, P] of the planned policy, and the best candidate action [N, A]."""
    if isinstance(space, Discrete):
        action = torch.arange(int(space.n), device=z.device).expand(len(z), -1).unsqueeze(-1)  # [N, K, 1]
    else:
        action = sample(params.unsqueeze(1).expand(-1, args.planning_samples, -1), space, rng)  # [N, K, A]
    q = action_values(agent, z, h, cache, action, args, space, rng)
    forbidden = params <= torch.finfo(params.dtype).min if isinstance(space, Discrete) else torch.zeros_like(q).bool()
    best = q.masked_fill(forbidden, -math.inf).argmax(-1)
    return steer(params, action, q, beta, space), action[torch.arange(len(z)), best]


# --- rollout


class Rollout:
    """T steps of N environments, behind the `prefix` P steps before them that the memory looks back on. Row t of the
    arrays [T, N, ...] belongs to step t, row P + t of `obs`, `previous` and `age` [P + T, N, ...] too."""

    def __init__(
        self,
        args: Args,
        agent: Agent,
        action_space: gym.Space,
        masked: bool,
        device: torch.device,
        before: "Rollout | None" = None,
    ):
        def empty(*shape: int, dtype: torch.dtype = torch.float32, rows: int = args.num_steps) -> Tensor:
            return torch.zeros(rows, args.num_envs, *shape, dtype=dtype, device=device)

        box = isinstance(action_space, Box)
        size = int(np.prod(action_space.shape)) if box else sum(choices(action_space))
        self.prefix = agent.memory.prefix
        rows = self.prefix + args.num_steps
        self.obs = empty(*agent.vision.shape, dtype=torch.uint8 if agent.vision.image else torch.float32, rows=rows)
        self.previous = empty(size, rows=rows)  # the action before, encoded; zeros at an episode's start
        self.age = empty(dtype=torch.int64, rows=rows).fill_(-1)  # steps since the episode's start; -1: no such step
        if before is not None:
            for name in ("obs", "previous", "age"):
                getattr(self, name)[: self.prefix] = getattr(before, name)[args.num_steps :]
        self.action_mask = empty(size, dtype=torch.bool) if masked else None
        self.action = empty(int(np.prod(action_space.shape)), dtype=torch.float32 if box else torch.int64)
        self.logprob = empty()  # of the policy
        self.behaviour = empty(2 * size if box else size)  # parameters of the planned policy, which acted …
        self.behaviour_logprob = empty()  # … and its log-probability of what it did
        self.value = empty()  # in units of reward
        self.next_value = empty()  # V of the observation after the step, also where it is the episode's last (detail 5)
        self.reward = empty()
        self.terminated = empty(dtype=torch.bool)
        self.truncated = empty(dtype=torch.bool)

    @property
    def done(self) -> Tensor:
        return self.terminated | self.truncated

    def columns(self, chosen: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
        """obs, previous and age of some environments, as Agent.unroll takes them: [B, P + T, ...]."""
        return tuple(x[:, chosen].transpose(0, 1) for x in (self.obs, self.previous, self.age))


@dataclass
class Carry:
    """Where the environments stand between two rollouts."""

    obs: Tensor  # [N, *shape]
    previous: Tensor  # [N, E]
    cache: Cache
    action_mask: Tensor | None  # [N, P] bool
    returns: np.ndarray  # [N] of the running episodes
    lengths: np.ndarray  # [N]


def finite(x: np.ndarray, what: str) -> np.ndarray:
    if not np.isfinite(x).all():
        raise FloatingPointError(f"an environment returned a non-finite {what}: {x}")
    return x


def observe(envs: VectorEnv, obs, infos: dict, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Observations [N, *shape] and the action mask [N, P] of `infos["action_mask"]`, if the environment gives one."""
    image = len(obs_shape(envs.single_observation_space)) == 3
    array = np.array(obs) if image else flatten(envs.single_observation_space, obs)
    seen = torch.from_numpy(finite(array, "observation")).to(device)
    if "action_mask" not in infos:
        return seen, None
    action_mask = torch.from_numpy(np.asarray(infos["action_mask"])).bool().to(device)  # [N, P]
    allowed = [part.any(-1) for part in action_mask.split(choices(envs.single_action_space), -1)]
    if not torch.stack(allowed).all():
        raise ValueError(f"environment {(~torch.stack(allowed).all(0)).nonzero()[0, 0]} allows no action at all")
    return seen, action_mask


def final_observation(envs: VectorEnv, infos: dict, n: int, device: torch.device) -> Tensor:
    space, obs = envs.single_observation_space, infos["final_obs"][n]
    flat = np.array(obs) if len(obs_shape(space)) == 3 else gym.spaces.flatten(space, obs).astype(np.float32)
    return torch.from_numpy(finite(flat, "final observation")).to(device)


def step_envs(envs: VectorEnv, action: np.ndarray) -> tuple:
    try:
        return envs.step(action)
    except (EOFError, BrokenPipeError, ConnectionResetError) as error:
        if not isinstance(envs, AsyncVectorEnv):
            raise
        for process in envs.processes:  # Gymnasium's close would wait for the dead one
            process.terminate()
        envs.closed = True
        raise RuntimeError("the process of an environment died") from error


def reset(envs: VectorEnv, agent: Agent, seed: int) -> Carry:
    obs, infos = envs.reset(seed=seed)
    cache = agent.memory.empty_cache(envs.num_envs)
    obs, action_mask = observe(envs, obs, infos, cache.age.device)
    previous = agent.memory.norm.weight.new_zeros(envs.num_envs, agent.memory.action.in_features)
    return Carry(obs, previous, cache, action_mask, np.zeros(envs.num_envs), np.zeros(envs.num_envs, int))


def advance(carry: Carry, taken: Tensor, cache: Cache, reward: np.ndarray, done: np.ndarray) -> None:
    """Moves all but observation and mask on by a step in which `taken` [N, E] was done. After an episode's end the next
    one has no past."""
    ended = torch.from_numpy(done).to(taken.device)
    carry.previous = taken * ~ended[:, None]
    carry.cache = cache._replace(age=cache.age.masked_fill(ended, 0))
    carry.returns, carry.lengths = carry.returns + reward, carry.lengths + 1


@torch.inference_mode()
def collect(
    envs: VectorEnv, agent: Agent, rollout: Rollout, carry: Carry, beta: float, args: Args, generator: torch.Generator
) -> list:
    """Fills the rollout, moves `carry` on, and gives (return, length) of each episode that ended on the way. The policy
    is steered by plans if beta is above 0."""
    space, device, episodes = envs.single_action_space, carry.obs.device, []
    for t in range(args.num_steps):
        z, h, params, value, cache = agent.step(carry.obs, carry.previous, carry.cache, carry.action_mask)
        behaviour = plan(agent, z, h, params, cache, beta, args, space, generator)[0] if beta else params
        action = sample(behaviour, space, generator)
        row = rollout.prefix + t
        rollout.obs[row], rollout.previous[row], rollout.age[row] = carry.obs, carry.previous, carry.cache.age
        rollout.action[t], rollout.behaviour[t], rollout.value[t] = action, behaviour, value
        if rollout.action_mask is not None:
            rollout.action_mask[t] = carry.action_mask
        rollout.logprob[t] = logprob_entropy(params, action, space)[0]
        rollout.behaviour_logprob[t] = logprob_entropy(behaviour, action, space)[0] if beta else rollout.logprob[t]
        if t:
            rollout.next_value[t - 1] = torch.where(rollout.done[t - 1], rollout.next_value[t - 1], value)

        obs, reward, terminated, truncated, infos = step_envs(envs, env_action(action, space))
        carry.obs, carry.action_mask = observe(envs, obs, infos, device)
        rollout.reward[t] = torch.from_numpy(finite(reward, "reward"))
        rollout.terminated[t], rollout.truncated[t] = torch.from_numpy(terminated), torch.from_numpy(truncated)
        taken = encode_action(action, space)
        if truncated.any():  # their last observations count as any other
            last = torch.stack([final_observation(envs, infos, n, device) for n in np.flatnonzero(truncated)])
            cut = rollout.truncated[t]
            rollout.next_value[t, cut] = agent.step(last, taken[cut], cache.map(lambda x, cut=cut: x[cut]))[3]
        advance(carry, taken, cache, reward, terminated | truncated)
        for n in np.flatnonzero(terminated | truncated):
            episodes.append((float(carry.returns[n]), int(carry.lengths[n])))
            carry.returns[n], carry.lengths[n] = 0, 0
    value = agent.step(carry.obs, carry.previous, carry.cache, carry.action_mask)[3]
    rollout.next_value[-1] = torch.where(rollout.done[-1], rollout.next_value[-1], value)
    for values in (rollout.value, rollout.next_value):
        values.copy_(agent.return_stats.denormalize(values))
    return episodes


@torch.no_grad()
def rebuild_cache(agent: Agent, rollout: Rollout, carry: Carry) -> None:
    """Recomputes the keys and values that the next step looks back on, with weights and statistics as they now are."""
    last = agent.memory.prefix + 1  # `prefix` rows would do, but there may be none
    seen = agent.unroll(*(x[:, -last:] for x in rollout.columns(slice(None)))).seen
    carry.cache = agent.memory.cache(seen, carry.cache.age)


# --- loss


def a2c_loss(
    agent: Agent, rollout: Rollout, chosen: Tensor, space: gym.Space, beta: float, args: Args, num_steps: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of the environments `chosen` [B], and metrics: sums over their steps divided by `num_steps`, the steps of an
    average minibatch, so that every step of the rollout weighs the same.

    policy + vf_coef value - ent_coef entropy + distill_coef beta distillation + vision_coef vision + memory_coef memory
    """

    def take(x: Tensor) -> Tensor:
        return x[:, chosen].transpose(0, 1)  # [B, T, ...]

    masks = None
    if rollout.action_mask is not None:
        masks = F.pad(take(rollout.action_mask), (0, 0, rollout.prefix, 0), value=True)
    unrolled = agent.unroll(*rollout.columns(chosen), masks)
    z, commitment, h, params, value = (part[:, rollout.prefix :] for part in unrolled[:-1])  # [B, T, ...]
    logprob, entropy = logprob_entropy(params, take(rollout.action), space)
    log_ratio, advantage = logprob - take(rollout.logprob), take(rollout.advantages)
    ratio = log_ratio.exp()
    importance = (take(rollout.logprob) - take(rollout.behaviour_logprob)).exp()
    weight = importance.clamp(max=args.importance_cap)

    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    terms = {
        "policy_loss": weight * torch.max(-advantage * ratio, -advantage * clipped),
        "value_loss": 0.5 * (value - agent.return_stats.normalize(take(rollout.returns))) ** 2,
        "vision_loss": vision_loss(agent, take(rollout.obs[rollout.prefix :]), z, commitment),
        "memory_loss": memory_loss(agent, rollout, chosen, z, h, space),
    }
    if beta:
        terms["distill_loss"] = beta * cross_entropy(params, take(rollout.behaviour), space)
    per_step = terms | {
        "entropy": entropy,
        "old_approx_kl": importance * -log_ratio,
        "approx_kl": importance * (ratio - 1 - log_ratio),  # http://joschu.net/blog/kl-approx.html
        "clipfrac": ((ratio - 1).abs() > args.clip_coef).float(),
        "importance": weight,
    }
    metrics = {name: x.sum() / num_steps for name, x in per_step.items()}
    weights = {"vision_loss": args.vision_coef} if args.stage != "memory" else {}
    weights |= {"memory_loss": args.memory_coef} if args.stage != "vision" else {}
    if args.stage == "all":
        weights |= {"policy_loss": 1.0, "value_loss": args.vf_coef, "distill_loss": args.distill_coef}
        weights |= {"entropy": -args.ent_coef}
    loss = sum(coefficient * metrics[name] for name, coefficient in weights.items() if name in metrics)
    metrics["ratio_error"] = (ratio - 1).abs().max()
    return loss, {f"losses/{name}": x.detach() for name, x in metrics.items()}


def vision_loss(agent: Agent, obs: Tensor, z: Tensor, commitment: Tensor) -> Tensor:
    """Mean squared error of the reconstruction, and commitment to the codes: obs [B, T, *shape] -> [B, T]."""
    error = agent.vision.decode(z) - agent.vision.normalize(obs)
    return error.square().flatten(2).mean(-1) + 0.25 * commitment


def memory_loss(agent: Agent, rollout: Rollout, chosen: Tensor, z: Tensor, h: Tensor, space: gym.Space) -> Tensor:
    """Of the model's next latent (relative to the variance of latents, and without gradient to the target), reward and
    continue flag, [B, T]. An episode's last step has no next latent, and only termination is its end (detail 3)."""
    action, reward, terminated, done = (
        x[:, chosen].transpose(0, 1) for x in (rollout.action, rollout.reward, rollout.terminated, rollout.done)
    )
    next_z, next_reward, goes_on = agent.imagine(z.detach(), h, encode_action(action, space))
    error = (next_z[:, :-1] - z[:, 1:].detach()).square().mean(-1) / agent.latent_stats.std**2
    error = F.pad(error * ~done[:, :-1], (0, 1))
    reward_error = (next_reward - reward / agent.return_stats.std) ** 2
    return error + reward_error + F.binary_cross_entropy_with_logits(goes_on, (~terminated).to(z), reduction="none")


# --- imagination


class Dream(NamedTuple):
    """M starts in sequences of the past, and the K steps that followed."""

    imagined: Tensor  # [M, K, Z] latents that the model gave for the actions that were taken
    actual: Tensor  # [M, K, Z]
    start: Tensor  # [M, Z]
    mask: Tensor  # [M, K] bool: still in the episode of the start


@torch.no_grad()
def open_loop(agent: Agent, obs: Tensor, previous: Tensor, age: Tensor, starts: range, steps: int) -> Dream:
    """Imagines `steps` steps from each of the rows `starts` of sequences [B, L, ...], without looking again."""
    unrolled, rows = agent.unroll(obs, previous, age), torch.tensor(starts, device=obs.device)
    caches = [agent.memory.cache([seen[:, : s + 1] for seen in unrolled.seen], age[:, s] + 1) for s in starts]
    layers = zip(*(cache.seen for cache in caches), strict=True)
    cache = Cache(tuple(map(torch.cat, layers)), torch.cat([cache.age for cache in caches]))  # M = starts x B
    z, h = (x[:, rows].transpose(0, 1).flatten(0, 1) for x in (unrolled.z, unrolled.h))  # [M, ...]
    start, imagined, ahead = z, [], torch.arange(1, steps + 1, device=obs.device)
    for k in range(1, steps + 1):
        action = previous[:, rows + k].transpose(0, 1).flatten(0, 1)
        z = agent.vision.quantizer(agent.imagine(z, h, action)[0])[0]
        h, cache = agent.memory.step(z, action, cache)
        imagined.append(z)
    later = rows[:, None] + ahead  # [starts, K]
    actual = unrolled.z[:, later].transpose(0, 1).flatten(0, 1)
    mask = (age[:, later] == age[:, rows, None] + ahead).transpose(0, 1).flatten(0, 1)
    return Dream(torch.stack(imagined, 1), actual, start, mask)


def forecast_skill(agent: Agent, rollout: Rollout, steps: int = 20) -> Tensor:
    """1 - MSE of imagined latents / MSE of "nothing changes", by steps ahead [K], on a rollout that nothing has learnt
    from yet. NaN where no episode is that long."""
    num_steps = len(rollout.reward)
    steps = min(steps, num_steps - 1)
    starts = range(rollout.prefix, rollout.prefix + num_steps - steps, max(1, num_steps // 8))
    dream = open_loop(agent, *rollout.columns(slice(None)), starts, steps)
    error, persistence = (
        ((x - dream.actual).square().mean(-1) * dream.mask).sum(0) for x in (dream.imagined, dream.start[:, None])
    )
    error, persistence = all_sum(error), all_sum(persistence)
    return torch.where(persistence > 0, 1 - error / persistence, math.nan)


class Episode(NamedTuple):
    """Of an evaluation, as Agent.unroll takes it."""

    obs: Tensor  # [1, L, *shape]
    previous: Tensor  # [1, L, E]
    age: Tensor  # [1, L]


@torch.no_grad()
def dream_of(agent: Agent, episode: Episode, start: int, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """What was, its reconstruction, and what is imagined from row `start` on: normalised observations [K, ...] each."""
    dream = open_loop(agent, *episode, range(start, start + 1), steps)
    obs = episode.obs[0, start + 1 : start + 1 + steps]
    return agent.vision.normalize(obs), agent.vision.decode(dream.actual[0]), agent.vision.decode(dream.imagined[0])


def picture(image: Tensor) -> np.ndarray:
    """A normalised image [C, height, width] as [height, width, C] of bytes."""
    return ((image.movedim(0, -1).clamp(-0.5, 0.5) + 0.5) * 255).to(torch.uint8).cpu().numpy()


def dream_figure(agent: Agent, episode: Episode, names: list[str]):
    """A matplotlib figure of an episode: images in three rows (real, reconstructed, imagined from the first on), or
    lines of up to four entries with what is imagined from several steps."""
    from matplotlib.figure import Figure

    length = episode.obs.shape[1]
    if agent.vision.image:
        steps = min(24, length // 2)
        rows = dream_of(agent, episode, length - steps - 1, steps)
        figure = Figure(figsize=(12, 5), layout="constrained")
        for axes, images, label in zip(figure.subplots(3, 8), rows, ("real", "reconstructed", "imagined"), strict=True):
            for axis, k in zip(axes, np.linspace(0, steps - 1, 8).astype(int), strict=True):
                axis.imshow(picture(images[k]).squeeze(), cmap="gray")
                axis.set(xticks=[], yticks=[], xlabel=f"{k + 1} steps ahead")
            axes[0].set_ylabel(label)
        return figure
    shown = min(4, len(names))
    figure = Figure(figsize=(10, 2.5 * shown), layout="constrained")
    axes = np.atleast_1d(figure.subplots(shown))
    whole = dream_of(agent, episode, 0, length - 1)
    for i, axis in enumerate(axes):
        axis.plot(range(1, length), whole[0][:, i].cpu(), color="black", label="real")
        axis.plot(range(1, length), whole[1][:, i].cpu(), ".", markersize=2, label="reconstructed")
        axis.set_ylabel(f"{names[i]} (std)")
    for start in range(0, length - 1, max(1, length // 5)):
        steps = min(20, length - 1 - start)
        imagined = dream_of(agent, episode, start, steps)[2]
        for i, axis in enumerate(axes):
            axis.plot(range(start + 1, start + 1 + steps), imagined[:, i].cpu(), label=f"imagined from {start}")
    axes[0].legend(fontsize="small", ncols=4)
    axes[-1].set_xlabel("step of the episode")
    return figure


def write_dream(agent: Agent, episode: Episode, names: list[str], path: str, longest: int = 100) -> None:
    """A GIF: an episode beside its reconstruction and what the model imagines from a fifth of it on."""
    from PIL import Image

    length = episode.obs.shape[1]
    start = length // 5
    views = dream_of(agent, episode, start, min(longest, length - 1 - start))
    if agent.vision.image:
        arrays = [np.concatenate([picture(view) for view in frame], 1).squeeze() for frame in zip(*views, strict=True)]
        frames = [Image.fromarray(a).resize((4 * a.shape[1], 4 * a.shape[0]), Image.Resampling.NEAREST) for a in arrays]
    else:
        frames = [line_frame(views, names, k) for k in range(1, len(views[0]) + 1)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=80, loop=0)


def line_frame(views: tuple[Tensor, ...], names: list[str], k: int):
    """The first k steps of up to four entries, as an image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(6, 6), dpi=60, layout="constrained")
    for i, axis in enumerate(np.atleast_1d(figure.subplots(min(4, len(names))))):
        for view, label in zip(views, ("real", "reconstructed", "imagined"), strict=True):
            axis.plot(view[:k, i].cpu(), label=label)
        axis.set(xlim=(0, len(views[0])), ylim=(-3, 3), ylabel=names[i])
    figure.axes[0].legend(fontsize="small", ncols=3)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


# --- evaluate


class Evaluation(NamedTuple):
    returns: np.ndarray  # [E] in the order in which the episodes ended
    lengths: np.ndarray  # [E]
    longest: Episode | None  # if recorded


@torch.no_grad()
def evaluate(
    agent: Agent,
    args: Args,
    policy: str = "policy",
    beta: float = 0.0,
    record: bool = False,
    video_dir: Path | None = None,
) -> Evaluation:
    """Plays `eval_episodes` episodes, as many on each environment (a fixed time would favour short ones). Policies are
    `policy`; `both`: steered by plans; `planner`: the action whose imagined value is highest; `memoryless`: the policy
    without any past; `random`."""
    num_envs, seed = min(args.eval_episodes, args.num_envs), args.seed + 1_000_000_000
    envs = make_envs(args, num_envs, video_dir)
    envs.action_space.seed(seed)
    space, carry = envs.single_action_space, reset(envs, agent, seed)
    generator = torch.Generator(carry.obs.device).manual_seed(seed)
    left = np.array([len(range(n, args.eval_episodes, num_envs)) for n in range(num_envs)])  # episodes to play
    seen, ended, longest = [[] for _ in range(num_envs)], [], None
    while left.any():
        if policy == "memoryless":
            carry.previous, carry.cache = carry.previous * 0, carry.cache._replace(age=carry.cache.age * 0)
        z, h, params, _, cache = agent.step(carry.obs, carry.previous, carry.cache, carry.action_mask)
        if policy in ("both", "planner"):
            params, best = plan(agent, z, h, params, cache, beta, args, space, generator)
        action = best if policy == "planner" else sample(params, space, None if args.eval_deterministic else generator)
        for n in range(num_envs) if record else ():
            seen[n].append((carry.obs[n], carry.previous[n]))
        if policy != "random":
            taken = env_action(action, space)
        elif carry.action_mask is None:
            taken = envs.action_space.sample()
        else:  # uniform over what is allowed
            taken = env_action(sample(carry.action_mask.float().log(), space, generator), space)
        obs, reward, terminated, truncated, infos = step_envs(envs, taken)
        carry.obs, carry.action_mask = observe(envs, obs, infos, carry.obs.device)
        advance(carry, encode_action(action, space), cache, reward, terminated | truncated)
        for n in np.flatnonzero(terminated | truncated):
            if left[n] > 0:
                left[n] -= 1
                ended.append((carry.returns[n], carry.lengths[n]))
                if record and (longest is None or len(seen[n]) > longest.obs.shape[1]):
                    columns = [torch.stack(part)[None] for part in zip(*seen[n], strict=True)]
                    longest = Episode(*columns, torch.arange(len(seen[n]), device=carry.obs.device)[None])
            carry.returns[n], carry.lengths[n], seen[n] = 0, 0, []
    envs.close()
    returns, lengths = np.array(ended).T
    return Evaluation(returns, lengths, longest)


# --- save, load


@dataclass
class Progress:
    """Counters of a run, saved with it."""

    global_step: int = 0
    update: int = 0
    skill: float = 0.0  # of forecasts `planning_horizon` steps ahead: a moving average over rollouts
    best: float = -math.inf  # mean return of the best evaluation
    recent: list[float] = field(default_factory=list)  # returns of the last 100 training episodes
    random: float = math.nan  # mean return of random actions
    before: float = math.nan  # mean return of the untrained agent

    def beta(self, args: Args) -> float:
        """How much plans steer the policy: not at all until the model forecasts better than "nothing changes"."""
        off = args.planning == "off" or args.stage != "all"
        return 0.0 if off else args.planning_beta * max(0.0, self.skill)


def save(path: Path, parts: dict, progress: Progress, args: Args) -> None:
    """Writes a checkpoint of tensors and plain types; a crash at any moment leaves the old file or the new one."""
    state = {name: part.get_state() if name.startswith("rng") else part.state_dict() for name, part in parts.items()}
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(state | {"progress": asdict(progress), "args": asdict(args)}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


SHAPE = ["quantizer", "controller", "memory_width", "memory_heads", "memory_layers", "context"]  # of the networks


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
    for name in ["env_id", "env_kwargs", "stage", *SHAPE] if args else ():
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


def transfer(agent: Agent, state: dict, args: Args) -> None:
    """Takes those weights of a checkpoint whose names and shapes fit, and names the others. What its stage has trained
    must fit, and so must vision if memory is to learn from it."""
    own, saved = agent.state_dict(), state["args"]
    fitting = {name: x for name, x in state["agent"].items() if name in own and own[name].shape == x.shape}
    torn = {name.rpartition(".")[0] for name in own.keys() - fitting.keys()}  # whose statistics would be half theirs
    if saved["env_id"] != args.env_id:
        torn.add("return_stats")
    fitting = {name: x for name, x in fitting.items() if "stats" not in name or name.rpartition(".")[0] not in torn}
    needed = {"vision": ("vision",), "memory": ("vision", "memory", "model"), "all": ()}[saved["stage"]]
    if args.stage == "memory":
        needed = {"vision", *needed}
    missing = [name for name in own if name.split(".")[0] in needed and name not in fitting]
    if needed and (missing or saved["env_id"] != args.env_id):
        same = {"env_id": args.env_id, **{name: getattr(args, name) for name in SHAPE}}
        other = ", ".join(f"{name} {saved[name]} instead of {x}" for name, x in same.items() if saved[name] != x)
        raise InputError(f"{args.init_from}, of --stage {saved['stage']}, does not fit: {other or missing[0]}")
    agent.load_state_dict(own | fitting)
    for name in own.keys() - fitting.keys():
        print(f"not taken from the checkpoint: {name}", file=sys.stderr)


def assess(agent: Agent, args: Args, beta: float, run_dir: Path, closing: bool) -> tuple[dict[str, float], Evaluation]:
    """Evaluates the weights: as `planning` says and, in the closing one, policy alone, planner alone and both."""
    policy = "both" if args.planning == "always" and beta else "policy"
    played = evaluate(
        agent, args, policy, beta, record=True, video_dir=run_dir / "videos" if args.capture_video else None
    )
    scores = {
        "eval/episodic_return": played.returns.mean(),
        "eval/episodic_return_std": played.returns.std(),
        "eval/episodic_length": played.lengths.mean(),
        "eval/return_memoryless": evaluate(agent, args, "memoryless").returns.mean(),
    }
    for other in ("policy", "planner", "both") if closing and beta else ():
        again = played if other == policy else evaluate(agent, args, other, beta)
        scores[f"eval/return_{other}"] = again.returns.mean()
    return {name: float(score) for name, score in scores.items()}, played


def vision_metrics(agent: Agent, rollout: Rollout) -> dict[str, float]:
    """Share of codes in use, perplexity of their distribution, peak signal-to-noise ratio of reconstructions (dB)."""
    obs = rollout.obs[rollout.prefix :]
    with torch.no_grad():
        z, index, _ = agent.vision.quantizer(agent.vision.encode(obs))
        error = (agent.vision.decode(z) - agent.vision.normalize(obs)).square().mean()
    used, perplexity = zip(*(usage(part) for part in index.flatten(0, -2).unbind(-1)), strict=True)
    peak = 1.0 if agent.vision.image else float(agent.vision.normalize(obs).abs().max())
    return {
        "vision/usage": float(np.mean(used)) / agent.vision.quantizer.codes,
        "vision/perplexity": float(np.mean(perplexity)),
        "vision/psnr": 10 * math.log10(peak**2 / max(float(error), 1e-12)),
        "vision/rmse": float(error.sqrt()),
    }


def usage(index: Tensor) -> tuple[int, float]:
    """Of code indices [M]: how many there are, and the exponential of their entropy."""
    share = index.unique(return_counts=True)[1] / len(index)
    return len(share), float((-(share * share.log()).sum()).exp())


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
        "planning_beta": progress.beta(args),
    }
    extra = ("eval/return_p", "eval/return_both", "model/", "vision/")
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


def sum_and_clip(groups: dict[str, list[nn.Parameter]], max_norm: float) -> dict[str, Tensor]:
    """Sums gradients over processes and clips them; gives the norms that they had, or raises if one is not finite."""
    weights = [weight for group in groups.values() for weight in group if weight.grad is not None]
    for weight in weights:
        all_sum(weight.grad)
    norms = {
        f"gradients/{name}": nn.utils.get_total_norm([weight.grad for weight in group if weight.grad is not None])
        for name, group in groups.items()
    }
    return norms | {"losses/grad_norm": nn.utils.clip_grad_norm_(weights, max_norm, error_if_nonfinite=True)}


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
    torch.manual_seed(args.seed)  # initial weights; whatever is random later draws from a generator
    agent = Agent(obs_shape(envs.single_observation_space), space, args).to(device)
    learning = {"vision": ["vision"], "memory": ["memory"], "all": ["vision", "memory", "controller"]}[args.stage]
    groups = {name: weights for name, weights in agent.parts().items() if name in learning}
    weights = [weight for group in groups.values() for weight in group]
    agent.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.Adam(weights, args.learning_rate, eps=1e-5, fused=True)
    rng = torch.Generator(device).manual_seed(args.seed + rank)
    parts, progress = {"agent": agent, "optimizer": optimizer, "rng": rng}, Progress()
    if args.evaluate or args.resume:
        needed = {"agent": agent} if args.evaluate else parts
        progress = restore(needed, load(args.evaluate or f"{args.resume}/checkpoint.pt", args))
        if rank > 0:  # the checkpoint holds the generator of rank 0
            rng.manual_seed(args.seed + rank + progress.global_step)
    if args.evaluate:
        envs.close()
        run_dir = Path(args.evaluate).parent
        scores, played = assess(agent, args, progress.beta(args), run_dir, closing=True)
        if args.dream and played.longest.obs.shape[1] > 1:
            write_dream(agent, played.longest, names, args.dream)
        return summary(scores, progress, args, run_dir)
    if progress.global_step >= args.total_timesteps:
        raise InputError(f"{args.resume} has its {progress.global_step} steps: --total-timesteps says how far to go")
    if args.init_from:
        transfer(agent, load(args.init_from), args)
    if rank == 0 and not args.resume:
        progress.random = float(evaluate(agent, args, "random").returns.mean())
        progress.before = float(evaluate(agent, args).returns.mean())
    run_dir, writer = open_run(args, progress) if rank == 0 else (None, None)
    bar = progress_bar(args, progress, rank)
    rollout, steps_per_update, steps_done = None, world * args.num_envs * args.num_steps, 0
    seconds, stop = 0.0, False
    try:
        carry = reset(envs, agent, args.seed + rank * args.num_envs + 1000 * progress.update)
        while progress.global_step < args.total_timesteps and not stop:
            # --- rollout, advantages
            started = time.perf_counter()
            remaining = 1 - progress.global_step / args.total_timesteps if args.anneal_lr else 1.0
            optimizer.param_groups[0]["lr"] = args.learning_rate * remaining
            beta = progress.beta(args)
            rollout = Rollout(args, agent, space, carry.action_mask is not None, device, rollout)
            episodes = collect(envs, agent, rollout, carry, beta, args, rng)
            values, ends = (rollout.value, rollout.next_value), (rollout.terminated, rollout.truncated)
            advantages, returns = gae(rollout.reward, *values, *ends, args.gamma, args.gae_lambda)
            if args.norm_adv:
                mean = all_sum(advantages.mean()) / world
                std = (all_sum((advantages - mean).square().mean()) / world).sqrt()
                advantages = (advantages - mean) / (std + 1e-8)
            rollout.advantages, rollout.returns = advantages, returns
            skill = forecast_skill(agent, rollout)

            # --- update; the first rollout only gives the statistics (detail 8)
            batch_size = steps_per_update / args.num_minibatches
            log = []  # metrics of each minibatch
            for _ in range(args.update_epochs if agent.return_stats.count else 0):
                order = torch.randperm(args.num_envs, generator=rng, device=device)
                for chosen in order.tensor_split(args.num_minibatches):
                    loss, metrics = a2c_loss(agent, rollout, chosen, space, beta, args, batch_size)
                    optimizer.zero_grad()
                    loss.backward()
                    norms = sum_and_clip(groups, args.max_grad_norm)
                    optimizer.step()
                    log.append(metrics | {name: norm / world for name, norm in norms.items()})
                if args.target_kl and mean_metrics(log[-args.num_minibatches :])["losses/approx_kl"] > args.target_kl:
                    break
            scalars = mean_metrics(log)

            # --- statistics, codebook, cache (details 1, 2, 8)
            obs = rollout.obs[rollout.prefix :].flatten(0, 1)
            agent.update_statistics(obs, returns.flatten(), rng if args.stage != "memory" else None)
            rebuild_cache(agent, rollout, carry)
            at_horizon = float(skill[min(args.planning_horizon, len(skill)) - 1])
            if log and math.isfinite(at_horizon):
                progress.skill += 0.3 * (at_horizon - progress.skill)
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
                del scalars["losses/ratio_error"]
                scalars["losses/first_ratio_error"] = error = float(log[0]["losses/ratio_error"])
                if error > 1e-3:
                    warnings.warn("rollout and update compute different log-probabilities", stacklevel=1)
            scalars["losses/explained_variance"] = 1 - float((returns - rollout.value).var() / returns.var())
            scalars |= {"charts/learning_rate": args.learning_rate * remaining, "charts/SPS": steps_done / seconds}
            scalars |= {f"model/skill_k{k}": float(skill[k - 1]) for k in (1, 5, 20) if k <= len(skill)}
            scalars |= vision_metrics(agent, rollout) | {"planning/beta": beta}
            recent = np.mean(progress.recent or [math.nan])
            bar.set_postfix_str(f"{scalars['charts/SPS']:.0f} steps/s, return {recent:.1f}", refresh=False)
            bar.update(steps_per_update)
            closing = progress.global_step >= args.total_timesteps
            due = closing or (args.checkpoint_every and progress.update % args.checkpoint_every == 0)
            if stop or due:
                save(run_dir / "checkpoint.pt", parts, progress, args)
            if due and not stop:
                scores, played = assess(agent, args, progress.beta(args), run_dir, closing)
                scalars |= scores
                if played.longest.obs.shape[1] > 1:
                    figure = dream_figure(agent, played.longest, names)
                    figure.savefig(run_dir / "dream.png", dpi=100)
                    writer.add_figure("world/dream", figure, progress.global_step)
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
    unfinished = progress.global_step < args.total_timesteps
    return {} if rank > 0 or unfinished else summary(scalars, progress, args, run_dir)


def main() -> None:
    args = tyro.cli(Args)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    try:
        if source := args.evaluate or (args.resume and f"{args.resume}/checkpoint.pt"):
            given = {"evaluate": args.evaluate, "resume": args.resume, "init_from": None, "dream": args.dream}
            args = tyro.cli(Args, default=Args(**load(source)["args"] | given))
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
