"""Benchmarks reuse a stored row only for the same settings and data, and do not overwrite published results unasked."""

import argparse
import ast
import importlib
import io
import json
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT
from vqvae.data import Dataset, Images
from vqvae.errors import OptionError

FLAGS = "--dataset digits --limit 60 --image-size 16 --bottleneck vq --hidden 8 --batch-size 20 --max-steps 4".split()


@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch):
    """An empty folder, made the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def benchmark(monkeypatch):
    """A function that imports a benchmark by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(ROOT / "benchmarks") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def runs(benchmark, monkeypatch):
    """benchmarks/runs.py, whose commands leave small files and are recorded in `runs.called`."""
    module = benchmark("runs")
    module.called = []

    def call(main, argv):
        command = "evaluate" if "--evaluate" in argv else argv[0].strip("-")
        module.called.append(command)
        if command == "dataset":
            run = Path(argv[argv.index("--log-dir") + 1], argv[argv.index("--name") + 1])
            run.mkdir(parents=True)
            (run / "checkpoint.pt").write_text("a checkpoint")
            row = {"kind": "epoch", "step": 4, "images_per_s": 40.0}
            (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        if command == "evaluate":
            folder = Path(argv[argv.index("--checkpoint") + 1]).parent
            (folder / "evaluation.json").write_text(json.dumps({"mse": len(module.called), "step": 4}))

    monkeypatch.setattr(module, "_call", call)
    monkeypatch.setattr(module.experiment.checkpoint, "read", lambda path: {"step": 4})
    return module


def test_the_settings_of_a_run_are_all_of_them_and_its_data(runs):
    def key(*words: str) -> str:
        return runs.key_of(runs.settings_of([*FLAGS, *words]))

    plain = key()
    assert plain == key("--codes", "512") == key("--optimizer", "muon")  # the default
    assert plain == key("--log-dir", "elsewhere", "--plot-dir", "there", "--name", "other")
    for words in (
        "--seed 1",
        "--lr 1e-3",
        "--codes 8",
        "--prior unigram",
        "--precision bf16",
        "--epochs 3",
        "--optimizer adamw",
    ):
        assert key(*words.split()) != plain, words
    flags = [word if word != "60" else "50" for word in FLAGS]
    settings = runs.settings_of(flags)
    assert settings["data"]["examples"] == {"train": 45, "validation": 5, "test": 50}
    whole = runs.settings_of([*flags, "--validation", "test"])
    assert (whole["data"]["examples"], "validation" in whole) == ({"train": 50, "test": 50}, False)
    assert runs.key_of(settings | {"limit": 60}) != plain  # the data differ too


def test_a_key_depends_on_the_version(runs, monkeypatch):
    before = runs.key_of({"a": 1})
    monkeypatch.setattr(runs, "__version__", "9.9")
    assert runs.key_of({"a": 1}) != before


def test_a_row_is_reused_for_the_same_settings_only(runs):
    first = runs.row_of(Path("logs/fsq"), FLAGS, plot_dir="plots")
    assert first["seconds"] == pytest.approx(4 * 20 / 40)
    assert runs.row_of(Path("logs/fsq"), FLAGS, plot_dir="plots") == first
    assert runs.called == ["dataset", "evaluate"]
    for other in ({"flags": [*FLAGS, "--seed", "1"]}, {"flags": FLAGS, "iw_samples": 2}):
        assert runs.row_of(Path("logs/fsq"), plot_dir="plots", **other)["key"] != first["key"]
    assert runs.called == ["dataset", "evaluate"] * 3
    assert len(list(Path("logs").iterdir())) == 3


def test_a_row_that_was_moved_to_other_settings_is_not_used(runs):
    first = runs.row_of(Path("logs/fsq"), FLAGS, plot_dir="plots")
    (folder,) = Path("logs").iterdir()
    (folder / "row.json").write_text(json.dumps(first | {"key": "other"}))
    assert runs.row_of(Path("logs/fsq"), FLAGS, plot_dir="plots")["key"] == first["key"]
    assert runs.called == ["dataset", "evaluate", "evaluate"]


def test_an_interrupted_run_is_resumed(runs, monkeypatch):
    runs.row_of(Path("logs/fsq"), FLAGS, plot_dir="plots")
    (folder,) = Path("logs").iterdir()
    (folder / "row.json").unlink()
    monkeypatch.setattr(runs.experiment.checkpoint, "read", lambda path: {"step": 3})
    runs.row_of(Path("logs/fsq"), FLAGS, plot_dir="plots")
    assert runs.called == ["dataset", "evaluate", "resume", "evaluate"]


def test_the_benchmark_of_bottlenecks_trains_the_named_rows_and_writes_the_named_file(benchmark, monkeypatch, capsys):
    bottlenecks = benchmark("bottlenecks")
    words = "--dataset digits --steps 2 --batch-size 8 --seeds 1 --only fsq".split()
    places = ["--logs", "my logs", "--plots", "my plots"]
    monkeypatch.setattr(sys, "argv", ["bottlenecks.py", *words, *places])
    bottlenecks.main()
    printed = capsys.readouterr().out
    assert "| fsq | " in printed
    assert "| vq, EMA |" not in printed
    assert "Larger codebooks" not in printed
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["my logs", "my plots"]
    (run,) = Path("my logs").iterdir()
    assert run.name.startswith("fsq-levels-8-8-8-seed0-")

    monkeypatch.setattr(benchmark("runs"), "_call", lambda *words: pytest.fail("trained again"))
    monkeypatch.setattr(sys, "argv", ["bottlenecks.py", *words, *places, "--output", "tables/out.md"])
    bottlenecks.main()
    assert Path("tables/out.md").read_text().strip() in printed


def test_reproduce_trains_its_queue_and_reports_its_progress(benchmark, monkeypatch, capsys):
    reproduce = benchmark("reproduce")
    short = "--dataset digits --limit 50 --batch-size 20 --image-size 16 --hidden 8 --codes 16 --device cpu --epochs"
    row = reproduce.Row(f"{short} 1", 2, "nothing", "none")
    prior = row._replace(flags="--prior unigram --batch-size 20 --epochs 1", seeds=1, of="two")
    two = row._replace(flags=f"{short} 2", seeds=1)
    row_of = reproduce.row_of
    monkeypatch.setattr(reproduce, "row_of", lambda *words, plots, **others: row_of(*words, **others))  # plots are slow
    monkeypatch.setattr(reproduce, "ROWS", {"one": row, "prior": prior, "two": two})

    def call(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *words])
        reproduce.main()
        return capsys.readouterr().out

    assert call("--status").splitlines() == [
        "one seed 0: not started",
        "one seed 1: not started",
        "prior seed 0: not started",
        "two seed 0: not started",
    ]
    assert "published: nothing" in call("--list")
    printed = call("--output", "results/out.md")
    assert Path("results/out.md").read_text().strip() in printed
    assert "| one | 1 | digits | 2 x 20 |" in printed
    assert "| two | 0 | digits | 4 x 20 |" in printed
    assert "| prior | 0 | digits | 2 x 20 |" in printed

    text, rows = Path("results/out.md").read_text(), json.loads(Path("results/out.json").read_text())
    other = rows[2] | {"seed": 7, "hardware": "another machine"}
    Path("results/out.json").write_text(json.dumps([rows[0] | {"hardware": "an old machine"}, *rows[1:], other]))
    call("one", "--output", "results/out.md")  # replaces its own rows and keeps the others
    added = set(Path("results/out.md").read_text().splitlines()) - set(text.splitlines())
    assert [line.split(" | ")[1::10] for line in added] == [["7", "another machine"]]
    assert json.loads(Path("results/out.json").read_text()) == [*rows[:3], other, *rows[3:]]

    (stored,) = Path("logs/reproduce").glob("two-seed0-*/row.json")
    stored.unlink()
    assert call("--status").splitlines() == [
        "one seed 0: finished",
        "one seed 1: finished",
        "prior seed 0: finished",
        "two seed 0: at step 4",
    ]


@pytest.mark.parametrize("name", ["bottlenecks", "probabilistic", "priors", "speed", "families", "sampling", "gpu"])
def test_no_benchmark_writes_published_results_by_default(name):
    assert 'default="results' not in (ROOT / "benchmarks" / f"{name}.py").read_text()
    command = next(line for line in (ROOT / "docs/results.md").read_text().split("```") if f"/{name}.py" in line)
    assert "--output" in command


def test_times_of_other_settings_are_not_mixed(benchmark):
    families, path = benchmark("families"), Path("times.json")
    settings = {"hardware": "a CPU", "turns": 7}
    assert families.stored_rows(None, settings) == families.stored_rows(path, settings) == {}
    path.write_text(json.dumps(settings | {"rows": [{"family": "vae", "ms": 3}]}))
    assert families.stored_rows(path, settings) == {"vae": {"family": "vae", "ms": 3}}
    with pytest.raises(SystemExit, match="has times of other settings .turns.; name another file"):
        families.stored_rows(path, settings | {"turns": 3})


SCRIPTS = [*ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("examples/*.py")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_what_a_script_imports_from_the_package_exists(script):
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vqvae":
            module = importlib.import_module(str(node.module))
            for name in (alias.name for alias in node.names):
                assert hasattr(module, name) or find_spec(f"{node.module}.{name}"), f"{node.module} has no {name}"


@pytest.mark.parametrize(("family", "what"), [("vae-points", "batch 64, 2x1x1"), ("pixelcnn", "batch 64, 8x8 codes")])
def test_a_worker_answers_with_the_time_of_a_step_and_nothing_else(benchmark, monkeypatch, capsys, family, what):
    monkeypatch.setattr(sys, "stdin", io.StringIO("0\n0\n"))
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # which the worker changes
    benchmark("families").work(family, "cpu")
    described, *times = capsys.readouterr().out.splitlines()
    assert described == what
    assert len(times) == 2
    assert min(map(float, times)) > 0


def test_a_prior_is_trained_again_for_other_minutes_and_other_codes(benchmark, monkeypatch):
    priors, trained = benchmark("priors"), []

    def train(*flags: str) -> None:
        trained.append(flags)
        if "--name" in flags:
            run = Path("logs", flags[flags.index("--name") + 1])
            run.mkdir(parents=True)
            (run / "checkpoint.pt").write_text("a checkpoint")

    monkeypatch.setattr(priors, "train", train)
    args = argparse.Namespace(
        lr="1e-3", seed=0, data_dir="my data", patience=None, epochs=None, ema_weights=0.0, precision="fp32",
        conditional=False,
    )  # fmt: skip

    def run(minutes: float = 2, codec: str = "a") -> Path:
        return priors.train_prior("pixelcnn", Path("logs/mnist"), minutes, {"autoencoder": codec}, args)

    first = run()
    assert run() == first
    assert len(trained) == 1
    assert "my data" in trained[0]
    assert len({first, run(minutes=3), run(codec="b")}) == 3
    assert len(trained) == 3
    longer = priors.train_longer(first, 5)
    assert priors.train_longer(first, 5) == longer
    assert priors.train_longer(first, 6) != longer
    assert len(trained) == 5
    (first / priors.FINISHED).unlink()
    with pytest.raises(SystemExit, match="was interrupted; delete it"):
        run()

    args.ema_weights = 0.995
    assert run() != first
    assert trained[-1][trained[-1].index("--ema-weights") + 1] == "0.995"
    args.patience = 3
    patient = run()
    assert trained[-1][trained[-1].index("--patience") + 1] == "3"
    assert "--max-minutes" not in trained[-1]
    (patient / priors.FINISHED).unlink()
    assert run() == patient
    assert trained[-1] == ("--resume", str(patient))
    args.patience, args.epochs = None, 7
    assert run() not in (first, patient)
    assert trained[-1][trained[-1].index("--epochs") + 1] == "7"
    assert {"--max-minutes", "--patience"}.isdisjoint(trained[-1])
    assert trained[-1][trained[-1].index("--validation") + 1] == priors.VALIDATION
    args.conditional = True
    run()
    assert "--conditional" in trained[-1]
    assert priors.LABEL_DROP in trained[-1]


def test_the_report_names_the_machines_of_its_rows(runs):
    rows = [{"hardware": "b"}, {"hardware": "a"}, {"hardware": "b"}]
    assert runs.hardware_of(rows) == "a; b"
    assert runs.hardware_of([{"hardware": runs.describe("cpu")}]).endswith(torch.__version__.split("+")[0])


# speed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_benchmark_says_that_there_is_no_gpu(benchmark, capsys):
    gpu = benchmark("gpu")
    assert gpu.cli.run(gpu.main, []) == 2
    assert capsys.readouterr().err.startswith("error: no GPU was found, so nothing was measured")


def test_the_gpu_benchmark_also_runs_on_a_cpu(benchmark, capsys):
    pytest.importorskip("vector_quantize_pytorch")
    gpu = benchmark("gpu")
    assert gpu.cli.run(gpu.main, "--device cpu --quick --output gpu.json".split()) == 0
    result = json.loads(Path("gpu.json").read_text())
    assert [row["compiled"] for part in ("training", "compiled training") for row in result[part]] == ["no", "yes"]
    assert result["search"][0]["same"] == 1
    assert [row["prior"] for row in result["sampling"]] == ["pixelcnn"]
    printed = capsys.readouterr().out
    assert "a check of this script" in printed
    assert gpu.cli.run(gpu.main, "--device cpu --quick --minutes 0".split()) == 0
    assert "not measured: 1 of sampling" in capsys.readouterr().out


def test_the_peers_quantizers_give_the_nearest_codes_and_learn_in_training_only(benchmark):
    pytest.importorskip("vector_quantize_pytorch")
    peers = benchmark("peers")
    z = torch.randn(2, peers.DIM, 4, 4)
    for name in ("plain", "vqp"):
        quantizer = peers.QUANTIZERS[name](8).eval()
        first = quantizer(z)[0]
        assert torch.equal(first, quantizer(z)[0])
        quantizer.train()(z)
        assert not torch.equal(first, quantizer.eval()(z)[0])
    table = peers.PlainQuantizer(8)
    rows = z.movedim(1, -1).flatten(0, 2).double()
    nearest = torch.cdist(rows, table.codebook.double()).argmin(1)
    assert torch.allclose(table.eval()(z)[0].movedim(1, -1).flatten(0, 2), table.codebook[nearest], atol=1e-6)


def test_the_layers_that_are_timed_are_all_convolutions_of_a_step(benchmark, monkeypatch, capsys):
    pytest.importorskip("vector_quantize_pytorch")
    layers = benchmark("layers")
    found = layers.layers(2)
    assert len(found) == 15
    forward = 2 * sum(layer.weight.numel() * layers.pixels(layer, x) for layer, x in found)
    first = 2 * found[0][0].weight.numel() * 16 * 16  # it has no gradient of its input
    assert 3 * forward - first == pytest.approx(259.5e6, abs=1e5)  # as PyTorch's counter has it

    monkeypatch.setattr(layers, "interleaved", lambda turns, **options: {name: turn() for name, turn in turns.items()})
    monkeypatch.setattr(layers, "SIDE", 16)
    monkeypatch.setattr(layers, "product", lambda kind, *_: lambda: torch.zeros(1))
    monkeypatch.setattr(sys, "argv", ["layers.py", "--batch-size", "1"])
    layers.main()
    assert "| transposed 4x4 stride 2, 64 to 3 | 1.6 | " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["ours", "plain"])
def test_a_race_ends_at_its_goal_or_when_it_gives_up(benchmark, monkeypatch, name):
    race = benchmark("race")
    pixels = torch.randint(256, (60, 3, 32, 32), dtype=torch.uint8)
    noise = Dataset("noise", *(Images(pixels, torch.zeros(60, dtype=torch.int64)) for _ in range(2)))
    monkeypatch.setattr(race.run_data, "load", lambda config: noise)
    monkeypatch.setattr(race, "EVERY", 1)

    def run(goal: float) -> dict:
        return race.run(name, "fp32", goal, "data", 0, torch.device("cpu"), 2)

    row = run(1e-9)
    assert (row["steps"], row["reached"]) == (2, False)
    assert row["error"] > 0.1
    assert min(row["seconds"], row["cpu_seconds"]) > 0
    row = run(1e9)
    assert (row["steps"], row["reached"]) == (1, True)


def test_training_is_compared_with_both_allocators_and_the_faster_product(benchmark, monkeypatch):
    pytest.importorskip("vector_quantize_pytorch")
    speed, built = benchmark("speed"), []

    class Here:
        """A contestant in this process."""

        def __init__(self, build, *arguments, runs, our_allocator):
            built.append((arguments[0], our_allocator))
            self.work = build(*arguments)

    def compete(contestants):
        for contestant in contestants.values():
            contestant.work()
        return {name: 2.0 if name.startswith("mm") else 1.0 for name in contestants}

    monkeypatch.setattr(speed, "Contestant", Here)
    monkeypatch.setattr(speed, "compete", compete)
    monkeypatch.setattr(speed, "computes_bf16", lambda: False)
    monkeypatch.setattr(speed, "SIDE", 16)
    monkeypatch.setattr(speed, "BATCH", 2)
    monkeypatch.setattr(speed, "training_step", partial(speed.training_step, batch=2))
    result = speed.training(torch.device("cpu"), 1)
    assert built.count(("plain", False)) == built.count(("plain", True)) == built.count(("vqp", True)) == 1
    assert result["mflop_per_image"] == pytest.approx(259.5, abs=0.1)
    row = result["fp32"]
    assert row["images_per_s"] == 2
    assert row["ratio_vqp"] == row["ratio_plain_same_allocator"] == 1
    assert row["convolution_gflops"] == pytest.approx(2 * 16**3 / 1e9)
    assert row["fastest_gemm_fraction"] == pytest.approx(2 * 259.52256e6 / (2 * 16**3))


def test_both_products_of_the_peak_rate_are_the_same_product(benchmark, monkeypatch):
    speed = benchmark("speed")
    monkeypatch.setattr(speed, "SIDE", 64)
    results = []
    for kind in ("mm", "convolution"):
        torch.manual_seed(0)
        results.append(speed.product(kind, torch.float64, torch.device("cpu"))())
    found = results[1].permute(0, 2, 3, 1).reshape(64, 64)
    assert torch.allclose(found, results[0], atol=1e-9)


def test_the_instructions_of_a_cpu_say_if_they_are_emulated(benchmark, monkeypatch):
    hardware = benchmark("hardware")
    for name in hardware.HELD:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": True}, raising=False)
    assert hardware.instructions() == "AVX-512 with bf16 and AMX"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert hardware.instructions() == "AVX-512, emulated (ONEDNN_MAX_CPU_ISA=AVX2)"


@pytest.mark.parametrize("restricted", [True, False])
def test_bf16_is_timed_only_with_instructions_that_the_process_may_use(benchmark, monkeypatch, restricted):
    pytest.importorskip("vector_quantize_pytorch")
    speed, cpu = benchmark("speed"), torch.device("cpu")
    monkeypatch.setattr(speed, "computes_bf16", lambda: True)
    monkeypatch.setattr(speed, "restricted", lambda: ["ONEDNN_MAX_CPU_ISA=AVX2"] if restricted else [])
    assert list(speed.precisions(cpu)) == (["fp32"] if restricted else ["fp32", "bf16"])


def test_the_speeds_of_a_machine_replace_no_others(benchmark):
    speed, path = benchmark("speed"), Path("speed.json")
    speed.write_entry(path, "a CPU", {"ms": 1})
    speed.write_entry(path, "another", {"ms": 2})
    speed.write_entry(path, "a CPU", {"ms": 3})
    assert json.loads(path.read_text()) == {"a CPU": {"ms": 3}, "another": {"ms": 2}}
    path.write_text('{"hardware": "a CPU"}')
    with pytest.raises(OptionError, match="is not a file of this benchmark"):
        speed.write_entry(path, "a CPU", {})
    published = json.loads((ROOT / "results/speed.json").read_text())
    assert all({"hardware", "train", "quantizer"} <= set(entry) for entry in published.values())


def test_a_long_run_is_read_from_the_end_of_its_log_and_summed_up_in_tenths(benchmark, tmp_path):
    long = benchmark("long")
    log = tmp_path / "metrics.jsonl"
    assert long.last_epoch(log) == 0
    with log.open("w") as file:
        for epoch in range(1, 301):
            for kind in ("train", "epoch"):
                file.write(json.dumps({"kind": kind, "step": 3 * epoch, "epoch": epoch, "mse": 0.1}) + "\n")
    assert long.last_epoch(log) == long.last_epoch(log, most=100) == 300
    moments = [long.Moment(0.1 * epoch + max(0, epoch - 50), epoch, 800 + epoch) for epoch in range(1, 101)]
    rows = long.tenths(moments, 100)
    assert len(rows) == 10
    assert rows[0] == ("10", "810.0", "100.0")
    assert rows[-1] == ("100", "900.0", "1100.0")
