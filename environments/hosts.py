"""Morphogenesis: small convolutional networks, the hosts, train side by side, and an agent decides once an epoch for
each of them whether to grow a new module, make it permanent, or remove it.

    environments.hosts:Morphogenesis-v0    a Gymnasium VectorEnv; an episode is a host's whole training

A module ("seed") is germinated in one of two slots and learns in isolation (TRAINING: from the loss of the host with
the module in place, while the host learns as if it were not there). Then it is blended in (BLENDING: output = host +
alpha * (module - host), alpha rising along a sigmoid) and waits (HOLDING) to be made permanent (FOSSILIZED), which
makes room for another. What counts at the end is the host as it stands.

Every episode draws another host: its width, learning rate, training images and label noise, whether the contrast of its
images varies, and which blueprints are unsound in it: their modules climb the loss that they should descend, and
nothing tells but what they do. What is observed are readings on a few images, each time others, and nothing that is
past: whoever wants a trend, or to know what was tried, has to remember.

All hosts are trained in one batched computation, in which none has any influence on another: weights are rows of a
matrix [N, P], narrow hosts are padded with channels that stay zero, and a convolution is a matrix product (`spread`).
"""

import functools
import math
from enum import IntEnum
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from sklearn.datasets import load_digits
from torch import Tensor

from environments import cifar10


class Setting(NamedTuple):
    """What modules are like, and what is observed."""

    sprout: int  # a seed stays GERMINATED for 1 to so many epochs
    training: int  # epochs of TRAINING
    blending: int  # epochs of BLENDING
    culled: int  # epochs of CULLED, in which nothing can be germinated
    embargo: int  # epochs of EMBARGOED, behind them
    unsound: float  # probability for each blueprint
    pace: float  # step size of modules, in units of their host's
    clock: bool  # whether the epoch is observed


SETTINGS = {  # in `memory`, no observation names what was tried before, nor does the last action; trying again is free
    "plain": Setting(sprout=1, training=3, blending=5, culled=1, embargo=3, unsound=0.3, pace=1.0, clock=True),
    "memory": Setting(sprout=2, training=3, blending=2, culled=2, embargo=0, unsound=0.5, pace=3.0, clock=False),
}
EPOCHS, MINIBATCHES = 25, 12  # of an episode; of an epoch
BATCH_SIZE, MOMENTUM = 32, 0.9
WIDTHS, WIDTH = (2, 3, 4), 4  # channels of a host, and those to which all are padded
SLOTS = 2  # behind the first layer and behind the second
CLASSES, LN = 10, math.log(10)  # the loss of guessing
READING = 32  # validation images of a reading
ACCURACY, PRICE = 10.0, 0.2  # worth of accuracy on the validation images; price of as many parameters as the host's
TRAIN, VALIDATION, TEST = range(3)  # parts of the images
HELD_OUT = 1_000_000_000  # seeds from here on are never drawn: they are for evaluation

# what an episode draws
LEARNING_RATES = (0.005, 0.02)  # log-uniform
SMALLEST_SUBSET = 200  # training images: log-uniform between this and all
LABEL_NOISE = 0.2  # half the hosts have up to this share of random labels
CONTRAST = 1.2  # half the hosts see images multiplied by exp(CONTRAST * N(0, 1))
UNSOUND_STEP = 0.25  # how fast unsound modules climb once they are blended in

# stages of a slot: DORMANT is free, a GERMINATED module has its initial weights, a FOSSILIZED one is permanent
Stage = IntEnum("Stage", "DORMANT GERMINATED TRAINING BLENDING HOLDING FOSSILIZED CULLED EMBARGOED", start=0)
LIVE = (Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING)
GROWN = (Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED)  # the module is part of the host
BLUEPRINTS = ("norm", "attention", "depthwise", "conv_light", "conv_heavy")
ACTIONS = ("WAIT", *(f"GERMINATE_{name.upper()}" for name in BLUEPRINTS), "FOSSILIZE", "CULL")
WAIT, GERMINATE, FOSSILIZE, CULL = 0, 1, 6, 7  # GERMINATE + i germinates blueprint i
BY_ACTION = {  # the other ways from one stage to another take time: `Morphogenesis.by_time`
    (Stage.DORMANT, "GERMINATE"): Stage.GERMINATED,
    (Stage.HOLDING, "FOSSILIZE"): Stage.FOSSILIZED,
    **{(stage, "CULL"): Stage.CULLED for stage in (Stage.TRAINING, Stage.BLENDING, Stage.HOLDING)},
}
OBSERVATION = {  # name: range
    "epoch": (0, 1),  # fraction of the episode; 0 in a setting without a clock
    "train_loss": (0, 3),  # of the last minibatch (at first, of validation); in units of ln 10, the loss of guessing
    "train_accuracy": (0, 1),
    "validation_loss": (0, 3),  # on READING of the validation images
    "validation_accuracy": (0, 1),
    **dict.fromkeys(("no_seed", "germinated", "training", "blending", "holding"), (0, 1)),  # of the live seed, one-hot
    **dict.fromkeys(BLUEPRINTS, (0, 1)),  # likewise
    "seed_age": (0, 1),  # epochs since its germination, as a fraction of the episode
    "alpha": (0, 1),
    "contribution": (-1, 1),  # arcsinh(50 x), x: validation loss without the seed minus with it (as if blended in)
    "free_slots": (0, 1),
    "fossilized_slots": (0, 1),
    "parameter_ratio": (0, 3),  # of all modules to the host
}
UNSEEN = ("time", "worth", *(f"{name} is unsound" for name in BLUEPRINTS))  # in infos, for critics in training


@functools.cache
def load_images(dataset: str, data_dir: str, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Images cut for the hosts' first layer, standardised: patches [n, Q, K] of Q positions, K values each, and labels
    [n], to train, to validate and to test. scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, split 897 / 360 /
    540 once and for all; or CIFAR-10."""
    if dataset == "digits":
        pixels, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(labels))
        images, labels = pixels[order].reshape(-1, 1, 8, 8), labels[order]
        kernel, stride, ends = 3, 2, ((0, 897), (897, 1257), (1257, 1797))
    elif dataset == "cifar10":
        images, labels, ends = cifar10.parts(data_dir)
        kernel, stride = 5, 4
    else:
        raise ValueError(f"dataset must be digits or cifar10, not {dataset}")
    std, mean = torch.std_mean(torch.from_numpy(images[: ends[0][1]]).to(dtype), correction=0)
    pixels = (torch.from_numpy(images).to(dtype) - mean) / std
    patches = F.unfold(pixels, kernel, padding=kernel // 2, stride=stride).mT.contiguous()  # [n, Q, K]
    return [(patches[first:last], torch.from_numpy(labels[first:last]).long()) for first, last in ends]


# --- the hosts' network
def shapes_of(width: int, patch: int) -> dict[str, tuple[int, ...]]:
    """Weights of a host of so many channels, whose patches have `patch` values."""
    kernel = {"kernel": (width, width, 9), "kernel_bias": (width,)}  # in, out, position
    head = {"head": (4, width, CLASSES), "head_bias": (CLASSES,)}  # from 2 x 2 pooled positions
    return {"stem": (patch, width), "stem_bias": (width,)} | kernel | head


def module_shapes_of(width: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """Weights of a module of each blueprint."""
    affine = {"scale": (width,), "shift": (width,)}  # of a normalisation
    conv = affine | {"kernel": (width, width, 9)}
    return {
        "norm": affine,
        "attention": {"squeeze": (width, 2), "excite": (2, width)},
        "depthwise": affine | {"depth": (width, 9), "point": (width, width)},
        "conv_light": conv,
        "conv_heavy": conv | {f"{name}_2": shape for name, shape in conv.items()},
    }


def size(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def unpack(flat: Tensor, shapes: dict[str, tuple[int, ...]]) -> list[Tensor]:
    """Rows of weights [R, ≥ size] -> a tensor [R, *shape] for each shape."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    parts = flat[:, : sum(sizes)].split(sizes, 1)
    return [part.view(-1, *shape) for part, shape in zip(parts, shapes.values(), strict=True)]


def diagonals(positions: int) -> Tensor:
    """[9, Q * Q]: which pairs (input position, output position) of a square map each weight of a 3 x 3 kernel joins."""
    side = math.isqrt(positions)
    y, x = np.divmod(np.arange(positions), side)
    dy, dx = y[:, None] - y + 1, x[:, None] - x + 1  # [Q in, Q out] place in the kernel
    inside = (abs(y[:, None] - y) <= 1) & (abs(x[:, None] - x) <= 1)
    joins = [(inside & (3 * dy + dx == k)).reshape(-1) for k in range(9)]
    return torch.from_numpy(np.array(joins)).to(torch.get_default_dtype())


def spread(kernel: Tensor, joins: Tensor) -> Tensor:
    """3 x 3 kernels [R, in, out, 9] -> matrices [R, Q * in, Q * out] that do the convolution (zero padding)."""
    rows, inputs, outputs, _ = kernel.shape
    positions = math.isqrt(joins.shape[1])
    dense = (kernel.reshape(-1, 9) @ joins).view(rows, inputs, outputs, positions, positions)
    return dense.permute(0, 3, 1, 4, 2).reshape(rows, positions * inputs, positions * outputs)


def normalize(x: Tensor, scale: Tensor, shift: Tensor, width: Tensor) -> Tensor:
    """Each image by mean and variance of its real channels: x [R, B, Q * W], scale and shift [R, W], zero where there
    is no real channel, width [R]."""
    channels = scale.shape[1]
    count = (width * (x.shape[2] // channels))[:, None, None]
    mean = x.sum(-1, keepdim=True) / count
    var = x.square().sum(-1, keepdim=True) / count - mean.square()
    z = ((x - mean) * (var.clamp(min=0) + 1e-5).rsqrt()).unflatten(2, (-1, channels))
    return (z * scale[:, None, None] + shift[:, None, None]).flatten(2)


def residual_conv(x: Tensor, scale: Tensor, shift: Tensor, kernel: Tensor, width: Tensor, joins: Tensor) -> Tensor:
    return x + normalize(x @ spread(kernel, joins), scale, shift, width).relu()


def apply_modules(x: Tensor, flat: Tensor, width: Tensor, counts: list[int], joins: Tensor) -> Tensor:
    """What M modules give, sorted by blueprint, `counts` of each: x [M, B, Q * W], weights [M, MODULE_SIZE]."""
    inputs, widths = x.split(counts), width.split(counts)
    shapes = [module_shapes_of(WIDTH)[name] for name in BLUEPRINTS]
    weights = [unpack(*part) for part in zip(flat.split(counts), shapes, strict=True)]
    norm = normalize(inputs[0], *weights[0], widths[0])

    squeeze, excite = weights[1]  # squeeze-and-excitation, arXiv 1709.01507
    maps = inputs[1].unflatten(2, (-1, WIDTH))  # [., B, Q, W]
    gate = 2 * torch.sigmoid((maps.mean(2) @ squeeze).relu() @ excite)  # [., B, W]
    attention = (maps * gate.unsqueeze(2)).flatten(2)

    scale, shift, depth, point = weights[2]  # depthwise, then pointwise: a convolution whose kernel has this form
    depthwise = scale, shift, point[..., None] * depth[:, :, None]
    first = [torch.cat(parts) for parts in zip(depthwise, weights[3], weights[4][:3], strict=True)]
    conv = residual_conv(torch.cat(inputs[2:]), *first, torch.cat(widths[2:]), joins)
    conv, heavy = conv.split([counts[2] + counts[3], counts[4]])
    return torch.cat((norm, attention, conv, residual_conv(heavy, *weights[4][3:], widths[4], joins)))


class Rows(NamedTuple):
    """R networks that go through `forward` together."""

    weights: Tensor  # [R, P]
    width: Tensor  # [R]
    alpha: Tensor  # [R, SLOTS]
    grown: list[tuple[Tensor, list[int]]]  # by slot: rows whose module has alpha > 0, by blueprint; numbers of each


def forward(rows: Rows, patches: Tensor, contrast: Tensor, joins: Tensor) -> Tensor:
    """Patches [R, B, Q, K] (or [1, B, Q, K] for all), times contrast [R, B] -> logits [R, B, CLASSES]."""
    count, (batch, positions, patch) = len(rows.weights), patches.shape[1:]
    shapes = shapes_of(WIDTH, patch)
    host, *modules = rows.weights.split([size(shapes)] + [MODULE_SIZE] * SLOTS, 1)
    stem, stem_bias, conv, conv_bias, head, head_bias = unpack(host, shapes)

    def slot(x: Tensor, number: int) -> Tensor:
        members, counts = rows.grown[number]
        if not len(members):
            return x
        old = x.index_select(0, members)
        new = apply_modules(old, modules[number].index_select(0, members), rows.width[members], counts, joins)
        return x.index_add(0, members, rows.alpha[members, number, None, None] * (new - old))

    x = (patches.flatten(1, 2).expand(count, -1, -1) @ stem).view(count, batch, -1)  # [R, B, Q * W]
    x = x * contrast.unsqueeze(2) + stem_bias.repeat(1, positions)[:, None]
    x = slot(x.relu(), 0)
    x = torch.baddbmm(conv_bias.repeat(1, positions)[:, None], x, spread(conv, joins))
    x = slot(x.relu(), 1)
    half = math.isqrt(positions) // 2  # mean over each quarter of the map, and the head
    head = head.view(count, 2, 1, 2, 1, WIDTH, CLASSES).expand(-1, -1, half, -1, half, -1, -1) / half**2
    return torch.baddbmm(head_bias[:, None], x, head.reshape(count, -1, CLASSES))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """[R, B, CLASSES], [R, B] -> of each image [R, B]."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


MODULE_SIZE = max(map(size, module_shapes_of(WIDTH).values()))


# --- the environment
class Morphogenesis(VectorEnv):
    """N hosts; one step is an epoch of each. Actions are ACTIONS, observations OBSERVATION, both in that order.
    `infos["action_mask"]` [N, 8] tells what is allowed, else ValueError is raised; `infos["unseen"]` [N, E] are UNSEEN.

    A host's worth is ACCURACY times its accuracy on all validation images beyond that of its twin, which has the same
    start and the same data, and in which nothing grows, minus PRICE times its modules' parameters, as a share of the
    host's own. The reward is the change of the worth, so the return is the worth at the end, whatever was done when.
    A host whose loss is no longer finite ends its episode there, with the accuracy of guessing. Only `final_info` tells
    anything about the test images.

    `reset(seed=[…])` gives each host a seed, which determines everything but the actions. `options={"modules": x}`, x
    [N, SLOTS], starts hosts with permanent modules (blueprints, or -1). `history` adds the last so many observations.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, num_envs: int, setting="plain", dataset="digits", data_dir="data", history: int = 0):
        self.num_envs, self.setting = num_envs, SETTINGS[setting]
        low, high = np.array([*OBSERVATION.values()] * (1 + history), np.float32).T
        self.single_observation_space, self.single_action_space = Box(low, high), Discrete(len(ACTIONS))
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.images = load_images(dataset, data_dir, torch.get_default_dtype())
        _, positions, self.patch = self.images[TRAIN][0].shape
        self.joins = diagonals(positions)
        # what a host is
        self.next_seed = [np.random.default_rng() for _ in range(num_envs)]  # draw the hosts behind the first
        self.batches, self.readers = ([np.random.default_rng()] * num_envs for _ in range(2))  # draw images
        self.subset = [np.empty(0)] * num_envs  # its training images
        self.seeds, self.width = np.zeros((2, num_envs), int)
        self.learning_rate, self.label_noise = np.zeros((2, num_envs))
        self.unsound = np.zeros((num_envs, len(BLUEPRINTS)), bool)
        self.labels = torch.zeros(num_envs, len(self.images[TRAIN][1]), dtype=torch.int64)  # of all images, with noise
        self.contrast = [torch.ones(num_envs, len(labels)) for _, labels in self.images]
        # where it stands
        host_size = size(shapes_of(WIDTH, self.patch))
        self.weights, self.momentum = torch.zeros(2, 2 * num_envs, host_size + SLOTS * MODULE_SIZE)  # then the twins'
        self.direction = torch.zeros(num_envs, self.weights.shape[1])  # step size: 1, 0 for padding, below 0 to climb
        self.module = [slice(host_size + s * MODULE_SIZE, host_size + (s + 1) * MODULE_SIZE) for s in range(SLOTS)]
        self.stage, self.age, self.blueprint = np.zeros((3, num_envs, SLOTS), int)  # age: epochs in this stage
        self.epoch, self.germinations, self.culls, self.seed_age, self.sprout = np.zeros((5, num_envs), int)
        self.worth, self.contribution = np.zeros((2, num_envs))
        self.reading = np.zeros((num_envs, 4))  # train loss, train accuracy, validation loss and accuracy
        self.seen = np.zeros((num_envs, 1 + history, len(OBSERVATION)), np.float32)  # observations, newest first

    # --- a host's life
    def begin(self, n: int, seed: int, modules: tuple[int, ...]) -> None:
        """Makes row n another host."""
        self.seeds[n], self.batches[n] = seed, np.random.default_rng([seed, 1])
        self.readers[n], rng = np.random.default_rng([seed, 4]), np.random.default_rng([seed, 0])
        true_labels = self.images[TRAIN][1]
        self.width[n] = rng.choice(WIDTHS)
        self.learning_rate[n] = np.exp(rng.uniform(*np.log(LEARNING_RATES)))
        self.subset[n] = rng.permutation(len(true_labels))
        self.subset[n] = self.subset[n][: int(np.exp(rng.uniform(*np.log((SMALLEST_SUBSET, len(true_labels))))))]
        self.label_noise[n] = rng.choice([0, rng.uniform(0, LABEL_NOISE)])
        wrong = torch.from_numpy(rng.random(len(true_labels)) < self.label_noise[n])
        self.labels[n] = torch.where(wrong, torch.from_numpy(rng.integers(CLASSES, size=len(wrong))), true_labels)
        varies = rng.choice([0, CONTRAST])
        for contrast in self.contrast:
            contrast[n] = torch.from_numpy(np.exp(varies * rng.normal(size=contrast.shape[1])))
        self.unsound[n] = rng.random(len(BLUEPRINTS)) < self.setting.unsound
        self.momentum[[n, n + self.num_envs]] = 0
        for array in (self.weights, self.direction, self.stage, self.age, self.epoch, self.germinations, self.culls):
            array[n] = 0
        self.fill(n, 0, *(shapes_of(width, self.patch) for width in (int(self.width[n]), WIDTH)), rng)
        self.weights[n + self.num_envs] = self.weights[n]
        for slot, blueprint in enumerate(modules):
            if blueprint >= 0:
                self.germinate(n, slot, blueprint)
                self.stage[n, slot] = Stage.FOSSILIZED

    def fill(self, n: int, first: int, own: dict, padded: dict, rng: np.random.Generator, step: float = 1.0) -> None:
        """Writes initial weights into row n from column `first` on, those of a narrow host where those of the widest
        are: scales of 1, biases and shifts of 0, He's normal for the rest (arXiv 1502.01852)."""
        for name, shape in own.items():
            last = first + math.prod(padded[name])
            place = tuple(slice(0, length) for length in shape)
            if len(shape) == 1:
                value = np.full(shape, float("scale" in name))
            else:
                fan_in = 9 if name == "depth" else math.prod(shape) // shape[2 if name == "head" else 1]
                value = rng.normal(0, (2 / fan_in) ** 0.5, shape)
            self.weights[n, first:last].view(padded[name])[place] = torch.from_numpy(value).to(self.weights.dtype)
            self.direction[n, first:last].view(padded[name])[place] = step
            first = last

    def germinate(self, n: int, slot: int, blueprint: int) -> None:
        """Puts a new module into a slot."""
        for array in (self.weights, self.momentum, self.direction):
            array[n, self.module[slot]] = 0
        self.germinations[n] += 1
        rng = np.random.default_rng([self.seeds[n], 2, self.germinations[n]])
        shapes = (module_shapes_of(width)[BLUEPRINTS[blueprint]] for width in (int(self.width[n]), WIDTH))
        step = -self.setting.pace if self.unsound[n, blueprint] else self.setting.pace
        self.fill(n, self.module[slot].start, *shapes, rng, step)
        self.blueprint[n, slot], self.seed_age[n] = blueprint, 0
        self.sprout[n] = rng.integers(1, self.setting.sprout + 1)

    def act(self, n: int, action: int) -> None:
        """Anything but WAIT: moves a slot along BY_ACTION."""
        name = "GERMINATE" if GERMINATE <= action < FOSSILIZE else ACTIONS[action]
        slots = np.flatnonzero(self.stage[n] == Stage.DORMANT if name == "GERMINATE" else np.isin(self.stage[n], LIVE))
        self.stage[n, slots[0]], self.age[n, slots[0]] = BY_ACTION[Stage(self.stage[n, slots[0]]), name], 0
        if name == "GERMINATE":
            self.germinate(n, slots[0], action - GERMINATE)
        self.culls[n] += name == "CULL"

    def by_time(self) -> dict:
        """After how many epochs a stage ends by itself, and what follows."""
        return {
            Stage.GERMINATED: (self.sprout[:, None], Stage.TRAINING),
            Stage.TRAINING: (self.setting.training, Stage.BLENDING),
            Stage.BLENDING: (self.setting.blending, Stage.HOLDING),
            Stage.CULLED: (self.setting.culled, Stage.EMBARGOED),
            Stage.EMBARGOED: (self.setting.embargo, Stage.DORMANT),
        }

    def action_masks(self) -> np.ndarray:
        """[N, 8] bool."""
        taken, mask = np.isin(self.stage, (*LIVE, Stage.CULLED)).any(1), np.zeros((self.num_envs, len(ACTIONS)), bool)
        mask[:, WAIT] = True
        mask[:, GERMINATE:FOSSILIZE] = ((self.stage == Stage.DORMANT).any(1) & ~taken)[:, None]
        mask[:, FOSSILIZE] = (self.stage == Stage.HOLDING).any(1)
        mask[:, CULL] = np.isin(self.stage, LIVE[1:]).any(1)
        return mask

    def alpha(self) -> np.ndarray:
        """[N, SLOTS] share of each module in the host's output."""
        blended = 1 / (1 + np.exp(-8 * ((self.age + 1) / (self.setting.blending + 1) - 0.5)))
        whole = np.isin(self.stage, (Stage.HOLDING, Stage.FOSSILIZED))
        return np.where(whole, 1.0, np.where(self.stage == Stage.BLENDING, blended, 0.0))

    def parameter_ratio(self, stages: tuple[Stage, ...] = GROWN) -> np.ndarray:
        """[N] parameters of all modules in these stages / parameters of the host."""
        parts = slice(0, self.module[0].start), *self.module
        host, *modules = ((self.direction[:, part] != 0).sum(1).numpy() for part in parts)
        return (np.stack(modules, 1) * np.isin(self.stage, stages)).sum(1) / host

    # --- computation
    def rows(self, hosts: np.ndarray, alpha: np.ndarray, weights: Tensor) -> Rows:
        """The networks of `hosts` [R], with modules as far as alpha [R, SLOTS] says."""
        grown = []
        for slot in range(SLOTS):
            blueprint = np.where(alpha[:, slot] > 0, self.blueprint[hosts, slot], len(BLUEPRINTS))
            counts = np.bincount(blueprint, minlength=len(BLUEPRINTS) + 1)[:-1]
            members = np.argsort(blueprint, kind="stable")[: counts.sum()]
            grown.append((torch.from_numpy(members), counts.tolist()))
        dtype = weights.dtype
        return Rows(weights, torch.from_numpy(self.width[hosts]).to(dtype), torch.from_numpy(alpha).to(dtype), grown)

    @torch.enable_grad()
    def train_epoch(self) -> None:
        """SGD with momentum on every host and its twin, in which nothing grows. A seed that is TRAINING learns from a
        third network, its shadow: the host with the module fully there and everything but the module detached."""
        every, training = np.arange(self.num_envs), self.stage == Stage.TRAINING
        shadows = np.flatnonzero(training.any(1))
        hosts, alpha = np.concatenate((every, every, shadows)), self.alpha()
        alpha = np.concatenate((alpha, 0 * alpha, np.where(training, 1.0, alpha)[shadows]))
        seeds = torch.zeros(len(shadows), self.weights.shape[1], dtype=torch.bool)  # [shadows, P] weights of the seed
        for row, n in enumerate(shadows):
            seeds[row, self.module[int(np.argmax(training[n]))]] = True
        drawn = [
            subset[rng.integers(len(subset), size=(MINIBATCHES, BATCH_SIZE))]
            for subset, rng in zip(self.subset, self.batches, strict=True)
        ]
        steps = torch.from_numpy(self.learning_rate).to(self.weights.dtype)[:, None] * self.direction  # [N, P]
        for slot, part in enumerate(self.module):
            slow = self.unsound[every, self.blueprint[:, slot]] & ~training[:, slot]
            steps[torch.from_numpy(slow), part] *= UNSOUND_STEP
        rows = self.rows(hosts, alpha, self.weights)
        for batch in torch.from_numpy(np.stack(drawn, 1)):  # [N, B]
            weights = self.weights.detach().requires_grad_()
            shadow_weights = torch.where(seeds, weights[shadows], weights.detach()[shadows])
            batch = batch[hosts]  # [R, B]
            images, labels = self.images[TRAIN][0][batch], self.labels[hosts[:, None], batch]
            rows = rows._replace(weights=torch.cat((weights, shadow_weights)))
            logits = forward(rows, images, self.contrast[0][hosts[:, None], batch], self.joins)
            losses = cross_entropy(logits, labels).mean(1)  # [R]
            (gradient,) = torch.autograd.grad(losses.sum(), weights)
            self.momentum.mul_(MOMENTUM).add_(gradient)
            self.weights = self.weights - steps.repeat(2, 1) * self.momentum
        self.reading[:, 0] = losses.detach()[: self.num_envs]
        self.reading[:, 1] = (logits.argmax(-1) == labels).to(losses.dtype).mean(1)[: self.num_envs]

    @torch.no_grad()
    def classify(self, hosts: np.ndarray, alpha: np.ndarray, part: int) -> tuple[np.ndarray, np.ndarray]:
        """On the images of a part: losses [R, n], and which are classified correctly [R, n]; of a network that is no
        longer finite, as many as by guessing. Twins are numbered behind the hosts."""
        (patches, labels), own = self.images[part], hosts % self.num_envs
        rows = self.rows(own, alpha, self.weights[hosts])
        logits = forward(rows, patches[None], self.contrast[part][own], self.joins)
        loss = cross_entropy(logits, labels.expand(len(hosts), -1)).numpy()
        finite = np.isfinite(loss.mean(1, keepdims=True))
        return loss, np.where(finite, (logits.argmax(-1) == labels).numpy(), 1 / CLASSES)

    def measure(self, hosts: np.ndarray) -> None:
        """The worth of hosts, and readings on some validation images: loss, accuracy, and what the live seed
        contributes: the loss without it minus the loss with it; while it is TRAINING, as if it were blended in."""
        alpha, n = self.alpha()[hosts], len(hosts)
        blended, training = np.isin(self.stage, LIVE[2:])[hosts], (self.stage == Stage.TRAINING)[hosts]
        seeded = np.flatnonzero((blended | training).any(1))
        other = np.where(blended, 0.0, np.where(training, 1.0, alpha))[seeded]
        every = np.concatenate((hosts, hosts + self.num_envs, hosts[seeded]))
        loss, correct = self.classify(every, np.concatenate((alpha, 0 * alpha, other)), VALIDATION)
        accuracy, twin = correct[: 2 * n].mean(1).reshape(2, n)
        self.worth[hosts] = ACCURACY * (accuracy - twin) - PRICE * self.parameter_ratio()[hosts]
        images = np.stack([self.readers[host].permutation(loss.shape[1])[:READING] for host in hosts])
        images = np.concatenate((images, images, images[seeded]))
        loss, correct = (np.take_along_axis(x, images, 1).mean(1) for x in (loss, correct))
        self.reading[hosts, 2], self.reading[hosts, 3], self.contribution[hosts] = loss[:n], correct[:n], 0
        gain = (loss[2 * n :] - loss[seeded]) * np.where(blended[seeded].any(1), 1, -1)
        self.contribution[hosts[seeded]] = np.clip(np.nan_to_num(gain, nan=-LN), -LN, LN)

    # --- Gymnasium
    @torch.inference_mode(False)  # whatever the caller's mode is
    def reset(self, *, seed: int | list[int] | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        if seed is not None:
            seeds = [seed + n for n in range(self.num_envs)] if np.ndim(seed) == 0 else seed
            self.next_seed = [np.random.default_rng([s, 3]) for s in seeds]
        else:
            seeds = [int(rng.integers(HELD_OUT)) for rng in self.next_seed]
        modules = (options or {}).get("modules", [(-1,) * SLOTS] * self.num_envs)
        self.start(np.arange(self.num_envs), seeds, modules)
        return self.observe(), self.infos()

    def start(self, hosts: np.ndarray, seeds: list[int], modules: list[tuple[int, ...]]) -> None:
        for n, seed, blueprints in zip(hosts, seeds, modules, strict=True):
            self.begin(n, seed, blueprints)
        self.measure(hosts)
        self.reading[hosts, :2], self.worth[hosts], self.seen[hosts] = self.reading[hosts, 2:], 0, 0
        self.seen[hosts, 0] = self.look()[hosts]

    @torch.inference_mode(False)
    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        if not all(action in self.single_action_space for action in np.asarray(actions)):
            raise ValueError(f"actions must be 0 to {len(ACTIONS) - 1}, not {actions}")
        for n in np.flatnonzero(~self.action_masks()[np.arange(self.num_envs), actions]):
            stages = " and ".join(Stage(stage).name for stage in self.stage[n])
            raise ValueError(f"environment {n}: {ACTIONS[actions[n]]} is not allowed with slots {stages}")
        for n in np.flatnonzero(actions):
            self.act(n, int(actions[n]))
        before = self.worth.copy()
        self.train_epoch()
        self.epoch, self.age, self.seed_age = self.epoch + 1, self.age + 1, self.seed_age + 1
        for stage, (epochs, following) in self.by_time().items():
            due = (self.stage == stage) & (self.age >= epochs)
            self.stage[due], self.age[due] = following, 0
        self.measure(np.arange(self.num_envs))
        diverged = ~np.isfinite(self.reading).all(1)
        self.reading[~np.isfinite(self.reading)] = 3 * LN
        self.seen = np.concatenate((self.look()[:, None], self.seen[:, :-1]), 1)
        done, reward, infos = diverged | (self.epoch >= EPOCHS), self.worth - before, {}
        if done.any():
            ended = np.flatnonzero(done)
            infos = {"final_obs": self.observe(), "_final_obs": done, "final_info": self.final_info(diverged)}
            self.start(ended, [int(self.next_seed[n].integers(HELD_OUT)) for n in ended], [(-1,) * SLOTS] * len(ended))
        return self.observe(), reward, done, np.zeros(self.num_envs, bool), infos | self.infos()

    def infos(self) -> dict[str, np.ndarray]:
        unseen = np.column_stack((self.epoch / EPOCHS, self.worth, self.unsound)).astype(np.float32)
        return {"action_mask": self.action_masks(), "_action_mask": np.ones(self.num_envs, bool), "unseen": unseen}

    def final_info(self, diverged: np.ndarray) -> dict:
        """Of the hosts as they stand, and of their twins ("bare")."""
        info = {"episode": {"r": self.worth.copy(), "l": self.epoch.copy()}, "diverged": diverged}
        alpha, every = np.concatenate((self.alpha(), 0 * self.alpha())), np.arange(2 * self.num_envs)
        for part, name in ((VALIDATION, "validation"), (TEST, "test")):
            losses, correct = self.classify(every, alpha, part)
            loss = np.nan_to_num(losses.mean(1), nan=3 * LN, posinf=3 * LN)
            for kind, rows in ((name, slice(self.num_envs)), (f"bare_{name}", slice(self.num_envs, None))):
                info[f"{kind}_accuracy"], info[f"{kind}_loss"] = correct[rows].mean(1), loss[rows]
                info[f"{kind}_correct"] = correct[rows]  # [N, images]
        info |= {"germinations": self.germinations.copy(), "culled": self.culls.copy()}
        info |= {"fossilized": (self.stage == Stage.FOSSILIZED).sum(1), "parameter_ratio": self.parameter_ratio()}
        return info | {"modules": np.where(self.alpha() > 0, self.blueprint, -1)}

    def observe(self) -> np.ndarray:
        return self.seen.reshape(self.num_envs, -1).copy()

    def look(self) -> np.ndarray:
        """OBSERVATION of each host now [N, D]."""
        live = np.isin(self.stage, LIVE)
        stage = np.where(live, self.stage, 0).max(1)  # of the live seed, 0 if there is none
        has, blueprint = live.any(1), np.where(live, self.blueprint, 0).max(1)
        columns = [
            self.epoch / EPOCHS * self.setting.clock,
            *(self.reading / [LN, 1, LN, 1]).T,
            *(stage == i for i in (0, *LIVE)),
            *(has & (blueprint == i) for i in range(len(BLUEPRINTS))),
            np.where(has, self.seed_age / EPOCHS, 0),
            np.where(live, self.alpha(), 0).max(1),
            np.arcsinh(50 * self.contribution / LN) / np.arcsinh(50),  # a bad module often has -0.03
            (self.stage == Stage.DORMANT).mean(1),
            (self.stage == Stage.FOSSILIZED).mean(1),
            self.parameter_ratio((*LIVE, Stage.FOSSILIZED)),
        ]
        return np.clip(np.stack(columns, 1), *np.array([*OBSERVATION.values()]).T, dtype=np.float32)


gym.register("Morphogenesis-v0", vector_entry_point=Morphogenesis)
