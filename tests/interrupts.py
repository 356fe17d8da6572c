"""Ctrl-C at any line of some files."""

import sys


def interrupted_after(lines, places, run):
    """Runs, with a KeyboardInterrupt after so many lines of files whose path holds one of `places`; whether it ran that
    far."""
    previous, count = sys.gettrace(), 0

    def trace(frame, event, arg):
        nonlocal count
        if not any(place in frame.f_code.co_filename for place in places) or "__del__" in frame.f_code.co_name:
            return None
        if event == "line":
            count += 1
            if count == lines + 1:
                sys.settrace(previous)
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:  # not suppress, whose lines would be traced
        pass
    finally:
        sys.settrace(previous)
    return count > lines
