"""Between a compiled model and its file: written, loaded, compiled again where its own code does not run, bundled.

This file imports nothing, as loading a model pays for each import.
"""
