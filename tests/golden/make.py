"""Make the golden folders beside this file: tiny models of each family with what torch computes of them.

    python -m tests.golden.make      # needs '.[parity]'; again only when a family or its case changes
"""

import pathlib
import shutil

import numpy as np
from safetensors.numpy import save_file

from tests.parity import FAMILIES, draw_batch, run_torch, torch_model

FOLDER = pathlib.Path(__file__).parent
TALL = {"layers": 2, "heads": 2}
# Family, task, and what its config must have at least, so that the family's own parts show.
CASES = (
    ("bert", "masked_lm", {**TALL, "type_vocab_size": 2, "tie_word_embeddings": True}),
    ("bert", "classification", TALL),
    ("roberta", "masked_lm", {**TALL, "pad_token_id": 1, "tie_word_embeddings": True}),
    ("xlm-roberta", "token_classification", TALL),
    ("albert", "masked_lm", {"layers": 4, "heads": 2, "num_hidden_groups": 2, "tie_word_embeddings": True}),
    ("distilbert", "classification", TALL),
    ("electra", "masked_lm", {**TALL, "embedding_size": 7}),
    ("electra", "discriminator", TALL),
    ("t5", None, {**TALL, "feed_forward_proj": "gated-gelu"}),
    ("modernbert", "masked_lm", {**TALL, "layer_types": ["full_attention", *["sliding_attention"] * 2]}),
    ("modernbert", "classification", {**TALL, "classifier_pooling": "mean"}),
    ("deberta-v2", "masked_lm",
     {**TALL, "conv_kernel_size": 3, "share_att_key": True, "position_buckets": 4, "tie_word_embeddings": True}),
    ("deberta-v2", "classification", {**TALL, "relative_attention": True, "share_att_key": False}),
    ("eurobert", "masked_lm", {**TALL, "num_key_value_heads": 1, "tie_word_embeddings": False}),
    ("eurobert", "classification", {**TALL, "classifier_pooling": "late"}),
)  # fmt: skip


def find_seed(family: str, wanted: dict) -> int:
    """The first whose config has what is wanted and is at most 12 wide."""
    _, draw, _ = FAMILIES[family]
    for seed in range(10_000):
        config = draw(np.random.default_rng([seed, *family.encode()]))
        heads = config.get("num_attention_heads", config.get("n_heads", config.get("num_heads")))
        layers = config.get("num_hidden_layers", config.get("n_layers", config.get("num_layers")))
        width = config.get("hidden_size", config.get("dim", config.get("d_model")))
        has = config | {"heads": min(heads, wanted["heads"]), "layers": min(layers, wanted["layers"])}
        if width <= 12 and all(has.get(name) == value for name, value in wanted.items()):
            return seed
    raise ValueError(f"no config of {family} has {wanted}")


def main() -> None:
    for family, task, wanted in CASES:
        seed = find_seed(family, wanted)
        folder = FOLDER / f"{family}-{task or 'encoder'}"
        shutil.rmtree(folder, ignore_errors=True)
        model, r = torch_model(family, task, seed)
        inputs, labels = draw_batch(model, task, r)
        outputs, loss, gradients = run_torch(model, inputs, labels)
        model.save_pretrained(folder)
        parts = {"input": inputs, "label": labels, "output": outputs, "gradient": gradients}
        flat = {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}
        flat["loss"] = np.array(loss, np.float32)
        save_file({name: np.ascontiguousarray(value) for name, value in flat.items()}, folder / "reference.safetensors")
        size = sum(p.stat().st_size for p in folder.iterdir())
        print(f"{folder.name}: seed {seed}, {size:,} bytes")


if __name__ == "__main__":
    main()
