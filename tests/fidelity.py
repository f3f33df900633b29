"""torch-fidelity for the parity tests, imported without torchvision, which only its data sets and other networks use and
whose compiled part fits one build of PyTorch alone.
"""

import importlib
import sys
from unittest import mock

import pytest

NEEDED = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")


def fidelity(module: str):
    """A module of torch-fidelity; skips the test where it is not installed."""
    pytest.importorskip("torch", reason="the parity extra is not installed")
    stubs = {name: mock.MagicMock() for name in NEEDED if name not in sys.modules}
    sys.modules.update(stubs)
    try:
        return importlib.import_module(f"torch_fidelity.{module}")
    except ModuleNotFoundError:
        pytest.skip("torch-fidelity is not installed: pip install --no-deps torch-fidelity==0.4.0")
    finally:
        for name in stubs:
            del sys.modules[name]
