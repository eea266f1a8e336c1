"""What the pipeline's parts cost, as ratios of pairs that one run measures in turn on the same work."""
