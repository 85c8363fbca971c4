"""Pruning and shrinking, one method a file."""
