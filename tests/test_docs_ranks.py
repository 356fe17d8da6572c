"""The pages on several ranks: their examples, word for word, started by torchrun."""

import os
import subprocess
import sys

import examples
import pytest
from limits import PATIENCE
from test_docs import DOCS, TRAINED


@pytest.mark.parametrize("page", ["ddp", "fsdp2"])
def test_the_example_prints_what_the_page_shows(page, tmp_path):
    ((code, shown),) = examples.blocks(DOCS / "integrations" / f"{page}.md")
    script = tmp_path / "train.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(examples.ROOT)}  # this package, whatever is installed
    ran = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment)
    assert ran.returncode == 0, ran.stderr
    lines = [line for line in ran.stdout.splitlines() if "peer ranks" not in line]  # torch 2.8's Gloo, of each rank
    printed = "\n".join(lines)
    examples.check([(printed, shown)], spread=TRAINED)
