"""`pytest --script my_copy.py` runs the suite on a copy of a training script, and only that script's part of it. This
file lies here, and not in tests/, because pytest takes `my_copy.py` for a test until it has read it."""

import importlib.util
import multiprocessing
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; the tests run in several processes
pytest.register_assert_rewrite("helpers")
SIGNS = {  # found there only
    "ppo_lstm_predictor.py": "class Predictor(",
    "ppo_lstm_tamiyo.py": "def actions_figure(",
    "sequence_ppo_selfplay.py": "def sequence_loss(",
    "worldmodel_a2c.py": "class Quantizer(",
}


def pytest_addoption(parser):
    parser.addoption("--script", default=None, help="the copy of a training script to test")


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


@pytest.fixture(autouse=True)
def event_files_are_in_order(monkeypatch):
    """TensorBoard reads a run's files by name; of one second's, the process's tenth would come before its ninth."""
    from tensorboard.summary.writer import event_file_writer

    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def path_of(request, original: str) -> Path:
    """The original or, if it was copied from that, the copy."""
    copy = request.config.getoption("--script")
    if copy and SIGNS[original] not in Path(copy).read_text():
        pytest.skip(f"{copy} is no copy of {original}")
    return Path(copy or ROOT / original).resolve()


def module_of(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def script_path(request) -> Path:
    return path_of(request, "ppo_lstm_predictor.py")


@pytest.fixture(scope="session")
def script(script_path):
    return module_of(script_path)


@pytest.fixture(scope="session")
def selfplay_path(request) -> Path:
    return path_of(request, "sequence_ppo_selfplay.py")


@pytest.fixture(scope="session")
def selfplay(selfplay_path):
    return module_of(selfplay_path)


@pytest.fixture(scope="session")
def tamiyo_path(request) -> Path:
    return path_of(request, "ppo_lstm_tamiyo.py")


@pytest.fixture(scope="session")
def tamiyo(tamiyo_path):
    return module_of(tamiyo_path)


@pytest.fixture(scope="session")
def worldmodel_path(request) -> Path:
    return path_of(request, "worldmodel_a2c.py")


@pytest.fixture(scope="session")
def worldmodel(worldmodel_path):
    return module_of(worldmodel_path)
