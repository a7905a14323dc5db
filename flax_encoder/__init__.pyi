# The public names, by what they are for. Everything else may move.

# Settings
from .config import (
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
from .data.tokenizer_files import read_tokenizer

# Vectors of texts
from .embed import Embedder, load_embedder
from .exchange import export_run, import_folder

# Families and published weights
from .families import preset
from .generation import Generation, generate
from .hub import Pretrained, load_pretrained

# Modules and ops
from .nn.decoder import EncoderDecoder
from .nn.encoder import Encoder, EncoderLayer
from .nn.heads import ClassificationHead, MaskedLMHead
from .nn.recurrent import RecurrentLayer
from .objectives import Classifier, MaskedLM
from .objectives.loss import LossSum
from .ops.attention import attention
from .ops.linear import linear

# Trained runs
from .run import LoadedRun, load_run

# Training
from .training.optimizer import make_optimizer
from .training.schedule import share_of_peak
from .training.sharding import logical_axes, make_mesh, put_batch
from .training.step import TrainState, init_train_state, make_eval_step, make_train_step
from .training.transformations import gradient_point

# Tensors of published folders
from .weights import WeightsError, read_weights, write_weights

__all__ = [
    "ClassificationHead", "Classifier", "ConfigError", "DataConfig", "DecoderConfig", "Embedder", "Encoder",
    "EncoderConfig", "EncoderDecoder", "EncoderLayer", "Generation", "HeadConfig", "LoadedRun", "LossSum",
    "MaskedLM", "MaskedLMHead", "MaskingConfig", "MeshConfig", "OptimizerConfig", "Pretrained", "RecurrentLayer",
    "RunConfig", "TrainState", "WeightsError", "attention", "export_run", "generate", "gradient_point",
    "import_folder", "init_train_state", "linear", "load_embedder", "load_pretrained", "load_run", "logical_axes",
    "make_eval_step", "make_mesh", "make_optimizer", "make_train_step", "preset", "put_batch", "read_tokenizer",
    "read_weights", "share_of_peak", "write_weights",
]  # fmt: skip
