"""The settings of contrastive learning."""

from dataclasses import dataclass
from typing import Literal

from flax_encoder.config.model import PoolingMode
from flax_encoder.config.rules import ShortRepr, require, require_finite, require_positive


@dataclass(frozen=True, repr=False)
class ContrastiveConfig(ShortRepr):
    """contrastive: how vectors of texts that belong together are drawn together, and others apart."""

    pooling: PoolingMode = "mean"
    """How the vectors of a text's tokens become one vector; vectors are compared by their cosine."""
    loss: Literal["auto", "infonce", "cosent", "margin_mse"] = "auto"
    """infonce finds each anchor's positive among the texts of the batch; cosent puts the cosines of pairs in the order
    of the pairs' numbers; margin_mse makes the anchor nearer to its positive than to its negative by a row's number,
    such as the difference of a reranker's scores. auto chooses by the data: without numbers infonce, for pairs with a
    number cosent, for three texts with a number margin_mse."""
    temperature: float = 0.05
    """Cosines are divided by it before the loss (van den Oord et al., arXiv 1807.03748)."""
    learn_temperature: bool = False
    """Learn the temperature, starting from `temperature` (Radford et al., arXiv 2103.00020)."""
    symmetric: bool = False
    """infonce: also find each positive's anchor among all anchors, and average the two losses."""
    widths: tuple[int, ...] = ()
    """Widths to which vectors can be cut, such as 384 128 32: the loss is the mean over these widths (Kusupati et al.,
    arXiv 2205.13147). Empty learns whole vectors only."""
    query_prompt: str = ""
    """Text that is put before every anchor, such as "query: "."""
    document_prompt: str = ""
    """Text that is put before every text that is no anchor, such as "passage: "."""

    def __post_init__(self):
        require_positive(self, "temperature")
        require(
            all(width > 0 for width in self.widths) and len(set(self.widths)) == len(self.widths),
            f"contrastive.widths are different numbers above 0: got {self.widths}.",
        )
        require_finite(self)

    @property
    def prompts(self) -> tuple[str, str]:
        """The prompt of anchors, and the prompt of other texts."""
        return self.query_prompt, self.document_prompt
