"""Any Gymnasium observation as one float32 vector: Box, Discrete, MultiDiscrete, MultiBinary and any nesting of Dict
and Tuple of these. Entries come in the order of `gymnasium.spaces.flatten`; discrete values are one-hot."""

import numpy as np
from gymnasium import spaces


def flatten(space: spaces.Space, batch) -> np.ndarray:
    """A batch of N observations, nested as a vector environment returns them, as a new float32 array [N, D]."""
    if isinstance(space, spaces.Dict):
        return np.concatenate([flatten(part, batch[key]) for key, part in space.items()], axis=1)
    if isinstance(space, spaces.Tuple):
        return np.concatenate([flatten(part, column) for part, column in zip(space, batch, strict=True)], axis=1)
    if isinstance(space, spaces.Discrete):
        return (np.asarray(batch)[:, None] == space.start + np.arange(space.n)).astype(np.float32)
    if isinstance(space, spaces.MultiDiscrete):
        columns = (np.asarray(batch) - space.start).reshape(len(batch), -1)  # [N, entries]
        one_hots = [np.eye(n, dtype=np.float32)[columns[:, i]] for i, n in enumerate(space.nvec.flat)]
        return np.concatenate(one_hots, axis=1)
    if isinstance(space, (spaces.Box, spaces.MultiBinary)):
        return np.array(batch, dtype=np.float32).reshape(len(batch), -1)
    raise TypeError(f"cannot flatten a {type(space).__name__} observation")


def entry_names(space: spaces.Space, name: str = "obs") -> list[str]:
    """Names of the D entries of `flatten`, such as `obs[3]`, `desired_goal[0]` or `light=2`.

    Raises:
        TypeError: a part of the space is of a kind that has no fixed-size vector, such as Text or Graph.
    """
    prefix = "" if name == "obs" else f"{name}."
    if isinstance(space, spaces.Dict):
        return [entry for key, part in space.items() for entry in entry_names(part, f"{prefix}{key}")]
    if isinstance(space, spaces.Tuple):
        return [entry for i, part in enumerate(space) for entry in entry_names(part, f"{prefix}{i}")]
    if isinstance(space, spaces.Discrete):
        return [f"{name}={space.start + i}" for i in range(space.n)]
    if isinstance(space, spaces.MultiDiscrete):
        ranges = zip(indices(space.shape), space.start.flat, space.nvec.flat, strict=True)
        return [f"{name}{index}={start + i}" for index, start, n in ranges for i in range(n)]
    if isinstance(space, (spaces.Box, spaces.MultiBinary)):
        return [f"{name}{index}" for index in indices(space.shape)]
    raise TypeError(f"cannot flatten a {type(space).__name__} observation")


def indices(shape: tuple[int, ...]) -> list[str]:
    """Subscripts of every entry of an array of this shape, in C order: `[0]`, `[1]` or `[0,0]`, `[0,1]`, …"""
    return [f"[{','.join(map(str, index))}]" for index in np.ndindex(*shape)]
