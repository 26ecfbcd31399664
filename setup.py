"""What pyproject.toml cannot say about an installation: the module is typed.

Type checkers believe a single module if a folder of its name, which Python then ignores, contains py.typed.
"""

import pathlib

from setuptools import setup
from setuptools.command.build_py import build_py


class Build(build_py):
    """Build concurrent_prompts.py and, in a folder of its name, backends/, extras/ and py.typed."""

    def run(self) -> None:
        """Build them; for `pip install -e` the module alone, since it finds the folders beside it."""
        if self.editable_mode:
            self.distribution.packages = self.packages = []
        super().run()
        if not self.editable_mode:
            pathlib.Path(self.build_lib, "concurrent_prompts", "py.typed").touch()


setup(cmdclass={"build_py": Build})
