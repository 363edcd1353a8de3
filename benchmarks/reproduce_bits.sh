#!/usr/bin/env bash
# Measures anew every number of docs/bits.md, one command after the other.
#
#   benchmarks/reproduce_bits.sh MODEL CALIBRATE REPORT TASKS OUT
#
#   MODEL       a checkpoint: a folder, a GGUF file or a name of the hub
#   CALIBRATE   text to calibrate on, and that needles lie in
#   REPORT      text to report on
#   TASKS       lm-eval's, with commas between: names, or files of YAML
#   OUT         where models, results and logs go; what is there is not made again, so that it goes on where it stopped
#
#   PYTHON      an interpreter that has latentize with `.[dev]`; .venv/bin/python by default
#   SIBLING     the bundled model's MHA sibling; `benchmarks/sources.py tiny-llama-mha` makes it, in an hour on one core
#   CONVERT     more options of the conversions, as --fast
#   LIMIT       examples of each task, 2,000 by default
#   ONLY        which steps, as "convert-12.5 needles-*"; all by default. A step's name is that of its log
#
# On two cores a conversion of SmolLM2-135M takes 20 minutes, 8 with --fast; all the rest, over an hour. hqq and
# optimum-quanto are measured, too, where they are installed. Nothing else should run beside it: times of decoding are
# among the numbers.
set -uo pipefail
[ $# -eq 5 ] || { sed -n '2,20s/^# \{0,1\}//p' "$0" >&2; exit 2; }
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
MODEL=$1 CALIBRATE=$2 REPORT=$3 TASKS=$4 OUT=$5
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
SIBLING=${SIBLING:-$ROOT/build/sources/tiny-llama-mha}
read -ra MORE <<<"${CONVERT:-}"
read -ra ONLY <<<"${ONLY:-*}"
BUDGETS=(25 18.75 12.5 6.25)
mkdir -p "$OUT/logs" "$OUT/models"

# Whether a step is asked for.
asked() {
  local pattern
  for pattern in "${ONLY[@]}"; do
    [[ $1 != $pattern ]] || return 0
  done
  return 1
}

# NAME COMMAND…: its output is OUT/logs/NAME.txt once it has ended well.
step() {
  local name=$1 began=$SECONDS
  shift
  asked "$name" && [ ! -e "$OUT/logs/$name.txt" ] || return 0
  if "$@" >"$OUT/logs/$name.partial" 2>&1; then
    mv "$OUT/logs/$name.partial" "$OUT/logs/$name.txt"
    echo "$name: $((SECONDS - began)) s"
  else
    echo "$name: FAILED after $((SECONDS - began)) s, see $OUT/logs/$name.partial" >&2
    FAILED=1
  fi
}

FAILED=0
cd "$ROOT" || exit 1
for budget in "${BUDGETS[@]}"; do
  step "convert-$budget" "$PYTHON" -m latentize convert "$MODEL" "$OUT/models/$budget" --bytes "$budget%" \
    --data "$CALIBRATE" "${MORE[@]}"
done
plans=("${BUDGETS[@]/%/%}")
for number in "${!plans[@]}"; do plans[number]+="=$OUT/models/${BUDGETS[number]}"; done
for keep in 75 50; do
  step "convert-keep-$keep" "$PYTHON" -m latentize convert "$MODEL" "$OUT/models/keep-$keep" --keep "$keep%" \
    --data "$CALIBRATE" "${MORE[@]}"
done
for method in transmla mha2mla; do
  step "convert-$method" "$PYTHON" -m latentize convert "$MODEL" "$OUT/models/$method" --keep 50% --method "$method" \
    --data "$CALIBRATE"
done
step alternatives "$PYTHON" benchmarks/bits.py "$MODEL" --report "$REPORT" --tokens 16384 --out "$OUT" \
  --plans "${plans[@]}" --latents "calibrated 75%=$OUT/models/keep-75" "calibrated 50%=$OUT/models/keep-50" \
  "transmla 50%=$OUT/models/transmla" "mha2mla 50%=$OUT/models/mha2mla"
step tasks "$PYTHON" benchmarks/tasks.py "$MODEL" --models "${plans[1]}" "${plans[2]}" --tasks "$TASKS" \
  --batch-size 16 --limit "${LIMIT:-2000}" --out "$OUT"
for budget in 18.75 12.5; do
  step "needles-$budget" "$PYTHON" benchmarks/needles.py "$OUT/models/$budget" --reference "$MODEL" \
    --data "$CALIBRATE" --samples 1
done
for budget in 6.25 3.13; do
  step "sibling-$budget" "$PYTHON" -m latentize convert "$SIBLING" "$OUT/models/sibling-$budget" --bytes "$budget%"
  step "sibling-$budget-measured" "$PYTHON" -m latentize eval "$OUT/models/sibling-$budget" --reference "$SIBLING" \
    --tokens 16384 --sequence-length 2048
done
step parts "$PYTHON" benchmarks/coding_ablation.py "$MODEL" --calibrate "$CALIBRATE" --row-bytes 98 --tokens 4096 \
  --out "$OUT"
step codebooks "$PYTHON" benchmarks/codebooks.py
step kernel "$PYTHON" -m tests.interpreted --latent coded --count 200
step decode "$PYTHON" benchmarks/coded_decode.py
step engine make engines ENGINE=llama.cpp
# llama.cpp's caches want whole blocks: the plain one has the sizes of those that are made for one.
caches=()
for cache in q4_0 fp8 plain; do
  suited=(--keep 75% --cache-for "$cache")
  if [ "$cache" = plain ]; then
    config=$OUT/models/for-q4_0/config.json suited=(--keep 75%)
    size() { sed -n "s/^ *\"$1\": \([0-9]*\).*/\1/p" "$config"; }
    [ ! -e "$config" ] || suited=(--kv-lora-rank "$(size kv_lora_rank)" --qk-rope-head-dim "$(size qk_rope_head_dim)")
  fi
  step "convert-for-$cache" "$PYTHON" -m latentize convert "$MODEL" "$OUT/models/for-$cache" --fast \
    --data "$CALIBRATE" "${suited[@]}"
  caches+=("$cache=$OUT/models/for-$cache")
done
step caches "$PYTHON" benchmarks/engine_caches.py "${caches[@]}" --report "$REPORT" --out "$OUT"
exit "$FAILED"
