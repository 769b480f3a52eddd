"""benchmark/tamiyo.py: the statistics through which all claims of its table go, its rules, and what culls are worth."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t as student
from toys import tiny_hosts

from environments.hosts import CULL, EPOCHS, FOSSILIZE, GERMINATE, LIVE, SETTINGS, WAIT, Morphogenesis, Stage

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmark"))
import tamiyo as experiment
import tamiyo_rules as rules


def test_rows_are_paired_over_hosts_images_and_controllers():
    rng = np.random.default_rng(0)
    row = rng.normal(size=(5, 30, 7))
    one, other = (experiment.resampled(stack, 50, number=3) for stack in (row, row + 2))
    np.testing.assert_allclose(other - one, 2)
    hosts = rng.normal(size=(1, 30, 1))  # the same in both rows, whose controllers are drawn apart
    one, other = (
        experiment.resampled(hosts + effects[:, None, None], 50, number)
        for number, effects in enumerate((np.zeros(5), np.full(5, 2.0)))
    )
    np.testing.assert_allclose(other - one, 2)


def test_the_bootstrap_of_few_controllers_varies_as_their_mean_does():
    effects = np.random.default_rng(1).normal(size=5)
    drawn = experiment.resampled(np.tile(effects[:, None, None], (1, 30, 1)), 20_000, number=0)
    assert drawn.std() == pytest.approx(effects.std(ddof=1) / 5**0.5, rel=0.03)


def test_intervals_of_few_controllers_are_student_s():
    effects = np.random.default_rng(1).normal(size=5)
    standard_error = effects.std(ddof=1) / 5**0.5
    drawn = np.random.default_rng(2).normal(size=100_000) * standard_error
    text = experiment.beyond(1.0, drawn, [effects, np.zeros(1)], digits=4)
    half = student.ppf(0.975, 4) * standard_error
    low, high = (float(x) for x in text[len("+1.0000 (") : -1].split(" to "))
    assert (low, high) == pytest.approx((1 - half, 1 + half), abs=0.02)
    assert experiment.beyond(1.0, drawn / drawn.std(), [np.zeros(1)], digits=2) == "+1.00 (-0.96 to +2.96)"


# --- rules, and what culls are worth


@pytest.fixture
def quick(monkeypatch):
    tiny_hosts(monkeypatch, minibatches=1)


def stages_of(seeds, actions, setting):
    """[T, E, SLOTS] before each action."""
    env, stages = Morphogenesis(len(seeds), setting), []
    env.reset(seed=seeds)
    for row in actions:
        stages.append(env.stage.copy())
        env.step(np.maximum(row, 0))
    return np.array(stages)


@pytest.mark.parametrize("setting", SETTINGS)
def test_rules_do_what_they_say(quick, setting):
    seeds, order = list(range(8)), (3, 0, 4)
    for name, rule in {
        "plan": rules.plan(((0, 2), (5, 1))),
        "look": rules.look(np.array([order]), 0.0, setting),
        "glance": rules.glance((3, 0), 0.0, setting),
    }.items():
        _, actions = rules.played(rule, seeds, {"setting": setting})
        stages, tried = stages_of(seeds, actions, setting), set()
        for e in range(8):
            number, training, age = 0, 0, 0
            for t, action in enumerate(actions[:, e]):
                slots = [Stage(stage) for stage in stages[t, e]]
                free = Stage.DORMANT in slots and not any(stage in LIVE for stage in slots)
                training = training + 1 if Stage.TRAINING in slots else 0
                age += 1
                if Stage.HOLDING in slots:
                    assert action == FOSSILIZE
                    number += name == "look"
                elif action == CULL:
                    assert training == SETTINGS[setting].training if name == "look" else training
                    assert name == "look" or (name == "glance" and age >= SETTINGS[setting].training)
                    number += name == "look"
                elif name == "plan":
                    due = free and number < 2 and t >= (0, 5)[number]
                    assert action == (GERMINATE + (2, 1)[number] if due else WAIT)
                    number += due
                elif action != WAIT:
                    other = 0 if Stage.FOSSILIZED in slots else 3
                    assert free and action == GERMINATE + (order[number % 3] if name == "look" else other)
                age = 0 if GERMINATE <= action < FOSSILIZE else age
                tried.add(action)
        assert {WAIT, FOSSILIZE} < tried and (CULL in tried) == (name != "plan")


def test_told_rules_try_what_is_sound(quick):
    seeds = list(range(12))
    env = Morphogenesis(12)
    env.reset(seed=seeds)
    _, actions = rules.played(rules.told(seeds, (0, 4, 3, 2), "plain"), seeds, {})
    for e, column in enumerate(actions.T):
        grown = [int(action) - GERMINATE for action in column if GERMINATE <= action < FOSSILIZE]
        assert grown == [b for b in (0, 4, 3, 2) if not env.unsound[e, b]][: len(grown)] and CULL not in column


def test_what_is_germinated_again():
    norm, heavy, keep = GERMINATE, GERMINATE + 4, FOSSILIZE
    lives = [
        [norm, CULL, norm, CULL, norm, keep, heavy],
        [norm, keep, norm, CULL, heavy, CULL, norm],
        [0, norm, 0, keep, -1, -1, -1],
    ]
    assert experiment.repeated(np.array(lives).T).tolist() == [2, 1, 0]


@pytest.mark.parametrize("setting", SETTINGS)
def test_12_forked_culls_by_copying_the_host(quick, monkeypatch, setting):
    """The environment as it stood before each cull, copied and played to the end with and without it."""
    monkeypatch.setattr(experiment, "setting", setting)
    seeds, rng = [5, 6, 7, 8, 9], np.random.default_rng(2)
    envs, actions, before = Morphogenesis(5, setting), [], []
    _, infos = envs.reset(seed=seeds)
    for _ in range(EPOCHS):
        mask = infos["action_mask"]
        chosen = np.where(mask, rng.random(mask.shape), -1).argmax(-1)
        chosen = np.where((chosen == CULL) & (rng.random(5) < 0.8), WAIT, chosen)
        before.append(copy.deepcopy(envs)), actions.append(chosen)
        *_, infos = envs.step(chosen)
    expected = []
    for t, n in zip(*np.nonzero(np.array(actions) == CULL), strict=True):
        ends = []
        for first in (CULL, WAIT):
            fork, others = copy.deepcopy(before[t]), np.zeros(5, int)
            others[n] = first
            *_, infos = fork.step(others)
            while "final_info" not in infos:
                keep = first == WAIT and infos["action_mask"][n, FOSSILIZE]
                others[:] = 0
                others[n] = FOSSILIZE if keep else WAIT
                *_, infos = fork.step(others)
            ends.append((infos["final_info"]["test_accuracy"][n], -infos["final_info"]["test_loss"][n]))
        expected.append(int(ends[0] > ends[1]) if ends[0][1] != ends[1][1] else -1)  # -1: no difference
    better = experiment.cull_outcomes(np.array(actions), seeds, "LSTM")
    expected = [outcome for outcome in np.random.default_rng(0).permutation(expected) if outcome >= 0]
    assert better.tolist() == expected and len(set(expected)) == 2
