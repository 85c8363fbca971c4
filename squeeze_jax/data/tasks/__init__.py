"""Kinds of examples, one a file; `make(...)` returns what `data.make` describes."""
