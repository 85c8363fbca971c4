"""What a function costs: parameters, MACs, memory, latency."""
