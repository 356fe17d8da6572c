"""`python -m benchmarks.speed.whole_step` by a shorter name."""

import sys

from benchmarks.speed.whole_step import main
from sam_optim.core.errors import run

if __name__ == "__main__":
    sys.exit(run(main))
