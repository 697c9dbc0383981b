#!/usr/bin/env cwl-runner
cwlVersion: v1.2
class: CommandLineTool
label: Make the first global model and the server state
doc: |
  From a Hugging Face model directory, or from a configuration and a seed (random weights), with a
  tokenizer of its own, a given one, or the byte-level one. Where CROSSFL_JOURNAL names a journal
  with an unfinished run of this configuration, as its last published round left them.

requirements:
  SchemaDefRequirement:
    types:
      - $import: types/aggregation.yml
      - $import: types/lora.yml
      - $import: types/retention.yml
      - $import: types/facility.yml
hints:
  SoftwareRequirement:
    packages:
      crossfl: {version: ["0.1.0"]}

baseCommand: [crossfl, initialise]

inputs:
  model:
    type: Directory?
    doc: Hugging Face model directory to start from; either this or config.
    inputBinding: {prefix: --model}
  config:
    type: File?
    doc: config.json of a model whose weights are drawn from the seed; either this or model.
    inputBinding: {prefix: --config}
  tokenizer:
    type: ["null", string, Directory]
    doc: Tokenizer directory, or the word bytes; unset, the tokenizer of the model directory.
    inputBinding: {prefix: --tokenizer}
  seed:
    type: int?
    doc: Seed of the whole federation. Default 0.
    inputBinding: {prefix: --seed}
  rounds:
    type: int
    doc: Rounds to run.
    inputBinding: {prefix: --rounds}
  lora:
    type: ["null", "types/lora.yml#lora"]
    doc: Adapter to train on the model, which then stays where it is; unset, the whole model.
    inputBinding: {}
  aggregation:
    type: ["null", "types/aggregation.yml#aggregation"]
    doc: Strategy and its parameters, kept in the server state.
    inputBinding: {}
  retention:
    type: ["null", "types/retention.yml#retention"]
    doc: Which rounds the journal keeps.
    inputBinding: {}
  facilities:
    type:
      - "null"
      - type: array
        items: "types/facility.yml#facility"
        inputBinding: {prefix: --facility}
    doc: The facilities of the federation, for whether every round has enough, and for the journal.
  local_steps:
    type: int?
    doc: Optimizer steps per facility and round; compared with the journal only.
    inputBinding: {prefix: --local-steps}

outputs:
  global_model:
    type: Directory
    doc: Hugging Face checkpoint, or adapter of peft, with a manifest; from_pretrained loads it.
  state:
    type: Directory
    doc: Server state with a manifest.
  more:
    type: boolean
    doc: Whether a round is to follow; true.
