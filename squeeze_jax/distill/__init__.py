"""Distillation: losses that pull a student towards its teachers, one a file, and what they share."""
