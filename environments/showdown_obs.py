"""What one player of a Pokémon Showdown battle knows, as numbers: observation, legal actions, material.

Everything here reads one player's own `poke_env` Battle, which holds what the server told this player: its team
exactly, of the opponent only what was shown. Every entry of an observation is named in `blocks`, and scaled to lie
within [-1.5, 2].

Damage is the standard formula of generations 3 to 9 at the mean roll (0.925): level, stats, boosts, type, STAB,
terastallisation, burn, weather, screens, and the items and abilities that matter most. The opponent's stats are
estimated from its base stats and level, with 31 IVs, 85 EVs and a neutral nature, as random battles have them. Formats
of older generations play without mega evolution, Z-moves and dynamax."""

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import lru_cache
from math import log2
from typing import NamedTuple

import numpy as np
from poke_env.battle import Battle, Effect, Field, Move, MoveCategory, Pokemon, SideCondition, Status, Weather
from poke_env.data import GenData
from poke_env.player.battle_order import BattleOrder, DefaultBattleOrder, SingleBattleOrder

NUM_ACTIONS = 14  # 0-3 moves, 4-7 the same moves with terastallisation, 8-13 switches to the team's members
TYPES = (
    *("BUG", "DARK", "DRAGON", "ELECTRIC", "FAIRY", "FIGHTING", "FIRE", "FLYING", "GHOST"),
    *("GRASS", "GROUND", "ICE", "NORMAL", "POISON", "PSYCHIC", "ROCK", "STEEL", "WATER"),
)
STATS = ("hp", "atk", "def", "spa", "spd", "spe")
BOOSTS = ("atk", "def", "spa", "spd", "spe", "accuracy", "evasion")
BOOST = {stage: max(2, 2 + stage) / max(2, 2 - stage) for stage in range(-6, 7)}
STATUS = (Status.BRN, Status.PAR, Status.SLP, Status.FRZ, Status.PSN, Status.TOX)
STATUS_HOT = {
    status: {f"status {other.name.lower()}": float(status is other) for other in STATUS} for status in (None, *Status)
}
VOLATILES = (
    *(Effect.SUBSTITUTE, Effect.LEECH_SEED, Effect.CONFUSION, Effect.TAUNT, Effect.ENCORE, Effect.DISABLE),
    *(Effect.YAWN, Effect.SALT_CURE, Effect.LOCKED_MOVE, Effect.FLASH_FIRE),
)
NO_VOLATILES = [0.0] * len(VOLATILES)
VOLATILE_NAMES = [effect.name.lower() for effect in VOLATILES]
SUN, RAIN = {Weather.SUNNYDAY, Weather.DESOLATELAND}, {Weather.RAINDANCE, Weather.PRIMORDIALSEA}
WEATHERS = {"sun": SUN, "rain": RAIN, "sand": {Weather.SANDSTORM}, "snow": {Weather.SNOW, Weather.HAIL}}
FIELDS = (
    *(Field.ELECTRIC_TERRAIN, Field.GRASSY_TERRAIN, Field.MISTY_TERRAIN, Field.PSYCHIC_TERRAIN),
    *(Field.TRICK_ROOM, Field.GRAVITY),
)
LAYERS = {SideCondition.SPIKES: 3, SideCondition.TOXIC_SPIKES: 2}
SIDES = (
    *(SideCondition.STEALTH_ROCK, SideCondition.SPIKES, SideCondition.TOXIC_SPIKES, SideCondition.STICKY_WEB),
    *(SideCondition.REFLECT, SideCondition.LIGHT_SCREEN, SideCondition.AURORA_VEIL),
    *(SideCondition.TAILWIND, SideCondition.SAFEGUARD),
)
IMMUNE = {  # ability -> the type that cannot hurt it
    **{"levitate": "GROUND", "eartheater": "GROUND", "flashfire": "FIRE", "wellbakedbody": "FIRE"},
    **{"waterabsorb": "WATER", "stormdrain": "WATER", "dryskin": "WATER", "sapsipper": "GRASS"},
    **{"voltabsorb": "ELECTRIC", "lightningrod": "ELECTRIC", "motordrive": "ELECTRIC"},
}
HALVED_HP = {"superfang", "naturesmadness", "ruination"}


class MoveFacts(NamedTuple):
    """A move's constants."""

    id: str
    type: str
    category: MoveCategory
    power: float
    accuracy: float  # [0, 1]
    hits: float  # expected
    fixed: int | str | None  # damage in HP, or "level"
    attack: str  # the stat that it hits with, and on
    defence: str
    features: dict[str, float]


@lru_cache(None)
def move_facts(name: str, gen: int) -> MoveFacts:
    move = Move(name, gen=gen)
    entry, category = move.entry, move.category
    hits = entry.get("multihit", 1)
    hits = {"tripleaxel": 5.3, "triplekick": 5.3, "populationbomb": 6.5}.get(
        name, 3.1 if isinstance(hits, list) else hits
    )
    secondaries = [entry.get("secondary") or {}, *(entry.get("secondaries") or [])]
    selves = [entry, *(part.get("self") or {} for part in (entry, *secondaries)), entry.get("selfBoost") or {}]
    if entry.get("target") != "self":
        selves = selves[1:]
    status_chance = [part.get("chance", 100) / 100 for part in (entry, *secondaries) if "status" in part]
    heals = bool(move.heal) or name in {
        "rest",
        "moonlight",
        "synthesis",
        "morningsun",
        "shoreup",
        "strengthsap",
        "wish",
    }
    hazards = {"stealthrock", "spikes", "toxicspikes", "stickyweb", "ceaselessedge", "stoneaxe"}
    features = {
        "power": move.base_power / 150,
        "accuracy": move.accuracy,
        "physical": float(category is MoveCategory.PHYSICAL),
        "special": float(category is MoveCategory.SPECIAL),
        "status": float(category is MoveCategory.STATUS),
        "priority": entry.get("priority", 0) / 5,
        "heals": float(heals),
        "inflicts status": max(status_chance, default=0.0),
        "boosts itself": sum(sum(part.get("boosts", {}).values()) for part in selves) / 4,
        "sets hazard": float(name in hazards),
        "removes hazard": float(name in {"rapidspin", "defog", "mortalspin", "tidyup", "courtchange"}),
        "switches out": float(bool(move.self_switch)),
        "forces switch": float(move.force_switch),
        "protects": float(move.is_protect_move),
        "recoil": float(move.recoil),
        "drain": float(move.drain),
    }
    physical = category is MoveCategory.PHYSICAL
    attack = entry.get("overrideOffensiveStat", "atk" if physical else "spa")
    defence = entry.get("overrideDefensiveStat", "def" if physical else "spd")
    return MoveFacts(
        *(name, move.type.name, category, move.base_power, move.accuracy, hits),
        *(entry.get("damage"), attack, defence, features),
    )


class Body(NamedTuple):
    """A Pokémon as the damage formula sees it. An opponent's stats and maximum HP are estimated."""

    level: int
    stats: dict[str, int]
    boosts: dict[str, int]  # of the active Pokémon; all 0 on the bench
    hp: float  # fraction of the maximum
    types: tuple[str, ...]  # that hits are measured against
    own_types: tuple[str, ...]  # without terastallisation
    tera: str | None  # the type it has terastallised to
    ability: str | None
    item: str | None
    status: Status | None
    weight: float


NO_BOOSTS = dict.fromkeys(BOOSTS, 0)


@lru_cache(None)
def estimated_stats(base: tuple[int, ...], level: int) -> dict[str, int]:
    """31 IVs, 85 EVs, neutral nature. `base` in the order of STATS."""
    inner = [(2 * value + 31 + 21) * level // 100 for value in base]
    hp = 1 if base[0] == 1 else inner[0] + level + 10
    return dict(zip(STATS, (hp, *(value + 5 for value in inner[1:])), strict=True))


def hp_fraction(mon: Pokemon) -> float:
    """Of what is alive and unhurt as far as one knows: 1."""
    if mon.fainted:
        return 0.0
    return mon.current_hp / mon.max_hp if mon.max_hp else 1.0


def types_of(mon: Pokemon) -> tuple[tuple[str, ...], tuple[str, ...], str | None]:
    """The types that hits are measured against, those without terastallisation, and the one it has terastallised to."""
    own_types = tuple([kind.name for kind in mon.base_types])
    tera = mon.tera_type.name if mon.is_terastallized and mon.tera_type else None
    return own_types if tera in (None, "STELLAR") else (tera,), own_types, tera


def body(mon: Pokemon, own: bool) -> Body:
    base = mon.base_stats
    if own and mon.stats["atk"] and not mon.transformed:
        stats = mon.stats
    else:
        stats = estimated_stats(tuple([base[stat] for stat in STATS]), mon.level)
    types, own_types, tera = types_of(mon)
    boosts = mon.boosts if mon.active else NO_BOOSTS
    return Body(
        *(mon.level, stats, boosts, hp_fraction(mon), types, own_types, tera),
        *(mon.ability, mon.item, mon.status, mon.weight),
    )


@lru_cache(None)
def type_multiplier(attacking: str, defending: tuple[str, ...], gen: int) -> float:
    chart, product = GenData.from_gen(gen).type_chart, 1.0
    for kind in defending:
        product *= chart[kind][attacking] if kind in chart and attacking in chart[kind] else 1.0
    return product


def log_multiplier(multiplier: float) -> float:
    """0, 1/4, ... 4 times the damage -> -1.5, -1, ... 1."""
    return log2(multiplier) / 2 if multiplier else -1.5


POWER: dict[str, Callable[[Body, Body], float]] = {  # of moves whose base power depends on user and target
    "acrobatics": lambda user, target: 55 if user.item else 110,
    "facade": lambda user, target: 140 if user.status in STATUS else 70,
    "hex": lambda user, target: 130 if target.status in STATUS else 65,
    "infernalparade": lambda user, target: 120 if target.status in STATUS else 60,
    "knockoff": lambda user, target: 97.5 if target.item else 65,
    "storedpower": lambda user, target: 20 + 20 * sum(stage for stage in user.boosts.values() if stage > 0),
    "eruption": lambda user, target: max(1, 150 * user.hp),
    "grassknot": lambda user, target: next(value for limit, value in WEIGHT_POWER if target.weight < limit),
    "heavyslam": lambda user, target: min(120, max(40, 20 * int(user.weight / max(target.weight, 0.1)) + 20)),
    "gyroball": lambda user, target: min(150, 25 * target.stats["spe"] / user.stats["spe"] + 1),
    "electroball": lambda user, target: min(150, max(40, 20 * int(user.stats["spe"] / target.stats["spe"]) + 40)),
}
for alias, name in (
    *(("powertrip", "storedpower"), ("waterspout", "eruption"), ("dragonenergy", "eruption")),
    *(("lowkick", "grassknot"), ("heatcrash", "heavyslam")),
):
    POWER[alias] = POWER[name]
WEIGHT_POWER = ((10, 20), (25, 40), (50, 60), (100, 80), (200, 100), (1e9, 120))
WEATHER_FACTOR = {("rain", "WATER"): 1.5, ("rain", "FIRE"): 0.5, ("sun", "WATER"): 0.5, ("sun", "FIRE"): 1.5}
ITEM_FACTOR = {
    ("choiceband", "atk"): 1.5,
    ("choicespecs", "spa"): 1.5,
    ("lightball", "atk"): 2,
    ("lightball", "spa"): 2,
}


class Hit(NamedTuple):
    multiplier: float  # of the type
    stab: float
    damage: float  # in HP, if it hits, at the mean roll


NO_HIT = Hit(1.0, 1.0, 0.0)


def hit(move: MoveFacts, user: Body, target: Body, weather: str, screens: tuple[float, float], gen: int) -> Hit:
    """`screens`: what is left of physical and of special damage. `weather`: a key of WEATHERS or ""."""
    kind, category, attack = move.type, move.category, move.attack
    defence = move.defence
    if move.id == "terablast" and user.tera:
        kind = user.tera
        if user.stats["atk"] * BOOST[user.boosts["atk"]] > user.stats["spa"] * BOOST[user.boosts["spa"]]:
            category, attack, defence = MoveCategory.PHYSICAL, "atk", "def"
    multiplier = type_multiplier(kind, target.types, gen)
    if move.id == "freezedry" and "WATER" in target.types:
        multiplier *= 4
    if category is MoveCategory.STATUS:
        return Hit(multiplier, 1.0, 0.0)
    if IMMUNE.get(target.ability) == kind and user.ability not in ("moldbreaker", "teravolt", "turboblaze"):
        multiplier = 0.0
    stab = 1.5 if kind in user.own_types else 1.0
    if user.tera == kind:
        stab = 2.0 if kind in user.own_types else 1.5
    if multiplier == 0:
        return Hit(multiplier, stab, 0.0)
    if move.fixed is not None:
        return Hit(multiplier, stab, user.level if move.fixed == "level" else float(move.fixed))
    if move.id in HALVED_HP:
        return Hit(multiplier, stab, target.hp * target.stats["hp"] / 2)

    source = target if move.id == "foulplay" else user
    attacker = source.stats[attack] * BOOST[source.boosts[attack]] * ITEM_FACTOR.get((user.item, attack), 1)
    if user.ability in ("hugepower", "purepower") and attack == "atk":
        attacker *= 2
    defender = target.stats[defence] * BOOST[target.boosts[defence]]
    if target.item == "assaultvest" and defence == "spd":
        defender *= 1.5
    power = POWER[move.id](user, target) if move.id in POWER else move.power
    value = (2 * user.level // 5 + 2) * power * attacker / defender / 50 + 2

    factor = 0.925 * stab * multiplier * move.hits * screens[category is MoveCategory.SPECIAL]
    if user.item == "lifeorb":
        factor *= 1.3
    factor *= WEATHER_FACTOR.get((weather, kind), 1)
    if (
        user.status is Status.BRN
        and category is MoveCategory.PHYSICAL
        and move.id != "facade"
        and user.ability != "guts"
    ):
        factor *= 0.5
    return Hit(multiplier, stab, value * factor)


def speed(mon: Body, tailwind: bool) -> float:
    value = mon.stats["spe"] * BOOST[mon.boosts["spe"]] * (2 if tailwind else 1)
    if mon.item == "choicescarf":
        value *= 1.5
    return value * 0.5 if mon.status is Status.PAR else value


def left_of_damage(side: dict[SideCondition, int]) -> tuple[float, float]:
    """What a side's screens leave of physical and special damage."""
    veil = SideCondition.AURORA_VEIL in side
    return (
        0.5 if veil or SideCondition.REFLECT in side else 1.0,
        0.5 if veil or SideCondition.LIGHT_SCREEN in side else 1.0,
    )


def weather_of(battle: Battle) -> str:
    for name, kinds in WEATHERS.items():
        if any(kind in battle.weather for kind in kinds):
            return name
    return ""


def own_moves(battle: Battle) -> list[Move | None]:
    """The active Pokémon's four moves, as the actions number them. A move that is not its own (struggle, recharge)
    takes the first place whose move cannot be used."""
    mon = battle.active_pokemon
    known = list(mon.moves.values())[:4] if mon is not None else []
    moves: list[Move | None] = [*known, *[None] * (4 - len(known))]
    available = battle.available_moves
    for move in available:
        if move not in moves:
            moves[next(i for i, other in enumerate(moves) if other not in available)] = move
    return moves


def legal_orders(battle: Battle, refused: Collection[int] = ()) -> list[BattleOrder | None]:
    """The order of each action; None if it is illegal, or in `refused`. Never all None: without anything to choose,
    action 0 is the server's default. In a team preview, a switch chooses who begins."""
    orders: list[BattleOrder | None] = [None] * NUM_ACTIONS
    if battle.teampreview:
        places = range(1, 1 + min(6, len(battle.team)))
        for first in places:
            others = [place for place in places if place != first]
            orders[7 + first] = SingleBattleOrder(f"/team {','.join(map(str, (first, *others)))}")
    elif not battle.wait:
        if not battle.force_switch and battle.active_pokemon is not None:
            own = battle.active_pokemon.moves
            for i, move in enumerate(own_moves(battle)):
                if move is not None and move in battle.available_moves:
                    orders[i] = SingleBattleOrder(move)
                    if battle.can_tera and move.id in own:
                        orders[4 + i] = SingleBattleOrder(move, terastallize=True)
        for i, mon in enumerate(list(battle.team.values())[:6]):
            if mon in battle.available_switches and not battle.trapped:
                orders[8 + i] = SingleBattleOrder(mon)
    for action in refused:
        orders[action] = None
    if not any(orders):
        orders[0] = DefaultBattleOrder()
    return orders


def material(battle: Battle, ko_coef: float, hp_coef: float) -> float:
    """What this player is ahead by: fainted Pokémon and remaining HP, in Pokémon. 0 at the start."""
    own, other = list(battle.team.values()), list(battle.opponent_team.values())
    fainted = sum(mon.fainted for mon in other) - sum(mon.fainted for mon in own)
    hp = sum(map(hp_fraction, own)) - sum(map(hp_fraction, other)) - (len(own) - len(other))  # unseen ones are full
    return ko_coef * fainted + hp_coef * hp


@lru_cache(None)
def species(types: tuple[str, ...], base: tuple[int, ...]) -> dict[str, float]:
    return {f"type {kind.lower()}": float(kind in types) for kind in TYPES} | {
        f"base {stat}": value / 150 for stat, value in zip(STATS, base, strict=True)
    }


NOBODY = species((), (0,) * 6)


def pokemon(mon: Pokemon | None) -> dict[str, float]:
    """A Pokémon of either side, as far as it is known."""
    if mon is None:
        return {"known": 0.0, "hp": 0.0, "fainted": 0.0, "active": 0.0, **STATUS_HOT[None], **NOBODY}
    base = mon.base_stats
    return {
        "known": 1.0,
        "hp": hp_fraction(mon),
        "fainted": float(mon.fainted),
        "active": float(mon.active),
        **STATUS_HOT[mon.status],
        **species(types_of(mon)[0], tuple([base[stat] for stat in STATS])),
    }


def presence(mon: Pokemon | None) -> list[float]:
    """What lasts while a Pokémon is active, in the order of PRESENCE."""
    if mon is None:
        return [0.0] * len(PRESENCE)
    boosts, effects = mon.boosts, mon.effects
    return [
        *[boosts[stat] / 6 for stat in BOOSTS],
        *([float(effect in effects) for effect in VOLATILES] if effects else NO_VOLATILES),
        float(mon.must_recharge),
        min(mon.status_counter, 5) / 5,
        min(mon.protect_counter, 3) / 3,
        float(mon.is_terastallized),
        float(mon.first_turn),
    ]


PRESENCE = [
    *[f"boost {stat}" for stat in BOOSTS],
    *VOLATILE_NAMES,
    *("must recharge", "turns of status", "protected before", "terastallised", "first turn"),
]
NO_MOVE = dict.fromkeys(move_facts("tackle", 9).features, 0.0)
SIDE_NAMES = [condition.name.lower() for condition in SIDES]


def side(conditions: dict[SideCondition, int]) -> list[float]:
    """Hazards, screens and the like, in the order of SIDES; layers as a fraction of the most there can be."""
    if not conditions:
        return [0.0] * len(SIDES)
    return [
        0.0 if kind not in conditions else conditions[kind] / LAYERS[kind] if kind in LAYERS else 1.0 for kind in SIDES
    ]


Block = tuple[str, Iterable[str], Iterable[float]]  # what it is about, names of its entries, and their values


class View:
    """One player's battle, prepared for the damage formula."""

    def __init__(self, battle: Battle):
        self.battle, self.gen = battle, battle.gen
        self.team = list(battle.team.values())[:6]
        self.bodies = [body(mon, own=True) for mon in self.team]
        self.active = next((i for i, mon in enumerate(self.team) if mon.active), None)
        self.foe = battle.opponent_active_pokemon
        self.foe_body = body(self.foe, own=False) if self.foe is not None else None
        self.weather = weather_of(battle)
        self.foe_screens = left_of_damage(battle.opponent_side_conditions)

    def strike(self, move: Move, user: Body) -> tuple[MoveFacts, Hit]:
        """A move against the opponent's active Pokémon."""
        facts = move_facts(move.id, self.gen)
        if self.foe_body is None:
            return facts, NO_HIT
        return facts, hit(facts, user, self.foe_body, self.weather, self.foe_screens, self.gen)

    def expected(self, facts: MoveFacts, result: Hit) -> float:
        """Expected damage as a fraction of the opponent's maximum HP, at most 1.5."""
        return min(1.5, result.damage * facts.accuracy / self.foe_body.stats["hp"]) if result.damage else 0.0


def blocks(battle: Battle) -> Iterator[Block]:
    """The observation, part by part; of the same form for every battle, even one that has not begun."""
    view = View(battle)
    general = {
        "turn": min(battle.turn / 100, 1.5),
        "forced switch": float(battle.force_switch),
        "trapped": float(battle.trapped or battle.maybe_trapped),
        "can terastallise": float(battle.can_tera),
        "opponent terastallised": float(any(mon.is_terastallized for mon in battle.opponent_team.values())),
        "own fainted": sum(mon.fainted for mon in view.team) / 6,
        "opponent fainted": sum(mon.fainted for mon in battle.opponent_team.values()) / 6,
    }
    yield "battle", general, general.values()
    yield "weather", WEATHERS, [float(name == view.weather) for name in WEATHERS]
    yield "field", FIELD_NAMES, [float(field in battle.fields) for field in FIELDS]
    yield "own side", SIDE_NAMES, side(battle.side_conditions)
    yield "opponent side", SIDE_NAMES, side(battle.opponent_side_conditions)
    members = [own_member(view, i) for i in range(6)]
    for name, member in zip(OWN, members, strict=True):
        yield name, member, member.values()
    active = own_member(view, None) if view.active is None else members[view.active]
    yield "own active", active, active.values()
    yield "own active", PRESENCE, presence(None if view.active is None else view.team[view.active])
    legal = legal_orders(battle)
    for i, move in enumerate(own_moves(battle)):
        entries = own_move(view, move, legal[i] is not None)
        yield MOVES[i], entries, entries.values()
    foe = pokemon(view.foe)
    yield "opponent active", foe, foe.values()
    yield "opponent active", PRESENCE, presence(view.foe)
    yield "opponent active", FOE_MOVES, foe_moves(view)
    others = list(battle.opponent_team.values())
    shown = {mon.species for mon in others}
    others += [mon for mon in battle.teampreview_opponent_team if mon.species not in shown]
    for i in range(6):
        entries = pokemon(others[i] if i < len(others) else None)
        yield OPPONENT[i], entries, entries.values()


FIELD_NAMES = [field.name.lower() for field in FIELDS]
OWN, OPPONENT, MOVES = ([f"{name} {i}" for i in range(6)] for name in ("own member", "opponent member", "move"))
FOE_MOVES = [f"move {i} {what}" for i in range(4) for what in ("known", "damage")]


def own_member(view: View, i: int | None) -> dict[str, float]:
    """Team member i (None: nobody) and how it stands against the opponent's active Pokémon."""
    if i is None or i >= len(view.team):
        return {**pokemon(None), "best damage": 0.0, "weakness": 0.0, "faster": 0.0}
    mon, shape, foe = view.team[i], view.bodies[i], view.foe_body
    best, weakness, faster = 0.0, 1.0, 0.5
    if foe is not None:
        best = max((view.expected(*view.strike(move, shape)) for move in list(mon.moves.values())[:4]), default=0.0)
        kinds = foe.own_types if foe.tera is None else (*foe.own_types, foe.tera)
        weakness = max((type_multiplier(kind, shape.types, view.gen) for kind in kinds), default=1.0)
        tailwinds = view.battle.side_conditions, view.battle.opponent_side_conditions
        own, other = (
            speed(each, SideCondition.TAILWIND in side) for each, side in zip((shape, foe), tailwinds, strict=True)
        )
        faster = 0.5 + 0.5 * ((own > other) - (own < other))
    return {**pokemon(mon), "best damage": best, "weakness": log_multiplier(weakness), "faster": faster}


def own_move(view: View, move: Move | None, legal: bool) -> dict[str, float]:
    """One of the active Pokémon's moves against the opponent's active Pokémon."""
    if move is None or view.active is None:
        return {"known": 0.0, "legal": float(legal), **NO_MOVE, **dict.fromkeys(AGAINST, 0.0)}
    mon, shape = view.team[view.active], view.bodies[view.active]
    facts, result = view.strike(move, shape)
    left = view.foe_body.hp * view.foe_body.stats["hp"] if view.foe_body is not None else np.inf
    terastallised = 0.0
    if view.battle.can_tera:
        tera = (mon._last_request or {}).get("teraType", "").upper()
        terastallised = view.expected(*view.strike(move, shape._replace(tera=tera or None)))
    return {
        **{"known": 1.0, "legal": float(legal)},
        **facts.features,
        "pp": move.current_pp / max(move.max_pp, 1),
        "stab": result.stab - 1,
        "type multiplier": log_multiplier(result.multiplier),
        "damage": view.expected(facts, result),
        "knocks out": float(result.damage >= left > 0),
        "damage terastallised": terastallised,
    }


AGAINST = ("pp", "stab", "type multiplier", "damage", "knocks out", "damage terastallised")


def foe_moves(view: View) -> list[float]:
    """The first four moves that the opponent's active Pokémon has shown, and their expected damage to the own one."""
    values = [0.0] * len(FOE_MOVES)
    if view.foe is None:
        return values
    screens = left_of_damage(view.battle.side_conditions)
    for i, move in enumerate(list(view.foe.moves.values())[:4]):
        values[2 * i] = 1.0
        if view.active is not None:
            target, facts = view.bodies[view.active], move_facts(move.id, view.gen)
            result = hit(facts, view.foe_body, target, view.weather, screens, view.gen)
            values[2 * i + 1] = min(1.5, result.damage * facts.accuracy / target.stats["hp"])
    return values


def entry_names(gen: int) -> list[str]:
    nothing = Battle("none", "nobody", None, gen)
    return [f"{about}: {name}" for about, names, _ in blocks(nothing) for name in names]


def options(names: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of the four moves and of the six members of the team: which entries of an observation tell about each, [k, e],
    and which actions take it, [k, c]."""
    kinds = (MOVES[:4], np.arange(8).reshape(2, 4).T), (OWN, np.arange(8, 14)[:, None])
    return [
        (np.array([[i for i, name in enumerate(names) if name.startswith(f"{one}: ")] for one in each]), actions)
        for each, actions in kinds
    ]


def observe(battle: Battle) -> np.ndarray:
    """[D] float32, one entry for each of `entry_names`."""
    row: list[float] = []
    for _, _, values in blocks(battle):
        row.extend(values)
    return np.array(row, np.float32)
