"""The reader of headlines: what is read is what the user meant, or one line says why it is refused."""

import bz2
import csv
import gzip
import io
import json
import lzma
import sys

import pytest

from lab04 import LabError
from lab04.read import headlines

LABELS = ["World", "Sports", "Business", "Sci/Tech", "climate"]
CSV = "text,label\nShares fall,Business\nCup final,Sports\n"
JSONL = '{"text": "Shares fall", "label": "Business"}\n{"text": "Cup final", "label": "Sports"}\n'
BOTH = [("Shares fall", "Business"), ("Cup final", "Sports")]


@pytest.fixture
def read(tmp_path):
    """`read(name, content, **options)`: the rows of a file."""

    def read(name, content, labels=LABELS, **options):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return list(headlines.read(path, labels, **options))

    return read


@pytest.fixture
def refused(read):
    """`refused(name, content)`: the one line with which a file is refused."""

    def refused(*arguments, **options):
        with pytest.raises(LabError) as error:
            read(*arguments, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    return refused


def pairs(rows):
    return [(row.text, row.label) for row in rows]


# --- Read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("comma.csv", CSV),
        ("semicolon.csv", CSV.replace(",", ";")),
        ("tab.csv", CSV.replace(",", "\t")),
        ("rows.tsv", CSV.replace(",", "\t")),
        ("ROWS.CSV", CSV),
        ("excel.csv", "sep=;\r\n" + CSV.replace(",", ";")),
        ("excel.csv", "\ufeffsep=|\r\n" + CSV.replace(",", "|")),
        ("mark.csv", "\ufeff" + CSV),
        ("crlf.csv", CSV.replace("\n", "\r\n")),
        ("cr.csv", CSV.replace("\n", "\r")),
        ("no-last-end.csv", CSV.rstrip()),
        ("blank-lines.csv", "\n" + CSV.replace("\n", "\n\n")),
        ("more-columns.csv", "month,label,text\n2023,Business,Shares fall\n2023,Sports, Cup final \n"),
        ("title.csv", CSV.replace("text", "Title")),
        ("headline.csv", CSV.replace("text", "HEADLINE")),
        ("blanks.csv", "text , label\nShares fall , Business\nCup final, Sports\n"),
        ("quoted.csv", '"text", "label"\n"Shares fall", "Business"\n"Cup final", "Sports"\n'),
        ("delimiter-in-header.csv", '"id;of;the;row",text,label\n1,Shares fall,Business\n2,Cup final,Sports\n'),
        ("newline-in-header.csv", '"id\nof row";text;label\n1;Shares fall;Business\n2;Cup final;Sports\n'),
        ("trailing.csv", "text,label,\nShares fall,Business,\nCup final,Sports,\n"),
        ("label-case.csv", CSV.replace("Business", " bUSINESS ").replace("Sports", "SPORTS")),
        ("description.csv", "label,title,description\nBusiness,Shares fall,Why\nSports,Cup final,When\n"),
        ("ag-news.csv", "Class Index,Title,Description\n3,Shares fall,Why\n2,Cup final,When\n"),
        ("pipes.csv", CSV.replace(",", "|")),
        ("joined.csv", "\ufeff" + CSV.replace("Cup", "\ufefftext,label\nCup")),
        ("marked.csv", CSV.replace("Cup", "\ufeffCup")),
        ("long.csv", f"text,label,body\nShares fall,Business,{'x' * 140_000}\nCup final,Sports,\n"),
        ("numbers.csv", "text,label\nShares fall,2\nCup final,1\n"),
        ("numbers.jsonl", '{"text": "Shares fall", "label": 2.0}\n{"text": "Cup final", "label": 1}\n'),
        ("rows.ndjson", JSONL),
        ("rows.tab", CSV.replace(",", "\t")),
        ("joined.jsonl", "\ufeff" + JSONL.replace("\n", "\n\ufeff", 1)),
        ("rows.jsonl", JSONL),
        ("rows.jsonl", JSONL.replace("\n", "\r\n\r\n")),
        ("rows.jsonl", JSONL.replace("text", "Title")),
        ("rows.json", json.dumps([json.loads(line) for line in JSONL.splitlines()], indent=1)),
        ("utf16.csv", CSV.encode("utf-16")),
        ("utf16-le.csv", b"\xff\xfe" + CSV.encode("utf-16-le")),
        ("utf16-be.csv", b"\xfe\xff" + CSV.encode("utf-16-be")),
        ("utf16.jsonl", JSONL.encode("utf-16")),
        ("utf16.json", f"[{','.join(JSONL.splitlines())}]".encode("utf-16")),
    ],
)
def test_every_usual_form_of_a_file_gives_its_headlines_and_labels(read, name, content):
    assert pairs(read(name, content)) == BOTH


@pytest.mark.parametrize(
    "lines",
    [
        ['"Historic" deal\tWorld', "Cup final\tSports"],  # no quoting: the quotes are the headline's
        ['"We won\tWorld', "Cup final\tSports"],
        ['"We won\tWorld', '"They lost"\tSports', "Cup final\tSports"],
        ['5" of rain\tWorld', '"Storm"" floods"\tSports'],  # quoted where it must be
        ['"Storm\nfloods"\tWorld', "Cup final\tSports"],
        ['"tabs\tin it"\tWorld', "Cup final\tSports"],
    ],
)
def test_tsv_is_read_with_quotes_or_without(read, lines):
    raw = [line.split("\t") for line in lines if "\n" not in line]
    quoted = list(csv.reader("\n".join(lines).splitlines(keepends=True), delimiter="\t"))
    expected = raw if lines[0].startswith(('"H', '"W')) else quoted
    rows = read("rows.tsv", "text\tlabel\n" + "\n".join(lines) + "\n")
    assert [[row.text, row.label] for row in rows] == expected
    assert [row.line for row in read("rows.tsv", "text\n\n" + "\n".join(f'"{n}' for n in range(250)))][-1] == 252


@pytest.mark.parametrize("ending", ["parquet", "pq", "arrow", "feather"])
def test_parquet_and_arrow_are_read_with_the_names_of_their_classes(ending, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import feather, parquet

    table = pyarrow.table({"Text": ["Shares fall", None, "Cup final"], "label": [1, 0, 0]})
    classes = {"label": {"names": ["Sports", "Business"], "_type": "ClassLabel"}, "text": {"dtype": "string"}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": classes}})})
    path = tmp_path / f"rows.{ending}"
    if ending == "arrow":  # as `datasets` keeps its own
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    else:
        (feather.write_feather if ending == "feather" else parquet.write_table)(table, str(path))
    rows = list(headlines.read(path, LABELS))
    assert pairs(rows) == BOTH
    assert [row.line for row in rows] == [1, 3]
    if ending != "arrow":  # a stream has no mark of its own
        named = path.rename(tmp_path / "rows.csv")
        with pytest.raises(LabError, match="say --format"):
            list(headlines.read(named))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_what_is_not_parquet_or_arrow_is_refused(kind, read, refused, monkeypatch):
    assert f"as {kind.capitalize()}" in refused(f"rows.{kind}", CSV)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "needs pyarrow" in refused(f"rows.{kind}", CSV)


@pytest.mark.parametrize(
    "content",
    [
        "Shares fall\nCup final\n",
        "\ufeffShares fall\n\ufeffCup final\n",
        "\ufeffShares fall\r\n\r\nCup final",
        "Shares fall\rCup final\r",
        "Shares fall\n Cup final ".encode("utf-16"),
    ],
)
def test_text_is_a_headline_a_line(read, content):
    assert pairs(read("headlines.txt", content)) == [("Shares fall", None), ("Cup final", None)]


@pytest.mark.parametrize("line", ["[Watch] Text, title and label", "3,000 flee", "{sic}", "Title fight, Text book"])
def test_a_headline_that_resembles_another_format_is_still_one(read, line):
    assert pairs(read("headlines.txt", line)) == [(line, None)]


def test_a_format_by_option_overrides_the_name(read):
    assert pairs(read("rows.txt", CSV, format="csv")) == BOTH
    assert pairs(read("rows", JSONL, format="jsonl")) == BOTH
    assert pairs(read("rows.csv", "text,label\n", format="text")) == [("text,label", None)]


def test_columns_by_option(read):
    content = "id,Subject,text,Topic\n1,Shares fall,x,Business\n2,Cup final,x,Sports\n"
    assert pairs(read("rows.csv", content, text_column="subject ", label_column="topic")) == BOTH
    content = '{"Subject": "Shares fall", "Topic": "Business"}\n{"Subject": "Cup final", "Topic": "Sports"}'
    assert pairs(read("rows.jsonl", content, text_column="subject", label_column="TOPIC")) == BOTH


def test_lines_are_counted_past_line_breaks_in_cells(read):
    rows = read("rows.csv", '"te\nxt",title\n1,A\n\n"2\r\n\n",B\n3,C\n')
    assert [(row.line, row.text) for row in rows] == [(3, "A"), (5, "B"), (8, "C")]
    assert [row.line for row in read("rows.csv", "sep=,\ntext\nA\nB\n")] == [3, 4]


def test_json_texts_without_an_object_are_headlines(read):
    assert pairs(read("rows.json", '["Shares fall", "Cup final"]')) == [("Shares fall", None), ("Cup final", None)]


@pytest.mark.parametrize("label", ["null", '""', '" "', "NaN"])
def test_a_blank_label_is_no_label(read, label):
    assert pairs(read("rows.jsonl", f'{{"text": "A", "label": {label}}}')) == [("A", None)]
    assert pairs(read("rows.csv", "text,label\nA, \n")) == [("A", None)]


def test_labels_of_another_taxonomy_are_left_out_on_demand(read, refused):
    assert "--no-labels" in refused("rows.csv", "text,label\nA,Weather\n")
    assert pairs(read("rows.csv", "text,label\nA,Weather\n", no_labels=True)) == [("A", None)]
    assert pairs(read("rows.jsonl", '{"text": "A", "label": ["x"], "Label": 1}', no_labels=True)) == [("A", None)]


def test_numbers_of_classes_are_the_models_and_it_is_said(read, refused, capsys):
    assert pairs(read("rows.csv", "text,label\nA,4\nB,World\nC,0\n")) == [
        ("A", "climate"),
        ("B", "World"),
        ("C", "World"),
    ]
    [line] = capsys.readouterr().err.splitlines()
    assert "0 World, 1 Sports" in line
    for number in ("5", "-1", "9" * 5000, "²", "1.5"):
        assert "is not one of the model's" in refused("rows.csv", f"text,label\nA,{number}\n")


def test_a_blank_headline_is_skipped_and_counted(read, capsys):
    assert pairs(read("rows.csv", "text,label\nA,World\n ,Sports\n,\nB,World\n")) == [("A", "World"), ("B", "World")]
    assert capsys.readouterr().err.endswith("rows.csv: 2 blank headlines skipped\n")
    assert pairs(read("rows.jsonl", '{"text": "A"}\n{"text": NaN}\n')) == [("A", None)]
    assert capsys.readouterr().err.endswith("rows.jsonl: 1 blank headline skipped\n")


def test_headlines_are_read_as_they_come(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b"text\nA\nB\nCaf\xe9\n")
    rows = headlines.read(tmp_path / "rows.csv")
    assert [next(rows).text, next(rows).text] == ["A", "B"]
    with pytest.raises(LabError, match="line 4"):
        next(rows)


# --- Labels -----------------------------------------------------------------------------------------------


def test_labels_that_differ_only_in_case_are_not_mixed_up(read, refused):
    labels = ["US", "us", "World"]
    assert pairs(read("rows.csv", "text,label\nA,US\nB,us\nC,WORLD\n", labels)) == [
        ("A", "US"),
        ("B", "us"),
        ("C", "World"),
    ]
    assert "line 2: label 'Us'" in refused("rows.csv", "text,label\nA,Us\n", labels)


def test_ag_news_counts_its_classes_from_1(read, refused):
    assert "line 2: label '3'" in refused("rows.csv", "label,title,description\n3,A,B\n")
    assert "label '5'" in refused("rows.csv", "Class Index,Title,Description\n5,A,B\n")
    assert "no column text, title or headline" in refused("rows.csv", '"3","A","B"\n"2","C","D"\n')


def test_numbers_that_are_the_models_own_labels_stay(read):
    own = ["1", "2", "3", "4", "Business"]
    assert pairs(read("rows.csv", "Class Index,Title,Description\n3,A,B\n", own)) == [("A", "3")]
    assert pairs(read("rows.jsonl", '{"label": 3, "text": "A"}', own)) == [("A", "3")]


def test_a_measured_file_needs_a_label_a_headline(tmp_path):
    (tmp_path / "rows.csv").write_text(CSV)
    assert headlines.read_labelled(tmp_path / "rows.csv", LABELS) == (["Shares fall", "Cup final"], [2, 1])
    (tmp_path / "rows.csv").write_text("text,label\nA,World\nB,\n")
    with pytest.raises(LabError, match="line 3 has no label"):
        headlines.read_labelled(tmp_path / "rows.csv", LABELS)


# --- Refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ("text,label\nA,World\n", "csv"),
        ("\n\ufeff text , label\n".lstrip("\n"), "csv"),
        ("Title;Label\n", "csv"),
        ("id,title\n", "csv"),
        ("text\n", "csv"),
        ("label,title,description\n", "csv"),
        ("Class Index,Title,Description\n", "csv"),
        ('"3","Shares fall","Why"\n', "csv"),
        ("sep=;\n", "csv"),
        ("text\tlabel\n", "tsv"),
        ('{"text": "A"}\n', "jsonl"),
        ("\n{\n", "jsonl"),
        ('[{"text": "A"}]', "json"),
        ('["A"]', "json"),
        ("[\n", "json"),
    ],
)
def test_another_format_is_not_read_as_headlines(refused, monkeypatch, content, hint):
    for name in ("rows", "rows.txt", "rows.data"):
        assert f"say --format {hint}," in refused(name, content)
    monkeypatch.setattr("builtins.open", lambda *_, **__: io.BufferedReader(io.BytesIO(content.encode())))
    with pytest.raises(LabError, match=f"standard input looks like {hint}"):
        list(headlines.read("-"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("label.csv", "text,label\nA,World\nB,Weather\n", "line 3: label 'Weather' is not one of the model's: Bus"),
        ("empty.csv", "", "holds no headlines"),
        ("empty.json", "[]", "holds no headlines"),
        ("empty.jsonl", "\n", "holds no headlines"),
        ("empty.txt", " \n\n", "holds no headlines"),
        ("header-only.csv", "text,label\n", "holds no headlines"),
        ("blank.csv", "text,label\n ,World\n", "holds no headlines"),
        ("columns.csv", "subject,topic\nA,World\n", "no column text, title or headline: name it with --text-column"),
        ("two.csv", "text,Text\nA,B\n", "columns 'text' and 'text'"),
        ("two.csv", "title,text\nA,B\n", "columns 'title' and 'text': name the one you mean with --text-column"),
        ("two.csv", "text,label,Label\nA,World,World\n", "columns 'label' and 'label'"),
        ("two.jsonl", '{"text": "A", "text": "B"}', "a name twice"),
        ("two.jsonl", '{"text": "A", "Text": "B"}', "columns 'text' and 'text'"),
        ("short.csv", "text,label\nA\n", "line 2 has 1 cells, not 2"),
        ("comma.csv", "text,label\nA,World\nShares fall, says bank,World\n", "line 3 has 3 cells, not 2"),
        ("comma.csv", "text\nShares fall, says bank\n", "line 2 has 2 cells, not 1"),
        ("quote.csv", 'text,label\n"A,World\nB,World\n', "line 2"),
        ("quote.csv", 'text,label\nA,World\n"B,World\n"C",World\n', "line 3"),
        ("quote.csv", '"text,label\n' + "A,World\n" * 200, "a quote that never closes"),
        ("sep.csv", "sep=x\ntextxlabel\n", "'x' separates no cells"),
        ("null.csv", "text,label\nA\0,World\n", "line 2 has a null byte"),
        ("null.txt", "A\nB\0\n", "line 2 has a null byte"),
        ("null.jsonl", '{"text": "A"}\n\0', "line 2 has a null byte"),
        ("utf16.csv", CSV.encode("utf-16-le"), "line 1 has a null byte: if it is UTF-16, convert it: iconv"),
        ("utf16.txt", CSV.encode("utf-16-be"), "line 1 has a null byte"),
        ("utf16.csv", b"\xff\xfe" + CSV.encode("utf-16-le") + b"\x00\xd8", "begins as UTF-16 but is not"),
        ("latin.csv", "text\nA\nCafé\n".encode("latin-1"), "is not UTF-8 (line 3): convert it, e.g. iconv -f LATIN1"),
        ("latin.txt", "A\nCafé\n".encode("latin-1"), "is not UTF-8 (line 2)"),
        ("latin.json", '["Café"]'.encode("latin-1"), "is not UTF-8 (line 1)"),
        ("half.txt", b"A\n\xed\xa0\x80\n", "is not UTF-8 (line 2)"),
        ("half.jsonl", '{"text": "A"}\n{"text": "\\ud800"}\n', "line 2: the text has half a surrogate pair"),
        ("zipped.csv", gzip.compress(CSV.encode(), mtime=0), "compressed: unpack it, e.g. with gunzip"),
        ("zipped.csv", lzma.compress(CSV.encode()), "compressed: unpack it, e.g. with unxz"),
        ("zipped.txt", bz2.compress(CSV.encode()), "compressed: unpack it, e.g. with bunzip2"),
        ("book.csv", b"PK\x03\x04\x14\x00", "a workbook or zip: save it as CSV UTF-8"),
        ("book.xlsx", b"PK\x03\x04\x14\x00", "a workbook or zip"),
        ("book.xls", b"\xd0\xcf\x11\xe0\xa1\xb1", "a workbook"),
        ("rows.jsonl", "not json\n", "line 1 cannot be read as JSON"),
        ("rows.jsonl", '{"text": "A"}\n{"label": "World"}\n', "line 2 has no column text"),
        ("rows.jsonl", '{"text": 5}\n', "line 1: the text is no string"),
        ("rows.jsonl", '{"text": ["A"]}\n', "line 1: the text is no string"),
        ("rows.jsonl", '{"text": "A", "label": {"name": "World"}}\n', "line 1: the label is neither"),
        ("rows.jsonl", '[{"text": "A"}]\n', "an array of them is --format json"),
        ("rows.jsonl", "[" * 100_000, "line 1 cannot be read as JSON"),
        ("rows.json", "[" * 100_000, "cannot be read as JSON"),
        ("rows.json", JSONL, "one object a line is --format jsonl"),
        ("rows.json", '{"text": "A"}', "it is no array"),
        ("rows.json", '[{"text": "A"}, 5]', "row 2 cannot be read as JSON (no object with a text)"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_place(refused, name, content, message):
    line = refused(name, content)
    assert name in line and message in line


def test_a_column_that_is_not_there_is_refused(refused):
    assert "no column 'subject', only text, label" in refused("rows.csv", CSV, text_column="subject")
    assert "no column 'topic', only text, label" in refused("rows.csv", CSV, label_column="topic")
    assert "line 1 has no column 'subject'" in refused("rows.jsonl", JSONL, text_column="subject")
    assert "no column 'subject'" in refused("rows.txt", "Shares fall\n", text_column="subject")


def test_a_folder_and_a_missing_file_are_refused(tmp_path):
    for path, message in ((tmp_path, "Is a directory"), (tmp_path / "none.csv", "No such file")):
        with pytest.raises(LabError, match=f"cannot read .*{message}"):
            list(headlines.read(path))
