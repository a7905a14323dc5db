"""prepare: tokenize text once, into a store that runs read."""

import argparse
import dataclasses
import hashlib
import json
import pathlib

import tyro

from flax_encoder.commands.screen import saying
from flax_encoder.config import ConfigError, DataConfig, RunConfig, differences

HELP = "tokenize text once, into a store that runs read"


@dataclasses.dataclass(frozen=True)
class PrepareArguments:
    """Tokenize text once, into a store; train with --data.source OUT. The same command again continues after a stop."""

    out: str
    """The new folder. For a URL, such as gs://BUCKET/FOLDER, the store is made in the cache and copied there."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    objective: str = "masked_lm"
    """The task that the store is for; it decides which columns are kept beside the text."""
    with_labels: bool = False
    """The same as --objective classification."""
    workers: int | None = None
    """Processes that tokenize; None is one per core."""
    shard: str = "0/1"
    """i/n: this machine is number i, from 0, of n machines that share the folder. The last to end finishes the store.
    """
    json: bool = False
    """Print JSON for programs."""


# What a store depends on; the other settings of data say how a run reads one.
_PREPARED = (
    "source", "weights", "text_column", "label_column", "text_unit", "validation", "test",
    "text_pair_column", "history_column", "target_turns", "turn_separator", "label_names", "has_header", "csv_quotes",
    "skip_bad_rows", "validation_split",
    "held_out_by_class", "held_out_rate", "tokenizer", "vocab_size",
    "cache_dir",
)  # fmt: skip


SETTINGS = PrepareArguments  # each is an option, by a parser of their own


def run(arguments: argparse.Namespace) -> None:
    from flax_encoder.data.pipeline import cache_folder, prepare_stores
    from flax_encoder.data.sources.remote import is_remote
    from flax_encoder.data.store.copied import upload_store
    from flax_encoder.tasks import find_task

    asked = tyro.cli(PrepareArguments, args=arguments.rest, prog="python -m flax_encoder prepare")
    if other := [n for n in differences(asked.data, DataConfig()) if n not in _PREPARED]:
        raise ConfigError(
            f"prepare stores whole documents, and --data.{other[0].replace('_', '-')} says how a run reads them: give "
            f"it to train."
        )
    index, _, count = asked.shard.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ConfigError(f"--shard is i/n with i from 0 to below n: got {asked.shard}.")
    if asked.workers is not None and asked.workers < 1:
        raise ConfigError(f"--workers must be at least 1: got {asked.workers}.")
    if is_remote(asked.out) and int(count) > 1:
        raise ConfigError(
            f"machines with a --shard each must share a folder, and {asked.out} is a URL: leave --shard out, or give "
            f"--out a folder that all mount."
        )
    objective = "classification" if asked.with_labels else asked.objective
    out = pathlib.Path(asked.out)
    if is_remote(asked.out):
        out = cache_folder(asked.data) / "prepared" / hashlib.sha256(asked.out.encode()).hexdigest()[:24]
        out.parent.mkdir(exist_ok=True)
    columns = find_task(objective).reading.columns_of(RunConfig(objective=objective, data=asked.data))
    with saying() as say:
        stores = prepare_stores(
            asked.data, out, columns, workers=asked.workers,
            shard=(int(index), int(count)), progress=say,
        )  # fmt: skip
        if is_remote(asked.out):
            upload_store(out, asked.out, say)
    if stores is None:
        print(f"shard {asked.shard} is done; the store is finished when all shards are. The same command again checks.")
        return
    if asked.json:
        print(json.dumps([{"folder": str(s.folder), "hash": s.hash, **s.manifest} for s in stores]))
        return
    for store in stores:
        train, test = (store.manifest["splits"][split] for split in ("train", "validation"))
        dropped = ", ".join(f"{count:,} {kind}" for kind, count in store.manifest["dropped"].items())
        print(
            f"{store.folder}: {train['documents']:,} documents, {train['tokens']:,} tokens to train on; held out "
            f"{test['documents']:,} and {test['tokens']:,}; dropped {dropped}"
        )
    program = "python -m flax_encoder"
    print(f"\nnext:\n  {program} inspect {stores[0].folder}\n  {program} train --data.source {asked.out}")
