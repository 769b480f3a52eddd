"""`pytest --script my_copy.py`, wherever the copy lies."""

import shutil

import pytest
from helpers import ROOT, run_from_shell


@pytest.mark.parametrize(
    "args",
    [
        ["--script", "folder/my_copy.py"],
        pytest.param(["--script=../outside/my_copy.py"], marks=pytest.mark.slow),
        # without `tests`, pytest would look for its settings beside the copy
        pytest.param(["tests", "--script", "../outside/my_copy.py"], marks=pytest.mark.slow),
    ],
)
def test_the_copy_is_what_is_tested_and_no_test(args, tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    (repository / "tests").mkdir(parents=True)
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, repository)
    (repository / "ppo_lstm_tamiyo.py").write_text("def actions_figure(): ...\nwho = 'original'\n")
    copy = repository / args[-1].removeprefix("--script=")
    copy.parent.mkdir(exist_ok=True)
    copy.write_text("def actions_figure(): ...\nwho = 'copy'\n")
    (repository / "tests/test_it.py").write_text("""
def test_copy(tamiyo):
    assert tamiyo.who == "copy"


def test_other_script(worldmodel):
    pass
""")
    monkeypatch.chdir(repository)
    result = run_from_shell("-m", "pytest", "-n0", *args)
    assert result.returncode == 0 and "1 passed, 1 skipped" in result.stdout, result.stdout + result.stderr
