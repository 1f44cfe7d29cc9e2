"""Confidence intervals by the bootstrap: what the numbers would be on other documents of the same kind.

Source: Efron, Bootstrap Methods: Another Look at the Jackknife (1979); percentile intervals. Of seeds, which are few,
the mean's interval is Student's.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

REPLICATES = 1000
SEED = 0
COVERAGE = 0.95
MOST_UNITS = 10_000  # of more documents, neighbours are drawn together

Interval = tuple[float, float]


def bootstrap_sums(
    strata: Sequence[Float64[np.ndarray, "_ columns"]], replicates: int = REPLICATES, seed: int = SEED
) -> Float64[np.ndarray, "replicates columns"] | None:
    """Draws documents with replacement, as many as there are of each source, and adds up their numbers.

    Args:
        strata: for each source, the numbers of its documents.
        replicates: how often to draw.
        seed: of the draws.

    Returns:
        The sums of each draw over all sources; None where a source has fewer than two documents, of which nothing can
        be said.
    """
    if not strata or any(len(documents) < 2 for documents in strata):
        return None
    rng = np.random.default_rng(seed)
    sums = np.zeros((replicates, strata[0].shape[1]))
    for documents in strata:
        units = documents
        if len(units) > MOST_UNITS:
            starts = np.linspace(0, len(units), MOST_UNITS, endpoint=False).astype(np.int64)
            units = np.add.reduceat(units, starts, axis=0)
        equal = np.full(len(units), 1 / len(units))
        for draw in sums:
            draw += rng.multinomial(len(units), equal) @ units
    return sums


def interval(values: Float64[np.ndarray, " replicates"], coverage: float = COVERAGE) -> Interval:
    """Returns the percentiles between which the share `coverage` of the values lies."""
    low, high = np.quantile(values, [(1 - coverage) / 2, (1 + coverage) / 2])
    return float(low), float(high)


def mean_interval(values: Float64[np.ndarray, " seeds"], coverage: float = COVERAGE) -> Interval | None:
    """Returns Student's interval of the mean of normal values; None of fewer than two, of which nothing can be said."""
    if len(values) < 2:
        return None
    from scipy.special import stdtrit  # here, because no evaluation needs it

    far = stdtrit(len(values) - 1, (1 + coverage) / 2) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values) - far), float(np.mean(values) + far)
