"""Inference-time procedures as distortions of a policy's rank distribution.

A rank-based procedure (Best-of-N, Worst-of-N, any order statistic, ...) sees a policy only through the CDF F of its
calibrated rewards: the procedure's output has CDF H(F). `InferenceProcedure.distortion` is H and
`InferenceProcedure.density` its derivative h (table of section 3; M8 and M9 need nothing else).

A procedure of your own is a frozen dataclass with two methods and a label:

    @dataclass(frozen=True)
    class Softened(InferenceProcedure):
        '''Best-of-2 for half of the requests, one sample for the others.'''

        label: ClassVar[str] = "Softened"

        def distortion(self, q):
            return 0.5 * np.asarray(q) ** 2 + 0.5 * np.asarray(q)

        def density(self, q):
            return np.asarray(q) + 0.5
"""

from infalign.procedures.base import InferenceProcedure, check_is_procedure, whole_number
from infalign.procedures.check import check_procedure
from infalign.procedures.early_stopping import EarlyStopping
from infalign.procedures.fitted import FittedProcedure
from infalign.procedures.mixture import Mixture
from infalign.procedures.order_statistics import BestOfN, OrderStatistic, Standard, WorstOfN
from infalign.procedures.registry import procedure_from_dict, procedure_from_name

__all__ = [
    "BestOfN",
    "EarlyStopping",
    "FittedProcedure",
    "InferenceProcedure",
    "Mixture",
    "OrderStatistic",
    "Standard",
    "WorstOfN",
    "check_is_procedure",
    "check_procedure",
    "procedure_from_dict",
    "procedure_from_name",
    "whole_number",
]
