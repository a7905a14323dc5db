"""sentence-transformers' part of test_sentence_parity.py, for a Python that has it: makes folders, and encodes.

    python tests/peer_sentences.py make DIR         # a folder a case under DIR, each with its vectors, want.npz
    python tests/peer_sentences.py encode DIR...    # vectors of folders that others wrote, got.npz in each
"""

import pathlib
import sys

TEXTS = ["hello world", "", " Hello  the fox ", "quick brown " * 9, "zzz [MASK] A", "a b\tc\n"]
PROMPTS = {"query": "quick ", "document": "", "long": "the brown fox "}
WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "hello", "world", "fox", "Hello",
    "quick", "brown", "the", "##z",
]  # fmt: skip
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


def encoder(folder):
    import torch
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20,
        max_position_embeddings=26, initializer_range=0.5,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"unk": "[UNK]", "pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{role}_token": name for role, name in names.items()}
    ).save_pretrained(folder)


def make(folder):
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Normalize, Pooling, Transformer

    encoder(folder / "encoder")

    def case(name, pooling, *layers, length=None, text=None, **options):
        torch.manual_seed(1)
        first = Transformer(str(folder / "encoder"), **(text or {}))
        model = SentenceTransformer(
            modules=[first, pooling, *(layer() for layer in layers)], prompts=dict(PROMPTS), device="cpu", **options
        )
        if length:
            model.max_seq_length = length
        model.save(str(folder / name))
        encode(folder / name, "want.npz")

    for mode in MODES:
        case(mode, Pooling(12, mode), Normalize)
        case(f"{mode}-no-prompt", Pooling(12, mode, include_prompt=False), length=12)
    case("several", Pooling(12, ["mean", "cls", "max"]), default_prompt_name="query")
    case("in-order", Pooling(12, ["cls", "mean"]), length=7)
    case(
        "layers", Pooling(12, "mean"), lambda: Dense(12, 7), lambda: LayerNorm(7),
        lambda: Dense(7, 5, bias=False, activation_function=torch.nn.GELU(), use_residual=True),
        lambda: Dense(5, 5, activation_function=torch.nn.Identity(), use_residual=True), Normalize,
    )  # fmt: skip
    case("dim", Pooling(12, "mean"), Normalize, truncate_dim=4)
    case("lower", Pooling(12, "mean"), text={"do_lower_case": True})


def encode(folder, file="got.npz"):
    import numpy as np
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    vectors = {name: model.encode(TEXTS, prompt_name=name, show_progress_bar=False) for name in model.prompts}
    vectors["default"] = model.encode(TEXTS, show_progress_bar=False)
    np.savez(folder / file, **vectors)


if __name__ == "__main__":
    command, *folders = sys.argv[1:]
    for path in map(pathlib.Path, folders):
        make(path) if command == "make" else encode(path)
