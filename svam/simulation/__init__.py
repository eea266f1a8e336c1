"""Simulators and closed-loop rollouts; a simulator is imported only in its own file, lazily."""
