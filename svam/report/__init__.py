"""Results as tables, figures and films."""
