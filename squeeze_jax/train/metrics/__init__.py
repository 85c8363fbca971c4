"""Evaluations, one a file: what is measured of each batch, and the scores that come of it."""
