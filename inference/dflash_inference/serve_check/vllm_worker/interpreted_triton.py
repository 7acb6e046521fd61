"""Lets vLLM's second model runner work on a CPU: Triton's interpreter as a backend named `cpu`.

vLLM 0.32 serves DFlash 2, DSpark and drafters that mix full with sliding layers only in its V2
model runner, whose kernels are Triton's. On a CPU it asks Triton for a backend named `cpu`, which
PyPI's Triton does not have. It has an interpreter, though, that runs the same kernels without
compiling them. So a backend of that name is entered into Triton's table; it only says that the
kernels may be called. Slow (a step of a small model takes most of a second), and vLLM's own
arithmetic. May go when PyPI's Triton brings a CPU backend.
"""

import os
from typing import Any, NoReturn

_REFUSAL = "Kernels are interpreted here, never compiled."


def register() -> None:
    """Switch the interpreter on and enter the backend; before vLLM is imported."""
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    from triton.backends import Backend, backends
    from triton.backends.compiler import BaseBackend, GPUTarget
    from triton.backends.driver import DriverBase

    class InterpretedDriver(DriverBase):
        """The CPU, always there."""

        @classmethod
        def is_active(cls) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride] wrongly declared as None
            return True

        def get_current_target(self) -> Any:
            return GPUTarget("cpu", 0, 1)

        def get_active_torch_device(self) -> Any:
            import torch

            return torch.device("cpu")

        def map_python_to_cpp_type(self, ty: str) -> NoReturn:
            raise RuntimeError(_REFUSAL)

        def get_benchmarker(self) -> NoReturn:
            raise RuntimeError(_REFUSAL)

    class NoCompiler(BaseBackend):
        """Refuses whatever would compile."""

        @staticmethod
        def supports_target(target: Any) -> bool:
            return target.backend == "cpu"

        def hash(self) -> str:
            return "interpreted"

        def parse_options(self, options: Any) -> NoReturn:
            raise RuntimeError(_REFUSAL)

        def add_stages(self, stages: Any, options: Any) -> NoReturn:
            raise RuntimeError(_REFUSAL)

        def load_dialects(self, context: Any) -> NoReturn:
            raise RuntimeError(_REFUSAL)

        def get_module_map(self) -> NoReturn:
            raise RuntimeError(_REFUSAL)

    backends["cpu"] = Backend(compiler=NoCompiler, driver=InterpretedDriver)
