"""BinaryAD on INP-Former from a few good images per category, each as 22 fixed variants; one model for all categories.

python Binary_INP_Few_Shot.py --dataset MVTec-AD --data_path ./datasets/mvtec --phase train --shot 4 --clb_stage 1
python Binary_INP_Few_Shot.py --dataset MVTec-AD --data_path ./datasets/mvtec --phase train --shot 4 --clb_stage 2 \\
    --load_checkpoint INP-Former-Few-Shot
python Binary_INP_Few_Shot.py --dataset Folder --data_path my_parts --shot 2 --per_category --clb_stage 0
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
    parser = base_parser(__doc__, INP_FORMER, settings=["few"])
    return run_command(parser, argv, lambda arguments: run_experiment(settings_of(arguments), INP_FORMER))


if __name__ == "__main__":
    sys.exit(main())
