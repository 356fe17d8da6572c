"""The pages of frameworks that no extra of sam_optim brings: each runs word for word where its package is installed.

In a process of its own: they set seeds, threads and determinism for the whole process, and print on their own.
"""

import importlib.util
import os
import re
import subprocess
import sys

import examples
import pytest
from limits import ONE_THREAD

INTEGRATIONS = examples.ROOT / "docs" / "integrations"
LIGHT = {"fabric": "lightning.fabric", "skorch": "skorch", "ignite": "ignite", "pyg": "torch_geometric"}
LIGHT |= {"metric_learning": "pytorch_metric_learning", "peft": "peft"}
HEAVY = {"monai": "monai", "fastai": "fastai", "keras": "keras", "mmengine": "mmengine", "trl": "trl"}
HEAVY |= {"ultralytics": "ultralytics"}
NAMES = [*LIGHT, *(pytest.param(name, marks=pytest.mark.slow) for name in HEAVY)]
TRAINED = 0.03  # as of the other pages: accuracies on some hundred examples, and losses


@pytest.mark.parametrize("name", NAMES)
def test_every_page_runs_and_prints_what_it_shows(name, tmp_path):
    package = (LIGHT | HEAVY)[name].split(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"no {package} here")
    ((code, shown),) = examples.blocks(INTEGRATIONS / f"{name}.md")
    (tmp_path / "page.py").write_text(code)
    paths = os.pathsep.join([str(examples.ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "YOLO_CONFIG_DIR": str(tmp_path), **ONE_THREAD}
    command = [sys.executable, "page.py"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = run.stdout.strip().splitlines()[-len(shown.strip().splitlines()) :]
    examples.check([("\n".join(lines), shown)], spread=TRAINED)


def test_every_row_of_the_table_of_loops_names_a_test_that_exists():
    text = (INTEGRATIONS / "loops.md").read_text()
    tests = {file.name: file.read_text() for file in examples.ROOT.glob("tests/test_*.py")}
    named = re.findall(r"(?:`tests/(test_\w+\.py)`: )?`(test_\w+)`", text)
    assert len(named) > 30
    for file, test in named:
        assert f"def {test}(" in tests[file or "test_loops.py"], test
