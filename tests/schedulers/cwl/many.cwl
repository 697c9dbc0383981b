#!/usr/bin/env cwl-runner
cwlVersion: v1.2
class: Workflow
label: Several jobs at once

requirements:
  ScatterFeatureRequirement: {}

inputs:
  scripts: string[]

steps:
  job:
    run: job.cwl
    scatter: script
    in: {script: scripts}
    out: [said]

outputs:
  said:
    type: File[]
    outputSource: job/said
