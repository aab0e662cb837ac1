"""A stage as a command: its flags, its entry, and how its errors end."""

import argparse
import math
import os
import re
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from plumbing import cores, files, rows, speed, training
from plumbing.files import Stop, stop

# --------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A stage's parser. --help shows the first line of the stage's docstring, three groups of flags
    and their defaults; every stage has --run-dir; a bad flag ends as a user error."""

    def __init__(self, doc):
        super().__init__(
            description=doc.split("\n")[0], formatter_class=HelpFormatter, allow_abbrev=False
        )
        self.io = self.add_argument_group("io")
        self.paper = self.add_argument_group("paper")
        self.engineering = self.add_argument_group("engineering")
        self.io.add_argument("--run-dir", default="runs/toy", help="run folder")

    def parse_args(self, argv=None):
        args = super().parse_args(argv)
        for name, value in vars(args).items():
            if value == "" or (isinstance(value, list) and "" in value):
                flag = f"--{name.replace('_', '-')}"
                stop(f"{flag}: is empty; give a value, or leave it out (an unset shell variable?)")
        return args

    def error(self, message):
        stop(f"{message} (--help lists the flags)")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a flag's default in --help where it has one."""

    def _get_help_string(self, action):
        none = action.default in (None, []) or action.default is False
        return action.help if none else super()._get_help_string(action)


def workers_flag(parser):
    share = cores.cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    share = min(cores.MOST_WORKERS, share)
    if sys.platform != "linux":
        share = 0  # a fork is not safe
    parser.engineering.add_argument(
        "--workers",
        type=whole(0),
        default=share,
        help="further processes, to decode video or compute PESQ; by default one for each core of "
        f"this rank, at most {cores.MOST_WORKERS}; 0: the stage's own process does it",
    )


def compile_flag(parser):
    parser.engineering.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=speed.can_compile(),
        help="compile the networks' blocks, which takes some minutes at first; on by default where "
        "there is CUDA and a C compiler; no effect on the toy model or where LoRA is trained",
    )


def part_flag(parser):
    parser.engineering.add_argument(
        "--part",
        type=part,
        metavar="I/N",
        help="make only the I-th of N parts, without waiting for other parts; when all are made, "
        "the same command without --part finishes the stage (docs/cluster.md)",
    )


def part(text):
    """The type of --part: the text I/N as (I, N)."""
    numbers = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
    if numbers is None or not 1 <= int(numbers[1]) <= int(numbers[2]):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} must be I/N, I from 1 to N, as in 1/4")
    return int(numbers[1]), int(numbers[2])


def training_flags(parser, out):
    """The flags that stages 05 and 06 share: those of a training that do not depend on its loss."""
    parser.io.add_argument("--out", default=out, help="name of the output folder inside the run")
    parser.io.add_argument("--weights", default="weights", help="folder of the downloaded weights")
    engineering = parser.engineering
    engineering.add_argument(
        "--seed", type=whole(0), default=0, help="seed of everything that is drawn at random"
    )
    engineering.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="auto: bf16 on CUDA, fp32 elsewhere",
    )
    engineering.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="recompute blocks in the backward pass: slower, but needs less memory",
    )
    engineering.add_argument(
        "--lora",
        type=whole(0, 4096),
        default=0,
        help="train LoRA matrices of this rank instead of the weights; 0: train the weights",
    )
    parser.paper.add_argument(
        "--ema",
        type=number(0, 0.28),
        default=0.0,
        metavar="WIDTH",
        help="let policy.pt hold an average of the weights over the training; WIDTH, up to .28, is "
        "its spread as a share of all steps; 0: the last weights; paper silent",
    )
    compile_flag(parser)


def number(least, most=1e9, kind=float, named="a number"):
    """A flag's type: a number from least to most."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:  # also refuses nan
            raise argparse.ArgumentTypeError(
                f"{text[:40]!r} must be {named} from {least} to {most}"
            )
        return value

    return convert


def whole(least, most=2**31 - 1):
    return number(least, most, int, "a whole number")


def parse(parser, argv, stage):
    """parser.parse_args. The `defaults` in the run's run.json, or in the one beside --checkpoint,
    replace the paper's numbers, and what is replaced is printed. An explicit flag wins over
    both."""
    before = parser.parse_args(argv)
    if not files.is_text(before.run_dir):
        stop(
            f"--run-dir {before.run_dir}: its name is not UTF-8, so that not every library can "
            "open it; use another"
        )
    file, own = own_defaults(before, stage)
    try:
        parser.set_defaults(**own)
        args = parser.parse_args(argv)
    except Stop as reason:
        stop(f"{file}, field 'defaults', stage {stage}: {reason}")
    changed = []
    for name, value in vars(args).items():
        if value != getattr(before, name):
            changed.append(f"{name} {getattr(before, name)} -> {value}")
    if changed and int(os.environ.get("RANK", 0)) == 0:
        print(f"this run's defaults: {', '.join(changed)}")
    return args


def own_defaults(args, stage):
    """The file that replaces the paper's numbers, and its numbers for this stage, {flag: text}, in
    the form that argparse takes."""
    folders = [Path(args.run_dir)]
    if getattr(args, "checkpoint", None):
        folders.append(Path(args.checkpoint).parent)
    for folder in folders:
        file = folder / "run.json"
        if not file.is_file():
            continue
        defaults = rows.read_json(file, rows.Defaults).defaults.get(stage, {})
        if not defaults:
            continue
        own = {}
        for name, value in defaults.items():
            if name not in args:
                stop(f"{file}, field 'defaults': {name} is no flag of stage {stage}")
            own[name] = str(int(value)) if value == int(value) else str(value)
        return file, own
    return None, {}


# --------------------------------------------------------------------------------------------------
# A stage's entry
# --------------------------------------------------------------------------------------------------


def less_memory(args):
    """Which flags the command can still change to need less memory of a GPU."""
    given = vars(args)
    can = []
    for name in ("micro_batch", "batch_clips"):
        if name in given and given[name] != 1:
            can.append(f"lower --{name.replace('_', '-')}")
    if given.get("gradient_checkpointing") is False:
        can.append("give --gradient-checkpointing")
    if given.get("lora") == 0:
        can.append("give --lora 16")
    return " or ".join(can) or "no flag of this command lowers that; use a larger GPU"


def one_line(error, args):
    """An error of the user or of the system as one line for people; None for an error of this
    code, which is to end in a traceback."""
    said = " ".join(str(error).split())
    if isinstance(error, Stop):
        return str(error)
    if isinstance(error, UnicodeEncodeError):
        name = ascii(error.object[:200])
        return f"{name}: a name that is not UTF-8, which some libraries cannot open; rename it"
    if isinstance(error, OSError):
        what = f"{error.filename or 'system'}: {error.strerror or error}"
        return f"{what}; mend that, then run the command again"
    if isinstance(error, MemoryError) or files.NO_MEMORY in said:
        return (
            "the machine's memory is full; lower --workers or make room, then run the command again"
        )
    if isinstance(error, torch.OutOfMemoryError) or "STATUS_ALLOC_FAILED" in said:
        return f"{said[:80]} ...: more than the GPU has; {less_memory(args)}"
    if getattr(args, "lora", 0) and "does not require grad" in said:  # no trained weight is used
        return f"--lora: {training.nothing_is_trained()}"
    if re.match(r"a worker process ended unexpectedly|A process in the process pool was", said):
        advice = "lower --workers, then run the command again"
        return f"{said[:80]} ...: perhaps the machine's memory is full; {advice}"
    return None


def was_interrupted(error):
    """Whether an error is Ctrl-C itself, or came up while Ctrl-C was ending threads and workers."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def start_in_utf8():
    """Starts this program again with file names in UTF-8, as in the run's own files. Where the
    environment asks for it (a latin-1 locale, or LC_ALL=C with PYTHONUTF8=0), Python reads file
    names in the terminal's encoding, and cannot change that once it runs."""
    if os.environ.get("PYTHONUTF8") != "1":
        environment = dict(os.environ, PYTHONUTF8="1")
        environment["PYTHONIOENCODING"] = sys.stdout.encoding  # the terminal's stays
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def launch(main, parse_args):
    """A stage's entry. An error of the user or of the system ends in one line and exit code 2,
    Ctrl-C in one line and exit code 130; files that are written are kept."""
    if main.__module__ == "__main__" and sys.getfilesystemencoding() != "utf-8":
        start_in_utf8()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # so that no character ends a stage
    if torch.get_num_threads() > cores.cores():
        torch.set_num_threads(cores.cores())  # torch does not see a container's limit
    args = None
    try:
        args = parse_args()
        main(args)
    except BaseException as error:
        if was_interrupted(error):
            print("\ninterrupted; run the same command again to go on", file=sys.stderr)
            raise SystemExit(130) from None
        line = one_line(error, args)
        if line is None:
            raise
        if int(os.environ.get("RANK", 0)) > 0:
            # Where rank 0 has met the same error, it prints it within this time, and torchrun ends
            # this process before it prints it again.
            time.sleep(5)
        tqdm.write(f"error: {line}", file=sys.stderr)  # on a line of its own, also beside a bar
        raise SystemExit(2) from None
    if dist.is_initialized():
        dist.destroy_process_group()
