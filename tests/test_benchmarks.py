"""The benchmarks still import what they measure; their figures are no matter of tests."""

import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
FILES = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", [name for name in FILES if name != "precision"])
def test_a_benchmark_tells_its_options(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(FOLDER)  # they share code
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 0 and "--help" in capsys.readouterr().out


def test_the_faster_precision_is_one_that_lightning_knows(capsys):
    runpy.run_path(str(FOLDER / "precision.py"), run_name="__main__")
    said = capsys.readouterr()
    assert said.out in ("bf16-mixed\n", "32-true\n")
    assert said.err.startswith("float32 ") and "bfloat16" in said.err
