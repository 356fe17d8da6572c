"""How long a test waits for what must come.

A limit ends what hangs; it measures nothing, so it may be long. Beside other work a process takes many times as long as
alone: a limit of some multiple of the time alone fails for the load, and hides what it was for.
"""

PATIENCE = 1200.0  # seconds; below pytest's own limit (`--timeout`), so that the message is of what did not come

# of a process whose bits are compared: those of a sum depend on how many threads share it
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
