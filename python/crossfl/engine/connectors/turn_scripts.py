"""What a facility's login node and job run for a turn; `turns` says what a turn is.

Every script may run twice, and may be cut off: the next time, it does the rest.
"""

from __future__ import annotations

import base64
import re
import shlex
from dataclasses import dataclass
from pathlib import PurePosixPath

from streamflow.core.deployment import ExecutionLocation
from streamflow.core.utils import random_name

from crossfl.engine.recovery.closing import Turn
from crossfl.engine.recovery.housekeeping import RANDOM_NAME
from crossfl.protocol import variables
from crossfl.protocol.layout import PROGRESS_FILE

ENDED = re.compile(r"^turn=(\d+)-\S+ status=(\d+)$", re.MULTILINE)

# A job that is started a second time, because the scheduler requeued it, goes on with its turn.
JOB = """\
umask 077
trap : TERM USR1
cd {folder} || exit 81
[ ! -L next ] || mv -fT next taken
turn=$(readlink taken) || exit 82
export {progress_variable}="$PWD/$turn/{progress_file}"
(trap : TERM USR1; . "./$turn/command")
status=$?
echo "$status" > "$turn/.status" && mv -f "$turn/.status" "$turn/status"
exit "$status"
"""

REMOVE = """\
remove() {{
    case $1 in [0-9]*) ;; *) return 0 ;; esac
    cat "$1/folders" "$1/made" 2>/dev/null | while IFS= read -r old; do rm -rf -- "$old"; done
    rm -rf -- "$1"
}}
"""

# Prints `runs` where a job has taken a turn, and `ended` where its command has ended well: a new
# turn is too late for it. What an earlier round has collected is removed, and what has failed.
LOOK = (
    REMOVE
    + """\
cd {folder} 2>/dev/null || exit 0
status=$(cat taken/status 2>/dev/null)
if [ -e collected ] && [ "$(cat collected)" -lt {round} ] || [ "${{status:-0}}" != 0 ]; then
    for turn in [0-9]*; do remove "$turn"; done
    rm -rf submission next taken collected job
fi
[ -L taken ] || exit 0
[ -e taken/status ] && echo ended || echo runs
"""
)

# The turn that is replaced is removed, unless the job took it this moment, or it is this one.
PUBLISH = (
    REMOVE
    + """\
mkdir -p {folder}/{turn} && cd {folder} || exit 83
printf '%s\\n' {folders} > {turn}/folders
printf '%s\\n' {workdir} > {turn}/made
printf %s {command} | base64 -d > {turn}/.command && mv -f {turn}/.command {turn}/command
printf %s {job} | base64 -d > .job && mv -f .job job
old=$(readlink next)
[ "$old" != {turn} ] || exit 0
ln -sfn {turn} .next && mv -fT .next next || exit 83
[ "$old" = "$(readlink taken)" ] || remove "$old"
"""
)

# Outputs are moved, and found again: a run that was killed before it used them collects anew.
COLLECT = """\
cd {folder} || exit 83
turn=$(readlink taken) && [ -e "$turn/status" ] || exit 0
made=$(while IFS= read -r old; do [ ! -d "$old" ] || {{ echo "$old"; break; }}; done < "$turn/made")
if [ "$made" != {workdir} ]; then
    rm -rf {workdir}
    {{ echo {workdir}; cat "$turn/made"; }} > "$turn/.made" && mv -f "$turn/.made" "$turn/made"
    mv -T "$made" {workdir} || exit 85
fi
echo {round} > collected
grep -qs '"status": "absent"' {workdir}/update/manifest.json && echo absent
echo "turn=$turn status=$(cat "$turn/status")"
"""

# Prints what the scheduler answered, unless the job has ended.
SUBMITTED = """\
cd {folder} 2>/dev/null || exit 0
[ -e taken/status ] || cat submission/answer 2>/dev/null || true
"""

FORGET = (
    REMOVE
    + """\
cd {folder} 2>/dev/null || exit 0
for turn in [0-9]*; do remove "$turn"; done
rm -rf {folder}
"""
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the engine wants done for one turn.

    Attributes:
        turn: the turn.
        job_name: the engine's name of the job.
        location: where the job runs.
        script: the command, as a shell script.
        workdir: the folder for the outputs.
    """

    turn: Turn
    job_name: str
    location: ExecutionLocation
    script: str
    workdir: PurePosixPath

    @property
    def root(self) -> PurePosixPath:
        """The work folder of the site."""
        return self.workdir.parent

    @property
    def place(self) -> PurePosixPath:
        """The folder of the facility's turns."""
        return self.root / "turns" / f"{self.turn.federation}-{self.turn.facility}"

    @property
    def folders(self) -> list[str]:
        """The folders that the engine made for this job at the site, that of the outputs first."""
        names = re.findall(rf"{re.escape(str(self.root))}/({RANDOM_NAME.pattern})", self.script)
        made = [str(self.root / name) for name, *_ in names]
        return list(dict.fromkeys([str(self.workdir), *made]))

    def fill(self, script: str, **values: str | int) -> str:
        """A script with its values, the folder of the turns among them."""
        return script.format(
            folder=shlex.quote(str(self.place)),
            progress_variable=variables.JOB_PROGRESS,
            progress_file=PROGRESS_FILE,
            **values,
        )


def published(request: Request) -> dict[str, str]:
    """The values of `PUBLISH` for a new turn."""
    return {
        "turn": f"{request.turn.round:06}-{random_name()[:8]}",
        "command": _encoded(request.script),
        "folders": shlex.join(request.folders),
        "workdir": shlex.quote(str(request.workdir)),
        "job": _encoded(request.fill(JOB)),
    }


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
