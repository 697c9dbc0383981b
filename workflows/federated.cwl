#!/usr/bin/env cwl-runner
cwlVersion: v1.2
class: Workflow
$namespaces:
  cwltool: "http://commonwl.org/cwltool#"
label: Federated learning across facilities
doc: |
  Trains one model on the data of several facilities, none of which leaves its facility. Rounds are
  a loop; which facilities take part and when to stop is decided while it runs. Where each step
  runs is a matter of the bindings alone.

requirements:
  ScatterFeatureRequirement: {}
  SubworkflowFeatureRequirement: {}
  SchemaDefRequirement:
    types:
      - $import: ../steps/types/allowance.yml
      - $import: ../steps/types/facility.yml
      - $import: ../steps/types/task.yml
      - $import: ../steps/types/training.yml
      - $import: ../steps/types/aggregation.yml
      - $import: ../steps/types/lora.yml
      - $import: ../steps/types/retention.yml

inputs:
  model:
    type: Directory?
    doc: Hugging Face model directory to start from; either this or config.
  config:
    type: File?
    doc: config.json of a model whose weights are drawn from the seed; either this or model.
  tokenizer:
    type: ["null", string, Directory]
    doc: Tokenizer directory, or the word bytes; unset, the tokenizer of the model directory.
  seed:
    type: int?
    doc: Seed of the whole federation. Default 0.
  facilities:
    type:
      type: array
      items: "../steps/types/facility.yml#facility"
    doc: The facilities of the federation.
  rounds:
    type: int
    doc: Rounds to run.
  local_steps:
    type: int
    doc: Optimizer steps per facility and round.
  training:
    type: ["null", "../steps/types/training.yml#training"]
    doc: How the facilities train.
  lora:
    type: ["null", "../steps/types/lora.yml#lora"]
    doc: Adapter to train on a model that every facility holds; unset, the whole model travels.
  aggregation:
    type: ["null", "../steps/types/aggregation.yml#aggregation"]
    doc: How updates become the next global model.
  retention:
    type: ["null", "../steps/types/retention.yml#retention"]
    doc: Which finished rounds the journal keeps.
  prompts:
    type: string[]?
    doc: Prompts that the final model completes, for people to read.

outputs:
  global_model:
    type: Directory
    doc: The trained model, a Hugging Face checkpoint or an adapter of peft.
    outputSource: federate/next_model
  history:
    type: File
    doc: What happened, one JSON object for each round.
    outputSource: write_report/history
  evaluation:
    type: File
    doc: The final model measured at every facility.
    outputSource: write_report/evaluation
  report:
    type: File
    doc: One HTML page about the federation.
    outputSource: write_report/report

steps:
  initialise:
    run: ../steps/initialise.cwl
    in:
      model: model
      config: config
      tokenizer: tokenizer
      seed: seed
      rounds: rounds
      lora: lora
      aggregation: aggregation
      retention: retention
      facilities: facilities
      local_steps: local_steps
    out: [global_model, state, more]
  federate:
    run: round.cwl
    in:
      global_model: initialise/global_model
      state: initialise/state
      more: initialise/more
      facilities: facilities
      local_steps: local_steps
      training: training
    out: [next_model, next_state, next_more]
    requirements:
      cwltool:Loop:
        loopWhen: $(inputs.more)
        loop:
          global_model: next_model
          state: next_state
          more: next_more
        outputMethod: last
  plan_evaluation:
    run: ../steps/plan.cwl
    in:
      state: federate/next_state
      facilities: facilities
      local_steps: local_steps
      purpose: {default: evaluate}
    out: [tasks, allowances]
  evaluate:
    run: ../steps/evaluate.cwl
    scatter: task
    in:
      global_model: federate/next_model
      task: plan_evaluation/tasks
      training: training
      prompts: prompts
      on_failure: {default: absent}
    out: [evaluation]
  write_report:
    run: ../steps/report.cwl
    in:
      state: federate/next_state
      evaluations: evaluate/evaluation
      allowances: plan_evaluation/allowances
    out: [history, evaluation, report]
