#!/usr/bin/env bash
# A person with conversations (json lines with "messages") and a small language model: from the file to a smaller model
# that answers, and to a folder for vLLM. In an empty folder, with the package installed (pip install 'apt-trainer[lm]'):
#   bash chat.sh MODEL chats.jsonl
set -euo pipefail
model="$1" file="$2"
shift 2

apt-trainer init --model "$model" --train_file "$file" --output_dir out/mine --output mine.yaml
apt-trainer plan --config mine.yaml "$@"
apt-trainer train --config mine.yaml "$@"
apt-trainer chat out/mine --prompt "How do I keep bread fresh?" --max_new_tokens 40
apt-trainer export out/mine --format hf --style per_layer_config --output out/mine-vllm
