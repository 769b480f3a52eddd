"""Hand-written policies for hosts, which play through the same door as a trained controller, and a search for the best
of a small family on hosts that no evaluation uses:

- the best fixed plan: which modules to germinate and when, if one may not look;
- the best rule that looks once at each seed while it is TRAINING, culls it if what it contributes is below a threshold,
  and remembers what it has tried; and the best of those that do not remember;
- the same orders of blueprints, told which are unsound, which no controller can know.

    python benchmark/tamiyo_rules.py                     # results/tamiyo_rules_plain.csv, best first
    python benchmark/tamiyo_rules.py --setting memory
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import records
import torch
from gymnasium.spaces import Discrete

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import ppo_lstm_tamiyo as tamiyo  # noqa: E402
from environments import hosts  # noqa: E402
from environments.hosts import BLUEPRINTS, CULL, FOSSILIZE, GERMINATE, SETTINGS, WAIT  # noqa: E402

SEEDS = list(range(10_000, 10_064))  # of the hosts of the search
ORDERS = ((0, 3, 4, 2), (0, 4, 3, 2), (3, 4, 0, 2), (0, 3, 4), (0, 4, 3), (3, 4))  # of blueprints to try
THRESHOLDS = (-0.1, -0.05, -0.03, -0.015, 0.0)  # contribution, in units of ln 10


class Rule:
    """Plays as an Agent does. `choose` gives actions [N], of observations by name, [N] each, action masks [N, A], and
    notes [N, 4], which are 0 at an episode's start and which it may change."""

    num_actions, action_space, shut, of_hosts = len(hosts.ACTIONS), Discrete(len(hosts.ACTIONS)), torch.zeros(1), True

    def __init__(self, choose: Callable):
        self.choose = choose

    def initial_state(self, n: int) -> torch.Tensor:
        return torch.zeros(n, 2, 4)

    def begins(self, age: torch.Tensor) -> torch.Tensor:
        return age == 0

    def step(self, obs: torch.Tensor, state: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        notes = state.clone().numpy()
        action = self.choose(dict(zip(hosts.OBSERVATION, obs.numpy().T, strict=False)), mask.numpy(), notes[:, 0])
        logits = 1e9 * torch.nn.functional.one_hot(torch.as_tensor(action), len(hosts.ACTIONS)).float()
        return logits, torch.zeros(len(obs)), torch.from_numpy(notes)


def contribution(now: dict) -> np.ndarray:
    """In units of ln 10, which is observed as arcsinh(50 x)."""
    return np.sinh(now["contribution"] * np.arcsinh(50)) / 50


def never() -> Rule:
    return Rule(lambda now, mask, notes: np.full(len(mask), WAIT))


def at_random(seed: int) -> Rule:
    rng = np.random.default_rng(seed)
    return Rule(lambda now, mask, notes: np.where(mask, rng.random(mask.shape), -1).argmax(-1))


def always(blueprint: int = 4) -> Rule:
    """Grows whenever it may, and makes permanent whatever it can."""
    return plan(((0, blueprint),) * 100)


def plan(steps: tuple[tuple[int, int], ...]) -> Rule:
    """(first epoch, blueprint) to germinate in turn; makes permanent what it can. Notes: epoch, what was germinated."""

    def choose(now: dict, mask: np.ndarray, notes: np.ndarray) -> np.ndarray:
        following = notes[:, 1].astype(int)
        epochs, blueprints = np.array([*steps, (10**6, 0)]).T
        following = np.minimum(following, len(steps))
        grow = mask[:, GERMINATE] & (notes[:, 0] >= epochs[following])
        notes[:, 0] += 1
        notes[:, 1] += grow
        return np.where(mask[:, FOSSILIZE], FOSSILIZE, np.where(grow, GERMINATE + blueprints[following], WAIT))

    return Rule(choose)


def look(orders: np.ndarray, threshold: float, setting: str) -> Rule:
    """Tries each host's blueprints [N, K] (-1: none) in turn, culls a seed whose contribution is below the threshold
    in the last epoch in which it is seen TRAINING, and makes permanent what is left. Notes: epochs in which it was seen
    TRAINING, number of the blueprint, epoch."""
    # a seed germinated later would not be blended in before the end
    last = hosts.EPOCHS - SETTINGS[setting].training - SETTINGS[setting].blending - 1

    def choose(now: dict, mask: np.ndarray, notes: np.ndarray) -> np.ndarray:
        every, number = np.arange(len(notes)), notes[:, 1].astype(int) % orders.shape[1]
        following = orders[every % len(orders), number]
        grow = mask[:, GERMINATE] & (following >= 0) & (notes[:, 2] <= last)
        training = now["training"] > 0
        notes[:, 0] = np.where(training, notes[:, 0] + 1, 0)
        harmful = (notes[:, 0] == SETTINGS[setting].training) & (contribution(now) < threshold)
        action = np.where(grow, GERMINATE + following, WAIT)
        action = np.where(mask[:, CULL] & harmful, CULL, action)
        action = np.where(mask[:, FOSSILIZE], FOSSILIZE, action)
        notes[:, 1] += (action == CULL) | (action == FOSSILIZE)
        notes[:, 2] += 1
        return action

    return Rule(choose)


def glance(blueprints: tuple[int, int], threshold: float, setting: str) -> Rule:
    """The like without memory: grows one blueprint, and another beside a permanent module; culls a seed that is old
    enough to be seen TRAINING for the last time if what it contributes now is below the threshold."""

    def choose(now: dict, mask: np.ndarray, notes: np.ndarray) -> np.ndarray:
        following = np.where(now["fossilized_slots"] > 0, blueprints[1], blueprints[0])
        old = np.rint(now["seed_age"] * hosts.EPOCHS) >= SETTINGS[setting].training
        harmful = (now["training"] > 0) & old & (contribution(now) < threshold)
        action = np.where(mask[:, GERMINATE], GERMINATE + following, WAIT)
        action = np.where(mask[:, CULL] & harmful, CULL, action)
        return np.where(mask[:, FOSSILIZE], FOSSILIZE, action)

    return Rule(choose)


def told(seeds: list[int], order: tuple[int, ...], setting: str, dataset: str = "digits") -> Rule:
    """Tries only what is sound, and keeps it."""
    envs = hosts.Morphogenesis(len(seeds), setting, dataset)
    envs.reset(seed=seeds)
    sound = [[blueprint for blueprint in order if not known[blueprint]] for known in envs.unsound]
    return look(np.array([row + [-1] * (len(order) - len(row)) for row in sound]), -np.inf, setting)


def replay(actions: np.ndarray) -> Rule:
    """Does what is planned [T, N], or nothing where that is not allowed. Notes: epoch."""

    def choose(now: dict, mask: np.ndarray, notes: np.ndarray) -> np.ndarray:
        every, t = np.arange(len(notes)), np.minimum(notes[:, 0].astype(int), len(actions) - 1)
        notes[:, 0] += 1
        planned = actions[t, every]
        return np.where((planned >= 0) & mask[every, planned], planned, WAIT)

    return Rule(choose)


def played(agent, seeds: list[int], env_kwargs: dict, **how) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """An episode for each seed: returns and closing info, each [E, …], and actions [T, E], -1 behind an end."""
    args = tamiyo.Args(env_kwargs=json.dumps(env_kwargs), eval_episodes=len(seeds))
    envs, ended, actions = tamiyo.make_envs(args, len(seeds)), {}, []
    for step, episodes in tamiyo.play(envs, agent, seeds, **how):
        actions.append([-1 if n in ended else int(a) for n, a in enumerate(step.action)])
        ended = {episode.n: episode for episode in episodes} | ended
        if len(ended) == len(seeds):
            rows = [ended[n].info | {"returns": ended[n].total} for n in range(len(seeds))]
            return {name: np.array([row[name] for row in rows]) for name in rows[0]}, np.array(actions)


def named(order: tuple[int, ...]) -> str:
    return ", ".join(BLUEPRINTS[blueprint] for blueprint in order)


def family(setting: str) -> dict[tuple[str, str], Rule]:
    """{(kind, name): rule} of all that the search tries, plans of two modules aside."""
    rules = {}
    for epoch in (0, 5, 10):
        for blueprint in range(len(BLUEPRINTS)):
            rules["plan", f"{BLUEPRINTS[blueprint]} from epoch {epoch}"] = plan(((epoch, blueprint),))
    for order in ORDERS:
        rules["told what is unsound", named(order)] = told(SEEDS, order, setting)
        for threshold in THRESHOLDS:
            name = f"{named(order)}; culled below {threshold}"
            rules["looks once and remembers", name] = look(np.array([order]), threshold, setting)
    for first in range(len(BLUEPRINTS)):
        for second in {first, 3}:
            for threshold in THRESHOLDS:
                name = f"{named((first, second))}; culled below {threshold}"
                rules["looks and does not remember", name] = glance((first, second), threshold, setting)
    return rules


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("--setting", default="plain", choices=list(SETTINGS))
    args = parser.parse_args()
    setting, path = args.setting, records.RESULTS / f"tamiyo_rules_{args.setting}.csv"
    records.refuse(parser, args, path)
    torch.set_num_threads(1)
    found = {key: played(rule, SEEDS, {"setting": setting})[0]["returns"] for key, rule in family(setting).items()}
    singles = [key for key in found if key[0] == "plan"]
    for _, first in sorted(singles, key=lambda key: -found[key].mean())[:3]:
        blueprint, epoch = first.split(" from epoch ")
        for second in range(len(BLUEPRINTS)):
            both = plan(((int(epoch), BLUEPRINTS.index(blueprint)), (0, second)))
            info, _ = played(both, SEEDS, {"setting": setting})
            found["plan", f"{first}, then {BLUEPRINTS[second]}"] = info["returns"]
    rows, about = [], records.circumstances()
    for (kind, name), returns in sorted(found.items(), key=lambda entry: -entry[1].mean()):
        figures = {"return": f"{returns.mean():.4f}", "standard error": f"{returns.std() / len(SEEDS) ** 0.5:.4f}"}
        rows.append({"kind": kind, "rule": name} | figures | about)
    records.write(path, rows)


if __name__ == "__main__":
    main()
