"""The errors that Flame raises; the tree is drawn in ``flame_broker.errors``."""

from flame_broker.errors import *  # noqa: F403  # the same names, where users look for them
from flame_broker.errors import __all__  # noqa: F401  # re-exported
