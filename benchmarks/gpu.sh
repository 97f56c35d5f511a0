#!/usr/bin/env bash
# All that is worth doing in ten minutes on a lent GPU: the tests marked gpu, and the times and memory of benchmarks/gpu.py.
# Writes tests.log, tests.xml, gpu.log, gpu.json and gpu.csv to $OUT. Ends with the status of the tests.
#   OUT=outputs/gpu PYTHON=python3 benchmarks/gpu.sh
#   KARL_PEER=../karl benchmarks/gpu.sh    with our KARL against the published code (karl.log, karl.json)
#   TOKENBRIDGE_PEER=../TokenBridge benchmarks/gpu.sh    likewise our TokenBridge (tokenbridge.log, tokenbridge.json)
#   GPT_PEER=../LlamaGen benchmarks/gpu.sh    likewise our GPT, against LlamaGen's generate (gpt.log, gpt.json)
#   benchmarks/gpu.sh --dry-run      the same on a CPU with tiny models, to see that it runs
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-outputs/gpu}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
mkdir -p "$OUT"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
tests=(tests)
times=(--seconds 240)
karl=(--device cuda --dtype bf16 --peer-dtype fp16 --sizes small/vqgan small/vae --batch 32 --kept 32 --rounds 3)
tokenbridge=(--device cuda --dtype bf16 --sizes L --batch 1 32 --iterations 64 --train-batch 16 --rounds 3)
gpt=(--device cuda --dtype bf16 --sizes B L XL --batch 1 --peers llamagen --rounds 3)
if [ "${1:-}" = --dry-run ]; then
    export IMGTOK_GPU=cpu CUDA_VISIBLE_DEVICES=
    tests=(tests/gpu)
    times=(--device cpu --tiny --repeats 1)
    karl=(--sizes tiny/vqgan --batch 1 --kept 32 --rounds 1)
    tokenbridge=(--sizes 64x1 --batch 1 --iterations 2 --train-batch 1 --rounds 1)
    gpt=(--sizes 64x1 --tokens 16 --batch 1 --peers llamagen --rounds 1)
fi
# A machine without a package index: put wheels of what it lacks (diffusers, datasets, torch-fidelity) into .wheels/
if [ -d .wheels ]; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps .wheels/*.whl
fi
# A checkout of ShivamDuggal4/karl in KARL_PEER: our KARL against it, one call of 32 pictures each in turn.
if [ -n "${KARL_PEER:-}" ]; then
    timeout 150 "$PYTHON" benchmarks/karl.py --peer "$KARL_PEER" "${karl[@]}" --json "$OUT/karl.json" 2>&1 | tee "$OUT/karl.log"
fi
# A checkout of YuqingWang1029/TokenBridge in TOKENBRIDGE_PEER: the published L, a quarter of the published iterations.
if [ -n "${TOKENBRIDGE_PEER:-}" ]; then
    timeout 150 "$PYTHON" benchmarks/tokenbridge.py --peer "$TOKENBRIDGE_PEER" "${tokenbridge[@]}" --json "$OUT/tokenbridge.json" 2>&1 | tee "$OUT/tokenbridge.log"
fi
# A checkout of FoundationVision/LlamaGen in GPT_PEER: one image of three published sizes, weights of 16 bits.
if [ -n "${GPT_PEER:-}" ]; then
    timeout 120 "$PYTHON" benchmarks/gpt.py --peer "$GPT_PEER" "${gpt[@]}" --json "$OUT/gpt.json" 2>&1 | tee "$OUT/gpt.log"
fi
"$PYTHON" benchmarks/gpu.py --out "$OUT" "${times[@]}" 2>&1 | tee "$OUT/gpu.log"
timeout 280 "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider --junitxml="$OUT/tests.xml" "${tests[@]}" 2>&1 | tee "$OUT/tests.log"
