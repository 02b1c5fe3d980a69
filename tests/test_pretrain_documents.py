"""Documents of files, sentences of documents: all of the text, and errors that name the line."""

import gzip
import json
import re

import pytest

from bertfast.recipes.pretrain import documents
from bertfast.recipes.pretrain.sentences import sentences

# Without a time, by which two processes would name a test differently.
CUT_OFF = gzip.compress(b"long" * 99, mtime=0)[:-9]
TEXT = "First one.\nits second line\n\n  \nAnother one\r\n\r\nthe third"
PARTS = ["First one.\nits second line\n", "Another one\r\n", "the third"]


def texts(path, column="text"):
    return [d.text for source in documents.find(path).files for d in documents.read(source, column)]


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows(lines, column="text"):
    return "".join(json.dumps({"id": 1, column: line}, ensure_ascii=True) + "\n" for line in lines)


def test_text(tmp_path):
    path = write(tmp_path / "a.txt", TEXT)
    found = list(documents.read(documents.find(path).files[0]))
    assert [document.text for document in found] == PARTS
    assert [document.where for document in found] == ["line 1", "line 5", "line 7"]
    assert found[-1].done == 1 and all(document.source == path for document in found)
    whole = write(tmp_path / "whole.txt", "no empty line\n" * 50)
    assert texts(whole) == ["no empty line\n" * 50]
    marked = write(tmp_path / "marked.txt", b"\xef\xbb\xbfbegins with a mark")
    assert texts(marked) == ["begins with a mark"]


def test_text_of_whole_files(tmp_path, monkeypatch):
    (source,) = documents.find(write(tmp_path / "a.txt", "\n\n" + TEXT)).files
    (found,) = documents.read(source, whole_files=True)
    assert (found.text, found.where) == (TEXT, "line 3")
    assert list(sentences(found.text)) == [
        "First one.",
        "its second line",
        "Another one",
        "the third",
    ]
    monkeypatch.setattr(documents, "LONGEST", 30)
    assert "".join(d.text for d in documents.read(source, whole_files=True)) == TEXT


def test_compressed(tmp_path):
    assert texts(write(tmp_path / "a.txt.gz", gzip.compress(TEXT.encode()))) == PARTS
    lines = gzip.compress(rows(PARTS).encode())
    assert texts(write(tmp_path / "b.jsonl.gz", lines)) == PARTS


def test_json_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", rows(PARTS) + "\n" + rows(["", " ", "héllo \U0001f600"]))
    assert texts(path) == [*PARTS, "héllo \U0001f600"]
    assert texts(write(tmp_path / "b.jsonl", rows(PARTS, "body")), "body") == PARTS
    # Half of a character, which JSON can hold and UTF-8 can't.
    assert texts(write(tmp_path / "c.jsonl", rows(["a\ud83d b"]))) == ["a\ufffd b"]


def table(kind="string"):
    pa = pytest.importorskip("pyarrow")
    return pa.table({"id": [1, 2, 3], "text": pa.array(PARTS, getattr(pa, kind)())})


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_parquet(tmp_path, kind):
    made = table("string" if kind == "dictionary" else kind)
    if kind == "dictionary":
        made = made.set_column(1, "text", made["text"].dictionary_encode())
    from pyarrow import parquet

    parquet.write_table(made, tmp_path / "a.parquet", row_group_size=2)
    assert texts(tmp_path / "a.parquet") == PARTS


def save(folder, made, files=2):
    """A folder as Dataset.save_to_disk writes it."""
    import pyarrow as pa

    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{files:05d}.arrow" for i in range(files)]
    for name, part in zip(names, (made.slice(0, 2), made.slice(2)), strict=True):
        with (
            pa.OSFile(str(folder / name), "wb") as file,
            pa.ipc.new_stream(file, made.schema) as out,
        ):
            out.write_table(part)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    write(folder / "state.json", json.dumps(state))
    write(folder / "dataset_info.json", "{}")


def test_saved_dataset(tmp_path):
    save(tmp_path / "one", table())
    assert texts(tmp_path / "one") == PARTS
    save(tmp_path / "many" / "train", table())
    save(tmp_path / "many" / "test", table().slice(0, 2))
    write(tmp_path / "many" / "dataset_dict.json", json.dumps({"splits": ["train", "test"]}))
    assert texts(tmp_path / "many") == PARTS
    write(tmp_path / "many" / "dataset_dict.json", json.dumps({"splits": ["dev", "test"]}))
    with pytest.raises(ValueError, match="holds the splits dev, test and none is called train"):
        documents.find(tmp_path / "many")
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(FileNotFoundError, match="data-00001-of-00002.arrow is missing"):
        documents.find(tmp_path / "one")


def test_saved_by_the_library_itself(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"text": PARTS})
    made.save_to_disk(tmp_path / "one")
    made.select([2, 0]).save_to_disk(tmp_path / "selected")
    assert texts(tmp_path / "one") == PARTS
    assert texts(tmp_path / "selected") == [PARTS[2], PARTS[0]]


def test_folder(tmp_path):
    for name in ("b.txt", "a/c.jsonl", ".hidden.txt", "wiki_00", "x.pdf", "out/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, rows([name]) if name.endswith("jsonl") else name)
    found = documents.find([tmp_path], without=tmp_path / "out")
    names = [str(source.path.relative_to(tmp_path)) for source in found.files]
    assert names == ["a/c.jsonl", "b.txt", "wiki_00"]
    assert [path.name for path in found.passed_over] == ["x.pdf"]


def test_a_long_document_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST", 100)
    text = "".join(f"line number {i}\n" for i in range(50))
    found = texts(write(tmp_path / "a.txt", text))
    assert "".join(found) == text and max(map(len, found)) <= 100 < len(text)
    assert all(part.endswith("\n") for part in found)
    found = texts(write(tmp_path / "a.jsonl", rows([text])))
    assert "".join(found) == text and max(map(len, found)) == 100


BAD = [
    ("a.txt", b"", "a.txt is empty"),
    ("a.txt", b"\n \n\n", "a.txt has no text: all of it is empty"),
    (
        "a.txt",
        b"good\nb\xffad\n",
        "a.txt, line 2: must be UTF-8, got the byte 0xff at its posi.* 2",
    ),
    ("a.txt", "utf-16".encode("utf-16"), "a.txt, line 1: must be UTF-8, got the byte 0xff"),
    ("a.txt.gz", b"no gzip", "a.txt.gz, after line 0: must be gzip's, got Not a gzipped"),
    ("a.txt.gz", CUT_OFF, "a.txt.gz, after line 0: must be gzip's"),
    ("a.jsonl", b'{"text": "a"}\n{"text"', "a.jsonl, line 2: must be JSON, got Exp"),
    ("a.jsonl", b'["a"]', "a.jsonl, line 1: must be a JSON object, got list"),
    ("a.jsonl", b'\n{"body": "a", "id": 1}', "a.jsonl, line 2: has no 'text' among .*'body', 'id'"),
    ("a.jsonl", b'{"text": 3}', "a.jsonl, line 1: 'text' must be a string, got int"),
    ("a.jsonl", b'{"text": null}', "a.jsonl, line 1: 'text' must be a string, got NoneType"),
    ("a.jsonl", b'{"text": "\xe9"}', "a.jsonl, line 1: must be UTF-8"),
    ("a.parquet", b"PAR1 no", "a.parquet must be a Parquet file"),
]


@pytest.mark.parametrize(("name", "data", "error"), BAD, ids=[f"{b[0]}-{b[1][:9]}" for b in BAD])
def test_bad_files(tmp_path, name, data, error):
    if "parquet" in name:
        pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match=error) as raised:
        texts(write(tmp_path / name, data))
    assert str(tmp_path / name) in str(raised.value)


def test_bad_columns(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(table(), path)
    with pytest.raises(ValueError, match="a.parquet has no 'body' among its columns 'id', 'text'"):
        texts(path, "body")
    with pytest.raises(ValueError, match="a.parquet: 'id' must be a column of strings, got int64"):
        texts(path, "id")
    parquet.write_table(pa.table({"text": ["a", None]}), path)
    with pytest.raises(ValueError, match="a.parquet, row 1: 'text' must be a string, got NoneType"):
        texts(path)
    data = bytearray(path.read_bytes())
    save(tmp_path / "saved", table())
    arrow = tmp_path / "saved" / "data-00000-of-00002.arrow"
    data = arrow.read_bytes()
    arrow.write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="00002.arrow must be an Arrow stream"):
        texts(tmp_path / "saved")
    arrow.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="00002.arrow"):
        texts(tmp_path / "saved")


def test_bad_inputs(tmp_path):
    with pytest.raises(ValueError, match="inputs must name at least one"):
        documents.find([])
    with pytest.raises(FileNotFoundError, match="nothing.txt, of inputs, doesn't exist"):
        documents.find(tmp_path / "nothing.txt")
    write(tmp_path / "x.pdf", "x")
    with pytest.raises(ValueError, match=r"must hold .txt, .jsonl or .parquet files.*got x.pdf"):
        documents.find(tmp_path)
    with pytest.raises(ValueError, match="x.pdf must be text, .*got a file that ends in .pdf"):
        documents.find(tmp_path / "x.pdf")
    assert texts(write(tmp_path / "a.md", "a")) == ["a"]
    assert texts(write(tmp_path / "b.json", rows(["b"]))) == ["b"]
    path = write(tmp_path / "a.txt", "x")
    with pytest.raises(ValueError, match="a.txt twice"):
        documents.find([path, tmp_path])


SENTENCES = [
    ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
    ("It is 3.14 or e.g. this. 42 is", ["It is 3.14 or e.g. this.", "42 is"]),
    ("By J. R. Smith and Dr. Who. So", ["By J. R. Smith and Dr. Who.", "So"]),
    ('He said "yes." "No!" she said', ['He said "yes."', '"No!" she said']),
    ("Well... so it is... Yes.", ["Well... so it is...", "Yes."]),
    ("wrapped\nin lines.\nthe next", ["wrapped in lines.", "the next"]),
    ("A title\n\nthe text", ["A title", "the text"]),
    ("Dr.\n\nWho", ["Dr.", "Who"]),
    ("第一句。第二句！「三」", ["第一句。", "第二句！", "「三」"]),
    ("Été. Élan", ["Été.", "Élan"]),
    (" \n ", []),
]


@pytest.mark.parametrize(("text", "expected"), SENTENCES)
def test_sentences(text, expected):
    assert list(sentences(text)) == expected


@pytest.mark.parametrize(
    "text", ["." * 10**5, " " * 10**5 + "x", "\n \n" * 10**5, 'a. "' + "'" * 10**5, "。" * 10**5]
)
def test_sentences_take_linear_time_and_lose_nothing(text):
    """By the square of the length each of these would take minutes."""
    found = "".join(sentences(text))
    assert re.sub(r"\s", "", found) == re.sub(r"\s", "", text)
