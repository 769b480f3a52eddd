"""Sequence PPO and sequence REINFORCE, trained by self-play in two-player zero-sum games with hidden information.

A sequence is all that one player saw and did in one game. The data goes one way, and each arrow has its function below:

    games ── play ──▶ Decisions [K], one sequence behind the other    policy only, one LSTM step a turn, no gradients
    Decisions ── make_targets ──▶ advantages, returns [K]             the payoff belongs to each player's last decision
    sequences ── batches ──▶ index [L, B], chunks of bptt_length      sequences of like length, hardly any padding
    chunk ── Agent.unroll ── sequence_loss ── descend ──▶ weights     one LSTM call; a chunk goes on where one ended
    weights ──▶ a reference, which moves slowly and to which the loss pulls; snapshots, which become opponents

Letters in shapes: K or M decisions, S sequences, G games, N players, D entries of an observation and the own last
action, E entries that only the critic sees, A actions, H width; [L, B] are L decisions of B sequences (batches). The
games are in environments/. PPO: Schulman et al. 2017, arXiv 1707.06347; the reference: magnetic mirror descent, Sokota
et al. 2022, arXiv 2206.05825. `detail 5`: docs/sequence_ppo_selfplay.md.
"""

import copy
import difflib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np
import pyspiel
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.gae import gae
from environments.openspiel import Level, OpenSpielGames, exploitability

DEFAULTS = {  # of flags that are None below: for OpenSpiel; for Pokémon Showdown, whose battles are long and slow
    "checkpoint_every": (50, 20),
    "eval_episodes": (200, 40),
    "opponents": ("self:1", "self:0.8,past:0.2"),
    "snapshot_every": (200_000, 1000),
    "total_timesteps": (8_000_000, 490_000),
    "learning_rate": (3e-3, 7e-4),
    "num_envs": (2048, 25),
    "games_per_update": (2048, 64),
    "games_growth": (4, 1),
    "gamma": (1.0, 0.995),
    "gae_lambda": (0.5, 0.9),
    "update_epochs": (1, 4),
    "norm_adv": (False, True),
    "ent_coef": (0.0125, 0.02),
    "barrier_coef": (0.0125, 0.0),
    "barrier_coef_final": (0.002, 0.0),
    "ref_kl_coef": (0.1, 0.0),
    "hidden_size": (64, 128),
}


@dataclass
class Args:  # the comments are what --help says
    exp_name: str = Path(__file__).stem  # RUN: name of the experiment, part of the run folder's name
    seed: int = 1  # of games, networks and sampling; on OpenSpiel the same seed gives the same run on one machine
    cuda: bool = True  # use a CUDA device if there is one
    torch_threads: int = 1  # threads of torch on the CPU; one is fastest for small recurrent networks
    runs_dir: str = "runs"  # folder that holds the run folders
    checkpoint_every: int = None  # updates between checkpoints, each with an evaluation; 0 = only at the end
    resume: str | None = None  # a run folder to continue, with its arguments unless others are given
    init_from: str | None = None  # a checkpoint whose networks to start from
    evaluate: str | None = None  # a checkpoint to evaluate, with its arguments unless others are given; no training
    against: str | None = None  # with --evaluate, the only opponent: a checkpoint, random, max_power or heuristic
    eval_episodes: int = None  # games against each opponent of an evaluation, half of them in each seat
    eval_likeliest: bool = False  # evaluate the likeliest actions; with hidden information good play is mostly mixed
    eval_average: bool = False  # evaluate the reference policy, a moving average of the weights
    env_id: str = "leduc_poker"  # ENVIRONMENT: a game of OpenSpiel, or a format of Pokémon Showdown: gen9randombattle
    env_kwargs: str = "{}"  # parameters of the OpenSpiel game, as JSON
    server: str = "start"  # Showdown only: `start` runs a server on this machine, ws://host:port uses a running one
    team: str | None = None  # Showdown only: for formats that need one, a file with the team of both, as exported
    ko_coef: float = 0.1  # Showdown only: reward for each foe that faints, and loss for each own Pokémon; winning is 1
    hp_coef: float = 0.1  # Showdown only: the same for hit points, in units of one Pokémon's full ones
    save_replays: bool = False  # Showdown only: with --evaluate, save the battles as HTML beside the checkpoint
    algorithm: Literal["ppo", "reinforce"] = "ppo"  # PPO: reinforce sets 1 epoch, 1 minibatch, lambda 1
    total_timesteps: int = None  # decisions to train on, over all processes
    learning_rate: float = None  # Adam's step size
    num_envs: int = None  # games that each process plays at once
    games_per_update: int = None  # games that each process plays, to their end, between updates
    games_growth: int = None  # factor of the games between updates in the second half
    anneal_lr: bool = True  # in the second half, lower the learning rate, and the reference's, linearly to 0
    gamma: float = None  # discount factor
    gae_lambda: float = None  # lambda of generalised advantage estimation
    num_minibatches: int = 8  # minibatches per pass; at most games_per_update
    update_epochs: int = None  # passes over the games of an update
    norm_adv: bool = None  # normalise each update's advantages, which else are in units of the largest payoff
    clip_coef: float = 0.2  # clip range of the probability ratio
    ent_coef: float = None  # weight of the entropy bonus at the start
    ent_coef_final: float = 0.005  # weight of the entropy bonus at the end, reached linearly
    barrier_coef: float = None  # weight of the log barrier, which keeps every action possible, at the start
    barrier_coef_final: float = None  # weight of the log barrier at the end, reached linearly
    ref_kl_coef: float = None  # weight of the KL divergence from policy to reference policy
    ref_rate: float = 0.02  # how far the reference's weights move towards the policy's in each update
    vf_coef: float = 0.5  # weight of the value loss; values are in units of the game's largest payoff
    max_grad_norm: float = 5.0  # largest norm of the gradient
    target_kl: float | None = None  # stop an update after a pass whose mean approximate KL exceeds this; None = never
    recurrent: bool = True  # RECURRENCE: off zeroes the LSTM's state before every decision: the same network, no memory
    hidden_size: int = None  # width of the networks
    bptt_length: int = 0  # decisions through which gradients flow; 0 = the whole game, -1 = as many as fit the memory
    memory_mb: int = 500  # memory for what autograd keeps of one chunk, with --bptt-length -1
    opponents: str = None  # SELF-PLAY: shares of self (both sides learn), past, random, max_power, heuristic
    snapshot_every: int = None  # games between snapshots of the policy, the opponents named past

    def __post_init__(self):
        for name, choices in DEFAULTS.items():
            if getattr(self, name) is None:
                setattr(self, name, choices[is_showdown(self)])
        if self.algorithm == "reinforce":  # with one pass the ratio is 1, and PPO's gradient is REINFORCE's (detail 3)
            self.update_epochs, self.num_minibatches, self.gae_lambda = 1, 1, 1.0


class InputError(Exception):
    """The user asked for something that cannot be done; the message is one line."""


def check(args: Args) -> None:
    """Raises InputError for what can be known to fail before any work."""
    may_be_0 = ["seed", "checkpoint_every", "ko_coef", "hp_coef", "gamma", "gae_lambda", "clip_coef", "vf_coef"]
    may_be_0 += ["ent_coef", "ent_coef_final", "barrier_coef", "barrier_coef_final", "ref_kl_coef", "ref_rate"]
    may_be_0 += ["bptt_length"]
    at_most = {"gamma": 1, "gae_lambda": 1, "ref_rate": 1, "seed": 10**9, "total_timesteps": 10**12}
    at_most |= {"num_minibatches": args.games_per_update, "snapshot_every": 10**9}
    for name, x in vars(args).items():
        least, most = "0 or more" if name in may_be_0 else "above 0", at_most.get(name, 10**5)
        least = "-1 or more" if name == "bptt_length" else least
        special = (x == 0 and name in may_be_0) or (name, x) == ("bptt_length", -1)
        if type(x) in (int, float) and not (special or 0 < x <= most):
            raise InputError(f"--{name.replace('_', '-')} must be {least} and at most {most}, not {x}")
    known = ("random", *(SCRIPTED if is_showdown(args) else ()))
    shares = opponent_shares(args)
    if unknown := shares.keys() - {"self", "past", *known}:
        raise InputError(f"--opponents: {args.env_id} has no opponent {', '.join(unknown)}")
    if not (min(shares.values()) >= 0 and 0 < sum(shares.values()) < math.inf):
        raise InputError(f"--opponents {args.opponents}: shares must be 0 or more, and not all 0")
    if args.against and not (args.evaluate and (args.against in known or Path(args.against).is_file())):
        raise InputError(f"--against needs --evaluate and a checkpoint or {', '.join(known)}, not {args.against}")


def opponent_shares(args: Args) -> dict[str, float]:
    """`self:0.7,past:0.3` -> the share of each kind of opponent."""
    try:
        return {name.strip(): float(share) for name, share in (part.split(":") for part in args.opponents.split(","))}
    except ValueError as error:
        raise InputError(f"--opponents {args.opponents}: expected name:share,name:share,…") from error


# --- environment
EVAL_SEED = 1_000_000_000  # of the games of evaluations
SCRIPTED = ("max_power", "heuristic")  # poke-env's players, on Showdown


def is_showdown(args: Args) -> bool:
    return args.env_id.startswith("gen")


def make_games(args: Args, seed: int, replay_dir: Path | None = None):
    """The backend, with `num_envs` slots for games; environments/games.py says what it does."""
    try:
        if not is_showdown(args):
            if args.env_id not in pyspiel.registered_names():
                near = difflib.get_close_matches(args.env_id, pyspiel.registered_names()) or ["leduc_poker"]
                raise InputError(f"no game {args.env_id}; near: {', '.join(near)}; on Showdown: gen9randombattle")
            return OpenSpielGames(args.env_id, args.num_envs, seed, json.loads(args.env_kwargs))
        if not importlib.util.find_spec("poke_env"):
            raise InputError("Showdown needs poke-env: pip install -r requirements-envs.txt")
        from environments.showdown import ShowdownGames

        rest = args.server, seed, args.ko_coef, args.hp_coef, replay_dir, args.team and Path(args.team).read_text()
        return ShowdownGames(args.env_id, args.num_envs, *rest)
    except (ValueError, TypeError, OSError, pyspiel.SpielError) as error:
        raise InputError(f"{args.env_id}: {' '.join(str(error).split())}") from error


# --- network
def all_sum(x: Tensor) -> Tensor:
    """The sum of x over all processes, in place. They hold unequal numbers of decisions."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


class Net(nn.Module):
    """encoder -> LSTM -> head. Observations are [..., D]; the state [N, 2, H] is the LSTM's h and c. `options` are for
    each kind of actions that are alike, such as a Pokémon's moves, the entries of the observation [k, e] that tell
    about each of k options and the actions [k, c] that take it: all k are scored by the same weights (detail 13)."""

    def __init__(self, obs_size: int, outputs: int, head_gain: float, args: Args, options: Sequence[tuple] = ()):
        super().__init__()
        self.recurrent, self.options, size = args.recurrent, options, args.hidden_size
        self.encoder, self.lstm, self.head = nn.Linear(obs_size, size), nn.LSTM(size, size), nn.Linear(size, outputs)
        sizes = [(entries.shape[1] + size, actions.shape[1]) for entries, actions in options]
        self.scorers = nn.ModuleList(nn.Sequential(nn.Linear(n, 64), nn.Tanh(), nn.Linear(64, c)) for n, c in sizes)
        for name, weight in self.named_parameters():
            gain = {"encoder": math.sqrt(2), "lstm": 1.0, "scorers": 1.0, "head": head_gain}[name.partition(".")[0]]
            nn.init.zeros_(weight) if "bias" in name else nn.init.orthogonal_(weight, gain)

    def initial_state(self, n: int) -> Tensor:
        return self.head.weight.new_zeros(n, 2, self.lstm.hidden_size)

    def step(self, obs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One decision of N players: obs [N, D], state [N, 2, H] -> outputs [N, outputs], the next state."""
        outputs, state = self.unroll(obs[None], state * self.recurrent)
        return outputs[0], state

    def unroll(self, obs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """L decisions of B players: obs [L, B, D], state before the first -> outputs [L, B, outputs], state after."""
        h, c = state.transpose(0, 1).contiguous().unsqueeze(1)  # each [1, B, H]
        features, state = self.lstm(self.encoder(obs).tanh(), (h, c))
        outputs = self.head(features)
        for (entries, actions), scorer in zip(self.options, self.scorers, strict=True):
            context = features[..., None, :].expand(*obs.shape[:-1], len(entries), -1)  # [L, B, k, H]
            outputs[..., actions] = scorer(torch.cat((obs[..., entries], context), -1))
        return outputs, torch.cat(state).transpose(0, 1)


def frozen(net: Net) -> Net:
    """A copy that does not learn."""
    net = copy.deepcopy(net).requires_grad_(False)
    net.lstm.flatten_parameters()
    return net


class Agent(nn.Module):
    """A policy and a value, each with a net of its own; the states of both are [2, N, 2, H]. Values are in units of the
    game's largest payoff."""

    def __init__(self, games, args: Args):
        super().__init__()
        obs_size = games.obs_size + games.num_actions
        self.policy = Net(obs_size, games.num_actions, 0.01, args, games.options)
        self.value = Net(obs_size + games.unseen_size, 1, 1.0, args)

    def initial_state(self, n: int) -> Tensor:
        return torch.stack((self.policy.initial_state(n), self.value.initial_state(n)))

    def unroll(self, obs: Tensor, unseen: Tensor, state: Tensor, action_mask: Tensor) -> tuple[Tensor, ...]:
        """obs [L, B, D], unseen [L, B, E], mask [L, B, A] -> log-probabilities [L, B, A], values [L, B], states."""
        logits, policy_state = self.policy.unroll(obs, state[0])
        values, value_state = self.value.unroll(torch.cat((obs, unseen), -1), state[1])
        return masked_logprobs(logits, action_mask), values.squeeze(-1), torch.stack((policy_state, value_state))


def masked_logprobs(logits: Tensor, action_mask: Tensor) -> Tensor:
    """Log-probabilities [..., A]; what is not allowed has probability 0 and no gradient (detail 5)."""
    return logits.masked_fill(~action_mask, torch.finfo(logits.dtype).min).log_softmax(-1)


def sample(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Actions [N]; without a generator, the likeliest ones."""
    if generator:  # the maximum of logits + Gumbel noise is a sample of their softmax
        logits = logits - (torch.empty_like(logits).exponential_(generator=generator) + 1e-20).log()
    return logits.argmax(-1)


def with_last_action(obs: Tensor, last_action: Tensor, num_actions: int) -> Tensor:
    """Observations and the player's own last action [N] (-1 = none), one-hot -> [N, D], what nets see (detail 2)."""
    return torch.cat((obs, F.one_hot(last_action + 1, num_actions + 1)[:, 1:].to(obs.dtype)), 1)


# --- games and sequences
class Decisions(NamedTuple):
    """Decisions of the learner: those of one turn or, one sequence behind the other, all of an update."""

    sequence: Tensor  # [K] the number of its sequence
    obs: Tensor  # [K, D]
    unseen: Tensor  # [K, E] what only the critic sees
    action_mask: Tensor  # [K, A] bool: what may be chosen
    action: Tensor  # [K]
    logprob: Tensor  # [K]
    reward: Tensor  # [K] in a turn, since the sequence's previous decision; in an update, until its next


def spans(sequence: Tensor) -> tuple[Tensor, Tensor]:
    """First row and length [S] of each sequence of decisions whose numbers are `sequence` [K]."""
    _, length = sequence.unique_consecutive(return_counts=True)
    return length.cumsum(0) - length, length


def by_sequence(turns: list[Decisions], last_reward: Tensor) -> Decisions:
    """Decisions of all turns, in the order of time, one sequence behind the other. `last_reward` [sequences] follows
    each one's last decision; NaN drops the sequence (detail 3)."""
    data = Decisions(*(torch.cat(column) for column in zip(*turns, strict=True)))
    order = data.sequence.argsort(stable=True)
    data = Decisions(*(column[order[last_reward[data.sequence[order]].isfinite()]] for column in data))
    (first, length), reward = spans(data.sequence), data.reward.roll(-1)
    last = first + length - 1
    reward[last] = last_reward[data.sequence[last]]
    return data._replace(reward=reward)


@torch.no_grad()
def play(games, pairs: list[tuple], generator: torch.Generator, learner: Net | None = None, sampled: bool = True):
    """Plays a game for every pair of players, as many at once as there are slots. A player is the Net of a policy, or a
    name: random, or one of `games.scripted`. Gives payoffs [G, 2], the Decisions of `learner`, None if there are none,
    and how many games were lost to faults; each of those is played again."""
    device, num_seats = generator.device, 2 * games.num_games
    players = list({player: None for pair in pairs for player in pair})
    number = {player: i for i, player in enumerate(players)}
    # who sits in seat 2 * slot + player, the number of that game's sequence, and what the player remembers of it
    who, sequence = np.zeros(num_seats, int), torch.zeros(num_seats, dtype=torch.int64, device=device)
    last_action = torch.full((num_seats,), -1, device=device)
    state = next((player.initial_state(num_seats) for player in players if isinstance(player, Net)), None)
    payoffs = np.full((len(pairs), 2), np.nan, np.float32)
    waiting, free = deque(range(len(pairs))), deque(range(games.num_games))
    running, last_reward, turns = {}, [], []  # pair and game of each slot; [2] of each game in the order of their start
    while waiting or running:
        starting = [free.popleft() for _ in range(min(len(free), len(waiting)))]
        for slot in starting:
            running[slot] = waiting.popleft(), len(last_reward)
            who[2 * slot : 2 * slot + 2] = [number[player] for player in pairs[running[slot][0]]]
            last_reward.append([np.nan, np.nan])
        begun = [2 * slot + player for slot in starting for player in (0, 1)]
        begun = torch.tensor(begun, dtype=torch.int64, device=device)
        sequence[begun] = torch.arange(2 * len(last_reward) - len(begun), 2 * len(last_reward), device=device)
        last_action[begun] = -1
        if state is not None:
            state[begun] = 0
        games.start(starting)
        turn = games.observe()
        for slot, payoff, reward in turn.ended:
            free.append(slot)
            pair, game = running.pop(slot)
            if payoff is None:
                waiting.append(pair)
            else:
                payoffs[pair], last_reward[game] = payoff, list(reward)
        if signals and learner is None:
            waiting.clear()  # an evaluation is cut short

        # --- whoever has to act
        seat, action_mask, reward = (torch.from_numpy(x).to(device) for x in (turn.seat, turn.action_mask, turn.reward))
        obs = with_last_action(torch.from_numpy(turn.obs).to(device), last_action[seat], games.num_actions)
        unseen = obs[:, :0] if turn.unseen is None else torch.from_numpy(turn.unseen).to(device)
        rewards = turn.reward, *(reward for _, _, reward in turn.ended)
        if not (torch.isfinite(obs).all() and all(np.isfinite(x).all() for x in rewards)):
            raise FloatingPointError("a game returned an observation or a reward that is not finite")
        for stuck in turn.seat[~turn.action_mask.any(1)]:
            raise ValueError(f"the game in slot {stuck // 2} allows player {stuck % 2} no action at all")
        action, logits = torch.zeros_like(seat), torch.zeros_like(action_mask, dtype=obs.dtype)
        for i in np.unique(who[turn.seat]):
            player, rows = players[i], torch.from_numpy(np.flatnonzero(who[turn.seat] == i)).to(device)
            if player in games.scripted:
                action[rows] = torch.tensor([games.choose(player, s) for s in seat[rows].tolist()], device=device)
                continue
            if player != "random":
                logits[rows], state[seat[rows]] = player.step(obs[rows], state[seat[rows]])
            logprobs = masked_logprobs(logits[rows], action_mask[rows])
            action[rows] = sample(logprobs, generator if sampled or player == "random" else None)
            if player is learner:
                columns = (x[rows] for x in (sequence[seat], obs, unseen, action_mask, action))
                turns.append(Decisions(*columns, logprobs.gather(1, action[rows, None])[:, 0], reward[rows]))
        last_action[seat] = action
        games.act(turn.seat, action.cpu().numpy())
    last_reward = torch.tensor(last_reward, dtype=torch.float32, device=device)
    data = by_sequence(turns, last_reward.flatten()) if turns else None
    return payoffs, data, len(last_reward) - len(pairs)


def grid(first: Tensor, length: Tensor) -> Tensor:
    """Row numbers [L, B] of sequences side by side, -1 behind their ends."""
    step = torch.arange(int(length.max()), device=length.device)[:, None]  # [L, 1]
    return torch.where(step < length, first + step, -1)


def batches(first: Tensor, length: Tensor) -> Iterator[Tensor]:
    """Row numbers [L, B] of all sequences, sorted by length and cut wherever they fall below 0.7 of a batch's longest:
    hardly any padding, which is -1 (detail 4)."""
    order = length.argsort(descending=True, stable=True)
    lengths, begin = length[order].tolist(), 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or lengths[end] < 0.7 * lengths[begin]:
            yield grid(first[order[begin:end]], length[order[begin:end]])
            begin = end


class Targets(NamedTuple):
    reference: Tensor  # [K, A] log-probabilities of the reference policy
    value: Tensor  # [K]
    advantages: Tensor  # [K]
    returns: Tensor  # [K]


@torch.no_grad()
def make_targets(agent: Agent, reference: Net, data: Decisions, pieces: tuple[Tensor, Tensor], args: Args) -> Targets:
    """What the loss needs beside the decisions. `pieces` are first row and length of what goes through the nets as one:
    a sequence or, without memory, a decision; GAE always runs over a player's own decisions (detail 3)."""
    reference_logprobs, value = torch.zeros_like(data.action_mask, dtype=data.obs.dtype), torch.zeros_like(data.reward)
    for index in batches(*pieces):
        mask, obs, n = index >= 0, data.obs[index], index.shape[1]
        logits, _ = reference.unroll(obs, reference.initial_state(n))
        reference_logprobs[index[mask]] = masked_logprobs(logits[mask], data.action_mask[index[mask]])
        values, _ = agent.value.unroll(torch.cat((obs, data.unseen[index]), -1), agent.value.initial_state(n))
        value[index[mask]] = values[mask].squeeze(-1)
    first, length = spans(data.sequence)
    index = grid(first, length)  # [L, S]
    reward, values, last = data.reward[index], value[index], index == first + length - 1
    columns = gae(reward, values, values.roll(-1, 0), last, torch.zeros_like(last), args.gamma, args.gae_lambda)
    advantages, returns = torch.empty_like(value), torch.empty_like(value)
    advantages[index[index >= 0]], returns[index[index >= 0]] = (column[index >= 0] for column in columns)
    return Targets(reference_logprobs, value, advantages, returns)


# --- PPO
def sequence_loss(
    agent: Agent, data: Decisions, targets: Targets, index: Tensor, state: Tensor, average: float, args: Args
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """PPO's clipped loss (eq. 7, 9) of a chunk of sequences, rows `index` [L, B] of the data, that starts from `state`;
    metrics; and the state after it. Loss and metrics are sums over real decisions, divided by how many an average
    minibatch has, so that every decision weighs the same (detail 4)."""
    mask = index >= 0
    real = index[mask]  # [M]
    logprobs, values, state = agent.unroll(data.obs[index], data.unseen[index], state, data.action_mask[index])
    logprobs, allowed, advantage = logprobs[mask], data.action_mask[real], targets.advantages[real]
    log_ratio = logprobs.gather(1, data.action[real, None])[:, 0] - data.logprob[real]
    ratio, probs = log_ratio.exp(), logprobs.exp()
    policy_loss = torch.max(-advantage * ratio, -advantage * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef))
    value_loss = 0.5 * (values[mask] - targets.returns[real]) ** 2
    entropy = -(probs * logprobs).sum(-1)
    barrier = -logprobs.masked_fill(~allowed, 0).sum(-1) / allowed.sum(-1)  # detail 7
    reference_kl = (probs * (logprobs - targets.reference[real])).sum(-1)
    loss = policy_loss + args.vf_coef * value_loss + args.ref_kl_coef * reference_kl
    per_step = {  # each [M]
        "loss": loss - args.ent_coef * entropy + args.barrier_coef * barrier,
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "barrier": barrier,
        "reference_kl": reference_kl,
        "old_approx_kl": -log_ratio,
        "approx_kl": ratio - 1 - log_ratio,  # http://joschu.net/blog/kl-approx.html
        "clipfrac": ((ratio - 1).abs() > args.clip_coef).float(),
    }
    metrics = {name: x.sum() / average for name, x in per_step.items()} | {"padding": (~mask).sum() / average}
    metrics["ratio_error"] = (ratio - 1).abs().max()
    return metrics.pop("loss"), {name: x.detach() for name, x in metrics.items()}, state


def descend(
    agent: Agent, optimizer: Adam, data: Decisions, targets: Targets, pieces: tuple, average: float, args: Args
) -> dict[str, Tensor]:
    """A step down a minibatch's gradient, summed over processes and clipped; gives metrics, or raises if that is not
    finite. Sequences go through the nets in batches, and these in chunks of `bptt_length` decisions; a chunk goes on
    from the state in which the one before ended, without its gradient, and is backpropagated first (detail 1)."""
    optimizer.zero_grad()
    chunks = []  # metrics
    for index in batches(*pieces):
        state = agent.initial_state(index.shape[1])
        length = args.bptt_length or len(index)
        if length < 0:
            length = longest_chunk(agent, data, targets, index, args)
        for rows in index.split(length):
            loss, metrics, state = sequence_loss(agent, data, targets, rows, state.detach(), average, args)
            loss.backward()
            chunks.append(metrics | {"bptt_length": (rows >= 0).sum() / average * min(length, len(index))})
    for weight in agent.parameters():
        all_sum(weight.grad)
    norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm, error_if_nonfinite=True)
    optimizer.step()
    columns = {name: torch.stack([chunk[name] for chunk in chunks]) for name in chunks[0]}
    totals = {name: x.max() if name == "ratio_error" else x.sum() for name, x in columns.items()}
    world = dist.get_world_size() if dist.is_initialized() else 1  # over whose processes metrics are summed
    return totals | {"grad_norm": norm / world, "ratio_error": totals["ratio_error"] / world}


def longest_chunk(agent: Agent, data: Decisions, targets: Targets, index: Tensor, args: Args) -> int:
    """How many decisions of a batch [L, B] fit `memory_mb`, by what autograd keeps of the first ten (detail 6)."""
    index, kept = index[:10], {}  # bytes of each storage

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        sequence_loss(agent, data, targets, index, agent.initial_state(index.shape[1]), 1.0, args)
    for weight in agent.parameters():
        kept.pop(weight.data_ptr(), None)
    return max(1, int(args.memory_mb * 1e6 * len(index) / sum(kept.values())))


def scheduled(args: Args, done: float) -> Args:
    """The arguments as they are after a share of the training (detail 7)."""
    remaining = min(1.0, 2 * (1 - done)) if args.anneal_lr else 1.0  # of the two rates
    growth = args.games_growth if done >= 0.5 else 1
    return replace(
        args,
        learning_rate=args.learning_rate * remaining,
        ent_coef=args.ent_coef + done * (args.ent_coef_final - args.ent_coef),
        barrier_coef=args.barrier_coef + done * (args.barrier_coef_final - args.barrier_coef),
        games_per_update=args.games_per_update * growth,
        ref_rate=min(1.0, args.ref_rate * remaining * growth),
    )


# --- opponents
class Pool:
    """Snapshots of the policy, by the number of games after which they were made."""

    def __init__(self, net: Net, size: int = 16):
        self.nets, self.size = {0: frozen(net)}, size

    def add(self, net: Net, games: int) -> None:
        self.nets[games] = frozen(net)
        if len(self.nets) > self.size:  # every second one goes; the oldest and the newest stay (detail 11)
            for i in list(self.nets)[-2:0:-2]:
                del self.nets[i]

    def state_dict(self) -> dict:
        return {games: net.state_dict() for games, net in self.nets.items()}

    def load_state_dict(self, state: dict) -> None:
        like, self.nets = self.nets[0], {}
        for games, weights in state.items():
            like.load_state_dict(weights)
            self.nets[games] = frozen(like)


def draw_pairs(learner: Net, pool: Pool, args: Args, generator: torch.Generator) -> list[tuple]:
    """The games of an update. Of the snapshots at most four take part, so that batches stay large."""
    shares, device, n = opponent_shares(args), generator.device, args.games_per_update
    kinds = torch.multinomial(torch.tensor([*shares.values()], device=device), n, True, generator=generator).tolist()
    seats = torch.randint(2, (n,), generator=generator, device=device).tolist()
    chosen = torch.randint(len(pool.nets), (4,), generator=generator, device=device).tolist()
    others = {"self": [learner], "past": [[*pool.nets.values()][i] for i in chosen]}
    others, pairs = [others.get(name, [name]) for name in shares], []  # of each kind
    for i, (kind, seat) in enumerate(zip(kinds, seats, strict=True)):
        opponent = others[kind][i % len(others[kind])]
        pairs.append((opponent, learner) if seat else (learner, opponent))
    return pairs


# --- evaluate, save, load
def head_to_head(games, a, b, num_games: int, generator: torch.Generator, sampled: bool = True) -> np.ndarray:
    """Payoffs [num_games] of player a against b, who change seats after every game."""
    pairs = [(a, b) if i % 2 == 0 else (b, a) for i in range(num_games)]
    return play(games, pairs, generator, sampled=sampled)[0][np.arange(num_games), np.arange(num_games) % 2]


def match_scores(name: str, payoffs: np.ndarray) -> dict[str, float]:
    """Against an opponent: points (a draw is half a win) with their 95% interval (Wilson 1927), draws, payoffs."""
    n, z, rate = len(payoffs), 1.96, float(((payoffs > 0) + 0.5 * (payoffs == 0)).mean())
    middle, half = rate + z**2 / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    low, high = (x / (1 + z**2 / n) for x in (middle - half, middle + half))
    scores = {"win_rate": rate, "win_rate_low": low, "win_rate_high": high, "draw_rate": (payoffs == 0).mean()}
    scores |= {"payoff": payoffs.mean(), "payoff_std": payoffs.std()}
    return {f"selfplay/{key}_vs_{name}": float(score) for key, score in scores.items()}


@torch.no_grad()
def policy_tables(net: Net, levels: list[Level], num_actions: int, memory: bool = True) -> list[np.ndarray]:
    """The policy's distributions [M, A] in all information states of a game, each reached as in play, by the decisions
    before it; without memory, from the initial state (detail 9)."""
    tables, state = [], None
    for level in levels:
        obs = with_last_action(torch.from_numpy(level.obs), torch.from_numpy(level.action), num_actions)
        obs = obs.to(net.head.weight.device)
        before = state[torch.from_numpy(level.parent)] if tables and memory else net.initial_state(len(obs))
        logits, state = net.step(obs, before)
        tables.append(masked_logprobs(logits.cpu(), torch.from_numpy(level.action_mask)).exp().double().numpy())
    return tables


def assess(games, agent: Agent, reference: Net, args: Args) -> dict[str, float]:
    """Scores of the policy or, with `eval_average`, of the reference: exploitability where it can be computed, also of
    the reference and without memory; and matches against fixed opponents, or only `against`."""
    net, scores = reference if args.eval_average else agent.policy, {"eval/episodes": args.eval_episodes}
    generator = torch.Generator(net.head.weight.device).manual_seed(args.seed + EVAL_SEED)
    if not is_showdown(args):
        games.rng = np.random.default_rng(args.seed + EVAL_SEED)  # every evaluation is dealt the same games
    if levels := [] if is_showdown(args) or args.against else games.levels:
        for name, player, memory in (("", net, True), ("_average", reference, True), ("_memoryless", net, False)):
            tables = policy_tables(player, levels, games.num_actions, memory)
            scores[f"selfplay/exploitability{name}"] = exploitability(games, levels, tables)
    opponents = {name: name for name in ([args.against] if args.against else ("random", *games.scripted))}
    if args.against and Path(args.against).is_file():
        other = copy.deepcopy(agent)
        saved = load(args.against, **({"reference": other.policy} if args.eval_average else {"agent": other}))["args"]
        if (saved["env_id"], saved["env_kwargs"]) != (args.env_id, args.env_kwargs):
            raise InputError(f"{args.against} plays {saved['env_id']} {saved['env_kwargs']}")
        other.policy.recurrent, opponents = saved["recurrent"], {"opponent": other.policy}
    for name, opponent in opponents.items():
        payoffs = head_to_head(games, net, opponent, args.eval_episodes, generator, not args.eval_likeliest)
        scores |= match_scores(name, payoffs)
    first = next(iter(opponents))  # random, or that of --against
    scores["eval/episodic_return"] = scores[f"selfplay/payoff_vs_{first}"]
    scores["eval/return_std"] = scores[f"selfplay/payoff_std_vs_{first}"]
    rates = [scores[f"selfplay/win_rate_vs_{name}"] for name in opponents]
    exploitable = scores.get("selfplay/exploitability")
    scores["eval/score"] = fmean(rates) if exploitable is None else -exploitable  # the higher, the better
    return scores


def evaluate_checkpoint(args: Args, device: torch.device) -> dict:
    """The closing summary of a checkpoint."""
    print(f"playing {args.eval_episodes} games against each opponent", file=sys.stderr)
    run_dir = Path(args.evaluate).parent
    with closing(make_games(args, args.seed + EVAL_SEED, run_dir / "replays" if args.save_replays else None)) as games:
        agent = Agent(games, args).to(device)
        reference = frozen(agent.policy)
        counters = load(args.evaluate, agent=agent, reference=reference)["counters"]
        scores = assess(games, agent, reference, args)
        return {} if signals else summary(run_dir, counters, scores)


def game_scalars(data: Decisions, targets: Targets) -> dict[str, float]:
    """What to log of an update's games."""
    taken = torch.bincount(data.action, minlength=data.action_mask.shape[1]) / len(data.action)
    unexplained = (targets.returns - targets.value).var() / targets.returns.var()
    return {f"actions/{action}": share for action, share in enumerate(taken.tolist())} | {
        "charts/episodic_length": float(spans(data.sequence)[1].float().mean()),
        "losses/explained_variance": 1 - float(unexplained),
    }


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


def setup(args: Args) -> tuple[torch.device, int, int]:
    """Device, rank and number of processes: one, unless torchrun started more."""
    on_gpu = args.cuda and torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu")
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")
    torch.set_num_threads(args.torch_threads)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    return device, *((dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1))


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
    result = {"run_dir": str(run_dir)} | counters | {name.removeprefix("selfplay_"): x for name, x in scores.items()}
    result = {name: round(x, 4) if isinstance(x, float) else x for name, x in result.items() if name != "recent"}
    return {name: None if x in (math.inf, -math.inf) or x != x else x for name, x in result.items()}


def train(args: Args) -> dict:
    """Trains, evaluates the final weights and returns the closing summary, empty if a signal came first. Raises
    InputError, before any work, for what cannot be, or when there are fewer sequences than minibatches. When rank 0
    loses its server, it saves the last whole update; any other exception leaves the last checkpoint as it is."""
    check(args)
    device, rank, world = setup(args)
    if args.evaluate:
        return evaluate_checkpoint(args, device) if rank == 0 else {}
    counters = {"global_step": 0, "seconds": 0.0, "updates": 0, "games": 0, "lost_games": 0, "recent": []}
    if args.resume:
        counters = load(f"{args.resume}/checkpoint.pt")["counters"]
        if counters["global_step"] >= args.total_timesteps:
            raise InputError(f"{args.resume} has its steps: --total-timesteps above {counters['global_step']} goes on")
    seed = args.seed + rank + counters["games"]  # resumed, other games are played
    games = make_games(args, seed)
    bar, writer, stop = None, None, False
    try:
        eval_games = games if is_showdown(args) else make_games(args, seed)
        torch.manual_seed(args.seed)  # for the weights; whatever is random later draws from a generator of its own
        agent = Agent(games, args).to(device)
        if args.init_from:
            load(args.init_from, agent=agent)
        reference, rng = frozen(agent.policy), torch.Generator(device).manual_seed(seed)
        optimizer, pool = Adam(agent.parameters(), fused=True), Pool(agent.policy)
        parts = {"agent": agent, "reference": reference, "optimizer": optimizer, "pool": pool}
        if args.resume:
            load(f"{args.resume}/checkpoint.pt", **parts)
        if rank == 0:
            run_dir, writer = open_run(args, counters["global_step"])
            save(run_dir / "checkpoint.pt", parts, counters, args)
        tty = {} if sys.stderr.isatty() else {"mininterval": 30, "bar_format": "{l_bar}{bar}{r_bar}\n"}
        bar = tqdm(total=args.total_timesteps, initial=counters["global_step"], unit_scale=1, disable=rank > 0, **tty)
        while counters["global_step"] < args.total_timesteps and not stop:
            # --- games
            started = time.perf_counter()
            now = scheduled(args, counters["global_step"] / args.total_timesteps)  # the arguments of this update
            optimizer.param_groups[0]["lr"] = now.learning_rate
            pairs = draw_pairs(agent.policy, pool, now, rng)
            try:
                payoffs, data, lost = play(games, pairs, rng, agent.policy)
            except (ConnectionError, RuntimeError):  # a server that died, or is out of reach
                if rank == 0:
                    save(run_dir / "checkpoint.pt", parts, counters, args)
                raise

            # --- values, advantages
            if data is None or len(data.sequence.unique()) < args.num_minibatches:
                raise InputError(f"too few sequences for --num-minibatches {args.num_minibatches}")
            data = data._replace(reward=data.reward / games.max_payoff)
            pieces = spans(data.sequence if args.recurrent else torch.arange(len(data.action), device=device))
            targets = make_targets(agent, reference, data, pieces, args)
            batch_size = float(all_sum(torch.tensor(float(len(data.action)), device=device)))
            if args.norm_adv:
                advantages = targets.advantages - all_sum(targets.advantages.sum()) / batch_size
                std = (all_sum(advantages.square().sum()) / batch_size).sqrt()
                targets = targets._replace(advantages=advantages / (std + 1e-8))

            # --- PPO
            log = []  # metrics of each minibatch: each process holds its share of the sum
            for _ in range(args.update_epochs):
                order = torch.randperm(len(pieces[0]), generator=rng, device=device)
                for chosen in order.tensor_split(args.num_minibatches):
                    some = pieces[0][chosen], pieces[1][chosen]
                    log.append(descend(agent, optimizer, data, targets, some, batch_size / args.num_minibatches, now))
                kl = torch.stack([metrics["approx_kl"] for metrics in log[-args.num_minibatches :]]).mean()
                if args.target_kl and all_sum(kl) > args.target_kl:
                    break
            means = {name: torch.stack([metrics[name] for metrics in log]).mean() for name in log[0]}
            scalars = {f"losses/{name}": float(all_sum(x)) for name, x in means.items()}

            # --- reference, snapshots, counters
            with torch.no_grad():
                for old, new in zip(reference.parameters(), agent.policy.parameters(), strict=True):
                    old.lerp_(new, now.ref_rate)
            counters["updates"] += 1
            counters["global_step"] += int(batch_size)
            counters["games"] += world * len(pairs)
            counters["lost_games"] += int(all_sum(torch.tensor(lost, device=device)))
            counters["seconds"] += time.perf_counter() - started
            if counters["games"] - max(pool.nets) >= args.snapshot_every:
                pool.add(agent.policy, counters["games"])
            done = counters["global_step"] >= args.total_timesteps
            stop = bool(all_sum(torch.tensor(float(len(signals)), device=device))) and not done
            if rank > 0:
                continue

            # --- log, save, evaluate
            booked = zip(pairs, payoffs.tolist(), strict=True)  # the learner's payoffs in games against others
            booked = [payoff[pair[1] is agent.policy] for pair, payoff in booked if pair[0] is not pair[1]]
            counters["recent"] = [*counters["recent"], *booked][-100:]
            scalars["charts/episodic_return"] = counters["train_return_mean"] = fmean(counters["recent"] or [math.nan])
            counters["sps"] = scalars["charts/SPS"] = counters["global_step"] / counters["seconds"]
            scalars["selfplay/games_per_s"] = counters["games"] / counters["seconds"]
            scalars["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            scalars["losses/first_ratio_error"] = world * float(log[0]["ratio_error"])
            if scalars["losses/first_ratio_error"] > 1e-3:
                bar.write("warning: games and update compute different log-probabilities", file=sys.stderr)
            scalars["selfplay/games"], scalars["selfplay/lost_games"] = counters["games"], counters["lost_games"]
            scalars |= game_scalars(data, targets)
            bar.update(min(int(batch_size), bar.total - bar.n))
            log_scalars(writer, scalars, counters["global_step"])
            due = done or (args.checkpoint_every and counters["updates"] % args.checkpoint_every == 0)
            if due or stop:
                save(run_dir / "checkpoint.pt", parts, counters, args)
            if due and not stop:
                scores = assess(eval_games, agent, reference, args)
                if signals:  # which cut it short; the next update hears of them on all ranks
                    continue
                log_scalars(writer, scores, counters["global_step"])
                if scores["eval/score"] > counters.get("best", -math.inf):
                    counters["best"] = scores["eval/score"]
                    for name in ("best.pt", "checkpoint.pt"):
                        save(run_dir / name, parts, counters, args)
    finally:
        for part in (games, bar, writer):
            if part is not None:
                part.close()
        if writer and counters["global_step"] < args.total_timesteps:
            print(f"continue with: python {sys.argv[0]} --resume {run_dir}", file=sys.stderr)
    return {} if rank > 0 or stop or signals else summary(run_dir, counters, scores)


def main() -> None:
    given = re.search(r"--env[-_]id[ =](\S+)", " ".join(sys.argv))  # so that --help shows the defaults of that game
    args = tyro.cli(Args, default=Args(env_id=given[1]) if given else Args())
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
        prefix = "win_rate_vs_"
        lines = [f"won {x:.0%} against {n.removeprefix(prefix)}" for n, x in result.items() if n.startswith(prefix)]
        if "exploitability" in result:
            average = result["exploitability_average"]
            lines.append(f"exploitability {result['exploitability']}, of the average {average}, in equilibrium 0")
        print(" | ".join(lines))
        if not args.evaluate:
            print(f"watch: tensorboard --logdir {args.runs_dir}")
            print(f"evaluate: python {sys.argv[0]} --evaluate {result['run_dir']}/checkpoint.pt")
        print(json.dumps(result))


if __name__ == "__main__":
    main()
