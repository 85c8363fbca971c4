"""The public names of `import squeeze_jax as sj`, imported when they are first asked for; docs/python.md shows their use.

Modules that stand here are public by the names that their docstrings or `__all__` give; everything else is private.
"""

# {name: "module", which has it under that name; "module:other name"; "module:." for the module itself}
PLACES = {
    "BatchNorm": "nn.norm",
    "Conv": "nn.conv",
    "Dense": "nn.dense",
    "UserError": "errors",
    "conv": "nn.conv",
    "cost": "cost:.",
    "distill": "distill:.",
    "export": "export:.",
    "forward": "train.forward:.",
    "from_nnx": "nn.adapt",
    "latency": "cost.latency:.",
    "load": "jobs._load",
    "losses": "train.losses:.",
    "lowering": "nn.conv",
    "metrics": "train.metrics:.",
    "models": "models:.",
    "optim": "train.optim:.",
    "step": "train.step:.",
}
