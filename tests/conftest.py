"""`pytest --script my_copy.py` runs the suite on a copy of ppo_lstm_predictor.py."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def pytest_addoption(parser):
    parser.addoption("--script", default=str(ROOT / "ppo_lstm_predictor.py"), help="the training script to test")


@pytest.fixture(scope="session")
def script_path(request) -> Path:
    return Path(request.config.getoption("--script")).resolve()


@pytest.fixture(scope="session")
def script(script_path):
    spec = importlib.util.spec_from_file_location(script_path.stem, script_path)
    module = sys.modules[script_path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    return module
