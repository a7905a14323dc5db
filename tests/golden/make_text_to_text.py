"""Two tiny T5 folders, of both versions, with what transformers computes and writes with them.

    pip install transformers==5.23.0 torch==2.13.0
    python tests/golden/make_text_to_text.py      # writes text_to_text/t5/ and t5_v1_1/
"""

import pathlib
import warnings

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent / "text_to_text"
BEAMS = ({"num_beams": 3}, {"num_beams": 2, "length_penalty": 0.5, "early_stopping": True},
         {"num_beams": 4, "length_penalty": 2.0, "early_stopping": "never"})  # fmt: skip


def draw_config(r: np.random.Generator, **more) -> transformers.T5Config:
    return transformers.T5Config(**{
        "vocab_size": int(r.integers(17, 43)), "d_model": int(r.integers(5, 17)), "d_kv": int(r.integers(2, 7)),
        "d_ff": int(r.integers(7, 23)), "num_layers": 2, "num_decoder_layers": int(r.integers(1, 3)),
        "num_heads": int(r.integers(1, 4)), "relative_attention_num_buckets": int(r.choice([4, 8, 32])),
        "relative_attention_max_distance": int(r.choice([9, 20, 128])), "decoder_start_token_id": 0,
        "feed_forward_proj": str(r.choice(["relu", "gated-gelu"])), "tie_word_embeddings": bool(r.integers(2)),
        "dropout_rate": 0.0, "layer_norm_epsilon": float(r.choice([1e-6, 1e-3])),
    } | more)  # fmt: skip


def make(config: transformers.T5Config, seed: int, folder: pathlib.Path) -> None:
    """A folder, and expected.npz in it: inputs, states, logits, gradients of a weighted sum, and texts."""
    torch.manual_seed(seed)
    r = np.random.default_rng(seed)
    model = transformers.T5ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    is_untied = not config.scale_decoder_outputs  # as T5 1.1 is published
    if is_untied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + torch.randn_like(model.shared.weight))
    rows, length, target_length = 3, 9, 6
    ids = r.integers(2, config.vocab_size, (rows, length))
    mask = np.ones_like(ids)
    mask[1, :4], mask[2, 5:] = 0, 0
    target = r.integers(0, config.vocab_size, (rows, target_length))
    source = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    out = model(**source, decoder_input_ids=torch.tensor(target), output_hidden_states=True)
    weights = torch.tensor(r.standard_normal(out.logits.shape), dtype=torch.float32)
    (out.logits * weights).sum().backward()
    expected = {
        "ids": ids, "mask": mask, "target": target, "weights": weights, "logits": out.logits,
        "hidden": torch.stack(out.encoder_hidden_states), "decoder_hidden": torch.stack(out.decoder_hidden_states),
    }  # fmt: skip
    expected |= {f"grad {name}": p.grad for name, p in model.named_parameters()}
    for i, settings in enumerate(({}, *BEAMS)):
        expected[f"text {i}"] = model.generate(**source, max_new_tokens=8, do_sample=False, **settings)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    arrays = {name: x.detach().numpy() if isinstance(x, torch.Tensor) else x for name, x in expected.items()}
    np.savez_compressed(folder / "expected.npz", **arrays)


def main() -> None:
    warnings.simplefilter("ignore")
    for seed, name, more in (
        (0, "t5", {"feed_forward_proj": "relu", "tie_word_embeddings": True}),
        (1, "t5_v1_1", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    ):
        make(draw_config(np.random.default_rng(seed), **more), seed, FOLDER / name)


if __name__ == "__main__":
    main()
