"""BinaryAD on Dinomaly: one model for all categories (--setting multi, the default), one per category, or few images.

python Binary_Dinomaly.py --dataset MVTec-AD --data_path ./datasets/mvtec --phase train --clb_stage 1
python Binary_Dinomaly.py --dataset MVTec-AD --data_path ./datasets/mvtec --phase train --clb_stage 2 \\
    --load_checkpoint /path/to/stage1_model.pth
python Binary_Dinomaly.py --setting single --dataset VisA --data_path ./datasets/VisA_pytorch/1cls --phase train \\
    --clb_stage 2 --load_checkpoint Dinomaly-Single-Class
python Binary_Dinomaly.py --setting few --shot 4 --dataset MVTec-AD --data_path ./datasets/mvtec --phase train --clb_stage 1
python Binary_Dinomaly.py --dataset MVTec-AD --data_path ./datasets/mvtec --phase test --clb_stage 2
torchrun --nproc_per_node 4 Binary_Dinomaly.py --dataset Real-IAD --data_path ./datasets/Real-IAD --batch_size 4
"""

import sys
from collections.abc import Sequence

from utils.arguments import base_parser
from utils.command import run_command
from utils.hosts import DINOMALY
from utils.phases import run_experiment
from utils.settings import settings_of


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = base_parser(__doc__, DINOMALY, settings=["multi", "single", "few"])
    return run_command(parser, argv, lambda arguments: run_experiment(settings_of(arguments), DINOMALY))


if __name__ == "__main__":
    sys.exit(main())
