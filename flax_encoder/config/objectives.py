"""The settings of what is learned: masks, labels, spans and the like, for objectives that have only a few."""

from dataclasses import dataclass
from typing import Literal

from flax_encoder.config.model import PoolingMode
from flax_encoder.config.rules import ShortRepr, require, require_finite, require_positive, require_rates


@dataclass(frozen=True, repr=False)
class SentencesConfig(ShortRepr):
    """sentence_order and next_sentence: how a text becomes two segments, and the weight of their loss."""

    unit: Literal["sentence", "word"] = "sentence"
    """A text is cut before any of its sentences, or of its words, but the first. A sentence ends with a token that ends
    in a full stop, a question mark or an exclamation mark. A text of one sentence only teaches its masked words."""
    weight: float = 1.0
    """Factor of the segments' loss; the loss of masked words has factor 1."""

    def __post_init__(self):
        require(self.weight > 0, f"sentences.weight must be above 0: got {self.weight}.")
        require_finite(self)


@dataclass(frozen=True, repr=False)
class AutoencoderConfig(ShortRepr):
    """autoencoder: the encoder makes one vector of a text with words left out; a decoder writes the text from it."""

    deletion_rate: float = 0.6
    """Share of a text's words that the encoder does not see (Wang et al., arXiv 2104.06979, section 3.1)."""
    pooling: PoolingMode = "mean"
    """How the vectors of a text's tokens become the one vector that the decoder sees."""
    is_tied: bool = True
    """The decoder's layers share the encoder's parameters, except in their attention to the vector."""

    def __post_init__(self):
        require(
            0 <= self.deletion_rate < 1,
            f"autoencoder.deletion_rate is a share below 1, since the decoder is given what is left: got "
            f"{self.deletion_rate}.",
        )
        require_finite(self)


def _check_spans(rate: float, mean_tokens: float | None, whose: str) -> None:
    require(0 < rate < 1, f"{whose}rate is a probability between 0 and 1: got {rate}.")
    require(mean_tokens is None or mean_tokens >= 1, f"{whose}mean_tokens is at least 1: got {mean_tokens}.")


@dataclass(frozen=True, repr=False)
class DenoiserConfig(ShortRepr):
    """One of several ways to cut spans out of a text; each document draws one."""

    share: float = 1.0
    """Share of the documents, relative to the other denoisers' shares."""
    rate: float = 0.15
    """Share of a document's tokens that are cut out, and that the decoder writes."""
    mean_tokens: float | None = 3.0
    """Mean number of tokens in a span; None cuts one span, the text's end, so that the encoder reads a prefix."""
    mode: str = ""
    """Text before what the encoder reads, such as [NLU], which tells it the denoiser."""

    def __post_init__(self):
        require(self.share > 0, f"a denoiser's share must be above 0: got {self.share}.")
        _check_spans(self.rate, self.mean_tokens, "a denoiser's ")
        require_finite(self)


UL2 = (
    DenoiserConfig(rate=0.15, mean_tokens=3.0, mode="[NLU]"),
    DenoiserConfig(rate=0.15, mean_tokens=8.0, mode="[NLU]"),
    DenoiserConfig(rate=0.25, mean_tokens=None, mode="[S2S]"),
    DenoiserConfig(rate=0.5, mean_tokens=3.0, mode="[NLG]"),
    DenoiserConfig(rate=0.5, mean_tokens=8.0, mode="[NLG]"),
    DenoiserConfig(rate=0.15, mean_tokens=64.0, mode="[NLG]"),
    DenoiserConfig(rate=0.5, mean_tokens=64.0, mode="[NLG]"),
)
"""The mixture of denoisers of UL2 (Tay et al., arXiv 2205.05131, table 1): two regular ones (R), a prefix (S) and four
extreme ones (X), with the modes of its published models."""


@dataclass(frozen=True, repr=False)
class SpansConfig(ShortRepr):
    """span_corruption: how spans are cut out of a text (Raffel et al., arXiv 1910.10683, section 3.1.4)."""

    rate: float = 0.15
    """Share of a document's tokens that are cut out, and that the decoder writes."""
    mean_tokens: float = 3.0
    """Mean number of tokens in a span."""
    denoisers: tuple[DenoiserConfig, ...] = ()
    """Several ways to cut, in place of rate and mean_tokens; each document draws one. A recipe lists them, as
    configs/ul2.py does; their settings are then options, such as --spans.denoisers.0.rate 0.2."""

    def __post_init__(self):
        _check_spans(self.rate, self.mean_tokens, "spans.")
        require(
            not self.denoisers or (self.rate, self.mean_tokens) == (0.15, 3.0),
            f"each of spans.denoisers has its own rate and mean_tokens: leave spans.rate at 0.15 and spans.mean_tokens "
            f"at 3.0 beside them; got {self.rate} and {self.mean_tokens}.",
        )
        require_finite(self)

    @property
    def mixture(self) -> tuple[DenoiserConfig, ...]:
        """The denoisers; if there are none, the one that rate and mean_tokens describe."""
        return self.denoisers or (DenoiserConfig(1.0, self.rate, self.mean_tokens),)


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
