"""RAAD's stages one after another: a run folder each, every one started from the one before."""

import argparse
import logging

from common.errors import Interrupted
from utils.hosts import RAAD
from utils.phases import run_experiment
from utils.raad_arguments import FINETUNE, QUANTIZE, STAGES, stages_of
from utils.settings import Settings, default_save_name, settings_of

logger = logging.getLogger(__name__)


def _where(settings: Settings) -> tuple[str, str]:
    """The stage, and what a resumed command finds of it."""
    stage = settings.model.stage
    kept = "begins the category of it anew" if stage == QUANTIZE else "from the last saved iteration"
    return STAGES[stage], kept


def run_stages(arguments: argparse.Namespace) -> int:
    """Train or test the stages that a command asks for; returns the exit code of the first that does not end with 0, or 0."""
    arguments.clb_stage = FINETUNE  # the name of the last stage is the others' without their suffix
    commands = [settings_of(of_stage) for of_stage in stages_of(arguments, default_save_name(arguments))]
    for settings in commands:  # what the last one refuses is refused before the first one trains
        try:
            code = run_experiment(settings, RAAD)
        except (Interrupted, KeyboardInterrupt):
            logger.warning("stopped in stage %s; the same command with --resume goes on, %s", *_where(settings))
            raise
        if code:
            if settings is not commands[-1]:
                logger.warning("the stages after this one are not begun; the same command with --resume goes on from here")
            return code
    return 0
