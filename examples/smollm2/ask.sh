#!/usr/bin/env bash
# Asks SmolLM2 about a picture through the ready-made eyes, without any training: assembled in under a minute.
#   bash examples/smollm2/ask.sh                                    about a picture of this folder
#   bash examples/smollm2/ask.sh cat.png "What is in this picture?"
set -euo pipefail
caller=$PWD
cd "$(dirname "$0")/../.."
source ./env.sh examples/smollm2/requirements.txt
example=examples/smollm2
out=output/smollm2

[ -e $out/lm ] || python3 $example/get_model.py --output_dir $out/lm
projector=$example/eyes/projector.safetensors
if [ ! $out/eyes -nt $projector ]; then # not there, or assembled with an older projector
  rm -rf $out/eyes
  python3 -m train_llava.build_model --output_dir $out/eyes --dtype float32 --projector $projector \
    --vision_model_name_or_path examples/openmoji/parts/clip --language_model_name_or_path $out/lm
fi
picture=${1:-$repo/$example/pictures/1F937-1F3FE.png}
cd "$caller"
echo "$picture"
python3 -m train_llava.infer --model_name_or_path "$repo/$out/eyes" --image "$picture" \
  --prompt "${2:-What is in this picture?}"
