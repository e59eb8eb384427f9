#!/usr/bin/env bash
# A person who uses sentence-transformers, with pairs of sentences and how alike they are: from the file to a smaller
# SentenceTransformer. In an empty folder, with the package installed (pip install 'apt-trainer[embedding]'):
#   bash embedding.sh MODEL pairs.csv        # MODEL: of sentence-transformers
set -euo pipefail
model="$1" file="$2"
shift 2

apt-trainer init --model "$model" --train_file "$file" --output_dir out/mine --output mine.yaml
apt-trainer plan --config mine.yaml "$@"
apt-trainer train --config mine.yaml "$@"
apt-trainer predict out/mine --text "a good film" --text_pair "a bad film"
python -c "from sentence_transformers import SentenceTransformer; print(SentenceTransformer('out/mine').encode('a film').shape)"
