"""The model zoo: one architecture a file, the file's name is the key."""

from squeeze_jax.models._folder import class_names, load, options, save
from squeeze_jax.models._make import check, make

__all__ = ["check", "class_names", "load", "make", "options", "save"]
