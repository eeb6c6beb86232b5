"""Worst-of-N safety: how often, and how badly, repeated attempts break a model."""
