"""Variants compared at equal budgets, each run as one experiment of DVC."""
