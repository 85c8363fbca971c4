"""What `run.py --job=NAME` does: one job a file."""
