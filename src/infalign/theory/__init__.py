"""What a procedure and a KL budget promise, before any model is trained: exact, in the reference's quantile space."""

# Without the function `plan`, whose name here is its module's: it is `infalign.plan`.
from infalign.theory.finite_k import FiniteKPrediction, finite_k_prediction, rank_conditional_tilt, tilt_at_ranks
from infalign.theory.optimal import OptimalTransform, optimal_transform
from infalign.theory.plan import Frontier, Option, Plan, frontier, limit, optimum_at_kl
from infalign.theory.tilt import TiltedPolicy

__all__ = [
    "FiniteKPrediction",
    "Frontier",
    "OptimalTransform",
    "Option",
    "Plan",
    "TiltedPolicy",
    "finite_k_prediction",
    "frontier",
    "limit",
    "optimal_transform",
    "optimum_at_kl",
    "rank_conditional_tilt",
    "tilt_at_ranks",
]
