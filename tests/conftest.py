"""What holds for every test: offline, seeded, one thread, and nothing left behind."""

import gc
import logging
import os
import random
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Of tiny tensors, threads only wait for each other: here and in new processes.
os.environ["OMP_NUM_THREADS"] = "1"
# New processes find the checkout from any folder.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)

import numpy as np  # noqa: E402 - the environment is read while these are imported
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import zoo  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from traces import Deprecations, traces_of  # noqa: E402
from transformers import PreTrainedConfig, PreTrainedModel  # noqa: E402

import hf_gradnas  # noqa: E402 - per-layer loading is installed in every test
from hf_gradnas.cli import ticking  # noqa: E402
from hf_gradnas.stock.trials import Shapes, tensor_shapes  # noqa: E402

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of tests/fuzz."""
    parser.addoption("--fuzz-seed", type=int, default=0, help="Seed of the fuzzed inputs.")
    parser.addoption("--fuzz-times", type=int, default=1, help="How often as many of them.")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest file first: as the last one, it would let all but one worker wait."""
    items.sort(key=lambda item: "tests/zoo/test_types.py" not in item.nodeid)


def pytest_collection_finish() -> None:
    """Keep what all the imports made out of garbage collection: half a million lasting objects.

    Whole collections, of which `Trainer.train` asks for one each time, then take milliseconds.
    """
    _keep_what_is_there()


def _keep_what_is_there() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture
def fuzz_seed(request: pytest.FixtureRequest) -> int:
    """Seed of the fuzzed inputs."""
    return int(request.config.getoption("--fuzz-seed"))


@pytest.fixture
def fuzz_times(request: pytest.FixtureRequest) -> int:
    """How often as many inputs of the long run."""
    return int(request.config.getoption("--fuzz-times"))


@pytest.fixture
def prune(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command; returns its exit code, standard output and standard error."""
    from hf_gradnas.cli.app import main

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main(["prune", *map(str, arguments)])
        shown = capsys.readouterr()
        assert "\x1b" not in shown.out + shown.err
        # Progress bars of older Transformers leave line ends behind.
        return code, shown.out, shown.err if shown.err.strip() else ""

    return run


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state.

    That of the CPU: `torch.manual_seed` keeps the stack for every kind of device that is not there.
    """
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave reports out where a test does not ask for one: their pictures take a second or two."""
    defaults = hf_gradnas.GradNASPruner.save_pretrained.__kwdefaults__
    monkeypatch.setitem(defaults, "report", False)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Print tables as on a terminal in which no cell is folded, wherever the tests run."""
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(autouse=True)
def no_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say nothing of steps that take long, as any may on a busy machine."""
    monkeypatch.setattr(ticking, "FIRST_SECONDS", 600.0)


@pytest.fixture(autouse=True)
def no_deprecations() -> Iterator[None]:
    """Fail a test during which Transformers logged a deprecation."""
    handler = Deprecations()
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    if handler.messages:
        pytest.fail(f"Transformers logged a deprecation: {handler.messages}")


_SHAPES: dict[tuple[type[PreTrainedModel], str], Shapes] = {}


@pytest.fixture(autouse=True)
def shapes_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build what a search for stock widths tries once per class and config, not in every test.

    The shapes follow from the two alone; tests/stock/test_space.py builds all of them anew.
    """

    def shapes(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Shapes:
        key = model_class, config.to_json_string()
        if key not in _SHAPES:
            _SHAPES[key] = tensor_shapes(model_class, config)
        return dict(_SHAPES[key])

    monkeypatch.setattr("hf_gradnas.stock.space.tensor_shapes", shapes)


_EARLIER: list[tuple[weakref.ref[PreTrainedModel], frozenset[str]]] = []
"""Models that earlier tests of the file built, as long as something holds them."""


@pytest.fixture(scope="module", autouse=True)
def _forget_models() -> Iterator[None]:
    """Drop what a test file leaves when it is done: its models, and Accelerate's state.

    What it imported is kept out of collections from then on.
    """
    yield
    zoo.BUILT.clear()
    _EARLIER.clear()
    AcceleratorState._reset_state(reset_partial_state=True)  # of a trainer, for all that come later
    GradientState._reset_state()
    _keep_what_is_there()


@pytest.fixture(autouse=True)
def nothing_left_behind(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[None]:
    """Fail a test that leaves a file in its working folder, or a trace on a model or on a class.

    Seen are all models from `zoo.build`: hooks, training flags, gradients, frozen parameters. The
    marker ``leaves_state`` excuses a test that changes its models on purpose.
    """
    folder = tmp_path_factory.mktemp("working-folder")
    monkeypatch.chdir(folder)
    patched = dict(vars(PreTrainedModel))
    yield
    traces = [f"file {path.name}" for path in folder.iterdir()]
    traces += [
        f"PreTrainedModel.{name}"
        for name in patched.keys() | vars(PreTrainedModel).keys()
        if patched.get(name) is not vars(PreTrainedModel).get(name)
    ]
    earlier = [(model(), frozen) for model, frozen in _EARLIER]
    built = [zoo.Built(model, frozen) for model, frozen in earlier if model is not None]
    found = [(one, traces_of(one)) for one in [*built, *zoo.BUILT]]
    zoo.BUILT.clear()
    _EARLIER[:] = [(weakref.ref(one.model), one.frozen) for one, seen in found if not seen]
    if request.node.get_closest_marker("leaves_state") is None:
        traces += [trace for _, seen in found for trace in seen]
    if traces:
        pytest.fail(f"left behind: {', '.join(traces[:10])} ({len(traces)} in all)")
