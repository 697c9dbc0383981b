#!/usr/bin/env cwl-runner
cwlVersion: v1.2
class: Workflow
label: Merge updates once, and measure the result
doc: |
  A workflow that is no federation and uses two of its steps: updates that somebody has are averaged
  into a model, which is then measured on a dataset of one facility.

requirements:
  SchemaDefRequirement:
    types:
      - $import: ../../steps/types/allowance.yml
      - $import: ../../steps/types/task.yml
      - $import: ../../steps/types/training.yml

inputs:
  global_model:
    type: Directory
    doc: Model that the updates were made from.
  state:
    type: Directory
    doc: Server state of that model.
  updates:
    type: Directory[]
    doc: Updates to average.
  task:
    type: "../../steps/types/task.yml#task"
    doc: Facility and dataset to measure on; nothing else has to be given.
  training:
    type: ["null", "../../steps/types/training.yml#training"]
    doc: Batch size, lengths and threads.

outputs:
  model:
    type: Directory
    doc: The merged model.
    outputSource: merge/next_model
  evaluation:
    type: Directory
    doc: What was measured.
    outputSource: measure/evaluation

steps:
  merge:
    run: ../../steps/aggregate.cwl
    in:
      global_model: global_model
      state: state
      updates: updates
    out: [next_model]
  measure:
    run: ../../steps/evaluate.cwl
    in:
      global_model: merge/next_model
      task: task
      training: training
    out: [evaluation]
