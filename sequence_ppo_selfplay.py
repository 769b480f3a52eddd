"""Sequence PPO and sequence REINFORCE, trained by self-play in two-player zero-sum games with hidden information.

A sequence is all that one player saw and did in one game, in order. The data goes one way:

    games.observe -> Net.step (policy only, no gradients) -> games.act, until the update's games have ended (`play`)
    decisions -> Sequences, one behind the other [K]; the payoff belongs to each player's last own decision
    Sequences -> batches of similar length [L, B] -> values -> gae or discounted returns -> advantages, returns [K]
    batches -> chunks of bptt_length steps -> Agent.unroll (one call, state carried and detached) -> sequence_loss
    the policy's weights -> a slowly moving reference, which the loss pulls towards; snapshots, which become opponents

PPO is Schulman et al. 2017, arXiv 1707.06347; the reference is magnetic mirror descent, Sokota et al. 2022, arXiv
2206.05825. Numbers such as `detail 5` refer to docs/sequence_ppo_selfplay.md.
"""

import copy
import difflib
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
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyspiel
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.gae import gae
from environments.games import Turn
from environments.openspiel import Level, OpenSpielGames, exploitability


@dataclass
class Args:
    # --- run
    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the run folder's name"""
    seed: int = 1
    """seed of games, networks and sampling; on OpenSpiel the same seed gives the same run on one machine"""
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
    against: str | None = None
    """with --evaluate, the only opponent: a checkpoint of the same network and width, random or, on Showdown, max_power
    or heuristic"""
    eval_episodes: int = 200
    """games against each opponent of an evaluation, half of them in each seat"""
    eval_deterministic: bool = False
    """play evaluations' games with the most likely actions; with hidden information the best policy is mostly mixed"""
    eval_average: bool = False
    """play evaluations' games with the moving average of the policy's weights"""

    # --- environment
    env_id: str = "leduc_poker"
    """a two-player zero-sum game of OpenSpiel, or a singles format of Pokémon Showdown such as gen9randombattle"""
    env_kwargs: str = "{}"
    """parameters of the OpenSpiel game, as JSON"""
    server: str = "start"
    """Showdown only: `start` runs a server on this machine, ws://host:port uses a running one"""
    ko_coef: float = 0.0
    """Showdown only: reward for each Pokémon that faints on the other side, and its loss for each own; winning is 1"""
    hp_coef: float = 0.0
    """Showdown only: the same for hit points, in units of one Pokémon's full ones"""
    save_replays: bool = False
    """Showdown only: with --evaluate, save the battles as HTML to `replays/` in the run folder"""

    # --- self-play
    opponents: str = "self:1"
    """shares of the games against: self (both sides are trained on), past (snapshots), random, max_power, heuristic"""
    past_sampling: Literal["uniform", "recent", "prioritised"] = "uniform"
    """which snapshots are met: all alike, the later half, or rather those that beat the learner"""
    snapshot_every: int = 200_000
    """games between snapshots"""
    snapshot_winrate: float = 0.6
    """also take one when the last 100 games against the newest are won this often (Showdown), or surely won (others)"""
    pool_size: int = 16
    """snapshots to keep; when there are more, every second one is dropped"""
    elo_games: int = 50
    """games of each pairing of the final evaluation's round robin; 0 = no Elo"""

    # --- PPO or REINFORCE
    algorithm: Literal["ppo", "reinforce"] = "ppo"
    """reinforce: one pass over all games in one minibatch, with discounted returns to go"""
    baseline: bool = True
    """subtract the value from REINFORCE's returns"""
    total_timesteps: int = 8_000_000
    """decisions to train on, over all processes"""
    learning_rate: float = 3e-3
    """Adam's step size"""
    anneal_lr: bool = True
    """lower the learning rate, and ref_rate with it, linearly to 0"""
    num_envs: int = 2048
    """games that each process plays at once; some 10 to 25 on Showdown"""
    games_per_update: int = 2048
    """games that each process plays, to their end, between updates"""
    gamma: float = 1.0
    """discount factor"""
    gae_lambda: float = 0.5
    """lambda of generalised advantage estimation"""
    num_minibatches: int = 8
    """minibatches per epoch"""
    update_epochs: int = 1
    """passes over the games of an update"""
    norm_adv: bool = True
    """normalise the advantages of each update"""
    clip_coef: float = 0.2
    """clip range of the probability ratio"""
    ent_coef: float = 0.05
    """weight of the entropy bonus at the start"""
    ent_coef_final: float = 0.02
    """weight of the entropy bonus at the end, reached linearly"""
    ref_kl_coef: float = 0.2
    """weight of the KL divergence from policy to reference policy"""
    ref_rate: float = 0.01
    """how far the reference's weights move towards the current ones in each update; annealed like the learning rate"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 5.0
    """largest norm of the gradient"""
    target_kl: float | None = None
    """stop an update after an epoch whose mean approximate KL exceeds this; None = never"""

    # --- network
    network: Literal["lstm", "attention", "lstm_attention", "mlp"] = "lstm"
    """memory of policy and value (a net each): LSTM, causal attention over the own decisions so far, both, or none"""
    sequence: bool = True
    """False: every decision starts from an empty memory, as in PPO without recurrence"""
    hidden_size: int = 64
    """width of the networks"""
    bptt_length: int = 0
    """steps through which gradients flow; 0 = the whole game, -1 = as many as fit memory_budget_mb"""
    memory_budget_mb: int = 500
    """memory for the activations of one batch, for --bptt-length -1"""


SHOWDOWN = {  # other defaults where --env-id is a format of Pokémon Showdown, whose battles are long and slow
    "checkpoint_every": 20,
    "eval_episodes": 40,
    "ko_coef": 0.1,
    "hp_coef": 0.1,
    "opponents": "self:0.8,past:0.2",
    "snapshot_every": 1000,
    "elo_games": 0,
    "total_timesteps": 490_000,
    "learning_rate": 7e-4,
    "num_envs": 25,
    "games_per_update": 64,
    "gamma": 0.995,
    "gae_lambda": 0.9,
    "num_minibatches": 8,
    "update_epochs": 4,
    "ent_coef": 0.02,
    "ent_coef_final": 0.005,
    "ref_kl_coef": 0.0,
    "hidden_size": 128,
}


class InputError(Exception):
    """The user asked for something that cannot be done; the message is one line."""


def check(args: Args) -> None:
    """Raises InputError, with one clear line, for whatever can be known to fail before any work is done."""

    def need(ok: bool, message: str) -> None:
        if not ok:
            raise InputError(message)

    above_zero = ["total_timesteps", "num_envs", "games_per_update", "num_minibatches", "update_epochs", "pool_size"]
    above_zero += ["learning_rate", "max_grad_norm", "torch_threads", "hidden_size", "eval_episodes", "snapshot_every"]
    above_zero += ["target_kl"] * (args.target_kl is not None)
    at_most_one = ["gamma", "gae_lambda", "ref_rate", "snapshot_winrate"]
    not_negative = ["seed", "checkpoint_every", "vf_coef", "clip_coef", "ko_coef", "hp_coef", "elo_games", *at_most_one]
    for name in [*above_zero, *not_negative, "ent_coef", "ent_coef_final", "ref_kl_coef", "memory_budget_mb"]:
        value, flag = getattr(args, name), "--" + name.replace("_", "-")
        need(value > 0 or name not in above_zero, f"{flag} must be above 0, not {value}")
        need(value >= 0, f"{flag} must not be negative, not {value}")
        need(value <= 1 or name not in at_most_one, f"{flag} must be at most 1, not {value}")
    need(args.bptt_length >= -1, "--bptt-length must be a number of steps, 0 (whole games) or -1 (automatic)")
    need(args.hidden_size % HEADS == 0, f"--hidden-size must be a multiple of {HEADS}")
    need(args.pool_size >= 2, "--pool-size must be at least 2: the oldest and the newest snapshot stay")
    need(args.num_minibatches <= args.games_per_update, "--num-minibatches must not exceed --games-per-update")
    exclusive = [args.resume, args.init_from, args.evaluate]
    need(sum(map(bool, exclusive)) <= 1, "--resume, --init-from and --evaluate exclude each other")
    need(args.evaluate or not args.against, "--against needs --evaluate")
    shares = opponent_shares(args)
    scripted = SCRIPTED if is_showdown(args) else ()
    for name, share in shares.items():
        need(name in ("self", "past", "random", *scripted), f"--opponents: {args.env_id} has no opponent {name}")
        need(share >= 0, f"--opponents: the share of {name} is negative")
    need(sum(shares.values()) > 0, "--opponents: all shares are 0")
    is_player = args.against in (None, "random", *scripted) or Path(args.against).is_file()
    need(is_player, f"--against {args.against}: neither a checkpoint nor one of {', '.join(('random', *scripted))}")


def opponent_shares(args: Args) -> dict[str, float]:
    """`self:0.7,past:0.3` -> the share of each kind of opponent."""
    try:
        return {name.strip(): float(share) for name, share in (part.split(":") for part in args.opponents.split(","))}
    except ValueError as error:
        raise InputError(f"--opponents {args.opponents}: expected name:share,name:share,…") from error


# --- environment

EVAL_SEED = 1_000_000_000  # games of evaluations
SCRIPTED = ("max_power", "heuristic")  # poke-env's players, on Showdown


def is_showdown(args: Args) -> bool:
    return args.env_id.startswith("gen")


def make_games(args: Args, seed: int, replay_dir: Path | None = None):
    """The backend, with `num_envs` slots; environments/games.py says what it does."""
    try:
        if is_showdown(args):
            if not importlib.util.find_spec("poke_env"):
                raise InputError("Showdown needs poke-env: pip install -r requirements-envs.txt")
            from environments.showdown import ShowdownGames

            return ShowdownGames(args.env_id, args.num_envs, args.server, seed, args.ko_coef, args.hp_coef, replay_dir)
        known = pyspiel.registered_names()
        if args.env_id not in known:
            near = ", ".join(difflib.get_close_matches(args.env_id, known)) or "leduc_poker, kuhn_poker, liars_dice"
            raise InputError(f"no game {args.env_id}; near: {near}; on Showdown: gen9randombattle")
        return OpenSpielGames(args.env_id, args.num_envs, seed, json.loads(args.env_kwargs))
    except (ValueError, TypeError, OSError, pyspiel.SpielError) as error:
        raise InputError(f"{args.env_id}: {' '.join(str(error).split())}") from error


def all_sum(x: Tensor) -> Tensor:
    """The sum of x over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


# --- network

HEADS = 4


def init_linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class State(NamedTuple):
    """What N players remember of their games. Networks without an LSTM or attention leave its part empty."""

    lstm: Tensor  # [N, 2, H] h and c
    keys: Tensor  # [N, C, H] of the decisions so far; entries from `count` on are garbage
    values: Tensor  # [N, C, H]
    count: Tensor  # [N] decisions so far

    def take(self, rows: Tensor) -> "State":
        return State(*(x[rows] for x in self))

    def put(self, rows: Tensor, new: "State") -> "State":
        """These rows replaced, in place unless the caches have to grow."""
        grow = (0, 0, 0, new.keys.shape[1] - self.keys.shape[1])
        state = State(self.lstm, F.pad(self.keys, grow), F.pad(self.values, grow), self.count) if grow[3] else self
        for old, x in zip(state, new, strict=True):
            old[rows] = x
        return state

    def detach(self) -> "State":
        return State(*(x.detach() for x in self))


class Attention(nn.Module):
    """Causal self-attention (Vaswani et al. 2017) with layer norm before it and a residual connection around it."""

    def __init__(self, size: int):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.qkv = init_linear(size, 3 * size, gain=1.0)
        self.out = init_linear(size, size, gain=1.0)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, count: Tensor) -> tuple[Tensor, ...]:
        """x [L, N, H], caches [N, C, H], count [N] -> the same, after L more steps."""
        position = count[:, None] + torch.arange(len(x), device=x.device)  # [N, L]
        frequencies = 10_000 ** -torch.linspace(0, 1, x.shape[-1] // 2, dtype=x.dtype, device=x.device)
        angle = position[..., None] * frequencies  # [N, L, H / 2]
        x = x.transpose(0, 1)  # [N, L, H]
        q, k, v = self.qkv(self.norm(x) + torch.cat((angle.sin(), angle.cos()), -1)).chunk(3, -1)
        keys, values = write(keys, position, k), write(values, position, v)  # [N, C, H]
        visible = torch.arange(keys.shape[1], device=x.device) <= position[..., None]  # [N, L, C]
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (q, keys, values))  # [N, heads, L or C, …]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None]).transpose(1, 2).flatten(-2)  # [N, L, H]
        return (x + self.out(y)).transpose(0, 1), keys, values, count + q.shape[2]


def write(cache: Tensor, position: Tensor, new: Tensor) -> Tensor:
    """A copy of a cache [N, C, H] with new [N, L, H] at position [N, L]; it grows where it has to."""
    cache = F.pad(cache, (0, 0, 0, max(0, int(position.max()) + 1 - cache.shape[1])))
    return cache.scatter(1, position[..., None].expand_as(new), new)


class Net(nn.Module):
    """encoder -> LSTM and/or attention -> feed-forward layer (without it if there is an LSTM alone) -> head."""

    def __init__(self, obs_size: int, outputs: int, head_gain: float, args: Args):
        super().__init__()
        self.size = args.hidden_size
        self.encoder = nn.Sequential(init_linear(obs_size, self.size, gain=math.sqrt(2)), nn.Tanh())
        self.lstm = nn.LSTM(self.size, self.size) if "lstm" in args.network else None
        for name, weight in self.lstm.named_parameters() if self.lstm else ():
            nn.init.zeros_(weight) if "bias" in name else nn.init.orthogonal_(weight)
        self.attention = Attention(self.size) if "attention" in args.network else None
        mlp = nn.Sequential(init_linear(self.size, self.size, gain=math.sqrt(2)), nn.Tanh())
        self.mlp = mlp if args.network != "lstm" else None
        self.head = init_linear(self.size, outputs, head_gain)

    def initial_state(self, n: int) -> State:
        like = self.head.weight
        lstm = like.new_zeros(n, 2, self.size if self.lstm else 0)
        cache = like.new_zeros(n, 0, self.size if self.attention else 0)
        return State(lstm, cache, cache, torch.zeros(n, dtype=torch.int64, device=like.device))

    def step(self, obs: Tensor, state: State) -> tuple[Tensor, State]:
        """One decision of N players: obs [N, D] -> outputs [N, outputs], state after it."""
        outputs, state = self.unroll(obs[None], state)
        return outputs[0], state

    def unroll(self, obs: Tensor, state: State) -> tuple[Tensor, State]:
        """L decisions of N players: obs [L, N, D], state before the first -> outputs [L, N, outputs], state after."""
        lstm, keys, values, count = state
        x = self.encoder(obs)
        if self.lstm:
            h, c = lstm.unbind(1)  # each [N, H]
            x, (h, c) = self.lstm(x, (h[None].contiguous(), c[None].contiguous()))
            lstm = torch.stack((h[0], c[0]), 1)
        if self.attention:
            x, keys, values, count = self.attention(x, keys, values, count)
        if self.mlp:
            x = self.mlp(x)
        return self.head(x), State(lstm, keys, values, count)


class Agent(nn.Module):
    """A policy and a value, each with a net of its own. Values are in units of the game's largest payoff."""

    def __init__(self, obs_size: int, unseen_size: int, num_actions: int, args: Args):
        super().__init__()
        self.policy = Net(obs_size, num_actions, 0.01, args)
        self.value = Net(obs_size + unseen_size, 1, 1.0, args)

    def initial_state(self, n: int) -> tuple[State, State]:
        return self.policy.initial_state(n), self.value.initial_state(n)

    def unroll(
        self, obs: Tensor, unseen: Tensor, state: tuple[State, State], action_mask: Tensor
    ) -> tuple[Tensor, Tensor, tuple[State, State]]:
        """obs [L, B, D], unseen [L, B, E], mask [L, B, A] -> log-probabilities [L, B, A], values [L, B], states."""
        logits, policy_state = self.policy.unroll(obs, state[0])
        values, value_state = self.value.unroll(torch.cat((obs, unseen), -1), state[1])
        return masked_logprobs(logits, action_mask), values.squeeze(-1), (policy_state, value_state)


def masked_logprobs(logits: Tensor, action_mask: Tensor) -> Tensor:
    """Log-probabilities [..., A]; what is not allowed has probability 0 and no gradient (detail 5)."""
    return logits.masked_fill(~action_mask, torch.finfo(logits.dtype).min).log_softmax(-1)


def sample(logprobs: Tensor, generator: torch.Generator | None) -> Tensor:
    """Actions [N] of log-probabilities [N, A]; without a generator, the most likely ones."""
    if generator is None:
        return logprobs.argmax(-1)
    exponential = torch.empty_like(logprobs).exponential_(generator=generator)
    return (logprobs - (exponential + 1e-20).log()).argmax(-1)  # Gumbel noise: the maximum is a sample


def with_last_action(obs: Tensor, last_action: Tensor, num_actions: int) -> Tensor:
    """Observations [N, D] and the player's own last action [N] (-1 = none), one-hot -> [N, D + A] (detail 2)."""
    one_hot = F.one_hot(last_action + 1, num_actions + 1)[:, 1:]
    return torch.cat((obs, one_hot.to(obs.dtype)), 1)


# --- games and sequences


@dataclass(eq=False)
class Player:
    name: str  # random, one of SCRIPTED, or any name of a net
    net: Net | None = None
    sequence: bool = True  # False: the net forgets before every decision
    deterministic: bool = False


class Decisions(NamedTuple):
    """M decisions that were made at the same time."""

    sequence: Tensor  # [M] which sequence they belong to
    obs: Tensor  # [M, D + A]
    unseen: Tensor  # [M, E] what the critic sees besides
    action_mask: Tensor  # [M, A]
    action: Tensor  # [M]
    logprob: Tensor  # [M]
    reward: Tensor  # [M] since the previous decision of the sequence


class Sequences:
    """K decisions in S sequences, one behind the other: sequence s is the rows from first[s] on, length[s] of them."""

    def __init__(self, decisions: list[Decisions], last_reward: Tensor):
        """Sorts decisions into sequences. `last_reward` [sequences] follows each one's last decision; NaN drops it."""
        sequence, *columns, reward = (torch.cat(column) for column in zip(*decisions, strict=True))
        order = sequence.argsort(stable=True)  # decisions come in the order of time
        order = order[last_reward[sequence[order]].isfinite()]
        self.obs, self.unseen, self.action_mask, self.action, self.logprob = (column[order] for column in columns)
        number, self.length = sequence[order].unique_consecutive(return_counts=True)
        self.first = self.length.cumsum(0) - self.length  # [S]
        self.reward = reward[order].roll(-1)  # what came before the next decision is this one's (detail 3)
        self.reward[self.first + self.length - 1] = last_reward[number]
        self.value = self.advantages = self.returns = torch.empty(0)  # [K]
        self.reference = torch.empty(0)  # [K, A] log-probabilities of the reference policy


def grid(first: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers [L, B] of sequences, padded with their last, and a mask of what is not padding."""
    step = torch.arange(int(length.max()), device=length.device)[:, None]  # [L, 1]
    return first + torch.minimum(step, length - 1), step < length


def batches(first: Tensor, length: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Sequences sorted by length and cut into batches wherever they fall below 0.7 of the batch's longest: row numbers
    [L, B] and a mask of what is not padding (detail 4)."""
    order = length.argsort(descending=True, stable=True)
    lengths, begin = length[order].tolist(), 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or lengths[end] < 0.7 * lengths[begin]:
            yield grid(first[order[begin:end]], length[order[begin:end]])
            begin = end


class Seats:
    """Who sits where and what they remember; row 2 * slot + player of everything."""

    def __init__(self, num_games: int, pairs: list[tuple[Player, Player]], device: torch.device):
        self.players = list({player: None for pair in pairs for player in pair})
        self.who = np.zeros(2 * num_games, int)  # an index into players
        self.sequence = torch.zeros(2 * num_games, dtype=torch.int64, device=device)
        self.last_action = torch.full((2 * num_games,), -1, device=device)
        nets = [player.net for player in self.players if player.net]
        self.state = nets[0].initial_state(2 * num_games) if nets else None

    def begin(self, slot: int, pair: tuple[Player, Player], game: int) -> None:
        both = slice(2 * slot, 2 * slot + 2)
        self.who[both] = [self.players.index(player) for player in pair]
        self.sequence[both] = 2 * game + torch.arange(2, device=self.sequence.device)
        self.last_action[both] = -1
        if self.state:
            self.state.lstm[both], self.state.count[both] = 0, 0

    def decide(
        self, games, turn: Turn, generator: torch.Generator, learner: Player | None
    ) -> tuple[Tensor, Decisions | None]:
        """Actions [M] of everybody whose turn it is, and the decisions of the learner."""
        device, decisions = generator.device, None
        seat, obs, action_mask, reward = (torch.from_numpy(x).to(device) for x in turn[:4])
        obs = with_last_action(obs, self.last_action[seat], games.num_actions)
        if not torch.isfinite(obs).all():
            raise FloatingPointError("a game returned a non-finite observation")
        if len(stuck := (~action_mask.any(1)).nonzero()):
            raise ValueError(
                f"the game in slot {int(seat[stuck[0]]) // 2} allows player {int(seat[stuck[0]]) % 2} no action"
            )
        action, logits = torch.zeros_like(seat), torch.zeros_like(action_mask, dtype=obs.dtype)
        for i in np.unique(self.who[turn.seat]):
            player, rows = self.players[i], torch.from_numpy(np.flatnonzero(self.who[turn.seat] == i)).to(device)
            if player.name in games.scripted:
                action[rows] = torch.tensor([games.choose(player.name, s) for s in seat[rows].tolist()], device=device)
                continue
            if player.net:
                before = self.state.take(seat[rows]) if player.sequence else player.net.initial_state(len(rows))
                logits[rows], after = player.net.step(obs[rows], before)
                self.state = self.state.put(seat[rows], after) if player.sequence else self.state
            logprobs = masked_logprobs(logits[rows], action_mask[rows])
            action[rows] = sample(logprobs, None if player.deterministic else generator)
            if player is learner:
                logprob = logprobs.gather(1, action[rows, None])[:, 0]
                unseen = obs[:, :0] if turn.unseen is None else torch.from_numpy(turn.unseen).to(device)
                columns = self.sequence[seat], obs, unseen, action_mask, action
                decisions = Decisions(*(x[rows] for x in columns), logprob, reward[rows])
        self.last_action[seat] = action
        return action, decisions


@torch.no_grad()
def play(
    games, pairs: list[tuple[Player, Player]], generator: torch.Generator, learner: Player | None = None
) -> tuple[np.ndarray, Sequences | None, int]:
    """Plays a game for every pair of players, as many at once as there are slots. Gives the payoffs [G, 2], the
    sequences of `learner`, and how many games were lost to faults; each of those is played again."""
    seats = Seats(games.num_games, pairs, generator.device)
    payoffs = np.full((len(pairs), 2), np.nan, np.float32)
    waiting, free = deque(range(len(pairs))), deque(range(games.num_games))
    running = {}  # slot -> (pair that plays there, number of the game)
    last_rewards, decisions = [], []  # [2] of each game, in the order of their start; Decisions
    while np.isnan(payoffs).any():
        starting = [free.popleft() for _ in range(min(len(free), len(waiting)))]
        for slot in starting:
            pair, game = running[slot] = waiting.popleft(), len(last_rewards)
            seats.begin(slot, pairs[pair], game)
            last_rewards.append([np.nan, np.nan])
        games.start(starting)
        turn = games.observe()
        for slot, payoff, reward in turn.ended:
            free.append(slot)
            pair, game = running[slot]
            if payoff is None:
                waiting.append(pair)
            else:
                payoffs[pair], last_rewards[game] = payoff, list(reward)
        action, made = seats.decide(games, turn, generator, learner)
        games.act(turn.seat, action.cpu().numpy())
        decisions += [made] if made else []
    rewards = torch.tensor(last_rewards, dtype=torch.float32, device=generator.device).flatten()
    return payoffs, Sequences(decisions, rewards) if decisions else None, len(last_rewards) - len(pairs)


@torch.no_grad()
def add_targets(agent: Agent, reference: Net, data: Sequences, args: Args) -> None:
    """Values and the reference policy's log-probabilities of all decisions, then advantages and returns (detail 3)."""
    data.value = torch.empty_like(data.reward)  # [K]
    data.reference = data.obs.new_empty(data.action_mask.shape)  # [K, A]
    for index, mask in batches(*pieces(data, args)):
        obs, real, n = data.obs[index], index[mask], index.shape[1]
        critic_obs = torch.cat((obs, data.unseen[index]), -1)
        data.value[real] = agent.value.unroll(critic_obs, agent.value.initial_state(n))[0].squeeze(-1)[mask]
        logits, _ = reference.unroll(obs, reference.initial_state(n))
        data.reference[real] = masked_logprobs(logits[mask], data.action_mask[real])
    index, mask = grid(data.first, data.length)  # [L, S]
    last = index == data.first + data.length - 1
    reward, value, never = data.reward[index], data.value[index], torch.zeros_like(last)
    if args.algorithm == "ppo":
        advantages, returns = gae(reward, value, value.roll(-1, 0), last, never, args.gamma, args.gae_lambda)
    else:
        zero = torch.zeros_like(value)
        returns, _ = gae(reward, zero, zero, last, never, args.gamma, 1.0)  # discounted rewards to go
        advantages = returns - value if args.baseline else returns
    data.advantages, data.returns = torch.empty_like(data.reward), torch.empty_like(data.reward)
    data.advantages[index[mask]], data.returns[index[mask]] = advantages[mask], returns[mask]


def pieces(data: Sequences, args: Args) -> tuple[Tensor, Tensor]:
    """First row and length of each piece that goes through the networks: sequences or, without memory, decisions."""
    if args.sequence:
        return data.first, data.length
    return torch.arange(len(data.action), device=data.first.device), torch.ones_like(data.action)


def minibatches(
    first: Tensor, length: Tensor, num_minibatches: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffles the sequences and deals them out."""
    order = torch.randperm(len(first), generator=generator, device=generator.device)
    for chosen in order.tensor_split(num_minibatches):
        yield first[chosen], length[chosen]


def automatic_bptt(first: Tensor, length: Tensor, args: Args, num_features: int) -> int:
    """The most steps whose activations fit `memory_budget_mb` for the largest batch of these sequences; 0 = all. The
    factors were read off the tensors that autograd keeps of both nets (detail 6)."""
    longest, widest = int(length.max()), max(index.shape[1] for index, _ in batches(first, length))
    lstm, attention = "lstm" in args.network, "attention" in args.network
    caches = 4 * longest * args.hidden_size * attention  # floats of a sequence
    per_step = num_features + args.hidden_size * (5 + 33 * lstm + 20 * attention) + 2 * longest * attention
    steps = int((args.memory_budget_mb * 1e6 / 4 / widest - caches) / per_step)
    return 0 if steps >= longest else max(1, steps)


# --- loss


def sequence_loss(
    agent: Agent,
    data: Sequences,
    index: Tensor,
    mask: Tensor,
    state: tuple[State, State],
    args: Args,
    num_steps: float,
    ent_coef: float,
) -> tuple[Tensor, dict[str, Tensor], tuple[State, State]]:
    """PPO's clipped loss, or REINFORCE's, of a chunk of sequences (rows `index` [L, B] of the data, real where `mask`)
    that starts from `state`; metrics; and the state after it. Both are sums over real steps divided by `num_steps`, the
    real steps of an average minibatch, so that every decision weighs the same (detail 4)."""
    real = index[mask]  # [M]
    logprobs, values, state = agent.unroll(data.obs[index], data.unseen[index], state, data.action_mask[index])
    logprobs, value = logprobs[mask], values[mask]  # [M, A], [M]
    probs, advantage = logprobs.exp(), data.advantages[real]
    log_ratio = logprobs.gather(1, data.action[real, None])[:, 0] - data.logprob[real]
    ratio = log_ratio.exp()
    if args.algorithm == "ppo":
        policy_loss = torch.max(-advantage * ratio, -advantage * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef))
    else:
        policy_loss = -advantage * log_ratio
    value_loss = 0.5 * (value - data.returns[real]) ** 2
    entropy = -(probs * logprobs).sum(-1)
    reference_kl = (probs * (logprobs - data.reference[real])).sum(-1)

    loss = policy_loss + args.vf_coef * value_loss - ent_coef * entropy + args.ref_kl_coef * reference_kl
    with torch.no_grad():
        per_step = {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": entropy,
            "reference_kl": reference_kl,
            "old_approx_kl": -log_ratio,
            "approx_kl": ratio - 1 - log_ratio,  # http://joschu.net/blog/kl-approx.html
            "clipfrac": ((ratio - 1).abs() > args.clip_coef).float(),
        }
        metrics = {name: x.sum() / num_steps for name, x in per_step.items()}
        metrics["ratio_error"] = (ratio - 1).abs().max()
        metrics["padding"] = (~mask).sum() / num_steps
    return loss.sum() / num_steps, metrics, state


def accumulate(
    agent: Agent, data: Sequences, first: Tensor, length: Tensor, args: Args, num_steps: float, ent_coef: float
) -> dict[str, Tensor]:
    """Adds a minibatch's gradient to the weights' and gives its metrics. The sequences, from rows `first` [S] on,
    go through the nets in batches of similar length, and these in chunks of `bptt_length` steps; a chunk continues from
    the memory that the one before left, without its gradient, and is backpropagated before the next (detail 1)."""
    bptt, chunks = args.bptt_length, []
    if bptt < 0:
        bptt = automatic_bptt(first, length, args, 2 * data.obs.shape[1] + data.unseen.shape[1])
    for index, mask in batches(first, length):
        memory, size = agent.initial_state(index.shape[1]), bptt or len(index)
        for chunk in zip(index.split(size), mask.split(size), strict=True):
            memory = memory[0].detach(), memory[1].detach()
            loss, metrics, memory = sequence_loss(agent, data, *chunk, memory, args, num_steps, ent_coef)
            loss.backward()
            chunks.append(metrics)
    columns = {name: torch.stack([chunk[name] for chunk in chunks]) for name in chunks[0]}
    totals = {name: column.max() if name == "ratio_error" else column.sum() for name, column in columns.items()}
    return totals | {"bptt_length": torch.tensor(float(bptt), device=first.device)}


# --- opponents


class Pool:
    """Frozen copies of the policy, oldest first, and how the learner fared against them lately."""

    def __init__(self):
        self.players: list[Player] = []
        self.made: list[int] = []  # games played when each was made
        self.recent: list[deque[float]] = []  # the learner's last payoffs against each

    def add(self, net: Net, num_games: int, args: Args) -> None:
        frozen = copy.deepcopy(net).requires_grad_(False)
        self.players.append(Player(f"snapshot_{num_games}", frozen, args.sequence))
        self.made.append(num_games)
        self.recent.append(deque(maxlen=100))
        if len(self.players) > args.pool_size:  # the oldest and the newest stay
            for i in range(len(self.players) - 2, 0, -2):
                del self.players[i], self.made[i], self.recent[i]

    def draw(self, how_many: int, sampling: str, generator: torch.Generator) -> list[Player]:
        """Snapshots to play against, with replacement."""
        weights = torch.ones(len(self.players))
        if sampling == "recent":
            weights[: len(weights) // 2] = 0
        if sampling == "prioritised":  # Vinyals et al. 2019: (1 - win rate)^2; at least a little of each
            rates = [points(recent) if recent else 0.5 for recent in self.recent]
            weights = torch.tensor([(1 - rate) ** 2 + 0.01 for rate in rates])
        chosen = torch.multinomial(weights.to(generator.device), how_many, replacement=True, generator=generator)
        return [self.players[i] for i in chosen.tolist()]

    def record(self, pairs: list[tuple[Player, Player]], payoffs: np.ndarray, learner: Player) -> list[float]:
        """Books the learner's payoffs in these games, [G, 2]; gives those against others than itself."""
        against_others = []
        for pair, payoff in zip(pairs, payoffs.tolist(), strict=True):
            if pair[0] is not pair[1]:
                seat = pair.index(learner)
                against_others.append(payoff[seat])
                if pair[1 - seat] in self.players:
                    self.recent[self.players.index(pair[1 - seat])].append(payoff[seat])
        return against_others

    def is_beaten(self, args: Args) -> bool:
        """The learner beats the newest snapshot in its last 100 games: by win rate on Showdown; elsewhere chance caps
        win rates, and the mean payoff has to be above 0 by two standard errors."""
        if len(recent := self.recent[-1]) < 100:
            return False
        if is_showdown(args):
            return points(recent) >= args.snapshot_winrate
        return np.mean(recent) > 2 * np.std(recent) / math.sqrt(len(recent))

    def state_dict(self) -> dict:
        nets = [player.net.state_dict() for player in self.players]
        return {"made": self.made, "nets": nets, "recent": [list(recent) for recent in self.recent]}

    def load(self, state: dict, net: Net, args: Args) -> None:
        self.__init__()
        for made, weights, recent in zip(*(state[name] for name in ("made", "nets", "recent")), strict=True):
            self.add(net, made, replace(args, pool_size=len(state["made"])))
            self.players[-1].net.load_state_dict(weights)
            self.recent[-1].extend(recent)


def draw_pairs(learner: Player, pool: Pool, args: Args, generator: torch.Generator) -> list[tuple[Player, Player]]:
    """The games of an update. Of the snapshots at most four take part, so that batches stay large."""
    shares = opponent_shares(args)
    weights = torch.tensor(list(shares.values()), device=generator.device)
    kinds = torch.multinomial(weights, args.games_per_update, replacement=True, generator=generator).tolist()
    seats = torch.randint(2, (args.games_per_update,), generator=generator, device=generator.device).tolist()
    past = pool.draw(4, args.past_sampling, generator) if pool.players else [learner]
    others = {"self": [learner], "past": past} | {name: [Player(name)] for name in ("random", *SCRIPTED)}
    pairs = []
    for i, (kind, seat) in enumerate(zip(kinds, seats, strict=True)):
        choice = others[list(shares)[kind]]
        pair = learner, choice[i % len(choice)]  # the drawn snapshots in turn
        pairs.append(pair if seat == 0 else pair[::-1])
    return pairs


def points(payoffs) -> float:
    """The share of games won; a draw is half a win. NaN without games."""
    payoffs = np.asarray(payoffs)
    return float(((payoffs > 0) + 0.5 * (payoffs == 0)).mean()) if len(payoffs) else math.nan


def wilson(rate: float, n: int) -> tuple[float, float]:
    """The 95% interval of a rate among n games (Wilson 1927)."""
    z = 1.96
    middle, width = rate + z**2 / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    return (middle - width) / (1 + z**2 / n), (middle + width) / (1 + z**2 / n)


def elo(score: np.ndarray, games: np.ndarray) -> np.ndarray:
    """Ratings [P], mean 0, that make the observed points most likely: score[i, j] are i's points against j in
    games[i, j] games. The Bradley-Terry model by Hunter's 2004 iteration; a side without any points is given half."""
    score = np.where(games > 0, np.clip(score, 0.5, games - 0.5), 0)
    strength = np.ones(len(score))
    for _ in range(10_000):
        strength = score.sum(1) / (games / (strength[:, None] + strength)).sum(1)
        strength /= np.exp(np.log(strength).mean())
    return 400 * np.log10(strength)


# --- evaluate


def head_to_head(games, a: Player, b: Player, num_games: int, generator: torch.Generator) -> np.ndarray:
    """Payoffs [num_games] of a against b, who change seats after every game."""
    payoffs, _, _ = play(games, [(a, b) if i % 2 == 0 else (b, a) for i in range(num_games)], generator)
    return payoffs[np.arange(num_games), np.arange(num_games) % 2]


def round_robin(games, players: list[Player], num_games: int, generator: torch.Generator) -> np.ndarray:
    """Elo ratings [P] from `num_games` games of every pair."""
    score, count = np.zeros((2, len(players), len(players)))
    rows = [(i, j) for i in range(len(players)) for j in range(len(players)) if i < j for _ in range(num_games)]
    rows = [row if k % 2 == 0 else row[::-1] for k, row in enumerate(rows)]
    payoffs, _, _ = play(games, [(players[i], players[j]) for i, j in rows], generator)
    for (i, j), payoff in zip(rows, payoffs, strict=True):
        score[i, j] += points(payoff[:1])
        score[j, i] += points(payoff[1:])
        count[i, j] += 1
        count[j, i] += 1
    return elo(score, count)


@torch.no_grad()
def policy_tables(net: Net, levels: list[Level], num_actions: int, sequence: bool = True) -> list[np.ndarray]:
    """The policy's distributions [M, A] in all information states of a game, each reached as in play: by the steps
    before it. Without `sequence` it forgets before every decision."""
    tables, state = [], None
    for level in levels:
        last_action = torch.from_numpy(level.action)
        obs = with_last_action(torch.from_numpy(level.obs), last_action, num_actions).to(net.head.weight.device)
        before = state.take(torch.from_numpy(level.parent)) if state and sequence else net.initial_state(len(obs))
        logits, state = net.step(obs, before)
        tables.append(masked_logprobs(logits.cpu(), torch.from_numpy(level.action_mask)).exp().double().numpy())
    return tables


def evaluated(agent: Agent, reference: Net, args: Args) -> Player:
    net = reference if args.eval_average else agent.policy
    return Player("learner", net, args.sequence, args.eval_deterministic)


def assess(games, agent: Agent, reference: Net, pool: Pool, args: Args, final: bool = False) -> dict[str, float]:
    """Exploitability of the policy, of its moving average (the reference) and of the policy without its memory; win
    rates against fixed opponents; at the end also Elo ratings."""
    generator = torch.Generator(agent.value.head.weight.device).manual_seed(args.seed + EVAL_SEED)
    scores = {}
    if levels := [] if is_showdown(args) else games.levels:
        for name, net, sequence in (
            ("exploitability", agent.policy, args.sequence),
            ("exploitability_average", reference, args.sequence),
            ("exploitability_memoryless", agent.policy, False),
        )[: 3 if final else 2]:
            tables = policy_tables(net, levels, games.num_actions, sequence)
            scores[f"selfplay/{name}"] = exploitability(games, levels, tables)
    learner = evaluated(agent, reference, args)
    for name in ("random", *games.scripted):
        payoffs = head_to_head(games, learner, Player(name), args.eval_episodes, generator)
        scores |= match_scores(name, payoffs)
    if final and args.elo_games and pool.players:
        players = [Player("random"), *pool.players, learner]
        ratings = round_robin(games, players, args.elo_games, generator)
        for player, rating in zip(players, ratings - ratings[0], strict=True):
            scores[f"elo/{player.name}"] = rating
        scores["selfplay/elo"] = ratings[-1] - ratings[0]  # above the random player
    scores["eval/episodic_return"] = scores["selfplay/payoff_vs_random"]
    rates = [score for name, score in scores.items() if name.startswith("selfplay/win_rate_vs")]
    scores["eval/score"] = -scores.get("selfplay/exploitability", -np.mean(rates))  # the higher, the better
    return {name: float(score) for name, score in scores.items()}


def match_scores(name: str, payoffs: np.ndarray) -> dict[str, float]:
    """Points and their 95% interval, mean payoff and its standard deviation, against an opponent."""
    rate = points(payoffs)
    low, high = wilson(rate, len(payoffs))
    scores = {"win_rate": rate, "win_rate_low": low, "win_rate_high": high}
    scores |= {"draw_rate": (payoffs == 0).mean(), "payoff": payoffs.mean(), "payoff_std": payoffs.std()}
    return {f"selfplay/{key}_vs_{name}": float(score) for key, score in scores.items()}


def evaluate(args: Args, device: torch.device) -> dict:
    """The closing summary of a checkpoint, played against the usual opponents or only the one of --against."""
    state, run_dir = load(args.evaluate, args), Path(args.evaluate).parent
    with closing(make_games(args, args.seed + EVAL_SEED, run_dir / "replays" if args.save_replays else None)) as games:
        agent = Agent(games.obs_size + games.num_actions, games.unseen_size, games.num_actions, args).to(device)
        reference, pool = copy.deepcopy(agent.policy), Pool()
        progress = restore({"agent": agent, "reference": reference, "pool": pool}, state, args)
        if not args.against:
            return summary(assess(games, agent, reference, pool, args, final=True), progress, args, run_dir)
        learner = evaluated(agent, reference, args)
        generator = torch.Generator(device).manual_seed(args.seed + EVAL_SEED)
        payoffs = head_to_head(games, learner, opponent(args.against, agent, args), args.eval_episodes, generator)
        return summary(match_scores(args.against, payoffs), progress, args, run_dir)


# --- save, load


@dataclass
class Progress:
    """Counters of a run, saved with it."""

    global_step: int = 0  # decisions trained on
    update: int = 0
    games: int = 0  # games played to train on
    lost_games: int = 0  # games lost to faults
    best: float = -math.inf  # of the best evaluation
    recent: list[float] = field(default_factory=list)  # the learner's last 100 payoffs in games against others
    before: dict[str, float] = field(default_factory=dict)  # scores of the untrained policy


def save(path: Path, parts: dict, progress: Progress, args: Args) -> None:
    """Writes a checkpoint of tensors and plain types; a crash at any moment leaves the old file or the new one."""
    state = {name: part.get_state() if name == "rng" else part.state_dict() for name, part in parts.items()}
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(state | {"progress": asdict(progress), "args": asdict(args)}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path: str | Path, args: Args | None = None) -> dict:
    """Reads a checkpoint without running any code that a stranger may have put into it. With `args`, its networks and
    game must be theirs."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["args"]
    except Exception as error:
        raise InputError(f"{path} is not a checkpoint: {str(error).splitlines()[0]}") from error
    if unknown := set(saved) ^ {item.name for item in fields(Args)}:
        raise InputError(f"{path} is a checkpoint of another script, with or without {', '.join(sorted(unknown))}")
    for name in ("env_id", "env_kwargs", "network", "sequence", "hidden_size") if args else ():
        if saved[name] != getattr(args, name):
            raise InputError(f"{path} has {name} {saved[name]}, not {getattr(args, name)}")
    return state


def restore(parts: dict, state: dict, args: Args) -> Progress:
    try:
        for name, part in parts.items():
            if name == "rng" and len(state[name]) == len(part.get_state()):
                part.set_state(state[name])
            elif name == "rng":  # of a GPU's generator, and this is none, or the other way round
                part.manual_seed(state["progress"]["global_step"])
            elif name == "pool":
                part.load(state[name], parts["agent"].policy, args)
            else:
                part.load_state_dict(state[name])
    except RuntimeError as error:
        raise InputError(f"the checkpoint does not fit: {' '.join(str(error).split())}") from error
    return Progress(**state["progress"])


def transfer(agent: Agent, state: dict) -> None:
    """Takes those weights of a checkpoint whose names and shapes fit, and names the others."""
    own = agent.state_dict()
    fitting = {name: x for name, x in state["agent"].items() if name in own and own[name].shape == x.shape}
    agent.load_state_dict(own | fitting)
    for name in own.keys() - fitting.keys():
        print(f"not taken from the checkpoint: {name}", file=sys.stderr)


def opponent(name: str, agent: Agent, args: Args) -> Player:
    """The player that --against names: a checkpoint's policy, or one without a net."""
    if not Path(name).is_file():
        return Player(name)
    other = copy.deepcopy(agent)
    reference = copy.deepcopy(other.policy)
    restore({"agent": other, "reference": reference}, load(name, args), args)
    return replace(evaluated(other, reference, args), name=name)


def summary(scores: dict[str, float], progress: Progress, args: Args, run_dir: Path) -> dict:
    """The closing JSON object; None where there is no number."""
    numbers = {
        "sps": scores.get("charts/SPS", math.nan),
        "games": progress.games,
        "games_per_s": scores.get("selfplay/games_per_s", math.nan),
        "train_return_mean": float(np.mean(progress.recent or [math.nan])),
        "eval_return_mean": scores.get(f"selfplay/payoff_vs_{args.against or 'random'}", math.nan),
        "eval_return_std": scores.get(f"selfplay/payoff_std_vs_{args.against or 'random'}", math.nan),
    }
    numbers |= {name.split("/")[1]: x for name, x in scores.items() if name.startswith("selfplay/exploitability")}
    known = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
    rates = {name.split("_vs_", 1)[1]: x for name, x in scores.items() if name.startswith("selfplay/win_rate_vs_")}
    intervals = {name: [scores[f"selfplay/win_rate_{end}_vs_{name}"] for end in ("low", "high")] for name in rates}
    known |= {"win_rates": rates, "win_rate_intervals": intervals, "before": progress.before}
    known["elo"] = {name.split("/")[1]: round(x) for name, x in scores.items() if name.startswith("elo/")}
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
    name, started = f"{args.env_id}__{args.exp_name}__{args.seed}", int(time.time())
    while (run_dir := Path(args.runs_dir, f"{name}__{started}")).exists():  # begun in the same second
        started += 1
    run_dir.mkdir(parents=True)
    (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=2))
    shutil.copy(__file__, run_dir)
    for folder in ("common", "environments"):
        source, ignore = Path(__file__).parent / folder, shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, run_dir / folder, ignore=ignore)
    return run_dir, SummaryWriter(run_dir)


def progress_bar(args: Args, progress: Progress, rank: int) -> tqdm:
    """On standard error; where that is no terminal, a line every 30 s."""
    style = {} if sys.stderr.isatty() else {"mininterval": 30, "bar_format": "{l_bar}{bar}{r_bar}\n"}
    style |= {"initial": progress.global_step, "unit": "decision", "unit_scale": True, "disable": rank > 0}
    return tqdm(total=args.total_timesteps, **style)


def sum_and_clip(weights: list[nn.Parameter], max_norm: float) -> Tensor:
    """Sums gradients over processes and clips them; gives their norm, or raises if it is not finite."""
    for weight in weights:
        all_sum(weight.grad)
    return nn.utils.clip_grad_norm_(weights, max_norm, error_if_nonfinite=True)


def close_run(args: Args, progress: Progress, run_dir: Path | None, writer: SummaryWriter | None) -> None:
    if writer is None:
        return
    writer.close()
    if progress.global_step < args.total_timesteps and (run_dir / "checkpoint.pt").exists():
        print(f"continue with: python {sys.argv[0]} --resume {run_dir}", file=sys.stderr)


def mean_metrics(log: list[dict[str, Tensor]]) -> dict[str, float]:
    """Means over minibatches, summed over processes, each of which holds its share of the sum."""
    return {name: float(all_sum(torch.stack([entry[name] for entry in log]).mean())) for name in log[0]}


def game_scalars(data: Sequences, num_actions: int, pool: Pool, progress: Progress) -> dict[str, float]:
    """What to log of an update's games."""
    frequency = (torch.bincount(data.action, minlength=num_actions) / len(data.action)).tolist()
    scalars = {f"actions/{action}": share for action, share in enumerate(frequency)}
    if progress.recent:
        scalars["charts/episodic_return"] = np.mean(progress.recent)
    return scalars | {
        "charts/episodic_length": float(data.length.float().mean()),
        "losses/explained_variance": 1 - float((data.returns - data.value).var() / data.returns.var()),
        "selfplay/games": progress.games,
        "selfplay/snapshots": len(pool.players),
        "selfplay/lost_games": progress.lost_games,
    }


def train(args: Args) -> dict:
    """Trains, evaluates the final weights and returns the closing summary; for Showdown, begin with `Args(**SHOWDOWN)`.
    Raises InputError before any work if it is asked for what cannot be. A lost server leaves a checkpoint of the last
    whole update, any other exception the last one on disk."""
    check(args)
    device, rank, world = setup(args)
    if args.evaluate:
        return evaluate(args, device) if rank == 0 else {}
    source = f"{args.resume}/checkpoint.pt" if args.resume else args.init_from
    state = load(source, args if args.resume else None) if source else {}
    with ExitStack() as stack:
        resumed = state["progress"]["games"] if args.resume else 0
        games = stack.enter_context(closing(make_games(args, args.seed + rank + resumed)))
        eval_games = games if is_showdown(args) else make_games(args, args.seed + EVAL_SEED)
        torch.manual_seed(args.seed)  # initial weights; whatever is random later draws from generators
        agent = Agent(games.obs_size + games.num_actions, games.unseen_size, games.num_actions, args).to(device)
        optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5, fused=True)
        rng = torch.Generator(device).manual_seed(args.seed + rank)
        if args.init_from:
            transfer(agent, state)
        reference, pool, progress = copy.deepcopy(agent.policy).requires_grad_(False), Pool(), Progress()
        parts = {"agent": agent, "reference": reference, "optimizer": optimizer, "rng": rng, "pool": pool}
        learner = Player("learner", agent.policy, args.sequence)
        if args.resume:
            progress = restore(parts, state, args)
            if rank > 0:  # the checkpoint holds the generator of rank 0
                rng.manual_seed(args.seed + rank + resumed)
        else:
            pool.add(agent.policy, 0, args)
            progress.before = assess(eval_games, agent, reference, pool, args) if rank == 0 else {}
        if progress.global_step >= args.total_timesteps:
            raise InputError(f"{args.resume} has its {progress.global_step} steps: raise --total-timesteps")
        run_dir, writer = open_run(args, progress) if rank == 0 else (None, None)
        bar = stack.enter_context(progress_bar(args, progress, rank))
        stack.callback(close_run, args, progress, run_dir, writer)
        epochs, num_minibatches = (args.update_epochs, args.num_minibatches) if args.algorithm == "ppo" else (1, 1)
        steps_done, games_done, seconds, stop = 0, 0, 0.0, False
        while progress.global_step < args.total_timesteps and not stop:
            # --- games
            started = time.perf_counter()
            done = progress.global_step / args.total_timesteps
            remaining = 1 - done if args.anneal_lr else 1.0
            optimizer.param_groups[0]["lr"] = args.learning_rate * remaining
            ent_coef = args.ent_coef + done * (args.ent_coef_final - args.ent_coef)
            pairs = draw_pairs(learner, pool, args, rng)
            try:
                payoffs, data, lost = play(games, pairs, rng, learner)
            except (ConnectionError, RuntimeError):  # a server that died, or is out of reach
                if rank == 0:
                    save(run_dir / "checkpoint.pt", parts, progress, args)
                raise
            played = time.perf_counter()

            # --- values, advantages
            if data is None or len(data.length) < num_minibatches:
                raise InputError(f"{args.env_id}: too few decisions for --num-minibatches {num_minibatches}")
            data.reward /= games.max_payoff
            add_targets(agent, reference, data, args)
            num_steps = all_sum(torch.tensor(float(len(data.action)), device=device))
            if args.norm_adv:
                mean = all_sum(data.advantages.sum()) / num_steps
                std = (all_sum((data.advantages - mean).square().sum()) / num_steps).sqrt()
                data.advantages = (data.advantages - mean) / (std + 1e-8)

            # --- PPO or REINFORCE
            log = []  # metrics of each minibatch
            for _ in range(epochs):
                for first, length in minibatches(*pieces(data, args), num_minibatches, rng):
                    optimizer.zero_grad()
                    batch_size = float(num_steps) / num_minibatches
                    metrics = accumulate(agent, data, first, length, args, batch_size, ent_coef)
                    metrics["grad_norm"] = sum_and_clip(list(agent.parameters()), args.max_grad_norm) / world
                    metrics["bptt_length"] /= world
                    optimizer.step()
                    log.append(metrics)
                if args.target_kl and mean_metrics(log[-num_minibatches:])["approx_kl"] > args.target_kl:
                    break
            scalars = {f"losses/{name}": mean for name, mean in mean_metrics(log).items()}
            scalars |= {f"selfplay/{name}": scalars.pop(f"losses/{name}") for name in ("padding", "bptt_length")}

            # --- reference, snapshots, counters
            with torch.no_grad():
                for old, new in zip(reference.parameters(), agent.policy.parameters(), strict=True):
                    old.lerp_(new, args.ref_rate * remaining)
            progress.update, progress.games = progress.update + 1, progress.games + world * args.games_per_update
            progress.global_step += int(num_steps)
            progress.lost_games += lost
            progress.recent = [*progress.recent, *pool.record(pairs, payoffs, learner)][-100:]
            beaten = all_sum(torch.tensor(float(pool.is_beaten(args)), device=device)) > world / 2
            if beaten or progress.games - pool.made[-1] >= args.snapshot_every:
                pool.add(agent.policy, progress.games, args)
            stop = bool(all_sum(torch.tensor(float(len(signals)), device=device)))
            stop = stop and progress.global_step < args.total_timesteps  # else only the last evaluation is left
            steps_done, games_done = steps_done + int(num_steps), games_done + world * args.games_per_update
            seconds += time.perf_counter() - started
            if rank > 0:
                continue

            # --- log, evaluate, save
            scalars["losses/first_ratio_error"] = error = float(log[0]["ratio_error"])
            if error > 1e-3:
                warnings.warn("games and update compute different log-probabilities", stacklevel=1)
            scalars |= game_scalars(data, games.num_actions, pool, progress)
            scalars["charts/learning_rate"] = args.learning_rate * remaining
            scalars["charts/SPS"], scalars["selfplay/games_per_s"] = steps_done / seconds, games_done / seconds
            scalars["selfplay/play_share"] = (played - started) / (time.perf_counter() - started)
            final = progress.global_step >= args.total_timesteps
            due = final or (args.checkpoint_every and progress.update % args.checkpoint_every == 0)
            if stop or due:
                save(run_dir / "checkpoint.pt", parts, progress, args)
            if due and not stop:
                scalars |= assess(eval_games, agent, reference, pool, args, final)
                if scalars["eval/score"] > progress.best:
                    progress.best = scalars["eval/score"]
                    for name in ("best.pt", "checkpoint.pt"):
                        save(run_dir / name, parts, progress, args)
            for name, value in scalars.items():
                writer.add_scalar(name, value, progress.global_step)
            postfix = f"{scalars['charts/SPS']:.0f} decisions/s, {scalars['selfplay/games_per_s']:.1f} games/s"
            bar.set_postfix_str(f"{postfix}, best score {progress.best:.3f}", refresh=False)
            bar.update(min(int(num_steps), bar.total - bar.n))
    return {} if rank > 0 or stop else summary(scalars, progress, args, run_dir)


def verdict(result: dict) -> str:
    """One line for people."""
    before, rates = result["before"], result["win_rates"]
    if "exploitability" in result:
        now = f"{result['exploitability']:.3f} (moving average of the policy: {result['exploitability_average']:.3f})"
        return f"exploitability: before {before['selfplay/exploitability']:.3f} | now {now} | equilibrium 0"
    parts = []
    for name, rate in rates.items():
        old = before.get(f"selfplay/win_rate_vs_{name}")
        parts.append(f"won against {name}: " + ("" if old is None else f"before {old:.0%}, ") + f"now {rate:.0%}")
    return " | ".join(parts)


def main() -> None:
    args = tyro.cli(Args)
    if is_showdown(args):
        args = tyro.cli(Args, default=Args(**SHOWDOWN))
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
        print(verdict(result))
        print(f"watch: tensorboard --logdir {args.runs_dir}")
        print(f"evaluate: python {sys.argv[0]} --evaluate {result['run_dir']}/checkpoint.pt")
        print(json.dumps(result))


if __name__ == "__main__":
    main()
