# Sourced by the examples' run.sh. Prints each stage with the time and skips stages that an earlier start has finished.
say() { # ENGLISH CHINESE: as in env.sh
  case ${LC_ALL:-${LC_MESSAGES:-${LANG:-}}} in zh*) printf '%s\n' "$2" ;; *) printf '%s\n' "$1" ;; esac
}
stage() { # ENGLISH [CHINESE]
  printf '\n== %s (%d:%02d)\n' "$(say "$1" "${2:-$1}")" $((SECONDS / 60)) $((SECONDS % 60))
}
kept() {
  say "$1 exists from an earlier start and is kept; to make it anew, remove it and everything made from it" \
    "$1 已经有了，保留不动；要重做，请删除它和由它做出的一切"
}
missing() { # FILE or FOLDER; an evaluation that is there is shown
  if [ ! -e "$1" ]; then
    return 0
  fi
  kept "$1"
  local metrics=${1%/metrics.json}/metrics.json
  if [ -f "$metrics" ]; then
    say "its result:" "它的结果："
    python3 -c 'import json, sys; from train_llava.evaluate import table; print(table(json.load(open(sys.argv[1]))))' \
      "$metrics"
    say "pictures and answers: ${metrics%/*}/captions.png" "图片和回答：${metrics%/*}/captions.png"
  fi
  return 1
}
trained() { # a stopped run leaves a model, too
  python3 -c 'import json, sys; s = json.load(open(sys.argv[1])); sys.exit(s["global_step"] < s["max_steps"])' \
    "$1/trainer_state.json" 2>/dev/null
}
train() { # FOLDER RECIPE [ARGUMENTS]: starts or continues the recipe's run, which writes to the folder
  if trained "$1"; then
    kept "$1"
    return
  fi
  if [ -e "$1" ]; then
    set -- "$@" --resume_from_checkpoint true
  fi
  bash run_zero2.sh "${@:2}"
  if ! trained "$1"; then
    say "$1 was stopped; the same command continues it" "$1 的训练停下了；再运行同一条命令会继续" >&2
    exit 1
  fi
}
