#!/usr/bin/env bash
# Float, stage 1 and stage 2 at equal iterations, the float control with the iterations of all three, and both binary
# stages with distillation, for one category and seed:
#   ENCODER_WEIGHTS=FILE bash scripts/results_single_class.sh DATASET DATA_PATH CATEGORY SEED
# Sizes come from the environment: INPUT_SIZE CROP_SIZE BATCH_SIZE ITERATIONS SAVE_DIR ENCODER PYTHON.
set -euo pipefail
cd "$(dirname "$0")/.."
dataset=$1 data_path=$2 item=$3 seed=$4
iterations=${ITERATIONS:-60}

train() { # NAME STAGE ITERATIONS [further flags]
    local name=$1 stage=$2 count=$3
    shift 3
    "${PYTHON:-python}" Binary_INP_Single_Class.py --dataset "$dataset" --data_path "$data_path" --item "$item" --seed "$seed" \
        --encoder "${ENCODER:-dinov2_vit_small_14}" ${ENCODER_WEIGHTS:+--encoder_weights "$ENCODER_WEIGHTS"} \
        --input_size "${INPUT_SIZE:-320}" --crop_size "${CROP_SIZE:-280}" --batch_size "${BATCH_SIZE:-8}" \
        --save_dir "${SAVE_DIR:-./saved_results}" --save_name "seed$seed-$name" --clb_stage "$stage" --total_iters "$count" \
        --resume "$@"
}

train float 0 "$iterations"
train stage1 1 "$iterations" --load_checkpoint "seed$seed-float"
train stage2 2 "$iterations" --load_checkpoint "seed$seed-stage1"
train stage1-distill 1 "$iterations" --load_checkpoint "seed$seed-float" --distill 1
train stage2-distill 2 "$iterations" --load_checkpoint "seed$seed-stage1-distill" --distill 1 --distill_teacher "seed$seed-float"
train float-control 0 "$((3 * iterations))"
