"""What bench_step.py times as its peer, in that one's environment: a training step as transformers' users write it.

    PYTHON peer_step.py FOLDER

FOLDER holds spec.json and the batches. A line `run SECONDS` on the input is answered by a line of JSON.
"""

import json
import pathlib
import sys
import time

import numpy as np
import transformers
from sides import VOCABULARY_HEADS, resident_peak_bytes, serve_steps, torch_step

folder = pathlib.Path(sys.argv[1])
spec = json.loads((folder / "spec.json").read_text())
batches = [dict(np.load(path)) for path in sorted(folder.glob("peer-*.npz"))]


def block_mask(segment_ids, dtype):
    """What is added to the scores of packed rows [B, 1, T, T]: 0 within a document, the lowest number elsewhere."""
    import torch

    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return torch.zeros(same.shape, dtype=dtype, device=same.device).masked_fill(~same, torch.finfo(dtype).min)


def torch_loss(model, kind):
    """The loss of a batch as a good user writes it: only the positions that are predicted go through the head."""
    from torch.nn import functional as F

    encoder = getattr(model, model.base_model_prefix)

    def loss_of(batch):
        if "segment_ids" in batch:
            mask = block_mask(batch["segment_ids"], next(model.parameters()).dtype)
            told = {"attention_mask": mask, "position_ids": batch["position_ids"]}
        else:
            told = {"attention_mask": batch["attention_mask"]}
        states = encoder(input_ids=batch["input_ids"], **told).last_hidden_state
        slots = batch["slots"][..., None].expand(-1, -1, states.shape[-1])
        states = states.gather(1, slots)
        if spec["objective"] == "masked_lm":
            logits = VOCABULARY_HEADS[kind](model, states)
        else:  # a document's first token through the pooler
            pooled = encoder.pooler.activation(encoder.pooler.dense(states))
            logits = model.classifier(model.dropout(pooled))
        return F.cross_entropy(logits.flatten(0, 1).float(), batch["slot_labels"].flatten(), ignore_index=-100)

    return loss_of


def torch_side():
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(spec["cores"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config, kind = transformers.AutoConfig.for_model(**spec["peer_config"]), transformers.AutoModelForMaskedLM
    if spec["num_classes"] is not None:
        config.num_labels, kind = spec["num_classes"], transformers.AutoModelForSequenceClassification
    model = kind.from_config(config).to(device).train()
    tensors = [{k: torch.from_numpy(v).to(device) for k, v in batch.items()} for batch in batches]
    whole, mode = ("input_ids", "attention_mask", "labels"), spec["peer_mode"]
    gathers = mode == "unpadded" or (mode == "compiled" and spec["objective"] == "masked_lm")
    loss_of = torch_loss(model, config.model_type) if gathers else lambda batch: model(**batch).loss
    left_out = ("labels",) if gathers else tuple(set(tensors[0]) - set(whole))
    tensors = [{k: v for k, v in batch.items() if k not in left_out} for batch in tensors]
    shapes = {batch["input_ids"].shape for batch in tensors}
    if mode != "eager":
        loss_of = torch.compile(loss_of, dynamic=len(shapes) > 1)

    began = time.perf_counter()
    step = torch_step(model, loss_of, tensors, spec, "input_ids")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    memory = torch.cuda.max_memory_allocated if device == "cuda" else resident_peak_bytes
    about = {"versions": versions, "attention": config._attn_implementation, "mode": mode}
    return step, memory, about | {"compile_seconds": time.perf_counter() - began}


def flax_side():
    import jax
    import jax.numpy as jnp
    import optax

    config, kind = transformers.BertConfig(**spec["peer_config"]), transformers.FlaxBertForMaskedLM
    if spec["num_classes"] is not None:
        config.num_labels, kind = spec["num_classes"], transformers.FlaxBertForSequenceClassification
    model = kind(
        config, seed=0, dtype=jnp.dtype(spec["dtype"]), input_shape=batches[0]["input_ids"].shape
    )
    decay = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731
    tx = optax.adamw(
        spec["learning_rate"], *spec["betas"], eps=spec["epsilon"], weight_decay=spec["weight_decay"], mask=decay
    )

    @jax.jit
    def update(params, opt_state, key, batch):
        def loss_fn(params):
            logits = model(
                batch["input_ids"], batch["attention_mask"], params=params, dropout_rng=key, train=True
            ).logits
            mask = batch["labels"] >= 0
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits.astype(jnp.float32), jnp.maximum(batch["labels"], 0)
            )
            return (losses * mask).sum() / mask.sum()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    update = jax.jit(update, donate_argnums=(0, 1))
    arrays = [jax.device_put(batch) for batch in batches]
    params, made = model.params, 0
    opt_state = tx.init(params)

    def step(i):
        nonlocal params, opt_state, made
        made += 1
        params, opt_state, loss = update(params, opt_state, jax.random.key(made), arrays[i])
        assert np.isfinite(float(loss))

    def memory():
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use") or resident_peak_bytes()

    return step, memory, {"versions": {"jax": jax.__version__, "transformers": transformers.__version__}}


step, memory, about = {"torch": torch_side, "flax": flax_side}[spec["peer"]]()
began = time.perf_counter()
step(0)
ready = {"compile_seconds": time.perf_counter() - began, **about}
serve_steps(step, spec["peer_tokens"], spec["peer_texts"], ready, memory)
