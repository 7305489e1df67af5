"""Frontends: one for each framework; found through `mlec.registry`."""
