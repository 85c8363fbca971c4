"""Where examples come from: one source a file, the file's name is the key."""
