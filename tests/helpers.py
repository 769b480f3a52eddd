"""What the tests of several scripts share: processes, checkpoints, wrong input, and some of recurrent PPO's maths."""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

ROOT = Path(__file__).parent.parent

# --- processes


class Fork(multiprocessing.get_context("fork").Process):
    """`python path args` without the 3 s that a new Python takes to import torch: a fork of this process runs the file.
    It has what tests need of subprocess.Popen; conftest.py ends what a failing test leaves behind."""

    def __init__(self, path, args=(), environment=None):
        super().__init__()
        self.path, self.args, self.environment = str(path), [str(arg) for arg in args], environment or {}
        self.out, self.err = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115
        self.start()

    def run(self) -> None:  # in the new process
        os.dup2(self.out.fileno(), 1)
        os.dup2(self.err.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        os.environ |= self.environment
        sys.argv = [self.path, *self.args]
        runpy.run_path(self.path, run_name="__main__")

    @property
    def returncode(self) -> int | None:
        return self.exitcode

    def poll(self) -> int | None:
        return self.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        self.join(timeout)
        output = []
        for file in (self.out, self.err):
            file.seek(0)
            output.append(file.read())
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(self.path, timeout, *output)
        return tuple(output)


def start(script_path, *args) -> Fork:
    return Fork(script_path, args)


def run(script_path, *args) -> subprocess.CompletedProcess:
    process = start(script_path, *args)
    output = process.communicate()
    return subprocess.CompletedProcess([process.path, *process.args], process.returncode, *output)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}


def run_from_shell(*command) -> subprocess.CompletedProcess:
    """`python command` with a Python of its own."""
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=180)


def torchrun(driver: Path, world: int) -> None:
    done = run_from_shell("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", driver)
    assert done.returncode == 0, done.stderr


def fork_ranks(driver: Path, world: int) -> None:
    """What torchrun does, with forks: a store on a free port, and for each process its rank."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(world)}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    ranks = [Fork(driver, (), shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(world)]
    errors = [process.communicate()[1] for process in ranks]
    assert not any(process.returncode for process in ranks), "\n".join(errors)


LAUNCHERS = [fork_ranks, pytest.param(torchrun, marks=pytest.mark.slow)]


def assert_two_processes_match_one(driver: Path, launch: Callable[[Path, int], None] = fork_ranks) -> None:
    """The driver saves its final weights beside itself as weights_{processes}_{rank}.pt."""
    one = run(driver)
    assert one.returncode == 0, one.stderr
    launch(driver, 2)
    alone, first, second = (torch.load(driver.parent / f"weights_{name}.pt") for name in ("1_0", "2_0", "2_1"))
    assert checkpoints_equal(dict(first), dict(second))
    for name, x in alone.items():
        torch.testing.assert_close(first[name], x, atol=2e-4, rtol=1e-3)


# --- pictures, checkpoints, signals


def blank_figure(*args):
    """Instead of a picture that takes longer to draw than the tiny run behind it."""
    from matplotlib.figure import Figure

    return Figure(figsize=(0.1, 0.1))


def checkpoints_equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(checkpoints_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(checkpoints_equal, a, b))
    return a == b or a != a


def step_of(checkpoint: dict) -> int:
    counters = checkpoint["counters"] if "counters" in checkpoint else checkpoint["progress"]
    return counters["global_step"]


def wait_for_checkpoint(process, runs_dir: Path) -> Path:
    while not (found := list(runs_dir.glob("*/checkpoint.pt"))):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)  # leaves the core to the process
    return found[0]


def assert_a_signal_saves(script, script_path, flags: dict, tmp_path, number: int, code: int) -> None:
    """The update is finished and saved, the command to go on is printed, and it goes on from there."""
    parts = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", value)]
    process = start(script_path, *parts, "--runs-dir", tmp_path, "--total-timesteps", "10000000")
    checkpoint = wait_for_checkpoint(process, tmp_path)
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == code, err
    assert f"--resume {checkpoint.parent}" in err and "Traceback" not in err and not out
    saved = step_of(script.load(checkpoint))
    more = run(script_path, "--resume", checkpoint.parent, "--total-timesteps", saved + 64)
    assert more.returncode == 0, more.stderr
    assert json.loads(more.stdout.splitlines()[-1])["global_step"] == saved + 64


# --- wrong input


def assert_refused(script, path, args, message, tmp_path, monkeypatch, capfd) -> None:
    """One line on standard error, exit code 2, and nothing done."""
    monkeypatch.setattr(sys, "argv", [str(path), *args, "--runs-dir", str(tmp_path / "runs")])
    with pytest.raises(SystemExit) as exit:
        script.main()
    error = capfd.readouterr().err
    assert exit.value.code == 2 and message in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


# --- the maths of recurrent PPO

MIXED = {"lengths": (3, 1, 7, 40, 2), "ends": ("terminated", "truncated", "both")}


def disturb(agent) -> None:
    """Weights other than those that collected the rollout, so that ratios differ from 1 and some are clipped."""
    with torch.no_grad():
        for weight in agent.parameters():
            weight += 0.1 * torch.randn_like(weight)


def assert_gradient_reaches_back(script, agent, rollout, start, bptt_length: int, begin: int) -> None:
    """The value of step 23 of environment 0 depends on its observations from step `begin` on, and on no others."""
    index = script.cut_segments(start, bptt_length)
    obs = rollout.obs.clone().requires_grad_()
    states, masks = (x.flatten(0, 1)[i] for x, i in ((rollout.state, index[0]), (rollout.action_mask, index)))
    _, values = agent.unroll(obs.flatten(0, 1)[index], states, index < 0, masks)
    last = values[index == 23 * rollout.reward.shape[1]]
    reach = torch.autograd.grad(last.sum(), obs)[0][:, 0].abs().sum(-1) > 0
    assert reach.tolist() == [begin <= t <= 23 for t in range(24)]


def assert_columns_hold_each_step_once_and_in_order(script, start, bptt_length: int) -> None:
    num_steps, num_envs = start.shape
    index = script.cut_segments(start, bptt_length)
    assert sorted(index[index >= 0].tolist()) == list(range(num_steps * num_envs))
    for column in index.T.tolist():
        assert column[0] >= 0 and column[0] // num_envs % (bptt_length or num_steps) == 0
        real = [i for i in column if i >= 0]
        assert real == list(range(real[0], real[-1] + 1, num_envs))  # one environment, nothing left out
        assert len(real) <= (bptt_length or num_steps)
        for above, i in pairwise(column):
            if i >= 0:  # a flush before each start, and nowhere else
                assert (above < 0) == bool(start.flatten()[i])


def assert_statistics_are_those_of_all_data(script) -> None:
    stats, batches = script.RunningMeanStd((3,)), [torch.randn(n, 3) * 4 + 7 + n / 50 for n in (5, 1, 300)]
    for batch in batches:
        stats.update(batch)
    everything = torch.cat(batches)
    torch.testing.assert_close(stats.mean, everything.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.std, everything.std(0, unbiased=False), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.denormalize(stats.normalize(everything)), everything)


def assert_ends_reach_the_advantages(script, train, folder, monkeypatch) -> None:
    seen, real = {}, script.gae

    def gae(reward, value, values_after, terminated, truncated, *rest):
        seen["terminated"], seen["truncated"] = terminated.any().item(), truncated.any().item()
        return real(reward, value, values_after, terminated, truncated, *rest)

    monkeypatch.setattr(script, "gae", gae)
    for end in ("terminated", "truncated"):
        env_kwargs = json.dumps({"lengths": [3], "ends": [end]})
        train(runs_dir=str(folder / end), env_kwargs=env_kwargs, total_timesteps=32)
        assert seen == {"terminated": end == "terminated", "truncated": end == "truncated"}
