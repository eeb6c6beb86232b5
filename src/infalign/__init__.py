"""Align language models for the way they are used: Best-of-N, Worst-of-N and any other inference-time procedure."""
