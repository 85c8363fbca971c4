"""The jobs of `run.py --job=NAME`, one per file; files that begin with an underscore are parts that jobs share."""
