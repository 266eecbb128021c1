"""Calibration: linear routers, rates and thresholds from a few prompts, without gradients."""

from dare_hf.calibration.fit import Calibration, fit_router
from dare_hf.calibration.thresholds import fit_thresholds

__all__ = ["Calibration", "fit_router", "fit_thresholds"]
