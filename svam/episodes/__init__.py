"""The episode store and everything that turns recorded data into it."""
