"""What a job finds around it: the same, whatever the jobs before it left behind, as in a process of its own."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from fedllm.errors import WorkerError


class Surroundings:
    """Made when the worker starts, whose state every job then finds."""

    def __init__(self) -> None:
        self._folder = os.getcwd()
        self._environment = dict(os.environ)
        self._seed = torch.initial_seed()
        self._dtype = torch.get_default_dtype()
        self._module_folders: tuple[str, ...] = ()
        self._modules_before = set(sys.modules)
        # What was imported stays for good: the collector need not look through it after every job.
        gc.collect()
        gc.freeze()

    @contextmanager
    def around(self, folder: str, module_folders: Sequence[str]) -> Iterator[None]:
        """Let a job run as if in the process that sent it.

        Args:
            folder: its working directory.
            module_folders: where it finds modules before all others; those of another app are forgotten first.

        Raises:
            WorkerError: the working directory is not there.
        """
        path = list(sys.path)
        found_first = tuple(entry for entry in module_folders if entry not in path)
        self._forget_modules(found_first)
        torch.manual_seed(self._seed)
        try:
            os.chdir(folder)
        except OSError as error:
            raise WorkerError(
                f"the worker cannot enter {folder}, where the node's Flower process runs: {error.strerror}; start "
                "both in a folder that stays"
            ) from error
        sys.path[:0] = found_first
        try:
            yield
        finally:
            torch.set_default_dtype(self._dtype)
            torch.set_grad_enabled(True)
            sys.path[:] = path
            os.chdir(self._folder)
            _restore(self._environment)

    def _forget_modules(self, folders: tuple[str, ...]) -> None:
        """Drop the modules of another app, or of another version of it, which may have the same names."""
        if folders == self._module_folders:
            return
        for name in set(sys.modules) - self._modules_before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and name.partition(".")[0] != "fedllm" and _inside(file, self._module_folders):
                del sys.modules[name]
        self._module_folders = folders


def _inside(file: str, folders: Sequence[str]) -> bool:
    return any(Path(file).is_relative_to(folder) for folder in folders)


def _restore(environment: dict[str, str]) -> None:
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
