"""The reference interpreter as a backend."""
