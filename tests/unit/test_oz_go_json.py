"""The bytes behind `--mcp` are those of Go's encoder. The expectations were printed by Go 1.26."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oz_worker.dialects.oz.go_json import DECODER, compact, member, quote, raw_object, spans

TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", '"plain"'),
        ("<a>&b", r'"\u003ca\u003e\u0026b"'),
        ("\u2028\u2029", r'"\u2028\u2029"'),
        ('"\\/', r'"\"\\/"'),
        ("\b\f\n\r\t", r'"\b\f\n\r\t"'),
        ("\x00\x1f\x7f", '"\\u0000\\u001f\x7f"'),
        ("é😀", '"é😀"'),
        ("\ud800x", '"\ufffdx"'),
    ],
)
def test_a_key_is_escaped_as_go_does(text: str, expected: str) -> None:
    assert quote(text) == expected


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (' { "b" : 1 ,\n"a" :\t[ 1.10 , 1E+5, -0 ] } ', '{"b":1,"a":[1.10,1E+5,-0]}'),
        ('"a b\\u003C\\/<\u2028"', '"a b\\u003C\\/\\u003c\\u2028"'),
        ('"\\" \\\\"', '"\\" \\\\"'),
        ('"\\ud800"', '"\\ud800"'),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
    ],
)
def test_a_value_keeps_its_spelling_and_loses_its_blanks(raw: str, expected: str) -> None:
    assert compact(raw) == expected


@pytest.mark.parametrize("raw", ["NaN", "[Infinity]", '{"a": -Infinity}'])
def test_what_is_no_json_is_refused(raw: str) -> None:
    with pytest.raises(ValueError, match="no JSON"):
        compact(raw)


def test_names_of_constants_inside_texts_are_left_alone() -> None:
    assert compact('"NaN \\" Infinity"') == '"NaN \\" Infinity"'


def test_top_level_keys_are_sorted_and_the_last_duplicate_wins() -> None:
    text = ' { "b" : [ 2 ] , "\\u0061" : {"z":1, "y":2} , "b":3, "\U0001f600":4, "\uffff":5 } '
    assert raw_object(text, 0) == '{"a":{"z":1,"y":2},"b":3,"\uffff":5,"\U0001f600":4}'


@given(st.dictionaries(st.text(), TREES), st.sampled_from([0, 1, "\t"]), st.booleans())
def test_what_is_written_means_what_was_read(
    tree: dict[str, object], indent: int | str | None, ascii_only: bool
) -> None:
    text = json.dumps(tree, indent=indent, ensure_ascii=ascii_only)
    written = raw_object(text, 0)
    assert DECODER.decode(written) == DECODER.decode(text)
    assert not set("<>&\u2028\u2029") & set(written)
    assert list(spans(written)) == sorted(tree)


def test_the_exact_name_is_preferred_and_case_is_forgiven() -> None:
    assert member({"TASK_ID": 1, "task_id": 2, "Task_Id": 3}, "task_id") == 2
    assert member({"TASK_ID": 1, "Task_Id": 3}, "task_id") == 3
    assert member({"ta\u017f\u212a_id": 4}, "task_id") == 4
    assert member({"seßion": 1, "taskid": 2}, "session") is None


def test_a_number_nobody_can_hold_reads_as_null() -> None:
    assert DECODER.decode("[1e400, NaN, -Infinity, " + "9" * 100_000 + ", 1.0]") == [None, None, None, None, 1.0]
