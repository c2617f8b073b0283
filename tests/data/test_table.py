from __future__ import annotations

import time
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from ask_dist.data.table import read_captions, read_table
from ask_dist.errors import InputError


def table(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_rows_of_one_file_are_joined(tmp_path: Path) -> None:
    path = table(tmp_path, "t.csv", "audio,caption,classes\na/x.wav,one,dog; cat\nb.wav,two,\n./a//x.wav,three,dog\n")
    first, second = read_table(path, "audio", None)
    assert (first.line, first.audio, first.captions, first.classes) == (2, "a/x.wav", ["one", "three"], ["dog", "cat"])
    assert (second.captions, second.classes) == (["two"], [])


def test_csv_with_numbered_captions_leaves_out_empty_and_repeated_ones(tmp_path: Path) -> None:
    path = table(
        tmp_path, "t.csv", '\ufefffile,caption_1,caption_2,caption_3,other\nx.wav,"one, two", ,"one, two",no\n'
    )
    (row,) = read_table(path, "file", None)
    assert row.captions == ["one, two"]


def test_jsonl_takes_strings_and_lists(tmp_path: Path) -> None:
    lines = '{"audio": "x", "captions": ["one", "two"], "class": "dog; cat"}\n\n{"audio": "y", "caption": "three"}\n'
    first, second = read_table(table(tmp_path, "t.jsonl", lines), "audio", None)
    assert (first.captions, first.classes) == (["one", "two"], ["dog; cat"])
    assert (second.line, second.captions) == (3, ["three"])


def test_rows_without_a_path_are_refused_each_by_itself(tmp_path: Path) -> None:
    cells = ("5", "null", '" "', '["x.wav"]', '"x.wav"', "false")
    lines = "".join(f'{{"audio": {cell}, "caption": "words"}}\n' for cell in cells)
    rows = read_table(table(tmp_path, "t.jsonl", lines))
    assert [(row.line, row.audio, row.refused) for row in rows] == [
        (1, "", "the path is of type int, not a string"),
        (2, "", "no path"),
        (3, "", "no path"),
        (4, "", "the path is of type list, not a string"),
        (5, "x.wav", ""),
        (6, "", "the path is of type bool, not a string"),
    ]


def test_time_for_the_captions_of_one_clip_grows_with_their_number(tmp_path: Path) -> None:
    lines = "".join(f"x.wav,caption {number}\n" for number in range(50_000))
    start = time.process_time()
    (row,) = read_table(table(tmp_path, "t.csv", "audio,caption\n" + lines))
    assert time.process_time() - start < 10  # a minute where each line copies those before
    assert row.captions == [f"caption {number}" for number in range(50_000)]


def test_named_caption_columns_are_taken_alone(tmp_path: Path) -> None:
    path = table(tmp_path, "t.csv", "audio,caption,text\nx,no,yes\n")
    assert read_table(path, "audio", ["text"])[0].captions == ["yes"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.txt", "", "neither .csv, .jsonl, .parquet"),
        ("t.parquet", "PAR1", "not Parquet"),
        ("t.csv", "", "no rows"),
        ("t.csv", "audio,caption\n", "no rows"),
        ("t.csv", "file,caption\nx,y\n", "no column audio among file, caption"),
        ("t.csv", "audio,text\nx,y\n", "no column caption among audio, text"),
        ("t.jsonl", '{"audio": "x"}\n', "no column caption"),
        ("t.jsonl", '{"audio": "x", "caption": "y"}\n{"audio"\n', "line 2 is not JSON"),
        ("t.jsonl", "[" * 100_000 + "\n", "line 1 is not JSON"),
        ("t.jsonl", "[1]\n", "line 1 is a list"),
    ],
)
def test_unusable_tables_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_table(table(tmp_path, name, text), "audio", None)


def test_missing_and_binary_tables_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_table(tmp_path / "t.csv", "audio", None)
    (tmp_path / "t.csv").write_bytes("audio,caption\nx.wav,one\n".encode("utf-16"))
    with pytest.raises(InputError, match="not UTF-8"):
        read_table(tmp_path / "t.csv", "audio", None)


def test_a_caption_in_another_encoding_or_of_a_megabyte_costs_no_other(tmp_path: Path) -> None:
    lines = [b"audio,caption", b"x.wav,one", b"y.wav,caf\xe9", b"z.wav," + b"a" * 10**6, "u.wav,café".encode()]
    (tmp_path / "t.csv").write_bytes(b"\n".join(lines))
    rows = read_table(tmp_path / "t.csv")
    assert [row.captions for row in rows] == [["one"], ["caf\udce9"], ["a" * 10**6], ["café"]]
    objects = b"\n".join(b'{"audio": "%s", "caption": "%s"}' % tuple(line.split(b",")) for line in lines[1:])
    (tmp_path / "t.jsonl").write_bytes(objects)
    assert [row.captions for row in read_table(tmp_path / "t.jsonl")] == [row.captions for row in rows]


def test_parquet_holds_what_csv_holds_and_lists_and_is_spared_its_audio(tmp_path: Path) -> None:
    columns = {
        "audio": ["a//x.wav", "b.wav", "a/x.wav"],
        "captions": [["one", "two"], ["three"], ["four"]],
        "class": ["dog", None, "cat"],
        "content": [b"bytes", None, b""],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    first, second = read_table(tmp_path / "t.parquet")
    assert (first.line, first.audio, first.captions, first.classes) == (
        1,
        "a/x.wav",
        ["one", "two", "four"],
        ["dog", "cat"],
    )
    assert (second.line, second.captions, second.classes) == (2, ["three"], [])
    with pytest.raises(InputError, match="no column content among"):
        read_table(tmp_path / "t.parquet", "content")


def test_urls_are_left_as_they_are(tmp_path: Path) -> None:
    path = table(tmp_path, "t.csv", "url,caption\nhttps://host//a/../x.wav?y=1,one\n s3://bucket/y.flac ,two\n")
    assert [row.audio for row in read_table(path, "url")] == ["https://host//a/../x.wav?y=1", "s3://bucket/y.flac"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.txt", "\ufeffa dog\n\n  rain \na dog\nwind\u2028and rain\n"),
        ("t.csv", 'id,caption_1,caption_2\n1,a dog,rain\n2,a dog,"wind\u2028and rain"\n'),
        ("t.jsonl", '{"captions": ["a dog", "rain"]}\n{"caption": "wind\\u2028and rain", "other": "no"}\n'),
    ],
)
def test_captions_alone_are_taken_from_each_kind_of_file_once(tmp_path: Path, name: str, text: str) -> None:
    assert read_captions(table(tmp_path, name, text)) == ["a dog", "rain", "wind\u2028and rain"]


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("t.txt", "\n \n", "holds no caption"),
        ("t.csv", "audio\nx.wav\n", "holds no caption"),
        ("t.xlsx", "", "is neither"),
    ],
)
def test_a_file_without_captions_is_refused(tmp_path: Path, name: str, text: str, line: str) -> None:
    with pytest.raises(InputError, match=line):
        read_captions(table(tmp_path, name, text))
    with pytest.raises(InputError, match=r"is no readable UTF-8 text"):
        read_captions(tmp_path / "missing.txt")
