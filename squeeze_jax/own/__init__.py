"""Where Python files of the user's own are imported to, also in worker processes; see `registry.load`."""

from squeeze_jax import registry  # noqa: F401, it finds them
