"""Calibration: linear routers and rates from a few unlabelled prompts, without gradients."""
