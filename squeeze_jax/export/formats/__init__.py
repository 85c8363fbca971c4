"""Export formats, one per file. The file's name is the registry key in `config.export.formats`."""
