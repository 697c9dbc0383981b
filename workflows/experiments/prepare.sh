#!/bin/sh
# prepare.sh NAME REAL PYTHON: lay out the data of an experiment as data/experiments/NAME/<facility>.
# REAL is a folder with bilingual/ (it/ and cs/) and chemistry/ (a folder for each facility).
set -eu
name=$1 real=$2 python=$3 out=data/experiments/$1

link() { # FACILITY FOLDER
  test -f "$real/$name/$2/train.jsonl" -o -f "$real/$name/$2/train.txt" || {
    echo "$real/$name/$2 has no train.jsonl or train.txt: make experiment NAME=$name REAL=<folder>" >&2
    exit 1
  }
  ln -sfn "$(realpath "$real/$name/$2")" "$out/$1"
}

case $name in
bilingual | chemistry | vision) mkdir -p "$out" ;;
*)
  echo "there is no experiment $name: bilingual, chemistry, vision" >&2
  exit 1
  ;;
esac
case $name in
bilingual)
  link leonardo it
  link karolina cs
  ;;
chemistry)
  for facility in frontier perlmutter polaris aurora; do link "$facility" "$facility"; done
  ;;
vision) "$python" workflows/experiments/vision/generate.py "$out" ;;
esac
