#!/usr/bin/env cwl-runner
cwlVersion: v1.2
class: CommandLineTool
label: Run a script
doc: A job of a few seconds, to see how its end is reported.

inputs:
  script:
    type: string
    doc: What `sh` runs.
    inputBinding: {position: 1}

baseCommand: [sh, -c]
stdout: said.txt

outputs:
  said:
    type: stdout
    doc: What it printed.
  box:
    type: Directory?
    doc: A folder that it may leave.
    outputBinding: {glob: box}
