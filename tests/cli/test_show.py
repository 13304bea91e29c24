"""What reaches the terminal: no secret, no control character, and no markup that data may hold."""

import io
import time
import warnings

from report_cases import make_case
from rich.console import Console

from hf_gradnas.cli import ticking
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


def test_no_name_in_a_table_is_broken(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    name = "model.language_model.layers.{0-29}.self_attn"
    Screen().table("Plan", ("module", "why", "n"), [(name, "a reason of words " * 4, "1,234")])
    lines = capsys.readouterr().out.splitlines()
    assert any(name in line and "1,234" in line for line in lines)
    assert max(len(line.rstrip()) for line in lines) <= len(name) + 20


def test_equal_layers_are_in_one_row(capsys):
    plan, structure, _, _ = make_case(30)
    same = {
        name: tuple(range(2 if size == 4 else 500 + 8 * (name.split(".")[2] == "7")))
        for name, size in plan.sizes.items()
    }
    plan = type(plan)(same, plan.sizes, plan.layout)
    Screen().plan(plan, structure)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "layers" in line]
    assert rows == [
        ["model.layers.{0-29}.self_attn", "kv_groups", "2/4", "50%"],
        ["model.layers.{0-6,8-29}.mlp", "neurons", "500/1,000", "50%"],
        ["model.layers.7.mlp", "neurons", "508/1,000", "51%"],
    ]


def test_long_steps_say_so_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setattr(ticking, "FIRST_SECONDS", 0.02)
    monkeypatch.setattr(ticking, "NEXT_SECONDS", 0.02)
    out = io.StringIO()
    with ticking.plain_progress(Console(file=out), HOSTILE[:3]) as report:
        while out.getvalue().count("\n") < 2:
            time.sleep(0.01)
        report(1024, 4096)
        report(2048, 4096)
        while "2,048 of 4,096" not in out.getvalue():
            time.sleep(0.01)
    said = out.getvalue()
    assert said.startswith("[re: 0 s\n[re: 0 s\n")
    assert "[re: 2,048 of 4,096, 0 s\n" in said
    time.sleep(0.05)
    assert out.getvalue() == said


def test_the_last_line_is_what_came_of_it(capsys):
    screen = Screen(results=False, notes=False)
    screen.line("before")
    screen.warn("kept for later")
    screen.outcome(make_case()[-1], "small")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == (
        "Kept 48.0% of the FLOPs and 22.6% of the parameters: small\n",
        "",
    )
    assert screen.warnings == ["kept for later"]
    Screen(last=False).outcome(make_case()[-1], None)
    assert capsys.readouterr().out == ""
