"""Documents of published and converted files, and errors for malformed ones."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from megagrow.errors import InputError
from megagrow.evaluation.local_data import read_documents
from tests.helpers.evaluation.folders import DATA

QUESTION = "\nb\nA.b is c.So it is.\nWhich?\nA.one.\nB.two\nC.three\nD.four\n"
DOC = {"goal": "g", "sol1": "s", "sol2": "t", "label": 1}


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_question_of_logiqa_has_eight_lines(tmp_path):
    write(tmp_path / "logiqa" / "Test.txt", QUESTION * 2)
    docs = read_documents("logiqa", tmp_path)
    assert docs == 2 * [
        {
            "label": "b",
            "context": "A. b is c. So it is.",
            "question": "Which?",
            "options": ["one.", "two", "three", "four"],
        }
    ]


@pytest.mark.parametrize(
    ("published", "on_the_hub"),
    [
        ("He paid 3.5.", "He paid 3. 5."),
        ("The U.S. won. it did", "The U. S.  won.  it did"),
        (" and so on... ", "and so on. . ."),
        ("lower case? Yes!no;so", "lower case? Yes!no;so"),
    ],
)
def test_full_stops_of_logiqa_are_spaced_as_on_the_hub(tmp_path, published, on_the_hub):
    options = "".join(f"{letter}.{published}\n" for letter in "ABCD")
    write(tmp_path / "logiqa" / "Test.txt", f"\na\n{published}\n{published}\n{options}")
    (doc,) = read_documents("logiqa", tmp_path)
    assert [doc["context"], doc["question"], *doc["options"]] == 6 * [on_the_hub]


def test_articles_of_wikitext_end_before_the_next_title(tmp_path):
    first = " = One = \n \n text \n = = Part = = \n more \n = = = = Detail = = = = \n \n"
    formula = "= a + b =\n text of = Two = \n = 2 \n"
    write(tmp_path / "wikitext-2" / "test.txt", f" \n\n{first}\n = Two = \n text \n{formula}")
    pages = [doc["page"] for doc in read_documents("wikitext", tmp_path)]
    assert pages == [first, " = Two = \n text ", formula]


def test_wikitext_before_the_first_title_is_an_article(tmp_path):
    write(tmp_path / "wikitext-2" / "test.txt", "text\n = One = \n")
    pages = [doc["page"] for doc in read_documents("wikitext", tmp_path)]
    assert pages == ["text", " = One = \n"]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_other_tasks_are_read_from_their_folder(tmp_path, form):
    path = tmp_path / "piqa" / f"validation.{form}"
    write(path, "\ufeff" + json.dumps(DOC) + "\n")
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([DOC]), path)
    assert read_documents("piqa", tmp_path) == [DOC]


@pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the data sets in {DATA}")
def test_published_files_hold_as_many_documents_as_the_hub():
    sizes = {"lambada_openai": 5153, "logiqa": 651, "wikitext": 62}
    assert {task: len(read_documents(task, DATA)) for task in sizes} == sizes


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("piqa/other.txt", "", "no data of task piqa; expected piqa/"),
        ("piqa/a.jsonl", "{", "a.jsonl: not valid data of task piqa"),
        ("piqa/a.jsonl", "3\n", "line 1 is not a JSON object"),
        ("piqa/a.jsonl", "\n", "contains no documents"),
        ("piqa/a.parquet", "PAR0", "a.parquet: not valid data of task piqa"),
    ],
)
def test_malformed_data_raises(tmp_path, file, text, message):
    write(tmp_path / file, text)
    with pytest.raises(InputError, match=message):
        read_documents("piqa", tmp_path)


def test_incomplete_question_raises(tmp_path):
    write(tmp_path / "logiqa" / "Test.txt", QUESTION + QUESTION[:20])
    with pytest.raises(InputError, match="line 9 does not start a question"):
        read_documents("logiqa", tmp_path)


def test_missing_folder_raises(tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        read_documents("piqa", tmp_path / "none")
