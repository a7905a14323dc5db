"""Train tiny SentencePiece models and keep what SentencePiece itself makes of some texts.

    pip install sentencepiece==0.2.3
    python tests/golden/make_sentencepiece.py      # writes sentencepiece-{unigram,bpe}.model and sentencepiece.json

The character map is a few lines of its own: those that are built in weigh 240 kB.
"""

import io
import json
import pathlib
import pydoc_data.topics as prose
import tempfile

import sentencepiece

FOLDER = pathlib.Path(__file__).parent
RULES = {"\uff21": "A", "ﬁ": "fi", "é": "e", "É": "E", "\t": " ", "\n": " ", "\u00a0": " ", "½": "1/2", "\u200b": ""}
TEXTS = [
    "Hello world", "  two  spaces  ", "", " ", "tab\tand\nnewline", "caf\u00e9 \ufb01ne \uff21BC", "a\u200bb c\u00a0d",
    "the statement: x = (y, 100, 9,) # ½", "日本語 unknown 🙂🙂 twice", "The value of an expression is assigned.",
]  # fmt: skip


def main() -> None:
    lines = [line for topic in list(prose.topics.values())[:40] for line in topic.split("\n") if line.strip()]
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as rules:
        for source, target in RULES.items():
            rules.write(" ".join(f"{ord(c):X}" for c in source) + "\t" + " ".join(f"{ord(c):X}" for c in target) + "\n")
        rules.flush()
        wanted = {}
        for kind in ("unigram", "bpe"):
            model = io.BytesIO()
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines), model_writer=model, vocab_size=400, model_type=kind, minloglevel=2,
                normalization_rule_tsv=rules.name, unk_id=0, bos_id=1, eos_id=2, byte_fallback=kind == "bpe",
                user_defined_symbols=["("],
            )  # fmt: skip
            (FOLDER / f"sentencepiece-{kind}.model").write_bytes(model.getvalue())
            processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
            wanted[kind] = [processor.encode(text, out_type=str) for text in TEXTS]
    content = {"texts": TEXTS, "pieces": wanted}
    (FOLDER / "sentencepiece.json").write_text(json.dumps(content, indent=0, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
