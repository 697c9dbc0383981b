#!/usr/bin/env cwl-runner
cwlVersion: v1.2
class: CommandLineTool
label: Turn history and evaluations into one HTML page
doc: |
  A static page that opens offline: loss by facility and round, time by phase, and the tables.

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
      items: File
      inputBinding: {prefix: --evaluation}
    doc: One evaluation from each facility.
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
