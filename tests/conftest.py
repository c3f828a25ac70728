"""Settings shared by all tests."""

import os

from hypothesis import settings

# No deadline: the first call of anything in torch is slow. In CI the examples are the same in every run.
settings.register_profile("project", deadline=None, max_examples=50, print_blob=True)
settings.register_profile("project-ci", settings.get_profile("project"), derandomize=True, database=None)
settings.load_profile("project-ci" if "CI" in os.environ else "project")
