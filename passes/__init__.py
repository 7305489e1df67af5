"""Passes: one file each. `pipelines` puts them in order; `mlec.registry` finds them by name."""
