#!/usr/bin/env bash
# The few-shot table: 1, 2 and 4 images per category; MVTec-AD, VisA and Real-IAD; float, stage 1 and stage 2; published rows beside.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/table.sh
start_table table_few_shot "The few-shot table: one model of all categories from a few images of each." '  SHOTS="1 2 4"    images per category' "$@"
for seed in ${SEEDS:-1}; do
    for shot in ${SHOTS:-1 2 4}; do
        for dataset in "${datasets[@]}"; do
            train_stages Binary_INP_Few_Shot.py INP-Former-Few-Shot "$dataset" "$seed" --shot "$shot"
        done
    done
done
finish_table
