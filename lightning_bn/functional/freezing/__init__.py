"""Layers kept as they are, and the verification that they were."""
