"""RAAD's stages one after another: a run folder each, every one started from the one before."""

import argparse
import logging

from utils.hosts import RAAD
from utils.phases import run_experiment
from utils.raad_arguments import FINETUNE, stages_of
from utils.settings import default_save_name, settings_of

logger = logging.getLogger(__name__)


def run_stages(arguments: argparse.Namespace) -> int:
    """Train or test the stages that a command asks for; returns the exit code of the first that does not end with 0, or 0."""
    arguments.clb_stage = FINETUNE  # the name of the last stage is the others' without their suffix
    commands = [settings_of(of_stage) for of_stage in stages_of(arguments, default_save_name(arguments))]
    for settings in commands:  # what the last one refuses is refused before the first one trains
        code = run_experiment(settings, RAAD)
        if code:
            if settings is not commands[-1]:
                logger.warning("the stages after this one are not begun; the same command with --resume goes on from here")
            return code
    return 0
