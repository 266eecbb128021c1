"""Router training: the auxiliary losses, a Trainer that adds them, the temperature schedule."""

from dare_hf.training.attaching import add_adapter
from dare_hf.training.auxiliary import auxiliary_loss
from dare_hf.training.processes import end_processes
from dare_hf.training.schedule import TemperatureSchedule, cosine_temperature
from dare_hf.training.trainer import DareTrainer, DareTrainerMixin

__all__ = [
    "DareTrainer",
    "DareTrainerMixin",
    "TemperatureSchedule",
    "add_adapter",
    "auxiliary_loss",
    "cosine_temperature",
    "end_processes",
]
