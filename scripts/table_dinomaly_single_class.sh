#!/usr/bin/env bash
# Dinomaly's single-class table: one model per category; MVTec-AD, VisA and Real-IAD; float, stage 1 and stage 2; published rows beside.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/table.sh
start_table table_dinomaly_single_class "Dinomaly's single-class table: one model per category." "" "$@"
for seed in ${SEEDS:-1}; do
    for dataset in "${datasets[@]}"; do
        train_stages Binary_Dinomaly.py Dinomaly-Single-Class "$dataset" "$seed" --setting single
    done
done
finish_table
