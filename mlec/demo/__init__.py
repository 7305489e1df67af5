"""Real models on the data sets bundled with scikit-learn: trained, compiled, saved, loaded, verified against their source, and timed.

`recipes` lists the models, `estimators` and `networks` make them, `run_demo` does the work.
"""

from mlec.demo.recipes import RECIPES, Recipe, Trained, chosen
from mlec.demo.run import BATCHES, Measured, Outcome, run_demo

__all__ = ["BATCHES", "RECIPES", "Measured", "Outcome", "Recipe", "Trained", "chosen", "run_demo"]
