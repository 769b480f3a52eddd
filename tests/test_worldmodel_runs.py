"""Whole runs of worldmodel_a2c.py: the same seed, resume, stages, dreams, signals, wrong input, two processes."""

import dataclasses
import json
import signal
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from helpers import (
    LAUNCHERS,
    ROOT,
    assert_a_signal_saves,
    assert_refused,
    assert_two_processes_match_one,
    blank_figure,
    checkpoints_equal,
    run,
    run_from_shell,
)
from PIL import Image
from toys import ACTION_SPACES, same_but_for_time, scalars

SMALL = {"env_id": "toys:Toy-v0", "num_envs": 2, "num_steps": 8, "num_minibatches": 2, "total_timesteps": 16 * 8}
SMALL |= {"memory_width": 16, "context": 4, "planning_horizon": 2, "planning_samples": 4}
SMALL |= {"eval_episodes": 2, "checkpoint_every": 4}
SMALL["env_kwargs"] = json.dumps({"lengths": [5, 9, 20], "ends": ["terminated", "truncated"]})
IMAGES = {"env_id": "test_worldmodel_runs:ToyImage-v0", "env_kwargs": "{}", "total_timesteps": 16 * 4}


class ToyImage(gym.Env):
    """A bright bar on 16 x 32 pixels, that an action pushes; the reward is how far right it is. With `colour` there are
    three channels, the action is 4 or 5 (left, right), and every other step says that left is forbidden."""

    def __init__(self, width=32, colour=False):
        self.colour = colour
        self.observation_space = Box(0, 255, (16, width, 3 if colour else 1), np.uint8)
        self.action_space = Discrete(2, start=4) if colour else Box(-1, 1, (1,))

    def pixels(self):
        image = np.zeros((16, 32, 3 if self.colour else 1), np.uint8)
        image[:, int(self.x)] = 255
        return image

    def info(self):
        return {"action_mask": np.array([0, 1], np.int8)} if self.colour and self.t % 2 else {}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = self.np_random.uniform(0, 32), 0
        return self.pixels(), self.info()

    def step(self, action):
        assert not self.info() or action == 5
        push = 2.0 * action - 9 if self.colour else action[0]
        self.x, self.t = float(np.clip(self.x + 3 * push, 0, 31.9)), self.t + 1
        return self.pixels(), self.x / 32, False, self.t >= 12, self.info()


gym.register("ToyImage-v0", entry_point=ToyImage)


@pytest.fixture
def pictures():
    """For tests that want them drawn."""


@pytest.fixture(autouse=True)
def no_pictures(worldmodel, monkeypatch, request):
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(worldmodel, "dream_figure", blank_figure)


def small_run(worldmodel, folder, **changes):
    return worldmodel.train(worldmodel.Args(**SMALL | {"runs_dir": str(folder)} | changes))


def checkpoint_of(result):
    return f"{result['run_dir']}/checkpoint.pt"


VARIANTS = [
    {},
    {"env_kwargs": '{"lengths": [5, 30], "action": "box"}'},
    {"env_kwargs": '{"lengths": [7], "action": "multidiscrete", "masked": true}', "planning": False},
    pytest.param({"vectorization": "async", "update_epochs": 1}, marks=pytest.mark.slow),
    pytest.param(IMAGES, marks=pytest.mark.slow),
    pytest.param(IMAGES | {"env_kwargs": '{"colour": true}'}, marks=pytest.mark.slow),
    IMAGES | {"quantize": False, "num_steps": 3, "total_timesteps": 6 * 12},
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_the_same_seed_gives_the_same_scalars(worldmodel, worldmodel_path, tmp_path, changes, monkeypatch):
    monkeypatch.setattr(worldmodel.Agent, "beta", lambda self, args: 0.9)  # so that plans act
    first, second = (small_run(worldmodel, tmp_path / name, **changes) for name in "ab")
    tags = scalars(first["run_dir"])
    same_but_for_time(tags, scalars(second["run_dir"]))
    assert first["eval_return_mean"] == second["eval_return_mean"]
    assert all(error < 1e-4 for _, error in tags["losses/first_ratio_error"])
    acting = [kl > 0 for _, kl in tags["planning/kl"]]
    assert acting[0] is False and set(acting[1:]) == {changes.get("planning", True)}
    expected = {f"planning/{name}" for name in ("beta", "kl", "spread")} | {"eval/return_sampled"}
    assert expected | {"losses/vision_loss", "losses/memory_loss", "charts/episodic_return"} <= tags.keys()
    assert ("vision/perplexity" in tags) == ("env_id" in changes and changes.get("quantize", True))
    for name in ("dream.png", "args.json", "best.pt", "common/gae.py", worldmodel_path.name):
        assert len(list((tmp_path / "a").glob(f"*/{name}"))) == 1


def test_plans_steer_by_what_they_have_proved_to_be_worth(worldmodel, tmp_path, monkeypatch):
    """Beta comes from moving averages over the rollouts before; from the first one there is no plan."""
    rollouts, targets, real, real_gae = [], [], worldmodel.collect, worldmodel.gae

    def collect(*args):
        rollout, episodes = real(*args)
        rollouts.append(rollout)
        return rollout, episodes

    def gae(*args):
        targets.append(real_gae(*args))
        return targets[-1]

    monkeypatch.setattr(worldmodel, "collect", collect)
    monkeypatch.setattr(worldmodel, "gae", gae)
    result = small_run(worldmodel, tmp_path, planning_beta=2.0, eval_episodes=1)
    expected, squared, product = [], 0.0, 0.0
    for rollout, (advantages, _) in zip(rollouts, targets, strict=True):
        expected.append(2.0 * max(0.0, product / (squared + 1e-4)))
        normal = (advantages - advantages.mean()) / advantages.std(unbiased=False)
        planned = rollout.planned[-8:]
        squared += 0.2 * (planned.square().mean().item() - squared)
        product += 0.2 * ((planned * normal).mean().item() - product)
    betas = [beta for _, beta in scalars(result["run_dir"])["planning/beta"]]
    np.testing.assert_allclose(betas, expected, rtol=1e-3, atol=1e-6)
    assert betas[:2] == [0, 0] and max(betas) > 0


def test_the_model_alone_goes_on_learning_from_rollouts_before(worldmodel, tmp_path, monkeypatch):
    agent, rollouts, drawn, moved, losses = None, [], [], [], []
    collect, descend, memory_loss = worldmodel.collect, worldmodel.descend, worldmodel.memory_loss

    def collected(*args):
        rollouts.append(collect(*args))
        return rollouts[-1]

    def lost(learner, batch, seen):
        nonlocal agent
        agent = learner
        if not seen.h.requires_grad:  # a step of the model alone
            drawn.append(batch)
        losses.append(memory_loss(learner, batch, seen))
        return losses[-1]

    def descended(loss, *args):
        before = {name: x.clone() for name, x in agent.named_parameters()}
        norm = descend(loss, *args)
        moved.append({name.split(".")[0] for name, x in agent.named_parameters() if not x.equal(before[name])})
        if moved[-1] == {"model"}:
            torch.testing.assert_close(loss, 0.5 * losses[-1].mean())
        return norm

    for name, function in (("collect", collected), ("descend", descended), ("memory_loss", lost)):
        monkeypatch.setattr(worldmodel, name, function)
    small_run(worldmodel, tmp_path / "a", model_steps=64, memory_coef=0.5, eval_episodes=1)
    alone = [parts == {"model"} for parts in moved]
    assert alone == ([False] * 8 + [True] * 64) * 7  # four epochs of two minibatches; none after the first rollout
    known = [rollout.obs[-8:, n] for rollout, _ in rollouts for n in range(2)]
    found = [next(i for i, obs in enumerate(known) if obs.equal(batch.obs[0])) // 2 for batch in drawn]
    assert all(r <= i // 64 + 1 for i, r in enumerate(found))
    assert len(set(found)) > 4 and len({found[i] for i in range(8)}) == 1
    drawn.clear()
    small_run(worldmodel, tmp_path / "b", planning=False, eval_episodes=1)
    assert not drawn


def test_resume_continues_counters_schedule_and_curve(worldmodel, tmp_path):
    first = small_run(worldmodel, tmp_path)
    args = worldmodel.Args(**worldmodel.load(checkpoint_of(first))["args"])
    args = dataclasses.replace(args, resume=first["run_dir"], total_timesteps=16 * 16)
    second = worldmodel.train(args)
    assert first["global_step"] == 16 * 8 and second["global_step"] == 16 * 16
    curve = scalars(first["run_dir"])["losses/value_loss"]
    assert [step for step, _ in curve] == [16 * (i + 1) for i in range(1, 16)]  # the first rollout only warms up
    rates = dict(scalars(first["run_dir"])["charts/learning_rate"])
    assert rates[16 * 9] == pytest.approx(args.learning_rate * (1 - 8 / 16), rel=1e-4)
    state = torch.load(checkpoint_of(first), weights_only=True)["agent"]
    assert state["vision.obs_stats.count"] == 16 * 16 and state["updates"] == 16
    with pytest.raises(worldmodel.InputError, match="total-timesteps"):
        worldmodel.train(args)


def test_evaluate_a_checkpoint(worldmodel, worldmodel_path, tmp_path, pictures):
    first = small_run(worldmodel, tmp_path, checkpoint_every=0, eval_episodes=8)
    with Image.open(f"{first['run_dir']}/dream.png") as image:
        assert image.size == (1000, 800)
    result = run(worldmodel_path, "--evaluate", checkpoint_of(first))
    assert result.returncode == 0, result.stderr
    _, last = result.stdout.splitlines()
    again = json.loads(last)
    assert again["eval_return_mean"] == pytest.approx(first["eval_return_mean"])


def test_dreams_of_images_are_drawn(worldmodel, tmp_path, pictures):
    first = small_run(worldmodel, tmp_path, checkpoint_every=0, **IMAGES | {"eval_episodes": 6})
    with Image.open(f"{first['run_dir']}/dream.png") as image:
        assert image.size == (1000, 800) and len(image.convert("L").getcolors()) > 50


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, IMAGES])
def test_dreams_as_a_gif(worldmodel, tmp_path, changes):
    checkpoint, gif = (
        checkpoint_of(small_run(worldmodel, tmp_path, checkpoint_every=0, **changes)),
        tmp_path / "dream.gif",
    )
    result = run_from_shell(ROOT / "benchmark" / "worldmodel_dream.py", checkpoint, gif, "--start", "0", "--steps", "4")
    assert result.returncode == 0, result.stderr
    with Image.open(gif) as image:
        assert image.size == ((4 * 3 * 32, 4 * 16) if changes else (360, 360)) and 1 <= image.n_frames <= 4


def test_stages_learn_their_part_and_hand_it_on(worldmodel, tmp_path):
    """vision -> memory -> all: each starts from the other's weights, and changes nothing but its part."""

    def parts(path):
        state = torch.load(path, weights_only=True)["agent"]
        names = {"vision": "vision.", "memory": ("memory.", "model."), "controller": ("actor.", "critic.")}
        return {
            part: {
                n: x for n, x in state.items() if n.startswith(start) and not n.startswith(("critic.6", "model.2"))
            }  # which PopArt moves
            for part, start in names.items()
        }

    vision = checkpoint_of(small_run(worldmodel, tmp_path / "v", stage="vision"))
    untrained = checkpoint_of(small_run(worldmodel, tmp_path / "u", stage="vision", total_timesteps=16))
    assert checkpoints_equal(parts(vision)["memory"], parts(untrained)["memory"])
    assert checkpoints_equal(parts(vision)["controller"], parts(untrained)["controller"])
    assert not checkpoints_equal(parts(vision)["vision"], parts(untrained)["vision"])
    memory = checkpoint_of(small_run(worldmodel, tmp_path / "m", stage="memory", init_from=vision))
    assert checkpoints_equal(parts(memory)["vision"], parts(vision)["vision"])  # statistics and codes, too
    assert checkpoints_equal(parts(memory)["controller"], parts(vision)["controller"])
    assert not checkpoints_equal(parts(memory)["memory"], parts(vision)["memory"])
    started = small_run(worldmodel, tmp_path / "a", init_from=memory, total_timesteps=16, learning_rate=1e-12)
    for part in ("vision", "memory"):
        mine, theirs = parts(checkpoint_of(started))[part], parts(memory)[part]
        for name in mine:
            if "stats" not in name and "quantizer" not in name:  # which one rollout has moved
                torch.testing.assert_close(mine[name], theirs[name], atol=1e-9, rtol=1e-6)
    small_run(worldmodel, tmp_path / "b", init_from=memory)


def test_stages_refuse_what_does_not_fit(worldmodel, tmp_path):
    vision = checkpoint_of(small_run(worldmodel, tmp_path / "v", stage="vision"))
    for changes, name in (({"memory_width": 32}, "memory.latent.weight"), ({"memory_layers": 1}, "blocks.1")):
        with pytest.raises(worldmodel.InputError, match=name):
            small_run(worldmodel, tmp_path / "x", stage="memory", init_from=vision, **changes)
    with pytest.raises(worldmodel.InputError, match="parameter group"):
        args = worldmodel.load(vision)["args"] | {"resume": str(next((tmp_path / "v").iterdir())), "stage": "all"}
        worldmodel.train(worldmodel.Args(**args))
    assert not (tmp_path / "x").exists()


def test_without_planning_nothing_is_left_of_plans(worldmodel, tmp_path, monkeypatch):
    """… of the run that it starts from."""
    first = checkpoint_of(small_run(worldmodel, tmp_path))
    state = torch.load(first, weights_only=True)
    state["agent"]["foretold"] = torch.tensor([0.09, 0.045])
    torch.save(state, first)
    shifts, real = [], worldmodel.a2c_loss
    monkeypatch.setattr(worldmodel, "a2c_loss", lambda *args: shifts.append(args[4]) or real(*args))
    for changes in ({"planning": False}, {"stage": "memory"}):
        result = small_run(worldmodel, tmp_path / "next", init_from=first, **changes)
        assert not any(beta for _, beta in scalars(result["run_dir"])["planning/beta"])
    assert shifts and not any(shifts)


def test_one_step_episodes(worldmodel, tmp_path):
    result = small_run(worldmodel, tmp_path, env_kwargs='{"lengths": [1]}')
    assert "model_skill_k1" not in result and result["eval_episodes"] == 2


def test_minibatches_are_as_many_as_asked_for(worldmodel, tmp_path):
    result = small_run(worldmodel, tmp_path, num_envs=5, num_minibatches=4, planning=False, total_timesteps=40 * 4)
    assert [x for _, x in scalars(result["run_dir"])["losses/importance"]] == pytest.approx([1.0] * 3)


def test_other_checkpoints_are_refused_by_name(worldmodel, tmp_path):
    first = small_run(worldmodel, tmp_path)
    path = checkpoint_of(first)
    args = worldmodel.Args(**worldmodel.load(path)["args"] | {"resume": first["run_dir"], "total_timesteps": 10**6})
    with pytest.raises(worldmodel.InputError, match=r"memory\.latent"):
        worldmodel.train(dataclasses.replace(args, memory_width=32))
    state = torch.load(path, weights_only=True)
    state["agent"]["actor.0.weight"] = torch.zeros(7, 8)
    torch.save(state, path)
    with pytest.raises(worldmodel.InputError, match=r"actor.0.weight.*\[7, 8\]"):
        worldmodel.train(args)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_says_how_to_go_on_and_exits(worldmodel, worldmodel_path, tmp_path, number, code):
    assert_a_signal_saves(worldmodel, worldmodel_path, SMALL, tmp_path, number, code)


WRONG = [
    (["--num-envs", "0"], "--num-envs must be above 0 and at most 100000, not 0"),
    (["--target-kl", "-1"], "--target-kl must be above 0"),
    (["--planning-beta", "-1"], "--planning-beta must be 0 or more"),
    (["--gamma", "1.5"], "--gamma must be 0 or more and at most 1"),
    (["--context", "0"], "--context must be above 0"),
    (["--memory-width", "20"], "--memory-width must be a multiple of 8"),
    (["--num-minibatches", "100"], "--num-minibatches must be above 0 and at most 16"),
    (["--env-id", "CartPoll-v1"], "CartPole"),
    (["--env-id", "no_such_module:Thing-v0"], "no_such_module"),
    (["--env-kwargs", "{oops"], "CartPole-v1"),
    (["--env-kwargs", '{"nonsense": 1}'], "nonsense"),
    (["--env-id", "test_worldmodel_runs:ToyImage-v0", "--env-kwargs", '{"width": 33}'], "multiples of 16: (16, 33, 1)"),
    (["--stage", "memory"], "--stage memory needs --init-from"),
    (["--resume", "nowhere"], "nowhere/checkpoint.pt"),
    (["--evaluate", "nowhere.pt"], "nowhere.pt"),
    (["--init-from", "nowhere.pt"], "nowhere.pt"),
    (["--num-steps", "10000000000"], "--num-steps must be above 0 and at most 100000"),
]


@pytest.mark.parametrize("args, message", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(
    worldmodel, worldmodel_path, tmp_path, args, message, monkeypatch, capfd
):
    assert_refused(worldmodel, worldmodel_path, args, message, tmp_path, monkeypatch, capfd)


def test_unknown_action_space_and_missing_packages(worldmodel, tmp_path, monkeypatch):
    monkeypatch.setitem(ACTION_SPACES, "words", gym.spaces.Text(3))
    with pytest.raises(worldmodel.InputError, match="Text"):
        small_run(worldmodel, tmp_path, env_kwargs='{"action": "words"}')
    monkeypatch.setitem(sys.modules, "moviepy", None)
    with pytest.raises(worldmodel.InputError, match="pip install"):
        worldmodel.check(worldmodel.Args(capture_video=True))


@pytest.mark.filterwarnings("ignore:.*ERROR")  # Gymnasium's, for what the test wants
@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize(
    "fault, message",
    [
        ("raise", "the rotor fell off"),
        ("nan", "not finite"),
        ("nan_reward", "not finite"),
        ("die", "process of an environment died"),
    ],
)
def test_a_broken_environment_is_one_clear_error(worldmodel, tmp_path, fault, message, vectorization):
    if (fault, vectorization) == ("die", "sync"):
        pytest.skip("takes this process with it")
    env_kwargs = json.dumps({"lengths": [50], "fault": fault, "fault_step": 8 * 5 + 3})
    with pytest.raises((RuntimeError, FloatingPointError), match=message):
        small_run(worldmodel, tmp_path, env_kwargs=env_kwargs, vectorization=vectorization, eval_episodes=1)
    saved = worldmodel.load(next(tmp_path.glob("*/checkpoint.pt")))
    assert saved["counters"]["global_step"] == 16 * 4  # the last consistent state


def test_a_mask_that_allows_nothing_names_the_environment(worldmodel, tmp_path):
    with pytest.raises(ValueError, match="environment 0 allows no action"):
        small_run(worldmodel, tmp_path, env_kwargs=json.dumps({"masked": "nothing"}))


def test_a_non_finite_loss_stops_before_the_weights_change(worldmodel, tmp_path, monkeypatch):
    real, seen = worldmodel.a2c_loss, []

    def broken(agent, *args):
        loss, metrics = real(agent, *args)
        seen.append((agent, {name: x.clone() for name, x in agent.state_dict().items()}))
        return (loss * torch.nan if len(seen) == 50 else loss), metrics

    monkeypatch.setattr(worldmodel, "a2c_loss", broken)
    with pytest.raises(RuntimeError, match="non-finite"):
        small_run(worldmodel, tmp_path)
    agent, before = seen[-1]
    assert len(seen) == 50 and checkpoints_equal(dict(agent.state_dict()), before)


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("launch", LAUNCHERS)
def test_two_processes_match_one_with_the_same_data(worldmodel_path, tmp_path, images, launch):
    """Actions are the likeliest ones, and no code dies, so that nothing depends on who draws which random number."""
    driver = tmp_path / "driver.py"
    driver.write_text(f"""
import importlib.util, os, sys, torch
from collections import deque
sys.argv = ["driver"]
spec = importlib.util.spec_from_file_location("script", {str(worldmodel_path)!r})
script = sys.modules["script"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
sample, train_agent, play = script.sample, script.Agent, script.play
agents = []

def make(*args):
    agents.append(train_agent(*args))
    if {images}:  # codes that stay in use, whatever is assigned to them
        agents[-1].vision.quantizer.count.fill_(1e9)
        agents[-1].vision.quantizer.total.copy_(1e9 * agents[-1].vision.quantizer.codebook)
    return agents[-1]

script.sample = lambda params, choices, generator, alike=1: sample(params, choices, None)
script.Agent = make
script.deque = lambda *args, maxlen: deque(*args, maxlen=1 if maxlen == 100 else maxlen)  # of old rollouts the last
world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
toy = dict(env_id="toys:Toy-v0", env_kwargs='{{"lengths": [3, 9, 1], "ends": ["truncated", "terminated"]}}')
args = script.Args(
    **(dict(env_id="test_worldmodel_runs:ToyImage-v0") if {images} else toy),
    num_envs=4 // world, num_steps=16, num_minibatches=1, model_steps=2, total_timesteps=64 * (3 if {images} else 6),
    memory_width=16, context=4, planning_horizon=2, planning_beta=5.0,
    eval_episodes=2, checkpoint_every=0, target_kl=10.0, runs_dir={str(tmp_path)!r},
)
result = script.train(args)
torch.save(agents[0].state_dict(), {str(tmp_path)!r} + f"/weights_{{world}}_{{rank}}.pt")
""")
    assert_two_processes_match_one(driver, launch)


@pytest.mark.slow
def test_cartpole_is_learnt_in_a_minute(worldmodel, tmp_path):
    """Clearly better than random after 12,000 steps; the model forecasts better than "nothing changes"."""
    args = worldmodel.Args(total_timesteps=12_000, context=8, checkpoint_every=0, runs_dir=str(tmp_path))
    result = worldmodel.train(args)
    assert result["first_return_mean"] < 40 < 80 < result["eval_return_mean"]
    curves = scalars(result["run_dir"])
    assert max(error for _, error in curves["losses/first_ratio_error"]) < 1e-4
    assert curves["losses/vision_loss"][-1][1] < 0.3 * curves["losses/vision_loss"][0][1]
    assert max(kl for _, kl in curves["planning/kl"]) > 0.01 and result["model_skill_k5"] > 0
