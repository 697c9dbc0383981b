#!/usr/bin/env cwl-runner
cwlVersion: v1.2
class: Workflow
label: Rounds of two jobs at once
$namespaces: {cwltool: "http://commonwl.org/cwltool#"}

requirements:
  ScatterFeatureRequirement: {}
  SubworkflowFeatureRequirement: {}
  StepInputExpressionRequirement: {}
  MultipleInputFeatureRequirement: {}

inputs:
  scripts: string[]
  more: boolean

steps:
  rounds:
    in: {scripts: scripts, more: more}
    out: [said, next_more]
    requirements:
      cwltool:Loop:
        loopWhen: $(inputs.more)
        loop: {more: next_more}
        outputMethod: last
    run:
      class: Workflow
      inputs:
        scripts: string[]
        more: boolean
      steps:
        job:
          run: job.cwl
          scatter: script
          in: {script: scripts}
          out: [said]
        decide:
          run:
            class: CommandLineTool
            inputs: {said: "File[]"}
            baseCommand: ["echo", '{"next_more": false}']
            stdout: cwl.output.json
            outputs:
              next_more: boolean
          in: {said: job/said}
          out: [next_more]
      outputs:
        said:
          type: File[]
          outputSource: job/said
        next_more:
          type: boolean
          outputSource: decide/next_more

outputs:
  said:
    type: File[]
    outputSource: rounds/said
