"""OpenSpiel's two-player zero-sum games, many at a time (Lanctot et al., arXiv 1908.09453), with exact exploitability.

A player sees the *observation* tensor (what is visible now), not the information-state tensor (its whole history): to
play well it has to remember."""

import bisect
import functools
import itertools
import os
import sys
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pyspiel

from environments.games import Ended, Turn


class OpenSpielGames:
    """`num_games` slots of one game. Observations [D] are the game's observation tensor, scaled to about [-1, 1], then
    one entry for each player: who sees it. `unseen` [E] is the other player's tensor.

    Raises:
        ValueError: not a two-player zero-sum game with observation tensors.
    """

    scripted, options = (), ()  # no players of its own; no actions that are alike

    def __init__(self, env_id: str, num_games: int, seed: int, params: dict | None = None):
        self.game = load_game(env_id, params or {})
        kind = self.game.get_type()
        if self.game.num_players() != 2 or kind.utility != pyspiel.GameType.Utility.ZERO_SUM:
            raise ValueError("not a two-player zero-sum game")
        if not kind.provides_observation_tensor:
            raise ValueError("this game has no observation tensor")
        self.num_games = num_games
        self.num_actions = self.game.num_distinct_actions()
        self.unseen_size = int(np.prod(self.game.observation_tensor_shape()))
        self.obs_size = self.unseen_size + 2
        self.max_payoff = max(abs(self.game.min_utility()), abs(self.game.max_utility()))
        self.rng = np.random.default_rng(seed)
        self.states: list[pyspiel.State | None] = [None] * num_games
        self.running: list[int] = []  # slots whose players have to act
        self.ended: list[Ended] = []
        self.scale = np.ones(self.obs_size, np.float32)  # until it is known
        self.scale = self.largest_entries()

    def largest_entries(self, games: int = 50) -> np.ndarray:
        """The largest absolute value [D] of each entry in some random games; at least 1."""
        rng, largest = np.random.default_rng(0), np.ones(self.obs_size, np.float32)
        for _ in range(games):
            state = self.game.new_initial_state()
            while not state.is_terminal():
                if not state.is_chance_node():
                    for player in acting(state):
                        largest = np.maximum(largest, np.abs(self.observation(state, player)))
                play(state, [rng.choice(state.legal_actions(player)) for player in acting(state)])
        return largest

    def observation(self, state: pyspiel.State, player: int) -> np.ndarray:
        one_hot = [1.0, 0.0] if player == 0 else [0.0, 1.0]
        return np.array(state.observation_tensor(player) + one_hot, np.float32) / self.scale  # [D]

    def start(self, slots: Iterable[int]) -> None:
        for slot in slots:
            self.states[slot] = self.game.new_initial_state()
            self.settle(slot)

    def settle(self, slot: int) -> None:
        """Plays chance's moves until somebody has to act or the game has ended."""
        state = self.states[slot]
        while state.is_chance_node():
            actions, probabilities = zip(*state.chance_outcomes(), strict=True)
            which = bisect.bisect(list(itertools.accumulate(probabilities)), self.rng.random())
            state.apply_action(actions[min(which, len(actions) - 1)])
        if state.is_terminal():
            payoff = np.array(state.returns(), np.float32)
            self.ended.append(Ended(slot, payoff, payoff))
        else:
            self.running.append(slot)

    def observe(self) -> Turn:
        ended, self.ended = self.ended, []
        turns = [(slot, player) for slot in self.running for player in acting(self.states[slot])]
        seat = np.array([2 * slot + player for slot, player in turns], np.int64)
        views = [[self.states[slot].observation_tensor(p) for p in (player, 1 - player)] for slot, player in turns]
        views = np.array(views, np.float32).reshape(len(seat), 2, self.obs_size - 2) / self.scale[:-2]
        obs = np.concatenate((views[:, 0], np.eye(2, dtype=np.float32)[seat % 2]), 1)
        action_mask = np.array([self.states[slot].legal_actions_mask(player) for slot, player in turns], bool)
        action_mask = action_mask.reshape(len(seat), self.num_actions)
        return Turn(seat, obs, action_mask, np.zeros(len(seat), np.float32), ended, views[:, 1])

    def act(self, seat: np.ndarray, action: np.ndarray) -> None:
        """Takes the actions of all seats of the last turn."""
        chosen = dict(zip(seat.tolist(), action.tolist(), strict=True))
        before, self.running = self.running, []
        for slot in before:
            play(self.states[slot], [chosen[2 * slot + player] for player in acting(self.states[slot])])
            self.settle(slot)

    @functools.cached_property
    def levels(self) -> list["Level"]:
        """The game's information states; none, with a line that says why, if there is no exploitability to be had."""
        try:
            return information_states(self)
        except ValueError as error:
            print(f"no exploitability: {error}", file=sys.stderr)
            return []

    def close(self) -> None:
        pass


def load_game(env_id: str, params: dict) -> pyspiel.Game:
    """pyspiel.load_game, without the line that OpenSpiel itself writes to standard error where it raises."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        return pyspiel.load_game(env_id, params)
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def acting(state: pyspiel.State) -> list[int]:
    """The players who have to act in this state; one negative number in a chance node."""
    return [0, 1] if state.is_simultaneous_node() else [state.current_player()]


def play(state: pyspiel.State, actions: list[int]) -> None:
    state.apply_actions(actions) if state.is_simultaneous_node() else state.apply_action(actions[0])


class Level(NamedTuple):
    """The M information states, of both players, after the same number of own decisions."""

    name: list[str]  # [M] OpenSpiel's information-state strings
    obs: np.ndarray  # [M, D]
    action_mask: np.ndarray  # [M, A]
    parent: np.ndarray  # [M] the player's previous information state, a row of the level before; -1 = none
    action: np.ndarray  # [M] the player's action there; -1 = none


def information_states(games: OpenSpielGames, limit: int = 400_000) -> list[Level]:
    """Walks the whole game tree and gives the information states by their number of own decisions before.

    A recurrent policy has one distribution for each only if what it has seen (own observations and actions, in order)
    tells them apart and nothing more; that is checked.

    Raises:
        ValueError: simultaneous moves, more than `limit` histories, or the check fails.
    """
    kind = games.game.get_type()
    if kind.dynamics != pyspiel.GameType.Dynamics.SEQUENTIAL:
        raise ValueError("it needs a game of alternating moves")
    if not kind.provides_information_state_string:
        raise ValueError("the game does not name its information states")
    memories: dict[str, tuple] = {}  # information state -> what the player has seen
    names: dict[tuple, str] = {}  # the reverse
    place: dict[str, tuple[int, int]] = {}  # information state -> level, row in it
    levels: list[list[tuple]] = []
    stack = [(games.game.new_initial_state(), (None, None))]  # and each player's last information state and action
    histories = 0
    while stack:
        state, last = stack.pop()
        histories += 1
        if histories > limit:
            raise ValueError(f"the game has more than {limit} histories")
        player = state.current_player()
        if player < 0:
            stack += [(state.child(action), last) for action in state.legal_actions()]
            continue
        name, obs = state.information_state_string(player), games.observation(state, player)
        memory = player, last[player], obs.tobytes()
        if memories.setdefault(name, memory) != memory or names.setdefault(memory, name) != name:
            raise ValueError("observations and own actions are not the same as information states")
        if name not in place:
            parent, action = last[player] or (None, -1)
            before, row = place.get(parent, (-1, -1))
            if before + 2 > len(levels):
                levels.append([])
            place[name] = before + 1, len(levels[before + 1])
            levels[before + 1].append((name, obs, np.array(state.legal_actions_mask(player), bool), row, action))
        for action in state.legal_actions():
            after = (name, action)
            stack.append((state.child(action), (after, last[1]) if player == 0 else (last[0], after)))
    return [Level(list(name), *map(np.array, rest)) for name, *rest in (zip(*rows, strict=True) for rows in levels)]


def exploitability(games: OpenSpielGames, levels: list[Level], probs: list[np.ndarray]) -> float:
    """Half of what best responses to a policy win in the two seats together: 0 in equilibrium. `probs` [M, A] belong to
    the information states of `levels`."""
    policy = {}
    for level, table in zip(levels, probs, strict=True):
        for name, mask, row in zip(level.name, level.action_mask, table, strict=True):
            policy[name] = [(int(action), float(row[action])) for action in np.flatnonzero(mask)]
    return pyspiel.exploitability(games.game, policy)
