"""BinaryAD on INP-Former, one model for all categories of a data set, or of several (super-multi-class).

python Binary_INP_Multi_Class.py --dataset VisA --data_path ./datasets/VisA_pytorch/1cls --phase train --clb_stage 1
python Binary_INP_Multi_Class.py --dataset Real-IAD --data_path ./datasets/Real-IAD --phase train --clb_stage 2 \\
    --load_checkpoint /path/to/stage1_model.pth
python Binary_INP_Multi_Class.py --dataset MVTec-AD+VisA+Real-IAD --data_path ./datasets/mvtec ./datasets/VisA_pytorch/1cls \\
    ./datasets/Real-IAD --phase train --clb_stage 1
python Binary_INP_Multi_Class.py --dataset MVTec-AD --data_path ./datasets/mvtec --phase test --clb_stage 1 \\
    --scoring prototype --test_checkpoint /path/to/model_trained_on_Real-IAD.pth
torchrun --nproc_per_node 4 Binary_INP_Multi_Class.py --dataset MVTec-AD --data_path ./datasets/mvtec --batch_size 4
"""

import sys
from collections.abc import Sequence

from utils.arguments import base_parser
from utils.command import run_command
from utils.hosts import INP_FORMER
from utils.phases import run_experiment
from utils.settings import settings_of


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = base_parser(__doc__, INP_FORMER, settings=["multi"])
    return run_command(parser, argv, lambda arguments: run_experiment(settings_of(arguments), INP_FORMER))


if __name__ == "__main__":
    sys.exit(main())
