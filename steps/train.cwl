#!/usr/bin/env cwl-runner
cwlVersion: v1.2
class: CommandLineTool
label: Train the global model on a facility's own data
doc: |
  Runs at the facility that the task names, and refuses to run anywhere else: CROSSFL_FACILITY says
  where it is, CROSSFL_DATA where the facility's data lies. The dataset is a name, never a File, so
  no binding can move it. First the received model is measured on the validation split.

requirements:
  SchemaDefRequirement:
    types:
      - $import: types/task.yml
      - $import: types/training.yml
hints:
  SoftwareRequirement:
    packages:
      crossfl: {version: ["0.1.0"]}

baseCommand: [crossfl, train]

inputs:
  global_model:
    type: Directory
    doc: Model to start from.
    inputBinding: {prefix: --global-model}
  task:
    type: "types/task.yml#task"
    doc: What the facility is asked to do.
    inputBinding: {}
  training:
    type: ["null", "types/training.yml#training"]
    doc: How to train; unset, every default.
    inputBinding: {}
  on_failure:
    type: {type: enum, name: on_failure, symbols: [stop, absent]}
    default: stop
    doc: What a failure does, stop this step or count the facility as absent.
    inputBinding: {prefix: --on-failure}

outputs:
  update:
    type: Directory
    doc: Delta in safetensors and its manifest.
