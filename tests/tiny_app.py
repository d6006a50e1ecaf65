"""A Flower app of fedllm's for tests: a folder with a pyproject.toml and, where it is wanted, rows to learn from."""

from tests.unit.test_server import write_rows

HEAD = """
[project]
name = "tiny"
version = "0.1.0"
dependencies = []
[tool.flwr.app]
publisher = "tests"
[tool.flwr.app.components]
serverapp = "fedllm.server_app:app"
clientapp = "fedllm.client_app:app"
[tool.flwr.app.config]
"""


def write_app(folder, config, rows=0):
    """Write an app with these lines of configuration, and ``train.csv`` with so many rows; returns the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "pyproject.toml").write_text(HEAD + config)
    if rows:
        write_rows(folder / "train.csv", 0, rows)
    return folder
