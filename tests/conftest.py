"""What every test runs under: eight virtual CPU devices, shapes checked at run time, caches in a temporary folder."""

import json
import os
import pathlib
import random

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # training/runtime.py says why
_DEVICES = "--xla_force_host_platform_device_count=8"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("flax_encoder", "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402


def pytest_configure(config):
    # Flax annotates with typing.Hashable, which is deprecated in favour of collections.abc's.
    config.addinivalue_line("filterwarnings", "ignore::beartype.roar.BeartypeDecorHintPep585DeprecationWarning")


def pytest_collection_modifyitems(config, items):
    for name in ("faults", "every_mesh"):
        if name not in (config.option.markexpr or ""):
            skip = pytest.mark.skip(reason=f"takes minutes: pytest -m {name}")
            for item in items:
                if name in item.keywords:
                    item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """One cache for the session, shared by its workers and by the programs that tests start; never the user's own."""
    base = tmp_path_factory.getbasetemp()
    folder: pathlib.Path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "flax_encoder_cache"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLAX_ENCODER_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def strict_dtypes_in_ops(request):
    """Ops say each change of dtype themselves: under `strict` an implicit promotion is an error."""
    promotion = "strict" if request.path.parent.name == "ops" else "standard"
    with jax.numpy_dtype_promotion(promotion):
        yield


@pytest.fixture(autouse=True)
def quick_compilation(request):
    """Compile without LLVM's optimisations, which takes a third of the time.

    The laws hold of the program, however well it is vectorised, and so do those of interpreted kernels. The ops, what
    `plan` reads of a program and what is compared with golden runs are compiled as they are for users, and so is what
    tests run as programs.
    """
    as_for_users = {"ops", "plan", "benchmarks", "test_golden_runs.py"}
    place, file = request.path.parent.name, request.path.name
    is_quick = file == "test_attention_kernels.py" or as_for_users.isdisjoint((place, file))
    jax.config.update("jax_disable_most_optimizations", is_quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> pathlib.Path:
    """Six hundred made-up sentences with a label each."""
    from tests.runs import WORDS  # not before the import hook above

    rng = random.Random(7)
    path = tmp_path_factory.mktemp("corpus")
    rows = []
    for i in range(600):
        words = [rng.choice(WORDS) for _ in range(rng.randint(4, 19))]
        label = rng.choice(["first", "second", "third"])
        rows.append({"text": " ".join([*words, label, str(i)]), "label": label})
    (path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (path / "lines.txt").write_text("".join(r["text"] + "\n" for r in rows))
    return path


@pytest.fixture
def one_device(monkeypatch):
    """`train` on the first of the suite's virtual devices."""
    devices = jax.devices()
    monkeypatch.setattr(jax, "devices", lambda *args: devices[:1])
