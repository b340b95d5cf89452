"""The notebooks run from top to bottom (`make test-ci`); what they carry along stays small."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST_OUTPUT = 200_000  # bytes, as stored: a larger picture is drawn with too many dots
LARGEST_FILE = 1_500_000  # bytes: GitHub shows notebooks of this size
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.ci
@each_notebook
def test_runs_from_top_to_bottom(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIT_DISTILL_SMALL", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # no history in the user's home
    where = {"metadata": {"path": str(tmp_path)}}  # it must not matter where one starts it
    client = NotebookClient(read(path), timeout=280, kernel_name="python3", resources=where)
    client.execute()  # raises CellExecutionError with the cell and its traceback
    said = [
        output.text
        for cell in client.nb.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stderr"
    ]
    assert not said, "a cell warns"


@each_notebook
def test_carries_the_outputs_of_a_full_run(path: Path) -> None:
    nbformat.validate(read(path))
    assert path.stat().st_size < LARGEST_FILE
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error"
            size = len(json.dumps(output))
            assert size < LARGEST_OUTPUT, f"{size} bytes below: {cell.source[:60]}"
