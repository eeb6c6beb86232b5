"""Pieces for trainers that are not ours."""
