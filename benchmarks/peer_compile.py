"""What bench_compile.py compiles as its peer, in that one's environment: transformers' FlaxBert for masked LM.

    PYTHON peer_compile.py SPEC

SPEC is JSON; the answer is a line of JSON.
"""

import json
import sys
import time

import jax
import jax.numpy as jnp
import optax
import transformers
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

spec = json.loads(sys.argv[1])
shape = (spec["batch"], spec["length"])
config = transformers.BertConfig(**spec["config"])
model = transformers.FlaxBertForMaskedLM(
    config, dtype=jnp.dtype(spec["dtype"]), input_shape=(1, spec["length"]), _do_init=False
)
params = jax.eval_shape(lambda key: model.init_weights(key, (1, spec["length"])), jax.random.key(0))
tx = optax.adamw(
    spec["learning_rate"], *spec["betas"], eps=spec["epsilon"], weight_decay=spec["weight_decay"],
    mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
)  # fmt: skip


def update(params, opt_state, seed, batch):
    def loss_fn(params):
        logits = model(
            batch["input_ids"], batch["attention_mask"], params=params, dropout_rng=jax.random.key(seed), train=True
        ).logits
        mask = batch["labels"] >= 0
        # As transformers' own run_mlm_flax.py has it. Picking the labels' logits out instead keeps one more float32
        # copy of all logits, with which 64 x 512 does not fit a v5e.
        chosen = jax.nn.one_hot(batch["labels"], logits.shape[-1])
        losses = optax.softmax_cross_entropy(logits.astype(jnp.float32), chosen)
        return (losses * mask).sum() / mask.sum()

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


sharding = SingleDeviceSharding(topologies.get_topology_desc(**spec["topology"]).devices[0])
ids = jax.ShapeDtypeStruct(shape, jnp.int32)
names = ("input_ids", "attention_mask", "labels")
arguments = params, jax.eval_shape(tx.init, params), jax.ShapeDtypeStruct((), jnp.int32), dict.fromkeys(names, ids)
arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
began = time.perf_counter()
compiled = jax.jit(update, donate_argnums=(0, 1)).lower(*arguments).compile(spec["options"])
seconds = time.perf_counter() - began
memory = compiled.memory_analysis()
answer = {
    "text": compiled.as_text(),
    "memory": {name: getattr(memory, f"{name}_size_in_bytes") for name in ("argument", "temp", "output", "alias")},
    "compile_seconds": seconds,
    "versions": {"jax": jax.__version__, "transformers": transformers.__version__},
}
print(json.dumps(answer))
