"""Prompts find their pictures: by name where the file names them, else by place, and no row is lost on the way."""

import json

import pytest

from fastcraft.commands.score_prompts import prompts_of
from fastcraft.errors import UserError

NAMES = ["1.png", "2.png", "10.png"]


@pytest.fixture
def paired(tmp_path):
    """What `prompts_of` gives for a file with this content."""

    def go(ending, content, **options):
        file = tmp_path / f"prompts.{ending}"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return prompts_of(str(file), NAMES, **options)

    return go


def refused(paired, message, *args, **options):
    with pytest.raises(UserError) as error:
        paired(*args, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_empty_line_is_a_prompt_in_its_place(paired):
    prompts, notes = paired("txt", "one\n\nthree\n")
    assert prompts == ["one", "", "three"]
    assert notes == ["--prompts: 3, 1 of them empty: line 2"]
    assert paired("txt", "one\ntwo\nthree\n") == (["one", "two", "three"], [])
    assert paired("csv", 'id,prompt\n1,one\n2,\n3,"a, b"\n')[0] == ["one", "", "a, b"]
    assert paired("json", ["one", None, "three"])[0] == ["one", "", "three"]
    assert paired("jsonl", '"one"\n\n{"prompt": "three"}\n')[0] == ["one", "", "three"]
    assert paired("json", [{"prompt": "one"}, "two", {"prompt": "three"}])[0] == ["one", "two", "three"]


def test_empty_lines_at_the_end_count_where_a_picture_is(paired):
    assert paired("txt", "one\ntwo\nthree\n\n  \n") == (["one", "two", "three"], [])
    assert paired("txt", "one\ntwo\n\n\n\n")[0] == ["one", "two", ""]


def test_another_number_is_refused_with_the_empty_ones_named(paired):
    rule = "--prompts: one for each of the 3 pictures is needed, got "
    refused(paired, rule + "4, 2 of them empty: line 1, line 3", "txt", "\none\n\ntwo\n")
    refused(paired, rule + "2", "txt", "one\ntwo\n")
    refused(paired, rule + "2; no pictures by their names, so not read: a.heic", "txt", "one\ntwo\n", others="a.heic")


def test_a_column_of_names_pairs_by_name(paired):
    csv = "prompt,file\nten,10.png\none,1.png\ntwo,2.png\n"
    assert paired("csv", csv) == (["one", "two", "ten"], [])
    assert paired("tsv", csv.replace(",", "\t"))[0] == ["one", "two", "ten"]
    entries = [{"caption": "ten", "file": "10.png"}, {"caption": "one", "file": "1.png"}]
    assert paired("json", [*entries, {"caption": "two", "file": "2.png"}])[0] == ["one", "two", "ten"]
    assert paired("jsonl", "\n".join(map(json.dumps, [*entries, {"caption": "", "file": "2.png"}])))[0][1] == ""
    assert paired("csv", "prompt,file\nten,10.png\n\none,1.png\n,2.png\n") == (
        ["one", "", "ten"],
        ["--prompts: 3, 1 of them empty: line 5"],
    )


def test_another_column_may_hold_the_prompt(paired):
    content = "file,prompt,long\n10.png,a,ten\n2.png,b,two\n1.png,c,one\n"
    assert paired("csv", content, column="long")[0] == ["one", "two", "ten"]
    assert paired("csv", content, column="file")[0] == ["10.png", "2.png", "1.png"], "named as the prompt itself"


def test_a_parquet_file_pairs_by_name_too(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"prompt": ["ten", "one", None], "file": ["10.png", "1.png", "2.png"]})
    parquet.write_table(table, tmp_path / "p.parquet")
    assert prompts_of(str(tmp_path / "p.parquet"), NAMES)[0] == ["one", "", "ten"]
    parquet.write_table(table.drop_columns("file"), tmp_path / "p.parquet")
    assert prompts_of(str(tmp_path / "p.parquet"), NAMES)[0] == ["ten", "one", ""]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1.png,a\n3.png,b\n", "line 3: 'file' must name a picture in --images, got '3.png'"),
        ("1.png,a\n1.png,b\n", "line 3: each picture once, got '1.png' in line 2 too"),
        ("1.png,a\n", ": every picture in --images needs a row, and there is none for 2.png, 10.png"),
        ("1.png,a\n,b\n", "line 3: 'file' must name a picture, got nothing"),
    ],
)
def test_names_that_do_not_fit_are_refused(content, message, paired):
    refused(paired, message, "csv", "file,prompt\n" + content)


def test_names_that_are_no_names_are_refused(paired):
    refused(paired, "entry 1: 'file' must name a picture, got 1", "json", [{"prompt": "a", "file": 1}])
    entries = [{"prompt": "a", "file": "1.png"}, {"prompt": "b"}]
    refused(paired, "prompts: no column 'file'", "json", entries)


def test_what_cannot_be_read_is_refused_as_ever(paired):
    refused(paired, "holds no prompts (2 empty rows)", "txt", "\n\n")
    refused(paired, "no column 'text'", "csv", "prompt\na\n", column="text")
    refused(paired, "a lone surrogate", "json", '["\\ud800", "b", "c"]')
