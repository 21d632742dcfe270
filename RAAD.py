"""RAAD: EfficientAD, quantized to 2 to 8 bits per layer by how well each layer sees anomalies, and trained on.

python RAAD.py --dataset MVTec-AD --data_path ./datasets/mvtec --phase train --stage all --teacher_weights teacher.safetensors
python RAAD.py --dataset MVTec-AD --data_path ./datasets/mvtec --phase train --stage baseline|quantize|finetune
python RAAD.py --dataset MVTec-LOCO --data_path ./datasets/mvtec_loco --phase train --stage all --teacher_weights FILE
python -m scripts.distill_teacher --images FOLDER --source efficientnet_lite0 --output teacher.safetensors
"""

import sys
from collections.abc import Sequence

from utils.arguments import base_parser
from utils.command import run_command
from utils.hosts import RAAD
from utils.raad_stages import run_stages


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(base_parser(__doc__, RAAD, settings=["single", "multi"]), argv, run_stages)


if __name__ == "__main__":
    sys.exit(main())
