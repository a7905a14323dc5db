"""The settings of objectives that have only a few."""

from dataclasses import dataclass
from typing import Literal

from flax_encoder.config.model import PoolingMode
from flax_encoder.config.rules import ShortRepr, require, require_finite


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
