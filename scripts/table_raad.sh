#!/usr/bin/env bash
# Tables 1 (categories), 2 (data sets), 3 (with and without scores), 4 (bits) and 9 (VisA) of RAAD; published rows beside.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/table.sh

raad_usage() {
    cat <<END
RAAD's tables: one model per category at 256 px. The baseline of a data set is trained once and shared by all tables.

usage: bash scripts/table_raad.sh 1|2|3|4|9 DATA_ROOT [TEACHER]
       # a smoke run in about a minute:
       DATASETS=MVTec-AD ITEMS=bottle ITERS=2 ENCODER=pdn_tiny IMAGE_SIZE=64 VARIANTS="float hqs" \\
           EXTRA="--recon_crops 8 --calibration_images_count 8" bash scripts/table_raad.sh 3 ./datasets random

  table  data sets                  variants of the baseline
$(for table in "${all_tables[@]}"; do printf '  %-6s %-26s %s\n' "$table" "${datasets_of[$table]}" "${variants_of[$table]}"; done)

float is the control: trained on like the others, without quantization. uniformN: all layers of teacher and student but the
ends at N bits; uniform8 is what the paper calls OMPQ 8/8. lsqN: all layers of all three networks at N bits with learned steps.
hqs: bits by the layers' scores. Each is measured before and after finetuning. TEACHER: weights of the teacher, by default
weights/pdn_small.safetensors, which python -m scripts.distill_teacher makes; random for a smoke run.

The data sets are looked for below DATA_ROOT; what is not there is left out, and listed as missing in the report:
$(for dataset in "${all_datasets[@]}"; do printf '  %-11s %s\n' "$dataset" "${folders[$dataset]}"; done)
From the environment:
  MVTEC_PATH LOCO_PATH VISA_PATH   their folders, instead of below DATA_ROOT
  DATASETS         instead of the table's                 ITEMS   categories, all by default
  VARIANTS         instead of the table's; also ompq hawq random inverted
  IMAGE_SIZE       256                                    ITERS   iterations of everything, instead of the paper's
  ENCODER          pdn_small, pdn_medium, pdn_tiny        SEEDS="1"
  SAVE_DIR         ./saved_results, with ITERS a folder of its own in it
  PYTHON           python
  EXTRA            further flags of the training script, but for --save_dir, --save_name, --seed, --baseline and those of
                   encoder, sizes and bits
A table that was stopped goes on when the same command is given again. The report is <SAVE_DIR>/table_raad_1.md, .csv and .html
(2, 3, 4 and 9 likewise); exit code 1 if a training failed.
END
}

flags_of() { # VARIANT: how the training script calls it, or nothing for an unknown one
    local bits=${1##*[a-z]}
    case $1 in
        float) echo "--allocation none" ;;
        hqs | ompq | hawq | random | inverted) echo "--allocation $1" ;;
        uniform[2-8]) echo "--allocation uniform --bits $bits" ;;
        lsq[2-8]) echo "--allocation uniform --bits $bits --ends_bits $bits --autoencoder_bits $bits --rounding lsq" ;;
    esac
}

run_raad() { # DATASET SEED SAVE_NAME [flags]: one command of RAAD.py
    local dataset=$1 seed=$2 name=$3
    shift 3
    local flags=(--config "$config" --dataset "$dataset" --data_path "${data_paths[$dataset]}" --phase train)
    flags+=(--image_size "$image_size" --save_name "$name")
    [ "$seed" = 1 ] || flags+=(--seed "$seed")
    [ -z "${ITERS:-}" ] || flags+=(--recon_iters "$ITERS" --recon_activation_iters "$ITERS" --finetune_iters "$ITERS")
    train RAAD.py "${flags[@]}" "$@"
}

train_all() { # DATASET SEED: the baseline, then its variants
    local dataset=$1 seed=$2 suffix= place variant name
    [ "$seed" = 1 ] || suffix=-seed$seed
    place="_dataset=${dataset}_Encoder=${encoder}_Resize=${image_size}_Crop=$image_size"
    runs+=("$save_dir/RAAD-Single-Class$suffix-Baseline$place")
    [ -z "${data_paths[$dataset]}" ] || run_raad "$dataset" "$seed" "RAAD-Single-Class$suffix" --stage baseline
    for variant in "${variants[@]}"; do
        name=RAAD-$variant$suffix
        [ "$variant" = float ] || runs+=("$save_dir/$name-Quantized$place")
        runs+=("$save_dir/$name$place")
        [ -n "${data_paths[$dataset]}" ] || continue
        # shellcheck disable=SC2046  # a list of words
        run_raad "$dataset" "$seed" "$name" --stage all --baseline "RAAD-Single-Class$suffix" $(flags_of "$variant")
    done
}

all_tables=(1 2 3 4 9) all_datasets=(MVTec-AD MVTec-LOCO VisA)
declare -A folders=(
    [MVTec-AD]="mvtec mvtec_anomaly_detection MVTec-AD"
    [MVTec-LOCO]="mvtec_loco mvtec_loco_anomaly_detection MVTec-LOCO"
    [VisA]="VisA_pytorch visa VisA_20220922 VisA"
)
declare -A datasets_of=([1]="MVTec-AD MVTec-LOCO" [2]="MVTec-AD MVTec-LOCO VisA" [3]=MVTec-AD [4]=MVTec-AD [9]=VisA)
declare -A variants_of=(
    [1]="float lsq8 uniform8 hqs" [2]="float hqs" [3]="float uniform8 hqs" [9]="float hqs"
    [4]="float lsq2 lsq3 lsq4 lsq8 uniform2 uniform3 uniform4 uniform8 hqs"
)
case ${1:-} in
    --help | -h) raad_usage; exit 0 ;;
    1 | 2 | 3 | 4 | 9) ;;
    *) refuse "the first argument is a table, 1, 2, 3, 4 or 9, not '${1:-}'" ;;
esac
[ $# = 2 ] || [ $# = 3 ] || refuse "table $1 needs one folder, DATA_ROOT, that the data sets lie in, and at most a TEACHER"
[ -d "$2" ] || refuse "DATA_ROOT '$2' is no folder"
[ -z "${3:-}" ] || ENCODER_WEIGHTS=$3
read -ra datasets <<<"${DATASETS:-${datasets_of[$1]}}"
for dataset in "${datasets[@]}"; do
    [ -n "${folders[$dataset]:-}" ] || refuse "DATASETS names '$dataset'; choose from ${all_datasets[*]}"
done
read -ra variants <<<"${VARIANTS:-${variants_of[$1]}}"
for variant in "${variants[@]}"; do
    [ -n "$(flags_of "$variant")" ] || refuse "VARIANTS names '$variant', which RAAD does not have"
done
[ "${NPROC:-1}" = 1 ] || refuse "NPROC=$NPROC processes cannot share a batch of one image: leave it out"
table=table_raad_$1 root=$2 config=configs/table_raad.yaml python=${PYTHON:-python} extra=${EXTRA:-} batch= runs=() failed=()
save_dir=${SAVE_DIR:-./saved_results${ITERS:+/iterations=$ITERS}}
encoder=$(value_of encoder "${ENCODER:-}") image_size=$(value_of image_size "${IMAGE_SIZE:-}")
[[ $image_size =~ ^[1-9][0-9]*$ ]] || refuse "IMAGE_SIZE '$image_size' is no number of pixels"
declare -A given=([MVTec-AD]=${MVTEC_PATH:-} [MVTec-LOCO]=${LOCO_PATH:-} [VisA]=${VISA_PATH:-})
declare -A data_paths=()
find_data_sets
for seed in ${SEEDS:-1}; do
    for dataset in "${datasets[@]}"; do
        train_all "$dataset" "$seed"
    done
done
finish_table
