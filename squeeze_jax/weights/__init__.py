"""Reads and writes weight files of other frameworks, and fits their arrays into our variables."""
