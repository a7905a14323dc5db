"""Random small models of every family, ours against transformers' on torch: outputs, losses, gradients, and back.

    python -m tests.parity --write docs/families.md     # the table of measured differences; needs '.[parity]'

A case is (family, task, seed). torch's model is made with random weights and saved; we load the folder, compare every
hidden state, what the head gives, the loss and the gradient of every parameter, and write a folder that transformers
must open with no missing or unexpected key and the same numbers. Tokenizers are compared too (tokenizer_parity.py).
"""

import argparse
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_encoder.families.family import POOLED
from flax_encoder.families.tensors import export_tensors
from flax_encoder.nn.partition import flatten
from flax_encoder.published.load import load_pretrained
from flax_encoder.published.model import Pretrained
from flax_encoder.published.write import write_pretrained
from tests import tokenizer_parity

B, T, V = 3, 11, 43
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 1e-4  # of the largest reference value
ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu", "quick_gelu", "mish", "tanh", "relu2", "gelu_pytorch_tanh")


def _sizes(r, even_head=False):
    heads = int(r.choice([1, 2, 3, 5]))
    head_dim = int(r.choice([2, 4, 6] if even_head else [2, 3, 5, 7]))
    # Layer norm of two or three features is nearly a sign: no arithmetic agrees on that.
    head_dim = head_dim if heads * head_dim >= 6 else 6
    return heads, head_dim, int(r.integers(1, 4)), int(r.choice([5, 13, 22]))


def _bert(r, **more):
    heads, head_dim, layers, mlp = _sizes(r)
    return {
        "vocab_size": V, "hidden_size": heads * head_dim, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": mlp, "hidden_act": str(r.choice(ACTIVATIONS)), "max_position_embeddings": T + 4,
        "type_vocab_size": int(r.integers(1, 4)), "layer_norm_eps": float(r.choice([1e-12, 1e-5, 1e-3])),
        "pad_token_id": int(r.integers(0, 3)), "tie_word_embeddings": bool(r.integers(2)),
    } | more  # fmt: skip


def _albert(r):
    layers, groups = ((1, 1), (4, 1), (4, 2), (3, 3))[r.integers(4)]
    return _bert(r, num_hidden_layers=layers, num_hidden_groups=groups, embedding_size=int(r.choice([6, 9, 11])))


def _electra(r):
    config = _bert(r)
    return config | {"embedding_size": int(r.choice([7, 9, config["hidden_size"]]))}


def _distilbert(r):
    heads, head_dim, layers, mlp = _sizes(r)
    return {
        "vocab_size": V, "dim": heads * head_dim, "n_layers": layers, "n_heads": heads, "hidden_dim": mlp,
        "activation": str(r.choice(ACTIVATIONS)), "max_position_embeddings": T + 4,
        "pad_token_id": int(r.integers(0, 3)), "tie_word_embeddings": bool(r.integers(2)),
    }  # fmt: skip


def _t5(r):
    heads, head_dim, layers, mlp = _sizes(r)
    return {
        "vocab_size": V, "d_model": int(r.choice([6, 10, 15])), "d_kv": head_dim, "num_layers": layers,
        "num_heads": heads, "d_ff": mlp, "relative_attention_num_buckets": int(r.choice([4, 8, 12, 32])),
        "relative_attention_max_distance": int(r.choice([9, 16, 128])),
        "layer_norm_epsilon": float(r.choice([1e-6, 1e-3])),
        "feed_forward_proj": str(r.choice(["relu", "gelu", "gated-gelu", "gated-silu", "gated-relu"])),
        "pad_token_id": 0,
    }  # fmt: skip


def _modernbert(r):
    heads, head_dim, layers, mlp = _sizes(r, even_head=True)
    every = int(r.integers(1, 4))
    types = ["sliding_attention" if i % every else "full_attention" for i in range(layers)]
    if r.integers(4) == 0:
        types = ["sliding_attention"] * layers
    full, sliding = float(r.choice([1e4, 160_000.0, 77.0])), float(r.choice([1e4, 50.0]))
    thetas = {"full_attention": full, "sliding_attention": sliding}
    return {
        "vocab_size": V, "hidden_size": heads * head_dim, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": mlp, "hidden_activation": str(r.choice(ACTIVATIONS)), "max_position_embeddings": 64,
        "norm_eps": float(r.choice([1e-5, 1e-3])), "norm_bias": bool(r.integers(2)), "layer_types": types,
        "attention_bias": bool(r.integers(2)), "mlp_bias": bool(r.integers(2)), "decoder_bias": bool(r.integers(2)),
        "local_attention": int(r.choice([2, 4, 5, 8])), "classifier_pooling": str(r.choice(["cls", "mean"])),
        "classifier_bias": bool(r.integers(2)), "classifier_activation": str(r.choice(ACTIVATIONS)),
        "rope_parameters": {k: {"rope_type": "default", "rope_theta": v} for k, v in thetas.items()},
        "tie_word_embeddings": bool(r.integers(2)), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "cls_token_id": 1, "sep_token_id": 2,
    }  # fmt: skip


def _deberta(r):
    is_relative = bool(r.integers(8))
    terms = ("c2p", "p2c", "c2p|p2c", "p2c|c2p")[r.integers(4)]
    more = {"conv_kernel_size": 3, "conv_act": str(r.choice(["tanh", "gelu"]))} if r.integers(3) == 0 else {}
    return _bert(
        r, type_vocab_size=int(r.integers(0, 3)), position_biased_input=bool(r.integers(2)),
        relative_attention=is_relative,
        pos_att_type=terms if is_relative else None, position_buckets=int(r.choice([-1, 4, 6, 16])),
        max_relative_positions=int(r.choice([-1, 12, 24])), share_att_key=bool(r.integers(2)),
        norm_rel_ebd=str(r.choice(["none", "layer_norm"])), pooler_hidden_act=str(r.choice(["gelu", "tanh"])), **more,
    )  # fmt: skip


def _eurobert(r):
    heads, head_dim, layers, mlp = _sizes(r, even_head=True)
    return {
        "vocab_size": V, "hidden_size": heads * head_dim, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": int(r.choice([k for k in range(1, heads + 1) if heads % k == 0])),
        "head_dim": int(r.choice([head_dim, 8])), "intermediate_size": mlp, "hidden_act": str(r.choice(ACTIVATIONS)),
        "rms_norm_eps": float(r.choice([1e-5, 1e-3])), "attention_bias": bool(r.integers(2)),
        "mlp_bias": bool(r.integers(2)), "classifier_pooling": str(r.choice(["bos", "mean", "late"])),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(r.choice([1e4, 250_000.0, 33.0]))},
        "tie_word_embeddings": bool(r.integers(2)), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "mask_token_id": 3,
    }  # fmt: skip


TASKS = {
    None: "Model", "masked_lm": "ForMaskedLM", "classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification", "question_answering": "ForQuestionAnswering",
    "multiple_choice": "ForMultipleChoice", "next_sentence": "ForNextSentencePrediction",
    "discriminator": "ForPreTraining",
}  # fmt: skip
ALL = (None, "masked_lm", "classification", "token_classification", "question_answering", "multiple_choice")
FAMILIES = {
    "bert": ("Bert", _bert, (*ALL, "next_sentence")),
    "roberta": ("Roberta", lambda r: _bert(r, max_position_embeddings=T + 8), ALL),
    "xlm-roberta": ("XLMRoberta", lambda r: _bert(r, max_position_embeddings=T + 8), ALL),
    "albert": ("Albert", _albert, ALL),
    "distilbert": ("DistilBert", _distilbert, ALL),
    "electra": ("Electra", _electra, (*ALL, "discriminator")),
    "t5": ("T5", _t5, (None, "token_classification")),
    "modernbert": ("ModernBert", _modernbert, ALL),
    "deberta-v2": ("DebertaV2", _deberta, ALL),
    "eurobert": ("EuroBert", _eurobert, ALL[:4]),
}


def torch_model(family: str, task: str | None, seed: int):
    """A transformers model with random weights of a random config."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    name, draw, _ = FAMILIES[family]
    r = np.random.default_rng([seed, *family.encode()])
    config = getattr(transformers, f"{name}Config")(**draw(r), num_labels=2 if task == "question_answering" else 4)
    config._attn_implementation = "eager"
    cls = getattr(transformers, "T5EncoderModel" if family == "t5" and task is None else name + TASKS[task])
    model = cls(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            is_scale = p.ndim == 1 and key.endswith("weight")
            p.copy_(float(is_scale) + (0.1 if p.ndim == 1 else 0.4) * torch.randn(p.shape, generator=generator))
    return model, r


def draw_batch(model, task: str | None, r) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(inputs, labels): rows padded on the left, on the right or not at all; padding is no token of a document."""
    config = model.config
    pools = task in POOLED and getattr(config, "classifier_pooling", "cls") in ("cls", "bos")
    side = r.choice(["none", "right", "left"])
    side = "right" if pools and side == "left" else side  # there torch reads a padding token
    side = "none" if task == "question_answering" else side  # torch's loss takes padding for an answer
    lengths = [T, *r.integers(2, T, B - 1)] if side != "none" else [T] * B
    mask = np.array([[0] * (T - n) + [1] * n if side == "left" else [1] * n + [0] * (T - n) for n in lengths])
    ids = r.integers(3, V, (B, T))
    inputs = {"input_ids": np.where(mask, ids, config.pad_token_id), "attention_mask": mask}
    if getattr(config, "type_vocab_size", 0) > 1 and r.integers(4):
        inputs["token_type_ids"] = r.integers(0, config.type_vocab_size, (B, T))
    if task in POOLED:
        count = {"classification": 4, "multiple_choice": B, "next_sentence": 2}[task]
        return inputs, {"labels": r.integers(0, count, 1 if task == "multiple_choice" else B)}
    if task == "question_answering":
        first = mask.argmax(1)
        return inputs, {"start_positions": first, "end_positions": first + mask.sum(1) - 1}
    classes = {"masked_lm": V, "token_classification": 4, "discriminator": 2}.get(task)
    if classes is None:
        return inputs, {}
    chosen = mask if task == "discriminator" else mask * (r.random((B, T)) < 0.7) | (np.cumsum(mask, 1) == 1) * mask
    return inputs, {"labels": np.where(chosen, r.integers(0, classes, (B, T)), 0 if task == "discriminator" else -100)}


def run_torch(model, inputs, labels):
    """(outputs by name, loss, gradients by name); without a head the loss is a weighted sum of the vectors."""
    import torch

    tensors = {k: torch.tensor(v) for k, v in {**inputs, **labels}.items()}
    is_choice = type(model).__name__.endswith("MultipleChoice")  # the rows are choices of one question
    shaped = {k: v[None] if is_choice and k in inputs else v for k, v in tensors.items()}
    out = model(**shaped, output_hidden_states=True)
    outputs = {f"hidden {i}": h for i, h in enumerate(out.hidden_states)}
    if "logits" in out:
        outputs["logits"] = out.logits[0] if is_choice else out.logits
    if "start_logits" in out:
        outputs["logits"] = torch.stack([out.start_logits, out.end_logits], -1)
    if out.get("pooler_output") is not None:
        outputs["pooled"] = out.pooler_output
    loss = out.get("loss")
    if loss is None:
        hidden = out.last_hidden_state * tensors["attention_mask"][..., None]
        loss = (hidden * torch.tensor(_weights(hidden.shape))).sum()
        if "pooled" in outputs and bool(inputs["attention_mask"][:, 0].all()):
            loss = loss + (out.pooler_output * torch.tensor(_weights(out.pooler_output.shape))).sum()
    model.zero_grad()
    loss.backward()
    gradients = {k: p.grad.numpy() for k, p in model.named_parameters() if p.grad is not None}
    return {k: v.detach().numpy() for k, v in outputs.items()}, loss.item(), gradients


def _weights(shape) -> np.ndarray:
    """What a loss without a head weighs vectors by."""
    return np.random.default_rng(1).standard_normal(tuple(shape)).astype(np.float32)


def run_ours(loaded: Pretrained, inputs, labels):
    """As `run_torch`."""
    graphdef, params = nnx.split(loaded.model)
    mask = np.asarray(inputs["attention_mask"])

    def cross_entropy(logits, targets):
        keep = targets >= 0
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.where(keep, targets, 0)[..., None], -1)[..., 0]
        return -(picked * keep).sum() / keep.sum()

    def loss_of(got):
        logits = got["logits"]
        if loaded.task is None:
            hidden = got["last_hidden_state"]
            total = (hidden * mask[..., None] * _weights(hidden.shape)).sum()
            if got["pooler_output"] is not None and mask[:, 0].all():
                total += (got["pooler_output"] * _weights(got["pooler_output"].shape)).sum()
            return total
        if loaded.task == "discriminator":
            y = labels["labels"]
            losses = jnp.logaddexp(0.0, logits) - y * logits
            return (losses * mask).sum() / mask.sum()
        if loaded.task == "question_answering":
            ends = (labels["start_positions"], labels["end_positions"])
            return sum(cross_entropy(logits[..., i], jnp.asarray(e)) for i, e in enumerate(ends)) / 2
        logits = logits[None] if loaded.task == "multiple_choice" else logits
        return cross_entropy(logits, jnp.asarray(labels["labels"]))

    @jax.jit
    def outputs_and_gradients(params, rows):
        def loss(params):
            got = nnx.merge(graphdef, params)(*rows)
            return loss_of(got), got

        return jax.value_and_grad(loss, has_aux=True)(params)

    (value, got), gradients = outputs_and_gradients(params, loaded.rows(**inputs))
    outputs = {f"hidden {i}": np.asarray(h) for i, h in enumerate(got["hidden_states"])}
    names = {"logits": "logits", "pooler_output": "pooled"}
    outputs |= {names[name]: np.asarray(got[name]) for name in names if got[name] is not None}
    flat = {k: np.asarray(v) for k, v in flatten(nnx.to_pure_dict(gradients)).items()}
    return outputs, float(value), export_tensors(loaded.family, loaded.task, flat, loaded.config.num_heads)


def compare(family: str, task: str | None, seed: int) -> dict[str, float]:
    """Worst differences {output, loss, gradient}, each relative to the largest reference value; checks the way back."""
    model, r = torch_model(family, task, seed)
    inputs, labels = draw_batch(model, task, r)
    outputs, loss, gradients = run_torch(model, inputs, labels)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(f"{scratch}/theirs")
        loaded = load_pretrained(f"{scratch}/theirs", task=task)
        write_pretrained(loaded, f"{scratch}/ours")
        again, info = type(model).from_pretrained(
            f"{scratch}/ours", output_loading_info=True, attn_implementation="eager"
        )
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
        for key, value in run_torch(again.eval(), inputs, labels)[0].items():
            # torch's own sums differ by roundings with where its memory lies.
            atol = OUTPUT_TOLERANCE * np.abs(outputs[key]).max()
            np.testing.assert_allclose(value, outputs[key], rtol=0, atol=atol, err_msg=f"{key} of the folder we wrote")
    return differences(loaded, inputs, labels, outputs, loss, gradients)


def differences(loaded: Pretrained, inputs, labels, outputs, loss, gradients) -> dict[str, float]:
    """Worst differences of ours from what torch gave."""
    with jax.default_matmul_precision("highest"):
        own_outputs, own_loss, own_gradients = run_ours(loaded, inputs, labels)
    assert set(own_outputs) == set(outputs), (set(own_outputs), set(outputs))
    real = inputs["attention_mask"] > 0
    worst = {"output": 0.0, "loss": abs(own_loss - loss) / max(abs(loss), 1e-6), "gradient": 0.0}
    for key, want in outputs.items():
        got = own_outputs[key]
        assert got.shape == want.shape, (key, got.shape, want.shape)
        if key == "pooled":
            got, want = got[real[:, 0]], want[real[:, 0]]
        elif want.shape[:2] == real.shape:
            got, want = got[real], want[real]
        if want.size:
            worst["output"] = max(worst["output"], np.abs(got - want).max() / np.abs(want).max())
    if (tied := loaded.task and loaded.family.heads[loaded.task].tied) in gradients and tied not in own_gradients:
        own_gradients[tied] = own_gradients[loaded.family.prefix + loaded.family.rows[0].theirs[0]]
    worst["gradient"] = _gradient_difference(own_gradients, gradients)
    return {key: float(value) for key, value in worst.items()}


def _gradient_difference(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> float:
    """The worst of all parameters, each relative to its largest gradient."""
    top = max(np.abs(g).max() for g in want.values())  # some gradients, such as key biases', are zero but for rounding
    return float(max(np.abs(got[key] - g).max() / max(np.abs(g).max(), top / 100) for key, g in want.items()))


def gradient_condition(family: str, task: str | None, seed: int, draws: int = 5) -> float:
    """What rounding a case's weights to float32 alone does to torch's float64 gradients.

    Some small random models are so badly conditioned that no float32 arithmetic agrees on them to `GRADIENT_TOLERANCE`.
    """
    import torch

    model, r = torch_model(family, task, seed)
    inputs, labels = draw_batch(model, task, r)
    *_, exact = run_torch(model.double(), inputs, labels)
    weights = [p.detach().clone() for p in model.parameters()]
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for _ in range(draws):
        with torch.no_grad():
            for p, weight in zip(model.parameters(), weights, strict=True):
                half_ulps = torch.rand(weight.shape, generator=generator, dtype=torch.float64) * 2 - 1
                p.copy_(weight * (1 + half_ulps * 2**-24))
        worst = max(worst, _gradient_difference(run_torch(model, inputs, labels)[2], exact))
    return worst


def is_exact(worst: dict[str, float], case: tuple[str, str | None, int]) -> bool:
    """Whether `compare`'s differences are float32 rounding: ours and torch's, where the case magnifies it."""
    if worst["output"] > OUTPUT_TOLERANCE or worst["loss"] > GRADIENT_TOLERANCE:
        return False
    return worst["gradient"] <= GRADIENT_TOLERANCE or worst["gradient"] <= 2 * gradient_condition(*case)


def cases(per_family: int = 24):
    """(family, task, seed): tasks in turn."""
    for family, (_, _, tasks) in FAMILIES.items():
        for seed in range(per_family):
            yield family, tasks[seed % len(tasks)], seed


def main() -> None:
    import torch
    import transformers

    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__.splitlines()[0])
    parser.add_argument("--write", help="write the table into this file")
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--per-family", type=int, default=24)
    arguments = parser.parse_args()
    jax.config.update("jax_disable_most_optimizations", True)
    rows, failed = {}, 0
    for family, task, seed in cases(arguments.per_family):
        if family not in arguments.families:
            continue
        row = rows.setdefault(family, {"configs": 0, "tasks": set(), "output": 0.0, "loss": 0.0, "gradient": 0.0})
        try:
            worst = compare(family, task, seed)
        except Exception as error:
            failed += 1
            print(f"{family} {task} {seed}: {type(error).__name__}: {str(error)[:600]}", file=sys.stderr)
            continue
        row["configs"] += 1
        row["tasks"].add(task or "encoder")
        if not is_exact(worst, (family, task, seed)):
            failed += 1
            print(f"{family} {task} {seed}: {worst}", file=sys.stderr)
        row |= {key: max(row[key], worst[key]) for key in worst}
    table = [
        "| family | configs | heads | worst output | worst loss | worst gradient |",
        "|---|---|---|---|---|---|",
        *(
            f"| {family} | {row['configs']} | {', '.join(sorted(row['tasks']))} | {row['output']:.1e} | "
            f"{row['loss']:.1e} | {row['gradient']:.1e} |"
            for family, row in rows.items()
        ),
    ]
    print("\n".join(table))
    with tempfile.TemporaryDirectory() as scratch:
        for i, kind in enumerate(tokenizer_parity.FOLDERS):
            folder = tokenizer_parity.make_folder(kind, pathlib.Path(scratch) / str(i))
            if found := tokenizer_parity.differences(folder):
                failed += 1
                print(f"tokenizer, {kind}: {len(found)} texts differ, such as {found[0]}", file=sys.stderr)
    print(f"tokenizers: {len(tokenizer_parity.FOLDERS)} kinds of folders, {len(tokenizer_parity.texts())} texts each")
    if arguments.write:
        path = pathlib.Path(arguments.write)
        text = path.read_text("utf-8")
        start, end = "<!-- measured -->\n", "<!-- end -->\n"
        before, rest = text.split(start)
        versions = f"transformers {transformers.__version__}, torch {torch.__version__}, jax {jax.__version__}"
        measured = "\n".join([*table, "", f"{versions}, CPU, float32.", end])
        path.write_text(before + start + measured + rest.split(end)[1], "utf-8")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
