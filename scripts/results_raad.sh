#!/usr/bin/env bash
# RAAD's baseline; the same trained on without quantization (float); all layers between the ends at 8 and at 4 bits, and bits
# by the layers' scores (hqs), each before and after finetuning; for one category and seed:
#   bash scripts/results_raad.sh DATASET DATA_PATH CATEGORY SEED TEACHER
# The rest comes from the environment: ITERATIONS FINETUNE_ITERATIONS RECON_ITERATIONS VARIANTS SAVE_DIR PYTHON EXTRA.
set -euo pipefail
cd "$(dirname "$0")/.."
dataset=$1 data_path=$2 item=$3 seed=$4 teacher=$5

train() { # NAME [further flags]
    local name=$1
    shift
    # shellcheck disable=SC2086  # EXTRA is a list of words
    "${PYTHON:-python}" RAAD.py --dataset "$dataset" --data_path "$data_path" --item "$item" --seed "$seed" \
        --teacher_weights "$teacher" --total_iters "${ITERATIONS:-400}" --finetune_iters "${FINETUNE_ITERATIONS:-60}" \
        --recon_iters "${RECON_ITERATIONS:-60}" --recon_activation_iters "${RECON_ITERATIONS:-60}" \
        --save_dir "${SAVE_DIR:-./saved_results}" --save_name "seed$seed-$name" --resume ${EXTRA:-} "$@"
}

flags_of() { # VARIANT
    case $1 in
        float) echo "--allocation none" ;;
        uniform*) echo "--allocation uniform --bits ${1#uniform}" ;;
        *) echo "--allocation $1" ;;
    esac
}

train baseline --stage baseline
for variant in ${VARIANTS:-float uniform8 uniform4 hqs}; do
    # shellcheck disable=SC2046  # a list of words
    train "$variant" --stage all --baseline "seed$seed-baseline" $(flags_of "$variant")
done
