"""Gradient exchange between devices: `(key, grads, axis_name) → grads` inside `jax.shard_map`."""
