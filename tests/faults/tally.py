"""What the fault tests counted, for the summary at the end of a run."""

from __future__ import annotations

from collections import Counter

COUNTS: Counter[str] = Counter()


def add(**counts: int) -> None:
    COUNTS.update(counts)


def lines() -> list[str]:
    """One line for each bar: what was done, and how often it went wrong."""
    n = COUNTS
    bars = [
        ("faults", f"faults injected {n['faults']:,}, states wrong {n['wrong']:,}"),
        ("kills", f"SIGKILL in a step {n['kills']:,}, without a valid checkpoint {n['kills_lost']:,}"),
        ("poisoned", f"non-finite gradients {n['poisoned']:,}, weights wrong {n['poisoned_wrong']:,}"),
        ("signals", f"checkpoints taken in signal handlers {n['signals']:,}, polluted {n['polluted']:,}"),
        ("stops", f"signals to a training run {n['stops']:,}, checkpoints lost {n['stops_lost']:,}"),
        ("save_kills", f"SIGKILL while saving {n['save_kills']:,}, without a valid checkpoint {n['save_lost']:,}"),
        ("command_kills", f"SIGKILL in a command {n['command_kills']:,}, results lost {n['command_lost']:,}"),
        ("full_disks", f"full disks {n['full_disks']:,}, files lost {n['full_lost']:,}"),
        ("resumes", f"resumes {n['resumes']:,}, bit for bit {n['resumes_equal']:,}"),
    ]
    return [text for key, text in bars if n[key]]
