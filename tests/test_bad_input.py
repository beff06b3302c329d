"""Bad input is refused in one line that names the flag, the value and a way out, and leaves nothing on the disk."""

import re
import shutil
import warnings

import pytest

from tests.bad_input import cases, main, prepare, tree

WAY_OUT = re.compile(
    r"must (be|end)|did you mean|known: |see --help|leave (it|one of them) out|keep one|remove that|takes (one|no)|"
    r"; (name|give|use|try|choose|shorten|raise|write|resume|encode|update|export|set|delete)|it takes|only these may|"
    r"needs --dataset|name the|available: |such as|are required|those that fit|a run saves|`vqvae \w+` writes"
)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder with small runs, a list of its files, and a copy."""
    folder = tmp_path_factory.mktemp("inputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare()
        before = tree()
    copy = tmp_path_factory.mktemp("copy")
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    return folder, before, copy


@pytest.fixture
def unchanged(prepared, monkeypatch):
    """Work in the prepared folder; afterwards it must be unchanged."""
    folder, before, copy = prepared
    monkeypatch.chdir(folder)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # which the command replaces
    yield folder
    after = tree()
    if after != before:
        shutil.rmtree(folder)
        shutil.copytree(copy, folder)
    assert after == before


@pytest.mark.parametrize("case", cases(), ids=lambda case: ascii(str(case)))
def test_bad_input_is_one_line_and_leaves_nothing_on_the_disk(case, unchanged, capfd):
    code = main(case.words)
    out, err = capfd.readouterr()
    assert err.startswith(f"error: {case.message}")
    assert err.count("\n") == 1
    assert err[:-1].isprintable()
    assert WAY_OUT.search(err)
    assert code == 2
    assert out == ""


def test_the_table_covers_every_program():
    programs = [case.words[0] if case.words else "" for case in cases()]
    assert len(programs) > 250
    for program in ("train", "visualize", "compare", "encode", "decode", "export"):
        assert programs.count(program) >= 15, program


def test_a_home_folder_is_found_behind_an_equals_sign_too(unchanged, monkeypatch):
    monkeypatch.setenv("HOME", str(unchanged))
    line = "encode --checkpoint=~/logs/run --dataset digits --limit 2 --output=~/new.npz --device cpu"
    assert main(line.split()) == 0
    (unchanged / "new.npz").unlink()
