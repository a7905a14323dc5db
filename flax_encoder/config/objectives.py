"""The settings of objectives with few of them."""

from dataclasses import dataclass
from typing import Literal

from flax_encoder.config.model import PoolingMode
from flax_encoder.config.rules import ShortRepr, require, require_finite


@dataclass(frozen=True, repr=False)
class SentencesConfig(ShortRepr):
    """sentence_order and next_sentence: how a text becomes two segments, and what their order counts."""

    unit: Literal["sentence", "word"] = "sentence"
    """A text is cut before any of its sentences, or of its words, but the first. Sentences end with a token that ends
    with a full stop, a question mark or an exclamation mark; a text of one is learned by its masked words alone."""
    weight: float = 1.0
    """Factor of the two segments' loss beside the masked words'."""

    def __post_init__(self):
        require(self.weight > 0, f"sentences.weight must be above 0: got {self.weight}.")
        require_finite(self)


@dataclass(frozen=True, repr=False)
class AutoencoderConfig(ShortRepr):
    """autoencoder: a text with words missing goes in, one vector comes out, and a decoder writes the text from it."""

    deletion_rate: float = 0.6
    """Share of the words that are left out of what the encoder reads (Wang et al., arXiv 2104.06979, section 3.1)."""
    pooling: PoolingMode = "mean"
    """How the vectors of a text's tokens become the one that the decoder is given."""
    is_tied: bool = True
    """The decoder's layers have the encoder's parameters, but for their attention to the vector."""

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
    """One way to cut spans out of a text, of several among which each document draws."""

    share: float = 1.0
    """Of the documents, relative to the other denoisers' shares."""
    rate: float = 0.15
    """Share of a document's tokens that are cut out, and written by the decoder."""
    mean_tokens: float | None = 3.0
    """Tokens of a span, on average; None is one span, the text's end, so that the rest is a prefix to go on from."""
    mode: str = ""
    """What stands before the text that the encoder reads, such as [NLU], so that it knows the denoiser."""

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
    """Share of a document's tokens that are cut out, and written by the decoder."""
    mean_tokens: float = 3.0
    """Tokens of a span, on average."""
    denoisers: tuple[DenoiserConfig, ...] = ()
    """Several ways to cut, in place of the one that rate and mean_tokens say; each document draws one. A recipe has
    them, as configs/ul2.py has UL2's; their settings then are options, such as --spans.denoisers.0.rate 0.2."""

    def __post_init__(self):
        _check_spans(self.rate, self.mean_tokens, "spans.")
        require(
            not self.denoisers or (self.rate, self.mean_tokens) == (0.15, 3.0),
            f"spans.rate and spans.mean_tokens are of a single denoiser: leave them at 0.15 and 3.0 beside "
            f"spans.denoisers, which have their own; got {self.rate} and {self.mean_tokens}.",
        )
        require_finite(self)

    @property
    def mixture(self) -> tuple[DenoiserConfig, ...]:
        """The denoisers; without any, the one that rate and mean_tokens say."""
        return self.denoisers or (DenoiserConfig(1.0, self.rate, self.mean_tokens),)
