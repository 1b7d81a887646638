"""Functions that the scripts share: running a step in a process of its own, and printing numbers."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

MMCLI = Path(sys.executable).with_name("mmcli")


def spread(values, unit, digits=1):
    """Return the median, and the lowest and highest value in brackets, as text."""
    low, middle, high = (f"{each:.{digits}f}" for each in (min(values), statistics.median(values), max(values)))
    return f"{middle} {unit} [{low}, {high}]"


def step(script, *arguments):
    """Run a step of a script as a process; return (its seconds, the JSON that it printed last)."""
    command = [sys.executable, script, *map(str, arguments)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return time.perf_counter() - started, json.loads(done.stdout.splitlines()[-1])


def ended(child, command, started):
    """Wait for a process; return (seconds since ``started``, its peak memory in bytes)."""
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(map(str, command))} failed")
    return time.perf_counter() - started, usage.ru_maxrss * 1024
