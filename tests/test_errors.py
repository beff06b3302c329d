"""Errors say in one line what was found, in the words of the command line or of Python."""

import pickle

import pytest

from vqvae.errors import OptionError, UserError, naming, near_misses, one_line, printable, shown


@pytest.mark.parametrize(
    ("error", "python", "flagged"),
    [
        (OptionError("epochs", 0, "is small"), "epochs=0: is small", "--epochs 0: is small"),
        (OptionError("batch_size", 9, "is large"), "batch_size=9: is large", "--batch-size 9: is large"),
        (OptionError("decay", 2, "is large", owner="vq"), "vq decay=2: is large", "vq decay=2: is large"),
        (
            OptionError("decay", 2, "is large", owner="vq", slot="bottleneck"),
            "vq decay=2: is large",
            "--bottleneck vq decay=2: is large",
        ),
        (
            OptionError("evaluate", None, "needs a model"),
            "evaluate=None: needs a model",
            "--evaluate: needs a model",
        ),
        (OptionError("compile", True, "fails"), "compile=True: fails", "--compile: fails"),
        (OptionError("compile", False, "is slow"), "compile=False: is slow", "--no-compile: is slow"),
        (OptionError("name", "", "is empty"), "name='': is empty", "--name '': is empty"),
        (OptionError("name", "a\n\x1b[1m", "is odd"), "name=a\\n\\x1b[1m: is odd", "--name a\\n\\x1b[1m: is odd"),
        (OptionError("", "a.npz", "is absent"), "a.npz: is absent", "a.npz: is absent"),
    ],
)
def test_an_option_error_speaks_python_and_the_command_line(error, python, flagged):
    assert issubclass(OptionError, UserError)
    assert issubclass(UserError, ValueError)
    assert (str(error), error.flagged) == (python, flagged)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain", "plain"),
        (3, "3"),
        ("", "''"),
        (" a ", "' a '"),
        ("a\nb\t\x1b[31m\0", r"a\nb\t\x1b[31m\x00"),
        ("\u202egnp\u2028\udcff", r"\u202egnp\u2028\udcff"),
        ("Café\u202f日本 👩\u200d🔬", "Café\u202f日本 👩\u200d🔬"),
        ("x" * 5000, "x" * 80 + "... (5,000 characters)"),
    ],
)
def test_a_value_is_shown_on_one_line_and_cannot_control_the_terminal(value, text):
    assert shown(value) == text


def test_a_message_is_printable_in_python_too():
    assert str(UserError("a\nb")) == r"a\nb"
    assert printable(r"a\nb") == r"a\nb"  # nothing is escaped twice


def test_an_error_about_a_file_names_the_option_that_chose_it():
    with pytest.raises(OptionError) as caught, naming("resume", "logs/a"):
        raise UserError("logs/a: no such file")
    assert caught.value.flagged == "--resume logs/a: no such file"
    with pytest.raises(OptionError) as caught, naming("resume", "logs/a"):
        raise UserError("logs/a/checkpoint.pt: no such file")
    assert caught.value.flagged == "--resume logs/a: logs/a/checkpoint.pt: no such file"
    with pytest.raises(OptionError) as caught, naming("resume", "logs/a"):
        raise OptionError("device", "mps", "is absent")
    assert caught.value.flagged == "--device mps: is absent"


def test_an_option_error_survives_the_way_between_processes():
    error = OptionError("decay", 2, "is large", owner="vq", slot="bottleneck")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is OptionError
    assert vars(copy) == vars(error)
    assert (str(copy), copy.flagged) == (str(error), error.flagged)


def test_slot_and_member_are_added_where_they_are_missing():
    bare = OptionError("decay", 2, "is large")
    assert bare.within("bottleneck", "vq").flagged == "--bottleneck vq decay=2: is large"
    known = OptionError("free_bits", -1, "is small", owner="elbo", slot="objective")
    assert known.within("bottleneck", "vq").flagged == known.flagged


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (ValueError("no\n  such\tthing"), "no such thing"),
        (ValueError("  "), "ValueError"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (FileNotFoundError(2, "No such file or directory", "a/b"), "No such file or directory"),
        (OSError("plain"), "plain"),
        (ValueError("x" * 300), "x" * 200),
    ],
)
def test_an_exception_becomes_one_line(problem, text):
    assert one_line(problem) == text


def test_a_long_reason_is_cut_to_the_limit():
    assert one_line(ValueError("abcdef"), limit=3) == "abc"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("sonet", " (did you mean 'sonnet'?)"),
        ("dale", " (did you mean 'dalle' or 'dales'?)"),
        ("transformer", ""),
        ("", ""),
    ],
)
def test_a_misspelled_name_is_answered_with_similar_names(name, hint):
    assert near_misses(name, {"sonnet": 0, "dalle": 1, "dales": 2}) == hint
