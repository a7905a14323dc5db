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
from .data.tokens.tokenizer_files import read_tokenizer

# Families and published weights
from .families import preset

# Modules and ops
from .nn.decoder import EncoderDecoder
from .nn.encoder import Encoder, EncoderLayer
from .nn.generation import Generation, generate
from .nn.heads import ClassificationHead, MaskedLMHead
from .nn.recurrent import RecurrentLayer
from .ops.attention import attention, attention_weights
from .ops.linear import linear
from .published.load import Pretrained, load_pretrained

# Tensors of published folders
from .published.weights import WeightsError, read_weights, write_weights

# Vectors of texts
from .runs.embed import Embedder, load_embedder
from .runs.exchange import export_run, import_folder

# Trained runs
from .runs.load import load, load_run
from .runs.loaded import LoadedRun
from .tasks import TASKS, Classifier, MaskedLM, Task
from .tasks.loss import LossSum

# Training
from .training.optimizer import make_optimizer
from .training.schedule import share_of_peak
from .training.sharding import logical_axes, make_mesh, put_batch
from .training.step import TrainState, init_train_state, make_eval_step, make_train_step
from .training.transformations import gradient_point

__all__ = [
    "TASKS", "ClassificationHead", "Classifier", "ConfigError", "DataConfig", "DecoderConfig", "Embedder", "Encoder",
    "EncoderConfig", "EncoderDecoder", "EncoderLayer", "Generation", "HeadConfig", "LoadedRun", "LossSum",
    "MaskedLM", "MaskedLMHead", "MaskingConfig", "MeshConfig", "OptimizerConfig", "Pretrained", "RecurrentLayer",
    "RunConfig", "Task", "TrainState", "WeightsError", "attention",
    "attention_weights", "export_run", "generate", "gradient_point",
    "import_folder", "init_train_state", "linear", "load", "load_embedder", "load_pretrained", "load_run",
    "logical_axes", "make_eval_step", "make_mesh", "make_optimizer", "make_train_step", "preset", "put_batch",
    "read_tokenizer", "read_weights", "share_of_peak", "write_weights",
]  # fmt: skip
