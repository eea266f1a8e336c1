"""Overlays of params.yaml for one purpose each: what they change, and what a run with them would cost."""
