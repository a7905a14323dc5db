"""What bench_use.py times as its peers, in their own environment: sentence-transformers, pipelines, `generate`.

    PYTHON peer_use.py TASK FOLDER TEXTS NUM_BEAMS NEW_TOKENS LEAST_TOKENS WAY:DTYPE
"""

import pathlib
import sys
import time

BEGAN = time.perf_counter()

import torch  # noqa: E402
from sides import serve  # noqa: E402

TASK, FOLDER, TEXTS, NUM_BEAMS, NEW_TOKENS, LEAST_TOKENS, NAME = sys.argv[1:]
WAY, _, DTYPE = NAME.partition(":")


def embedder():
    import sentence_transformers

    options = {"backend": WAY} if WAY in ("onnx", "openvino") else {"model_kwargs": {"dtype": DTYPE}}
    model = sentence_transformers.SentenceTransformer(FOLDER, device="cpu", **options)
    if WAY == "compiled":
        model[0].model = torch.compile(model[0].model, dynamic=True)
    versions = {"sentence_transformers": sentence_transformers.__version__}
    return lambda texts: model.encode(texts, show_progress_bar=False), versions


def answerer():
    import transformers

    way = WAY.removeprefix("sorted-")
    kinds = {
        "classify": ("text-classification", "SequenceClassification", {"top_k": None}),
        "tag": ("token-classification", "TokenClassification", {"aggregation_strategy": "simple"}),
    }
    kind, head, options = kinds[TASK]
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    if way in ("onnx", "openvino"):
        library, prefix = ("onnxruntime", "ORT") if way == "onnx" else ("intel", "OV")
        optimum = __import__(f"optimum.{library}", fromlist=["x"])
        model = getattr(optimum, f"{prefix}ModelFor{head}").from_pretrained(FOLDER, export=True)
    else:
        model = getattr(transformers, f"AutoModelFor{head}").from_pretrained(FOLDER, dtype=DTYPE).eval()
        if way == "compiled":
            model.forward = torch.compile(model.forward, dynamic=True)
    ask = transformers.pipeline(kind, model=model, tokenizer=tokenizer, device="cpu", batch_size=32, **options)

    def answers(texts):
        order = list(range(len(texts)))
        if WAY.startswith("sorted-"):
            order.sort(key=lambda i: len(texts[i]))
        found = ask([texts[i] for i in order])
        found = [found[at] for at in sorted(range(len(texts)), key=order.__getitem__)]
        if TASK == "classify":
            return [{x["label"]: float(x["score"]) for x in some} for some in found]
        return [sorted((e["start"], e["end"], e["entity_group"]) for e in some) for some in found]

    return answers, {"transformers": transformers.__version__}


def writer():
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(FOLDER, dtype=DTYPE).eval()
    if WAY == "compiled":
        model.forward = torch.compile(model.forward, dynamic=True)
    options = {
        "num_beams": int(NUM_BEAMS), "max_new_tokens": int(NEW_TOKENS), "min_new_tokens": int(LEAST_TOKENS),
    }  # fmt: skip

    def answers(texts):
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found = {}
        for first in range(0, len(order), 32):
            some = order[first : first + 32]
            rows = tokenizer([texts[i] for i in some], padding=True, truncation=True, return_tensors="pt")
            with torch.inference_mode():
                ids = model.generate(rows["input_ids"], attention_mask=rows["attention_mask"], **options)
            found.update(zip(some, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True))
        return [found[i].strip() for i in range(len(texts))]

    return answers, {"transformers": transformers.__version__}


answers, versions = {"embed": embedder, "write": writer}.get(TASK, answerer)()
serve(answers, pathlib.Path(TEXTS).read_text("utf-8").splitlines(), BEGAN, versions | {"torch": torch.__version__})
