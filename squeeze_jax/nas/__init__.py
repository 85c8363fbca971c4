"""Methods that train supernets and search in them, one method per file."""
