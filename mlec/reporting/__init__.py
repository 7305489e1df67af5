"""How an `OptimizationReport` is shown: text for a terminal, and a page for a browser."""
