"""Morphogenesis against slow hosts of plain torch, and its rules by brute force."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import tiny_hosts

from environments import hosts
from environments.hosts import (
    ACTIONS,
    BLUEPRINTS,
    CULL,
    FOSSILIZE,
    GERMINATE,
    OBSERVATION,
    SETTINGS,
    TRAIN,
    VALIDATION,
    WAIT,
    Morphogenesis,
    Stage,
)

BOTH = pytest.mark.parametrize("setting", SETTINGS)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def few(monkeypatch):
    tiny_hosts(monkeypatch, minibatches=3)


def random_actions(mask, rng, waiting=0.5):
    allowed = [rng.choice(np.flatnonzero(row)) for row in mask]
    return np.where(rng.random(len(mask)) < waiting, WAIT, allowed)


# --- a host of plain torch


def unpad(flat, name_shapes, wide_shapes):
    """{name: weights without padding} of a row of the environment."""
    parts, first = {}, 0
    for name, shape in wide_shapes.items():
        last = first + math.prod(shape)
        corner = tuple(slice(0, length) for length in name_shapes[name])
        parts[name] = flat[first:last].view(shape)[corner].clone().requires_grad_()
        first = last
    return parts


class SlowModule:
    def __init__(self, env, n, slot):
        self.name = BLUEPRINTS[env.blueprint[n, slot]]
        shapes = [hosts.module_shapes_of(width)[self.name] for width in (int(env.width[n]), hosts.WIDTH)]
        self.weights = unpad(env.weights[n, env.module[slot]], *shapes)
        self.momentum = {name: torch.zeros_like(x) for name, x in self.weights.items()}
        self.unsound = bool(env.unsound[n, env.blueprint[n, slot]])
        self.sprout = int(env.sprout[n])

    def __call__(self, x, detach):
        w = {name: weight.detach() if detach else weight for name, weight in self.weights.items()}

        def norm(x, suffix=""):
            z = F.layer_norm(x, x.shape[1:], eps=1e-5)
            return z * w["scale" + suffix][:, None, None] + w["shift" + suffix][:, None, None]

        def conv(x, kernel):
            return F.conv2d(x, kernel.permute(1, 0, 2).reshape(*kernel.shape[:2][::-1], 3, 3), padding=1)

        if self.name == "norm":
            return norm(x)
        if self.name == "attention":
            gate = torch.sigmoid(F.relu(x.mean((2, 3)) @ w["squeeze"]) @ w["excite"])
            return x * 2 * gate[:, :, None, None]
        if self.name == "depthwise":
            z = F.conv2d(x, w["depth"].view(-1, 1, 3, 3), padding=1, groups=x.shape[1])
            return x + F.relu(norm(torch.einsum("bihw,io->bohw", z, w["point"])))
        x = x + F.relu(norm(conv(x, w["kernel"])))
        return x + F.relu(norm(conv(x, w["kernel_2"]), "_2")) if self.name == "conv_heavy" else x


class SlowHost:
    """Takes the initial weights and the data of the environment's host n, and then goes its own way."""

    def __init__(self, env, n):
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(labels))
        pixels, labels = pixels[order].reshape(-1, 1, 8, 8), labels[order]
        pixels = torch.tensor((pixels - pixels[:897].mean()) / pixels[:897].std()).to(torch.get_default_dtype())
        self.train = pixels[:897], env.labels[n].clone(), env.contrast[0][n].clone()
        last = 897 + len(env.images[VALIDATION][1])
        self.validation = pixels[897:last], torch.tensor(labels[897:last]), env.contrast[1][n].clone()
        self.subset, self.learning_rate = env.subset[n], float(env.learning_rate[n])
        self.draws, self.readings = (np.random.default_rng([int(env.seeds[n]), i]) for i in (1, 4))
        self.setting = env.setting
        shapes = [hosts.shapes_of(width, 9) for width in (int(env.width[n]), hosts.WIDTH)]
        self.weights = unpad(env.weights[n], *shapes)
        self.momentum = {name: torch.zeros_like(x) for name, x in self.weights.items()}
        self.modules, self.stage, self.age, self.env, self.n = [None, None], ["DORMANT"] * 2, [0, 0], env, n
        self.seed_age, self.epochs, self.now = 0, 0, 2 * self.read()

    def alphas(self):
        blend = [1 / (1 + math.exp(-8 * ((age + 1) / (self.setting.blending + 1) - 0.5))) for age in self.age]
        known = {"HOLDING": 1.0, "FOSSILIZED": 1.0}
        return [blend[i] if stage == "BLENDING" else known.get(stage, 0.0) for i, stage in enumerate(self.stage)]

    def forward(self, images, contrast, alphas, shadow=None):
        """With `shadow`, a slot: its module in full, everything else detached."""
        w = {name: x if shadow is None else x.detach() for name, x in self.weights.items()}
        width = len(w["stem_bias"])

        def slot(x, i):
            alpha = 1.0 if i == shadow else alphas[i]
            if not alpha:
                return x
            return x + alpha * (self.modules[i](x, detach=shadow is not None and i != shadow) - x)

        x = F.conv2d(images, w["stem"].T.reshape(width, 1, 3, 3), stride=2, padding=1)
        x = slot(F.relu(x * contrast[:, None, None, None] + w["stem_bias"][:, None, None]), 0)
        kernel = w["kernel"].permute(1, 0, 2).reshape(width, width, 3, 3)
        x = slot(F.relu(F.conv2d(x, kernel, w["kernel_bias"], padding=1)), 1)
        pooled = F.avg_pool2d(x, 2).flatten(2)  # [B, W, 4]
        return torch.einsum("bcq,qco->bo", pooled, w["head"]) + w["head_bias"]

    def act(self, action):
        name = ACTIONS[action]
        live = [i for i in range(2) if self.stage[i] in ("GERMINATED", "TRAINING", "BLENDING", "HOLDING")]
        if name.startswith("GERMINATE"):
            i = self.stage.index("DORMANT")
            self.stage[i], self.age[i], self.modules[i] = "GERMINATED", 0, "new"
            self.seed_age = 0
        elif name != "WAIT":
            i, self.stage[live[0]] = live[0], {"CULL": "CULLED", "FOSSILIZE": "FOSSILIZED"}[name]
            self.age[i] = 0

    def epoch(self):
        for index in self.draws.integers(len(self.subset), size=(hosts.MINIBATCHES, hosts.BATCH_SIZE)):
            images, labels, contrast = (x[self.subset[index]] for x in self.train)
            logits = self.forward(images, contrast, self.alphas())
            F.cross_entropy(logits, labels).backward()
            last = F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).double().mean().item()
            if "TRAINING" in self.stage:
                slot = self.stage.index("TRAINING")
                F.cross_entropy(self.forward(images, contrast, self.alphas(), slot), labels).backward()
            for part in (self, *filter(None, self.modules)):
                speed = 1.0 if part is self else self.setting.pace
                if part is not self and part.unsound:
                    speed *= -1.0 if self.stage[self.modules.index(part)] == "TRAINING" else -0.25
                for name, weight in part.weights.items():
                    if weight.grad is None:
                        continue
                    part.momentum[name] = 0.9 * part.momentum[name] + weight.grad
                    weight.data -= speed * self.learning_rate * part.momentum[name]
                    weight.grad = None
        for i, stage in enumerate(self.stage):
            self.age[i] += 1
            epochs, following = {
                "GERMINATED": (getattr(self.modules[i], "sprout", 0), "TRAINING"),
                "TRAINING": (self.setting.training, "BLENDING"),
                "BLENDING": (self.setting.blending, "HOLDING"),
                "CULLED": (self.setting.culled, "EMBARGOED" if self.setting.embargo else "DORMANT"),
                "EMBARGOED": (self.setting.embargo, "DORMANT"),
            }.get(stage, (99, None))
            if self.age[i] >= epochs:
                self.stage[i], self.age[i] = following, 0
        self.seed_age, self.epochs = self.seed_age + 1, self.epochs + 1
        self.now = *last, *self.read()

    @torch.no_grad()
    def loss(self, alphas, images):
        pixels, labels, contrast = (x[images] for x in self.validation)
        return F.cross_entropy(self.forward(pixels, contrast, alphas), labels).item()

    @torch.no_grad()
    def read(self):
        """Loss and accuracy on some of the validation images."""
        self.images = self.readings.permutation(len(self.validation[1]))[:32]
        pixels, labels, contrast = (x[self.images] for x in self.validation)
        right = self.forward(pixels, contrast, self.alphas()).argmax(1) == labels
        return self.loss(self.alphas(), self.images), right.double().mean().item()

    @torch.no_grad()
    def accuracy(self, alphas):
        pixels, labels, contrast = self.validation
        return (self.forward(pixels, contrast, alphas).argmax(1) == labels).double().mean().item()

    def observation(self):
        """Each entry by its name."""
        live = ("GERMINATED", "TRAINING", "BLENDING", "HOLDING")
        seeds = [i for i, stage in enumerate(self.stage) if stage in live]
        stage, module = (self.stage[seeds[0]], self.modules[seeds[0]]) if seeds else ("no_seed", None)
        held = [self.modules[i] for i, stage in enumerate(self.stage) if stage in (*live, "FOSSILIZED")]
        names = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy")
        return {
            "epoch": self.epochs / hosts.EPOCHS if self.setting.clock else 0,
            **dict(zip(names, np.array(self.now) / [hosts.LN, 1, hosts.LN, 1], strict=True)),
            **{name: float(stage == name.upper() or stage == name) for name in ("no_seed", *map(str.lower, live))},
            **{name: float(module is not None and module.name == name) for name in BLUEPRINTS},
            "seed_age": self.seed_age / hosts.EPOCHS if seeds else 0,
            "alpha": self.alphas()[seeds[0]] if seeds else 0,
            "contribution": np.arcsinh(50 * self.contribution() / hosts.LN) / np.arcsinh(50),
            "free_slots": self.stage.count("DORMANT") / 2,
            "fossilized_slots": self.stage.count("FOSSILIZED") / 2,
            "parameter_ratio": self.ratio(held),
        }

    def ratio(self, modules):
        own, *others = (sum(x.numel() for x in part.weights.values()) for part in (self, *modules))
        return sum(others) / own

    def worth(self, twin):
        grown = [self.modules[i] for i, alpha in enumerate(self.alphas()) if alpha]
        return 10 * (self.accuracy(self.alphas()) - twin.accuracy([0, 0])) - 0.2 * self.ratio(grown)

    def contribution(self):
        alphas, other = self.alphas(), self.alphas()
        for i, stage in enumerate(self.stage):
            if stage in ("BLENDING", "HOLDING"):
                other[i] = 0.0
                return self.loss(other, self.images) - self.loss(alphas, self.images)
            if stage == "TRAINING":
                other[i] = 1.0
                return self.loss(alphas, self.images) - self.loss(other, self.images)
        return 0.0


def assert_same_weights(env, n, slow, atol):
    shapes = hosts.shapes_of(slow.weights["stem_bias"].numel(), 9), hosts.shapes_of(hosts.WIDTH, 9)
    for name, x in unpad(env.weights[n], *shapes).items():
        torch.testing.assert_close(x, slow.weights[name], atol=atol, rtol=0)
    for slot, module in enumerate(slow.modules):
        if module and slow.stage[slot] not in ("CULLED", "EMBARGOED", "DORMANT"):
            for name, x in SlowModule(env, n, slot).weights.items():
                torch.testing.assert_close(x, module.weights[name], atol=atol, rtol=0)


@BOTH
def test_hosts_train_as_plain_torch_does(float64, few, setting):
    """Mixed widths, subsets, stages and blueprints; weights, readings, contributions, observations and rewards."""
    env, rng = Morphogenesis(8, setting), np.random.default_rng(1)
    _, infos = env.reset(seed=5)
    slow, twins = [SlowHost(env, n) for n in range(8)], [SlowHost(env, n) for n in range(8)]
    seen, worth = set(), np.zeros(8)
    for _ in range(24):
        actions = random_actions(infos["action_mask"], rng, waiting=0.6)
        actions = np.where((actions == CULL) & (rng.random(8) < 0.7), WAIT, actions)
        before = copy.deepcopy(env)
        for n, action in enumerate(actions):
            slow[n].act(action)
            if GERMINATE <= action < FOSSILIZE:
                before.act(n, action)
                slot = slow[n].modules.index("new")
                slow[n].modules[slot] = SlowModule(before, n, slot)
                seen.add((slow[n].modules[slot].name, slow[n].modules[slot].unsound))
            slow[n].epoch(), twins[n].epoch()
        obs, reward, _, _, infos = env.step(actions)
        for n in range(8):
            by_hand = slow[n].observation()
            expected = [np.clip(by_hand[name], *OBSERVATION[name]) for name in OBSERVATION]
            np.testing.assert_allclose(obs[n], expected, atol=1e-6)
            assert [stage.name for stage in map(Stage, env.stage[n])] == slow[n].stage
            assert_same_weights(env, n, slow[n], 1e-9)
            assert env.contribution[n] == pytest.approx(np.clip(slow[n].contribution(), -hosts.LN, hosts.LN), abs=1e-9)
            assert reward[n] == pytest.approx(slow[n].worth(twins[n]) - worth[n], abs=1e-9)
            worth[n] = slow[n].worth(twins[n])
    assert len(set(env.width)) == 3 and len({name for name, _ in seen}) == 5
    assert {unsound for _, unsound in seen} == {False, True}


def play(num_envs, seeds, plan, steps=24):
    env = Morphogenesis(num_envs)
    env.reset(seed=seeds)
    for actions in plan[:steps]:
        env.step(actions)
    return env


def recorded_plan(seeds, steps=24):
    """Random legal actions [steps, N]."""
    env, rng, plan = Morphogenesis(len(seeds)), np.random.default_rng(0), []
    _, infos = env.reset(seed=seeds)
    for _ in range(steps):
        plan.append(random_actions(infos["action_mask"], rng, waiting=0.8))
        _, _, _, _, infos = env.step(plan[-1])
    return np.array(plan)


def test_a_host_among_others_is_the_host_alone(float64, few):
    seeds = [3, 14, 15, 92, 65]
    plan = recorded_plan(seeds)
    together = play(5, seeds, plan)
    for n, seed in enumerate(seeds):
        alone = play(1, [seed], plan[:, n : n + 1])
        torch.testing.assert_close(together.weights[n], alone.weights[0], atol=1e-9, rtol=0)
        np.testing.assert_allclose(together.reading[n], alone.reading[0], atol=1e-9)


def test_a_host_among_others_in_float32(monkeypatch):
    """Five minibatches in every stage; after that, ties in ReLU amplify the rounding."""
    monkeypatch.setattr(hosts, "MINIBATCHES", 5)
    seeds, stages = [3, 14, 15, 92, 65, 35], [0, 1, 2, 3, 4, 5]

    def one_epoch(seeds, stages):
        env = Morphogenesis(len(seeds))
        env.reset(seed=seeds)
        for n, stage in enumerate(stages):
            if stage:
                env.germinate(n, 0, stage - 1)
                env.stage[n, 0] = stage
        env.train_epoch()
        return env.weights

    together = one_epoch(seeds, stages)
    for n in range(6):
        alone = one_epoch(seeds[n : n + 1], stages[n : n + 1])[0]
        torch.testing.assert_close(together[n], alone, atol=1e-5, rtol=1e-5)


def test_a_training_seed_leaves_no_bit_of_the_host_changed():
    envs = [Morphogenesis(6), Morphogenesis(6)]
    for env in envs:
        env.reset(seed=3)
    grow = np.array([WAIT, *range(GERMINATE, FOSSILIZE)])
    for actions in (grow, *[0 * grow] * 3):
        for env, chosen in zip(envs, (actions, 0 * actions), strict=True):
            env.step(chosen)
    grown, bare = envs
    own = grown.module[0].start
    assert (grown.stage[1:, 0] == Stage.BLENDING).all()
    assert torch.equal(grown.weights[:, :own], bare.weights[:, :own])  # the twins' too
    assert torch.equal(grown.weights[:6, :own], grown.weights[6:, :own])
    fresh = Morphogenesis(6)
    fresh.reset(seed=3)
    fresh.step(grow)
    learnt = (grown.weights - fresh.weights)[1:6, grown.module[0]].abs().sum(1)
    assert (learnt > 0).all()


def test_a_diverging_host_harms_no_other(few):
    plan = np.zeros((6, 4), int)
    plan[0] = GERMINATE + np.array([1, 4, 3, 0])
    healthy = play(4, [1, 2, 3, 4], plan, 6)
    env = Morphogenesis(4)
    env.reset(seed=[1, 2, 3, 4])
    ended = []
    for t, actions in enumerate(plan):
        if t == 2:
            env.weights[1] = 1e30
        actions = np.where(env.action_masks()[np.arange(4), actions], actions, WAIT)
        obs, reward, terminated, truncated, infos = env.step(actions)
        assert np.isfinite(obs).all() and np.isfinite(reward).all() and not truncated.any()
        ended.append(terminated.tolist())
        if terminated.any():
            assert infos["final_info"]["diverged"].tolist() == [False, True, False, False]
            assert infos["final_info"]["test_accuracy"][1] == pytest.approx(0.1)
            assert np.isfinite(infos["final_obs"]).all() and env.epoch[1] == 0
    assert ended[2] == [False, True, False, False] and not np.array(ended)[[0, 1, 3, 4, 5]].any()
    for n in (0, 2, 3):
        assert torch.equal(env.weights[[n, n + 4]], healthy.weights[[n, n + 4]])


# --- rules

EDGES = {
    ("DORMANT", "GERMINATED"),
    ("GERMINATED", "TRAINING"),
    ("TRAINING", "BLENDING"),
    ("BLENDING", "HOLDING"),
    ("HOLDING", "FOSSILIZED"),
    ("TRAINING", "CULLED"),
    ("BLENDING", "CULLED"),
    ("HOLDING", "CULLED"),
    ("CULLED", "EMBARGOED"),
    ("EMBARGOED", "DORMANT"),
}


def test_the_table_of_transitions_is_the_lifecycle():
    by_action = {(old.name, new.name) for (old, _), new in hosts.BY_ACTION.items()}
    by_time = {(old.name, new.name) for old, (_, new) in Morphogenesis(1).by_time().items()}
    assert by_action | by_time == EDGES and not by_action & by_time


AN_EPOCH = {  # every way in which an action and the epoch behind it change a slot
    "plain": {
        "germinate": {("DORMANT", "TRAINING")},
        "fossilize": {("HOLDING", "FOSSILIZED")},
        "cull": {(stage, "EMBARGOED") for stage in ("TRAINING", "BLENDING", "HOLDING")},
        "time": {("TRAINING", "BLENDING"), ("BLENDING", "HOLDING"), ("EMBARGOED", "DORMANT")},
    },
    "memory": {
        "germinate": {("DORMANT", "TRAINING"), ("DORMANT", "GERMINATED")},
        "fossilize": {("HOLDING", "FOSSILIZED")},
        "cull": {(stage, "CULLED") for stage in ("TRAINING", "BLENDING", "HOLDING")},
        "time": {("GERMINATED", "TRAINING"), ("TRAINING", "BLENDING"), ("BLENDING", "HOLDING"), ("CULLED", "DORMANT")},
    },
}


def test_in_memory_an_agent_that_may_germinate_does_not_see_that_it_has_culled():
    """Not even by the action before."""
    env, rng, last, culls = Morphogenesis(16, "memory"), np.random.default_rng(0), np.zeros(16), 0
    _, infos = env.reset(seed=0)
    for _ in range(40):
        assert not (infos["action_mask"][:, GERMINATE] & (last == CULL)).any()
        last = random_actions(infos["action_mask"], rng, waiting=0.5)
        *_, done, _, infos = env.step(last)
        last[done], culls = 0, culls + (last == CULL).sum()
    assert culls > 16


def allowed_by_hand(stages):
    live = [stage for stage in stages if stage in ("GERMINATED", "TRAINING", "BLENDING", "HOLDING")]
    grow = not live and "DORMANT" in stages and "CULLED" not in stages
    return [True, *[grow] * 5, live == ["HOLDING"], bool(live) and live != ["GERMINATED"]]


@BOTH
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_random_lives_follow_the_rules(setting, seed):
    random_lives(setting, seed)


@BOTH
def test_random_lives_take_every_way(setting):
    """All that these do together; by chance, 32 others may miss one."""
    assert random_lives(setting, seed=0) == set.union(*AN_EPOCH[setting].values())


def random_lives(setting, seed):
    """Every change in 32 lives: pairs of stages."""
    rng = np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
        tiny_hosts(patch, minibatches=1)
        return walk(setting, rng, int(rng.integers(2**20)))


def walk(setting, rng, seed):
    env, edges = Morphogenesis(32, setting), AN_EPOCH[setting]
    obs, infos = env.reset(seed=seed)
    names, order, walked = np.array([stage.name for stage in Stage]), list(OBSERVATION), set()
    for _ in range(51):
        stages = names[env.stage]
        for n in range(32):
            assert infos["action_mask"][n].tolist() == allowed_by_hand(stages[n].tolist())
            assert sum(stage in ("GERMINATED", "TRAINING", "BLENDING", "HOLDING") for stage in stages[n]) <= 1
        assert obs in env.observation_space
        np.testing.assert_allclose(obs[:, order.index("free_slots")], (stages == "DORMANT").mean(1))
        np.testing.assert_allclose(obs[:, order.index("holding")], (stages == "HOLDING").any(1))
        actions = random_actions(infos["action_mask"], rng, waiting=0.8)
        actions = np.where((actions == CULL) & (rng.random(32) < 0.7), WAIT, actions)
        obs, _, done, _, infos = env.step(actions)
        for n in np.flatnonzero(~done):
            kind = {WAIT: "time", FOSSILIZE: "fossilize", CULL: "cull"}.get(actions[n], "germinate")
            changes = [pair for pair in zip(stages[n], names[env.stage[n]], strict=True) if pair[0] != pair[1]]
            assert set(changes) <= edges[kind] | edges["time"]
            assert (kind == "time") or len(edges[kind].intersection(changes)) == 1
            walked.update(changes)
    return walked


def test_a_host_behind_another_is_a_fresh_one(few):
    """Nothing is left of the episode before: the second episode of a row is the first of another environment."""
    env, rng = Morphogenesis(3, history=2), np.random.default_rng(0)
    obs, infos = env.reset(seed=4)
    for _ in range(25):
        before = obs
        obs, _, _, _, infos = env.step(random_actions(infos["action_mask"], rng, waiting=0.7))
    assert (infos["final_obs"][:, 0] == 1).all() and (obs[:, 0] == 0).all()
    size = len(OBSERVATION)
    np.testing.assert_array_equal(infos["final_obs"][:, size:], before[:, : 2 * size])  # its history
    fresh = Morphogenesis(3, history=2)
    fresh_obs, fresh_infos = fresh.reset(seed=env.seeds.tolist())
    np.testing.assert_array_equal(obs, fresh_obs)
    for t in range(25):
        actions = random_actions(infos["action_mask"], rng, waiting=0.7)
        obs, reward, _, _, infos = env.step(actions)
        fresh_obs, fresh_reward, _, _, fresh_infos = fresh.step(actions)
        np.testing.assert_array_equal(reward, fresh_reward)
        if t < 24:
            np.testing.assert_array_equal(obs, fresh_obs)
            assert torch.equal(env.weights, fresh.weights) and torch.equal(env.momentum, fresh.momentum)
    for name in ("test_accuracy", "bare_test_accuracy", "germinations", "culled", "parameter_ratio"):
        np.testing.assert_array_equal(infos["final_info"][name], fresh_infos["final_info"][name])


def test_twins_are_hosts_in_which_nothing_grows(few):
    env, bare = Morphogenesis(3), Morphogenesis(3)
    env.reset(seed=4), bare.reset(seed=4)
    for t in range(25):
        *_, infos = env.step(
            np.array([GERMINATE, GERMINATE + 3, GERMINATE + 4] if t == 0 else [FOSSILIZE] * 3 if t == 9 else [WAIT] * 3)
        )
        *_, bare_infos = bare.step(np.array([WAIT] * 3))
    grown, expected = infos["final_info"], bare_infos["final_info"]
    np.testing.assert_array_equal(grown["bare_test_accuracy"], expected["test_accuracy"])
    np.testing.assert_array_equal(grown["bare_validation_accuracy"], expected["validation_accuracy"])
    assert (grown["test_correct"] != expected["test_correct"]).any()


def test_parameter_ratio_by_hand(few):
    env = Morphogenesis(30)
    env.reset(seed=0)
    env.step(np.full(30, GERMINATE) + np.arange(30) % 5)
    for n, w in enumerate(env.width):
        host = 9 * w + w + 9 * w * w + w + 40 * w + 10
        module = [2 * w, 4 * w, 2 * w + 9 * w + w * w, 2 * w + 9 * w * w, 2 * (2 * w + 9 * w * w)][n % 5]
        assert env.look()[n, -1] == pytest.approx(module / host) and not env.parameter_ratio().any()


def test_illegal_actions_name_the_environment(few):
    env = Morphogenesis(2)
    env.reset(seed=0)
    for actions in ([WAIT, CULL], [WAIT, FOSSILIZE]):
        with pytest.raises(ValueError, match=r"environment 1: .* is not allowed with slots DORMANT and DORMANT"):
            env.step(np.array(actions))
    env.step(np.array([GERMINATE, WAIT]))
    with pytest.raises(ValueError, match="environment 0: GERMINATE_CONV_LIGHT"):
        env.step(np.array([GERMINATE + 3, WAIT]))
    for _ in range(8):
        env.step(np.array([WAIT, WAIT]))
    env.step(np.array([FOSSILIZE, WAIT]))
    assert env.stage[0, 0] == Stage.FOSSILIZED
    with pytest.raises(ValueError, match="environment 0: CULL is not allowed with slots FOSSILIZED"):
        env.step(np.array([CULL, WAIT]))


@BOTH
@pytest.mark.parametrize("diverge", [False, True])
def test_the_return_is_the_worth_of_the_final_host(few, setting, diverge):
    env, rng = Morphogenesis(6, setting), np.random.default_rng(0)
    modules = [(-1, -1), (0, -1), (3, 2), (-1, -1), (4, -1), (-1, -1)]
    _, infos = env.reset(seed=3, options={"modules": modules})
    total, final = np.zeros(6), [None] * 6
    for t in range(hosts.EPOCHS):
        if diverge and t == 9:
            env.weights[:3] = torch.nan
        _, reward, done, _, infos = env.step(random_actions(infos["action_mask"], rng, waiting=0.8))
        total += [0 if final[n] else reward[n] for n in range(6)]
        for n in np.flatnonzero(done):
            final[n] = final[n] or {name: x[n] for name, x in infos["final_info"].items() if name != "episode"}
    for n in range(6):
        gain = final[n]["validation_accuracy"] - final[n]["bare_validation_accuracy"]
        assert total[n] == pytest.approx(10 * gain - 0.2 * final[n]["parameter_ratio"], abs=1e-9)
        assert final[n]["diverged"] == (diverge and n < 3)


def test_equal_hosts_are_paid_the_same_whatever_was_pressed_and_when(few):
    """Making a module permanent early, late or never; and growing one that is culled while it learns in isolation."""
    env, plan = Morphogenesis(4), np.zeros((25, 4), int)
    plan[0, :3], plan[9, 0], plan[24, 1] = GERMINATE + 4, FOSSILIZE, FOSSILIZE
    env.reset(seed=[8, 8, 8, 8])
    total = sum(env.step(actions)[1] for actions in plan[:-1])
    last = copy.deepcopy(env)
    total += (step := env.step(plan[-1]))[1]
    info = step[-1]["final_info"]
    last.train_epoch()
    assert torch.equal(last.weights[0], last.weights[1]) and torch.equal(last.weights[0], last.weights[2])
    assert total[0] == total[1] == total[2] and info["fossilized"].tolist() == [1, 1, 0, 0] and total[3] == 0
    assert info["modules"].tolist() == [[4, -1]] * 3 + [[-1, -1]]
    env, plan = Morphogenesis(2), np.zeros((25, 2), int)
    plan[3, 0], plan[5, 0] = GERMINATE + 1, CULL
    env.reset(seed=[9, 9])
    assert sum(env.step(actions)[1] for actions in plan).tolist() == [0, 0]


def test_a_seed_determines_everything_but_the_actions(few):
    plan = np.zeros((5, 2), int)
    for seeds in ([7, 8], [8, 7]):
        env = play(2, seeds, plan, 5)
        other = play(1, [7], plan[:, :1], 5)
        n = seeds.index(7)
        np.testing.assert_allclose(env.reading[n], other.reading[0], atol=1e-5)
        assert env.width[n] == other.width[0] and (env.unsound[n] == other.unsound[0]).all()


def test_history_repeats_the_last_observations(few):
    env, size = Morphogenesis(2, history=5), len(OBSERVATION)
    obs, _ = env.reset(seed=1)
    seen = [np.zeros((2, size))] * 5 + [obs[:, :size]]
    for t in range(7):
        np.testing.assert_array_equal(obs, np.concatenate(seen[:-7:-1], 1))
        obs, *_ = env.step(np.full(2, GERMINATE if t == 0 else WAIT))
        seen.append(obs[:, :size])


@BOTH
def test_what_an_episode_draws(few, setting):
    """Shares and ranges over 300 hosts, and first weights."""
    env = Morphogenesis(300, setting)
    env.reset(seed=0)
    rates, sizes = env.learning_rate, np.array([len(subset) for subset in env.subset])
    assert set(np.bincount(env.width)[2:] > 70) == {True} and 0.005 <= rates.min() < 0.006 < 0.018 < rates.max() <= 0.02
    assert np.median(rates) == pytest.approx(0.01, rel=0.15)  # log-uniform
    assert 200 <= sizes.min() < 230 and 800 < sizes.max() <= 897
    assert all(len(set(subset)) == len(subset) for subset in env.subset)
    assert env.unsound.mean() == pytest.approx(env.setting.unsound, abs=0.05)
    wrong = (env.labels != env.images[TRAIN][1]).float().mean(1).numpy()
    assert (wrong == 0).mean() == pytest.approx(0.5, abs=0.1)
    np.testing.assert_allclose(wrong, 0.9 * env.label_noise, atol=0.06)  # a tenth of the random labels is right
    varied = env.contrast[0].log().std(1).numpy()
    assert (varied == 0).mean() == pytest.approx(0.5, abs=0.1) and varied.max() == pytest.approx(1.2, rel=0.1)
    env.step(np.full(300, GERMINATE + 4))
    assert set(env.sprout) == set(range(1, env.setting.sprout + 1))
    fresh = Morphogenesis(300, setting)
    fresh.reset(seed=0)
    for width in (2, 3, 4):
        rows = fresh.weights[:300][env.width == width]
        parts = hosts.unpack(rows, hosts.shapes_of(hosts.WIDTH, 9))
        own = hosts.shapes_of(width, 9)
        for weight, (name, shape), fan_in in zip(parts, own.items(), (9, 0, 9 * width, 0, 4 * width, 0), strict=True):
            corner = weight[(slice(None), *(slice(0, length) for length in shape))]
            assert (weight != 0).sum() == (corner != 0).sum(), name  # padding is zero
            expected = (2 / fan_in) ** 0.5 if fan_in else 0
            assert corner.square().mean().sqrt().item() == pytest.approx(expected, rel=0.1), name


def test_the_split_of_the_digits():
    images = Morphogenesis(1).images
    assert [len(labels) for _, labels in images] == [897, 360, 540] and images[TRAIN][0].shape == (897, 16, 9)
    pixels = torch.cat([patches for patches, _ in images]).flatten(1)
    assert len(pixels.unique(dim=0)) == 1797  # no image is in two parts


def test_cifar10_hosts(few, monkeypatch):
    from environments import cifar10

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (300, 3, 32, 32)).astype(np.uint8)
    labels = rng.integers(0, 10, 300)
    monkeypatch.setattr(cifar10, "load", lambda data_dir: (images[:250], labels[:250], images[250:], labels[250:]))
    env = Morphogenesis(2, dataset="cifar10")
    obs, _ = env.reset(seed=0)
    obs, reward, *_ = env.step(np.array([GERMINATE + 4, WAIT]))
    assert obs in env.observation_space and np.isfinite(reward).all()
    assert [len(labels) for _, labels in env.images] == [225, 25, 50] and env.images[TRAIN][0].shape == (225, 64, 75)
