"""The simulator, imported by the process from which tests fork others: each would spend seconds on that."""

from contextlib import suppress

from svam.errors import MachineError
from svam.simulation.rendering import choose_backend

with suppress(MachineError):
    choose_backend()  # before mujoco is imported, which reads the choice
    import metaworld.env_dict
    import metaworld.policies
    import mujoco

    __all__ = ["metaworld", "mujoco"]
