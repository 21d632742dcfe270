"""The tiniest run of every training script, as tests of all of them start it."""

from tests.entry_scripts import every_entry_script


@every_entry_script
def test_the_tiniest_run_leaves_its_files(commands, tmp_path, mvtec, script):
    finished = commands.run(*script.words(tmp_path, mvtec))
    assert finished.code == 0, finished.err
    assert (script.model_folder(tmp_path) / "model.pth").is_file()
    assert (script.folder(tmp_path) / "results.csv").is_file()
