#!/usr/bin/env bash
# Tables II (pixels), III (images) and IV (backbones) of VarAD: MVTec-AD, VisA, BTAD and DTD-Synthetic; published rows beside.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/table.sh

varad_usage() {
    cat <<END
VarAD's tables: one model per category at 1024 px. II has pixel metrics and III image metrics, of the same models; IV has other
encoders.

usage: bash scripts/table_varad.sh II|III|IV DATA_ROOT
       DATASETS=BTAD ITEMS=01 ITERS=10 IMAGE_SIZE=512 bash scripts/table_varad.sh II ./datasets          # smoke run

The data sets are looked for below DATA_ROOT; what is not there is left out, and listed as missing in the report:
$(for dataset in "${all_datasets[@]}"; do printf '  %-16s %s\n' "$dataset" "${folders[$dataset]}"; done)
From the environment:
  MVTEC_PATH VISA_PATH BTAD_PATH DTD_PATH   their folders, instead of below DATA_ROOT
  DATASETS         some of them                           ITEMS   categories, all by default
  IMAGE_SIZE       1024                                   ITERS   iterations, instead of 10 epochs
  MODELS           encoders of table IV                   SEEDS="1"
  SAVE_DIR         ./saved_results, with ITERS a folder of its own in it
  ENCODER          encoder name, for II and III           ENCODER_WEIGHTS   its file, instead of a download
  PYTHON           python                                 NPROC   processes (GPUs) per training, that share each batch
  EXTRA            further flags of the training script, but for --save_dir, --save_name, --seed and those of encoder and sizes
A table that was stopped goes on when the same command is given again. The report is <SAVE_DIR>/table_varad_II.md, .csv and
.html (III and IV likewise); exit code 1 if a training failed.
END
}

train_model() { # DATASET MODEL SEED
    local dataset=$1 model=$2 seed=$3 name=VarAD-Single-Class encoder=${ENCODER:-${encoders[$2]}} size flags
    [ "$seed" = 1 ] || name=$name-seed$seed
    size=$((image_size / ${encoder##*_} * ${encoder##*_})) # whole patches, whose side ends the encoder's name
    runs+=("$save_dir/${name}_dataset=${dataset}_Encoder=${encoder}_Resize=${size}_Crop=$size")
    [ -n "${data_paths[$dataset]}" ] || return 0
    flags=(--config "$config" --dataset "$dataset" --data_path "${data_paths[$dataset]}" --phase train --image_size "$image_size")
    [ -n "${ENCODER:-}" ] || flags+=(--model "$model")
    [ "$seed" = 1 ] || flags+=(--seed "$seed" --save_name "$name")
    train VarAD.py "${flags[@]}"
}

all_datasets=(MVTec-AD VisA BTAD DTD-Synthetic)
declare -A folders=(
    [MVTec-AD]="mvtec mvtec_anomaly_detection MVTec-AD"
    [VisA]="VisA_pytorch visa VisA_20220922 VisA"
    [BTAD]="btad BTech_Dataset_transformed BTAD"
    [DTD-Synthetic]="dtd DTD-Synthetic"
)
declare -A encoders=( # of the names that --model takes
    [dinov2_vits14]=dinov2_vit_small_14 [dinov2_vitb14]=dinov2_vit_base_14 [dinov2_vitl14]=dinov2_vit_large_14
    [vit_b_16]=vit_base_16 [clip_vit_b_16]=clip_vit_base_16 [mae_vit_b_16]=mae_vit_base_16
)
case ${1:-} in
    --help | -h) varad_usage; exit 0 ;;
    II | III) models=(dinov2_vits14) ;;
    IV) models=(vit_b_16 mae_vit_b_16 clip_vit_b_16 dinov2_vits14 dinov2_vitb14 dinov2_vitl14) ;;
    *) refuse "the first argument is a table, II, III or IV, not '${1:-}'" ;;
esac
[ $# = 2 ] || refuse "table $1 needs one folder, DATA_ROOT, that the data sets lie in"
[ -d "$2" ] || refuse "DATA_ROOT '$2' is no folder"
if [ "$1" = IV ]; then
    [ -z "${ENCODER:-}" ] || refuse "table IV has several encoders: choose them with MODELS instead of ENCODER"
    read -ra models <<<"${MODELS:-${models[*]}}"
    [ ${#models[@]} = 1 ] || [ -z "${ENCODER_WEIGHTS:-}" ] || refuse "ENCODER_WEIGHTS is for one encoder: name it with MODELS"
fi
[[ ${ENCODER:-_14} =~ _[1-9][0-9]*$ ]] || refuse "ENCODER '$ENCODER' is no encoder, whose name ends with its patch"
for model in "${models[@]}"; do
    [ -n "${encoders[$model]:-}" ] || refuse "MODELS names '$model', which table IV does not have"
done
read -ra datasets <<<"${DATASETS:-${all_datasets[*]}}"
for dataset in "${datasets[@]}"; do
    [ -n "${folders[$dataset]:-}" ] || refuse "DATASETS names '$dataset'; choose from ${all_datasets[*]}"
done
table=table_varad_$1 root=$2 config=configs/table_varad.yaml python=${PYTHON:-python} extra=${EXTRA:-} batch= runs=() failed=()
save_dir=${SAVE_DIR:-./saved_results${ITERS:+/iterations=$ITERS}}
image_size=$(value_of image_size "${IMAGE_SIZE:-}")
[[ $image_size =~ ^[1-9][0-9]*$ ]] || refuse "IMAGE_SIZE '$image_size' is no number of pixels"
declare -A given=([MVTec-AD]=${MVTEC_PATH:-} [VisA]=${VISA_PATH:-} [BTAD]=${BTAD_PATH:-} [DTD-Synthetic]=${DTD_PATH:-})
declare -A data_paths=()
find_data_sets
share_batch
for seed in ${SEEDS:-1}; do
    for model in "${models[@]}"; do
        for dataset in "${datasets[@]}"; do
            train_model "$dataset" "$model" "$seed"
        done
    done
done
finish_table
