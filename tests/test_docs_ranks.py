"""The pages on several ranks: their examples, word for word, started by torchrun."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs" / "integrations"


@pytest.mark.parametrize("page", ["ddp", "fsdp2"])
def test_the_example_prints_what_the_page_shows(page, tmp_path):
    text = (DOCS / f"{page}.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (shown,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    script = tmp_path / "train.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(DOCS.parents[1])}  # the package of these tests
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ran.returncode == 0, ran.stderr
    printed = [line for line in ran.stdout.splitlines() if ":" in line]
    assert len(printed) == len(shown.splitlines())
    for line, expected in zip(printed, shown.splitlines(), strict=True):
        label, value = line.split(": ")
        expected_label, expected_value = expected.split(": ")
        assert label == expected_label
        if value[0].isdigit():
            assert float(value) == pytest.approx(float(expected_value), abs=0.02)
        else:
            assert value == expected_value
