"""Supernets and search, one method a file."""
