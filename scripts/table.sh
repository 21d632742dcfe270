# Sourced by the table_*.sh beside it: flags, trainings, and the report of a table.
# A table that was stopped goes on when the same command is given again: every training is started with --resume.

usage() {
    cat <<END
$1

usage: bash scripts/$table.sh [--mvtec FOLDER] [--visa FOLDER] [--realiad FOLDER]
       ITEMS=bottle ITERS=100 bash scripts/$table.sh --mvtec ./datasets/mvtec          # smoke run

A data set without a folder is left out, and listed as missing in the report. From the environment:
  MVTEC_PATH VISA_PATH REALIAD_PATH   instead of the flags
  ITEMS            categories, all by default             ITERS   iterations, instead of the paper's length
  STAGES="0 1 2"   0 float, 1 and 2 binary                SEEDS="1"
  SAVE_DIR         ./saved_results, with ITERS a folder of its own in it
  ENCODER          encoder name                           ENCODER_WEIGHTS   its file, instead of a download
  PYTHON           python                                 NPROC   processes (GPUs) per training, that share each batch
  EXTRA            further flags of the training script, but for --save_dir, --save_name and --seed
With NPROC each process gets --batch_size / NPROC images, so that a step and the number of steps stay those of one process.
$2
The report is <SAVE_DIR>/$table.md, .csv and .html; exit code 1 if a training failed.
END
}

start_table() { # NAME DESCRIPTION FURTHER_ENVIRONMENT [flags of the command line]: sets what the functions below use
    table=$1
    local description=$2 further=$3
    shift 3
    while [ $# -gt 0 ]; do
        case $1 in
            --mvtec | --visa | --realiad)
                [ $# -ge 2 ] || refuse "$1 needs a folder"
                case $1 in --mvtec) MVTEC_PATH=$2 ;; --visa) VISA_PATH=$2 ;; --realiad) REALIAD_PATH=$2 ;; esac
                shift 2
                ;;
            --help | -h) usage "$description" "$further"; exit 0 ;;
            *) refuse "unknown flag $1" ;;
        esac
    done
    config=configs/$table.yaml python=${PYTHON:-python} extra=${EXTRA:-} batch= runs=() failed=()
    save_dir=${SAVE_DIR:-./saved_results${ITERS:+/iterations=$ITERS}}
    declare -gA data_paths=([MVTec-AD]=${MVTEC_PATH:-} [VisA]=${VISA_PATH:-} [Real-IAD]=${REALIAD_PATH:-})
    datasets=(MVTec-AD VisA Real-IAD)
    if [ -z "${data_paths[MVTec-AD]}${data_paths[VisA]}${data_paths[Real-IAD]}" ]; then
        refuse "no data set; give --mvtec, --visa or --realiad"
    fi
    share_batch
    local dataset
    for dataset in "${datasets[@]}"; do
        [ -n "${data_paths[$dataset]}" ] || echo "$dataset is left out: no folder given"
    done
}

refuse() { # WHAT: a command that cannot work
    echo "error: $1; see bash scripts/${0##*/} --help" >&2
    exit 2
}

find_data_sets() { # sets data_paths: what is given, or the first of a data set's folders that is below the root, or nothing
    local dataset name found=
    for dataset in "${datasets[@]}"; do
        data_paths[$dataset]=${given[$dataset]}
        for name in ${folders[$dataset]}; do
            [ -n "${data_paths[$dataset]}" ] || [ ! -d "$root/$name" ] || data_paths[$dataset]=$root/$name
        done
        found+=${data_paths[$dataset]}
        [ -n "${data_paths[$dataset]}" ] || echo "$dataset is left out: none of ${folders[$dataset]} is in $root"
    done
    [ -n "$found" ] || refuse "no data set of ${datasets[*]} lies in '$root'"
}

share_batch() { # sets `batch`, the images of a step in each of NPROC processes; --batch_size is that of each process
    local whole processes=${NPROC:-1}
    whole=$(value_of batch_size)
    [ "$processes" != 1 ] || return 0
    if ! [[ $processes =~ ^[1-9][0-9]*$ && $whole =~ ^[1-9][0-9]*$ ]] || ((whole % processes)); then
        refuse "NPROC=$processes processes cannot share --batch_size $whole evenly; give an NPROC that divides it"
    fi
    batch=$((whole / processes))
}

train_stages() { # SCRIPT SAVE_NAME DATASET SEED [further flags]: the stages of one model, each from the one before
    local script=$1 name=$2 dataset=$3 seed=$4 stage suffix flags
    shift 4
    [ "$seed" = 1 ] || name=$name-seed$seed
    for stage in ${STAGES:-0 1 2}; do
        case $stage in 0) suffix=-FP ;; 1) suffix= ;; *) suffix=-CLB$stage ;; esac
        runs+=("$save_dir/$(run_folder "$name$suffix" "$dataset" "$@")")
        [ -n "${data_paths[$dataset]}" ] || continue
        flags=(--config "$config" --dataset "$dataset" --data_path "${data_paths[$dataset]}" --phase train --clb_stage "$stage")
        [ "$stage" != 2 ] || flags+=(--load_checkpoint "$name")
        [ "$seed" = 1 ] || flags+=(--seed "$seed" --save_name "$name$suffix")
        train "$script" "${flags[@]}" "$@"
    done
}

train() { # SCRIPT FLAGS: one training; a failure is noted, Ctrl-C and SIGTERM end the table
    local script=$1 launcher=() command code=0
    shift
    [ "${NPROC:-1}" = 1 ] || launcher=(-m torch.distributed.run --nproc_per_node "$NPROC" --) # torchrun of that python; it would take --m for its own
    # shellcheck disable=SC2086  # lists of words
    command=("$python" "${launcher[@]}" "$script" "$@" ${ITEMS:+--item $ITEMS} ${ITERS:+--total_iters "$ITERS"}
        --save_dir "$save_dir" ${ENCODER:+--encoder "$ENCODER"} ${ENCODER_WEIGHTS:+--encoder_weights "$ENCODER_WEIGHTS"}
        --resume $extra ${batch:+--batch_size "$batch"})
    echo "+ ${command[*]}"
    "${command[@]}" || code=$?
    case $code in
        0) ;;
        130 | 143)
            echo "stopped; the same command goes on from here" >&2
            exit "$code"
            ;;
        *) failed+=("exit code $code: ${command[*]}") ;;
    esac
}

run_folder() { # SAVE_NAME DATASET [--shot K]: where the training script puts it
    local name=$1 prototypes
    [ "${3:-}" != --shot ] || name=$name-$4
    prototypes=$(value_of INP_num) # a flag of INP-Former alone
    echo "${name}_dataset=$2_Encoder=$(value_of encoder "${ENCODER:-}")_Resize=$(value_of input_size)_Crop=$(value_of crop_size)${prototypes:+_INP_num=$prototypes}"
}

value_of() { # FLAG [VALUE]: what a training gets: the last of the preset, VALUE and EXTRA that names it
    local value word previous=
    value=$(sed -n "s/^$1: *\([^ ]*\).*/\1/p" "$config")
    [ -z "${2:-}" ] || value=$2
    for word in $extra; do
        case $word in "--$1="*) value=${word#*=} ;; esac
        [ "$previous" != "--$1" ] || value=$word
        previous=$word
    done
    echo "$value"
}

finish_table() { # the report of all runs, finished or not; exit code 1 if a training failed
    local code=0
    "$python" -m scripts.report "${runs[@]}" --output "$save_dir/$table.md" --html "$save_dir/$table.html" || code=1
    if [ ${#failed[@]} -gt 0 ]; then
        printf 'failed with %s\n' "${failed[@]}" >&2
        code=1
    fi
    exit $code
}
