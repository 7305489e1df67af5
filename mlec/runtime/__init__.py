"""The thin runtime: runs compiled models with neither the compiler nor the training framework."""
