"""The flags of ``fusedkd plan``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fusedkd.errors import as_user_error
from fusedkd.parser import Parser, number

ABOUT = """\
How much memory a distillation will take, before there is anything but two configs: what the models,
the optimizer, the activations and the loss hold at the moment when a step holds most; what the loss
would hold if somebody else computed it; the largest batch for a GPU; how large a cache of the
teacher's answers gets; and what to change first.

No weights are loaded, and nothing is computed. The models are made without memory and run, forward
and backward, as shapes; the losses are run in the same way, by the code that trains. Attention is
torch's scaled_dot_product_attention, or what the config asks for; no sequence is padded; AdamW,
every weight trained, one device. Times are not measured: they are the least that the products and
the bytes of each operation allow, by the GPU's data sheet."""

EXAMPLES = """\
examples:
  Will it fit, and in which batch? (folders with a config.json are enough)
    fusedkd plan --student ./student --teacher ./teacher --batch 4 --seq 8192 --gpu h100
  Of a chat data set, where 30 % of the tokens are the answers that count:
    fusedkd plan --student ./student --teacher ./teacher --gpu rtx4090 --counted 0.3
  On any other GPU; with a plot; for a program:
    fusedkd plan --student ./student --teacher ./teacher --memory 48GB --output plan.png
    fusedkd plan --student ./student --teacher ./teacher --json"""


def main(argv: Sequence[str]) -> int:
    """Run ``fusedkd plan``; returns the exit code."""
    parser = Parser("plan", ABOUT, EXAMPLES)
    add = parser.add_argument
    add("--student", required=True, help="folder with a config.json, or hub name")
    add("--teacher", required=True, help="folder with a config.json, or hub name")
    add("--batch", type=number(1, 4096), default=4, help="sequences per step on the device; 4")
    add("--seq", type=number(2, 2**20), default=2048, help="tokens of a sequence; 2048")
    add("--gpu", help="h100, h200, a100 (80 GB) or rtx4090")
    add("--memory", help="of any other GPU: 24GiB, 48GB, ...")
    share = number(0.0001, 1, float)
    add("--counted", type=share, default=1.0, help="share of the tokens with a label; 1")
    dtypes = ("bfloat16", "float32")
    add("--dtype", choices=dtypes, default="bfloat16", help="of weights and all else; bfloat16")
    add("--top-k", type=number(1, 4096), default=64, help="entries of a token in a cache; 64")
    add("--sample", type=number(1, 4096), default=50, help="draws of a token in a cache; 50")
    add("--tokens", type=number(1, 10**15), default=10**9, help="that are cached; a billion")
    add("--output", type=Path, metavar="FILE.png", help="a plot of the memory")
    add("--json", action="store_true", help="the same numbers, in bytes, and no table")
    args = parser.parse_args(argv)
    with as_user_error("fusedkd plan needs `pip install fusedkd[train]`", ImportError):
        from fusedkd.cli.make_plan import make_plan
    make_plan(args)
    return 0
