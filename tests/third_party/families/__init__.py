"""Every adapter, by title."""

from tests.third_party.families import deepseek, outside, sigmoid, softmax
from tests.third_party.family import Family

FAMILIES: dict[str, Family] = {family.title: family for part in (softmax, deepseek, sigmoid, outside)
                               for family in part.FAMILIES}
