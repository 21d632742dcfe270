"""VarAD: each token of a high-resolution image predicted from far-away ones; a model per category, or one (--setting multi).

python VarAD.py --dataset MVTec-AD --data_path ./datasets/mvtec --image_size 512 --model dinov2_vits14 --phase train
python VarAD.py --dataset BTAD --data_path ./datasets/btad --image_size 1024 --model dinov2_vits14 --item 01 02
python VarAD.py --dataset Folder --data_path my_parts --image_size 1024 --phase test
python VarAD.py --setting multi --dataset VisA --data_path ./datasets/VisA_pytorch/1cls --image_size 512
"""

import sys
from collections.abc import Sequence

from utils.arguments import base_parser
from utils.command import run_command
from utils.hosts import VARAD
from utils.phases import run_experiment
from utils.settings import settings_of


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = base_parser(__doc__, VARAD, settings=["single", "multi"])
    return run_command(parser, argv, lambda arguments: run_experiment(settings_of(arguments), VARAD))


if __name__ == "__main__":
    sys.exit(main())
