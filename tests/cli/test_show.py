"""What reaches the terminal: no secret, no control character, and no markup that data may hold."""

import warnings

from hf_gradnas.cli.show import Screen, quiet_libraries
from hf_gradnas.errors import GradNASWarning

HOSTILE = "[red]a[/red] [link=http://x]b[/link] \x1b[2J\x1b]0;t\x07 \r \u202e \udcff hf_ABCDEF123"


def _check(shown, *, out, err):
    for text, count in ((shown.out, out), (shown.err, err)):
        assert not set("\x1b\x07\r\u202e\udcff") & set(text)
        assert "hf_ABCDEF123" not in text
        assert text.count("[red]a[/red] [link=http://x]b[/link]") == count
        assert text.count("\\x1b[2J\\x1b]0;t\\x07 \\r \\u202e \\udcff hf_***") == count


def test_lines_warnings_errors_and_tables_are_plain(capsys):
    screen = Screen()
    screen.line(HOSTILE)
    screen.table(HOSTILE, (HOSTILE,), [(HOSTILE,)])
    screen.warn(HOSTILE)
    screen.error(HOSTILE)
    with quiet_libraries(screen):
        warnings.simplefilter("always")
        warnings.warn(HOSTILE, UserWarning, stacklevel=1)
        warnings.warn(HOSTILE, GradNASWarning, stacklevel=1)
    _check(capsys.readouterr(), out=4, err=4)


def test_so_is_a_progress_bar(capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    screen = Screen()
    with screen.progress(HOSTILE) as report:
        report(1, 2)
    text = capsys.readouterr().err
    assert "[red]a[/red]" in text
    assert not set("\x07\u202e") & set(text)
    assert "\x1b[2J\x1b]" not in text
