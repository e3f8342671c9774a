# Sourced by the examples' run.sh. Prints each stage with the time and skips stages that an earlier start has finished.
stage() { printf '\n== %s (%d:%02d)\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }
kept() { echo "$1 exists from an earlier start and is kept; to make it anew, remove it and everything made from it"; }
missing() { [ ! -e "$1" ] || { kept "$1"; return 1; }; }
trained() { # a stopped run leaves a model, too
  python3 -c 'import json, sys; s = json.load(open(sys.argv[1])); sys.exit(s["global_step"] < s["max_steps"])' \
    "$1/trainer_state.json" 2>/dev/null
}
train() { # FOLDER RECIPE [ARGUMENTS]: starts or continues the recipe's run, which writes to the folder
  if trained "$1"; then
    kept "$1"
    return
  fi
  bash run_zero2.sh "${@:2}" --resume_from_checkpoint true
  trained "$1" || { echo "error: $1 was stopped; the same command continues it" >&2; exit 1; }
}
