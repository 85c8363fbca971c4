"""One exported format a file; the file's name is its registry key in `config.export.formats`."""
