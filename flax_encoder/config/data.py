"""The settings of data: where text comes from and how it becomes rows."""

from dataclasses import dataclass
from typing import Literal

from flax_encoder.config.rules import (
    ShortRepr,
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
    packing: Literal["best-fit", "mixed", "one-per-row", "concatenate"] = "best-fit"
    """best-fit fills rows with whole documents; mixed does so with documents of all lengths in every row, which are a
    little less full; concatenate joins all documents and cuts every row_length tokens; one-per-row does not pack."""
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
