#!/usr/bin/env bash
# Dinomaly's multi-class table: one model of all categories; MVTec-AD, VisA and Real-IAD; float, stage 1 and stage 2; published rows beside.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/table.sh
start_table table_dinomaly_multi_class "Dinomaly's multi-class table: one model of all categories of a data set." "" "$@"
for seed in ${SEEDS:-1}; do
    for dataset in "${datasets[@]}"; do
        train_stages Binary_Dinomaly.py Dinomaly-Multi-Class "$dataset" "$seed" --setting multi
    done
done
finish_table
