"""BinaryAD on INP-Former, one model per category: float (stage 0), binary attention (1), binary attention and MLP (2).

python Binary_INP_Single_Class.py --dataset MVTec-AD --data_path ./datasets/mvtec --phase train --clb_stage 1
python Binary_INP_Single_Class.py --dataset MVTec-AD --data_path ./datasets/mvtec --phase train --clb_stage 2 \\
    --load_checkpoint INP-Former-Single-Class
python Binary_INP_Single_Class.py --dataset MVTec-AD --data_path ./datasets/mvtec --phase test --clb_stage 2
python Binary_INP_Single_Class.py --dataset Folder --data_path my_parts --encoder dinov2_vit_small_14 \\
    --item bracket --total_iters 200 --clb_stage 0
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
    parser = base_parser(__doc__, INP_FORMER, settings=["single"])
    return run_command(parser, argv, lambda arguments: run_experiment(settings_of(arguments), INP_FORMER))


if __name__ == "__main__":
    sys.exit(main())
