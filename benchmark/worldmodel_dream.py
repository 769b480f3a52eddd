"""What the world model dreams: a GIF of an episode as it was, as vision keeps it, and as the model imagines it from one
look on, with the same actions.

    python benchmark/worldmodel_dream.py runs/…/checkpoint.pt dream.gif
    python benchmark/worldmodel_dream.py runs/…/checkpoint.pt dream.gif --start 60 --steps 40 --every 2

The episode is the first of an evaluation with sampled actions, on the evaluation's seeds.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import worldmodel_a2c as wm
from common.obs import entry_names


def first_episode(agent: wm.Agent, args: wm.Args) -> wm.Rollout:
    """All steps of one episode, behind padding."""
    envs, steps = wm.make_envs(args, 1), []
    for step, ended in wm.play(envs, agent, args, args.seed + 1_000_000_000):
        steps.append(step)
        if ended:
            envs.close()
            return wm.join(steps, agent.memory.prefix)


def image_frame(views: list[torch.Tensor], k: int) -> Image.Image:
    """The views' images k side by side, four times as large."""
    row = torch.cat([view[k] for view in views], -1).movedim(0, -1)  # [height, 3 x width, C]
    array = ((row.clamp(-0.5, 0.5) + 0.5) * 255).to(torch.uint8).squeeze(-1).numpy()
    return Image.fromarray(array).resize((4 * array.shape[1], 4 * array.shape[0]), Image.Resampling.NEAREST)


def line_frame(views: list[torch.Tensor], names: list[str], k: int) -> Image.Image:
    """The first k + 1 steps of up to four entries."""
    figure = Figure(figsize=(6, 6), dpi=60, layout="constrained")
    for i, axis in enumerate(np.atleast_1d(figure.subplots(min(4, len(names))))):
        for view, label in zip(views, ("real", "reconstructed", "imagined"), strict=True):
            axis.plot(view[: k + 1, i], label=label)
        axis.set(xlim=(0, len(views[0])), ylim=(-3, 3), ylabel=names[i])
    figure.axes[0].legend(fontsize="small", ncols=3)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("gif")
    parser.add_argument("--start", type=int, help="step of the episode to imagine from; a fifth of it if not given")
    parser.add_argument("--steps", type=int, default=100, help="steps to imagine, at most")
    parser.add_argument("--every", type=int, default=1, help="show only every so manieth step")
    given = parser.parse_args()
    args = wm.Args(**torch.load(given.checkpoint, map_location="cpu", weights_only=True)["args"])
    with wm.make_env(args) as env:
        agent = wm.Agent(env.observation_space, env.action_space, args)
    wm.load(given.checkpoint, agent=agent)
    episode = first_episode(agent, args)
    length = len(episode.age) - agent.memory.prefix
    start = length // 5 if given.start is None else given.start
    steps = min(given.steps, length - 1 - start)
    if steps < 1:
        sys.exit(f"the episode ends after {length} steps")
    dreams = wm.dream(agent, episode, [agent.memory.prefix + start], steps)
    views = agent.vision.normalize(dreams.obs), agent.vision.decode(dreams.actual), agent.vision.decode(dreams.imagined)
    views, names = [view[0] for view in views], entry_names(agent.obs_space) if not agent.vision.image else []
    chosen = range(0, steps, given.every)
    frames = [line_frame(views, names, k) if names else image_frame(views, k) for k in chosen]
    frames[0].save(given.gif, save_all=True, append_images=frames[1:], duration=80 * given.every, loop=0)


if __name__ == "__main__":
    main()
