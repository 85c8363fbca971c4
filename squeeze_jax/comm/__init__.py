"""Methods that average gradients over devices: `(key, grads, axis_names) → grads`, called inside `jax.shard_map`."""
