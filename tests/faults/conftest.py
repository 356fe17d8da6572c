"""One thread, as the processes have whose bits are compared; the figures of a run, at its end."""

import pytest

from benchmarks.machine import one_thread
from faults import tally


@pytest.fixture(scope="module", autouse=True)  # also for what a module sets up once
def a_single_thread():
    with one_thread():
        yield


def pytest_terminal_summary(terminalreporter):
    for line in tally.lines():
        terminalreporter.write_line(line)
