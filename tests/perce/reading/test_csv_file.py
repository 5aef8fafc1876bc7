"""perce.reading.csv_file: every CSV has one meaning, or an error with the place of the mistake."""

import csv

import pytest

from perce import UserError, load_examples
from tests.helpers.csv_files import HEADER, csv_file, replies


@pytest.mark.parametrize(
    ("lines", "line", "field"),
    [
        (['p,q,"I like', "p,q,r2", 'p,q,"r3"', "p,q,r4"], 2, "response"),  # the quote swallows rows up to the next one
        (["p,q,r1", 'p,"q,r2', "p,q,r3"], 3, "query"),  # … or up to the end of the file
        (['p,"q" q,r1'], 2, "query"),
        (['p,q,"he said \\"hi\\" to me"'], 2, "response"),
        (['p, "one, two",r1'], 2, "query"),  # a quote after a space quotes nothing, so the comma ends the cell
    ],
)
def test_a_stray_quote_is_named_and_costs_its_own_row_only(tmp_path, lines, line, field):
    path = csv_file(tmp_path / "d.csv", *lines, "p,q,last")
    with pytest.raises(UserError, match=rf"d\.csv:{line}: field '{field}': expected .*quote"):
        load_examples(path, "train")
    rows = load_examples(path, "train", skip_bad_rows=True)
    assert len(rows.all) + rows.skipped == len(lines) + 1 and rows.all[-1].response == "last"


@pytest.mark.parametrize("null", ["NULL", "\\N", '"NULL"'])
def test_what_databases_write_for_no_value_is_a_missing_field(tmp_path, null):
    """As a text it was the persona of some rows, and the one user of all rows that have none."""
    rows = csv_file(tmp_path / "rows.csv", f"{null},I ski.,Hi,Null and NULL", header=f"user_id,{HEADER}")
    (example,) = load_examples(rows, "train").all
    assert (example.user_id, example.response) == (None, "Null and NULL")
    without = csv_file(tmp_path / "without.csv", "p,q,r", f"{null},q,r")
    with pytest.raises(UserError, match=r"without\.csv:3: field 'persona'"):
        replies(without)


def test_no_row_is_made_of_what_is_in_a_cell(tmp_path):
    """A record with correct quotes and a cell too many is one bad row, even if its lines look like rows."""
    path = csv_file(tmp_path / "d.csv", 'p,"first', "x,y,z", 'last",r,one too many', "p,q,r")
    rows = load_examples(path, "train", skip_bad_rows=True)
    assert [(e.source, e.response) for e in rows] == [("d.csv:5", "r")] and rows.skipped == 1
    with pytest.raises(UserError, match=r"d\.csv:2: field 'response': expected .*quote.*got 'last\"'"):
        load_examples(csv_file(tmp_path / "d.csv", 'p,q,last"'), "train")  # the second half of a stray pair


def test_backslashes_before_quotes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"backslash"):
        load_examples(csv_file(tmp_path / "d.csv", 'p,q,"he said \\"hi\\" to me"'), "train")


def test_quotes_that_have_one_meaning_are_read(tmp_path):
    path = csv_file(tmp_path / "d.csv", 'p,a 5" disk,"two ""words"""', '"p","q","a', "", 'b, c"', 'p,"","r"', "p,q,r")
    rows = load_examples(path, "train", skip_bad_rows=True)
    assert [e.response for e in rows] == ['two "words"', "a\n\nb, c", "r"] and rows.skipped == 1  # a query is missing
    assert rows.all[0].turns[0].content == 'a 5" disk' and [e.source for e in rows] == ["d.csv:2", "d.csv:3", "d.csv:7"]


@pytest.mark.parametrize(("mark", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars")])
def test_other_separators_are_named(tmp_path, mark, name):
    path = csv_file(tmp_path / "d.csv", mark.join(["p", "q, or not", "r"]), header=HEADER.replace(",", mark))
    with pytest.raises(UserError, match=rf"d\.csv:1: expected commas .*, got {name}.*pandas"):
        load_examples(path, "train")


def test_the_encoding_of_a_file_with_other_separators_is_named_too(tmp_path):
    text = "persona;query;response\np;q;" + "x" * 70_000 + "\np;q;Gr\u00fc\u00dfe\n"
    for encoding, named in (("cp1252", ", encoding='cp1252'"), ("utf-8", "")):
        (tmp_path / "d.csv").write_bytes(text.encode(encoding))
        with pytest.raises(UserError, match=rf"pd\.read_csv\(OLD, sep=';'{named}\)\.to_csv"):
            load_examples(tmp_path / "d.csv", "train")


def test_a_header_with_spaces_is_named(tmp_path):
    with pytest.raises(UserError, match=r"d\.csv:1: .*' query'.*space"):
        load_examples(csv_file(tmp_path / "d.csv", "p, q, r", header="persona, query, response"), "train")


def test_a_csv_of_many_rows_is_written_and_read(tmp_path):
    """Whatever is in the cells, what csv writes is read back unchanged."""
    texts = ['"', '""', "a,b", "a\nb", "a\r\nb", "a;b", "'", "\\", '\\"', " x ", "[a]", "a\u2028b", "é"]
    with (tmp_path / "d.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([HEADER.split(","), *([one, other, one] for one in texts for other in texts)])
    rows = load_examples(tmp_path / "d.csv", "train").all
    assert [(e.persona, e.turns[0].content, e.response) for e in rows] == [
        ((one,), other, one) for one in texts for other in texts
    ]
