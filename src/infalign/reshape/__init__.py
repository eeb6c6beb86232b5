"""Reshaping: the best policy within what one aligned model knows (M16), with no further training.

An aligned model's log-ratio ℓ = log q(y|x) − log p(y|x) scores responses. For a procedure and a KL budget,
`fit_reshaping` finds the increasing g(ℓ) for which the policy p g / Z wins most, or the best mixture of models.
"""

from infalign.reshape.data import ReshapingData
from infalign.reshape.fit import Goal, best_density, fit_reshaping, fit_reshaping_to
from infalign.reshape.pool import Pool
from infalign.reshape.predict import predict_reshaping
from infalign.reshape.reshaping import Predicted, Predictions, Reshaping
from infalign.reshape.stratified import ExactCounts, Split, best_split, stratified_win_rate

__all__ = [
    "ExactCounts",
    "Goal",
    "Pool",
    "Predicted",
    "Predictions",
    "Reshaping",
    "ReshapingData",
    "Split",
    "best_density",
    "best_split",
    "fit_reshaping",
    "fit_reshaping_to",
    "predict_reshaping",
    "stratified_win_rate",
]
