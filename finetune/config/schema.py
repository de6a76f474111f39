"""The config: every key, its type, its default and why. Nothing else in the project has defaults for these.

The docstring under a field is its documentation: `ft config explain KEY`, `ft config schema` and docs/config.md are
made from it. Models are frozen and refuse unknown keys.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

Fraction = Annotated[float, Field(ge=0, lt=1)]
PositiveInt = Annotated[int, Field(ge=1, le=2**31 - 1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]

Format = Literal[
    "auto",
    "messages",
    "sharegpt",
    "alpaca",
    "prompt-completion",
    "question-answer",
    "preference",
    "kto",
    "text",
]


class Section(BaseModel):
    """What all sections share: frozen, strict about types, closed to unknown keys."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        hide_input_in_errors=True,  # a value may be a token that somebody put in the wrong place
    )


class DataSource(Section):
    path: Annotated[str, Field(min_length=1)]
    """A file, a folder, a pattern such as `data/*.jsonl` (each relative to the YAML it is written in), or the id of a
    dataset on the Hugging Face Hub. Files end in .jsonl, .json, .csv, .tsv, .parquet or .arrow, and may be packed as
    .gz or .zst."""

    format: Format = "auto"
    """How a row is read. `auto` decides from the rows and says what it found. `preference` trains on the chosen answer,
    `kto` on the completions that are labelled true."""

    columns: dict[str, str] = Field(default_factory=dict)
    """Renames columns: the name that the format expects → the name that the file has, for instance
    `{prompt: question, completion: answer}`."""

    name: Annotated[str, Field(min_length=1)] | None = None
    """Which configuration (subset) of a Hub dataset to use. Has no effect on a file."""

    split: Annotated[str, Field(min_length=1)] = "train"
    """Which split of a Hub dataset to use. Has no effect on a file."""

    revision: str | None = None
    """Which commit, tag or branch of a Hub dataset to use; the newest if not given. Has no effect on a file."""

    streaming: bool = False
    """Read a Hub dataset over the network row by row, keeping no copy of it: for what does not fit on the disk, and,
    with `take`, for the beginning of something large. Has no effect on a file, which is always read row by row."""

    take: PositiveInt | None = None
    """Use only so many of the rows: the first ones, or random ones with `shuffle`."""

    shuffle: bool = False
    """Let `take` draw the rows at random, with `train.seed`. (What is trained on is shuffled in any case.)"""

    weight: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = 1.0
    """How often each row is seen in an epoch, to mix sources: 2 shows every row twice, 0.5 a random half of them, 1.5
    every row once and a random half twice. Held-out rows are drawn first and are seen once."""

    on_overlong: Literal["error", "truncate", "split", "drop"] = "error"
    """What to do with a row of more tokens than `train.sequence_length`. `error` is the default because the others lose
    something that somebody meant to train on, and it says how many tokens with loss each of them costs. `truncate`
    keeps the first tokens; `split` makes several rows of a long text, and of a conversation as many as its turns allow,
    each with the system message; `drop` leaves the row out."""

    max_dropped: Annotated[int, Field(ge=0)] = 0
    """How many rows may be left out because something is wrong with them, before the run stops with an error that names
    them. Rows that `on_overlong: drop`, `take` or `weight` leave out were meant to go, and are not counted here."""


class Evaluation(Section):
    split: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.05
    """Rows held out of `data` for evaluation, drawn with `train.seed`: a fraction below 1, or a number of rows. 0
    trains on everything and evaluates nothing. 5 % is enough to see the loss fall and costs little data. Rows that are
    equal or nearly so stay on one side."""

    path: str | None = None
    """Held-out rows to evaluate on, instead of a split: a file, a folder or a pattern, as in `data`."""

    format: Format = "auto"
    """The format of `evaluation.path`, as in `data`."""

    columns: dict[str, str] = Field(default_factory=dict)
    """Renamed columns of `evaluation.path`, as in `data`."""

    on_overlong: Literal["error", "truncate", "split", "drop"] = "error"
    """What to do with rows of `evaluation.path` that are too long, as in `data`."""

    allow_leakage: bool = False
    """Go on where held-out rows are also trained on, exactly or nearly so. Not given, that is an error: such rows make
    any model look good."""

    max_rows: PositiveInt = 200
    """At most this many held-out rows are evaluated, so that evaluation stays cheap beside training. With 200 rows the
    standard error of a per-row loss is 7 % of its spread (1/√200)."""

    every: PositiveInt | None = None
    """Also evaluate the loss every so many optimizer steps during training. Not given: before and after only."""

    metric: Literal["none", "exact-match"] = "none"
    """`exact-match` also answers the prompts of the held-out rows greedily, with the base and with the tuned model, and
    counts the answers that equal the reference. For short answers that are right or wrong."""

    samples: Annotated[int, Field(ge=0, le=50)] = 3
    """How many held-out prompts both models answer at the end, so that a person sees the difference."""

    max_new_tokens: PositiveInt = 128
    """The longest answer generated in evaluation, in tokens: enough to judge an answer by, cheap enough to wait for."""

    @field_validator("split")
    @classmethod
    def _whole_rows(cls, split: float) -> float:
        if split >= 1 and split != int(split):
            raise PydanticCustomError("not_whole", "must be a fraction below 1 or a whole number of rows")
        return split


class Lora(Section):
    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """The rank r of the update B·A. 16 on all linear layers matches full fine-tuning on instruction data in the QLoRA
    paper (arXiv 2305.14314, which found rank to matter little once all layers are adapted)."""

    alpha: PositiveFloat = 32
    """The update is scaled by alpha / rank. Twice the rank is the common choice; with it the default learning rate
    holds across ranks."""

    dropout: Fraction = 0.0
    """Dropout on the adapter's input. 0 is fastest and right for a few epochs; 0.05 helps when data is scarce."""

    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = "all-linear"
    """Which linear layers get an adapter: `all-linear` (all but the output head), or a list of module names such as
    `[q_proj, v_proj]`. Adapting all of them is what makes LoRA equal full fine-tuning (arXiv 2305.14314, figure 2)."""


class Train(Section):
    epochs: PositiveFloat = 3
    """How often the training rows are seen. Three is where instruction tuning usually stops improving."""

    max_steps: PositiveInt | None = None
    """Stop after so many optimizer steps, whatever `epochs` says."""

    learning_rate: PositiveFloat = 2e-4
    """The peak learning rate of AdamW. 2e-4 is the QLoRA paper's value for 7B to 13B models."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""

    warmup: Fraction = 0.03
    """The fraction of the steps over which the learning rate rises from 0 (the QLoRA paper's 3 %)."""

    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """AdamW's decoupled weight decay on the adapter."""

    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""

    micro_batch_size: PositiveInt = 2
    """Sequences in one forward and backward pass. Raise it until memory is full. Where memory does not suffice, smaller
    micro batches are taken that make the same steps, and the run says so."""

    gradient_accumulation_steps: PositiveInt = 8
    """Passes summed into one optimizer step; micro_batch_size × this is the effective batch. 16 is the common value."""

    sequence_length: Annotated[int, Field(ge=8, le=2**24)] = 2048
    """The longest sequence, in tokens. Memory grows with it. Also the size of a pack."""

    packing: bool = True
    """Put several short rows into one sequence, each attending only to itself: no computation is spent on padding.
    Nothing is cut or dropped by it."""

    loss_on: Literal["assistant", "last-assistant", "completion", "all"] = "assistant"
    """Which tokens carry loss: `assistant` (every answer, with its end-of-turn token), `last-assistant` (the last
    answer alone), `completion` (all that follows the last user's turn, tool calls included), or `all`. Rows of `text`
    always train on all. A message of `weight: 0` in the data carries none."""

    optimizer: Literal["auto", "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "auto"
    """`auto` is AdamW with fp32 state: an adapter is so small that 8-bit state saves little. The paged and 8-bit ones
    are for large ranks on small cards (on a CPU, nothing is paged)."""

    fit: Literal["auto", "as-written"] = "auto"
    """Whether the plan may cut a step otherwise than it is written, to be as fast as the memory that is there allows:
    `auto` takes the micro batch, the layers that are recomputed and the offload that the plan finds quickest, and keeps
    micro_batch_size × gradient_accumulation_steps, so that the steps are the same. What `gradient_checkpointing` and
    `offload` say is kept. On a CPU nothing is changed."""

    gradient_checkpointing: bool | Annotated[int, Field(ge=0, le=1000)] | Literal["auto"] = "auto"
    """Recompute activations in the backward pass: far less memory for about a third more time. `true` does it in every
    layer, a number in so many of them. `auto` takes as many as the memory demands (all of them with `fit: as-written`),
    and none on a CPU, where memory is not what is scarce."""

    offload: bool | Literal["auto"] = "auto"
    """Let what recomputation starts from (one tensor a layer) wait in the machine's own memory. `auto` leaves that to
    `fit: auto`, and does so where memory runs out all the same."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seeds the adapter's initialisation, the order of the rows, the held-out split and dropout."""

    save_every: PositiveInt | None = None
    """Write a checkpoint every so many optimizer steps. Not given: ten times over the run, but at most every 25
    steps."""

    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """How many of the newest checkpoints are kept, besides the one with the lowest loss where `evaluation.every` tells.
    Two at least, so that one that turns out damaged does not cost the run."""

    log_every: PositiveInt | None = None
    """Write a line of metrics every so many optimizer steps. Not given: 100 times over the run, at least."""

    @property
    def effective_batch(self) -> int:
        """Sequences in an optimizer step."""
        return self.micro_batch_size * self.gradient_accumulation_steps


class Speed(Section):
    attention: Literal["auto", "varlen", "sdpa"] = "auto"
    """`varlen` lays rows end to end and attends to each alone: nothing is computed on padding or across rows. `sdpa`
    is torch's attention with a mask. `auto` is varlen wherever the model's attention allows it."""

    fused: bool | Literal["auto"] = "auto"
    """RMSNorm, rotary embedding and SwiGLU in one kernel each (liger-kernel on a GPU). `auto` uses what fits the
    model."""

    lora: bool = True
    """A LoRA linear that saves less for the backward pass, once for all layers with the same input."""

    head: bool = True
    """Compute the loss and its gradient together, for tokens with loss only, a chunk at a time."""

    compile: bool = False
    """Compile each layer with torch.compile, in place of `fused` and `lora`: a minute or more at the start of a run."""


class Config(Section):
    base: Annotated[str, Field(min_length=1)]
    """The model to fine-tune: a Hub id such as `mistralai/Mistral-7B-Instruct-v0.3`, or a local folder (relative to
    the YAML it is written in)."""

    revision: str | None = None
    """Which commit, tag or branch of a Hub model to use; the newest if not given. The commit is kept in the run."""

    chat_template: str | None = None
    """The chat template, if not the base's own: `chatml`, `plain`, or a .jinja file. A base without one needs this."""

    data: Annotated[tuple[DataSource, ...], Field(strict=False, min_length=1)]
    """What to train on: a list of files or Hub datasets."""

    evaluation: Evaluation = Evaluation()
    """How the tuned model is compared with the base."""

    quantization: Literal["nf4", "int8", "none"] = "nf4"
    """How the frozen base is held in memory while training. `nf4` (QLoRA, with double quantisation) needs about half
    a byte a parameter, `int8` one, `none` two."""

    lora: Lora = Lora()
    """The adapter."""

    train: Train = Train()
    """The training run."""

    speed: Speed = Speed()
    """Faster ways to compute the same steps. Each can be switched off, to compare or where it fails."""

    private_data: Literal["report", "ignore"] = "report"
    """Look in the data for what seems to be secrets and personal data (keys, passwords, e-mail addresses, telephone and
    card numbers), and report how many there are of each kind and where the first one is. Nothing is changed, and the
    text itself is not repeated."""

    tracking: Literal["none", "wandb"] = "none"
    """Where metrics go besides the run folder. Nothing leaves the machine unless this says so."""


def ineffective_keys(config: Config) -> dict[str, str]:
    """Keys that this config makes meaningless → why. Writing such a key down is an error: it would be believed.

    Pure; the loader asks only about keys that the config file or the command line itself sets, since a recipe may
    well set what a config then switches off.
    """
    found: dict[str, str] = {}
    if config.evaluation.path is not None:
        found["evaluation.split"] = "evaluation.path names the held-out rows, so nothing is split off"
    else:
        for key in ("format", "columns", "on_overlong"):
            found[f"evaluation.{key}"] = "there is no evaluation.path for it to describe"
    if config.evaluation.path is None and config.evaluation.split == 0:
        for key in ("max_rows", "every", "metric", "samples", "max_new_tokens"):
            found[f"evaluation.{key}"] = "evaluation.split is 0, so nothing is evaluated"
    elif config.evaluation.metric == "none" and config.evaluation.samples == 0:
        found["evaluation.max_new_tokens"] = "nothing is generated: metric is none and samples is 0"
    if config.train.max_steps is not None:
        found["train.epochs"] = "train.max_steps decides when training ends"
    if config.speed.compile:
        for key in ("fused", "lora"):
            found[f"speed.{key}"] = "speed.compile puts the compiler in their place"
    elif config.lora.dropout > 0:
        found["speed.lora"] = "lora.dropout is not 0, and only PEFT's own linear has dropout"
    if config.speed.compile and config.train.offload is True:
        found["train.offload"] = "speed.compile does not look into layers whose inputs are elsewhere"
    if config.train.gradient_checkpointing in (False, 0):
        found["train.offload"] = "train.gradient_checkpointing is off, so there is nothing to offload"
    if is_local_base(config.base):
        found["revision"] = "base is a local folder, which has no revisions"
    for index, source in enumerate(config.data):
        if is_local_data(source.path):
            for key in ("name", "split", "revision", "streaming"):
                found[f"data.{index}.{key}"] = "path is a file; only Hub datasets have this"
        if source.take is None:
            found[f"data.{index}.shuffle"] = "without take there is nothing to draw: all rows are used"
        if source.format == "text" and len(config.data) == 1:
            found["train.loss_on"] = "rows of text train on every token"
    return found


DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
"""What files of data end in."""

PACKED_SUFFIXES = (".gz", ".zst")
"""What may follow, where a file is compressed."""


def data_kind(path: str) -> str | None:
    """The ending of a data file, less what says that it is compressed, or None for other files."""
    name = path.lower()
    for packed in PACKED_SUFFIXES:
        name = name.removesuffix(packed)
    return next((suffix for suffix in DATA_SUFFIXES if name.endswith(suffix)), None)


def is_local_data(path: str) -> bool:
    """Whether a data path names a file (the loader has made every local path absolute)."""
    return path.startswith("/") or path[1:3] in (":\\", ":/")


def is_local_base(base: str) -> bool:
    """Whether a base names a local folder (the loader has made every local path absolute)."""
    return is_local_data(base)
