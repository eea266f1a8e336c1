"""What was learnt, looked at: gaps, probes and attention on held-out windows."""
