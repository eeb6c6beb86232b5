"""Inference-time procedures on a model: draw candidates, score them, return the one that the procedure picks."""
