"""Runs in one table: where the numbers come from, which data are comparable, and the table's formats."""

import io
import json
import math
import sys
import warnings
from pathlib import Path

import pytest

from tests.checkpoints import choices, content, stored
from tests.helpers import make, run_train
from vqvae import checkpoint
from vqvae.__main__ import main
from vqvae.compare import COLUMNS, WIDTH, compare, read_run, sort, table, training_seconds
from vqvae.errors import UserError
from vqvae.export import export
from vqvae.runs import read_metrics

METRICS = {
    "mse": 0.004,
    "mse_se": 0.0001,
    "psnr": 24.0,
    "psnr_se": 0.1,
    "ssim": 0.9,
    "ssim_se": 0.01,
    "perplexity": 5.5,
}
EPOCHS = [(2, 400.0, 0.02), (4, 200.0, 0.01), (6, 200.0, 0.005)]  # step, images/s, MSE


@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch):
    """An empty folder, made the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(
    name: str,
    *,
    step: int = 4,
    log: bool = True,
    evaluation: dict | None = None,
    data: dict | None = None,
    shape: tuple = (3, 8, 8),
    **names,
) -> str:
    """A run's folder of a small model, with a log of three epochs of two steps of 128 images."""
    chosen = choices(**names)
    model, folder = make(shape, **chosen), Path(name)
    saved = content(model, chosen, step=step)
    saved["data"] |= data or {}
    folder.mkdir(parents=True)
    checkpoint.write(folder / "checkpoint.pt", saved)
    if log:
        rows = [
            {"kind": "epoch", "step": at, "epoch": at // 2, "images_per_s": speed, "held_out_mse": mse, "train_mse": 9}
            for at, speed, mse in EPOCHS
        ]
        rows.insert(1, {"kind": "train", "step": 3, "mse": 8})
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    if evaluation is not None:
        found = checkpoint.identity_of(saved) | evaluation
        (folder / "evaluation.json").write_text(json.dumps(found))
    return name


def held_out(count: int, fingerprint: str = "aa", train: int = 100) -> dict:
    return {
        "examples": {"train": train, "test": count},
        "fingerprint": {"train": f"train {train}", "test": fingerprint},
    }


def test_metrics_come_from_the_evaluation_of_the_checkpoints_step():
    row = read_run(save("logs/run", evaluation=METRICS))
    assert row.source == "evaluation.json"
    assert row.values.items() >= METRICS.items()
    assert (row.values["run"], row.values["data"]) == ("run", "none")
    assert (row.values["tokens"], row.values["bits"]) == (4, pytest.approx(4 * math.log2(7)))
    assert row.values["parameters"] == sum(p.numel() for p in make().parameters())


@pytest.mark.parametrize("stale", [{"step": 3}, {"run": "other"}, {"weights": "0123456789abcdef"}])
def test_without_a_matching_evaluation_metrics_are_those_of_the_last_epoch_up_to_the_checkpoint(stale):
    row = read_run(save("logs/run", step=5, evaluation=METRICS | stale))
    assert (row.source, row.step) == ("metrics.jsonl", 4)
    assert row.values["mse"] == 0.01
    assert "psnr" not in row.values


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"run": NaN', "[" * 100_000, "\xff"])
def test_a_damaged_evaluation_is_named_and_not_used(text):
    path = save("logs/run")
    Path(path, "evaluation.json").write_bytes(text.encode("latin-1"))
    with pytest.warns(UserWarning, match="logs/run/evaluation.json: cannot be read .*; evaluate the run again"):
        row = read_run(path)
    assert row.values["mse"] == 0.01


def test_values_that_are_not_numbers_are_left_out():
    row = read_run(save("logs/run", evaluation={"mse": math.inf, "psnr": "high", "ssim": None, "perplexity": True}))
    assert not {"mse", "psnr", "ssim", "perplexity"} & set(row.values)
    assert json.loads(table([row], "json"))[0]["mse"] is None


def test_the_training_time_counts_every_step_once():
    rows = [{"kind": "epoch", "step": step, "images_per_s": speed} for step, speed, _ in EPOCHS]
    assert training_seconds(rows, 6, batch_size=100) == pytest.approx(0.5 + 1 + 1)
    assert training_seconds(rows[:2], 5, batch_size=100) == pytest.approx(0.5 + 1 + 0.5)  # at the last known speed
    assert training_seconds([], 5, batch_size=100) is None
    assert training_seconds([{"step": 5}], 5, batch_size=100) is None
    assert read_run(save("logs/run", evaluation=METRICS)).values["seconds"] == pytest.approx(
        2 * 128 * (1 / 400 + 1 / 200)
    )


def test_a_run_without_a_log_has_no_metrics_and_no_time():
    row = read_run(save("logs/run", log=False))
    assert row.source is None
    assert row.values["seconds"] is None
    assert table([row], "text").splitlines()[1].split()[:3] == ["run", "none", "4"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"name": "cifar10"}, {"name": "mnist"}], "data differ: data sets cifar10, mnist"),
        ([held_out(10_000), held_out(500, "bb")], "data differ: held-out images 10,000, 500"),
        ([held_out(500, "aa"), held_out(500, "bb")], "data differ: different held-out images"),
        (
            [held_out(9, train=60_000), held_out(9, train=5_000)],
            "trained on different numbers of images: 60,000, 5,000",
        ),
        ([held_out(9), held_out(9) | {"fingerprint": {"train": "b", "test": "aa"}}], "trained on different images; "),
    ],
)
def test_data_that_differ_are_named_in_one_line(data, message):
    paths = [save(f"logs/{i}", evaluation=METRICS, data=about) for i, about in enumerate(data)]
    with pytest.warns(UserWarning, match=message) as caught:
        compare(paths)
    (warning,) = caught
    assert "\n" not in str(warning.message)


def test_images_of_other_sizes_do_not_compare():
    with pytest.warns(UserWarning, match="image sizes 3x8x8, 1x16x16"):
        compare([save("logs/a"), save("logs/b", shape=(1, 16, 16))])


def test_an_evaluation_on_other_images_does_not_compare():
    paths = [save(f"logs/{n}", evaluation=METRICS | {"images": n}, data=held_out(500)) for n in (500, 400)]
    with pytest.warns(UserWarning, match="held-out images 500, 400"):
        compare(paths)


def test_an_evaluation_on_as_many_other_images_does_not_compare():
    evaluations = [METRICS | {"images": 500, "fingerprint": seen} for seen in ("aa", "bb")]
    paths = [save(f"logs/{i}", evaluation=found, data=held_out(500)) for i, found in enumerate(evaluations)]
    with pytest.warns(UserWarning, match="different held-out images"):
        rows = compare(paths)
    assert [row.held_out["fingerprint"] for row in rows] == ["aa", "bb"]


def test_runs_on_the_same_data_cause_no_warning():
    paths = [save(f"logs/{i}", evaluation=METRICS, data=held_out(500)) for i in range(3)]
    paths.append(save("logs/old", evaluation=METRICS))  # of a version that stored no fingerprints
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(compare(paths)) == 4


def test_runs_that_cannot_be_read_are_named_and_left_out(capsys):
    good = save("logs/good")
    Path("logs/broken").mkdir()
    Path("logs/broken/checkpoint.pt").write_text("no checkpoint")
    Path("logs/notes.txt").write_text("notes")
    with pytest.warns(UserWarning, match="left out") as caught:
        assert main(["compare", "logs/broken", good, "logs/notes.txt", "logs/missing"]) == 0
    lines = [str(warning.message) for warning in caught]
    assert [line.split(":")[0] for line in lines] == ["logs/broken/checkpoint.pt", "logs/notes.txt", "logs/missing"]
    assert all(line.endswith("; left out") and "\n" not in line for line in lines)
    out = capsys.readouterr().out
    assert "good" in out
    assert "broken" not in out


def test_folders_with_nothing_but_events_are_left_out_in_silence(capsys):
    good = save("logs/good")
    Path("logs/curves").mkdir()
    Path("logs/curves/events.out.tfevents.1.curves").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["compare", good, "logs/curves"]) == 0
    assert "curves" not in capsys.readouterr().out
    assert main(["compare", "logs/curves"]) == 2
    assert "logs/curves/checkpoint.pt: no such file" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:logs")
@pytest.mark.parametrize("paths", [["logs/missing"], ["logs/missing", "logs/also"]])
def test_without_any_run_there_is_an_error(paths):
    with pytest.raises(UserError):
        compare(paths)
    assert main(["compare", *paths, "--output", "table.txt"]) == 2
    assert not Path("table.txt").exists()


def test_points_continuous_latents_and_priors_have_the_columns_that_apply():
    nats = {"mse": 0.01, "prior_nats": 8 * math.log(2), "prior_nats_se": 0.5 * math.log(2)}
    points = read_run(
        save(
            "points",
            shape=(2, 1, 1),
            nets="mlp",
            likelihood="gaussian",
            bottleneck="gaussian",
            prior="normal",
            evaluation=nats,
        )
    )
    prior = read_run(save("prior", prior="transformer", evaluation=nats))
    joint = read_run(save("uniform", evaluation=nats))
    assert "tokens" not in points.values
    assert (prior.values["prior_bits"], prior.values["prior_bits_se"]) == (pytest.approx(8), pytest.approx(0.5))
    assert not {"prior_bits", "prior_nats"} & (set(points.values) | set(joint.values))
    assert "prior" in table([prior, points], "text")
    assert "prior" not in table([joint], "text").replace("uniform", "")


def test_an_exported_folder_has_a_size_and_no_metrics():
    model = stored(Path("run"))
    Path("exported").mkdir()
    next(export(checkpoint.read("run"), model, Path("exported")))  # config.json and the weights
    with pytest.warns(UserWarning, match="exported: an exported model has no metrics; name the run's folder"):
        row = read_run("exported")
    assert (row.values["run"], row.values["tokens"], row.values["seconds"], row.source) == ("exported", 4, None, None)


def test_runs_with_the_same_name_are_distinguished_by_their_paths():
    rows = compare([save("a/run"), save("b/run"), save("b/other")])
    assert [row.values["run"] for row in rows] == ["a/run", "b/run", "other"]


def test_sorted_runs_begin_with_the_best_and_end_with_those_without_a_value():
    values = {
        "a": {"mse": 0.2, "psnr": 20.0},
        "b": {},
        "c": {"mse": 0.1, "psnr": 30.0},
        "d": {"mse": 0.3, "psnr": 10.0},
    }
    rows = compare([save(f"logs/{name}", log=False, evaluation=found) for name, found in values.items()])
    assert [row.values["run"] for row in sort(rows, "mse")] == ["c", "a", "d", "b"]
    assert [row.values["run"] for row in sort(rows, "psnr")] == ["c", "a", "d", "b"]
    for column in COLUMNS:
        assert len(sort(rows, column.name)) == 4


def test_the_text_fits_100_columns_and_loses_nothing():
    long = "a-run-of-" + "many-words-" * 8 + "x" * 40
    large = METRICS | {"mse": 123.45678, "perplexity": 65536.0, "prior_nats": 98765.4, "prior_nats_se": 123.4}
    rows = [
        read_run(save(f"logs/{long}", evaluation=large, prior="transformer", data={"name": "fashion-mnist"})),
        read_run(save("logs/short", data={"name": "a-data-set-of-a-long-name"})),
    ]
    rows[0].values.update({"seconds": 3.6e6, "parameters": 999_950_000, "tokens": 16384, "bits": 212992.0})
    text = table(rows, "text")
    assert max(map(len, text.splitlines())) <= WIDTH
    assert long in "".join(line[:12].strip() for line in text.splitlines()[2:])
    for part in ("123.45678", "±0.00010", "24.00", "0.9000", "65,536", "1,000.0 h", "212,992", "142,488.4"):
        assert part in text
    rows[0].values["psnr"] = -12345.67  # with even longer numbers, names get less room
    text = table(rows, "text")
    assert max(map(len, text.splitlines())) <= WIDTH
    assert long in "".join(line.split(" ")[0] for line in text.splitlines()[2:])


def test_metrics_that_were_asked_for_have_a_column_and_protocols_stand_below():
    paths = [save("logs/a", evaluation=METRICS | {"protocol": "10 images"}), save("logs/b", evaluation=METRICS)]
    lines = table(compare(paths), "text").splitlines()
    assert "rFID" not in lines[0]
    assert lines[-1] == "Protocol: 10 images."
    more = {"rfid": 12.345, "probe_accuracy": 0.5, "probe_accuracy_se": 0.01, "protocol": "20 images; " + "net " * 40}
    rows = compare([*paths, save("logs/c", evaluation=METRICS | more)])
    text = table(rows, "text")
    assert max(map(len, text.splitlines())) <= WIDTH
    for part in ("rFID", "12.35", "0.500", "±0.010", "Protocol of a: 10 images.", "Protocol of c: 20 images; net"):
        assert part in text
    assert json.loads(table(rows, "json"))[0]["protocol"] == "10 images"
    assert [row.values["run"] for row in sort(rows, "rfid")] == ["c", "a", "b"]


def test_markdown_and_json_contain_the_same_numbers():
    rows = compare([save("logs/a|b", evaluation=METRICS), save("logs/c")])
    lines = table(rows, "markdown").splitlines()
    assert len({line.replace(r"\|", "").count("|") for line in lines[:4]}) == 1
    assert "| 0.00400 ± 0.00010 | 24.00 ± 0.10 | 0.9000 ± 0.0100 |" in lines[2]
    assert lines[3].startswith(r"| c \* | none | 4 | 11 | 0.01000 | - | - | - |")
    assert lines[-1].startswith("*: metrics of the last epoch")
    found = json.loads(table(rows, "json"))
    assert [entry["run"] for entry in found] == ["a|b", "c"]
    assert found[0].items() >= METRICS.items()
    assert {"path", "step", "source", "held_out", "prior_bits", "seconds"} <= set(found[1])
    assert found[1]["psnr"] is None


def test_the_command_writes_a_file_and_takes_flags_anywhere(capsys):
    a, b = save("logs/a", evaluation=METRICS), save("logs/b")
    assert main(["compare", a, "--format", "json", b, "--sort", "mse", "--output", "out/table.json"]) == 0
    assert capsys.readouterr().out == "out/table.json: 2 runs\n"
    assert [entry["run"] for entry in json.loads(Path("out/table.json").read_text())] == ["a", "b"]
    assert main(["compare", a, "--sort", "size"]) == 2
    assert "--sort size: must be one of run, data, tokens" in capsys.readouterr().err
    assert main(["compare"]) == 2


def test_a_terminal_without_unicode_gets_ascii(monkeypatch):
    name = save("logs/größe", evaluation=METRICS)
    for encoding, shown in (("ascii", "+-0.00010"), ("utf-8", "±0.00010")):
        out = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding))
        assert main(["compare", name]) == 0
        assert shown in out.getvalue().decode(encoding)


def test_a_trained_run_has_its_metrics_and_its_time(capsys):
    assert run_train("--dataset", "digits", "--max-steps", "3", "--name", "run") == 0
    row = read_run("logs/run")
    *_, watched, last = read_metrics(Path("logs/run/metrics.jsonl"))
    assert (watched["kind"], last["kind"], row.source) == ("epoch", "test", "evaluation.json")
    for name in ("mse", "mse_se", "psnr", "ssim", "ssim_se", "perplexity"):
        assert row.values[name] == last[f"held_out_{name}"]
    assert row.values["seconds"] > 0
    assert row.held_out["count"] == 60
    Path("logs/run/evaluation.json").unlink()
    assert read_run("logs/run").source == "metrics.jsonl"
    assert main("train --evaluate --checkpoint logs/run --iw-samples 1".split()) == 0
    assert read_run("logs/run").source == "evaluation.json"
