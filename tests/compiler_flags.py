"""XLA's flags for tests: most programs are compiled to run once, so the compiler does the least."""

# Without them a training step takes 2.6 times as long to compile. Fusions are compiled by LLVM alone, in one thread.
QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def xla_flags(devices: int) -> str:
    """Returns the value of XLA_FLAGS for a process with simulated CPU devices."""
    return f"{QUICK} --xla_force_host_platform_device_count={devices}"
