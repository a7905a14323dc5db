"""Small files in each benchmark's own layout: what its archive holds, with a label that can be learned."""

import json
import pathlib

import numpy as np

WORDS = ["red", "green", "blue", "small", "large", "old", "new", "quiet", "loud", "warm", "cold", "early", "late"]
QUOTED = '"loud'  # these .tsv files were written without quoting


def _texts(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join([*rng.choice(WORDS, 5), QUOTED, str(seed), str(i)]) for i in range(count)]


def _tsv(path: pathlib.Path, rows, header: str | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(map(str, row)) for row in rows]
    path.write_text("\n".join(([] if header is None else [header]) + lines) + "\n", "utf-8")


def _jsonl(path: pathlib.Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def write_glue(folder: pathlib.Path, count: int = 12) -> None:
    """The eight archives of GLUE, unpacked in one folder."""
    for seed, split in enumerate(("train", "dev")):
        a, b = _texts(count, 10 + seed), _texts(count, 20 + seed)
        one = range(count)
        binary = [i % 2 for i in one]
        _tsv(folder / f"CoLA/{split}.tsv", zip(["gj04"] * count, binary, ["*"] * count, a, strict=True), None)
        _tsv(folder / f"SST-2/{split}.tsv", zip(a, binary, strict=True), "sentence\tlabel")
        _tsv(
            folder / f"MRPC/{split}.tsv", zip(binary, one, one, a, b, strict=True),
            "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        )  # fmt: skip
        torn = [("99", "1", "2", "a question without the rest")]
        _tsv(
            folder / f"QQP/{split}.tsv", [*zip(one, one, one, a, b, binary, strict=True), *torn],
            "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        )  # fmt: skip
        _tsv(
            folder / f"STS-B/{split}.tsv",
            zip(one, *[["x"] * count] * 4, ["none"] * count, ["none"] * count, a, b, np.arange(count) / 2, strict=True),
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        )  # fmt: skip
        entailed = ["entailment" if i % 2 else "not_entailment" for i in one]
        _tsv(folder / f"QNLI/{split}.tsv", zip(one, a, b, entailed, strict=True), "index\tquestion\tsentence\tlabel")
        _tsv(folder / f"RTE/{split}.tsv", zip(one, a, b, entailed, strict=True), "index\tsentence1\tsentence2\tlabel")
        parsed = "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        labels = [("entailment", "neutral", "contradiction")[i % 3] for i in one]
        filling = [["( x )"] * count] * 7
        if split == "train":
            _tsv(
                folder / "MNLI/train.tsv", zip(one, *filling, a, b, labels, labels, strict=True),
                f"{parsed}sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
            )  # fmt: skip
        for name in ("matched", "mismatched") if split == "dev" else ():
            _tsv(
                folder / f"MNLI/dev_{name}.tsv", zip(one, *filling, a, b, *[labels] * 6, strict=True),
                f"{parsed}sentence2_parse\tsentence1\tsentence2\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label",
            )  # fmt: skip


def write_superglue(folder: pathlib.Path, count: int = 8) -> None:
    """The archives of SuperGLUE that a task here learns."""
    for seed, split in enumerate(("train", "val")):
        one, a, b = range(count), _texts(count, 30 + seed), _texts(count, 40 + seed)
        made = list(zip(one, a, b, [i % 2 == 0 for i in one], strict=True))
        rows = {
            "BoolQ": [{"question": x, "passage": y, "idx": i, "label": t} for i, x, y, t in made],
            "CB": [
                {"premise": x, "hypothesis": y, "label": ("entailment", "contradiction", "neutral")[i % 3], "idx": i}
                for i, x, y, _ in made
            ],
            "COPA": [
                {"premise": x, "choice1": y, "choice2": x, "question": ("cause", "effect")[i % 2], "label": i % 2,
                 "idx": i} for i, x, y, _ in made
            ],
            "RTE": [
                {"premise": x, "hypothesis": y, "label": "entailment" if t else "not_entailment", "idx": i}
                for i, x, y, t in made
            ],
            "WiC": [
                {"word": "red", "sentence1": x, "sentence2": y, "idx": i, "label": t, "start1": 0, "start2": 0,
                 "end1": 3, "end2": 3, "version": 1.1} for i, x, y, t in made
            ],
            "WSC": [
                {"text": x, "target": {"span1_index": 0, "span1_text": x.split()[0], "span2_index": 1,
                 "span2_text": x.split()[1]}, "idx": i, "label": t} for i, x, _, t in made
            ],
            "MultiRC": [
                {"idx": i, "version": 1.1, "passage": {"text": x, "questions": [
                    {"question": y, "idx": i, "answers": [
                        {"text": "red", "idx": 0, "label": 1}, {"text": "blue", "idx": 1, "label": 0}]}]}}
                for i, x, y, _ in made
            ],
        }  # fmt: skip
        for name, of_set in rows.items():
            _jsonl(folder / f"{name}/{split}.jsonl", of_set)


def write_ner(folder: pathlib.Path, count: int = 12) -> None:
    """CoNLL 2003 in files of the shared task's names, and WNUT 2017's."""
    names = {
        "conll2003": ("eng.train", "eng.testa", "eng.testb"),
        "WNUT17": ("wnut17train.conll", "emerging.dev.conll", "emerging.test.annotated"),
    }
    for home, files in names.items():
        (folder / home).mkdir(parents=True)
        for seed, name in enumerate(files):
            sentences = [text.split() for text in _texts(count, 50 + seed)]
            between = " NN I-NP " if home == "conll2003" else "\t"
            body = [[f"{w}{between}{'B-PER' if w == 'red' else 'O'}" for w in words] for words in sentences]
            start = "-DOCSTART- -X- O O\n\n" if home == "conll2003" else ""
            (folder / home / name).write_text(start + "\n\n".join("\n".join(lines) for lines in body) + "\n", "utf-8")


def write_qa(folder: pathlib.Path, count: int = 6) -> None:
    """SQuAD 1.1 and 2.0, of which the latter has questions without an answer."""
    for name, version in (("squad", "v1.1"), ("squad_v2", "v2.0")):
        for seed, split in enumerate(("train", "dev")):
            paragraphs = []
            for i, text in enumerate(_texts(count, 60 + seed)):
                word = text.split()[2]
                asked = {"id": f"{split}{i}", "question": f"what is it of {i}?", "answers": [
                    {"text": word, "answer_start": text.index(word)}]}  # fmt: skip
                if version == "v2.0":
                    asked["is_impossible"] = i % 3 == 0
                    if i % 3 == 0:
                        asked |= {"answers": [], "plausible_answers": asked["answers"]}
                paragraphs.append({"context": text, "qas": [asked]})
            path = folder / name / f"{split}-{version}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"version": version, "data": [{"title": "t", "paragraphs": paragraphs}]}))
