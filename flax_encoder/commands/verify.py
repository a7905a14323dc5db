"""Checkpoints compared with their checksums."""

import argparse
import json
import pathlib
import sys

HELP = "check that a run's checkpoints are as they were written, by their checksums"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=pathlib.Path, help="a run folder, or one checkpoint in it")
    parser.add_argument("--json", action="store_true", help="print JSON for programs instead")


def run(arguments: argparse.Namespace) -> None:
    from flax_encoder.training.checkpoint import DamagedCheckpoint, verify_checkpoints

    found = []
    for folder, result in verify_checkpoints(arguments.run_dir):
        about = {"checkpoint": str(folder), "state": "whole"}
        if isinstance(result, DamagedCheckpoint):
            about |= {"state": "damaged", "reason": result.reason}
            line = f"damaged: {result.reason}"
        elif result is None:
            about["state"] = "no checksums"
            line = "has no checksums: an earlier version of this library wrote it without"
        else:
            about |= {"files": len(result.files), "bytes": result.num_bytes}
            line = f"whole: {len(result.files)} files, {result.num_bytes / 1e6:,.1f} MB, each as it was written"
        found.append(about)
        if not arguments.json:
            print(f"{folder}: {line}")
    if arguments.json:
        print(json.dumps(found))
    if any(about["state"] == "damaged" for about in found):
        sys.exit(1)
