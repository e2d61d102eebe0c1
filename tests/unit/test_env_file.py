from __future__ import annotations

import pytest

from oz_worker.backends.env_file import EnvFileError, parse


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", {}),
        ("\n\n  # only a comment\n", {}),
        ("A=1", {"A": "1"}),
        ("A=1\r\nB=2\r\n", {"A": "1", "B": "2"}),
        ("export A=1", {"A": "1"}),
        ("  A = spaced out  ", {"A": "spaced out"}),
        ("A: yaml", {"A": "yaml"}),
        ("A=", {"A": ""}),
        ("A=x # comment", {"A": "x"}),
        ("A=x#y", {"A": "x#y"}),
        ("A=#fff", {"A": "#fff"}),
        ("A= # nothing", {"A": ""}),
        ("A=a=b=c", {"A": "a=b=c"}),
        ("A='$HOME # \\n'", {"A": "$HOME # \\n"}),
        ("A='two\nlines'", {"A": "two\nlines"}),
        ('A="two\nlines"\nB=3', {"A": "two\nlines", "B": "3"}),
        (r'A="a\nb\t\"c\"\\"', {"A": 'a\nb\t"c"\\'}),
        ('A="x" # comment', {"A": "x"}),
        ("A=1\nA=2", {"A": "2"}),
        ("A=$HOME/bin", {"A": "/home/me/bin"}),
        ("A=${HOME}ly", {"A": "/home/mely"}),
        ('A=1\nB="$A-${A}"', {"A": "1", "B": "1-1"}),
        ("A=$UNKNOWN.", {"A": "."}),
        ("A=pa$word", {"A": "pa$word"}),
        ("A=$", {"A": "$"}),
        (r"A=\$HOME", {"A": "$HOME"}),
        (r'A="\$HOME"', {"A": "$HOME"}),
        ("A=C:\\temp\\new", {"A": "C:\\temp\\new"}),
        ("a.b-c=1", {"a.b-c": "1"}),
        ("A=ünïcode", {"A": "ünïcode"}),
    ],
)
def test_values_mean_what_people_mean_by_them(text: str, found: dict[str, str]) -> None:
    assert parse(text, {"HOME": "/home/me"}) == found


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("A=1\nnonsense\n", 2),
        ("A=1\n\n=value", 3),
        ("export A", 1),
        ("1A=x", 1),
        ("A='one\ntwo\nB=3", 1),
        ('OK=1\nA="open', 2),
        ('A="x" y', 1),
        ("A='x'y", 1),
        ("A=1\nB=\0", 2),
    ],
)
def test_a_mistake_is_an_error_with_its_line_and_without_the_value(text: str, line: int) -> None:
    with pytest.raises(EnvFileError) as caught:
        parse(text.replace("=x", "=hidden-value"), {})
    assert caught.value.line == line
    assert "hidden-value" not in str(caught.value)


def test_a_variable_of_the_file_wins_over_the_task_s_own() -> None:
    assert parse("A=new\nB=$A", {"A": "old"}) == {"A": "new", "B": "new"}
