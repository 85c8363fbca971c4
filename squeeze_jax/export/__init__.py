"""From a live model to files that run on devices, each run again and compared before it counts."""
