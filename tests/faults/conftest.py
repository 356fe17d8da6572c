"""One thread, as the processes have whose bits are compared; the figures of a run, at its end."""

import pytest

from faults import tally


@pytest.fixture(scope="module", autouse=True)
def one_thread_here(single_thread):
    """Also for what a module sets up once."""


def pytest_terminal_summary(terminalreporter):
    for line in tally.lines():
        terminalreporter.write_line(line)
