"""The model zoo: one architecture per file. The file's name is its key in `config.model.name`."""

from squeeze_jax.models._folder import class_names, load, options, save
from squeeze_jax.models._make import check, elastic, make

__all__ = ["check", "class_names", "elastic", "load", "make", "options", "save"]
