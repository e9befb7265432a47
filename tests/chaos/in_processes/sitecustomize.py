"""Runs at the start of every Python process of a cluster under test, which has this folder on its path: arms it."""

import os

if "SAGE_MOE_TEST_FAILPOINTS" in os.environ:
    from tests.chaos.failpoints import install

    install()
