"""A line of the shell is cut as people expect who write prompts in it."""

import pytest
from llmasos.userland.llsh.line import BadLine, End, parse


def cut(line: str) -> list[tuple[list[str], str]]:
    return [(command.words, command.end.value) for command in parse(line)]


def test_words_quotes_and_escapes():
    assert cut(r'''run m "two words" 'it is' a\ b ""''') == [
        (["run", "m", "two words", "it is", "a b", ""], ";")
    ]
    assert cut(r'run "say \"hi\" \n"') == [(["run", r'say "hi" \n'], ";")]


def test_operators_need_no_blanks_and_mean_nothing_in_quotes():
    assert cut("a;b&&c&d") == [(["a"], ";"), (["b"], "&&"), (["c"], "&"), (["d"], ";")]
    assert cut("run m 'a; b && c & d'") == [(["run", "m", "a; b && c & d"], ";")]
    assert cut('run m ";"') == [(["run", "m", ";"], ";")]


def test_comments_begin_only_where_a_word_could():
    assert cut("ps # who runs? & why") == [(["ps"], ";")]
    assert cut("run m what is C# for") == [(["run", "m", "what", "is", "C#", "for"], ";")]
    assert cut("ps # one\nls") == [(["ps"], ";"), (["ls"], ";")]


def test_what_prompts_are_made_of_stays_as_it_is():
    assert cut("run m is 3 > 2 | $HOME *?") == [(["run", "m", "is", "3", ">", "2", "|", "$HOME", "*?"], ";")]


def test_lines_are_commands_and_empty_ones_nothing():
    assert cut("a\n\n  \nb;;") == [(["a"], ";"), (["b"], ";")]
    assert cut("") == cut("   # only a comment") == []


@pytest.mark.parametrize("line", ["run 'open", 'run "open', "&& ps", "ps &&", "ps & && ls", "& ps"])
def test_what_is_no_line_is_said_to_be_none(line):
    with pytest.raises(BadLine):
        parse(line)


def test_the_end_of_a_background_command():
    assert parse("run m hi &")[0].end is End.BACKGROUND
