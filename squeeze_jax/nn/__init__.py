"""Building blocks of networks, channels last."""
