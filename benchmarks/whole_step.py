"""`python -m benchmarks.speed.whole_step` by a shorter name."""

import sys

from benchmarks import command
from benchmarks.speed.whole_step import main

if __name__ == "__main__":
    sys.exit(command.run(main))
