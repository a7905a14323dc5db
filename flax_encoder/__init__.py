"""Text encoders in JAX: packed, sharded, resumable, small enough to read.

The public names, by what they are for. Everything else may move.
"""

# Settings
from flax_encoder.config import (
    ConfigError,
    DataConfig,
    DecoderConfig,
    EncoderConfig,
    HeadConfig,
    MaskingConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
)

# Data
from flax_encoder.data.tokenizer_files import read_tokenizer

# Vectors of texts
from flax_encoder.embed import Embedder, load_embedder

# Families and published weights
from flax_encoder.families import preset
from flax_encoder.generate import Generation, generate
from flax_encoder.hub import Pretrained, export_run, import_folder, load_pretrained

# Modules and ops
from flax_encoder.nn.decoder import EncoderDecoder
from flax_encoder.nn.encoder import Encoder, EncoderLayer
from flax_encoder.nn.heads import ClassificationHead, MaskedLMHead
from flax_encoder.nn.recurrent import RecurrentLayer
from flax_encoder.objectives import Classifier, MaskedLM
from flax_encoder.objectives.loss import LossSum
from flax_encoder.ops.attention import attention
from flax_encoder.ops.linear import linear

# Trained runs
from flax_encoder.run import LoadedRun, load_run

# Training
from flax_encoder.training.optimizer import make_optimizer, make_schedule
from flax_encoder.training.sharding import logical_axes, make_mesh, put_batch
from flax_encoder.training.step import TrainState, init_train_state, make_eval_step, make_train_step

# Tensors of published folders
from flax_encoder.weights import WeightsError, read_weights, write_weights

__all__ = [
    "ClassificationHead", "Classifier", "ConfigError", "DataConfig", "DecoderConfig", "Embedder", "Encoder",
    "EncoderConfig", "EncoderDecoder", "EncoderLayer", "Generation", "HeadConfig", "LoadedRun", "LossSum", "MaskedLM",
    "MaskedLMHead", "MaskingConfig", "MeshConfig", "OptimizerConfig", "Pretrained", "RecurrentLayer", "RunConfig",
    "TrainState", "WeightsError", "attention", "export_run", "generate", "import_folder", "init_train_state", "linear",
    "load_embedder", "load_pretrained", "load_run", "logical_axes", "make_eval_step", "make_mesh", "make_optimizer",
    "make_schedule", "make_train_step", "preset", "put_batch", "read_tokenizer", "read_weights", "write_weights",
]  # fmt: skip
