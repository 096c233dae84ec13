"""What all scripts share: flags, errors, devices, processes, files and run folders.

    flags       fields of a script's `Run` dataclass: default, help, bounds and choices in one place
    errors      an error that the user can cause is a ValueError or OSError with one line; `script`
                prints it and exits with code 2 (TRACEBACK=1 prints the traceback instead)
    processes   torchrun: every process computes, the first one prints and writes
    files       written under a temporary name and renamed, so that none is ever half written
    run folder  `RunFolder`: train_state.pt (all that resuming needs), metrics.jsonl (one object per
                step, and the result at the end), a lock while a process is at work
"""

import argparse
import contextlib
import ctypes
import dataclasses
import json
import math
import operator
import os
import pathlib
import platform
import shutil
import signal
import sys
import typing
import warnings

import filelock
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

GIB = 2 ** 30
BOUNDS = dict(at_least=operator.ge, above=operator.gt, at_most=operator.le)
CONTAINER = pathlib.Path("/sys/fs/cgroup")      # the limits of a container (cgroup v2)
RUN_FILES = "config.json model.safetensors tokenizer.json metrics.jsonl train_state.pt".split()


def flag(default, help, *, choices=None, nargs=None, session=False, **bounds):
    """A dataclass field that is also a command-line flag. bounds: of a number, see BOUNDS. session:
    the flag does not change what is computed, so a run may resume with another value."""
    return dataclasses.field(default=default, metadata=dict(
        help=help, choices=choices, nargs=nargs, session=session, bounds=bounds))


def flag_name(field):
    return "--" + field.replace("_", "-")


def check_flags(run):
    """Raises ValueError with one line for the first field that is out of its range."""
    for field in dataclasses.fields(run):
        value, name = getattr(run, field.name), flag_name(field.name)
        choices, bounds = field.metadata["choices"], field.metadata["bounds"]
        if choices and value not in choices:
            raise ValueError(f"{name} is {value!r}, must be one of {', '.join(map(str, choices))}")
        numbers = value if isinstance(value, (list, tuple)) else [value]
        for number in numbers if bounds and value is not None else ():
            holds = [BOUNDS[words](number, bound) for words, bound in bounds.items()]
            if not (math.isfinite(number) and all(holds)):
                wanted = " and ".join(f"{words} {bound}" for words, bound in bounds.items())
                raise ValueError(f"{name} is {number}, must be {wanted.replace('_', ' ')}")


def parse_flags(cls, argv=None):
    """An instance of the dataclass cls, whose fields are made with `flag`, from a command line."""
    parser = argparse.ArgumentParser(description=cls.__doc__, allow_abbrev=False,
                                     usage="%(prog)s [--flag VALUE ...]")
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    for field in dataclasses.fields(cls):
        text, options = field.metadata["help"].replace("%", "%%"), {}
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction if field.default else "store_true"
        else:
            kind = (*typing.get_args(field.type), field.type)[0]        # float of float | None
            options.update(type=kind, nargs=field.metadata["nargs"],
                           metavar={int: "N", float: "X", str: "TEXT"}[kind])
        if field.default not in (None, "", ()) and field.default is not False:
            text += " (default: %(default)s)"
        parser.add_argument(flag_name(field.name), default=field.default, help=text, **options)
    return cls(**vars(parser.parse_args(argv)))


def script(run_class):
    """Decorate main(run) -> result: it becomes main(argv=None), which makes the run from flags and
    prints the result as the last line, in JSON. An error that the user can cause prints one line
    and exits with code 2; Ctrl-C exits with 130."""
    def decorate(main):
        def from_command_line(argv=None):
            for stream in (sys.stdout, sys.stderr):     # a console may lack a character
                if hasattr(stream, "reconfigure"):
                    stream.reconfigure(errors="replace")
            try:
                result = main(parse_flags(run_class, argv))
            except (ValueError, OSError, torch.OutOfMemoryError) as error:
                if os.environ.get("TRACEBACK"):
                    raise
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
                sys.exit(2)
            except KeyboardInterrupt:
                print("interrupted", file=sys.stderr)
                sys.exit(130)
            if result is not None:
                print(json.dumps(result), flush=True)
        return from_command_line
    return decorate


class StopRequest:
    """A context in which Ctrl-C, or the SIGTERM of a scheduler, sets .asked, so that a loop can end
    after a whole step. A second signal interrupts at once."""

    def __enter__(self):
        self.asked = False
        self.before = {n: signal.signal(n, self.ask) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, *_):
        print("stopping after this step (Ctrl-C again to stop at once)", file=sys.stderr)
        self.asked = True
        self.__exit__()

    def __exit__(self, *_):
        for number, before in self.before.items():
            signal.signal(number, before)

    def asked_anywhere(self):
        """Whether any process was asked to stop: all must leave the loop after the same step."""
        votes = [self.asked] * rank_and_size()[1]
        if len(votes) > 1:
            dist.all_gather_object(votes, self.asked)
        return any(votes)


def pick_device(name):
    """The name of the device; auto: the first of cuda, mps, cpu that is there. Raises ValueError if
    the named one is not."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else \
            "mps" if torch.backends.mps.is_available() else "cpu"
    if name.split(":")[0] not in ("cuda", "mps", "cpu"):
        raise ValueError(f"--device {name}: must be auto, cuda, mps or cpu")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)
    return name


def cpu_flags():
    """Vendor and instruction sets of this CPU, from /proc/cpuinfo; empty except on Linux."""
    path = pathlib.Path("/proc/cpuinfo")
    return set(path.read_text().split()) if path.exists() else set()


def pick_dtype(name, device):
    """float32 or bfloat16 as named; auto: bfloat16 if the device has arithmetic for it."""
    if name == "auto":
        fast = device != "cpu" or cpu_flags() & {"avx512_bf16", "amx_bf16"}
        name = "bfloat16" if fast else "float32"
    return getattr(torch, name)


def tune_cpu():
    """Change two CPU settings of this process and return them in words. Together they took a
    default fp32 training step from 480 to 312 ms (AMD EPYC Zen 5, 2 cores, medians of 15, idle).

    Memory: glibc returns blocks over 32 MB to the kernel at every free, and the next allocation
    pays a page fault per 4 KB; this setting keeps the blocks. Matmul: torch uses MKL for fp32,
    which does not use the full vector width of AMD's AVX-512 cores. oneDNN does, and torch uses it
    when bf16 is *allowed*; on CPUs without AMX, oneDNN still computes in fp32."""
    done, flags = [], cpu_flags()
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)                 # M_MMAP_MAX: no separate mapping per block
        libc.mallopt(-1, 2 ** 31 - 1)       # M_TRIM_THRESHOLD: keep freed memory
        done.append("freed memory is kept")
    if {"AuthenticAMD", "avx512f"} <= flags and "amx_bf16" not in flags:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        done.append("fp32 matmuls by oneDNN")
    return "; ".join(done) or "nothing to set"


def free_bytes(device="cpu"):
    """Bytes that this process could allocate now: on the GPU, or in the machine or container."""
    if str(device).startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvail"))
        limit = (CONTAINER / "memory.max").read_text()
        used = dict(line.split() for line in (CONTAINER / "memory.stat").read_text().splitlines())
        return free if limit == "max\n" else max(min(free, int(limit) - int(used["anon"])), 0)
    except FileNotFoundError as missing:        # no container; off Linux no limit is known
        return free if str(CONTAINER) in str(missing) else 2 ** 62


def start_processes(device):
    """Join the processes of torchrun, if any; only the first one prints. Returns (rank, size)."""
    if "RANK" in os.environ and not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")
    return rank_and_size()


def rank_and_size():
    """This process's number and the number of processes; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def local_rows(m):
    """This process's share of the rows of a batch (b, ...); None stays None."""
    rank, size = rank_and_size()
    return m if m is None or size == 1 else m.chunk(size)[rank]


def sum_over_processes(m):
    """The sum of a tensor over all processes, in place."""
    if rank_and_size()[1] > 1:
        dist.all_reduce(m)
    return m


# ------------------------------------------------------------------------------------------------
# Files and the run folder


def read_json(path):
    """The object in a JSON file. Raises FileNotFoundError or ValueError with one line."""
    try:
        value = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return value


def replace_file(path, write):
    """Call write(temporary path), then rename that file to path."""
    temporary = pathlib.Path(f"{path}.tmp")
    try:
        write(temporary)
        os.umask(umask := os.umask(0o077))          # it can only be read by setting it
        temporary.chmod(0o666 & ~umask)             # safetensors lets only the owner read
        temporary.replace(path)
    except Exception as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error}") from error


def write_text(path, text):
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_rows(path):
    """The objects of a file of JSON lines, up to the first incomplete line."""
    rows = []
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines():
            rows.append(json.loads(line))
    return rows


def settings_of(run):
    """{flag: value} of all flags that change what is computed; sequences as lists."""
    values = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)
              if not field.metadata["session"]}
    return json.loads(json.dumps(values))


class Unsaved:
    """Replaces a RunFolder when nothing is to be saved."""

    def __init__(self):
        self.state, self.rows = None, []
        self.log = self.rows.append
        self.begin = lambda model, optimizer: 0
        self.save = lambda step, model, optimizer: None


class RunFolder(contextlib.AbstractContextManager):
    """The folder of one run, locked by one group of processes until the `with` block ends.

    Opening writes nothing. .state is the checkpoint to resume from, or None; .rows is the log up to
    it; .result is what a finished run reported, or None. Raises FileExistsError if the folder holds
    another run, ValueError for a broken checkpoint."""

    def __init__(self, path, settings, overwrite=False):
        self.path, self.settings, self.overwrite = pathlib.Path(path), settings, overwrite
        self.lock, self.first = filelock.FileLock(self.path / ".lock"), rank_and_size()[0] == 0
        self.state_file, self.log_file = self.path / "train_state.pt", self.path / "metrics.jsonl"
        self.notes = {}                 # further entries of every checkpoint
        self.hold()
        try:
            self.state = None if overwrite else self.read_state()
        except Exception:
            self.lock.release()
            raise
        rows = read_rows(self.log_file) if self.state else []
        self.result = rows[-1].get("final") if rows else None
        self.rows = [r for r in rows if "loss" in r and r["step"] <= self.state["step"]]

    def __exit__(self, *_):
        self.lock.release(force=True)

    def hold(self):
        """Lock the folder, if it exists, against other processes of this machine."""
        try:
            if self.first and self.path.is_dir():
                self.lock.acquire(blocking=False)
        except filelock.Timeout:
            raise FileExistsError(f"another process is at work in {self.path}: wait until it ends, "
                                  "or choose another --out") from None

    def read_state(self):
        """The checkpoint of a run with these settings; None if the folder has no files of a run."""
        found = [name for name in RUN_FILES if (self.path / name).exists()]
        if not found:
            return None
        if not self.state_file.exists():
            raise FileExistsError(f"{self.path} holds a {found[0]} that this run did not make: "
                                  "choose another --out, or --overwrite")
        try:
            state = torch.load(self.state_file, map_location="cpu", weights_only=True)
            theirs = state["settings"]
        except Exception as error:      # torch raises many kinds of error for a broken file
            raise ValueError(f"{self.state_file} cannot be read ({type(error).__name__}): move it "
                             "away, or --overwrite") from None
        for name in {**theirs, **self.settings}:
            before, now = theirs.get(name), self.settings.get(name)
            if before != now:
                raise FileExistsError(f"{self.path} holds another run ({name} {before!r}, now "
                                      f"{now!r}): choose another --out, or --overwrite")
        return state

    def begin(self, model, optimizer):
        """Make the folder, or delete the files of an overwritten run, its checkpoint last. Truncate
        the log at the checkpoint. Load the checkpoint, or save the first. Returns its step."""
        if rank_and_size()[1] > 1:
            dist.barrier()                          # all have read before one of them writes
        if self.first:
            self.path.mkdir(parents=True, exist_ok=True)
            self.hold()
            if self.state is None:
                if not self.overwrite:
                    self.read_state()               # refuses files that came since it was opened
                for parts in self.path.glob("train_state-[0-9]*"):
                    shutil.rmtree(parts)
                for name in RUN_FILES:
                    (self.path / name).unlink(missing_ok=True)
            write_text(self.log_file, "".join(json.dumps(row) + "\n" for row in self.rows))
        if self.state is None:
            self.save(0, model, optimizer)
        else:
            self.load(model, optimizer)
        return self.state["step"]

    def log(self, row):
        """Append one object to metrics.jsonl."""
        self.rows.append(row)
        if self.first:
            with open(self.log_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def save(self, step, model, optimizer):
        """Write train_state.pt, whole or not at all. At step 0 it has no tensors: the seed makes
        them again. Several processes first write their parts into a folder, which the file then
        names, so that a kill in between leaves the previous checkpoint."""
        before, tensors = self.state, training_tensors(model, optimizer) if step else {}
        self.state = dict(self.notes, settings=self.settings, step=step, rng=torch.get_rng_state())
        if rank_and_size()[1] > 1 and step:
            self.state["parts"] = f"train_state-{step}"
            dcp.save(tensors, checkpoint_id=self.path / self.state["parts"])
            tensors = {}
        if self.first:
            replace_file(self.state_file, lambda path: torch.save(self.state | tensors, path))
            if before and "parts" in before and before["step"] != step:
                shutil.rmtree(self.path / before["parts"])

    def load(self, model, optimizer):
        """Load the checkpoint into model, optimizer and torch's generator. Any number of processes
        may have written it. Raises ValueError if it is incomplete."""
        torch.set_rng_state(self.state["rng"])
        if not self.state["step"]:
            return
        parts = self.state.get("parts")
        if parts:
            tensors = training_tensors(model, optimizer)
            try:
                with warnings.catch_warnings(action="ignore"):      # that one process reads alone
                    dcp.load(tensors, checkpoint_id=self.path / parts)
            except (Exception, dcp.api.CheckpointException) as error:
                raise ValueError(f"{self.path / parts} cannot be read ({type(error).__name__}): "
                                 "restore it, or --overwrite") from None
        else:
            tensors = {name: self.state.pop(name) for name in ("model", "optimizer")}
        set_state_dict(model, optimizer, model_state_dict=tensors["model"],
                       optim_state_dict=tensors["optimizer"],
                       options=StateDictOptions(full_state_dict=not parts))


def training_tensors(model, optimizer):
    """Parameters and optimizer moments by parameter name, sharded as the model is."""
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
