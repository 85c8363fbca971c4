"""Methods of quantization-aware training, one method per file."""
