"""The zoo: small models of every kind that people differentiate, each with a batch of inputs."""

from tests.zoo import attention, awkward, conv, graph, mlp, pretrained, recurrent, science, structures, tricky
from tests.zoo.registry import ENTRIES, TOLERANCE, Entry

FAMILIES = (mlp, conv, attention, recurrent, graph, science, structures, awkward, tricky, pretrained)

__all__ = ["ENTRIES", "FAMILIES", "TOLERANCE", "Entry"]
