"""Prompt files: every format, every odd content, every mistake."""

import builtins
import csv
import json
import os

import pytest

from fastcraft.data.prompts import load_prompts
from fastcraft.errors import MissingDependencyError, UserError

PROMPTS = ['a "quoted" cat, sitting', "猫 🐱\u200d⬛ on a mat", "plain, with a comma", "naïve café"]


def write_txt(path, prompts):
    path.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")


def write_csv(path, prompts):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("id", "prompt"), *enumerate(prompts)])


def write_tsv(path, prompts):
    rows = ["Prompt\tCategory\tNote", *(f"{prompt}\tArts\tx" for prompt in prompts)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def write_json(path, prompts):
    path.write_text(json.dumps([{"id": i, "text": prompt} for i, prompt in enumerate(prompts)]))


def write_json_strings(path, prompts):
    path.write_text(json.dumps(prompts))


def write_jsonl(path, prompts):
    path.write_text("".join(json.dumps({"caption": p, "tag": 1}, ensure_ascii=False) + "\n" for p in prompts), "utf-8")


def write_parquet(path, prompts):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"uid": list(range(len(prompts))), "caption": prompts}), path)


WRITERS = {
    "a.txt": write_txt,
    "a.csv": write_csv,
    "a.tsv": write_tsv,
    "a.json": write_json,
    "b.json": write_json_strings,
    "a.jsonl": write_jsonl,
    "a.parquet": write_parquet,
}
TEXT = sorted(set(WRITERS) - {"a.parquet"})


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_prompts(name, tmp_path):
    WRITERS[name](tmp_path / name, PROMPTS)
    source = load_prompts(tmp_path / name)
    assert list(source.prompts) == PROMPTS
    assert (source.num_empty, source.num_duplicates, source.num_neutralised) == (0, 0, 0)


@pytest.mark.parametrize("name", WRITERS)
def test_empty_rows_go_and_duplicates_stay(name, tmp_path):
    WRITERS[name](tmp_path / name, ["a", "", "b", "  \t " if "tsv" not in name else "  ", "a", "a"])
    source = load_prompts(tmp_path / name)
    assert list(source.prompts) == ["a", "b", "a", "a"]
    assert (source.num_empty, source.num_duplicates) == (2, 2)
    assert source.summary() == f"4 prompts from {tmp_path / name} (2 duplicates kept, 2 empty lines dropped)"


@pytest.mark.parametrize("name", TEXT)
def test_byte_order_mark_and_windows_line_ends(name, tmp_path):
    WRITERS[name](tmp_path / name, PROMPTS)
    content = (tmp_path / name).read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
    assert list(load_prompts(tmp_path / name).prompts) == PROMPTS


@pytest.mark.parametrize("name", TEXT)
def test_last_line_needs_no_end(name, tmp_path):
    WRITERS[name](tmp_path / name, PROMPTS)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes().rstrip(b"\r\n"))
    assert list(load_prompts(tmp_path / name).prompts) == PROMPTS


def test_null_is_an_empty_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": null}\n"a bare string"\n\n{"prompt": "a"}\n')
    source = load_prompts(tmp_path / "a.jsonl")
    assert list(source.prompts) == ["a bare string", "a"]
    assert source.num_empty == 2


def test_quotes_mean_nothing_in_tsv(tmp_path):
    (tmp_path / "a.tsv").write_text('Prompt\tCategory\n"unclosed\tArts\nthe word "START"\tArts\n')
    assert list(load_prompts(tmp_path / "a.tsv").prompts) == ['"unclosed', 'the word "START"']


def test_csv_field_over_the_usual_limit_and_over_lines(tmp_path):
    raw = json.dumps({"x": "y" * 300_000})
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "raw_data"), ("two\nlines", raw), ("b", raw)])
    before = csv.field_size_limit()
    assert list(load_prompts(tmp_path / "a.csv").prompts) == ["two lines", "b"]
    assert csv.field_size_limit() == before, "the limit belongs to the whole process"


def test_one_line_json_may_be_long(tmp_path):
    prompts = [f"prompt number {i} {'x' * 3000}" for i in range(6000)]
    (tmp_path / "a.json").write_text(json.dumps(prompts))
    assert (tmp_path / "a.json").stat().st_size > 1 << 24
    assert len(load_prompts(tmp_path / "a.json")) == 6000


def test_column_by_name_and_by_order(tmp_path):
    (tmp_path / "a.csv").write_text("caption, text ,style\nc,t,s\n")
    assert list(load_prompts(tmp_path / "a.csv").prompts) == ["t"], "text comes before caption"
    assert list(load_prompts(tmp_path / "a.csv", column="style").prompts) == ["s"]


def test_controls_and_marks_are_neutralised(tmp_path):
    (tmp_path / "a.txt").write_text(
        "bell\x07 and\ttab\na <|endoftext|> cat\n<|StartOfText|>dog\n<|endoftext|>\n"
        "<|endof<|endoftext|>text|>\u2028x\n",
        encoding="utf-8",
    )
    source = load_prompts(tmp_path / "a.txt")
    assert list(source.prompts) == ["bell  and tab", "a   cat", "dog", "<|endof text|> x"]
    assert (source.num_neutralised, source.num_empty) == (4, 1)
    assert "4 cleared of tokenizer marks" in source.summary()


def test_prompts_index_like_a_list(tmp_path):
    write_txt(tmp_path / "a.txt", PROMPTS)
    prompts = load_prompts(tmp_path / "a.txt").prompts
    assert prompts[-1] == PROMPTS[-1]
    assert prompts[1:3] == PROMPTS[1:3]
    assert prompts[::-1] == PROMPTS[::-1]
    for index in (4, -5):
        with pytest.raises(IndexError):
            prompts[index]


def test_length_is_counted_in_characters_after_cleaning(tmp_path):
    write_txt(tmp_path / "a.txt", ["  " + "🐱" * 50 + "  "])
    assert len(load_prompts(tmp_path / "a.txt", max_characters=50).prompts[0]) == 50
    with pytest.raises(UserError, match="line 1: a prompt may have at most 49 characters, got 50"):
        load_prompts(tmp_path / "a.txt", max_characters=49)


BAD = {
    "missing": ("a.txt", None, "no such file"),
    "empty": ("a.txt", b"", "holds no prompts (0 empty rows)"),
    "mark only": ("a.txt", b"\xef\xbb\xbf", "holds no prompts"),
    "blank": ("a.txt", b"\n \n\t\n", "holds no prompts (3 empty rows)"),
    "empty csv": ("a.csv", b"", "holds no prompts"),
    "header only": ("a.csv", b"prompt\n", "holds no prompts"),
    "empty json": ("a.json", b"", "holds no prompts"),
    "empty list": ("a.json", b"[]", "holds no prompts"),
    "empty jsonl": ("a.jsonl", b"\n", "holds no prompts"),
    "ending": ("a.docx", b"x", "must end in .txt, .csv, .tsv, .json, .jsonl, .parquet, got"),
    "no ending": ("prompts", b"x", "must end in .txt"),
    "nul": ("a.txt", b"ok\nb\0d\n", "line 2: a NUL byte; this is a binary file, not UTF-8 text"),
    "png": ("a.txt", b"\x89PNG\r\n\x1a\n", "line 1: byte 1 is not UTF-8; this is a binary file or another encoding"),
    "latin-1": ("a.csv", "prompt\nok\ncafé noir\n".encode("latin-1"), "line 3: byte 4 is not UTF-8"),
    "utf-16": ("a.txt", "cat".encode("utf-16"), "line 1: a NUL byte"),
    "binary csv": ("a.csv", b"PK\x03\x04\0\0", "line 1: a NUL byte"),
    "binary jsonl": ("a.jsonl", b'"ok"\n\0\n', "line 2: a NUL byte"),
    "binary json": ("a.json", b"[\n\xff]", "line 2: byte 1 is not UTF-8"),
    "long": ("a.txt", b"ok\n" + b"x" * 4001, "line 2: a prompt may have at most 4000 characters, got 4001"),
    "endless": ("a.txt", b"ok\n" + b"x" * 10**6, "line 2: longer than 17024 bytes"),
    "endless wide": ("a.txt", b"ok\n" + "é".encode() * 10**5, "line 2: longer than 17024 bytes"),
    "long in jsonl": ("a.jsonl", b'"ok"\n"' + b"x" * 4001 + b'"', "line 2: a prompt may have at most 4000"),
    "long in csv": ("a.csv", b"prompt\n\nok\n" + b"x" * 4001, "line 4: a prompt may have at most 4000"),
    "surrogate": ("a.jsonl", rb'"ok"' + b"\n" + rb'"half \ud83d"', r"line 2: a lone surrogate ('\ud83d')"),
    "surrogate in json": ("a.json", rb'["ok", "half \udc00"]', r"entry 2: a lone surrogate ('\udc00')"),
    "number": ("a.json", b'["ok", 3]', "entry 2: a prompt must be a string, got 3"),
    "list": ("a.jsonl", b'{"prompt": ["x"]}', "line 1: a prompt must be a string, got ['x']"),
    "object": ("a.json", b'{"prompt": "x"}', "must hold a list of strings or objects, got an object"),
    "no json": ("a.json", b'["ok",\n oops]', "line 2 column 2: not JSON: Expecting value"),
    "no jsonl": ("a.jsonl", b'"ok"\n{"prompt": "x"', "line 2 column 15: not JSON"),
    "deep": ("a.jsonl", b'"ok"\n' + b"[" * 200_000, "line 2: not JSON that can be read"),
    "columns": (
        "a.csv",
        b"Prompts,Category\nx,y\n",
        "has none of prompt, Prompt, text, caption; found: 'Prompts', 'Ca",
    ),
    "keys": ("a.jsonl", b'{"prompt": "x"}\n{"tag": 1}', "no column 'prompt' in"),
    "quote": ("a.csv", b'prompt\n"open\nx\n', "unexpected end of data"),
    "stray quote": ("a.csv", b'prompt\nok\n"a "b" c"\n', "line 3: ',' expected after '\"'"),
    "short row": ("a.csv", b"id,prompt\n1,x\n2\n", "line 3: column 'prompt' is number 2, got 1 fields"),
    "huge field": ("a.csv", b'prompt,b\nx,"' + (b"y" * 10**6 + b"\n") * 18, "field larger than field limit"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_one_line_with_file_and_place(case, tmp_path):
    name, content, message = BAD[case]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_prompts(path)
    assert message in str(error.value)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_named_column_that_is_not_there(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,style\nx,y\n")
    with pytest.raises(UserError, match=r"no column 'promt' in .*; columns found: 'prompt', 'style'"):
        load_prompts(tmp_path / "a.csv", column="promt")
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n{"style": "y"}\n')
    with pytest.raises(UserError, match=r"columns found: 'style' \(line 2\)"):
        load_prompts(tmp_path / "a.jsonl")


def test_folder_and_special_files(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(UserError, match="is a folder, not a file"):
        load_prompts(tmp_path / "a.txt")
    os.mkfifo(tmp_path / "b.txt")
    with pytest.raises(UserError, match="is not a regular file"):
        load_prompts(tmp_path / "b.txt")
    with pytest.raises(UserError, match="File name too long"):
        load_prompts(tmp_path / ("x" * 300 + ".txt"))


def test_max_characters_has_a_floor(tmp_path):
    write_txt(tmp_path / "a.txt", PROMPTS)
    with pytest.raises(UserError, match=r"max_characters must be at least 1, got 0"):
        load_prompts(tmp_path / "a.txt", max_characters=0)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def no_pyarrow(name, *args, **kwargs):
        if name.split(".")[0] == "pyarrow":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_pyarrow)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(MissingDependencyError, match=r"needs the package pyarrow: pip install 'fastcraft\[parquet\]'"):
        load_prompts(tmp_path / "a.parquet")


def test_bad_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="is no readable parquet file"):
        load_prompts(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"uid": [1]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="found: 'uid'"):
        load_prompts(tmp_path / "b.parquet")
    with pytest.raises(UserError, match="row 1: a prompt must be a string, got 1"):
        load_prompts(tmp_path / "b.parquet", column="uid")
    parquet.write_table(pyarrow.table({"prompt": ["a", None, "b"]}), tmp_path / "c.parquet")
    assert load_prompts(tmp_path / "c.parquet").num_empty == 1
