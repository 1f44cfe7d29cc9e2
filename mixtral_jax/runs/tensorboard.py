"""TensorBoard event files, without TensorFlow."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from mixtral_jax.config import UserError
from mixtral_jax.runs.metrics_file import Vectors

# Group of charts -> name of the metric -> what it is. A name that has a slash, such as `epoch/english`, brings its own
# group; any other goes to `other`.
CHARTS: dict[str, dict[str, str]] = {
    "loss": {
        "loss": "cross-entropy + coefficients * router losses: what training minimises",
        "cross_entropy": "nats per predicted token",
        "load_balance_loss": "E * sum of f_e * P_e, mean over layers: 1 at perfect balance; without its coefficient",
        "router_z_loss": "mean of logsumexp(router logits) squared; without its coefficient",
    },
    "optimizer": {
        "learning_rate": "of this step",
        "grad_norm": "of the global gradient, before clipping",
        "skipped_updates": "updates left out so far because the loss or a gradient was not finite",
    },
    "speed": {
        "tokens_per_second": "over all devices",
        "model_flops_per_second": "tokens/s * FLOP per token: 6 per active weight + the causal half of attention",
        "mfu": "model FLOP/s / (devices * peak FLOP/s of one)",
        "goodput": "steps that count / wall time of all starts so far",
    },
    "memory": {
        "memory_gib": "highest resident size of the process so far",
        "memory_resident_gib": "resident size of the process now",
        "device_memory_gib": "of the fullest device, now",
        "device_memory_peak_gib": "of the fullest device, highest so far",
    },
    "expert_load_max": {
        "layer_NN": "share of the layer's assignments * number of experts, of the busiest expert: 1 is uniform",
    },
    "expert_load_min": {
        "layer_NN": "the same of the expert that got least",
    },
    "router": {
        "router_entropy": "nats, mean over tokens and layers; log(experts) is undecided",
        "max_violation": "load of the busiest expert / uniform load - 1, highest over layers",
        "dropped_share": "assignments without room in an expert's buffer; 0 with dispatch=dropless",
        "dead_experts": "experts, over all layers, that got no token",
    },
}
_GROUPS = {name: group for group, charts in CHARTS.items() for name in charts}
_CELL = 16  # pixels of an expert in the picture


class TensorBoard:
    """Writes scalars and the experts' load as event files."""

    def __init__(self, directory: Path, resume_step: int, descriptions: Mapping[str, str]):
        """Opens a new event file.

        Args:
            directory: where the event files lie; made if missing.
            resume_step: step of the checkpoint from which the run goes on; TensorBoard hides events of later steps
                that an earlier process wrote. 0: hides all earlier ones.
            descriptions: what to add about a metric of this run to the text of `CHARTS`.
        """
        first_step = resume_step + 1 if resume_step else 0
        # The suffix keeps two processes of one second apart, in the order in which TensorBoard reads.
        self._writer = SummaryWriter(str(directory), filename_suffix=f".from_step_{first_step:09d}")
        # In the thread of the loop: the writer's own ends at a full disk, or when the clock is set back by weeks, and
        # the run would wait for it for ever.
        events = self._writer.file_writer.event_writer
        events.add_event = events._ev_writer.write_event
        # What an earlier start wrote from this step on is void.
        self._writer.file_writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), first_step)
        self._writer.add_text("about", _legend(descriptions), first_step)

    def write(self, step: int, scalars: Mapping[str, int | float], vectors: Vectors) -> None:
        """Writes one step.

        Args:
            step: the optimizer step.
            scalars: values by name; one that is not finite is left out of its chart.
            vectors: [layers, experts] shares of the assignments by name: a picture, and for each layer the highest
                and the lowest load relative to the uniform one.

        Raises:
            UserError: the disk is full or the like.
        """
        with self._explained():
            for name, value in scalars.items():
                if math.isfinite(value):
                    tag = name if "/" in name else f"{_GROUPS.get(name, 'other')}/{name}"
                    self._writer.add_scalar(tag, value, step)
            for name, load in vectors.items():
                self._writer.add_image(name, load_picture(load), step, dataformats="HWC")
                for layer, shares in enumerate(load * load.shape[-1]):
                    for end, share in (("max", shares.max()), ("min", shares.min())):
                        if math.isfinite(share):
                            self._writer.add_scalar(f"{name}_{end}/layer_{layer:02d}", share, step)
            self._writer.flush()

    def close(self) -> None:
        """Writes what is left and closes the file; `UserError` where that cannot be."""
        with self._explained():
            self._writer.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write {self._writer.logdir}: {error.strerror}; fix that and start the run again"
            ) from None


def _legend(descriptions: Mapping[str, str]) -> str:
    """Explains the charts in a table, which TensorBoard shows among its texts."""
    rows = [f"| {group}/{name} | {text}{'; ' + descriptions[name] if name in descriptions else ''} |"
            for group, charts in CHARTS.items() for name, text in charts.items()]  # fmt: skip
    return "\n".join(["| chart | what it shows |", "|---|---|", *rows])


def load_picture(load: Float[np.ndarray, "layers experts"]) -> UInt8[np.ndarray, "height width 3"]:
    """Paints the experts' load: a row of cells for each layer, a column for each expert.

    Args:
        load: share of a layer's assignments that each expert got; uniform is 1 / experts.

    Returns:
        RGB pixels: white at the uniform load, red at four times as much or more, blue at a quarter or less, black for
        an expert that got nothing.
    """
    relative = load * load.shape[-1]
    doublings = np.log2(np.where(relative > 0, relative, 1.0))
    stops = ((-2, (33, 102, 172)), (0, (255, 255, 255)), (2, (178, 24, 43)))
    at, colours = [stop for stop, _ in stops], np.array([colour for _, colour in stops])
    pixels = np.stack([np.interp(doublings, at, colours[:, channel]) for channel in range(3)], axis=-1)
    pixels[relative <= 0] = 0
    return pixels.round().astype(np.uint8).repeat(_CELL, axis=0).repeat(_CELL, axis=1)
