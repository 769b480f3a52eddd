"""Morphogenesis: many small convolutional networks, the hosts, train side by side, and an agent decides once an epoch
for each of them whether to grow a new module, make it permanent, or remove it.

    environments.hosts:Morphogenesis-v0    a Gymnasium VectorEnv; an episode is a host's whole training of 25 epochs

A module ("seed") is germinated in one of two slots and learns in isolation (TRAINING: from the loss of the host with
the module in place, while the host learns as if it were not there). Then it is blended in (BLENDING: output = host +
alpha * (module - host), alpha rising along a sigmoid) and waits (HOLDING) to be made permanent (FOSSILIZED). What is
not permanent at the end is lost.

Every episode draws another host: its width, learning rate, training images and label noise, whether the contrast of its
images varies, and which blueprints are unsound in it. A module of an unsound blueprint climbs the loss that it should
descend; nothing tells but what it does. So a fixed plan fails, and it pays to remember what was tried.

All hosts are trained in one batched computation, in which none has any influence on another: weights are rows of a
matrix [N, P], narrow hosts are padded with channels that stay zero, and a convolution on a small map is a matrix
product, whose matrix holds the kernel along its diagonals (`spread`).
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
from torch import Tensor

EPOCHS, MINIBATCHES, BATCH_SIZE = 25, 12, 32  # of a host's training
MOMENTUM = 0.9
WIDTHS = (2, 3, 4)  # channels of a host
WIDTH = max(WIDTHS)  # to which all are padded
SLOTS = 2  # behind the first layer and behind the second
CLASSES = 10
LN = math.log(CLASSES)  # the loss of guessing

HELD_OUT = 1_000_000_000  # seeds from here on are never drawn: they are for evaluation

# what an episode draws
LEARNING_RATES = (0.005, 0.02)  # log-uniform
SMALLEST_SUBSET = 200  # training images: log-uniform between this and all
LABEL_NOISE = 0.2  # half the hosts have up to this share of random labels
CONTRAST = 1.2  # half the hosts see images multiplied by exp(CONTRAST * N(0, 1))
UNSOUND, UNSOUND_STEP = 0.3, 0.25  # probability for each blueprint; how fast its modules climb once they are blended in


class Stage(IntEnum):
    """Of a slot."""

    DORMANT = 0  # free
    GERMINATED = 1  # the module has its initial weights
    TRAINING = 2
    BLENDING = 3
    HOLDING = 4
    FOSSILIZED = 5  # permanent
    CULLED = 6
    EMBARGOED = 7


LIVE = (Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING)
BLUEPRINTS = ("norm", "attention", "depthwise", "conv_light", "conv_heavy")
ACTIONS = ("WAIT", *(f"GERMINATE_{name.upper()}" for name in BLUEPRINTS), "FOSSILIZE", "CULL")
WAIT, GERMINATE, FOSSILIZE, CULL = 0, 1, 6, 7  # GERMINATE + i germinates blueprint i

BY_ACTION = {  # every way from one stage to another: by an action …
    (Stage.DORMANT, "GERMINATE"): Stage.GERMINATED,
    (Stage.HOLDING, "FOSSILIZE"): Stage.FOSSILIZED,
    **{(stage, "CULL"): Stage.CULLED for stage in (Stage.TRAINING, Stage.BLENDING, Stage.HOLDING)},
}
BY_TIME = {  # … or after so many epochs
    Stage.GERMINATED: (1, Stage.TRAINING),
    Stage.TRAINING: (3, Stage.BLENDING),
    Stage.BLENDING: (5, Stage.HOLDING),
    Stage.CULLED: (1, Stage.EMBARGOED),
    Stage.EMBARGOED: (3, Stage.DORMANT),
}

OBSERVATION = {  # name: range
    "epoch": (0, 1),  # fraction of the episode
    "train_loss": (0, 3),  # losses in units of ln 10, that of guessing
    "train_accuracy": (0, 1),
    "validation_loss": (0, 3),
    "validation_accuracy": (0, 1),
    "train_loss_change": (-1, 1),  # since the last epoch
    "train_accuracy_change": (-1, 1),
    "validation_loss_change": (-1, 1),
    "validation_accuracy_change": (-1, 1),
    "plateau": (0, 1),  # epochs without a new lowest validation loss, as a fraction of the episode
    "best_accuracy": (0, 1),  # on the validation images so far
    "no_seed": (0, 1),  # stage of the live seed, one-hot; GERMINATED is over before anything is observed
    "training": (0, 1),
    "blending": (0, 1),
    "holding": (0, 1),
    **dict.fromkeys(BLUEPRINTS, (0, 1)),  # blueprint of the live seed, one-hot
    "seed_age": (0, 1),  # epochs since its germination, as a fraction of the episode
    "alpha": (0, 1),
    "improvement": (-1, 1),  # of the validation loss since its germination
    "contribution": (-1, 1),  # validation loss without the seed minus with it (in TRAINING: if it were blended in)
    "free_slots": (0, 1),
    "fossilized_slots": (0, 1),
    "parameter_ratio": (0, 3),  # of all modules to the host
}
HISTORY = ("train_loss", "validation_loss", "validation_accuracy", "contribution")  # repeated by `history`

ACCURACY = 10.0  # reward for what was gained in final accuracy on the validation images
CONTRIBUTION = 0.3  # … for the change of the seed's contribution to the validation loss, per nat
RENT = 0.003  # cost of an epoch, times the parameter ratio
INTERVENTION = 0.01  # cost of any action but WAIT
POTENTIAL = 0.05  # shaping: of a seed that is HOLDING; earlier stages have a share of it
SHARE = np.array([0, 0, 0.5, 0.75, 1, 1, 0, 0])  # by stage


class Patches(NamedTuple):
    """Images cut for the hosts' first layer: patches [n, Q, K] of Q positions, K values each, standardised."""

    train: tuple[Tensor, Tensor]  # patches, labels [n]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@functools.cache
def load_images(dataset: str, data_dir: str, dtype: torch.dtype) -> Patches:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, split 897 / 360 / 540 once and for all; or CIFAR-10,
    split 45,000 / 5,000 / 10,000, of which validation and test use the first 1,000 and 2,000."""
    if dataset == "digits":
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(labels))
        images, labels = pixels[order].reshape(-1, 1, 8, 8), labels[order]
        kernel, stride, ends = 3, 2, ((0, 897), (897, 1257), (1257, 1797))
    elif dataset == "cifar10":
        from environments.cifar10 import load

        train, train_labels, test, test_labels = load(data_dir)
        images, labels = np.concatenate((train, test)), np.concatenate((train_labels, test_labels))
        n = len(train)
        kernel, stride, ends = 5, 4, ((0, n * 9 // 10), (n * 9 // 10, min(n, n * 9 // 10 + 1000)), (n, n + 2000))
    else:
        raise ValueError(f"dataset must be digits or cifar10, not {dataset}")
    std, mean = torch.std_mean(torch.from_numpy(images[: ends[0][1]]).to(dtype), correction=0)
    parts = []
    for first, last in ends:
        pixels = (torch.from_numpy(images[first:last]).to(dtype) - mean) / std
        patches = F.unfold(pixels, kernel, padding=kernel // 2, stride=stride).transpose(1, 2)  # [n, Q, K]
        parts.append((patches.contiguous(), torch.from_numpy(labels[first:last]).long()))
    return Patches(*parts)


# --- the hosts' network


def shapes_of(width: int, patch: int) -> dict[str, tuple[int, ...]]:
    """Weights of a host of so many channels, whose patches have `patch` values."""
    return {
        "stem": (patch, width),
        "stem_bias": (width,),
        "kernel": (width, width, 9),  # in, out, position
        "kernel_bias": (width,),
        "head": (4, width, CLASSES),  # from 2 x 2 pooled positions
        "head_bias": (CLASSES,),
    }


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
    """The output of M modules, sorted by blueprint, `counts` of each: x [M, B, Q * W], weights `flat`
    [M, MODULE_SIZE]."""
    inputs, widths = x.split(counts), width.split(counts)
    weights = [
        unpack(part, module_shapes_of(WIDTH)[name]) for part, name in zip(flat.split(counts), BLUEPRINTS, strict=True)
    ]
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
    grown: list[
        tuple[Tensor, list[int]]
    ]  # for each slot: rows whose module has alpha > 0, by blueprint; numbers of each


def forward(rows: Rows, patches: Tensor, contrast: Tensor, joins: Tensor) -> Tensor:
    """Patches [R, B, Q, K] (or [1, B, Q, K] for all rows), to be multiplied by contrast [R, B] -> logits
    [R, B, CLASSES]."""
    count = len(rows.weights)
    batch, positions, patch = patches.shape[1:]
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
    """[R, B, CLASSES], [R, B] -> mean over each row's images [R]."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).mean(1)


MODULE_SIZE = max(map(size, module_shapes_of(WIDTH).values()))


# --- the environment


class Morphogenesis(VectorEnv):
    """N hosts; one step is an epoch of each. Actions are ACTIONS, observations OBSERVATION, both in that order, and
    `infos["action_mask"]` [N, 8] tells what is allowed; anything else raises ValueError. Autoreset is SAME_STEP.

    The reward is, at the end, ACCURACY times the accuracy on the validation images beyond that of the host's twin,
    which has the same start and the same data, and in which nothing grows (without that, the return would mostly tell
    how hard the host is); plus CONTRIBUTION times each change of the live seed's contribution (0 until it is blended
    in; what was paid is taken back if the seed goes), minus RENT and INTERVENTION, plus potential-based shaping (Ng et
    al. 1999) whose potential is 0 at every end. A host whose loss is no longer finite ends its episode there,
    with the accuracy of guessing against its twin's at that epoch. Only `final_info` tells anything about the test
    images.

    `reset(seed=[…])` gives each host a seed, which determines everything but the actions. `options={"modules": x}`,
    x [N, SLOTS], lets hosts start with permanent modules (blueprint numbers, or -1). `history` adds the last so many
    values of HISTORY.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(
        self, num_envs: int, dataset: str = "digits", data_dir: str = "data", history: int = 0, gamma: float = 0.99
    ):
        self.num_envs, self.history, self.gamma = num_envs, history, gamma
        ranges = [*OBSERVATION.values(), *[OBSERVATION[name] for _ in range(history) for name in HISTORY]]
        low, high = np.array(ranges, np.float32).T
        self.single_observation_space, self.single_action_space = Box(low, high), Discrete(len(ACTIONS))
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.images = load_images(dataset, data_dir, torch.get_default_dtype())
        _, positions, self.patch = self.images.train[0].shape
        self.joins = diagonals(positions)

        def zeros(*shape: int, dtype: type = float) -> np.ndarray:
            return np.zeros((num_envs, *shape), dtype)

        # what a host is
        self.next_seed = [np.random.default_rng() for _ in range(num_envs)]  # draw the hosts behind the first
        self.seeds, self.width = zeros(dtype=int), zeros(dtype=int)
        self.learning_rate, self.label_noise = zeros(), zeros()
        self.unsound = zeros(len(BLUEPRINTS), dtype=bool)
        self.subset: list[np.ndarray] = [np.empty(0)] * num_envs  # its training images
        self.batches: list[np.random.Generator] = [np.random.default_rng()] * num_envs  # draws its minibatches
        self.labels = torch.zeros(num_envs, len(self.images.train[1]), dtype=torch.int64)  # of all images, with noise
        self.contrast = [torch.ones(num_envs, len(labels)) for _, labels in self.images]
        # where it stands
        host_size = size(shapes_of(WIDTH, self.patch))
        self.weights, self.momentum = torch.zeros(2, 2 * num_envs, host_size + SLOTS * MODULE_SIZE)  # then the twins'
        self.direction = torch.zeros(num_envs, self.weights.shape[1])  # step size: 1, 0 for padding, below 0 to climb
        self.module = [slice(host_size + s * MODULE_SIZE, host_size + (s + 1) * MODULE_SIZE) for s in range(SLOTS)]
        self.epoch, self.germinations, self.culls = (zeros(dtype=int) for _ in range(3))
        self.stage, self.age, self.blueprint = (zeros(SLOTS, dtype=int) for _ in range(3))  # age: epochs in this stage
        self.seed_age, self.plateau = zeros(dtype=int), zeros(dtype=int)
        self.reading, self.change = zeros(4), zeros(4)  # train loss, train accuracy, validation loss and accuracy
        self.contribution, self.paid, self.potential = zeros(), zeros(), zeros()
        self.loss_at_germination, self.best_loss, self.best_accuracy = zeros(), zeros(), zeros()
        self.past = zeros(history, len(HISTORY))

    # --- a host's life

    def begin(self, n: int, seed: int, modules: tuple[int, ...]) -> None:
        """Makes row n another host."""
        self.seeds[n], self.batches[n] = seed, np.random.default_rng([seed, 1])
        rng = np.random.default_rng([seed, 0])
        true_labels = self.images.train[1]
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
        self.unsound[n] = rng.random(len(BLUEPRINTS)) < UNSOUND
        self.momentum[[n, n + self.num_envs]] = 0
        for array in (self.weights, self.direction, self.stage, self.age, self.seed_age, self.epoch, self.plateau):
            array[n] = 0
        for array in (self.germinations, self.culls, self.contribution, self.paid, self.change):
            array[n] = 0
        self.fill(n, 0, *(shapes_of(width, self.patch) for width in (int(self.width[n]), WIDTH)), rng)
        self.weights[n + self.num_envs] = self.weights[n]
        for slot, blueprint in enumerate(modules):
            if blueprint >= 0:
                self.germinate(n, slot, blueprint)
                self.stage[n, slot] = Stage.FOSSILIZED
        self.potential[n] = POTENTIAL * SHARE[self.stage[n]].sum()

    def fill(
        self, n: int, first: int, own: dict[str, tuple], padded: dict[str, tuple], rng: np.random.Generator
    ) -> None:
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
            self.direction[n, first:last].view(padded[name])[place] = 1
            first = last

    def germinate(self, n: int, slot: int, blueprint: int) -> None:
        """Puts a new module into a slot."""
        for array in (self.weights, self.momentum, self.direction):
            array[n, self.module[slot]] = 0
        self.germinations[n] += 1
        rng = np.random.default_rng([self.seeds[n], 2, self.germinations[n]])
        shapes = (module_shapes_of(width)[BLUEPRINTS[blueprint]] for width in (int(self.width[n]), WIDTH))
        self.fill(n, self.module[slot].start, *shapes, rng)
        if self.unsound[n, blueprint]:
            self.direction[n, self.module[slot]] *= -1
        self.blueprint[n, slot] = blueprint
        self.seed_age[n], self.loss_at_germination[n] = 0, self.reading[n, 2]

    def live(self, n: int) -> int | None:
        """The slot of host n's live seed."""
        return next((slot for slot in range(SLOTS) if self.stage[n, slot] in LIVE), None)

    def act(self, n: int, action: int) -> None:
        """Anything but WAIT: moves a slot along BY_ACTION."""
        name = "GERMINATE" if GERMINATE <= action < FOSSILIZE else ACTIONS[action]
        slot = int(np.argmin(self.stage[n])) if name == "GERMINATE" else self.live(n)
        self.stage[n, slot], self.age[n, slot] = BY_ACTION[Stage(self.stage[n, slot]), name], 0
        if name == "GERMINATE":
            self.germinate(n, slot, action - GERMINATE)
        self.culls[n] += name == "CULL"

    def action_masks(self) -> np.ndarray:
        """[N, 8] bool."""
        live, mask = np.isin(self.stage, LIVE), np.zeros((self.num_envs, len(ACTIONS)), bool)
        mask[:, WAIT] = True
        mask[:, GERMINATE:FOSSILIZE] = ((self.stage == Stage.DORMANT).any(1) & ~live.any(1))[:, None]
        mask[:, FOSSILIZE] = (self.stage == Stage.HOLDING).any(1)
        mask[:, CULL] = live.any(1)
        return mask

    def alpha(self) -> np.ndarray:
        """[N, SLOTS] share of each module in the host's output."""
        blended = 1 / (1 + np.exp(-8 * ((self.age + 1) / (BY_TIME[Stage.BLENDING][0] + 1) - 0.5)))
        whole = np.isin(self.stage, (Stage.HOLDING, Stage.FOSSILIZED))
        return np.where(whole, 1.0, np.where(self.stage == Stage.BLENDING, blended, 0.0))

    def parameter_ratio(self, stages: tuple[Stage, ...] = (*LIVE, Stage.FOSSILIZED)) -> np.ndarray:
        """[N] parameters of all modules in these stages / parameters of the host."""
        host = self.direction[:, : self.module[0].start].sum(1).numpy()
        held = np.isin(self.stage, stages)
        modules = np.stack([(self.direction[:, part] != 0).sum(1).numpy() for part in self.module], 1)
        return (modules * held).sum(1) / host

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

    def steps(self) -> Tensor:
        """[N, P] step sizes: negative in an unsound module, and smaller in it once it is not TRAINING any more."""
        steps = torch.from_numpy(self.learning_rate).to(self.weights.dtype)[:, None] * self.direction
        for slot, part in enumerate(self.module):
            unsound = self.unsound[np.arange(self.num_envs), self.blueprint[:, slot]]
            slow = unsound & (self.stage[:, slot] != Stage.TRAINING)
            steps[torch.from_numpy(slow), part] *= UNSOUND_STEP
        return steps

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
        steps = self.steps()
        rows = self.rows(hosts, alpha, self.weights)
        total, correct = 0, 0  # [N]
        for batch in torch.from_numpy(np.stack(drawn, 1)):  # [N, B]
            weights = self.weights.detach().requires_grad_()
            shadow_weights = torch.where(seeds, weights[shadows], weights.detach()[shadows])
            batch = batch[hosts]  # [R, B]
            images, labels = self.images.train[0][batch], self.labels[hosts[:, None], batch]
            rows = rows._replace(weights=torch.cat((weights, shadow_weights)))
            logits = forward(rows, images, self.contrast[0][hosts[:, None], batch], self.joins)
            losses = cross_entropy(logits, labels)  # [R]
            (gradient,) = torch.autograd.grad(losses.sum(), weights)
            self.momentum.mul_(MOMENTUM).add_(gradient)
            self.weights = self.weights - steps.repeat(2, 1) * self.momentum
            total = total + losses.detach()[: self.num_envs]
            correct = correct + (logits.argmax(-1) == labels).to(losses.dtype).mean(1)[: self.num_envs]
        self.reading[:, 0], self.reading[:, 1] = total / MINIBATCHES, correct / MINIBATCHES

    @torch.no_grad()
    def classify(self, hosts: np.ndarray, alpha: np.ndarray, part: int, twins: bool = False) -> tuple[np.ndarray, ...]:
        """On images of a part (1 validation, 2 test): loss [R], and which are classified correctly [R, n]."""
        patches, labels = self.images[part]
        rows = self.rows(hosts, alpha, self.weights[hosts + self.num_envs if twins else hosts])
        logits = forward(rows, patches[None], self.contrast[part][hosts], self.joins)
        return cross_entropy(logits, labels.expand(len(hosts), -1)).numpy(), (logits.argmax(-1) == labels).numpy()

    def measure(self, hosts: np.ndarray) -> None:
        """Loss and accuracy on the validation images, and what the live seed contributes: the loss without it minus the
        loss with it; while it is TRAINING, as if it were blended in."""
        alpha, blended = self.alpha(), np.isin(self.stage, (Stage.BLENDING, Stage.HOLDING))
        training = self.stage == Stage.TRAINING
        seeded = hosts[(blended | training)[hosts].any(1)]
        other = np.where(blended, 0.0, np.where(training, 1.0, alpha))[seeded]
        loss, correct = self.classify(np.append(hosts, seeded), np.concatenate((alpha[hosts], other)), 1)
        self.reading[hosts, 2], self.reading[hosts, 3] = loss[: len(hosts)], correct[: len(hosts)].mean(1)
        self.contribution[hosts] = 0
        gain = loss[len(hosts) :] - self.reading[seeded, 2]
        self.contribution[seeded] = np.clip(np.where(blended[seeded].any(1), gain, -gain), -LN, LN)

    # --- Gymnasium

    @torch.inference_mode(False)  # whatever the caller's mode is
    def reset(self, *, seed: int | list[int] | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        if seed is not None:
            seeds = [seed + n for n in range(self.num_envs)] if isinstance(seed, int) else seed
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
        self.reading[hosts, :2] = self.reading[hosts, 2:]
        self.best_loss[hosts], self.best_accuracy[hosts] = self.reading[hosts, 2:].T
        self.past[hosts] = self.history_values()[hosts, None]

    @torch.inference_mode(False)
    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        if not all(action in self.single_action_space for action in np.asarray(actions)):
            raise ValueError(f"actions must be 0 to {len(ACTIONS) - 1}, not {actions}")
        for n in np.flatnonzero(~self.action_masks()[np.arange(self.num_envs), actions]):
            stages = " and ".join(Stage(stage).name for stage in self.stage[n])
            raise ValueError(f"environment {n}: {ACTIONS[actions[n]]} is not allowed with slots {stages}")
        for n in np.flatnonzero(actions):
            self.act(n, int(actions[n]))
        before = self.reading.copy()
        self.train_epoch()
        self.pass_time()
        self.measure(np.arange(self.num_envs))
        diverged = ~np.isfinite(self.reading).all(1)
        done = diverged | (self.epoch >= EPOCHS)
        self.reading = np.nan_to_num(self.reading, nan=3 * LN, posinf=3 * LN)
        self.contribution = np.nan_to_num(self.contribution, nan=-LN)
        self.change = self.reading - before
        self.plateau = np.where(self.reading[:, 2] < self.best_loss, 0, self.plateau + 1)
        self.best_loss = np.minimum(self.best_loss, self.reading[:, 2])
        self.best_accuracy = np.maximum(self.best_accuracy, self.reading[:, 3])
        if self.history:
            self.past = np.concatenate((self.past[:, 1:], self.history_values()[:, None]), 1)
        reward = self.reward(np.asarray(actions), done)
        infos = {}
        if done.any():
            ended = np.flatnonzero(done)
            infos = {"final_obs": self.observe(), "_final_obs": done, "final_info": self.final_info(ended, diverged)}
            gain = infos["final_info"]["validation_accuracy"] - infos["final_info"]["bare_validation_accuracy"]
            reward[ended] += ACCURACY * gain[ended]
            self.start(ended, [int(self.next_seed[n].integers(HELD_OUT)) for n in ended], [(-1,) * SLOTS] * len(ended))
        return self.observe(), reward, done, np.zeros(self.num_envs, bool), infos | self.infos()

    def infos(self) -> dict[str, np.ndarray]:
        return {"action_mask": self.action_masks(), "stage": self.stage.copy()}

    def pass_time(self) -> None:
        self.epoch += 1
        self.age += 1
        self.seed_age += 1
        for stage, (epochs, following) in BY_TIME.items():
            due = (self.stage == stage) & (self.age >= epochs)
            self.stage[due], self.age[due] = following, 0

    def reward(self, actions: np.ndarray, done: np.ndarray) -> np.ndarray:
        """All of it but the final accuracy [N]."""
        blended = np.isin(self.stage, (Stage.BLENDING, Stage.HOLDING)).any(1)
        level = np.where(blended & ~done, self.contribution, 0.0)
        paid = np.where(actions == FOSSILIZE, 0.0, self.paid)  # what is permanent was earned
        potential = np.where(done, 0.0, POTENTIAL * SHARE[self.stage].sum(1))
        shaping = self.gamma * potential - self.potential
        self.paid, self.potential = level, potential
        cost = RENT * self.parameter_ratio() + INTERVENTION * (actions != WAIT)
        return CONTRIBUTION * (level - paid) - cost + shaping

    def final_info(self, ended: np.ndarray, diverged: np.ndarray) -> dict[str, np.ndarray]:
        """Of the hosts that ended, without what is not permanent; zeros for the others."""
        alpha = np.where(self.stage == Stage.FOSSILIZED, 1.0, 0.0)
        info = {}
        for part, name in ((1, "validation"), (2, "test")):
            loss, correct = np.zeros(self.num_envs), np.zeros((self.num_envs, len(self.images[part][1])))
            loss[ended], correct[ended] = self.classify(ended, alpha[ended], part)
            loss[diverged], correct[diverged] = 3 * LN, 1 / CLASSES
            bare = np.zeros(self.num_envs)
            bare_loss, bare_correct = self.classify(ended, 0 * alpha[ended], part, twins=True)
            bare[ended] = np.where(np.isfinite(bare_loss), bare_correct.mean(1), 1 / CLASSES)
            info |= {
                f"{name}_loss": loss,
                f"bare_{name}_accuracy": bare,
                f"{name}_correct": correct,
                f"{name}_accuracy": correct.mean(1),
            }
        fossilized = self.stage == Stage.FOSSILIZED
        return info | {
            "modules": np.where(fossilized, self.blueprint, -1),
            "fossilized": fossilized.sum(1),
            "germinations": self.germinations.copy(),
            "culled": self.culls.copy(),
            "diverged": diverged,
            "parameter_ratio": self.parameter_ratio((Stage.FOSSILIZED,)),
        }

    def history_values(self) -> np.ndarray:
        """[N, 4] of HISTORY, as in the observation."""
        loss, accuracy = self.reading[:, 0::2] / LN, self.reading[:, 3]
        return np.clip(np.stack((*loss.T, accuracy, self.contribution / LN), 1), [0, 0, 0, -1], [3, 3, 1, 1])

    def observe(self) -> np.ndarray:
        """[N, D]: OBSERVATION, then the history, oldest first."""
        live = np.isin(self.stage, LIVE)
        scale = np.array([LN, 1, LN, 1])
        stage = np.where(live, self.stage, 0).max(1)  # of the live seed, 0 if there is none
        has, blueprint = live.any(1), np.where(live, self.blueprint, 0).max(1)
        columns = [
            self.epoch / EPOCHS,
            *(self.reading / scale).T,
            *(self.change / scale).T,
            self.plateau / EPOCHS,
            self.best_accuracy,
            *(stage == i for i in (0, *LIVE[1:])),
            *(has & (blueprint == i) for i in range(len(BLUEPRINTS))),
            np.where(has, self.seed_age / EPOCHS, 0),
            np.where(live, self.alpha(), 0).max(1),
            np.where(has, self.loss_at_germination - self.reading[:, 2], 0) / LN,
            self.contribution / LN,
            (self.stage == Stage.DORMANT).mean(1),
            (self.stage == Stage.FOSSILIZED).mean(1),
            self.parameter_ratio(),
        ]
        obs = np.concatenate((np.stack(columns, 1), self.past.reshape(self.num_envs, -1)), 1)
        space = self.single_observation_space
        return np.clip(obs, space.low, space.high, dtype=np.float32)


gym.register("Morphogenesis-v0", vector_entry_point=Morphogenesis)
