#!/usr/bin/env cwl-runner
cwlVersion: v1.2
class: Workflow
label: One job with an input, whose standard output the scheduler keeps

inputs:
  words: File

steps:
  job:
    run:
      class: CommandLineTool
      requirements:
        InitialWorkDirRequirement:
          listing:
            - {entryname: written, entry: by the engine}
      inputs:
        words: {type: File, inputBinding: {position: 1}}
      baseCommand: [sh, -c, 'mkdir box && cp "$0" box/copy && umask > box/umask && umask']
      outputs:
        box: {type: Directory, outputBinding: {glob: box}}
    in: {words: words}
    out: [box]

outputs:
  box:
    type: Directory
    outputSource: job/box
