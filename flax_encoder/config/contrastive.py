"""The settings of contrastive learning."""

from dataclasses import dataclass
from typing import Literal

from flax_encoder.config.model import PoolingMode
from flax_encoder.config.rules import ShortRepr, require, require_finite, require_positive


@dataclass(frozen=True, repr=False)
class ContrastiveConfig(ShortRepr):
    """How texts that belong together are drawn together, and others apart."""

    pooling: PoolingMode = "mean"
    """How the vectors of a text's tokens become one vector; vectors are compared by their cosine."""
    loss: Literal["auto", "infonce", "cosent", "margin_mse"] = "auto"
    """infonce finds each anchor's positive among the texts of the batch; cosent puts the cosines of pairs in the order
    of the pairs' numbers; margin_mse makes the anchor nearer to its positive than to its negative by the number that
    the three have, such as the difference of a reranker's scores. auto takes the one that the numbers are of."""
    temperature: float = 0.05
    """Cosines are divided by it before the softmax (van den Oord et al., arXiv 1807.03748)."""
    learn_temperature: bool = False
    """Learn the temperature, starting from `temperature` (Radford et al., arXiv 2103.00020)."""
    symmetric: bool = False
    """Also find each anchor among all anchors from its positive; the two losses are averaged."""
    widths: tuple[int, ...] = ()
    """Widths of vectors, such as 384 128 32: the loss is the mean over vectors that are cut to each of these
    (Kusupati et al., arXiv 2205.13147). Empty: whole vectors alone."""
    query_prompt: str = ""
    """Put before every anchor, such as "query: "."""
    document_prompt: str = ""
    """Put before every text that is not an anchor, such as "passage: "."""

    def __post_init__(self):
        require_positive(self, "temperature")
        require(
            all(width > 0 for width in self.widths) and len(set(self.widths)) == len(self.widths),
            f"contrastive.widths are different numbers above 0: got {self.widths}.",
        )
        require_finite(self)

    @property
    def prompts(self) -> tuple[str, str]:
        """Of the anchors, and of the other texts."""
        return self.query_prompt, self.document_prompt
