#!/usr/bin/env cwl-runner
cwlVersion: v1.2
class: Workflow
label: One job that reads its standard input

inputs:
  words: File

steps:
  job:
    run:
      class: CommandLineTool
      inputs:
        words: File
      baseCommand: [tr, a-z, A-Z]
      stdin: $(inputs.words.path)
      stdout: said.txt
      outputs:
        said: stdout
    in: {words: words}
    out: [said]

outputs:
  said:
    type: File
    outputSource: job/said
