"""From a live model to files that run on devices, each run again and compared before it counts."""


def __getattr__(
    name,
):  # late, so that a process that runs a TFLite file need not load jax
    if name not in ("make", "Exported", "Disagreement"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from squeeze_jax.export import build

    return getattr(build, name)
