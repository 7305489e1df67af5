"""Backends: each turns an optimised graph into something that runs."""
