#!/usr/bin/env bash
# Float, stage 1 and stage 2 at equal iterations, in one setting and for one seed, over the categories of a folder:
#   ENCODER_WEIGHTS=FILE bash scripts/results_settings.sh DATA_PATH single|multi|few SEED [STAGES]
#   HOST=Dinomaly VARIANT=softmax EXTRA="--decoder_attention softmax" bash scripts/results_settings.sh DATA_PATH multi SEED
# STAGES is "float stage1 stage2" if not given; "control" is float with the iterations of all three.
# From the environment: HOST, INP-Former (default) or Dinomaly; EXTRA, further flags of the training script, and VARIANT, which
# names runs with other flags; ITEMS, categories, all by default; MASK_THRESHOLD, by default 0.5 for both hosts, so that their
# rows compare; and INPUT_SIZE CROP_SIZE BATCH_SIZE ITERATIONS PRECISION SAVE_DIR ENCODER PYTHON.
set -euo pipefail
cd "$(dirname "$0")/.."
data_path=$1 setting=$2 seed=$3
read -ra wanted <<<"${4:-float stage1 stage2}"
iterations=${ITERATIONS:-100} host=${HOST:-INP-Former}
case $setting in
single) script=Binary_INP_Single_Class.py setting_name= ;;
multi) script=Binary_INP_Multi_Class.py setting_name=-multi ;;
few) script=Binary_INP_Few_Shot.py setting_name=-few ;;
*)
    echo "unknown setting $setting: choose single, multi or few" >&2
    exit 2
    ;;
esac
case $host in
INP-Former) host_name= host_flags=() ;;
Dinomaly) script=Binary_Dinomaly.py host_name=-dinomaly host_flags=(--setting "$setting") ;;
*)
    echo "unknown HOST $host: choose INP-Former or Dinomaly" >&2
    exit 2
    ;;
esac
name=seed$seed$host_name${VARIANT:+-$VARIANT}$setting_name

train() { # NAME STAGE ITERATIONS [further flags]
    local save_name=$1 stage=$2 count=$3
    shift 3
    # shellcheck disable=SC2086  # lists of words
    "${PYTHON:-python}" "$script" "${host_flags[@]}" --dataset Folder --data_path "$data_path" ${ITEMS:+--item $ITEMS} \
        --seed "$seed" --encoder "${ENCODER:-dinov2_vit_small_14}" ${ENCODER_WEIGHTS:+--encoder_weights "$ENCODER_WEIGHTS"} \
        --input_size "${INPUT_SIZE:-256}" --crop_size "${CROP_SIZE:-224}" --batch_size "${BATCH_SIZE:-8}" \
        --precision "${PRECISION:-bf16}" --mask_threshold "${MASK_THRESHOLD:-0.5}" \
        --save_dir "${SAVE_DIR:-./saved_results}" --save_name "$save_name" \
        --clb_stage "$stage" --total_iters "$count" --resume "$@" ${EXTRA:-}
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
