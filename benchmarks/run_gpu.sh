#!/usr/bin/env bash
# Everything that wants a GPU, on a machine that can download nothing: benchmarks/run_gpu.sh [PART] ...
# Parts: tests kernels unet shapes sd15 step rewards memory; all of them where none is named.
# Each part stays well under nine minutes and writes to $OUT (default benchmarks/results/<card>/).
# LOOPS=published,repaired,... picks rows of the step benchmark where all of them take too long.
# SMALL=1 rehearses the same commands at small sizes on a machine without a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
card=$(python3 -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-").lower() if torch.cuda.is_available() else "cpu")')
OUT=${OUT:-benchmarks/results/$card}
WORK=${WORK:-$(mktemp -d)}
width=1 resolution=512 steps=10 batches="4 8 16" rounds=5 depths=1,5,10,25 dtype=bfloat16 images=64 pixels=224 layers=0
unet=(--batches ${UNET_BATCHES:-2 16})
if [ "${SMALL:-0}" = 1 ]; then
    width=8 resolution=64 steps=2 batches=1 rounds=2 dtype=float32 depths=1,2 images=4 pixels=56 layers=1
    unet=(--small --batches 2 --rounds 2 --contenders eager patched)
fi
mkdir -p "$OUT" "$WORK"
policies=none,step,sac:attention+conv,auto
[ "$card" = cpu ] || policies=none,step,sac:attention+conv,offload:attention+conv,auto
launch=(deepspeed --num_gpus 1 --master_port "${PORT:-29531}")

# What the kernels part has measured; empty before that.
table() { [ ! -f "$OUT/attention_table.json" ] || echo --set "kernels.attention_table=$(realpath "$OUT/attention_table.json")"; }

models() { [ -f "$WORK/models/hpsv2/HPS_v2_compressed.pt" ] || python3 -m benchmarks.random_sd15 "$WORK/models" --width "$width"; }

sd15() { # batch size
    models
    "${launch[@]}" fastcraft/train.py --ds_config ds_configs/zero2.json --recipe textcraftor_sd15 \
        --model "$WORK/models/pipeline" --prompts fastcraft/shapes/prompts/train.txt --run-dir "$WORK/sd15-b$1" \
        --set rewards.0.path="$WORK/models/reward" --set rewards.1.path="$WORK/models/reward/aesthetic.safetensors" \
        --set rewards.1.options.clip_path="$WORK/models/reward" --set rewards.2.path="$WORK/models/pickscore" \
        --set rewards.3.path="$WORK/models/hpsv2" --set model.resolution="$resolution" \
        --set train.num_steps="$steps" --set train.batch_size="$1" --set train.dtype="$dtype" \
        --set train.checkpoint_every=0 --set evaluate.num_samples=1 --set evaluate.every=0 $(table)
    cp "$WORK/sd15-b$1/metrics.jsonl" "$OUT/sd15_b$1_metrics.jsonl"
    cp "$WORK/sd15-b$1/environment.json" "$OUT/environment.json"
}

# Attention first: the other measurements use the dispatch table that it writes.
kernels() {
    [ "$card" = cpu ] || python3 -m fastcraft.cli info --measure-attention --out "$OUT/attention_table.json"
    python3 -m pytest -p no:cacheprovider benchmarks --benchmark-enable --benchmark-columns=median,iqr \
        --rows "$OUT/kernels.json"
}

parts="tests kernels unet shapes sd15 step rewards memory"
[ $# -gt 0 ] || set -- $parts
for part in "$@"; do
    case $part in
        tests) python3 -m pytest -p no:cacheprovider -m gpu tests/test_gpu.py tests/kernels ;;
        kernels) kernels ;;
        unet)
            [ ! -f "$OUT/attention_table.json" ] || unet+=(--attention-table "$OUT/attention_table.json")
            python3 -m benchmarks.unet "${unet[@]}" --out "$OUT/unet_sd15.json" ;;
        shapes)
            "${launch[@]}" fastcraft/train.py --ds_config ds_configs/zero2.json --run-dir "$WORK/shapes" --set train.num_steps="$steps"
            cp "$WORK/shapes/metrics.jsonl" "$OUT/shapes_metrics.jsonl" ;;
        sd15) for batch in $batches; do sd15 "$batch"; done ;;
        step)
            models
            python3 -m benchmarks.step --recipe textcraftor_sd15 --rounds 2 --turns 1 --batches "${batches// /,}" \
                ${LOOPS:+--loops "$LOOPS"} --out "$OUT/step_sd15.json" \
                --set model.path="$WORK/models/pipeline" --set prompts.path=shapes:train \
                --set rewards.0.path="$WORK/models/reward" --set rewards.1.path="$WORK/models/reward/aesthetic.safetensors" \
                --set rewards.1.options.clip_path="$WORK/models/reward" --set rewards.2.path="$WORK/models/pickscore" \
                --set rewards.3.path="$WORK/models/hpsv2" --set model.resolution="$resolution" --set train.dtype="$dtype" $(table) ;;
        rewards)
            python3 -m benchmarks.rewards agreement --images "$images" --size "$pixels" --layers "$layers" --out "$OUT/rewards_agreement.json"
            python3 -m benchmarks.rewards cost --rounds "$rounds" --size "$pixels" --layers "$layers" --out "$OUT/rewards_cost.json"
            python3 -m benchmarks.rewards patch --rounds "$rounds" --size "$pixels" --layers "$layers" --out "$OUT/rewards_patch.json" ;;
        memory)
            models
            python3 -m benchmarks.memory_by_depth --recipe textcraftor_sd15 --depths "$depths" --policies "$policies" --repeats 2 --out "$OUT" \
                --set model.path="$WORK/models/pipeline" --set prompts.path=shapes:train \
                --set rewards.0.path="$WORK/models/reward" --set rewards.1.path="$WORK/models/reward/aesthetic.safetensors" \
                --set rewards.1.options.clip_path="$WORK/models/reward" --set rewards.2.path="$WORK/models/pickscore" \
                --set rewards.3.path="$WORK/models/hpsv2" --set model.resolution="$resolution" \
                --set train.batch_size=1 --set train.dtype="$dtype" $(table) ;;
        *) echo "run_gpu.sh: unknown part '$part'; known: $parts" >&2; exit 2 ;;
    esac
done
python3 - "$OUT" <<'PY'
import json, pathlib, statistics, sys

for file in sorted(pathlib.Path(sys.argv[1]).glob("*_metrics.jsonl")):
    rows = [json.loads(line) for line in file.read_text().splitlines()][2:] or [{"samples_per_sec_per_gpu": 0, "peak_memory_mib": 0}]
    speed = statistics.median(row["samples_per_sec_per_gpu"] for row in rows)
    print(f"{file.stem:<24} {speed:8.3f} samples/s  {max(row['peak_memory_mib'] for row in rows):9.0f} MiB")
PY
