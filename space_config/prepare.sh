#!/usr/bin/env bash
# Lay the Space out in a folder: the repository's tracked files, with the Space's README and requirements.
set -euo pipefail
target=${1:?usage: space_config/prepare.sh FOLDER}
cd "$(dirname "$0")/.."
mkdir -p "$target"
git archive HEAD app.py bapo adapters LICENSE | tar -x -C "$target"
cp space_config/README.md space_config/requirements.txt "$target"
echo "The Space is in $target: push that folder to it."
