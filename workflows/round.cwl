#!/usr/bin/env cwl-runner
cwlVersion: v1.2
class: Workflow
label: One round of federated learning
doc: |
  plan, then train at every facility that takes part, then aggregate. A facility that fails is
  absent from the round; aggregate decides whether the round can do without it.

requirements:
  ScatterFeatureRequirement: {}
  SchemaDefRequirement:
    types:
      - $import: ../steps/types/allowance.yml
      - $import: ../steps/types/facility.yml
      - $import: ../steps/types/task.yml
      - $import: ../steps/types/training.yml

inputs:
  global_model:
    type: Directory
    doc: Global model of this round.
  state:
    type: Directory
    doc: Server state of this round.
  more:
    type: boolean
    doc: Whether this round is to be run; the loop reads it.
  facilities:
    type:
      type: array
      items: "../steps/types/facility.yml#facility"
    doc: The facilities of the federation.
  local_steps:
    type: int
    doc: Optimizer steps per facility and round.
  training:
    type: ["null", "../steps/types/training.yml#training"]
    doc: How to train.

outputs:
  next_model:
    type: Directory
    doc: Global model of the next round.
    outputSource: aggregate/next_model
  next_state:
    type: Directory
    doc: Server state of the next round.
    outputSource: aggregate/next_state
  next_more:
    type: boolean
    doc: Whether another round is to follow.
    outputSource: aggregate/more

steps:
  plan:
    run: ../steps/plan.cwl
    in:
      state: state
      facilities: facilities
      local_steps: local_steps
      training: training
    out: [tasks, allowances]
  train:
    run: ../steps/train.cwl
    scatter: task
    in:
      global_model: global_model
      task: plan/tasks
      training: training
      on_failure: {default: absent}
    out: [update]
  aggregate:
    run: ../steps/aggregate.cwl
    in:
      global_model: global_model
      state: state
      updates: train/update
      allowances: plan/allowances
    out: [next_model, next_state, more]
