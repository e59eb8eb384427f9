#!/usr/bin/env bash
# A person with texts and labels in a csv file: from the file to a smaller classifier in ONNX. In an empty folder, with
# the package installed (pip install 'apt-trainer[onnx]'):
#   bash csv.sh MODEL reviews.csv
#   bash csv.sh MODEL reviews.csv --max_steps 100      # options go to the training
#   FORMAT=openvino bash csv.sh MODEL reviews.csv      # needs the extra openvino
set -euo pipefail
model="$1" file="$2"
shift 2

apt-trainer init --model "$model" --train_file "$file" --output_dir out/mine --output mine.yaml
apt-trainer plan --config mine.yaml "$@"
apt-trainer train --config mine.yaml "$@"
apt-trainer predict out/mine --text "a lovely film 😀"
apt-trainer predict out/mine --file "$file" --output predicted.jsonl
apt-trainer export out/mine --format "${FORMAT:-onnx}" --output out/mine-export
