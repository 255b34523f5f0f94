"""Builders of calibration and evaluation data for the pinned real models (one module per model)."""
