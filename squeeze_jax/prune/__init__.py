"""Methods that prune weights and filters, one method per file."""
