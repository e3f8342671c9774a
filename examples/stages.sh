# Sourced by the examples' run.sh: each stage is told with the time, and what an earlier start has finished is kept.
stage() { printf '\n== %s (%d:%02d)\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }
kept() { echo "$1 is there from an earlier start and is kept; remove it to make it anew"; }
missing() { [ ! -e "$1" ] || { kept "$1"; return 1; }; }
trained() { # a run that was told to stop leaves a model, too
  python3 -c 'import json, sys; s = json.load(open(sys.argv[1])); sys.exit(s["global_step"] < s["max_steps"])' \
    "$1/trainer_state.json" 2>/dev/null && kept "$1"
}
