"""What more FLOPs bring, as `grow.slope` counts it."""

from typing import Any

import numpy as np


def slope(flops_E: Any, losses_E: Any, flops: float) -> float | None:
    """Nats that the last doubling up to so many FLOPs brought, by losses at rising FLOPs (interpolated over log FLOPs).

    None where half of the FLOPs were not seen.
    """
    if flops / 2 < flops_E[0]:
        return None
    half, now = np.interp(np.log([flops / 2, flops]), np.log(flops_E), losses_E)
    return float(half - now)
