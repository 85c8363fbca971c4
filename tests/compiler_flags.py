"""XLA's flags for processes that tests start."""

import os
import re


def xla_flags(devices: int) -> str:
    """Returns the tests' own XLA_FLAGS with another number of simulated CPU devices."""
    count = "--xla_force_host_platform_device_count="
    others = re.sub(rf"{count}\d+", "", os.environ["XLA_FLAGS"])
    return f"{others} {count}{devices}".strip()
