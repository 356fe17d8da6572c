"""The figures of a run, at its end."""

from faults import tally


def pytest_terminal_summary(terminalreporter):
    for line in tally.lines():
        terminalreporter.write_line(line)
