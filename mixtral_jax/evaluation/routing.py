"""Which experts a model chooses: what is counted over the tokens of a source, and the measures made of it.

Sources: arXiv 2401.04088, section 5 (figure 7 and table 5); arXiv 2409.02060, section 5, for `coactivation`,
`specialisation` and `vocabulary`.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float64, Integer

from mixtral_jax.config import EvalConfig, ModelConfig, UserError
from mixtral_jax.console import silent
from mixtral_jax.data.batch import HostBatch
from mixtral_jax.data.splits import Documents
from mixtral_jax.evaluation.scoring import Route, Routes
from mixtral_jax.evaluation.windows import evaluation_batches

PATH = np.uint16  # an expert's number in a path


class RoutingCounts:
    """Counts over tokens; padding is no token, and neighbours are of one document."""

    def __init__(self, model: ModelConfig):
        """Starts with no token; every array counts, in the order [layers, ...]."""
        layers, experts, k = model.num_layers, model.num_experts, model.num_experts_per_tok
        self.tokens = self.pairs = 0  # pairs: of neighbouring tokens
        self.assignments = np.zeros((k, layers, experts), np.int64)  # by choice, best first
        self.same_first = np.zeros(layers, np.int64)  # pairs whose first choice is the same
        self.overlap = np.zeros(layers, np.int64)  # pairs that have any of their k experts in common
        self.together = np.zeros((layers, experts, experts), np.int64)  # tokens that chose both
        self.pieces = np.zeros((layers, model.vocab_size, experts), np.int64)  # first choices by the token's id
        self.paths: Counter[bytes] = Counter()  # first choices from the first layer to the last, as `PATH`
        self.entropy = np.zeros(layers)  # of the routers' probabilities, sum over tokens, nats
        self.batch_loads: list[np.ndarray] = []  # [layers, experts], share of the assignments of each batch

    def count(self, routes: Routes, batch: HostBatch) -> None:
        """Adds the tokens of a batch; neighbours with equal `segment_ids` are of one document, and 0 is padding."""
        valid, experts = batch.segment_ids > 0, routes.experts
        chosen, tokens = experts[valid].astype(np.int64), batch.tokens[valid].astype(np.int64)
        hot = chosen[..., None] == np.arange(self.together.shape[-1])  # tokens layers k experts
        assignments = hot.sum(axis=0).swapaxes(0, 1)
        either = hot.any(axis=2).transpose(1, 2, 0).astype(np.float64)  # layers experts tokens
        layers, vocab, num_experts = self.pieces.shape
        first = chosen[..., 0]
        places = (np.arange(layers) * vocab + tokens[:, None]) * num_experts + first
        neighbours = valid[:, 1:] & (batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1])
        left, right = experts[:, :-1][neighbours], experts[:, 1:][neighbours]
        self.tokens += len(tokens)
        self.pairs += int(neighbours.sum())
        self.assignments += assignments
        self.same_first += (left[..., 0] == right[..., 0]).sum(axis=0)
        self.overlap += (left[..., :, None] == right[..., None, :]).any(axis=(-1, -2)).sum(axis=0)
        self.together += (either @ either.swapaxes(1, 2)).astype(np.int64)
        self.pieces += np.bincount(places.ravel(), minlength=self.pieces.size).reshape(self.pieces.shape)
        paths, times = np.unique(first.astype(PATH), axis=0, return_counts=True)
        self.paths.update({path.tobytes(): int(count) for path, count in zip(paths, times, strict=True)})
        self.entropy += routes.entropy[valid].sum(axis=0, dtype=np.float64)
        self.batch_loads.append(assignments.sum(axis=0) / max(1, len(tokens) * len(assignments)))

    def add(self, other: "RoutingCounts") -> None:
        """Adds the tokens of another source."""
        for name in vars(self):
            mine, theirs = getattr(self, name), getattr(other, name)
            setattr(self, name, mine + theirs)

    def shares(self, choice: int | None = None) -> Float64[np.ndarray, "layers experts"]:
        """Each expert's share of the assignments: of one choice, 0 being the first, or of all."""
        counts = self.assignments.sum(axis=0) if choice is None else self.assignments[choice]
        return counts / counts.sum(axis=-1, keepdims=True)

    def first_repeats(self) -> Float64[np.ndarray, " layers"]:
        """Share of the pairs whose first choice is the same."""
        return self.same_first / max(1, self.pairs)

    def any_repeats(self) -> Float64[np.ndarray, " layers"]:
        """Share of the pairs that have an expert in common."""
        return self.overlap / max(1, self.pairs)

    def batch_violations(self) -> Float64[np.ndarray, "batches layers"]:
        """How far the busiest expert of each batch is above the uniform load: 0 at balance, E - 1 at worst."""
        loads = np.stack(self.batch_loads)
        return loads.max(axis=-1) * loads.shape[-1] - 1

    def router_entropy(self) -> Float64[np.ndarray, " layers"]:
        """Mean entropy of the routers' probabilities in nats; ln E where they know nothing."""
        return self.entropy / self.tokens

    def coactivation(self) -> Float64[np.ndarray, "layers experts experts"]:
        """Of the tokens that chose one expert, the share that chose the other, N_ij / N_i; 0 where N_i is 0."""
        chosen = np.diagonal(self.together, axis1=1, axis2=2)
        return self.together / np.maximum(chosen, 1)[..., None]

    def specialisation(self) -> Float64[np.ndarray, "layers experts"]:
        """Share of the tokens that have the expert among their k; of one source, its domain specialisation."""
        return self.assignments.sum(axis=0) / self.tokens

    def vocabulary(self) -> Float64[np.ndarray, "layers vocab experts"]:
        """Of the tokens of an id, the share whose first choice is the expert; 0 of an id that did not occur."""
        return self.pieces / np.maximum(self.pieces.sum(axis=-1, keepdims=True), 1)

    def path_table(self) -> tuple[Integer[np.ndarray, "paths layers"], Integer[np.ndarray, " paths"]]:
        """The paths, most frequent first, and how many tokens took each."""
        found = self.paths.most_common()
        layers = len(self.same_first)
        steps = np.frombuffer(b"".join(path for path, _ in found), PATH).reshape(-1, layers).astype(np.int64)
        return steps, np.array([count for _, count in found])

    def effective_paths(self) -> float:
        """Paths that would be as hard to guess if all were equally frequent: exp of the entropy of their shares."""
        shares = np.array(list(self.paths.values())) / self.tokens
        return math.exp(-(shares * np.log(shares)).sum())


def own_shares(counts: Sequence[RoutingCounts]) -> Float64[np.ndarray, "sources layers experts"]:
    """Of what an expert gets, each source counted as if all were as long, the share from each; 0 of an idle expert."""
    found = np.stack([count.specialisation() for count in counts])
    total = found.sum(axis=0)
    return np.divide(found, total, out=np.zeros_like(found), where=total > 0)


def all_sources(counts: Sequence[RoutingCounts], model: ModelConfig) -> RoutingCounts:
    """Adds up sources."""
    total = RoutingCounts(model)
    for count in counts:
        total.add(count)
    return total


def random_repeats(num_experts: int, k: int) -> tuple[float, float]:
    """Computes what `first_repeats` and `any_repeats` would be if experts were drawn at random.

    1 / E, and 1 - C(E - k, k) / C(E, k): 12.5% and 46.4% for 2 of 8.
    """
    return 1 / num_experts, 1 - math.comb(num_experts - k, k) / math.comb(num_experts, k)


def measure_routing(
    route: Route,
    documents: Documents,
    eval: EvalConfig,
    seq_len: int,
    model: ModelConfig,
    on_batch: Callable[[str], None] = silent,
) -> RoutingCounts:
    """Counts the routes of one source, cut as for perplexity.

    Args:
        route: see `Route`.
        documents: the text.
        eval: how to cut it and how many tokens to take.
        seq_len: tokens of a training row.
        model: of which it is.
        on_batch: called after each batch with the source's name.

    Raises:
        UserError: the source has no text.
    """
    counts = RoutingCounts(model)
    for batch in evaluation_batches(documents, eval, seq_len):
        counts.count(route(batch), batch)
        on_batch(documents.name)
    if not counts.tokens:
        raise UserError(
            f"source '{documents.name}' has no held-out text: raise data.holdout or give the source more documents"
        )
    return counts
