#!/usr/bin/env cwl-runner
cwlVersion: v1.2
class: CommandLineTool
label: Turn history and evaluations into one HTML page
doc: |
  A static page that opens offline: loss by facility and round, time by phase, and the tables.

requirements:
  SchemaDefRequirement:
    types:
      - $import: types/allowance.yml
hints:
  SoftwareRequirement:
    packages:
      crossfl: {version: ["0.1.0"]}

baseCommand: [crossfl, report]

inputs:
  state:
    type: Directory
    doc: Server state after the last round.
    inputBinding: {prefix: --state}
  evaluations:
    type:
      type: array
      items: Directory
      inputBinding: {prefix: --evaluation}
    doc: One evaluation from each facility that was asked, in the order of the allowances.
  allowances:
    type:
      - "null"
      - type: array
        items: "types/allowance.yml#allowance"
        inputBinding: {prefix: --allowance}
    doc: Who was asked for an evaluation, as plan says; unset, an evaluation may be anyone's.
  comparison:
    type: File?
    doc: What crossfl compare found, for how each facility fares alone.
    inputBinding: {prefix: --comparison}

outputs:
  history:
    type: File
    doc: What happened, one JSON object for each round.
  evaluation:
    type: File
    doc: The evaluations of all facilities in one JSON document.
  report:
    type: File
    doc: The page.
