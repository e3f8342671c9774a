#!/usr/bin/env bash
# Asks SmolLM2 about a picture with the ready-made projector. Needs no training, and under a minute to assemble.
#   bash examples/smollm2/ask.sh                                    about a held-out picture of this folder
#   bash examples/smollm2/ask.sh cat.png "What is in this picture?"
set -euo pipefail
case ${1:-} in -h | --help) exec sed -n '2,4s/^# //p' "$0" ;; esac
if [ $# -gt 2 ]; then
  echo "error: $# words, where a picture and a question in quotes are taken: bash $0 \"$1\" \"${*:2}\"" >&2
  exit 1
fi
case ${1--} in
  - | http://* | https://* | data:*) ;;
  *) if [ ! -e "$1" ] || [ -d "$1" ]; then
    echo "error: a picture's file or address is taken first, and \"$1\" is none" >&2
    exit 1
  fi ;;
esac
caller=$PWD
cd "$(dirname "$0")/../.."
DEVICE_LOOKED_UP=1 # without training, neither DeepSpeed nor its compiler is needed
source ./env.sh examples/smollm2/requirements.txt
export PYTHONSAFEPATH=1 # or Python would import files of the caller's folder instead of libraries
example=examples/smollm2
out=output/smollm2

[ -e $out/lm ] || python3 $example/get_model.py --output_dir $out/lm
projector=$example/eyes/projector.safetensors
if [ ! $out/eyes -nt $projector ]; then # missing, or assembled with an older projector
  rm -rf $out/eyes
  python3 -m train_llava.build_model --output_dir $out/eyes --dtype float32 --projector $projector \
    --vision_model_name_or_path $example/clip --language_model_name_or_path $out/lm
fi
if [ $# -eq 0 ]; then
  set -- "$repo/$example/pictures/1F937-1F3FE.png"
  python3 - "$1" <<'PYTHON'
import sys
from pathlib import Path
from examples.smollm2.draw_emoji import caption, emoji_of
print(f"{sys.argv[1]}, a held-out picture; its caption: {caption(emoji_of(Path(sys.argv[1]).name), 'en')}")
PYTHON
fi
cd "$caller"
python3 -m train_llava.infer --model_name_or_path "$repo/$out/eyes" --image "$1" \
  --prompt "${2:-What is in this picture?}"
