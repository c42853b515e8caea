"""Command lines that are answered before torch is imported."""

from __future__ import annotations

import sys
from argparse import Namespace

import pytest

from utils.options import add_retired, answer_early, make_parser, positive_int


def parse(description: str) -> Namespace:
    parser = make_parser(description, "example")
    parser.add_argument("--steps", type=positive_int)
    add_retired(parser, {"--old": (False, "gone")})
    args = parser.parse_args()
    if args.steps == 7:
        raise ValueError("7 fits nothing")
    return args


@pytest.mark.parametrize("words", [["--old"], ["--steps", "7"], []])
def test_what_is_for_main_is_left_to_it(words, monkeypatch, capsys):
    """A note would come twice, and a mistake that is no argparse error as a traceback."""
    monkeypatch.setattr(sys, "argv", ["x.py", *words])
    answer_early(parse, "about")
    assert capsys.readouterr() == ("", "")


def test_wrong_options_and_help_end_the_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x.py", "--old", "--steps", "0"])
    with pytest.raises(SystemExit) as end:
        answer_early(parse, "about")
    text = capsys.readouterr().err
    assert end.value.code == 2 and "0 is not a positive integer" in text and "note: --old" in text
    monkeypatch.setattr(sys, "argv", ["x.py", "--help"])
    with pytest.raises(SystemExit) as end:
        answer_early(parse, "about")
    assert end.value.code == 0 and capsys.readouterr().out.count("about") == 1
