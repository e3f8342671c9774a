#!/usr/bin/env bash
# Asks SmolLM2 with the ready-made adapter and projector. Needs no training, and under a minute to assemble.
#   bash examples/smollm2/ask.sh                                    six questions about held-out scenes
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
out=output/smollm2

[ -e $out/lm ] || python3 -m examples.smollm2.get_model --output_dir $out/lm
if [ ! -e $out/eyes ]; then
  python3 -m train_llava.build_model --output_dir $out/eyes --dtype float32 \
    --vision_model_name_or_path examples/openmoji/parts/clip --language_model_name_or_path $out/lm
fi
model=(--model_name_or_path "$repo/$out/eyes" --adapter_name_or_path "$repo/examples/smollm2/adapter")
if [ $# -eq 0 ]; then
  exec python3 -m examples.smollm2.first_answers "${model[@]}"
fi
cd "$caller"
python3 -m train_llava.infer "${model[@]}" --image "$1" --prompt "${2:-What is in this picture?}"
