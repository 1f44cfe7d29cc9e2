"""Rates of training: tokens and model FLOP in a second, and the share of the devices' peak that this is."""

from functools import partial

from mixtral_jax.config import Config
from mixtral_jax.hardware import peak_flops
from mixtral_jax.kernels.matmul import contract
from mixtral_jax.metrics import flops_per_token, speed
from mixtral_jax.runtime import Runtime


class Rates:
    """What a step's work is, measured against the peak of a device."""

    def __init__(self, config: Config, runtime: Runtime):
        """Finds the peak, by timing a product where no table has it.

        Args:
            config: of the run.
            runtime: its devices and kernels.
        """
        self._config, self._devices = config, runtime.mesh.size
        self._peak = peak_flops(runtime.precision.compute, partial(contract, axes=1, backend=runtime.matmul))
        self._flops = flops_per_token(config.model, config.data.seq_len)
        self._warned = False  # that more than the peak was measured
        self.formula = (
            f"model FLOP/s / (devices * peak FLOP/s of one); {self._flops / 1e6:,.1f} MFLOP a token; "
            f"peak {self._peak.source}"
        )

    def measure(self, step: int, seconds: float) -> tuple[dict[str, float], str]:
        """Turns the seconds of `train.log_every` steps into rates.

        Args:
            step: the last of them.
            seconds: that they took.

        Returns:
            The rates by name, see `speed`, and why they cannot be, at length the first time that they cannot.
        """
        model, seq_len = self._config.model, self._config.data.seq_len
        tokens = self._config.train.log_every * self._config.train.batch_size * seq_len
        rates = speed(tokens, seconds, self._flops, self._devices, self._peak)
        if rates["mfu"] <= 1 or self._warned:
            return rates, ""
        self._warned = True
        attention = 1 - flops_per_token(model, 0) / self._flops
        return rates, (
            f"warning: an MFU of {rates['mfu']:.0%}, over {seconds:.3g} s up to step {step}, is more than a device can "
            f"do. Either less work was done than counted: {attention:.0%} of it is attention over whole rows of "
            f"{seq_len:,} tokens, and shorter documents need less; or the peak is higher than assumed: "
            f"{self._peak.source}"
        )
