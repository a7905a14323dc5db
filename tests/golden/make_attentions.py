"""Make attentions.npz beside this file: what torch's models of the golden folders attend to.

    python tests/golden/make_attentions.py      # needs torch and transformers; again only when a folder changes
"""

import pathlib

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

FOLDER = pathlib.Path(__file__).parent
NAMES = (
    "albert-masked_lm", "bert-masked_lm", "deberta-v2-masked_lm", "eurobert-masked_lm", "modernbert-masked_lm",
    "roberta-masked_lm", "t5-encoder",
)  # fmt: skip


def main() -> None:
    found = {}
    for name in NAMES:
        config = transformers.AutoConfig.from_pretrained(FOLDER / name)
        make = transformers.T5EncoderModel if config.model_type == "t5" else transformers.AutoModel
        model = make.from_pretrained(FOLDER / name, attn_implementation="eager").eval()
        flat = load_file(FOLDER / name / "reference.safetensors")
        inputs = {key.removeprefix("input/"): torch.tensor(x) for key, x in flat.items() if key.startswith("input/")}
        with torch.no_grad():
            attentions = model(**inputs, output_attentions=True).attentions
        found[name] = np.stack([x.numpy() for x in attentions]).astype(np.float32)
        print(name, found[name].shape, sorted(inputs))
    np.savez_compressed(FOLDER / "attentions.npz", **found)


if __name__ == "__main__":
    main()
