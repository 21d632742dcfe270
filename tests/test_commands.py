"""The server that forks commands starts and ends them as Python does."""

import signal

from tests.conftest import command_line


def test_exit_code_output_and_sentence(commands, tmp_path):
    shown = commands.run("scripts.predict", "--help")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.startswith("usage: predict.py")
    refused = commands.run("Binary_INP_Single_Class.py", *command_line(tmp_path, tmp_path / "nowhere", "Folder"))
    assert refused.code == 2
    assert "nowhere" in refused.sentence


def test_signal_ends_a_command_and_its_code_says_so(commands, tmp_path, mvtec):
    running = commands.start("Binary_INP_Single_Class.py", *command_line(tmp_path, mvtec, "Folder", "--total_iters", "99999"))
    while "iteration" not in running.err_so_far():
        assert not running.ended
    running.send(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
