"""Keep what transformers makes of the texts of tests/tokenizer_parity.py, a digest a kind of folder.

    pip install -e '.[parity]'
    python -m tests.golden.make_tokenizers      # writes tokenizers.json
"""

import json
import pathlib
import tempfile

import transformers

from tests.tokenizer_parity import FOLDERS, digest, make_folder, theirs


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folders = {kind: make_folder(kind, pathlib.Path(scratch) / str(i)) for i, kind in enumerate(FOLDERS)}
        digests = {kind: digest(theirs(folder)) for kind, folder in folders.items()}
    content = {"transformers": transformers.__version__, "digests": digests}
    path = pathlib.Path(__file__).parent / "tokenizers.json"
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
