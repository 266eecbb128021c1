"""Calibration: linear routers and rates from a few unlabelled prompts, without gradients."""

from dare_hf.calibration.fit import Calibration, fit_router

__all__ = ["Calibration", "fit_router"]
