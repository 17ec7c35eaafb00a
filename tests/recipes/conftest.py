import pytest
from evaluation.recipe_run import working_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A working folder with a run of two small networks in it, and a module with networks of
    somebody's own.
    """
    folder = tmp_path_factory.mktemp("work")
    working_folder(folder)
    return folder
