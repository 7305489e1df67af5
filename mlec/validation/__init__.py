"""Compiled models against their source: what it answers to inputs made to find differences, and how far they may be apart."""
