"""What a training run is asked for, tells on its way, and ends with. Names are those of Hugging Face's
TrainingArguments and peft's LoraConfig, with their meanings."""

from __future__ import annotations

import enum
from typing import Annotated

from msgspec import Meta, Struct

from .types import Dtype, Wire

Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Count0 = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Rate = Annotated[float, Meta(ge=0, le=10)]

ALL_LINEAR = "all-linear"
"""As the only target module: every matrix of every layer, as in peft."""


class Method(enum.StrEnum):
    """What is trained."""

    LORA = "lora"  # low-rank additions to matrices; the base stays as it is, and shared
    FULL = "full"  # all weights, from the model's
    PRETRAIN = "pretrain"  # all weights, from random ones; the model gives shape and tokenizer


class Schedule(enum.StrEnum):
    """How the learning rate goes on after the warm-up."""

    LINEAR = "linear"
    COSINE = "cosine"
    CONSTANT = "constant"


class Shard(enum.StrEnum):
    """What data-parallel ranks keep apart: `ddp` nothing; `optimizer` gradients and optimizer state
    (ZeRO 2: FSDP2 without resharding after forward); `full` the weights too (ZeRO 3)."""

    DDP = "ddp"
    OPTIMIZER = "optimizer"
    FULL = "full"


class Pipeline(enum.StrEnum):
    """Schedules of torch.distributed.pipelining."""

    ONE_F_ONE_B = "1f1b"
    INTERLEAVED = "interleaved"
    ZERO_BUBBLE = "zero-bubble"


class Lora(Wire, frozen=True):
    """`target_modules`: last parts of names of modules, or `all-linear`; empty: peft's default for the
    architecture. A row's addition is `lora_alpha / r * B(A(dropout(x)))`."""

    r: Annotated[int, Meta(ge=1, le=256)] = 8
    lora_alpha: Annotated[float, Meta(gt=0, le=4096)] = 16.0
    lora_dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    target_modules: Annotated[
        list[Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}\Z")]], Meta(max_length=32)
    ] = []


class Mesh(Wire, frozen=True):
    """How many ranks train together, `data * replicas * tensor * stages` in all, and how. `replicas` > 1:
    groups of `data` ranks shard among themselves and replicate beside each other (HSDP). `sequence`: norms
    and dropout between the tensor-parallel parts are divided along the sequence. `micro_batches` of a step go
    through the stages. `offload`: optimizer state and sharded weights rest in host memory."""

    data: Annotated[int, Meta(ge=1, le=1024)] = 1
    replicas: Annotated[int, Meta(ge=1, le=1024)] = 1
    shard: Shard = Shard.DDP
    tensor: Annotated[int, Meta(ge=1, le=64)] = 1
    sequence: bool = False
    stages: Annotated[int, Meta(ge=1, le=64)] = 1
    pipeline: Pipeline = Pipeline.ONE_F_ONE_B
    micro_batches: Annotated[int, Meta(ge=1, le=1024)] = 1
    offload: bool = False

    @property
    def ranks(self) -> int:
        return self.data * self.replicas * self.tensor * self.stages


LONGEST = 1024


class Recipe(Wire, frozen=True):
    """How to train. None stands for what suits the method.

    A row of a batch has at most `max_length` tokens (None: LONGEST, or the model's context); with `packing`
    short examples share one, and see nothing of each other. A step is `per_device_train_batch_size` rows,
    `gradient_accumulation_steps` times, on each data-parallel rank. `max_steps` 0: `num_train_epochs` times
    all data. `warmup_ratio` counts when `warmup_steps` is 0. With `completion_only_loss` what was asked
    (prompts, all but the assistant's messages) is read and not learnt. `validation_split`: this part of the
    data is kept to measure on, and the data set's last `validation_rows`, every `eval_steps` steps (0: after
    each epoch, and at the end); `early_stopping_patience` 0: never stop early. `save_steps` 0: about every
    half a minute. `bf16` None: where the device computes it faster. `dtype`: of the resident base weights (as
    in spawn_model). `config`: for `pretrain`, a JSON object that replaces fields of the model's config.json.
    """

    method: Method = Method.LORA
    lora: Lora = Lora()
    max_steps: Count0 = 0
    num_train_epochs: Annotated[float, Meta(gt=0, le=10_000)] = 1.0
    per_device_train_batch_size: Annotated[int, Meta(ge=1, le=4096)] = 1
    gradient_accumulation_steps: Annotated[int, Meta(ge=1, le=4096)] = 1
    max_length: Annotated[int, Meta(ge=8, le=2**20)] | None = None
    packing: bool = True
    completion_only_loss: bool = True
    learning_rate: Rate | None = None
    lr_scheduler_type: Schedule = Schedule.LINEAR
    warmup_steps: Count0 = 0
    warmup_ratio: Annotated[float, Meta(ge=0, le=1)] = 0.0
    weight_decay: Rate = 0.0
    adam_beta1: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Meta(ge=0, lt=1)] = 0.999
    adam_epsilon: Annotated[float, Meta(gt=0, le=1)] = 1e-8
    max_grad_norm: Annotated[float, Meta(ge=0, le=1e6)] = 1.0
    gradient_checkpointing: bool = False
    bf16: bool | None = None
    seed: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 42
    validation_split: Annotated[float, Meta(ge=0, le=0.5)] = 0.0
    validation_rows: Count0 = 0
    eval_steps: Count0 = 0
    early_stopping_patience: Annotated[int, Meta(ge=0, le=1000)] = 0
    save_steps: Count0 = 0
    dtype: Dtype = ""
    config: Annotated[str, Meta(max_length=65536)] = ""
    mesh: Mesh = Mesh()

    @property
    def longest(self) -> int:
        """Tokens of a row at most."""
        return LONGEST if self.max_length is None else self.max_length

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        defaults = {Method.LORA: 2e-4, Method.FULL: 2e-5, Method.PRETRAIN: 6e-4}
        return defaults[self.method] if self.learning_rate is None else self.learning_rate


class TrainEvent(Wire, frozen=True):
    """Stream item of `follow`, and a line of a run's metrics (JSON). `phase` is `prepare` (then `step` of
    `steps` are bytes of the data set), `train`, `eval` or `save`. `loss` is the mean over the step's learnt
    tokens, `tokens` counts all tokens so far, `memory` is bytes of the run's tensors, `eta_s` the seconds
    that are left at this pace, `time` seconds of computing since the run began."""

    phase: str
    step: int
    steps: int
    epoch: float = 0.0
    loss: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    eval_loss: float | None = None
    tokens: int = 0
    tokens_per_s: float = 0.0
    memory: int = 0
    eta_s: float = 0.0
    time: float = 0.0

    def is_behind(self, step: int, eval_step: int) -> bool:
        """Whether a run that goes on after `step`, with the evaluation of `eval_step` as its last one, will
        not come here again."""
        if self.phase == "prepare":
            return True
        return self.step <= eval_step if self.phase == "eval" else self.step <= step


class TrainResult(Wire, frozen=True):
    """What a run made: `model` is the name that `infer` takes, `digest` its manifest's. `stopped_early`: by
    the recipe's `early_stopping_patience`."""

    model: str
    digest: str
    method: Method
    steps: int
    epochs: float
    tokens: int
    seconds: float
    loss: float | None
    eval_loss: float | None
    trained_parameters: int
    stopped_early: bool = False


class DataHead(Struct, frozen=True, forbid_unknown_fields=True):
    """head.json of a prepared data set. Beside it lie tokens.u32 (all examples, one behind the other),
    learnt.u8 (parallel to it: 1 where the token is to be learnt) and ends.u64 (where each example ends), all
    little endian. Examples are as long as they are; the trainer cuts, packs and shuffles. Written last: a
    folder without it is not finished."""

    version: int
    examples: int
    tokens: int
    learnt: int
    longest: int
    dataset: str  # the digest of the file that it was made from
    tokenizer: str  # the digest of tokenizer.json
    template: str  # the digest of the chat template, empty: none was used
