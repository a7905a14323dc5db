"""sentence-transformers' folders: what they say of texts, of pooling, and of what follows it (arXiv 1908.10084).

Such a folder is a published encoder with modules.json, which lists its parts: a Transformer, in the folder itself or in
one of its own, a Pooling, and whatever is done to the pooled vectors. Folders of all versions up to 6 are read; what is
written opens in all of them. A setting that would change the vectors and is not understood is an error that names it.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from flax_encoder.config import ConfigError
from flax_encoder.config.model import Activation, PoolingMode
from flax_encoder.data.tokens.tokenizer_files import SENTENCE_FILES, SETTINGS_READ
from flax_encoder.families.fields import IGNORED
from flax_encoder.published.weights import read_weights, write_weights

MODULES = "modules.json"
TEXT_FILES = SENTENCE_FILES
PROMPTS_FILE = "config_sentence_transformers.json"

# Older folders have a flag a mode. Several that are set are concatenated in this order.
_FLAGS: dict[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max", "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}  # fmt: skip
POOLING_MODES = tuple(_FLAGS.values())
# What the first versions called a Transformer, by its family.
_TRANSFORMERS = ("Transformer", "BERT", "RoBERTa", "DistilBERT", "CamemBERT", "ALBERT", "XLMRoBERTa", "XLNet")
_ACTIVATIONS: dict[str, Activation] = {
    "Identity": "identity", "Tanh": "tanh", "ReLU": "relu", "ReLU6": "relu6", "GELU": "gelu", "SiLU": "silu",
    "Sigmoid": "sigmoid", "Mish": "mish", "LeakyReLU": "leaky_relu", "ELU": "elu", "CELU": "celu", "SELU": "selu",
    "Softplus": "softplus", "Softsign": "softsign", "LogSigmoid": "log_sigmoid", "Hardtanh": "hard_tanh",
    "Hardsigmoid": "hard_sigmoid", "Hardswish": "hard_swish", "Tanhshrink": "tanh_shrink",
}  # fmt: skip
# Settings of a Transformer with the values under which they change no vector; None takes any.
_HARMLESS: dict[str, tuple | None] = {
    "transformer_task": (None, "feature-extraction"), "module_output_name": (None, "token_embeddings"),
    "query_length": (None,), "document_length": (None,), "query_expansion": (None,), "unpad_inputs": None,
    "cache_dir": None, "backend": None, "tokenizer_name_or_path": (None,),
}  # fmt: skip
# Likewise of what it hands on to transformers' model, config and tokenizer.
_HARMLESS_ARGUMENTS = {
    "model": {"torch_dtype", "dtype", "attn_implementation", "add_pooling_layer", "trust_remote_code",
              "use_safetensors", "low_cpu_mem_usage", "device_map", "unpad_inputs", "use_memory_efficient_attention"},
    "config": {"trust_remote_code", "unpad_inputs", "use_memory_efficient_attention", *IGNORED},
    "tokenizer": {"trust_remote_code", "use_fast", "padding_side", "clean_up_tokenization_spaces"},
}  # fmt: skip
# And of how it fetches a folder, which is here.
_OF_FETCHING = {"revision", "code_revision", "token", "use_auth_token", "cache_dir", "local_files_only",
                "force_download", "proxies"}  # fmt: skip
_TEXT_KEPT = {"padding": None, "truncation": (True, "longest_first", "only_first"), "return_tensors": None,
              "add_special_tokens": (True,)}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Layer:
    """What is done to pooled vectors, x [N, D]."""

    kind: Literal["Dense", "LayerNorm", "Normalize"]
    activation: Activation = "identity"
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """Dense: kernel [D, E], with bias [E] and residual [D, E] or not. LayerNorm: scale and bias [D]."""
    adds_input: bool = False
    """Dense: the input is added to what comes out, through `residual` where there is one."""


NORMALIZE = Layer("Normalize")


@dataclasses.dataclass(frozen=True)
class SentenceSettings:
    """What a sentence-transformers folder says, but for its encoder and tokenizer."""

    pooling: tuple[PoolingMode, ...] = ("mean",)
    """Several are concatenated."""
    include_prompt: bool = True
    """Whether the prompt's tokens are pooled too."""
    layers: tuple[Layer, ...] = ()
    max_tokens: int | None = None
    """The longest text, special tokens included; None is what the tokenizer and the model say."""
    truncation_side: Literal["left", "right"] | None = None
    """Where longer texts are cut; None is what the tokenizer says."""
    do_lower_case: bool = False
    tokenizer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What `read_tokenizer` takes of the folder beside its tokenizer_config.json."""
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Name -> what is put before a text."""
    default_prompt_name: str | None = None
    truncate_dim: int | None = None
    """Features of a vector that are kept, the first; None keeps all."""
    similarity_fn_name: str | None = None
    """How vectors are meant to be compared; kept for who reads the folder next."""
    encoder_path: str = ""
    """Where in the folder the encoder is."""


def is_sentence_folder(folder: str | pathlib.Path) -> bool:
    """Whether it has modules.json: a folder of sentence-transformers, or a run that was imported from one."""
    return (pathlib.Path(folder) / MODULES).is_file()


def encoder_folder(folder: str | pathlib.Path) -> pathlib.Path:
    """Where the config, the weights and the tokenizer of a folder are: in itself, or where modules.json says.

    Raises:
      ConfigError: as `read_sentence_settings`.
    """
    folder = pathlib.Path(folder)
    return folder / read_sentence_settings(folder).encoder_path if is_sentence_folder(folder) else folder


def read_sentence_settings(folder: str | pathlib.Path) -> SentenceSettings:
    """What a folder with modules.json says.

    Raises:
      ConfigError: a file that is no JSON, a module or a setting that is not understood, or a prompt that is not there;
        it names the file.
    """
    folder = pathlib.Path(folder)
    path = folder / MODULES
    modules = _json(path, list)
    if not all(isinstance(m, dict) and {type(m.get(name)) for name in ("type", "path")} == {str} for m in modules):
        raise ConfigError(f"{path} must be a list of modules, each with a type and a path.")
    kinds = [_kind(module["type"]) for module in modules]
    served = ("Dense", "LayerNorm", "Normalize", "Dropout")
    if kinds[:2] != ["Transformer", "Pooling"] or not {*kinds[2:]} <= {*served}:
        raise ConfigError(
            f"{path} must list sentence_transformers' Transformer, Pooling and then any of {', '.join(served)}: got "
            f"{', '.join(module['type'] for module in modules) or 'none'}."
        )
    paths = [_inside(folder, module["path"]) for module in modules]
    pooling, include_prompt = _read_pooling(paths[1] / "config.json")
    layers = [_read_layer(kind, own) for kind, own in zip(kinds[2:], paths[2:], strict=True) if kind != "Dropout"]
    return SentenceSettings(
        pooling=pooling, include_prompt=include_prompt, layers=tuple(layers), encoder_path=modules[0]["path"],
        **_read_text_settings(paths[0]), **_read_prompts(folder / PROMPTS_FILE),
    )  # fmt: skip


def _kind(name: str) -> str:
    """A module's kind by the name of its class; that of another library's class is the whole name."""
    library, kind = name.partition(".")[0], name.rpartition(".")[2]
    if library != "sentence_transformers":
        return name
    return "Transformer" if kind in _TRANSFORMERS else kind


def _inside(folder: pathlib.Path, path: str) -> pathlib.Path:
    if pathlib.PurePath(path).is_absolute() or ".." in pathlib.PurePath(path).parts:
        raise ConfigError(f"{folder / MODULES}: a module's path must lie in the folder: got {path!r}.")
    return folder / path


def _read_pooling(path: pathlib.Path) -> tuple[tuple[PoolingMode, ...], bool]:
    content = _json(path)
    modes = content.get("pooling_mode") or [mode for flag, mode in _FLAGS.items() if content.get(flag)] or "mean"
    modes = [modes] if isinstance(modes, str) else modes
    unknown = [name for name in content if name.startswith("pooling_mode_") and name not in _FLAGS and content[name]]
    if not isinstance(modes, list) or not {*map(str, modes)} <= {*POOLING_MODES} or unknown:
        raise ConfigError(f"{path}: pooling must be of {', '.join(POOLING_MODES)}: got {unknown or modes!r}.")
    return tuple(modes), bool(content.get("include_prompt", True))


def _read_layer(kind: str, folder: pathlib.Path) -> Layer:
    path = folder / "config.json"
    content = _json(path)
    for name in ("module_input_name", "module_output_name"):
        if content.get(name) not in (None, "sentence_embedding"):
            raise ConfigError(f"{path}: {kind} must be of the pooled vectors: got {name} {content[name]!r}.")
    if kind == "Normalize":
        return NORMALIZE
    tensors = {name: np.asarray(tensor, np.float32) for name, tensor in read_weights(folder).items()}
    names = {"linear.weight": "kernel", "linear.bias": "bias", "residual.weight": "residual"}
    names = {"norm.weight": "scale", "norm.bias": "bias"} if kind == "LayerNorm" else names
    arrays = {ours: tensors[theirs].T for theirs, ours in names.items() if theirs in tensors}
    needed = {"scale" if kind == "LayerNorm" else "kernel"} | ({"bias"} if content.get("bias", True) else set())
    if not {*tensors} <= {*names} or not needed <= {*arrays}:
        raise ConfigError(f"{folder}: {kind} must have the tensors {', '.join(names)}: got {', '.join(tensors)}.")
    if kind == "LayerNorm":
        return Layer("LayerNorm", arrays=arrays)
    activation = content.get("activation_function", "torch.nn.modules.activation.Tanh")
    name = str(activation).rpartition(".")[2]
    if not str(activation).startswith("torch.") or name not in _ACTIVATIONS:
        raise ConfigError(
            f"{path}: activation_function must be one of torch.nn's {', '.join(_ACTIVATIONS)}: got {activation!r}."
        )
    return Layer("Dense", _ACTIVATIONS[name], arrays, bool(content.get("use_residual")))


def _read_text_settings(folder: pathlib.Path) -> dict[str, Any]:
    """max_tokens, truncation_side, do_lower_case and tokenizer of a Transformer."""
    path = next((folder / name for name in TEXT_FILES if _json(folder / name)), folder / TEXT_FILES[0])
    content = _json(path)
    lengths = [content.pop("max_seq_length", None)]
    settings = {"do_lower_case": bool(content.pop("do_lower_case", False))}
    handed_on = {}
    for what, names in {
        "tokenizer": ("tokenizer_args", "processor_kwargs"), "model": ("model_args", "model_kwargs"),
        "config": ("config_args", "config_kwargs"),
    }.items():  # fmt: skip
        given = {k: v for name in names for k, v in _member(path, content, name).items()}
        handed_on[what] = {k: v for k, v in given.items() if k not in _HARMLESS_ARGUMENTS[what] | _OF_FETCHING}
    lengths.append(handed_on["tokenizer"].pop("model_max_length", None))
    settings["truncation_side"] = handed_on["tokenizer"].pop("truncation_side", None)
    settings["tokenizer"] = {
        name: handed_on["tokenizer"].pop(name) for name in SETTINGS_READ if name in handed_on["tokenizer"]
    }
    processing = _member(path, content, "processing_kwargs")
    for name in ("common", "text"):
        given = _member(path, processing, name)
        lengths.append(given.pop("max_length", None))
        handed_on[f"processing_kwargs.{name}"] = {k: v for k, v in given.items() if not _is_served(k, v, _TEXT_KEPT)}
    handed_on["processing_kwargs"] = processing
    modalities = _member(path, content, "modality_config")
    if modalities and ("message" in modalities or "text" not in modalities or not _reads_hidden(modalities["text"])):
        raise ConfigError(f"{path}: texts must go to the model as they are: got modality_config {modalities}.")
    handed_on[""] = {k: v for k, v in content.items() if not _is_served(k, v, _HARMLESS)}
    if odd := [f"{what}{'.' * bool(what)}{name}" for what, given in handed_on.items() for name in given]:
        raise ConfigError(f"{path} has settings that are not understood: {', '.join(odd)}.")
    length = next((n for n in reversed(lengths) if n is not None), None)  # the latter go first
    if length is not None and not (type(length) is int and length >= 3):
        raise ConfigError(f"{path}: max_seq_length must be a number of at least 3 tokens: got {length!r}.")
    if settings["truncation_side"] not in (None, "left", "right"):
        raise ConfigError(f"{path}: truncation_side must be left or right: got {settings['truncation_side']!r}.")
    return settings | {"max_tokens": length}


def _is_served(name: str, value: Any, served: Mapping[str, tuple | None]) -> bool:
    return name in served and (served[name] is None or value in served[name])


def _reads_hidden(text: Any) -> bool:
    return isinstance(text, dict) and text.get("method_output_name") == "last_hidden_state"


def _member(path: pathlib.Path, content: dict[str, Any], name: str) -> dict[str, Any]:
    """Takes an object out of `content`; none is empty."""
    value = content.pop(name, None) or {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {name} must be an object: got {type(value).__name__}.")
    return dict(value)


def _read_prompts(path: pathlib.Path) -> dict[str, Any]:
    content = _json(path)
    prompts, name = content.get("prompts") or {}, content.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(p, str | None) for p in prompts.values()):
        raise ConfigError(f"{path}: prompts must be texts by name: got {prompts!r}.")
    if name is not None and name not in prompts:
        raise ConfigError(f"{path}: default_prompt_name must be one of prompts: got {name!r} of {[*prompts]}.")
    dim = content.get("truncate_dim")
    if dim is not None and not (type(dim) is int and dim > 0):
        raise ConfigError(f"{path}: truncate_dim must be a number of features above 0: got {dim!r}.")
    return {
        "prompts": {key: prompt or "" for key, prompt in prompts.items()}, "default_prompt_name": name,
        "truncate_dim": dim, "similarity_fn_name": content.get("similarity_fn_name"),
    }  # fmt: skip


def _json(path: pathlib.Path, kind: type = dict) -> Any:
    try:
        value = json.loads(path.read_text("utf-8")) if path.is_file() else kind()
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON: {error}.") from None
    if not isinstance(value, kind):
        raise ConfigError(f"{path} must hold a JSON {kind.__name__}: got {type(value).__name__}.")
    return value


def write_sentence_settings(folder: str | pathlib.Path, settings: SentenceSettings, embed_dim: int) -> None:
    """Write the settings beside an encoder that lies in `folder` itself, as every version of the library reads them.

    A pooling of several modes in an order that older versions have no words for opens in version 6 alone.

    Args:
      embed_dim: D, of the encoder's vectors.
    """
    folder = pathlib.Path(folder)
    kinds = ["Transformer", "Pooling", *(layer.kind for layer in settings.layers)]
    paths = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds) if i)]
    in_order = tuple(mode for mode in POOLING_MODES if mode in settings.pooling)
    pooling: dict[str, Any] = {"word_embedding_dimension": embed_dim}
    if settings.pooling == in_order:
        pooling |= {flag: mode in settings.pooling for flag, mode in _FLAGS.items()}
    else:
        pooling |= {"pooling_mode": list(settings.pooling)}
    side = {"truncation_side": settings.truncation_side} if settings.truncation_side else {}
    tokenizer = dict(settings.tokenizer) | side
    files: dict[str, Any] = {
        MODULES: [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
        ],
        f"{paths[1]}/config.json": pooling | {"include_prompt": settings.include_prompt},
        TEXT_FILES[0]: {"max_seq_length": settings.max_tokens, "do_lower_case": settings.do_lower_case}
        | ({"tokenizer_args": tokenizer} if tokenizer else {}),
        PROMPTS_FILE: {
            "prompts": dict(settings.prompts), "default_prompt_name": settings.default_prompt_name,
            "similarity_fn_name": settings.similarity_fn_name,
        } | ({"truncate_dim": settings.truncate_dim} if settings.truncate_dim else {}),
    }  # fmt: skip
    for path, layer in zip(paths[2:], settings.layers, strict=True):
        files |= {f"{path}/config.json": _layer_config(layer)} if layer.kind != "Normalize" else {}
        if layer.arrays:
            names = {"kernel": "linear.weight", "residual": "residual.weight", "scale": "norm.weight"}
            names["bias"] = "norm.bias" if layer.kind == "LayerNorm" else "linear.bias"
            write_weights(folder / path, {names[ours]: array.T for ours, array in layer.arrays.items()})
    for name, value in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value, indent=1) + "\n", "utf-8")


def _layer_config(layer: Layer) -> dict[str, Any]:
    if layer.kind == "LayerNorm":
        return {"dimension": len(layer.arrays["scale"])}
    size, out_size = layer.arrays["kernel"].shape
    name = next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == layer.activation)
    where = "linear" if name == "Identity" else "activation"
    content = {
        "in_features": size, "out_features": out_size, "bias": "bias" in layer.arrays,
        "activation_function": f"torch.nn.modules.{where}.{name}",
    }  # fmt: skip
    return content | ({"use_residual": True} if layer.adds_input else {})
