"""The published comparison: a plan of experiments, a loop that runs what is not finished, records, and their statistics."""
