"""Python imports this at its start where this folder is in PYTHONPATH, and so takes `--score-noise`
to processes that tests start, the ranks of torchrun included: to their module `common`, as soon as
it has been imported."""

import importlib.abc
import importlib.util
import sys

import score_noise


class NoiseOnImport(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "common":
            return None
        sys.meta_path.remove(self)  # what follows asks those who really find it
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_add_noise(module):
            execute(module)
            score_noise.add_to(module)

        spec.loader.exec_module = execute_and_add_noise
        return spec


sys.meta_path.insert(0, NoiseOnImport())
