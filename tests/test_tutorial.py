"""docs/tutorial.ipynb runs from top to bottom, in a kernel of its own, and its results are what its text says."""

import json
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs" / "tutorial.ipynb"
RESULTS = """
import json
print(json.dumps(dict(
    accuracy={" ".join(map(str, key)) if isinstance(key, tuple) else key: value for key, value in accuracy.items()},
    levels=levels, agrees=verification.agrees, close=verification.agreements[0].close,
    file_correct=verification.agreements[0].correct, torch_correct=verification.agreements[0].torch_correct,
    unequal=verification.agreements[0].integers.unequal,
    images=len(labels), bits=costs.totals()["weight_bytes"] / costs.totals(32)["weight_bytes"] * 32,
    rules=[rule.passed for rule in check_finn(finn_file)])))
"""


def run(cells, folder):
    """The outputs of a notebook with these cells, each a list, run in ``folder``. Raises a CellExecutionError."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return [cell.outputs for cell in notebook.cells]


@pytest.fixture(scope="module")
def notebook():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_every_cell_runs_and_the_numbers_are_those_that_are_told(notebook, tmp_path):
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    *outputs, results = run([*sources, RESULTS], tmp_path)
    found = json.loads("".join(o.text for o in results if o.output_type == "stream" and o.name == "stdout"))
    assert not list(tmp_path.iterdir())  # nothing is left beside the notebook
    pictures = [o for of_cell in outputs for o in of_cell if "image/png" in o.get("data", {})]
    assert len(pictures) == 3
    accuracy = found["accuracy"]
    assert accuracy["float"] == pytest.approx(100 * 350 / 359)  # the card's, which test_registry checks
    assert accuracy["granq 8"] >= accuracy["float"] - 0.5
    assert accuracy["granq 2"] > accuracy["stock 2"] + 30
    assert accuracy["qat 2"] > accuracy["granq 2"] + 5  # training without data brings most of it back
    assert accuracy["folded"] > accuracy["folded, untrained"] > 80
    assert found["levels"]["Uint8ActPerTensorFloat"][1] < 8 == found["levels"]["GranQActPerChannel"][1]
    assert found["agrees"] and found["unequal"] == 0 and found["close"] == found["images"] == 359
    assert found["file_correct"] == found["torch_correct"] == round(accuracy["folded"] * 3.59)
    assert all(found["rules"]) and found["bits"] == pytest.approx(3, abs=0.3)


def test_a_cell_that_fails_fails_the_test(tmp_path):
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="ZeroDivisionError"):
        run(["x = 1", "x / 0"], tmp_path)


def test_the_committed_outputs_are_whole_and_small(notebook):
    """Pages that show notebooks show what a run printed: every code cell ran, in order, without an error."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [o for cell in cells for o in cell.outputs]
    assert all(o.output_type in ("stream", "display_data", "execute_result") and o.get("name") != "stderr" for o in outputs)
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 3
    assert NOTEBOOK.stat().st_size < 300_000
