#!/usr/bin/env bash
# The toy example from end to end: draw the data, assemble, train in two stages on two ranks, evaluate on held-out
# scenes. `bash run_zero2.sh` without arguments runs it in the right environment. A new start skips finished stages
# and continues a stopped one.
set -euo pipefail
caller=$PWD
cd "$(dirname "$0")/../.."
[ "$PWD" = "$caller" ] || echo "in $PWD"
source examples/stages.sh
out=output/openmoji
data=$out/data
parts=examples/openmoji/parts

stage "1/5 draw scenes and write conversations about them to $data" "1/5 画场景，写对话到 $data"
if missing "$data/heldout/chat.json"; then
  python3 -m examples.openmoji.make_data --output_dir "$data"
fi

stage "2/5 assemble CLIP and Qwen2 into a LLaVA in $out/llava" "2/5 把 CLIP 和 Qwen2 组装成 LLaVA：$out/llava"
if missing "$out/llava"; then
  python3 -m train_llava.build_model --output_dir "$out/llava" \
    --vision_model_name_or_path "$parts/clip" --language_model_name_or_path "$parts/qwen2" --dtype float32
fi

stage "3/5 stage 1: train the projector alone, in $out/stage1" "3/5 第一阶段：只训练投影层，写到 $out/stage1"
train "$out/stage1" recipes/openmoji-stage1.yaml

stage "4/5 stage 2: train the projector and the language model, in $out/stage2" \
  "4/5 第二阶段：训练投影层和语言模型，写到 $out/stage2"
train "$out/stage2" recipes/openmoji-stage2.yaml

stage "5/5 ask about held-out scenes, in $out/evaluation" "5/5 用留出的场景提问，写到 $out/evaluation"
if missing "$out/evaluation"; then
  python3 -m train_llava.evaluate --model_name_or_path "$out/stage2" --data_path "$data/heldout" \
    --output_dir "$out/evaluation" --blank_control true --other_control true --batch_size 64 --max_new_tokens 48
fi
stage "done" "完成"
