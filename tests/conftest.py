"""Every test starts from one seed, on one thread, and memory that nobody has written is NaN."""

import os
import pathlib
import sys

# tensors are tiny, and two processes must not fight over the cores
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# nbformat would take 2 s to import it, for a check of addresses that no notebook needs
sys.modules["rfc3987_syntax"] = None

import pytest
import torch
from matplotlib.figure import Figure

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Without a GPU the kernels of ssm.py run in Triton's interpreter. It is asked for while ssm is
# imported, and by the tests of the kernels, and no longer: what other tests start as processes of
# their own is to run as for a user.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
import align  # noqa: E402
import bench.gpu  # noqa: E402
import bench.infer  # noqa: E402
import bench.model  # noqa: E402
import bench.ssm  # noqa: E402
import bench.train_fp8  # noqa: E402
import infer  # noqa: E402
import prune_distill  # noqa: E402
import train_fp8  # noqa: E402
os.environ.pop("TRITON_INTERPRET", None)

torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_collection_modifyitems(items):
    """What takes long to set up comes first: a test that another process takes from the end of the
    list would set it up again.
    """
    items.sort(key=lambda item: item.path.stem not in ("test_triton", "test_train_fp8"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def short_reports():
    """At the end of a run 8 tokens are sampled instead of 120, 20 problems answered, not 200, and
    plots drawn without arranging their parts. Benchmarks measure once, after one warm-up.
    """
    median = bench.ssm.median_seconds
    measure_once = lambda f, device="cpu", repeats=1: median(f, device, repeats=1)
    sample = lambda model, encoding, prompt, _, **more: infer.generate(
        model, encoding, prompt, 8, **more)
    draw = Figure.savefig

    def draw_at_once(figure, path, dpi):
        figure.set_layout_engine(None)
        draw(figure, path, dpi=dpi)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", draw_at_once)
        patch.setattr(train_fp8, "generate", sample)
        patch.setattr(align, "TESTS", 20)
        for file in (bench.ssm, bench.gpu, bench.infer, bench.model, bench.train_fp8):
            patch.setattr(file, "median_seconds", measure_once)
        yield


@pytest.fixture(scope="session", autouse=True)
def traced_once():
    """Plans of the same shapes share their traces."""
    trace, known = infer.workspace_bytes, {}

    def remember(config, tokens, context, batch=1, dtype=torch.bfloat16):
        key = repr(config), tokens, context, batch, dtype
        if key not in known:
            known[key] = trace(config, tokens, context, batch, dtype)
        return known[key]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infer, "workspace_bytes", remember)
        patch.setattr(prune_distill, "workspace_bytes", remember)
        yield


@pytest.fixture
def fails(capsys):
    """fails(main, argv) -> the one line of an error that exits with 2; asserts that it is one
    line.
    """
    def run(main, argv):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
        captured = capsys.readouterr()
        assert len(captured.err.strip().splitlines()) == 1 and "Traceback" not in captured.err
        return captured.err.strip()
    return run


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A folder of 40 documents that count: a model learns them within some dozen steps."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        (folder / f"{i}.txt").write_text(" ".join(f"item {j}" for j in range(i, i + 60)),
                                         encoding="utf-8")
    return folder


def assert_close(values, truths, names, tolerance):
    """Relative RMS error of each value by name; the message lists every one above the tolerance."""
    from ssm import relative_error
    errors = {name: relative_error(v, t) for name, v, t in zip(names, values, truths, strict=True)}
    bad = [f"{name}  rel {e:.1e} > {tolerance:.0e}" for name,
           e in errors.items() if not e <= tolerance]
    assert not bad, "; ".join(bad)
