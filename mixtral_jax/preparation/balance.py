"""Weights that balance sources of different size."""

from collections.abc import Mapping

from mixtral_jax.config import UserError


def balanced_weights(tokens: Mapping[str, int], temperature: float) -> dict[str, float]:
    """Gives every source a share that grows with the power 1 / temperature of its size.

    Args:
        tokens: of each source.
        temperature: 1 keeps the natural shares; more lifts small sources; towards infinity all are equal.

    Returns:
        Shares of those that have tokens; they add up to 1.

    Raises:
        UserError: the temperature is not above 0.

    Source: arXiv 1911.02116, section 3.1, whose alpha is 1 / temperature.
    """
    if not temperature > 0:
        raise UserError(f"temperature is {temperature}: it must be greater than 0")
    largest = max(tokens.values(), default=0)
    powers = {name: (count / largest) ** (1 / temperature) for name, count in tokens.items() if count}
    total = sum(powers.values())
    return {name: power / total for name, power in powers.items()}
