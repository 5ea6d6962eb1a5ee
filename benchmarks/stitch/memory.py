"""Peak memory of a process."""

import os
from pathlib import Path


def peak_mib() -> float:
    """Return the peak resident memory of this process in MiB.

    From the kernel's VmHWM: getrusage's figure is inherited from the parent through fork and exec.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"process {os.getpid()}: /proc/self/status has no VmHWM")
