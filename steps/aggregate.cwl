#!/usr/bin/env cwl-runner
cwlVersion: v1.2
class: CommandLineTool
label: Turn the updates of a round into the next global model
doc: |
  Refuses updates that are not as their manifests say, combines the deltas of the others in fp32,
  facilities in sorted order, and applies the result to the fp32 master weights by the server
  optimizer that the state names. Memory does not grow with the model or the number of facilities.

requirements:
  SchemaDefRequirement:
    types:
      - $import: types/allowance.yml
hints:
  SoftwareRequirement:
    packages:
      crossfl: {version: ["0.1.0"]}

baseCommand: [crossfl, aggregate]

inputs:
  global_model:
    type: Directory
    doc: Global model of this round.
    inputBinding: {prefix: --global-model}
  state:
    type: Directory
    doc: Server state of this round.
    inputBinding: {prefix: --state}
  updates:
    type:
      type: array
      items: Directory
      inputBinding: {prefix: --update}
    doc: One update from each facility that was asked, in the order of the allowances.
  allowances:
    type:
      - "null"
      - type: array
        items: "types/allowance.yml#allowance"
        inputBinding: {prefix: --allowance}
    doc: What each member of the federation may claim, as plan says; unset, anyone's update counts.

outputs:
  next_model:
    type: Directory
    doc: Global model of the next round, a Hugging Face checkpoint with a manifest.
  next_state:
    type: Directory
    doc: Server state of the next round.
  more:
    type: boolean
    doc: Whether another round is to follow.
