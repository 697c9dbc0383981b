"""A command arrives whole through any login shell."""

import shutil
import subprocess

import pytest

from crossfl.engine.connectors.login_shell import MARK, encoded, interpreter

SHELLS = ("sh", "bash", "dash", "zsh", "tcsh", "csh", "fish")
HOSTILE = """\
printf '%s\\n' 'one "two" $three `four` !five \\\\six' "$((1 + 1))"
if true; then echo "a !bang, it's quoted"; fi
cat <<'END'
é ~ * ? [x] {y,z} = %1 #no comment
END
echo error >&2
exit 7
"""
ANSWER = """\
one "two" $three `four` !five \\\\six
2
a !bang, it's quoted
é ~ * ? [x] {y,z} = %1 #no comment
error
"""


def through(shell: str, command: str) -> tuple[str, int]:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run([shell, "-c", encoded(command, merged=True)], capture_output=True)
    assert done.stderr == b""
    answer = done.stdout.decode()
    assert answer.startswith(MARK)
    return answer.removeprefix(MARK), done.returncode


@pytest.mark.parametrize("shell", SHELLS)
def test_a_command_of_every_character(shell: str) -> None:
    assert through(shell, HOSTILE) == (ANSWER, 7)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_is_run_by_the_program_that_it_names(shell: str) -> None:
    script = "#!/bin/bash -l\nwords=(one 'two three'); shopt -q login_shell && echo ${#words[@]}"
    answer, status = through(shell, script)
    assert status == 0
    assert answer.endswith("2\n")


@pytest.mark.parametrize("shell", SHELLS)
def test_a_long_command(shell: str) -> None:
    text = "x" * 60_000
    assert through(shell, f"printf '%s\\n' {text} | wc -c") == ("60001\n", 0)


@pytest.mark.parametrize("shell", SHELLS)
def test_the_mark_is_not_in_the_command(shell: str) -> None:
    """A login shell may print the command itself: the output does not begin there."""
    assert MARK.strip() not in encoded(f"echo {shell}", merged=False)


def test_the_interpreter_of_a_script() -> None:
    assert interpreter("#!/bin/bash -l\ntrue") == ["/bin/bash", "-l"]
    assert interpreter("#! /usr/bin/env bash\ntrue") == ["/usr/bin/env", "bash"]
    assert interpreter("true") == ["/bin/sh"]
