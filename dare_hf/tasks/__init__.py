"""Spatial tasks with pixels in and answers checked by replay."""
