"""Every setting of a run, its default, and the rules it must satisfy, in one tree of frozen dataclasses.

`configs/NAME.py` builds a `RunConfig`; `train.py` turns the same tree into typed command-line overrides; a
checkpoint stores it as JSON. The first lines of a field's comment are its `--help`.
"""

from flax_encoder.config.contrastive import ContrastiveConfig
from flax_encoder.config.data import DataConfig
from flax_encoder.config.distillation import DistillationConfig
from flax_encoder.config.mesh import MeshConfig
from flax_encoder.config.model import (
    FREE_OF_PARAMETERS,
    Activation,
    DecoderConfig,
    EncoderConfig,
    GenerationConfig,
    HeadConfig,
)
from flax_encoder.config.objectives import (
    UL2,
    AutoencoderConfig,
    DenoiserConfig,
    GeneratorConfig,
    LabelsConfig,
    MaskingConfig,
    SentencesConfig,
    SpansConfig,
)
from flax_encoder.config.optimizer import LoraConfig, OptimizerConfig
from flax_encoder.config.phases import Phase, Ramp, Stage
from flax_encoder.config.rules import ConfigError, differences, from_dict, to_dict
from flax_encoder.config.run import RunConfig

__all__ = [
    "FREE_OF_PARAMETERS", "UL2", "Activation", "AutoencoderConfig", "ConfigError", "ContrastiveConfig", "DataConfig",
    "DecoderConfig", "DenoiserConfig", "DistillationConfig", "EncoderConfig", "GenerationConfig", "GeneratorConfig",
    "HeadConfig", "LabelsConfig", "LoraConfig", "MaskingConfig", "MeshConfig", "OptimizerConfig", "Phase", "Ramp",
    "RunConfig", "SentencesConfig", "SpansConfig", "Stage", "differences", "from_dict", "to_dict",
]  # fmt: skip
