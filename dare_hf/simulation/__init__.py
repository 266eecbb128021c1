"""The training forward: all hops of a run simulated in one teacher-forced forward."""

from dare_hf.simulation.damping import damped
from dare_hf.simulation.layer import simulated_forward
from dare_hf.simulation.opening import open_simulation
from dare_hf.simulation.setup import Setup
from dare_hf.simulation.simulation import Simulation, SimulationRecord

__all__ = [
    "Setup",
    "Simulation",
    "SimulationRecord",
    "damped",
    "open_simulation",
    "simulated_forward",
]
