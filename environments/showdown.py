"""Pokémon Showdown battles, many at once, between two seats each (https://github.com/smogon/pokemon-showdown).

The server is the npm package `pokemon-showdown` (`npm ci --omit=optional` in the project's folder), and poke-env talks
to it. Two accounts, one for each player, play all battles over one connection each. poke-env runs in its own thread;
all methods here belong to the thread that made the object.

Formats are singles. The server makes the teams, as in gen9randombattle, or both players have the one that is given, as
in gen9ou. What a player knows, its actions and its material are `showdown_obs`'s. The server's dice cannot be seeded:
no two runs are alike."""

import asyncio
import atexit
import contextlib
import difflib
import logging
import os
import queue
import random
import secrets
import shutil
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from poke_env import AccountConfiguration, ServerConfiguration
from poke_env.battle import Battle
from poke_env.concurrency import POKE_LOOP
from poke_env.data import to_id_str
from poke_env.player import MaxBasePowerPlayer, Player, SimpleHeuristicsPlayer
from poke_env.player.battle_order import BattleOrder
from poke_env.teambuilder import ConstantTeambuilder, Teambuilder
from websockets.exceptions import WebSocketException

from environments.games import Ended, Turn
from environments.showdown_obs import NUM_ACTIONS, entry_names, legal_orders, material, observe, options

RECONNECT_SECONDS = 60
SILENT_SECONDS = 120  # without a word from the server while battles run
LOGIN_SECONDS = 60
START_SECONDS = 60
SIMULATORS = min(2, max(0, (os.cpu_count() or 1) - 2))  # processes that play the battles; 0: the server's own does
NOT_SINGLES = ("double", "triple", "multi", "freeforall", "vgc", "metronome", "bo3", "bestof", "2v2")

CONFIG = """'use strict';
exports.port = 0;  // any free one; printed below
exports.bindaddress = '127.0.0.1';
exports.nothrottle = exports.noguestsecurity = exports.noipchecks = true;
exports.subprocesses = {network: 0, simulator: SIMULATORS, validator: 0, verifier: 0, localartemis: 0, remoteartemis: 0,
  friends: 0, chatdb: 0, modlog: 0, pm: 0, battlesearch: 0, datasearch: 0};
exports.repl = exports.watchconfig = exports.reportbattles = exports.reportjoins = false;
if (!process.send) {  // the main process, not the simulator's
  const {Server} = require('net'), listen = Server.prototype.listen;
  Server.prototype.listen = function (...args) {
    return listen.apply(this.once('listening', () => console.log('LISTENING', this.address().port)), args);
  };
  process.stdin.on('end', () => {  // whoever started the server has closed it, or is dead
    require('fs').rmSync(require('path').dirname(__dirname), {recursive: true, force: true});
    process.exit();
  }).resume();
}
"""


class Server:
    """A server of one's own on a free port of the loopback device, in a private folder that links to the package.

    It ends when its standard input does: by `close`, and however else this process ends, be it by kill -9.

    Raises:
        FileNotFoundError: node or the package is missing.
        RuntimeError: the server did not start.
    """

    def __init__(self):
        package = find_package()
        self.folder = Path(tempfile.mkdtemp(prefix="showdown-"))
        for name in ("config/chat-plugins", "logs/repl"):
            (self.folder / name).mkdir(parents=True)
        for entry in package.iterdir():
            if entry.name not in ("config", "logs", "node_modules"):
                (self.folder / entry.name).symlink_to(entry)
        (self.folder / "node_modules").symlink_to(package.parent)
        (self.folder / "config/config.js").write_text(CONFIG.replace("SIMULATORS", str(SIMULATORS)))
        keep = ("--preserve-symlinks", "--preserve-symlinks-main")  # so that it takes this folder for its own
        self.process = subprocess.Popen(
            ["node", *keep, str(self.folder / "dist/server/index.js")],
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
            text=True,
            errors="replace",
            cwd=self.folder,
            start_new_session=True,  # Ctrl-C is for this process, which then ends the server
        )
        self.log: deque[str] = deque(maxlen=15)
        self.port: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # None: it ended
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()
        try:
            port = self.port.get(timeout=START_SECONDS)
        except queue.Empty:
            port = None
        except BaseException:
            self.close()
            raise
        if port is None:
            self.close()
            raise RuntimeError(f"the Showdown server did not start: {self.tail()}")
        self.url = f"ws://127.0.0.1:{port}/showdown/websocket"

    def read(self) -> None:
        for line in self.process.stdout:
            if line.startswith("LISTENING "):
                self.port.put(int(line.split()[1]))
            else:
                self.log.append(line.strip())
        self.port.put(None)

    def tail(self) -> str:
        return " / ".join(line for line in self.log if line) or "(no output)"

    def check(self) -> None:
        """Raises: RuntimeError: the server has died."""
        if self.process.poll() is not None:
            self.reader.join(timeout=1)
            raise RuntimeError(f"the Showdown server died (exit code {self.process.returncode}): {self.tail()}")

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def find_package() -> Path:
    if shutil.which("node") is None:
        raise FileNotFoundError("Node.js is not installed: install node 20 or later, then run npm ci --omit=optional")
    for root in (Path(__file__).resolve().parent.parent, Path.cwd()):
        package = root / "node_modules" / "pokemon-showdown"
        if (package / "dist/server/index.js").exists():
            return package
    raise FileNotFoundError("the Pokémon Showdown server is not installed: run npm ci --omit=optional")


class Event(NamedTuple):
    """What the accounts report from their thread."""

    link: "Link"
    kind: str  # decide, rejected, finished, trouble
    player: int = 0
    tag: str = ""  # the battle's name on the server
    battle: Battle | None = None
    future: asyncio.Future | None = None  # takes the BattleOrder
    error: Exception | None = None


class Account(Player):
    """One player's connection. It leaves every choice to whoever reads `link.events`."""

    DEFAULT_CHOICE_CHANCE = 0  # never answer a rejected choice by itself

    def __init__(self, link: "Link", player: int, name: str, replays: str | bool):
        server = ServerConfiguration(link.url, "")
        super().__init__(
            AccountConfiguration(name, None),
            **{"battle_format": link.env_id, "server_configuration": server, "save_replays": replays},
            **{"max_concurrent_battles": 0, "log_level": logging.CRITICAL + 1, "start_listening": False},
            **{"open_timeout": LOGIN_SECONDS, "team": link.team},
        )
        self.logger.handlers.clear()
        self.link, self.player = link, player
        self.formats = ""
        self.verdict: asyncio.Future[str] | None = None  # what the server says of the team
        self.handle = self.ps_client._handle_message
        self.ps_client._handle_message = self.handle_message

    async def handle_message(self, message: str) -> None:
        """Passes a message on to poke-env; whatever goes wrong there becomes an event."""
        try:
            self.formats = next((line for line in message.split("\n") if line.startswith("|formats|")), self.formats)
            if message.startswith("|popup|") and self.verdict and not self.verdict.done():
                self.verdict.set_result(" ".join(message[7:].replace("||", " ").split()))
            elif message.startswith("|popup|") and not self.link.entered.is_set():  # the challenge was refused
                raise RuntimeError(f"the Showdown server says: {message[7:]}")
            await self.handle(message)
            if message.startswith(">battle") and "|deinit" in message:
                self._battles.pop(message.split("\n")[0][1:], None)
        except Exception as error:
            self.link.fail(error)

    async def leave(self) -> None:
        if hasattr(self.ps_client, "websocket"):  # it got as far as a connection
            for tag in [tag for tag, battle in self._battles.items() if not battle.finished and self.player == 0]:
                await self.ps_client.send_message("/forfeit", tag)
            await self.ps_client.websocket.close()

    async def _create_battle(self, split_message: list[str]) -> Battle:
        battle = await super()._create_battle(split_message)
        self.link.opened(self.player, battle.battle_tag)
        return battle

    async def _handle_challenge_request(self, split_message: list[str]) -> None:
        if to_id_str(split_message[2]) == to_id_str(self.link.accounts[0].username) and self.player == 1:
            await self.ps_client.send_message(f"/accept {self.link.accounts[0].username}")

    async def _handle_battle_message(self, split_messages: list[list[str]]) -> None:
        for message in split_messages:
            if message[1:2] == ["error"]:
                if not message[2].startswith(("[Invalid choice]", "[Unavailable choice]")):
                    raise RuntimeError(f"the Showdown server says: {message[2]}")
                self.link.events.put(Event(self.link, "rejected", self.player, split_messages[0][0][1:]))
        await super()._handle_battle_message(split_messages)

    def choose_move(self, battle: Battle) -> asyncio.Future:
        future = POKE_LOOP.create_future()
        self.link.events.put(Event(self.link, "decide", self.player, battle.battle_tag, battle, future))
        return future

    async def teampreview(self, battle: Battle) -> str:
        return (await self.choose_move(battle)).message

    def _battle_finished_callback(self, battle: Battle) -> None:
        self.link.events.put(Event(self.link, "finished", self.player, battle.battle_tag, battle))


class Link:
    """A connection of both accounts to a server. It lives in poke-env's thread and is given up once it failed."""

    def __init__(
        self, url: str, env_id: str, seed: int, events: queue.SimpleQueue, replays: str | bool, team: Teambuilder | None
    ):
        self.url, self.env_id, self.events, self.team = url, env_id, events, team
        self.slots: dict[str, int] = {}  # of the battles that run, by their tag
        self.waiting: asyncio.Queue[int] = asyncio.Queue()  # slots to start a battle in
        self.starting: tuple[int, set[int]] = (-1, set())  # the slot, and the players that entered its battle
        self.entered = asyncio.Event()  # both did
        self.entered.set()
        self.failure: asyncio.Future[Exception] = POKE_LOOP.create_future()
        names = [f"{'ab'[player]}{seed % 10000}x{secrets.token_hex(5)}" for player in range(2)]
        self.accounts = [Account(self, 0, names[0], replays), Account(self, 1, names[1], False)]
        self.tasks = [POKE_LOOP.create_task(self.listen(account)) for account in self.accounts]
        self.tasks.append(POKE_LOOP.create_task(self.starter()))

    async def open(self) -> str:
        """Waits for the login. Returns the server's list of formats."""
        login = asyncio.create_task(self.log_in())
        await asyncio.wait([login, self.failure], timeout=LOGIN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if login.done() and not isinstance(login.exception(), WebSocketException):
            return login.result()
        error = self.failure.result() if self.failure.done() else login.exception() if login.done() else "no answer"
        login.cancel()
        raise ConnectionError(f"cannot log in to the Showdown server at {self.url}: {error}")

    async def log_in(self) -> str:
        for account in self.accounts:
            await account.ps_client.logged_in.wait()
            if self.team:
                await account.ps_client.set_team(account.next_team)
                account.verdict = POKE_LOOP.create_future()
                await account.ps_client.send_message(f"/vtm {self.env_id}")
                if not (await account.verdict).startswith("Your team is valid"):
                    raise ValueError(account.verdict.result())
        return self.accounts[0].formats

    async def listen(self, account: Account) -> None:
        try:
            await account.ps_client.listen()
            self.fail(ConnectionError("the connection is closed"))
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        if not self.failure.done():
            self.failure.set_result(error)
            self.events.put(Event(self, "trouble", error=error))

    async def starter(self) -> None:
        """Begins battles one after the other: the server allows one challenge at a time between two accounts."""
        try:
            while True:
                self.starting = (await self.waiting.get(), set())
                self.entered.clear()
                challenger, challenged = self.accounts
                await challenger.ps_client.send_message(f"/challenge {challenged.username}, {self.env_id}")
                await asyncio.wait_for(self.entered.wait(), START_SECONDS)
        except TimeoutError:
            self.fail(RuntimeError(f"the Showdown server did not start a battle within {START_SECONDS} s"))
        except Exception as error:
            self.fail(error)

    def opened(self, player: int, tag: str) -> None:
        slot, players = self.starting
        self.slots[tag] = slot
        players.add(player)
        if len(players) == 2:
            self.entered.set()

    async def close(self) -> None:
        self.fail(ConnectionError("closed"))
        for task in (*self.tasks, *(task for account in self.accounts for task in account.ps_client._active_tasks)):
            task.cancel()
        for account in self.accounts:
            with contextlib.suppress(OSError, WebSocketException, TimeoutError):  # it is gone already
                await asyncio.wait_for(account.leave(), timeout=2)


class Decision(NamedTuple):
    """What a seat has to answer."""

    battle: Battle
    orders: list[BattleOrder | None]  # of each action
    future: asyncio.Future


class ShowdownGames:
    """`num_games` slots of one format. Seat 2 * slot + player sees `showdown_obs.observe` of its own player's battle.

    Actions: 0-3 moves, 4-7 the same moves with terastallisation, 8-13 switches to team members 0-5. The reward is the
    outcome (1, 0 or -1) plus the change of `showdown_obs.material`: ko_coef for each Pokémon, hp_coef for its HP.

    `server` is "start" (one of its own) or the URL of a running one that was started with --no-security. `seed` goes
    into the accounts' names and into Python's `random`, which the scripted players draw from. A battle that lasts 1,000
    turns is a draw by the server's own rule. With `replay_dir`, finished battles are saved there as HTML. `team` is the
    text of a team, as Showdown exports it; in a team preview a switch chooses who begins.

    `rejected` counts choices that the server did not accept, as for a Pokémon that turns out to be trapped; the seat is
    then asked again, without that action.

    Raises:
        ValueError: not a singles format, it needs a team, or the server rejects the one that is given.
        FileNotFoundError: node or the server is not installed.
        ConnectionError: no server at the URL, or lost and not back within RECONNECT_SECONDS.
        RuntimeError: a server of its own died, or the server or poke-env failed.
    """

    num_actions = NUM_ACTIONS
    unseen_size = 0  # nothing for a critic beyond what the player sees
    max_payoff = 1.0
    scripted = ("max_power", "heuristic")

    def __init__(
        self,
        env_id: str,
        num_games: int,
        server: str = "start",
        seed: int = 1,
        ko_coef: float = 0.0,
        hp_coef: float = 0.0,
        replay_dir: Path | None = None,
        team: str | None = None,
    ):
        self.env_id, self.num_games, self.seed = env_id, num_games, seed
        self.team = read_team(team) if team else None
        self.ko_coef, self.hp_coef = ko_coef, hp_coef
        self.replays = str(replay_dir) if replay_dir is not None else False
        self.rejected = 0
        self.running: set[int] = set()  # slots
        self.pending: dict[int, Decision] = {}  # by seat
        self.finished: dict[int, dict[int, Battle]] = {}  # by slot, then player
        self.material = np.zeros(2 * num_games)  # at each seat's last decision
        self.last_action = np.zeros(2 * num_games, np.int64)
        self.refused: dict[int, set[int]] = {}  # by seat: actions rejected in the present decision
        self.asked_again: set[int] = set()  # seats
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.link = self.server = None
        random.seed(seed)
        logging.getLogger("poke-env").setLevel(logging.CRITICAL + 1)
        try:
            atexit.register(self.close)
            self.server = Server() if server == "start" else None
            self.url = self.server.url if self.server else full_url(server)
            check_format(env_id, self.connect(), team)
            self.entry_names = entry_names(int(env_id[3]))
        except BaseException:
            self.close()
            raise
        self.obs_size, self.options = len(self.entry_names), options(self.entry_names)

    def connect(self) -> str:
        async def open_link() -> Link:
            return Link(self.url, self.env_id, self.seed, self.events, self.replays, self.team)

        self.link = in_loop(open_link())
        return in_loop(self.link.open())

    def start(self, slots: Iterable[int]) -> None:
        if self.server:
            self.server.check()
        for slot in slots:
            self.running.add(slot)
            self.material[2 * slot : 2 * slot + 2] = 0
            POKE_LOOP.call_soon_threadsafe(self.link.waiting.put_nowait, slot)

    def observe(self) -> Turn:
        if not self.running:
            raise RuntimeError("no battle is running")
        seats: list[int] = []
        ended: list[Ended] = []
        while not seats and not ended:
            try:
                events = [self.events.get(timeout=SILENT_SECONDS)]
            except queue.Empty:
                events = [Event(self.link, "trouble", error=ConnectionError("the server is silent"))]
            while not self.events.empty():
                events.append(self.events.get())
            for event in events:
                if event.link is self.link:
                    self.take(event, seats, ended)
        obs = np.zeros((len(seats), self.obs_size), np.float32)  # [M, D]
        action_mask = np.zeros((len(seats), NUM_ACTIONS), bool)  # [M, A]
        reward = np.zeros(len(seats), np.float32)  # [M]
        for row, seat in enumerate(seats):
            battle, orders, _ = self.pending[seat]
            obs[row] = observe(battle)
            action_mask[row] = [order is not None for order in orders]
            reward[row] = self.gain(seat, battle)
        return Turn(np.array(seats, np.int64), obs, action_mask, reward, ended)

    def take(self, event: Event, seats: list[int], ended: list[Ended]) -> None:
        """Adds what an event brings to the seats that have to act and the games that ended."""
        if event.kind == "trouble":
            seats.clear()
            ended.extend(self.lost(event.error))
            return
        slot = event.link.slots.get(event.tag)
        if slot is None:
            return  # a late word on a battle that has ended
        seat = 2 * slot + event.player
        if event.kind == "rejected":
            self.rejected += 1
            self.refused.setdefault(seat, set()).add(int(self.last_action[seat]))
            self.asked_again.add(seat)
        elif event.kind == "decide":
            if seat not in self.asked_again:
                self.refused.pop(seat, None)
            self.asked_again.discard(seat)
            orders = legal_orders(event.battle, self.refused.get(seat, ()))
            self.pending[seat] = Decision(event.battle, orders, event.future)
            seats.append(seat)
        elif event.kind == "finished":
            battles = self.finished.setdefault(slot, {})
            battles[event.player] = event.battle
            if len(battles) == 2:
                ended.append(self.end(slot))
                del event.link.slots[event.tag]

    def end(self, slot: int) -> Ended:
        battles = self.finished.pop(slot)
        self.running.discard(slot)
        outcome = float(battles[0].won is True) - float(battles[1].won is True)
        payoff = np.array([outcome, -outcome])
        gains = [self.gain(2 * slot + player, battles[player]) for player in range(2)]
        return Ended(slot, payoff, (payoff + gains).astype(np.float32))

    def gain(self, seat: int, battle: Battle) -> float:
        """The change of material since the last call for this seat."""
        before, now = self.material[seat], material(battle, self.ko_coef, self.hp_coef)
        self.material[seat] = now
        return now - before

    def lost(self, error: Exception) -> list[Ended]:
        """Gives all running battles up and connects again.

        Raises: see the class.
        """
        ended = [Ended(slot, None, np.zeros(2, np.float32)) for slot in sorted(self.running)]
        for state in (self.running, self.pending, self.finished, self.refused, self.asked_again):
            state.clear()
        in_loop(self.link.close())
        if not isinstance(error, (OSError, WebSocketException)):
            raise RuntimeError(f"a Pokémon Showdown battle failed: {type(error).__name__}: {error}") from error
        began, delay = time.monotonic(), 0.1
        while True:
            if self.server:
                self.server.check()
            try:
                self.connect()
                return ended
            except ConnectionError:
                in_loop(self.link.close())
            if time.monotonic() + delay > began + RECONNECT_SECONDS:
                raise ConnectionError(f"lost the Showdown server at {self.url} ({error}), and it does not come back")
            time.sleep(delay)
            delay *= 2

    def act(self, seat: np.ndarray, action: np.ndarray) -> None:
        """Answers pending decisions. Those of battles that were lost meanwhile are ignored.

        Raises:
            ValueError: an illegal action.
        """
        answers = []
        for one, choice in zip(np.asarray(seat).tolist(), np.asarray(action).tolist(), strict=True):
            decision = self.pending.pop(one, None)
            if decision is not None:
                if decision.orders[choice] is None:
                    raise ValueError(f"action {choice} of seat {one} is illegal")
                self.last_action[one] = choice
                answers.append((decision.future, decision.orders[choice]))
        POKE_LOOP.call_soon_threadsafe(answer, answers)

    def choose(self, name: str, seat: int) -> int:
        battle, orders, _ = self.pending[seat]
        legal = [action for action, each in enumerate(orders) if each is not None]
        if battle.teampreview:  # as poke-env's players do
            return random.choice(legal)
        if name == "max_power":
            order = MaxBasePowerPlayer.choose_singles_move(battle)
        elif name == "heuristic":
            order, _ = SimpleHeuristicsPlayer.choose_singles_move(battle)
        else:
            raise ValueError(f"no scripted player {name}; there are {', '.join(self.scripted)}")
        return next((action for action in legal if orders[action] == order), legal[0])

    def close(self) -> None:
        atexit.unregister(self.close)
        link, server = self.link, self.server
        self.link = self.server = None
        if link is not None:
            in_loop(link.close())
        if server is not None:
            server.close()


def answer(answers: list[tuple[asyncio.Future, BattleOrder]]) -> None:
    for future, order in answers:
        if not future.done():
            future.set_result(order)


def in_loop(coroutine: Coroutine):
    """Runs a coroutine in poke-env's thread and returns its result."""
    return asyncio.run_coroutine_threadsafe(coroutine, POKE_LOOP).result()


def full_url(server: str) -> str:
    if not server.startswith(("ws://", "wss://")):
        raise ValueError(f'server must be "start" or ws://host:port, not {server}')
    return server if server.count("/") > 2 else f"{server}/showdown/websocket"


def read_team(text: str) -> Teambuilder:
    try:
        return ConstantTeambuilder(text)
    except (KeyError, IndexError) as error:  # of a word that poke-env does not know, of a line that has none
        raise ValueError(f"the team cannot be read: {error!r}") from error


def check_format(env_id: str, formats: str, team: str | None) -> None:
    """`formats`: the server's list, |formats|,1|section|name,flags|name,flags...; flag 1: it needs no team.

    Raises:
        ValueError: not one that can be played here.
    """
    entries = [entry.rpartition(",") for entry in formats.split("|")[2:] if "," in entry and not entry.startswith(",")]
    known = {to_id_str(name): int(flags, 16) & 1 for name, _, flags in entries}
    singles = [name for name in known if not any(word in name for word in NOT_SINGLES)]
    playable = [name for name in singles if known[name] or team]
    if env_id not in playable:
        near = ", ".join(difflib.get_close_matches(env_id, playable, 3, 0.3))
        why = "is not a singles format" if env_id in known else "is unknown to the Showdown server"
        why = "needs a team (--team)" if env_id in singles else why
        raise ValueError(f"the format {env_id!r} {why}; near it: {near}")
