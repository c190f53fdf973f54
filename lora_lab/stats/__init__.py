"""Statistics of few seeds and many examples: intervals, tests, power, fitted curves.

With 3 to 5 seeds only Student's t says anything: a sign-flip test of 5 pairs cannot fall below
p = 1/16, and a bootstrap of 5 values covers its mean about 83 times in 100. So seeds get t
intervals and t tests on paired differences, or one regression with seeds as blocks; bootstrap and
permutation are refused below 20 units (test examples, layers).
"""

from lora_lab.stats.compare import (
    Comparison,
    benjamini_hochberg,
    equivalence,
    holm,
    paired,
    permutation,
)
from lora_lab.stats.fits import (
    Fit,
    Slope,
    blocked_slope,
    fit_curve,
    slope,
)
from lora_lab.stats.intervals import Interval, bootstrap, rate_interval, t_factor, t_interval
from lora_lab.stats.power import power, units_needed

__all__ = [
    "Comparison",
    "Fit",
    "Interval",
    "Slope",
    "benjamini_hochberg",
    "blocked_slope",
    "bootstrap",
    "equivalence",
    "fit_curve",
    "holm",
    "paired",
    "permutation",
    "power",
    "rate_interval",
    "slope",
    "t_factor",
    "t_interval",
    "units_needed",
]
