"""The configuration: frozen dataclasses, every key documented where it is declared."""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

FloatName = Literal["float32", "bfloat16"]
TRAINED = ("train", "train-v3")  # what `tokenizer` may be where it is trained on the text first


class UserError(Exception):
    """A mistake that the user can fix: one sentence that names the key or file and the remedy (exit code 2)."""

    def __str__(self) -> str:
        """The sentence in one line: names and values in it are of others, what cannot be printed is spelled out."""
        text = super().__str__()
        return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class NoCheckpointError(UserError):
    """There is no checkpoint where one was named, or none that is whole."""

    def __init__(self, where: object, *, begun: bool = False):
        """Names the place; `begun`: something there is being written, or was when its writer ended."""
        if begun:
            super().__init__(
                f"no checkpoint in {where} is whole: wait until the run or copy that writes it has ended, or name "
                "another one"
            )
        else:
            super().__init__(
                f"there is no checkpoint in {where}: name a run directory or one of its checkpoints; released weights "
                "become one by python -m mixtral_jax import"
            )


@dataclass(frozen=True)
class RopeScalingConfig:
    """Slower rotary frequencies, for longer texts than the model was first trained with."""

    # `linear` divides all frequencies by the factor; `yarn` the slow ones (arXiv 2309.00071), as transformers does.
    kind: Literal["none", "linear", "yarn"] = "none"
    factor: float = 1.0  # new context / original context
    original_context: int = 0  # tokens of the first training; kind=yarn only
    attention_factor: float | None = None  # of cosine and sine; null: 0.1 ln(factor) + 1; kind=yarn only
    beta_fast: float = 32.0  # frequencies with more turns in the original context stay; kind=yarn only
    beta_slow: float = 1.0  # frequencies with fewer turns in the original context are divided; kind=yarn only


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. What a checkpoint decides has no default."""

    d_model: int = MISSING  # width of the residual stream
    d_ff: int = MISSING  # inner width of one SwiGLU expert
    num_layers: int = MISSING  # decoder layers
    num_heads: int = MISSING  # query heads
    num_kv_heads: int = MISSING  # key/value heads; divides num_heads
    head_dim: int = MISSING  # num_heads * head_dim is d_model
    vocab_size: int = MISSING  # rows of the embedding; at least the tokenizer's pieces
    num_experts: int = MISSING  # experts of every layer
    num_experts_per_tok: int = MISSING  # top-k of the router
    rope_theta: float = MISSING  # base of the rotary embedding
    norm_eps: float = MISSING  # of RMSNorm
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    # How tokens reach experts: `dropless` computes every assignment; `capacity` drops those beyond a full buffer.
    dispatch: Literal["dropless", "capacity"] = "dropless"
    # Rows of an expert's buffer per sequence, as a multiple of the balanced load; dispatch=capacity only.
    capacity_factor: float = 1.25
    # Rows that a device has room for from its expert group, as a multiple of the balanced load, an equal share for each
    # sender; what goes beyond is dropped and counted. 0: the worst case, nothing is dropped. dispatch=dropless only.
    buffer_factor: float = 0.0
    # Of all matrices; those that write to the residual stream get init_std / sqrt(2 * num_layers), and routers
    # init_std * min(1, 256 / d_model), so that wide ones do not choose before anything is learnt.
    init_std: float = 0.02
    attend_across_documents: bool = False  # let attention in packed rows cross document boundaries


@dataclass(frozen=True)
class SourceConfig:
    """One source of text: exactly one of `path`, `hub`, `builtin` and `prepared`."""

    name: str = MISSING  # appears in logs and evaluation tables
    # File, directory or glob: txt, md, jsonl, json.gz, jsonl.zst, parquet. A name that exists is no glob; links are
    # followed and every file counts once; hidden and empty files of a directory are left out.
    path: str | None = None
    hub: str | None = None  # name on the Hugging Face hub, "name" or "name:config:split", streamed
    # `python`: what every installation carries, the documentation and source of the standard library.
    builtin: Literal["python"] | None = None
    prepared: str | None = None  # directory of tokens that `python -m mixtral_jax prepare` wrote
    text_field: str = "text"  # field of a record that holds the text
    # Share of the training tokens, relative to the other sources; padding is none. A text shorter than a row fills it.
    weight: float = 1.0
    # Of records of chats (objective.name=sft: messages, sharegpt, alpaca, prompt_completion) or of preferences
    # (objective.name=preference: pairs, labels); `auto` goes by the keys of the first record and says what it found.
    format: str = "auto"
    too_long: Literal["drop", "cut"] = "drop"  # what becomes of a record of these that is longer than data.seq_len


@dataclass(frozen=True)
class DataConfig:
    """Text, tokenizer and packing."""

    sources: list[SourceConfig] = field(default_factory=list)  # what to read, see data.sources[]
    # A sentencepiece file; `mixtral` (v1, 32000) or `mixtral-v3` (32768), bundled with mistral-common; `train`: a new
    # sentencepiece model of model.vocab_size pieces trained on the sources; `train-v3`: one with Mixtral's control
    # tokens for chats and tools; or `checkpoint`: the one of init_from.
    tokenizer: str = "mixtral"
    seq_len: int = MISSING  # tokens of a row that the model sees
    # Share of each source's tokens kept from training for evaluation, by document; a checkpoint remembers which.
    holdout: float = 0.01
    # Token caches and compiled programs; empty: $XDG_CACHE_HOME/mixtral_jax or ~/.cache/mixtral_jax.
    cache_dir: str = ""


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = MISSING  # optimizer steps of the whole run; the schedule ends here
    batch_size: int = MISSING  # sequences of a step, over all devices
    microbatches: int = 1  # parts of the batch whose gradients are accumulated before one update
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass recomputes: little, all but products, all
    log_every: int = 10  # steps between lines of metrics.jsonl
    eval_every: int = 0  # steps; 0: only at the end
    eval_batches: int = 8  # held-out batches per source and evaluation during training; the last one takes all
    # The same bits from every run on the same device: on GPUs by slower operations, elsewhere it always is so.
    deterministic: bool = False
    max_nonfinite_steps: int = 10  # skipped updates in a row before the run stops
    # Times that the run goes back to its newest checkpoint because of a spike of the loss, and leaves the batches from
    # there to the spike out; then it stops. 0: never, and spikes are not looked for.
    max_rollbacks: int = 0
    stop_at_step: int | None = None  # end this invocation early, with a checkpoint; the schedule still aims at `steps`


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float = 3e-4  # peak
    final_learning_rate_ratio: float = 0.1  # learning rate at the last step / peak
    # Linear, from learning_rate / warmup_steps; null: 100, or a tenth of train.steps where that is less.
    warmup_steps: int | None = None
    # After the warm-up: `cosine` falls to the end, `wsd` stays and falls linearly in decay_steps, `constant` stays.
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    decay_steps: int = 0  # linear decay at the end of schedule=wsd; 0: a fifth of train.steps, or what warm-up leaves
    beta1: float = 0.9  # decay of Adam's first moment
    beta2: float = 0.95  # decay of Adam's second moment
    eps: float = 1e-8  # in Adam's denominator
    # Routers learn at learning_rate * min(1, router_width / model.d_model): a step of Adam moves a logit by up to the
    # rate times a sum over d_model activations. 0: at the rate of all.
    router_width: int = 512
    weight_decay: float = 0.1  # matrices only, never norm scales
    clip_norm: float = 1.0  # of the global gradient; 0: no clipping


@dataclass(frozen=True)
class LossesConfig:
    """Coefficients of the router's losses; see `mixtral_jax/training/losses.py` for the formulas."""

    # Times E * sum_e f_e * P_e, which is 1 at perfect balance. Hugging Face's router_aux_loss_coef pools the layers and
    # is top-k at balance: it equals this coefficient / num_experts_per_tok.
    load_balance: float = 0.02
    router_z: float = 1e-3  # times mean(logsumexp(router_logits)^2)
    # Over what f is counted when microbatches > 1. `batch` is exact and costs one more forward pass; `microbatch` is
    # cheaper and asks each part to balance on its own.
    balance_over: Literal["batch", "microbatch"] = "batch"
    selection_bias_rate: float = 0.0  # step of the bias of auxiliary-loss-free balancing (arXiv 2408.15664); 0: off


@dataclass(frozen=True)
class LossConfig:
    """One term of the loss on answers; docs/assistant.md has the formulas."""

    # Of pairs: sigmoid (DPO), ipo, hinge, sigmoid_norm, simpo, orpo; of labels or pairs: kto; of good answers: sft.
    name: Literal["sigmoid", "ipo", "hinge", "sigmoid_norm", "simpo", "orpo", "kto", "sft"] = MISSING
    weight: float = 1.0  # factor of the term
    beta: float = 0.1  # how fast the loss rises as the model leaves the reference; of simpo and orpo, of the log-odds
    label_smoothing: float = 0.0  # share of the pairs that may be the wrong way round; name=sigmoid only
    margin: float = 0.5  # by which the chosen answer is to win; name=simpo only
    good_weight: float = 1.0  # of answers that were found good; name=kto only
    bad_weight: float = 1.0  # of the others; name=kto only


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is learnt; the losses of the router stay beside it."""

    # `pretrain`: every token of texts; `sft`: the answers of chats; `preference`: which answer is better.
    name: Literal["pretrain", "sft", "preference"] = "pretrain"
    losses: list[LossConfig] = field(default_factory=list)  # their sum, see objective.losses[]; name=preference only
    # A checkpoint or run whose log-probabilities the losses compare with; empty: init_from. name=preference only.
    reference: str = ""
    # Rank of LoRA's adapters on the matrices of attention and experts, which alone are trained then, above the
    # parameters of init_from; 0: all parameters are trained.
    lora_rank: int = 0
    lora_alpha: float = 16.0  # the matrices are W + lora_alpha / lora_rank * A B
    lora_router: bool = False  # adapt the routers too, which stay as they are otherwise

    @property
    def needs_mismatched(self) -> bool:
        """Whether a loss asks what prompts say of the answers to others."""
        return self.name == "preference" and any(loss.name == "kto" for loss in self.losses)


@dataclass(frozen=True)
class DcnConfig:
    """Slices (TPU) or nodes (GPU) along each axis of the mesh; the product is their number.

    0 is automatic: `data` takes as many as divide it, then `fsdp`; `expert`, `context` and `tensor` stay inside one.
    """

    data: int = 0  # part of mesh.data
    fsdp: int = 0  # part of mesh.fsdp
    expert: int = 0  # part of mesh.expert
    context: int = 0  # part of mesh.context
    tensor: int = 0  # part of mesh.tensor


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; the product is the device count. One axis may be -1 and takes the rest."""

    data: int = 1  # batch; parameters are replicated
    fsdp: int = -1  # batch; parameters, gradients and optimizer state are split
    expert: int = 1  # batch outside of the experts, experts inside
    context: int = 1  # sequence
    tensor: int = 1  # heads, d_ff and vocabulary
    dcn: DcnConfig = field(default_factory=DcnConfig)


@dataclass(frozen=True)
class DistributedConfig:
    """Processes that train as one; SLURM, Open MPI, Kubernetes and TPU pods say by themselves which they are."""

    coordinator: str = ""  # host:port on which process 0 listens; empty: as the launcher says
    num_processes: int = 0  # 0: as the launcher says; 1: alone, whatever it says
    process_id: int = -1  # of this process, from 0 on; -1: as the launcher says
    heartbeat_timeout: int = 60  # seconds without a sign of life after which a process counts as lost and all end
    step_timeout: int = 1800  # seconds without a finished step, the first with its compilation, after which all end


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every: int = 500  # steps; the last step is always saved
    keep: int = 3  # newest ones kept
    keep_every: int = 0  # steps; multiples of this are kept for ever; 0: none


@dataclass(frozen=True)
class PrecisionConfig:
    """Names of the float types; `mixtral_jax/precision.py` is the one table made of it."""

    params: FloatName = "float32"  # master weights
    compute: FloatName = "float32"  # matrix products and activations
    gradients: FloatName = "float32"  # accumulation over microbatches
    optimizer: FloatName = "float32"  # first moment of AdamW; the second stays float32
    # Factors of the experts' products, forward and backward: `compute`, or rounded to 8 bits with scales by row and
    # column (fp8: e4m3). Parameters and checkpoints stay as they are.
    experts: Literal["compute", "int8", "fp8"] = "compute"


@dataclass(frozen=True)
class KernelsConfig:
    """Backends; `auto` chooses by platform, and what was chosen is printed at start.

    The values are those of `kernels/backends.py`, which says where each runs.
    """

    matmul: str = "auto"  # dense products, the loss and, beside `xla`, the update of the parameters
    attention: str = "auto"
    experts: str = "auto"  # products over rows sorted by expert
    exchange: str = "auto"  # how rows reach the experts of other devices, the same numbers from each
    block_size: int = 0  # rows of a block of kernels.experts=grouped_blocks; 0: several sizes, from the expected load
    loss_chunk: int = 0  # tokens of a device whose logits exist at once; 0: 4096 on a GPU, 512 elsewhere
    admission: bool = True  # on an accelerator, compare kernels with float32 references before training


@dataclass(frozen=True)
class EvalConfig:
    """How text is cut and how much of it is measured."""

    # packed: rows as in training; document: every document from its start, cut at `context`;
    # strided: every token is predicted once, with at least context - stride tokens before it.
    mode: Literal["packed", "document", "strided"] = "packed"
    context: int = 0  # tokens that the model sees at once, at most; 0: data.seq_len
    stride: int = 0  # tokens; mode=strided only; 0: half of the context
    batch_size: int = 8  # rows
    max_tokens: int = 0  # per source; 0: all


@dataclass(frozen=True)
class Config:
    """A whole run."""

    run_dir: str = ""  # empty: runs/<name of the config file>
    # A checkpoint, run or import whose parameters start a new run; if `model` is left out, it decides model and
    # tokenizer too. If it has one expert and `model` more, each is a copy of that one, and routers are new.
    init_from: str = ""
    seed: int = 0  # of parameters, split and shuffle
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    losses: LossesConfig = field(default_factory=LossesConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


# A run may be resumed with other values of these: they change where and how often, not what is learnt.
RESUMABLE_KEYS = ("run_dir", "init_from", "mesh", "distributed", "checkpoint", "kernels", "eval", "data.cache_dir",
                  "train.log_every", "train.eval_every", "train.eval_batches", "train.max_nonfinite_steps",
                  "train.max_rollbacks", "train.stop_at_step", "train.steps", "train.deterministic")  # fmt: skip
