#!/usr/bin/env cwl-runner
cwlVersion: v1.2
class: Workflow
label: One job

inputs:
  script: string

steps:
  job:
    run: job.cwl
    in: {script: script}
    out: [said, box]

outputs:
  said:
    type: File
    outputSource: job/said
  box:
    type: Directory?
    outputSource: job/box
