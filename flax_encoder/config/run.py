"""The settings of a run: its data, masking, optimizer and mesh, and the model's."""

from dataclasses import dataclass, field, replace
from typing import Literal

from flax_encoder.config.contrastive import ContrastiveConfig
from flax_encoder.config.distillation import DistillationConfig
from flax_encoder.config.mesh import MeshConfig, check_context
from flax_encoder.config.model import DecoderConfig, EncoderConfig, GenerationConfig, HeadConfig
from flax_encoder.config.objectives import AutoencoderConfig, SentencesConfig, SpansConfig
from flax_encoder.config.phases import (
    Phase,
    Ramp,
    Stage,
    Timeline,
    check_objective,
    check_phases,
    check_steps,
    make_timeline,
    phases_of_ramps,
)
from flax_encoder.config.rules import (
    ShortRepr,
    nearest_divisors,
    require,
    require_finite,
    require_positive,
    require_rates,
)


@dataclass(frozen=True, repr=False)
class DataConfig(ShortRepr):
    """Where text comes from and how it becomes rows."""

    source: str | tuple[str, ...] = "tfds:python_docs"
    """`tfds:NAME[/CONFIG]`, `hf:NAME[:CONFIG]`, a prepared store, or files: a path, a folder or a quoted glob of .txt,
    .jsonl, .json, .csv, .tsv, .parquet or .conll files (all but .parquet also .gz or .zst). Several sources are mixed.
    """
    weights: tuple[float, ...] | None = None
    """Relative shares of rows from each of several sources; None reads each source in proportion to its size."""
    validation_split: str | None = None
    """The split of a tfds: or hf: source to evaluate on, such as validation_mismatched; None takes the usual name."""
    text_column: str | None = None
    """The column of the text. None takes the column `text`, or the only column of strings, or one with a name that data
    sets use. In a .conll file columns have numbers, from 1."""
    text_pair_column: str | None = None
    """The column of the second text of a pair. None takes the partner of a known name, such as sentence2 for sentence1.
    For multiple choice it holds the list of choices; for question answering the passage; for text to text the target.
    """
    history_column: str | None = None
    """text_to_text: the column with a list of turns. A turn is a text, or an object with role and content, or with from
    and value. Beside a target the turns stand before the source; alone they are a conversation, whose answers are the
    targets. None takes a column of lists with a name that data sets use."""
    target_turns: Literal["every", "last"] = "every"
    """every learns each answer of a conversation from all turns before it; last learns only the last answer."""
    turn_separator: str | None = None
    """Text that stands after every turn of a history; None is the tokenizer's token between two texts."""
    prefix: str = ""
    """text_to_text: text that is put before every source, after its history, such as "translate English to French: ".
    """
    label_column: str | tuple[str, ...] | None = None
    """The column to predict; None guesses it by its name. Several columns of 0 and 1 are the labels of multi_label. In
    a .conll file it is a number, from 1 on, or from -1 back from the last column."""
    label_names: tuple[str, ...] | None = None
    """Names of labels that are integers from 0, in that order, for a source that has no names."""
    has_header: bool = True
    """The first row of .csv and .tsv files names the columns; without it the columns are called 1, 2, 3."""
    csv_quotes: bool = True
    """Quotes enclose fields of .csv and .tsv files; if off, quotes are text. They are also text in a .tsv file whose
    first rows cannot be read otherwise."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be read, and count them, instead of stopping at the first."""
    text_unit: Literal["paragraph", "line", "file"] = "paragraph"
    """The part of a .txt file that is one document; blank lines separate paragraphs."""
    validation: str | None = None
    """A source like data.source. The run evaluates on it and chooses the best checkpoint by it. None takes the source's
    own validation or test split, or holds out a share of the training documents."""
    test: str | None = None
    """A source like data.source. The run evaluates on it once, at the end, and chooses nothing by it."""
    held_out_rate: float = 0.02
    """Share of documents held out for evaluation, by a hash of their text; unused if the source has a split of its own.
    """
    held_out_by_class: bool = True
    """Hold out the same share of every class, if documents have classes."""
    tokenizer: str | None = None
    """A tokenizer.json, or a folder with a tokenizer's files. None takes the tokenizer of init_from or of a prepared
    store, or else trains a new one on the training text."""
    vocab_size: int = 8192
    """Tokens of a tokenizer that the run trains: a WordPiece, or for tasks that write texts a byte-level BPE with
    sentinels."""
    word_vectors: str | None = None
    """A GloVe or word2vec file, text or binary, whose vectors the token embedding starts from. Without data.tokenizer
    the tokens are the file's first vocab_size words."""
    row_length: int = 128
    """T, tokens in a row. Documents are packed into rows; a longer document is split (for classification, cut)."""
    target_length: int | None = None
    """Tasks with a decoder: S, tokens in a decoder's row, which stands beside each row of row_length. None follows from
    the lengths of the targets, or for span_corruption from those of its spans."""
    long_targets: Literal["cut", "leave_out"] = "cut"
    """text_to_text: cut a training target that is longer than target_length, or leave out its pair. Both are counted.
    """
    last_row_length: int | None = None
    """Another row length for the run's last steps; a batch keeps its number of tokens."""
    last_rate: float = 0.1
    """With last_row_length: the share of steps that have that length."""
    packing: Literal["best-fit", "one-per-row", "concatenate"] = "best-fit"
    """best-fit fills rows with whole documents; concatenate joins all documents and cuts every row_length tokens;
    one-per-row does not pack."""
    window_overlap: int | None = None
    """Tokens that two neighbouring windows share, for a passage longer than a row. None is 128, or a third of a row if
    that is less."""
    buckets: tuple[int, ...] = ()
    """With packing one-per-row: shorter row lengths for batches of short documents, such as 32 64. Each length is
    compiled once."""
    workers: int = 0
    """Processes that make batches; with 0, threads of the training process make them."""
    verify: bool = False
    """First compare every prepared file with its checksum; sizes are always compared."""
    cache_dir: str | None = None
    """Folder of prepared text; None is $FLAX_ENCODER_CACHE, or else ~/.cache/flax_encoder."""

    def __post_init__(self):
        require_rates(self, "held_out_rate", "last_rate")
        require_positive(self, "vocab_size")
        require(
            self.row_length >= 3, f"a row holds [CLS], one token and [SEP] at least: got row_length {self.row_length}."
        )
        require(
            self.last_row_length is None or self.last_row_length >= 3,
            f"a row holds [CLS], one token and [SEP] at least: got last_row_length {self.last_row_length}.",
        )
        require(
            self.target_length is None or self.target_length >= 2,
            f"a decoder's row holds one token and the end at least: got target_length {self.target_length}.",
        )
        require(
            not self.buckets or (self.packing == "one-per-row" and all(3 <= b < self.row_length for b in self.buckets)),
            f"buckets are lengths from 3 to below row_length, with packing one-per-row: got {self.buckets} with "
            f"row_length {self.row_length} and packing {self.packing}.",
        )
        shortest = min(self.row_length, self.final_row_length)
        require(
            self.window_overlap is None or 0 <= self.window_overlap <= shortest // 2,
            f"data.window_overlap is at most half of a row, so that a question and new text fit beside it: got "
            f"{self.window_overlap} with rows of {shortest} tokens. Give at most {shortest // 2}, or a longer "
            f"data.row_length.",
        )
        require(
            self.turn_separator != "",
            "turns must be kept apart: data.turn_separator is a text, or None for the tokenizer's token between two "
            "texts; got ''.",
        )
        require(self.workers >= 0, f"workers must be at least 0: got {self.workers}.")
        require(len(self.sources) > 0, "data.source must name at least one source.")
        for name in ("label_column", "label_names"):
            value = getattr(self, name)
            require(
                not isinstance(value, tuple) or (len(value) > 0 and len(set(value)) == len(value)),
                f"{name} must name something, and each once: got {value}.",
            )
        require(
            self.weights is None or (len(self.weights) == len(self.sources) and min(self.weights) > 0),
            f"weights are one number above 0 for each source: got {self.weights} for {len(self.sources)} sources.",
        )
        require_finite(self)

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def final_row_length(self) -> int:
        return self.last_row_length or self.row_length


@dataclass(frozen=True, repr=False)
class MaskingConfig(ShortRepr):
    """Masked-LM corruption (Devlin et al., arXiv 1810.04805, section 3.1)."""

    kind: Literal["token", "whole_word", "span"] = "token"
    """What is masked together: single tokens, all of a word, or runs of words (Joshi et al., arXiv 1907.10529)."""
    rate: float = 0.15
    """Share of a row's ordinary tokens that are predicted in training."""
    last_rate: float | None = None
    """The rate at the last step, to which rate changes linearly (Ankner et al., arXiv 2305.15096); None keeps rate."""
    eval_rate: float = 0.15
    """The rate in evaluations."""
    mask_rate: float = 0.8
    """Share of the predicted tokens that [MASK] replaces."""
    random_rate: float = 0.1
    """Share of the predicted tokens that a random token replaces; those left by mask_rate and random_rate stay."""
    mean_span_words: float = 5.0
    """With kind span: mean number of words in a span, before max_span_words cuts it."""
    max_span_words: int = 10
    """With kind span: words of the longest span."""
    budget: int | None = None
    """M, slots for predicted tokens in a row; None is enough for the rate, and for the end of a last word or span."""

    def __post_init__(self):
        require_rates(self, "rate", "eval_rate", "mask_rate", "random_rate")
        require(self.rate > 0 and self.eval_rate > 0, "rate and eval_rate must be above 0: nothing would be learned.")
        require(
            self.last_rate is None or 0 < self.last_rate <= 1,
            f"last_rate is a probability above 0, or None: got {self.last_rate}.",
        )
        require(
            self.mask_rate + self.random_rate <= 1.0,
            f"mask_rate + random_rate is at most 1: got {self.mask_rate} + {self.random_rate}.",
        )
        require(
            self.mean_span_words >= 1 and self.max_span_words >= 1,
            f"a span has at least one word: got mean_span_words {self.mean_span_words}, max_span_words "
            f"{self.max_span_words}.",
        )
        require_finite(self)

    @property
    def rates(self) -> tuple[float, float]:
        """In the first step, and in the last."""
        return self.rate, self.rate if self.last_rate is None else self.last_rate


@dataclass(frozen=True, repr=False)
class GeneratorConfig(ShortRepr):
    """replaced_token_detection: the small masked LM whose words the encoder learns to find (arXiv 2003.10555)."""

    width: float = 0.25
    """The generator's number of heads and feed-forward width, as a share of the model's."""
    num_layers: int | None = None
    """The generator's layers; None is as many as the model has."""
    sharing: Literal["embedding", "disentangled", "none"] = "embedding"
    """embedding: both share their tables of tokens, positions and types (ELECTRA). disentangled: a vector of the model
    is the generator's, which the model does not train, plus a learned one (arXiv 2111.09543, section 3.2)."""
    detection_weight: float = 50.0
    """Factor of the encoder's loss; the generator's has factor 1."""
    temperature: float = 1.0
    """The generator's logits are divided by it before a token is drawn."""

    def __post_init__(self):
        require_finite(self)
        require_positive(self, "detection_weight", "temperature")
        require(0 < self.width <= 1, f"generator.width is a share above 0, at most 1: got {self.width}.")
        require(
            self.num_layers is None or self.num_layers > 0,
            f"generator.num_layers must be above 0 or None: got {self.num_layers}.",
        )


@dataclass(frozen=True, repr=False)
class LabelsConfig(ShortRepr):
    """How labels and answers are learned and given. Each task reads some of these settings."""

    smoothing: float = 0.0
    """Share of each target that is spread evenly over all classes."""
    class_weights: Literal["balanced"] | tuple[float, ...] | None = None
    """Weight of each class in the training loss, in the labels' order; balanced makes every class weigh the same."""
    all_pieces: bool = False
    """token_classification: learn a word's tag at each of its tokens, not only at the first; answers read the first."""
    longest_answer: int = 30
    """question_answering: tokens of the longest answer to look for in a passage."""
    null_threshold: float | None = None
    """question_answering: answer "no answer" if it is likelier than the best answer by more than this, in nats. None
    never does; a run on data with unanswerable questions takes 0 instead."""
    num_candidates: int = 0
    """question_answering: how many of the likeliest answers to list beside the best, up to 20."""
    threshold: float = 0.5
    """multi_label: a label is given if its probability is above this."""

    def __post_init__(self):
        require_rates(self, "smoothing", "threshold")
        require_positive(self, "longest_answer")
        require(
            0 <= self.num_candidates <= 20,
            f"labels.num_candidates is from 0 to 20: got {self.num_candidates}.",
        )
        weights = self.class_weights
        require(
            not isinstance(weights, tuple) or min(weights) > 0, f"class_weights must be above 0: got {weights}."
        )


@dataclass(frozen=True, repr=False)
class OptimizerConfig(ShortRepr):
    """The optimizer, its learning rate over the run, and the parameters that it trains."""

    name: Literal["adamw", "stable_adamw", "lamb", "lion", "muon", "soap", "adafactor", "schedule_free"] = "adamw"
    """adamw (Loshchilov and Hutter, arXiv 1711.05101); stable_adamw, whose updates are clipped (Wortsman et al., arXiv
    2304.13013); lamb (You et al., arXiv 1904.00962); lion (Chen et al., arXiv 2302.06675); muon (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon) and soap (Vyas et al., arXiv 2409.11321), which take the layers' matrices and
    leave embeddings, head, norms and biases to adamw; adafactor, relative to each parameter's size (Shazeer and Stern,
    arXiv 1804.04235); schedule_free, which evaluates and saves its average (Defazio et al., arXiv 2405.15682)."""
    learning_rate: float = 5e-4
    """Peak learning rate; with muon, of the parameters that adamw trains."""
    muon_learning_rate: float = 0.02
    """Peak learning rate of the matrices that muon trains."""
    b1: float = 0.9
    """Decay of the mean gradient; with schedule_free, weight of the average at the point where gradients are taken."""
    b2: float = 0.98
    """Decay of the mean squared gradient; with lion, of the stored mean gradient."""
    epsilon: float = 1e-6
    """Added to the divisor of an update, which in adamw is the root of the mean squared gradient."""
    muon_momentum: float = 0.95
    muon_dtype: Literal["bfloat16", "float32"] = "float32"
    """Dtype of the operands of muon's products; its authors use bfloat16."""
    soap_every: int = 10
    """Steps between SOAP's QR decompositions."""
    weight_decay: float = 0.01
    """Decoupled weight decay, times the learning rate, on matrices and embeddings; never on biases and norms."""
    layer_decay: float = 1.0
    """The learning rate of layer l of L, counted from 1, is multiplied by layer_decay ** (L - l); the embeddings are
    layer 0, and parameters after the layers have the whole rate (Clark et al., arXiv 2003.10555)."""
    head_learning_rate: float | None = None
    """Peak learning rate of the parameters outside the encoder; None is learning_rate."""
    freeze: tuple[str, ...] = ()
    """Parameters that are not trained: names, beginnings of names up to a dot, or patterns with * and ?, such as
    encoder.embedding encoder.layers.0 '*.bias'. If a name fits no parameter, the error lists them all."""
    freeze_embedding: bool = False
    """Do not train the token embedding, for example one that starts from data.word_vectors or init_from."""
    average: float | None = None
    """Decay of an exponential average of the parameters, such as 0.999. The run evaluates, saves and loads the average;
    it takes gradients at the parameters themselves, which it keeps too. At update t the decay is at most
    (1 + t) / (10 + t)."""
    clip_norm: float | None = 1.0
    """A gradient with a larger global norm is scaled down to this norm; None never clips."""
    schedule: Literal["linear", "cosine", "wsd", "inverse_sqrt", "constant"] = "linear"
    """The learning rate after the warm-up: linear and cosine fall to final_rate; wsd is constant and falls over
    decay_rate; inverse_sqrt falls as one over the root of the step (Vaswani et al., arXiv 1706.03762, equation 3);
    constant stays."""
    warmup_rate: float = 0.06
    """Share of the run in which the learning rate rises from 0; with linear, 0.5 makes a triangle."""
    decay_rate: float = 0.2
    """With wsd: share of the run in which the learning rate falls; with 0 it never falls."""
    decay_shape: Literal["linear", "one_minus_sqrt"] = "linear"
    """With wsd: shape of the fall (one_minus_sqrt: Hägele et al., arXiv 2405.18392, and ModernBERT)."""
    final_rate: float = 0.0
    """The last learning rate, as a share of the peak."""

    def __post_init__(self):
        require_rates(self, "warmup_rate", "decay_rate", "final_rate", "b1", "b2", "muon_momentum")
        require_positive(self, "soap_every")
        require(
            max(self.b1, self.b2, self.muon_momentum) < 1,
            f"a mean that decays has b1, b2 and muon_momentum below 1: got {self.b1}, {self.b2} and "
            f"{self.muon_momentum}.",
        )
        require(
            self.weight_decay >= 0 and self.epsilon >= 0,
            f"weight_decay and epsilon are at least 0: got {self.weight_decay} and {self.epsilon}.",
        )
        require(
            self.learning_rate >= 0 and self.muon_learning_rate >= 0,
            f"learning rates are at least 0: got {self.learning_rate} and {self.muon_learning_rate}.",
        )
        require(
            self.head_learning_rate is None or self.head_learning_rate >= 0,
            f"head_learning_rate is at least 0, or None: got {self.head_learning_rate}.",
        )
        require(0 < self.layer_decay <= 1, f"layer_decay is above 0 and at most 1: got {self.layer_decay}.")
        require(
            self.average is None or (0 < self.average < 1 and self.name != "schedule_free"),
            f"average is a decay between 0 and 1, or None, and None with schedule_free, which has an average of its "
            f"own: got {self.average} with {self.name}.",
        )
        require(
            self.clip_norm is None or self.clip_norm > 0, f"clip_norm must be above 0 or None: got {self.clip_norm}."
        )
        require(
            self.schedule != "wsd" or self.warmup_rate + self.decay_rate <= 1.0,
            f"warmup_rate + decay_rate is at most 1: got {self.warmup_rate} + {self.decay_rate}.",
        )
        require(
            self.schedule != "inverse_sqrt" or (self.warmup_rate > 0 and self.final_rate == 0),
            f"inverse_sqrt falls from the end of its warm-up, and to no rate of its own: warmup_rate must be above 0 "
            f"and final_rate 0; got {self.warmup_rate} and {self.final_rate}.",
        )
        require(
            self.schedule == "wsd" or self.decay_shape == "linear",
            f"decay_shape is of schedule wsd: got {self.decay_shape} with {self.schedule}.",
        )
        require(
            self.name != "schedule_free" or self.peak_end == 1,
            f"schedule_free averages instead of decaying: give schedule constant with it; got {self.schedule}.",
        )
        require_finite(self)

    @property
    def peak_end(self) -> float | None:
        """Up to which share of the run the learning rate is at its peak after the warm-up, for schedules that stay."""
        return {"constant": 1.0, "wsd": 1.0 - self.decay_rate}.get(self.schedule)


@dataclass(frozen=True, repr=False)
class LoraConfig(ShortRepr):
    """Low-rank adapters of the encoder's matrices (Hu et al., arXiv 2106.09685): W + alpha / rank * A B. Only A, B and
    the head are trained; the rest of the encoder is frozen."""

    rank: int = 0
    """Columns of A and rows of B; 0 has no adapters."""
    alpha: float = 16.0
    targets: tuple[str, ...] = ("query", "value")
    """Matrices of each layer that have adapters: query, key, value, out, up, gate or down; '*' is all of them."""

    def __post_init__(self):
        require_finite(self)
        require(self.rank >= 0, f"lora.rank is at least 0: got {self.rank}.")
        require(self.alpha > 0, f"lora.alpha must be above 0: got {self.alpha}.")
        require(len(self.targets) > 0, "lora.targets must name at least one product.")
        require(
            self.rank > 0 or (self.alpha, self.targets) == (16.0, ("query", "value")),
            f"lora.alpha and lora.targets are of adapters, which lora.rank makes: got {self.alpha} and {self.targets} "
            f"with rank 0.",
        )


@dataclass(frozen=True, repr=False)
class RunConfig(ShortRepr):
    """The settings of a run."""

    run_dir: str = "runs/run"
    """The folder of config.json, tokenizer.json, metrics.jsonl, checkpoints/ and TensorBoard events; if it holds a run,
    that run is resumed. A recipe without a run_dir has runs/NAME, by its own name."""
    init_from: str | None = None
    """A run, a checkpoint or a published folder whose encoder and tokenizer to start from. Parts that differ, such as
    the head, are newly initialized."""
    objective: str = "masked_lm"
    """The name of the task to learn."""
    steps: int = 1000
    """Updates of the run; epochs, if set, decides them."""
    extend: bool = False
    """Make a run longer, with more steps than it was begun with, by a new schedule from the current step on, warm-up
    first. Not needed while the learning rate is still at its peak (wsd before its decay)."""
    schedule_began: int = 0
    """The step at which the schedule began; extend sets it."""
    epochs: float | None = None
    """How often to read the training text. Steps follow from it once the text is packed into rows."""
    budget_minutes: float | None = None
    """End after so many minutes of training, compiling and evaluations not counted, if the steps take longer. The
    learning rate then follows the share of steps or of time, whichever is larger; all other settings follow steps."""
    batch_size: int = 32
    """Rows in a batch, over all devices; batch_texts, if set, decides it."""
    batch_texts: int | None = None
    """Documents in a batch, on average. batch_size follows from it once the text is packed into rows."""
    first_batch_size: int | None = None
    """Rows in the first batch; batches then double until they have batch_size rows. Each size is compiled once."""
    batch_warmup_rate: float = 0.1
    """With first_batch_size: the share of steps that have smaller batches."""
    phases: tuple[Phase, ...] = ()
    """Parts of the run with other settings, one after the other, such as longer rows or fewer masks (see `Phase`). A
    recipe lists them; their settings are then options, such as --phases.0.share 0.9."""
    num_microbatches: int = 1
    """Equal parts of a batch over which gradients are accumulated; the update is the same. CPUs are fastest with 2,000
    to 4,000 tokens in each part (LOG.md)."""
    max_skipped: int = 0
    """How many updates in all the run may skip because their loss or gradient is not finite or has exploded. A skipped
    update leaves the state as it was. One more stops the run; with 0 the first one does."""
    max_norm_factor: float | None = None
    """With max_skipped: a gradient has exploded if its norm is above this factor times the median norm of the last 64
    steps."""
    skip_rows: tuple[int, ...] = ()
    """Steps whose rows make no update."""
    seed: int = 0
    seeds: int = 1
    """Train this many runs, with the seeds from seed on, in RUN_DIR/seed-0, RUN_DIR/seed-1, ..., and report the median
    and the spread. The same command again continues where it stopped."""
    pooling: Literal["cls", "mean", "late"] = "cls"
    """What classification reads: the document's first token (cls), the mean of its tokens (mean), or each token, whose
    logits are averaged (late)."""
    compare_with_scratch: bool = False
    """After a run with init_from, train the same model without it, and report both."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int | Literal["epoch"] | None = None
    """Steps between evaluations on held-out text; epoch evaluates after each epoch; None evaluates only at the end."""
    keep_best: str | None = None
    """A metric of the evaluations, such as eval/f1. The checkpoint where it was best is kept beside the newest; the run
    reports, tests, loads and exports this one. A loss or an error is best when lowest, other metrics when highest."""
    patience: int | None = None
    """With keep_best: end the run after so many evaluations in a row without a better one."""
    eval_batches: int | None = None
    """Batches of each evaluation; None reads all held-out text."""
    checkpoint_every: int = 500
    """Steps between checkpoints; a run also saves one at its end and when a signal stops it."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep, beside the best by keep_best."""
    keep_every: int | None = None
    """Also keep for good the checkpoints whose step is a multiple of this."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Services that also get the lines of metrics.jsonl; wandb needs pip install 'flax-encoder[wandb]'."""
    stall_seconds: float | None = None
    """If the run makes no step for this long, evaluations and compiling included, print the stack of every thread and
    end with status 86; None waits for ever."""
    profile: str | None = None
    """Write a trace of the steps FIRST:LAST, such as 100:105, to RUN_DIR/profile."""
    model: EncoderConfig = field(default_factory=EncoderConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    data: DataConfig = field(default_factory=DataConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    spans: SpansConfig = field(default_factory=SpansConfig)
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    sentences: SentencesConfig = field(default_factory=SentencesConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        require_positive(
            self, "steps", "batch_size", "num_microbatches", "log_every", "checkpoint_every", "keep_checkpoints",
            "seeds",
        )  # fmt: skip
        require(
            0 <= self.schedule_began < self.steps,
            f"schedule_began is a step of the run, set by extend: got {self.schedule_began} of {self.steps} steps.",
        )
        every, saved = self.keep_every, self.checkpoint_every
        require(
            every is None or (every > 0 and every % saved == 0),
            f"keep_every is a multiple of checkpoint_every, or its steps would have no checkpoints: got {every} for "
            f"{saved}; {max(1, (every or 0) // saved) * saved} does.",
        )
        require(
            0 <= self.seed < 2**32,
            f"seed is a whole number from 0 to 4294967295 (2**32 - 1), of which JAX keeps every bit: got {self.seed}.",
        )
        first, _, last = (self.profile or "1:1").partition(":")
        require(
            first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last),
            f"profile is the first and the last step of a trace, such as 100:105: got {self.profile!r}.",
        )
        require(
            self.stall_seconds is None or self.stall_seconds > 0,
            f"stall_seconds must be above 0 or None: got {self.stall_seconds}.",
        )
        require(self.max_skipped >= 0, f"max_skipped counts updates: got {self.max_skipped}.")
        require(
            self.max_norm_factor is None or (self.max_norm_factor > 1 and self.max_skipped > 0),
            f"max_norm_factor is above 1, and of runs that may skip updates: got {self.max_norm_factor} with "
            f"max_skipped {self.max_skipped}.",
        )
        require(
            min(self.skip_rows, default=1) >= 1, f"skip_rows are steps, counted from 1: got {self.skip_rows}."
        )
        for name in (
            "eval_every", "eval_batches", "budget_minutes", "first_batch_size", "epochs", "batch_texts", "patience"
        ):  # fmt: skip
            value = getattr(self, name)
            require(value in (None, "epoch") or value > 0, f"{name} must be above 0 or None: got {value}.")
        require(
            self.mesh.num_processes == 1 or not (self.compare_with_scratch or self.seeds > 1),
            f"compare_with_scratch and seeds train more runs, in one process: got mesh.num_processes "
            f"{self.mesh.num_processes}. Train each run by a command of its own.",
        )
        require(
            self.seeds == 1 or not self.compare_with_scratch,
            f"compare_with_scratch is of one run: got seeds {self.seeds}. Leave it out with --no-compare-with-scratch.",
        )
        shapes = {name for phase in self.phases for name in phase.changes} & {"row_length", "batch_size"}
        require(
            (self.epochs is None and self.batch_texts is None)
            or (self.first_batch_size is None and self.data.last_row_length is None and not shapes),
            "epochs and batch_texts count rows of one length in batches of one size: give steps and batch_size with "
            "first_batch_size, data.last_row_length or phases of another shape.",
        )
        require(
            self.keep_best is None or self.keep_best.startswith("eval/"),
            f"keep_best names a metric of the evaluations, such as eval/loss: got {self.keep_best!r}.",
        )
        require(
            self.keep_best is None or self.eval_every is not None,
            "keep_best chooses among evaluations: give eval_every, such as --eval-every epoch.",
        )
        require(
            self.patience is None or self.keep_best is not None,
            f"patience counts evaluations without a better keep_best: got {self.patience} without one. Give it too, "
            f"such as --keep-best eval/loss.",
        )
        require(
            self.batch_size % self.num_microbatches == 0,
            f"num_microbatches must divide batch_size: got {self.num_microbatches} for {self.batch_size}; "
            f"{nearest_divisors(self.batch_size, self.num_microbatches)} do.",
        )
        first = self.first_batch_size or self.batch_size
        require(
            first <= self.batch_size and first % self.num_microbatches == 0,
            f"first_batch_size is at most batch_size, and num_microbatches divides it: got {first} for a batch_size of "
            f"{self.batch_size} and {self.num_microbatches} microbatches.",
        )
        require_rates(self, "batch_warmup_rate")
        last_rate = self.data.last_rate if self.data.last_row_length else 0.0
        require(
            first == self.batch_size or self.batch_warmup_rate + last_rate <= 1.0,
            "batches have grown before rows change length: batch_warmup_rate + data.last_rate is at most 1, got "
            f"{self.batch_warmup_rate} + {last_rate}.",
        )
        require(
            self.data.word_vectors is None or self.init_from is None,
            "the token embedding starts from data.word_vectors or from init_from: got both.",
        )
        require(
            self.distillation.initial_layers is None or (self.init_from, self.data.word_vectors) == (None, None),
            f"a model starts from one place: got distillation.initial_layers {self.distillation.initial_layers} with "
            f"init_from {self.init_from} and data.word_vectors {self.data.word_vectors}. Leave one out.",
        )
        tokens = self.batch_size * self.data.row_length
        require(
            tokens % (self.data.final_row_length * self.num_microbatches) == 0,
            f"a batch keeps its tokens when rows change length, in num_microbatches equal parts: {self.batch_size} "
            f"rows of {self.data.row_length} are {tokens} tokens, not a multiple of {self.num_microbatches} times "
            f"data.last_row_length {self.data.final_row_length}.",
        )
        if self.phases:
            self._check_phases()
        if self.init_from is None:  # or else the model is another's, and checked once that is known
            self.check_model_serves()
        require_finite(self)

    def _check_phases(self) -> None:
        names = {name for phase in self.phases for name in phase.changes}
        old = {"first_batch_size": self.first_batch_size, "data.last_row_length": self.data.last_row_length}
        if "masking_rate" in names:
            old["masking.last_rate"] = self.masking.last_rate
        check_phases(self.phases, len(self.data.sources), old)
        in_shares = self.phases[0].share is not None
        require(
            self.epochs is None or in_shares,
            f"the steps follow from epochs, so phases are shares of them: got epochs {self.epochs} and phases in steps "
            f"or tokens. Give every phase a share, or leave epochs out.",
        )
        check_objective(self.timeline, self.objective)
        if not in_shares:
            check_steps(self.timeline, self.steps)
        for stage in self.stages:
            at = f"phases.{stage.phase}"
            require(
                stage.batch_size % stage.num_microbatches == 0,
                f"num_microbatches must divide every batch: got {stage.num_microbatches} for {stage.batch_size} rows "
                f"in {at}. Give it {at}.num-microbatches, such as {nearest_divisors(stage.batch_size, 1)}.",
            )
            longest = max(self.data.buckets, default=0)
            require(
                longest < stage.row_length or not self.data.buckets,
                f"buckets are shorter than every row: got {longest} and rows of {stage.row_length} in {at}.",
            )
        require(
            "learning_rate" not in names or self.budget_minutes is None,
            f"phases' learning rates go by steps, and a run with budget_minutes ends by its clock: got budget_minutes "
            f"{self.budget_minutes}. Leave it out, or let optimizer.schedule say the learning rate.",
        )
        require(
            "learning_rate" not in names or self.optimizer.learning_rate > 0,
            f"phases' learning rates are shares of optimizer.learning_rate, which must be above 0: got "
            f"{self.optimizer.learning_rate}.",
        )

    def check_model_serves(self) -> None:
        """Raise ConfigError for rows that the model cannot read, or phases that change what it has not."""
        longest = max(self.row_lengths)
        require(
            self.model.position != "learned" or longest <= self.model.max_length,
            f"learned positions reach max_length: got data.row_length {longest} for model.max_length "
            f"{self.model.max_length}. Give rows of at most {self.model.max_length}"
            + (", or start from a model without a table of positions, such as ModernBERT." if self.init_from else "."),
        )
        if self.mesh.context > 1:
            lengths = *self.row_lengths, *self.data.buckets
            check_context(self.mesh.context, self.model, lengths, self.data.target_length)
        turned = [phase.rope_theta for phase in self.phases if phase.rope_theta is not None]
        require(
            not turned or self.model.position == "rope",
            f"rope_theta is of rotary positions: got phases with {', '.join(map(str, turned))}, and model.position "
            f"{self.model.position}.",
        )

    @property
    def trained_by(self) -> OptimizerConfig:
        """The optimizer's settings; beside adapters the encoder is frozen."""
        if not self.lora.rank:
            return self.optimizer
        return replace(self.optimizer, freeze=("encoder", *self.optimizer.freeze))

    @property
    def timeline(self) -> Timeline:
        """What `phases`, or else the settings that change by themselves, come to."""
        data = self.data
        phases = self.phases or phases_of_ramps(
            self.steps, self.batch_size, self.first_batch_size, self.batch_warmup_rate, data.last_row_length,
            data.last_rate,
        )
        own = Stage(
            self.steps, self.batch_size, data.row_length, num_microbatches=self.num_microbatches,
            masking_rate=Ramp(0, self.steps, *self.masking.rates), rope_theta=self.model.rope_theta,
            weights=data.weights, objective=self.objective,
        )  # fmt: skip
        return make_timeline(phases, self.steps, own)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The run's parts, within which all batches have one shape."""
        return tuple(stage for stage in self.timeline.stages if stage.start_step < stage.end_step)

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """T of each stage in turn; the last one's is that of evaluations too."""
        return tuple(stage.row_length for stage in self.timeline.stages)

    def after(self, step: int) -> "RunConfig":
        """These settings, with those of the model as they are after so many updates, where phases change them."""
        theta = self.timeline.stage_of(step - 1).rope_theta
        return self if theta == self.model.rope_theta else replace(self, model=replace(self.model, rope_theta=theta))
