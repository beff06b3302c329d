"""Command lines that must be refused, and the folder in which they are tried.

benchmarks/faults/inputs.py tries the same lines in processes of their own, and on other versions.
"""

import hashlib
import shlex
from pathlib import Path
from typing import NamedTuple

from vqvae.__main__ import main
from vqvae.config import FIELDS, SHORTHANDS

TINY = "--limit 60 --batch-size 20 --image-size 16 --epochs 1 --device cpu"
RUNS = [
    f"train {TINY} --name run --hidden 8 --codes 16 --code-dim 4",
    "train --checkpoint logs/run --prior unigram --name prior --batch-size 20 --epochs 1 --device cpu",
    f"train {TINY} --name vae --hidden 4 --nets conv-vae --bottleneck gaussian latents=2 --prior normal",
    "train --dataset gauss2d --nets mlp --likelihood gaussian --bottleneck vq num_codes=8 code_dim=2 --name points "
    "--limit 64 --batch-size 20 --epochs 1 --device cpu",
    "encode --checkpoint logs/run --dataset digits --limit 4 --output codes.npz --device cpu",
]


def prepare() -> None:
    """Fill the working folder with small runs, codes, images, and files of the wrong kind."""
    from PIL import Image

    for line in RUNS:
        if main(line.split()):
            raise SystemExit(f"failed: {line}")
    for folder in ("in", "empty", "full", "folder.pt", "folder.npz"):
        Path(folder).mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(Path("in", name))
    Path("full/other.txt").write_text("kept")
    Path("file").write_text("a file, not a folder")
    Path("text.pt").write_text("not a checkpoint")
    Path("empty.pt").touch()
    Path("text.npz").write_text("no codes")


def tree() -> dict[str, tuple[int, str]]:
    """Every file and folder below the working folder, with size and checksum."""
    found = {}
    for path in sorted(Path().rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        found[str(path)] = (len(content), hashlib.sha256(content).hexdigest())
    return found


class Case(NamedTuple):
    """A command line, and how its error begins after `error: `."""

    words: list[str]
    message: str

    def __str__(self) -> str:
        return " ".join(self.words)[:60]


# words of the lines below, and how messages show them
HOSTILE = {
    "EMPTY": ("", "''"),
    "NEWLINE": ("a\nb", r"a\nb"),
    "ESCAPE": ("a\x1b[31mb", r"a\x1b[31mb"),
    "TITLE": ("a\x1b]0;b\x07", r"a\x1b]0;b\x07"),
    "NUL": ("a\0b", r"a\x00b"),
    "REVERSED": ("a\u202eb", r"a\u202eb"),
    "NOTTEXT": ("a\udcffb", r"a\udcffb"),
    "LONGNAME": ("x" * 300, "x" * 70),
    "LONGPATH": ("a/" * 3000, "a/" * 35),
    "DIGITS": ("9" * 5000, "9" * 80 + "... (5,000 characters)"),
}
EMPTY = "is empty; give a value, or leave it out"
HIDDEN = "contains a line break or another character that cannot be printed; remove that character"
CHOSEN = "the model and data come from --checkpoint; leave it out"
UNUSED = "has no effect, because --evaluate does not train; it uses only"
PATH = "cannot be used"

LINES = f"""
# vqvae
 | no command; known: train, visualize, compare, encode, decode, export, cache; see vqvae --help
EMPTY | '': no such command; known: train
trian --epochs 3 | trian: no such command (did you mean 'train'?)
NEWLINE | a\\nb: no such command
ESCAPE | a\\x1b[31mb: no such command
LONGNAME | LONGNAME
--versoin | --versoin: no such flag (did you mean '--version'?)
-v | -v: no such flag; known: --help, --version
--epochs 3 | --epochs: no such flag
--version now | now: comes after --version, which takes nothing more; leave it out
--help train | train: comes after --help

# words that are no flag, no value, or too many
train --epoch 3 | --epoch: no such flag (did you mean '--epochs'?); see --help
train -epochs 3 | -epochs: no such flag (did you mean '--epochs'?)
train —epochs 3 | —epochs: belongs to no flag (did you mean '--epochs'?)
train epochs=3 | epochs=3: belongs to no flag (did you mean '--epochs'?)
train --batch_size 3 | --batch_size: no such flag (did you mean '--batch-size' or '--resize'?)
train digits | digits: belongs to no flag; see --help
train --epochs 3 4 | --epochs 3 4: takes one value
train --epochs | --epochs: expected one argument
train --epochs --lr 1 | --epochs: expected one argument
train --conditional yes | --conditional yes: takes no value
train --compile=yes | --compile yes: takes no value
train --data-dir in holdout=2 | holdout=2: belongs to no flag
visualize | the following arguments are required: --checkpoint
visualize --checkpoint | --checkpoint: expected one argument
visualize logs/run | logs/run: belongs to no flag
visualize --chekpoint logs/run | --chekpoint: no such flag (did you mean '--checkpoint'?)
visualize --checkpoint logs/run --epochs 3 | --epochs: no such flag
encode | the following arguments are required: --checkpoint, --output
encode --checkpoint logs/run --dataset digits | the following arguments are required: --output
encode --checkpoint logs/run --output c.npz | nothing to encode; name a folder with --input
encode --chekpoint logs/run --input in --output c.npz | --chekpoint: no such flag (did you mean '--checkpoint'?)
decode | the following arguments are required: FILE, --checkpoint, --output
decode --checkpoint logs/run --output back | the following arguments are required: FILE
decode codes.npz text.npz --checkpoint logs/run --output back | text.npz: truncated, or not a file
export --output out | the following arguments are required: --checkpoint
export logs/run --output out | logs/run: belongs to no flag
export --checkpoint logs/run --outptu out | --outptu: no such flag (did you mean '--output'?)
export --checkpoint logs/run --output out --device cpu | --device: no such flag

# twice
train --codes 8 --codes 9 | --codes 9: is given twice, also as --codes 8; keep one
train --lr=1 --lr 2 | --lr 2: is given twice, also as --lr 1
train --compile --no-compile | --no-compile: is given twice, also as --compile
train --bottleneck vq --bottleneck cosine | --bottleneck cosine: is given twice, also as --bottleneck vq
train --bottleneck vq decay=0.9 decay=0.8 | --bottleneck vq decay=0.8: is given twice, also as decay=0.9
train --codes 8 --bottleneck vq num_codes=8 | --codes 8: is given twice, also as --bottleneck vq num_codes=8; keep one
train --kl-weight 1 --objective elbo kl_weight=2 | --kl-weight 1: is given twice, also as --objective elbo kl_weight=2
visualize --checkpoint logs/run --checkpoint logs/vae | --checkpoint logs/vae: is given twice
visualize --checkpoint logs/run --only samples.png --only usage.png | --only usage.png: is given twice
encode --checkpoint logs/run --input in --output c.npz --output d.npz | --output d.npz: is given twice
decode codes.npz --checkpoint logs/run --output a --output b | --output b: is given twice
export --checkpoint logs/run --output a --output b | --output b: is given twice

# numbers
train --lr -1e-3 | --lr -1e-3: must be at least 0
train --lr nan | --lr nan: must be a finite number of at most 3.4e+38, or a schedule
train --lr 1e39 | --lr 1e39: must be a finite number of at most 3.4e+38, or a schedule
train --lr linear:0:-1:5 | --lr linear:0:-1:5: must be at least 0 at every step
train --lr linear:0:1e39 | --lr linear:0:1e39: start and end must be finite numbers
train --lr cosine:nan:0 | --lr cosine:nan:0: start and end must be finite numbers
train --lr linear:0:1:1e12 | --lr linear:0:1:1e12: steps must be a whole number from 1 to 2147483647
train --lr linear:0:1:2.5 | --lr linear:0:1:2.5: steps must be a whole number
train --lr fast | --lr fast: must be a number, or shape:start:end[:steps]
train --kl-weight inf | --kl-weight inf: must be a finite number
train --objective elbo kl_weight=1e999 | --objective elbo kl_weight=1e999: must be a finite number
train --objective elbo free_bits=-1 | --objective elbo free_bits=-1: must be at least 0
train --bottleneck gumbel --temperature 0 | --temperature 0: must be above 0
train --bottleneck gumbel temperature=-1 | --bottleneck gumbel temperature=-1: must be above 0
train --beta 1e300 | --beta 1e300: must be at most 3.4e+38
train --beta -inf | --beta -inf: must be a finite number, at least 0
train --weight-decay 1e308 | --weight-decay 1e308: must be at most 3.4e+38
train --epochs 0 | --epochs 0: must be at least 1
train --epochs 1.5 | --epochs 1.5: must be a whole number
train --epochs 0x10 | --epochs 0x10: must be a whole number
train --epochs 1e400 | --epochs 1e400: must be at most 2147483647
train --epochs DIGITS | --epochs DIGITS: must be at most 2147483647
train --max-steps DIGITS | --max-steps DIGITS: must be at most 2147483647
train --max-minutes nan | --max-minutes nan: must be a finite number, above 0
train --max-minutes 1e400 | --max-minutes 1e400: must be a finite number, above 0
train --patience -3 | --patience -3: must be at least 1
train --accumulate 0 | --accumulate 0: must be at least 1
train --batch-size 4 --accumulate 5 | --batch-size 4: smaller than the 5 shares that it is to have; use a larger one
train --nets henrhoi --image-size 16 --accumulate 2 | --accumulate 2: must be 1 with batch norm
encode --checkpoint logs/run --input in --output c.npz --shards 0 | --shards 0: must be from 1 to 99999
train --log-every 9999999999 | --log-every 9999999999: must be at most 2147483647
train --checkpoint-every 9999999999s | --checkpoint-every 9999999999s: must be steps such as 500
train --checkpoint-every -1 | --checkpoint-every -1: must be steps such as 500
train --seed -1 | --seed -1: must be from 0 to 9223372036854775807
train --seed 9223372036854775808 | --seed 9223372036854775808: must be from 0 to
train --batch-size 1000000000000000000 | --batch-size 1000000000000000000: must be at most 2147483647
train --batch-size 5000 | --batch-size 5000: larger than the 1350 training examples
train --validation 0 | --validation 0: must be a share above 0 and below 1, or test
train --validation tset | --validation tset: must be a share above 0 and below 1, or test
train --validation nan | --validation nan: must be a share above 0 and below 1, or test
train --limit 1 | --validation 0.1: leaves no training image of 1; use test
train --image-size 1000000000 | --image-size 1000000000: must be from 1 to 4096
train --image-size 30 | --image-size 30: does not divide by 4; try 28 or 32
train --limit 1e30 | --limit 1e30: must be at most 2147483647
train --codes 1099511627776 | --codes 1099511627776: must be from 1 to 16777216
train --code-dim 1099511627776 | --code-dim 1099511627776: must be from 1 to 16777216
train --hidden 1099511627776 | --hidden 1099511627776: must be at most 2147483647
train --hidden 2 --code-dim 1e7 --codes 1.5e7 | --codes 1.5e7: the model does not fit into memory
train --nets sonnet residual_layers=1e10 | --nets sonnet residual_layers=1e10: must be at most 2147483647
train --dataset photos crops=1e15 | --dataset photos crops=1e15: must be
train --dataset gauss2d train_points=-1 | --dataset gauss2d train_points=-1: must be
train --evaluate --checkpoint logs/run --iw-samples 1e12 | --iw-samples 1e12: must be from 0 to 1000000
train --evaluate --checkpoint logs/run --metrics lite0 --samples 1 | --samples 1: must be from 2 to 1000000
visualize --checkpoint logs/run --samples 1000000000000000 | --samples 1000000000000000: must be from 1 to 10000
visualize --checkpoint logs/run --samples 0 | --samples 0: must be from 1 to 10000
visualize --checkpoint logs/run --samples many | --samples many: must be a whole number
visualize --checkpoint logs/run --temperature nan | --temperature nan: must be a finite number, from 0 to below 1000
visualize --checkpoint logs/run --temperature -1 | --temperature -1: must be from 0 to below 1000
visualize --checkpoint logs/run --top-k -1 | --top-k -1: must be at least 0
visualize --checkpoint logs/run --top-p 0 | --top-p 0: must be above 0 and at most 1
visualize --checkpoint logs/run --top-p 1.1 | --top-p 1.1: must be above 0 and at most 1
visualize --checkpoint logs/run --guidance -1 | --guidance -1: must be from 0 to below 1000
visualize --checkpoint logs/run --steps 0 | --steps 0: must be at least 1
visualize --checkpoint logs/run --choice-temperature -1 | --choice-temperature -1: must be at least 0
visualize --checkpoint logs/run --top-k DIGITS | --top-k DIGITS: must be at most 2147483647
visualize --checkpoint logs/run --class -1 | --class -1: the model's prior is not conditioned on classes
visualize --checkpoint logs/run --seed 1e19 | --seed 1e19: must be from 0 to
encode --checkpoint logs/run --input in --output c.npz --limit 0 | --limit 0: must be at least 1
encode --checkpoint logs/run --input in --output c.npz --limit 1e30 | --limit 1e30: must be at most
encode --checkpoint logs/run --input in --output c.npz --batch-size 1e18 | --batch-size 1e18: must be from 1 to 65536
decode codes.npz --checkpoint logs/run --output back --batch-size -5 | --batch-size -5: must be from 1 to 65536

# names and choices
train --dataset mnits | --dataset mnits: no such name (did you mean 'mnist'?); known: digits
train --dataset EMPTY | --dataset '': {EMPTY}
train --bottleneck vq EMPTY | --bottleneck 'vq ': {EMPTY}
train --bottleneck vq decay= | --bottleneck vq decay='': must be a number
train --bottleneck vq =3 | --bottleneck vq: '=3' must be of the form key=value
train --bottleneck decay=3 | --bottleneck decay=3: must be a name
train --bottleneck vq decai=0.9 | --bottleneck vq decai=0.9: unknown option (did you mean 'decay'?)
train --bottleneck fsq levels= | --bottleneck fsq levels='': must be whole numbers from 2 up
train --bottleneck grouped groups=3 | --bottleneck grouped groups=3: code_dim=64 must be a multiple of groups=3
train --bottleneck grouped groups=3 --code-dim 8 | --code-dim 8: must be a multiple of groups=3
train --prior transformer width=6 | --prior transformer width=6: must be a multiple of heads=4
train --prior-flows 2 | --prior-flows 2: --prior uniform has no flows
train --bottleneck vq NEWLINE | --bottleneck vq a\\nb: {HIDDEN}
train --bottleneck vq decay=ESCAPE | --bottleneck vq decay=a\\x1b[31mb: {HIDDEN}
train --nets sonet | --nets sonet: no such name (did you mean 'sonnet'?)
train --bottleneck gaussian --codes 8 | --codes 8: --bottleneck gaussian has no num_codes; it takes latents=16
train --objective probabilistic iaf_startup_steps=3 | --objective probabilistic iaf_startup_steps=3: the bottleneck
train --likelihood bernoulli | --likelihood bernoulli:
train --preset sonet-mnist | --preset sonet-mnist: no such name (did you mean 'sonnet-mnist' or 'sqvae-mnist'?)
train --list bottleneks | --list bottleneks: no such list (did you mean 'bottlenecks'?)
train --device tpu | --device tpu: must be one of auto, cpu, cuda, mps
train --precision fp16 | --precision fp16: must be one of auto, fp32, bf16
train --augment crop | --augment crop: must be one of none, crop-flip
train --name a/b | --name a/b: must be a name of letters, digits and . _ + = -
train --name .. | --name ..: must be a name
train --name -x | --name -x: must be a name
train --name 'a b' | --name a b: must be a name
train --name LONGNAME | --name LONGNAME
train --name run | --name run: logs/run already contains a run
visualize --checkpoint logs/run --only codebok.png | --only codebok.png: no such plot (did you mean 'codebook.png'
visualize --checkpoint logs/run --device tpu | --device tpu: must be one of auto
encode --checkpoint logs/run --dataset mnits --output c.npz | --dataset mnits: no such name (did you mean 'mnist'?)
encode --checkpoint logs/run --dataset digits limit=3 --output c.npz | --dataset digits limit=3: unknown option
encode --checkpoint logs/run --dataset digits --split valid --output c.npz | --split valid: must be one of train, test
compare logs/run --sort msee | --sort msee: must be one of run, data
compare logs/run --format html | --format html: must be one of text, markdown, json
compare | the following arguments are required: RUN
compare EMPTY | '': {EMPTY}
compare logs/run NEWLINE | a\\nb: {HIDDEN}
compare logs/none | logs/none: no such file; a run saves its checkpoint
encode --checkpoint logs/run --input in --output codes | --output codes: must end in .npz, such as codes.npz
encode --checkpoint logs/run --input in --output .npz | --output .npz: must end in .npz, such as npz.npz

# paths that cannot be looked up or written
train --log-dir LONGNAME | --log-dir LONGNAME
train --log-dir LONGPATH | --log-dir LONGPATH
train --log-dir new/LONGNAME | --log-dir new/xxx
train --plot-dir new/LONGNAME | --plot-dir new/xxx
train --dataset folder --data-dir LONGNAME | --data-dir LONGNAME
train --resume LONGNAME | --resume LONGNAME
train --prior pixelcnn --checkpoint LONGNAME | --checkpoint LONGNAME
train --evaluate --checkpoint LONGNAME | --checkpoint LONGNAME
visualize --checkpoint LONGNAME | --checkpoint LONGNAME
visualize --checkpoint logs/run --plot-dir LONGNAME | --plot-dir LONGNAME
encode --checkpoint logs/run --input LONGPATH --output c.npz | --input LONGPATH
encode --checkpoint logs/run --input in --output LONGNAME.npz | --output LONGNAME
decode LONGNAME --checkpoint logs/run --output back | LONGNAME
decode codes.npz --checkpoint logs/run --output new/LONGNAME | --output new/xxx
export --checkpoint logs/run --output LONGNAME | --output LONGNAME
compare LONGNAME | LONGNAME
compare logs/run --output new/LONGNAME | --output new/xxx
train --log-dir ~nosuchuser/logs | --log-dir ~nosuchuser/logs: no user is called nosuchuser; write the path without ~
train --plot-dir ~nosuchuser | --plot-dir ~nosuchuser: no user is called nosuchuser
train --dataset folder --data-dir ~nosuchuser/x | --data-dir ~nosuchuser/x: no user is called nosuchuser
train --resume ~nosuchuser/x | --resume ~nosuchuser/x: no user is called nosuchuser
train --evaluate --checkpoint ~nosuchuser/x | --checkpoint ~nosuchuser/x: no user is called nosuchuser
visualize --checkpoint ~nosuchuser/x | --checkpoint ~nosuchuser/x: no user is called nosuchuser
encode --checkpoint logs/run --input ~nosuchuser --output c.npz | --input ~nosuchuser: no user is called nosuchuser
decode ~nosuchuser/c.npz --checkpoint logs/run --output back | ~nosuchuser/c.npz: no user is called nosuchuser
compare ~nosuchuser/x | ~nosuchuser/x: no user is called nosuchuser
export --checkpoint logs/run --output ~nosuchuser | --output ~nosuchuser: no user is called nosuchuser
train --log-dir file | --log-dir file: is a file and not a folder; name another place
train --log-dir file/below | --log-dir file/below: {PATH} (Not a directory)
train --log-dir /dev/null/logs | --log-dir /dev/null/logs: {PATH}
train --log-dir /proc/logs | --log-dir /proc/logs: /proc cannot be written to
train --plot-dir file | --plot-dir file: is a file and not a folder
train --plot-dir file/below | --plot-dir file/below: {PATH}
train --plot-dir /proc/plots | --plot-dir /proc/plots: /proc cannot be written to
train --resume file/below | --resume file/below: {PATH}
train --dataset folder --data-dir nowhere | --data-dir nowhere: no such folder
train --dataset folder --data-dir empty | --data-dir empty: has no image files
train --dataset folder --data-dir in/a.png/b | --data-dir in/a.png/b: {PATH}
visualize --checkpoint logs/run --plot-dir file | --plot-dir file: is a file and not a folder
visualize --checkpoint logs/run --plot-dir /proc/plots | --plot-dir /proc/plots: /proc cannot be written to
encode --checkpoint logs/run --input nowhere --output c.npz | --input nowhere: no such folder
encode --checkpoint logs/run --input empty --output c.npz | --input empty: has no image files
encode --checkpoint logs/run --input in --output folder.npz | --output folder.npz: is a folder; name a file
encode --checkpoint logs/run --input in --output in/a.png/c.npz | --output in/a.png/c.npz: {PATH}
encode --checkpoint logs/run --input in --output /proc/c.npz | --output /proc/c.npz: /proc cannot be written to
decode nowhere.npz --checkpoint logs/run --output back | nowhere.npz: no such file
decode text.npz --checkpoint logs/run --output back | text.npz:
decode folder.npz --checkpoint logs/run --output back | folder.npz:
decode codes.npz --checkpoint logs/run --output full | --output full: is not empty, and nothing is overwritten
decode codes.npz --checkpoint logs/run --output file | --output file: is a file and not a folder
decode codes.npz --checkpoint logs/run --output file/below | --output file/below: {PATH}
export --checkpoint logs/run --output full | --output full: is not empty, and nothing is overwritten
export --checkpoint logs/run --output logs/run | --output logs/run: is not empty
export --checkpoint logs/run --output /proc/out | --output /proc/out: /proc cannot be written to

# checkpoints of the wrong kind
train --resume nowhere | --resume nowhere: no such run; name its folder
train --resume logs/rum | --resume logs/rum: no such run (did you mean 'run'?); name
train --resume in | --resume in:
train --resume text.pt | --resume text.pt:
train --evaluate --checkpoint nowhere | --checkpoint nowhere:
train --evaluate --checkpoint text.pt | --checkpoint text.pt:
train --prior pixelcnn --checkpoint nowhere | --checkpoint nowhere:
train --prior pixelcnn --checkpoint folder.pt | --checkpoint folder.pt:
train --prior pixelcnn --checkpoint empty.pt | --checkpoint empty.pt:
train --prior pixelcnn --checkpoint text.pt | --checkpoint text.pt:
train --prior pixelcnn --checkpoint logs/prior | --checkpoint logs/prior: is a prior's checkpoint; name
train --prior pixelcnn --checkpoint logs/vae --batch-size 20 | --checkpoint logs/vae: its latent is continuous
visualize --checkpoint nowhere | --checkpoint nowhere:
visualize --checkpoint folder.pt | --checkpoint folder.pt:
visualize --checkpoint empty.pt | --checkpoint empty.pt:
visualize --checkpoint text.pt | --checkpoint text.pt:
encode --checkpoint nowhere --input in --output c.npz | --checkpoint nowhere:
encode --checkpoint text.pt --input in --output c.npz | --checkpoint text.pt:
encode --checkpoint logs/vae --input in --output c.npz | --checkpoint logs/vae: the latent is continuous
encode --checkpoint logs/points --input in --output c.npz | --input in: the model's examples are 2x1x1
decode codes.npz --checkpoint logs/points --output back | --checkpoint logs/points: the model's examples are 2x1x1
encode --checkpoint logs/run --dataset gauss2d --output c.npz | --dataset gauss2d: its examples are 2x1x1
decode codes.npz --checkpoint logs/vae --output back | --checkpoint logs/vae: the latent is continuous
decode codes.npz --checkpoint empty.pt --output back | --checkpoint empty.pt:
export --checkpoint nowhere --output out | --checkpoint nowhere:
export --checkpoint in --output out | --checkpoint in:
export --checkpoint text.pt --output out | --checkpoint text.pt:

# flags without effect
train --list data --epochs 3 | --epochs 3: has no effect, because --list data only prints; leave it out
train --list presets --lr 1 | --lr 1: has no effect, because --list presets only prints
train --resume logs/run --list data | --resume logs/run: has no effect, because --list data only prints
train --iw-samples 3 | --iw-samples 3: has no effect without --evaluate
train --evaluate | --evaluate: name the model with --checkpoint
train --evaluate --checkpoint logs/run --epochs 3 | --epochs 3: {UNUSED}
train --evaluate --checkpoint logs/run --resume logs/run | --resume logs/run: {UNUSED}
train --evaluate --checkpoint logs/run --lr 1 | --lr 1: {UNUSED}
train --evaluate --checkpoint logs/run --bottleneck vq | --bottleneck vq: {UNUSED}
train --evaluate --checkpoint logs/run --codes 8 | --codes 8: {UNUSED}
train --evaluate --checkpoint logs/run --seed 3 | --seed 3: {UNUSED}
train --evaluate --checkpoint logs/run --compile | --compile: {UNUSED}
train --evaluate --checkpoint logs/run --data-dir in | --data-dir in: the data set digits reads no files; leave it out
train --data-dir in | --data-dir in: the data set digits reads no files; leave it out
train --dataset gauss2d --nets mlp --likelihood gaussian --image-size 8 | --image-size 8: the points of gauss2d
train --conditional | --conditional: the prior uniform cannot use labels
train --conditional --dataset photos crops=40 | --conditional: the data set photos has no labels
train --checkpoint logs/run | --checkpoint logs/run: name the prior to train on its codes
train --prior pixelcnn --checkpoint logs/run --codes 16 | --codes 16: {CHOSEN}
train --prior pixelcnn --checkpoint logs/run --hidden 8 | --hidden 8: {CHOSEN}
train --prior pixelcnn --checkpoint logs/run --nets sonnet | --nets sonnet: {CHOSEN}
train --prior pixelcnn --checkpoint logs/run --objective elbo | --objective elbo: {CHOSEN}
train --prior pixelcnn --checkpoint logs/run --likelihood mse | --likelihood mse: {CHOSEN}
train --prior pixelcnn --checkpoint logs/run --dataset digits | --dataset digits: {CHOSEN}
train --prior pixelcnn --checkpoint logs/run --image-size 16 | --image-size 16: {CHOSEN}
train --prior pixelcnn --checkpoint logs/run --preset sonnet-mnist | --preset sonnet-mnist: {CHOSEN}
train --prior pixelcnn --checkpoint logs/run --augment crop-flip | --augment crop-flip: a prior trains on codes
train --prior pixelcnn --checkpoint logs/run --batch-size 70 | --batch-size 70: larger than the 54 training examples
train --prior uniform --checkpoint logs/run --batch-size 20 | --prior uniform: has no parameters to train
train --prior made-flow --checkpoint logs/run --batch-size 20 | --prior made-flow: needs latent_dim
train --resume logs/run --lr 1 | --lr 1: a resumed run keeps its settings; only these may change: --data-dir
train --resume logs/run --codes 8 | --codes 8: a resumed run keeps its settings
train --resume logs/run --name other | --name other: a resumed run keeps its settings
train --resume logs/run --checkpoint logs/run | --checkpoint logs/run: a resumed run keeps its settings
train --resume logs/run --data-dir in | --data-dir in: the data set digits reads no files
train --resume logs/run --epochs 0 | --epochs 0: must be at least 1
train --resume logs/run | --resume logs/run: has taken all of its 2 steps
visualize --checkpoint logs/run --class 0 | --class 0: the model's prior is not conditioned on classes; leave it out
visualize --checkpoint logs/run --top-k 17 | --top-k 17: must be from 0 to 16
visualize --checkpoint logs/run --guidance 2.5 | --guidance 2.5: needs a prior of classes that was trained
visualize --checkpoint logs/run --steps 4 | --steps 4: only a masked prior draws in steps; leave it out
visualize --checkpoint logs/run --choice-temperature 1.5 | --choice-temperature 1.5: only a masked prior draws in steps
visualize --checkpoint logs/vae --top-p 0.5 | --top-p 0.5: the model's latent is continuous and has no codes; leave it
visualize --checkpoint logs/vae --guidance 2.5 | --guidance 2.5: the model's latent is continuous and has no codes
visualize --checkpoint logs/vae --top-k 3 | --top-k 3: the model's latent is continuous and has no codes; leave it out
encode --checkpoint logs/run --input in --dataset digits --output c.npz | --input in: cannot be encoded together with
encode --checkpoint logs/run --input in --split test --output c.npz | --split test: needs --dataset
encode --checkpoint logs/run --input in --data-dir in --output c.npz | --data-dir in: needs --dataset
encode --checkpoint logs/run --dataset digits --data-dir in --output c.npz | --data-dir in: the data set digits reads no
"""

TAKE_A_VALUE = {
    "train": [*FIELDS.keys() - {"conditional", "compile"}, *SHORTHANDS, "resume", "list", "iw_samples"],
    "visualize": [
        "checkpoint",
        "plot_dir",
        "only",
        "samples",
        "temperature",
        "top_k",
        "top_p",
        "guidance",
        "steps",
        "choice_temperature",
        "class",
        "seed",
        "device",
    ],
    "encode": [
        "checkpoint",
        "dataset",
        "input",
        "split",
        "data_dir",
        "limit",
        "output",
        "batch_size",
        "shards",
        "device",
    ],
    "decode": ["checkpoint", "output", "batch_size", "device"],
    "export": ["checkpoint", "output"],
    "compare": ["format", "sort", "output"],
}


def cases() -> list[Case]:
    """Every line above, and every flag that takes a value with an empty one and with control characters."""
    found = []
    for line in LINES.splitlines():
        if line and not line.startswith("#"):
            words, message = line.split(" | ")
            for name, (text, shown) in HOSTILE.items():
                message = message.replace(name, shown)
                words = words.replace(name, shlex.quote(text))
            found.append(Case(shlex.split(words), message))
    hostile = sorted(HOSTILE.keys() - {"EMPTY", "LONGNAME", "LONGPATH", "DIGITS"})
    for program, options in TAKE_A_VALUE.items():
        for i, option in enumerate(sorted(options)):
            flag = f"--{option.replace('_', '-')}"
            text, shown = HOSTILE[hostile[i % len(hostile)]]
            found.append(Case([program, flag, ""], f"{flag} '': {EMPTY}"))
            found.append(Case([program, flag, text], f"{flag} {shown}: {HIDDEN}"))
    return found
