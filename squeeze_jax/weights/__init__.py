"""Foreign weight files, in and out."""
