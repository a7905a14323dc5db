"""What bench_data.py times as its peer, in that one's environment: transformers' masking collators on packed rows.

    PYTHON peer_collator.py FOLDER REPEATS NAMES

FOLDER holds rows.npz and tokenizer.json. The collator is given all that it can take ready-made: tensors, the mask of
special tokens, and for whole words the offsets that it finds words by.
"""

import json
import statistics
import sys
import time

import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

folder, repeats, names = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
tokenizer = PreTrainedTokenizerFast(
    tokenizer_file=f"{folder}/tokenizer.json", pad_token=names["pad"], unk_token=names["unknown"],
    cls_token=names["first"], sep_token=names["last"], mask_token=names["mask"],
)  # fmt: skip
rows = np.load(f"{folder}/rows.npz")
tokens = torch.from_numpy(rows["tokens"].astype(np.int64))
special = torch.isin(tokens, torch.tensor(tokenizer.all_special_ids)).long()
real = int((rows["segments"] > 0).sum())
# Characters of one unit a token; a word begins where one does not follow on the last.
starts = np.cumsum(1 + rows["words"].astype(np.int64), axis=1)
offsets = torch.from_numpy(np.stack([starts, starts + 1], axis=-1))

result = {}
for key, options in (("peer", {}), ("peer_whole_word", {"whole_word_mask": True})):
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, **options)
    batch = [{"input_ids": t, "special_tokens_mask": s} for t, s in zip(tokens, special, strict=True)]
    if options:
        batch = [row | {"offset_mapping": o} for row, o in zip(batch, offsets, strict=True)]
    rates = []
    for run in range(repeats + 1):
        count = 1 if options else 10
        began = time.perf_counter()
        for _ in range(count):
            collate([dict(row) for row in batch])
        if run:
            rates.append(count * real / (time.perf_counter() - began))
    result[f"{key}_tokens_per_second"] = statistics.median(rates)
print(json.dumps(result))
