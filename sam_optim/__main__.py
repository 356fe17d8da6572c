"""`python -m sam_optim measure ...`, also under torchrun: the command `sam-optim`."""

import sys

from sam_optim.cli import main

if __name__ == "__main__":
    sys.exit(main())
