#!/usr/bin/env cwl-runner
cwlVersion: v1.2
class: CommandLineTool
label: Measure the global model on a facility's validation data
doc: |
  Loss, perplexity and tokens; exact match where samples have a prompt and a completion. Runs only
  at the facility that the task names. Metrics on too few samples do not leave the facility, and
  prompts are completed only where its own settings allow it.

requirements:
  SchemaDefRequirement:
    types:
      - $import: types/task.yml
      - $import: types/training.yml
hints:
  SoftwareRequirement:
    packages:
      crossfl: {version: ["0.1.0"]}

baseCommand: [crossfl, evaluate]

inputs:
  global_model:
    type: Directory
    doc: Model to measure.
    inputBinding: {prefix: --global-model}
  task:
    type: "types/task.yml#task"
    doc: Facility and dataset to measure on.
    inputBinding: {}
  training:
    type: ["null", "types/training.yml#training"]
    doc: Batch size, lengths and threads; unset, every default.
    inputBinding: {}
  prompts:
    type:
      - "null"
      - type: array
        items: string
        inputBinding: {prefix: --prompt=, separate: false}
    doc: Prompts to complete, for people to read.
  on_failure:
    type: {type: enum, name: on_failure, symbols: [stop, absent]}
    default: stop
    doc: What a failure does, stop this step or count the facility as absent.
    inputBinding: {prefix: --on-failure}

outputs:
  evaluation:
    type: Directory
    doc: A manifest with the metrics, and its signature where the facility signs.
