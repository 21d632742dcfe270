#!/usr/bin/env bash
# Float, stage 1 and stage 2 at equal iterations, in one setting and for one seed, over all categories of a folder:
#   ENCODER_WEIGHTS=FILE bash scripts/results_settings.sh DATA_PATH single|multi|few SEED [STAGES]
# STAGES is "float stage1 stage2" if not given; "control" is float with the iterations of all three.
# Sizes come from the environment: INPUT_SIZE CROP_SIZE BATCH_SIZE ITERATIONS PRECISION SAVE_DIR ENCODER PYTHON.
set -euo pipefail
cd "$(dirname "$0")/.."
data_path=$1 setting=$2 seed=$3
read -ra wanted <<<"${4:-float stage1 stage2}"
iterations=${ITERATIONS:-100}
name=seed$seed
case $setting in
single) script=Binary_INP_Single_Class.py ;;
multi) script=Binary_INP_Multi_Class.py name=$name-multi ;;
few) script=Binary_INP_Few_Shot.py name=$name-few ;;
*)
    echo "unknown setting $setting: choose single, multi or few" >&2
    exit 2
    ;;
esac

train() { # NAME STAGE ITERATIONS [further flags]
    local save_name=$1 stage=$2 count=$3
    shift 3
    "${PYTHON:-python}" "$script" --dataset Folder --data_path "$data_path" --seed "$seed" \
        --encoder "${ENCODER:-dinov2_vit_small_14}" ${ENCODER_WEIGHTS:+--encoder_weights "$ENCODER_WEIGHTS"} \
        --input_size "${INPUT_SIZE:-256}" --crop_size "${CROP_SIZE:-224}" --batch_size "${BATCH_SIZE:-8}" \
        --precision "${PRECISION:-bf16}" --save_dir "${SAVE_DIR:-./saved_results}" --save_name "$save_name" \
        --clb_stage "$stage" --total_iters "$count" --resume "$@"
}

for stage in "${wanted[@]}"; do
    case $stage in
    float) train "$name-float" 0 "$iterations" ;;
    stage1) train "$name-stage1" 1 "$iterations" --load_checkpoint "$name-float" ;;
    stage2) train "$name-stage2" 2 "$iterations" --load_checkpoint "$name-stage1" ;;
    control) train "$name-float-control" 0 "$((3 * iterations))" ;;
    *)
        echo "unknown stage $stage: choose float, stage1, stage2 or control" >&2
        exit 2
        ;;
    esac
done
