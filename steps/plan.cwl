#!/usr/bin/env cwl-runner
cwlVersion: v1.2
class: CommandLineTool
label: Decide the tasks of the next round
doc: |
  One task for each facility that takes part, sorted by name. Facilities may join, leave or sit out
  a round; where a facility goes on in its data and on the learning-rate schedule follows from the
  server state.

requirements:
  SchemaDefRequirement:
    types:
      - $import: types/allowance.yml
      - $import: types/facility.yml
      - $import: types/task.yml
      - $import: types/training.yml
hints:
  SoftwareRequirement:
    packages:
      crossfl: {version: ["0.1.0"]}

baseCommand: [crossfl, plan]

inputs:
  state:
    type: Directory
    doc: Server state.
    inputBinding: {prefix: --state}
  facilities:
    type:
      type: array
      items: "types/facility.yml#facility"
      inputBinding: {prefix: --facility}
    doc: The facilities of the federation.
  local_steps:
    type: int
    doc: Optimizer steps per facility and round.
    inputBinding: {prefix: --local-steps}
  training:
    type: ["null", "types/training.yml#training"]
    doc: How the facilities train, from which what they may claim follows; unset, every default.
    inputBinding: {}
  purpose:
    type: {type: enum, name: purpose, symbols: [train, evaluate]}
    default: train
    doc: What the tasks are for.
    inputBinding: {prefix: --purpose}

outputs:
  round:
    type: int
    doc: Number of the round, counted from 1; for evaluate, of the round just finished.
  tasks:
    type:
      type: array
      items: "types/task.yml#task"
    doc: What each facility is asked to do.
  allowances:
    type:
      type: array
      items: "types/allowance.yml#allowance"
    doc: What each member of the federation may claim in this round, for aggregate and report.
