"""Pokémon Showdown: real battles on a server of the tests' own, and what happens when the server or the line fails."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("poke_env", reason="pip install -r requirements-envs.txt")

from poke_env.battle import Battle, Pokemon, Status

from environments import showdown, showdown_obs
from environments.showdown import ShowdownGames

ROOT = Path(__file__).parent.parent
FORMAT = "gen9randombattle"

if shutil.which("node") is None or not (ROOT / "node_modules/pokemon-showdown").exists():
    REASON = "NO POKEMON SHOWDOWN: install node, then run npm ci --omit=optional; its tests are skipped"
    warnings.warn(REASON, stacklevel=1)
    pytest.skip(REASON, allow_module_level=True)


@pytest.fixture(scope="session")
def server():
    server = showdown.Server()
    yield server
    server.close()


@pytest.fixture
def games(server, request):
    """ShowdownGames on the shared server, with the keyword arguments of the test's parameter."""
    games = ShowdownGames(**{"env_id": FORMAT, "server": server.url} | getattr(request, "param", {"num_games": 3}))
    yield games
    games.close()


@pytest.fixture
def errors(monkeypatch):
    """What the server says against choices, of the games that are made after this."""
    errors, handle = [], showdown.Account._handle_battle_message

    async def spy(self, split_messages):
        errors.extend(message[2] for message in split_messages if message[1:2] == ["error"])
        await handle(self, split_messages)

    monkeypatch.setattr(showdown.Account, "_handle_battle_message", spy)
    return errors


def uniform(rng, games, turn):
    return np.array([rng.choice(np.flatnonzero(mask)) for mask in turn.action_mask])


def play(games, battles, choose=uniform, watch=lambda turn: None):
    """Plays whole battles on all slots; returns what ended."""
    rng, ended, left = np.random.default_rng(0), [], battles - games.num_games
    games.start(range(games.num_games))
    while len(ended) < battles:
        turn = games.observe()
        watch(turn)
        games.act(turn.seat, choose(rng, games, turn))
        ended += turn.ended
        again = [end.slot for end in turn.ended][: max(left, 0)]
        left -= len(again)
        games.start(again)
    return ended


@pytest.mark.parametrize("games", [{"num_games": 4, "ko_coef": 0.3, "hp_coef": 0.2}], indirect=True)
def test_whole_battles(errors, games):
    """Legal actions are accepted but for what only the server knows, as that a Pokémon is trapped; observations have
    their form, rewards telescope to the final difference."""
    summed = np.zeros((4, 2))

    def watch(turn):
        assert len(turn.seat) + len(turn.ended) > 0
        assert turn.obs.shape == (len(turn.seat), games.obs_size) and turn.obs.dtype == np.float32
        assert turn.action_mask.shape == (len(turn.seat), games.num_actions) and turn.action_mask.dtype == bool
        assert np.isfinite(turn.obs).all() and turn.obs.min(initial=0) >= -1.5 and turn.obs.max(initial=0) <= 2
        assert turn.action_mask.any(1).all()
        assert len(set(turn.seat.tolist())) == len(turn.seat)
        for row, seat in enumerate(turn.seat):
            battle, orders, _ = games.pending[seat]
            summed[seat // 2, seat % 2] += turn.reward[row]
            assert battle.player_username == games.link.accounts[seat % 2].username and not battle.finished
            legal = {str(order) for order in orders if order is not None}
            assert legal == {str(order) for order in battle.valid_orders} or seat in games.refused
            assert len(legal) == turn.action_mask[row].sum()
            names = [f"{about}: {name}" for about, entries, _ in showdown_obs.blocks(battle) for name in entries]
            assert names == games.entry_names
        for end in turn.ended:
            summed[end.slot] += end.reward
            assert end.payoff.sum() == 0 and set(np.abs(end.payoff)) <= {0, 1}
            np.testing.assert_allclose(summed[end.slot], end.payoff + games.material.reshape(4, 2)[end.slot], atol=1e-4)
            assert end.payoff[0] * games.material[2 * end.slot] >= 0  # who has Pokémon left is ahead
            summed[end.slot] = 0

    ended = play(games, 8, watch=watch)
    assert len(ended) == 8 and games.rejected == len(errors)
    assert all(error.startswith("[Unavailable choice]") for error in errors)
    assert len(set(games.entry_names)) == games.obs_size == len(games.entry_names)
    assert {end.slot for end in ended} == set(range(4))
    with pytest.raises(RuntimeError, match="no battle"):
        games.observe()


@pytest.mark.parametrize("games", [{"num_games": 4}], indirect=True)
def test_options_tell_about_what_their_actions_order(games):
    """The entries of each option are those of the very move or Pokémon that its actions order."""
    seen = set()

    def watch(turn):
        for row, seat in enumerate(turn.seat):
            battle, orders, _ = games.pending[seat]
            view = showdown_obs.View(battle)
            for entries, actions in games.options:
                for of_option, its_actions in zip(entries, actions, strict=True):
                    for action in its_actions[turn.action_mask[row, its_actions]]:
                        ordered, tera = orders[action].order, getattr(orders[action], "terastallize", False)
                        if isinstance(ordered, Pokemon):
                            about = showdown_obs.own_member(view, view.team.index(ordered))
                        else:
                            about = showdown_obs.own_move(view, ordered, True)
                        np.testing.assert_array_equal(turn.obs[row, of_option], np.float32([*about.values()]))
                        assert tera == (4 <= action < 8)
                        seen.add(int(action))

    play(games, 8, watch=watch)
    assert seen == set(range(showdown_obs.NUM_ACTIONS))


TEAM = """
Great Tusk @ Leftovers
Ability: Protosynthesis
Tera Type: Water
EVs: 252 Atk / 4 Def / 252 Spe
Jolly Nature
- Headlong Rush
- Close Combat
- Rapid Spin
- Ice Spinner

Gholdengo @ Air Balloon
Ability: Good as Gold
Tera Type: Fairy
EVs: 252 SpA / 4 SpD / 252 Spe
Timid Nature
- Make It Rain
- Shadow Ball
- Recover
- Nasty Plot

Dragonite @ Heavy-Duty Boots
Ability: Multiscale
Tera Type: Normal
EVs: 252 Atk / 4 SpD / 252 Spe
Adamant Nature
- Dragon Dance
- Earthquake
- Extreme Speed
- Roost
"""


@pytest.mark.parametrize("games", [{"num_games": 3, "env_id": "gen9ou", "team": TEAM}], indirect=True)
def test_a_team_of_ones_own(games, errors):
    """Both players have it, choose who begins, see in the preview whom the other has, and play to the end."""
    begins = {}

    def watch(turn):
        for row, seat in enumerate(turn.seat):
            battle, _, _ = games.pending[seat]
            team = [mon.species for mon in battle.team.values()]
            assert set(team) == {"greattusk", "gholdengo", "dragonite"}
            if battle.teampreview:
                assert np.flatnonzero(turn.action_mask[row]).tolist() == [8, 9, 10]
                seen = dict(zip(games.entry_names, turn.obs[row], strict=True))
                assert [seen[f"opponent member {i}: known"] for i in range(6)] == [1, 1, 1, 0, 0, 0]
                assert games.choose("heuristic", int(seat)) in (8, 9, 10)
                begins[seat] = None
            else:  # what the preview showed stays known
                seen = dict(zip(games.entry_names, turn.obs[row], strict=True))
                assert sum(seen[f"opponent member {i}: known"] for i in range(6)) == 3
                if begins[seat] is None:
                    begins[seat] = battle.active_pokemon.species
                    assert begins[seat] == chosen[seat]

    def choose(rng, games, turn):
        actions = uniform(rng, games, turn)
        for seat, action in zip(turn.seat.tolist(), actions, strict=True):
            if games.pending[seat].battle.teampreview:
                chosen[seat] = list(games.pending[seat].battle.team.values())[action - 8].species
        return actions

    chosen = {}
    assert len(play(games, 6, choose, watch)) == 6 and len(begins) == 6
    assert all(error.startswith("[Unavailable choice]") for error in errors)


def test_teams_and_formats_that_do_not_fit(server):
    for env_id, team, why in (
        ("gen9ou", None, "needs a team"),
        (FORMAT, TEAM, "your own team"),
        ("gen9ou", TEAM.replace("Close Combat", "Spore"), "Great Tusk can't learn Spore"),
        ("gen9ou", "nonsense", "does not exist"),
        ("gen9ou", TEAM.replace("252 Spe", "252 Speeed"), "cannot be read"),
    ):
        with pytest.raises(ValueError, match=why):
            ShowdownGames(env_id, 1, server.url, team=team)


def test_own_knowledge_only(games):
    """A player's observation is made of its own Battle, and that one holds of the other side only what was shown."""
    games.start([0])
    turn = games.observe()
    while len(turn.seat) < 2:  # the first decision of both
        later = games.observe()
        turn = turn._replace(seat=np.append(turn.seat, later.seat))
    own, other = games.pending[0].battle, games.pending[1].battle
    before = showdown_obs.observe(own)
    assert len(own.team) == 6 and len(own.opponent_team) == 1
    for mon in other.team.values():  # what the other player's private request said
        mon._stats, mon._item, mon._ability = dict.fromkeys(mon.stats, 999), "choiceband", "levitate"
    other._available_moves, other._available_switches = [], []
    assert not (set(map(id, own.opponent_team.values())) & set(map(id, other.team.values())))
    np.testing.assert_array_equal(showdown_obs.observe(own), before)
    shown = own.opponent_active_pokemon
    assert not shown.moves and shown.stats["atk"] is None
    hidden = before[[i for i, name in enumerate(games.entry_names) if name.startswith("opponent member 1")]]
    assert not hidden.any()


@pytest.mark.parametrize("games", [{"num_games": 8}], indirect=True)
def test_scripted_players(games):
    """Their choices are legal, and better ones win more."""

    def choose(rng, games, turn):
        actions = uniform(rng, games, turn)
        for row, seat in enumerate(turn.seat):
            if seat % 2 == 0:
                actions[row] = games.choose("heuristic", int(seat))
            else:
                games.choose("max_power", int(seat))
            assert turn.action_mask[row, actions[row]]
        return actions

    ended = play(games, 16, choose)
    assert np.mean([end.payoff[0] for end in ended]) > 0.6
    assert games.scripted == ("max_power", "heuristic")


def test_replays(server, tmp_path):
    games = ShowdownGames(FORMAT, 1, server.url, replay_dir=tmp_path / "replays")
    try:
        play(games, 2)
    finally:
        games.close()
    pages = list((tmp_path / "replays").glob("*.html"))
    assert len(pages) == 2 and all("|turn|1" in page.read_text() for page in pages)


def test_rejected_choice(games):
    """The seat is asked again, once, without the action that the server refused."""
    games.start([0])
    turn = games.observe()
    seat, action = int(turn.seat[0]), int(turn.action_mask[0].argmax())
    games.pending[seat].orders[action] = SimpleNamespace(message="/choose move nosuchmove")
    games.act(np.array([seat]), np.array([action]))
    rest = [int(other) for other in turn.seat[1:]]
    while True:
        turn = games.observe()
        if seat in turn.seat:
            break
        rest += turn.seat.tolist()
    row = turn.seat.tolist().index(seat)
    assert games.rejected == 1 and not turn.action_mask[row, action] and turn.action_mask[row].any()
    assert turn.reward[row] == 0
    rng, seats = np.random.default_rng(0), [*rest, *turn.seat.tolist()]
    masks = [[order is not None for order in games.pending[one].orders] for one in seats]
    games.act(np.array(seats), np.array([rng.choice(np.flatnonzero(mask)) for mask in masks]))
    while not turn.ended:  # and the battle goes on to its end
        turn = games.observe()
        games.act(turn.seat, uniform(rng, games, turn))
    assert turn.ended[0].payoff is not None


def test_illegal_action(games):
    games.start([0])
    turn = games.observe()
    illegal = int(np.flatnonzero(~turn.action_mask[0])[0])
    with pytest.raises(ValueError, match="illegal"):
        games.act(turn.seat[:1], np.array([illegal]))


class Proxy:
    """A TCP proxy in front of a server, whose connections can be cut."""

    def __init__(self, url):
        self.target = int(url.split(":")[2].split("/")[0])
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"ws://127.0.0.1:{self.listener.getsockname()[1]}"
        self.sockets = []
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self.target))
            self.sockets += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self.pump, args=(source, sink), daemon=True).start()

    def pump(self, source, sink):
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            pass
        self.shut(sink)

    def shut(self, one):
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)

    def cut(self):
        sockets, self.sockets = self.sockets, []
        for one in sockets:
            self.shut(one)

    def close(self):
        self.shut(self.listener)
        self.listener.close()
        self.cut()


@pytest.fixture
def proxy(server):
    proxy = Proxy(server.url)
    yield proxy
    proxy.close()


def test_dropped_connection(proxy):
    """All running games end once, without a payoff; the same slots then play whole battles."""
    games = ShowdownGames(FORMAT, 3, proxy.url)
    try:
        games.start([0, 2])
        turn = games.observe()
        games.act(turn.seat, uniform(np.random.default_rng(0), games, turn))
        turn = games.observe()
        proxy.cut()
        later = games.observe()
        while not later.ended:
            later = games.observe()
        assert sorted((end.slot, end.payoff) for end in later.ended) == [(0, None), (2, None)]
        assert len(later.seat) == 0 and not games.running
        games.act(turn.seat, np.zeros(len(turn.seat), int))  # too late, and ignored
        assert all(end.payoff is not None for end in play(games, 3))
    finally:
        games.close()


def test_connection_that_does_not_come_back(proxy, monkeypatch):
    monkeypatch.setattr(showdown, "RECONNECT_SECONDS", 1)
    games = ShowdownGames(FORMAT, 1, proxy.url)
    try:
        games.start([0])
        games.observe()
        proxy.close()
        with pytest.raises(ConnectionError, match="does not come back"):
            while True:  # the other player's request may have come before the connection was lost
                games.observe()
    finally:
        games.close()


def test_error_in_poke_env_surfaces(games, monkeypatch):
    monkeypatch.setattr(Battle, "parse_request", lambda *args: 1 / 0)
    games.start([0])
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        games.observe()


def test_killed_server():
    games = ShowdownGames(FORMAT, 2)
    try:
        games.start([0, 1])
        games.observe()
        games.server.process.kill()
        with pytest.raises(RuntimeError, match="server died"):
            while True:
                games.observe()
        with pytest.raises(RuntimeError, match="server died"):
            games.start([0])
    finally:
        games.close()
        games.close()


def test_loopback_only(server):
    """The server's port is bound to 127.0.0.1 and to nothing else."""
    port = int(server.url.split(":")[2].split("/")[0])
    bound = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            address, state = line.split()[1], line.split()[3]
            if state == "0A" and int(address.split(":")[1], 16) == port:
                bound.append(address.split(":")[0])
    assert bound == ["0100007F"]


CHILD = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.path.insert(0, {str(ROOT)!r})
from environments.showdown import Server
server = Server()
print(server.url, server.folder, flush=True)
{{}}
"""


@pytest.mark.parametrize("end", ["exception", "exit", "kill", "interrupt", "terminate"])
def test_server_ends_with_its_parent(end):
    """However the parent ends, the connection to its server closes, and its folder is gone."""
    how = {"exception": "1 / 0", "exit": "server.close()"}.get(end, "sys.stdin.read()")
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(how)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    url, folder = child.stdout.readline().split()
    try:
        line = socket.create_connection(("127.0.0.1", int(url.split(":")[2].split("/")[0])))
    except OSError:  # gone already
        line = None
    if end in ("kill", "interrupt", "terminate"):
        assert line is not None
        child.send_signal({"kill": signal.SIGKILL, "interrupt": signal.SIGINT, "terminate": signal.SIGTERM}[end])
    if line is not None:
        line.settimeout(30)
        assert wait_for_end(line)
    child.wait()
    child.stdin.close()
    child.stdout.close()
    assert not os.path.exists(folder)


def wait_for_end(line):
    try:
        return line.recv(1) == b""
    except ConnectionResetError:
        return True


def test_unknown_format(server):
    with pytest.raises(ValueError, match=r"unknown.*gen9randombattle"):
        ShowdownGames("gen9randombatle", 1, server.url)
    with pytest.raises(ValueError, match="not a singles format"):
        ShowdownGames("gen9randomdoublesbattle", 1, server.url)


def test_nothing_installed(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="npm ci --omit=optional"):
        ShowdownGames(FORMAT, 1)
    monkeypatch.undo()
    monkeypatch.setattr(showdown, "__file__", str(tmp_path / "environments/showdown.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="npm ci --omit=optional"):
        ShowdownGames(FORMAT, 1)


def test_no_server():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ConnectionError, match=f"127.0.0.1:{port}"):
        ShowdownGames(FORMAT, 1, f"ws://127.0.0.1:{port}")
    with pytest.raises(ValueError, match="ws://"):
        ShowdownGames(FORMAT, 1, "localhost")


def shape(name, **changes):
    mon = Pokemon(gen=9, species=name)
    mon._level = 80
    mon._active = True
    return showdown_obs.body(mon, own=False)._replace(**changes)


@pytest.mark.parametrize(
    ("move", "user", "target", "changes", "expected"),
    [
        # Garchomp L80: attack (2*130+52)*80//100+5 = 254; Skarmory's defence (2*140+52)*80//100+5 = 270.
        # 34 * 80 * 254/270 / 50 + 2 = 53.18; x 0.925 x STAB 1.5 x dragon on steel 0.5
        ("dragonclaw", "garchomp", "skarmory", {}, 53.176 * 0.925 * 1.5 * 0.5),
        ("earthquake", "garchomp", "skarmory", {}, 0.0),  # it flies
        # burned, and +2: x 2 in the formula, x 0.5 after it; rock on steel/flying 0.5 * 2 = 1
        (
            "stoneedge",
            *("garchomp", "skarmory"),
            {"status": Status.BRN, "boosts": {**showdown_obs.NO_BOOSTS, "atk": 2}},
            (34 * 100 * 508 / 270 / 50 + 2) * 0.925 * 0.5,
        ),
        # terastallised to steel: x 2 for a type it has, x 1.5 for one it has not
        ("ironhead", "skarmory", "garchomp", {"tera": "STEEL"}, (34 * 80 * 174 / 198 / 50 + 2) * 0.925 * 2),
        ("ironhead", "garchomp", "garchomp", {"tera": "STEEL"}, (34 * 80 * 254 / 198 / 50 + 2) * 0.925 * 1.5),
        ("seismictoss", "garchomp", "skarmory", {}, 80),
        # Skarmory's defence 270 strikes Garchomp's 198, fighting on dragon/ground 1
        ("bodypress", "skarmory", "garchomp", {}, (34 * 80 * 270 / 198 / 50 + 2) * 0.925),
    ],
)
def test_damage(move, user, target, changes, expected):
    facts = showdown_obs.move_facts(move, 9)
    got = showdown_obs.hit(facts, shape(user, **changes), shape(target), "", (1.0, 1.0), 9)
    assert got.damage == pytest.approx(expected, rel=1e-3)


def test_weather_and_screens():
    surf, user, target = showdown_obs.move_facts("surf", 9), shape("starmie"), shape("garchomp")
    plain = showdown_obs.hit(surf, user, target, "", (1.0, 1.0), 9).damage
    assert showdown_obs.hit(surf, user, target, "rain", (1.0, 1.0), 9).damage == pytest.approx(1.5 * plain)
    assert showdown_obs.hit(surf, user, target, "sun", (1.0, 0.5), 9).damage == pytest.approx(0.25 * plain)


# --- the training script on Showdown


def small_run(selfplay, tmp_path, **changes):
    sizes = {"num_envs": 3, "games_per_update": 4, "num_minibatches": 2, "hidden_size": 8, "eval_episodes": 2}
    args = sizes | {"env_id": FORMAT, "runs_dir": str(tmp_path), "checkpoint_every": 1} | changes
    return selfplay.train(selfplay.Args(**args))


def test_the_script_trains_evaluates_and_saves_replays(selfplay, server, tmp_path):
    changes = {"total_timesteps": 600, "opponents": "self:0.5,max_power:0.5", "checkpoint_every": 0}
    result = small_run(selfplay, tmp_path, server=server.url, **changes)
    assert result["global_step"] >= 600 and {"random", "max_power", "heuristic"} <= {n[12:] for n in result}
    checkpoint = f"{result['run_dir']}/checkpoint.pt"
    saved = selfplay.load(checkpoint)["args"] | {"evaluate": checkpoint, "against": "heuristic", "save_replays": True}
    again = selfplay.train(selfplay.Args(**saved))
    assert [name for name in again if name.startswith("win_rate_vs_")] == ["win_rate_vs_heuristic"]
    assert len(list(Path(result["run_dir"], "replays").glob("*.html"))) == 2


def test_a_server_killed_in_mid_training_is_a_clear_error_with_a_checkpoint(selfplay, tmp_path, monkeypatch):
    real, updates = selfplay.play, []

    def play(games, *args, **how):
        updates.append(games)
        if len(updates) == 3:
            os.kill(games.server.process.pid, signal.SIGKILL)
        return real(games, *args, **how)

    monkeypatch.setattr(selfplay, "play", play)
    with pytest.raises(RuntimeError, match="Showdown server died"):
        small_run(selfplay, tmp_path, total_timesteps=10**6, checkpoint_every=0)
    assert selfplay.load(next(tmp_path.glob("*/checkpoint.pt")))["counters"]["games"] == 2 * 4


def test_a_cut_connection_in_mid_training_leaves_no_half_battle(selfplay, proxy, tmp_path, monkeypatch):
    """The running battles are played again, and everything trained on is whole: the last decision of each sequence has
    the outcome in its reward."""
    real, calls, batches = ShowdownGames.act, [], []

    def act(self, *args):
        calls.append(args)
        if len(calls) == 60:
            proxy.cut()
        return real(self, *args)

    def targets(agent, reference, data, *rest):
        batches.append(data)
        return make_targets(agent, reference, data, *rest)

    make_targets = selfplay.make_targets
    monkeypatch.setattr(ShowdownGames, "act", act)
    monkeypatch.setattr(selfplay, "make_targets", targets)
    monkeypatch.setattr(selfplay, "assess", lambda *args: {"eval/score": 0.0})
    changes = {"server": proxy.url, "opponents": "self:1", "total_timesteps": 100, "ko_coef": 0.0, "hp_coef": 0.0}
    result = small_run(selfplay, tmp_path, **changes)
    assert result["lost_games"] == 3
    first, length = selfplay.spans(batches[0].sequence)
    assert sorted(batches[0].reward[first + length - 1].tolist()) == [-1.0] * 4 + [1.0] * 4
