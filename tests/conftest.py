"""Two workers share two cores: BLAS threads of one would spin against those of the other."""

from __future__ import annotations

import numpy as np  # noqa: F401  (what is limited must be loaded)
import scipy.linalg  # noqa: F401
from threadpoolctl import threadpool_limits

threadpool_limits(1, user_api="blas")
