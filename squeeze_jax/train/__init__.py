"""Trains networks: the training step, the loop, optimizers, losses, metrics, checkpoints and logs."""
