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
