"""The libraries that define metrics, imported when a score is made."""

from typing import Any

from flax_encoder.config import ConfigError


def _needed(name: str) -> ConfigError:
    return ConfigError(f"scores need {name}: pip install {name}")


def sklearn_metrics() -> Any:
    try:
        from sklearn import metrics
    except ImportError:
        raise _needed("scikit-learn") from None
    return metrics


def scipy_stats() -> Any:
    try:
        from scipy import stats
    except ImportError:
        raise _needed("scipy") from None
    return stats


def sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError:
        raise _needed("sacrebleu") from None
    return sacrebleu


def rouge_scorer() -> Any:
    try:
        from rouge_score import rouge_scorer
    except ImportError:
        raise _needed("rouge-score") from None
    return rouge_scorer


def seqeval_metrics() -> Any:
    try:
        from seqeval import metrics
    except ImportError:
        raise _needed("seqeval") from None
    return metrics
