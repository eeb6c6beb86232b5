"""Solvers of KL-regularised RL with a calibrated and transformed reward."""
