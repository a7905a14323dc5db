"""The settings of the optimizer, its learning rate, and low-rank adapters."""

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
            self.schedule == "wsd" or (self.decay_shape, self.decay_rate) == ("linear", 0.2),
            f"decay_rate and decay_shape need schedule wsd: leave them at 0.2 and linear with {self.schedule}; got "
            f"{self.decay_rate} and {self.decay_shape}.",
        )
        require(
            self.schedule != "constant" or self.final_rate == 0,
            f"constant never falls: leave final_rate at 0, or give another schedule; got {self.final_rate}.",
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
            f"lora.alpha and lora.targets need adapters, a lora.rank above 0: got {self.alpha} and {self.targets} "
            f"with rank 0.",
        )
